"""Data-parallel worker threads for a compiled program. Each works on its share of the rows, and they sum their results.

Workers use a second core better than OpenMP threads in each small matrix product. For 16 minibatches of 256 rows, two workers
take 3.6 ms, one thread 5.5 ms and two OpenMP threads 4.1 ms. On a busy machine workers lose less (benchmarks/LOG.md). Workers
sum tensors with `compile.native.all_reduce`. If several processes share the rows, the calling thread of each also sums over the
processes. Knows nothing of what the program computes, nor of how processes communicate.
"""

import contextlib
import ctypes
import queue
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

LINE = 8  # int64 numbers per worker in the shared tensor, see native.cpp
WORKER_FIELDS = 6
END_SECONDS = 5.0  # for threads to stop after an error or Ctrl-C; each finishes its minibatch first
EXCHANGE = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_int64)


class Exchange(Protocol):
    """Communication with the other processes that run the same program."""

    @property
    def rank(self) -> int:
        """Rank of this process: 0, 1, ..."""
        ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all processes' x, with equal bits in each. An exception ends the program."""
        ...


class WorkerPool:
    """A compiled library and the threads that run it: the calling thread and `num_workers - 1` more."""

    def __init__(self, library: Path, num_workers: int, exchange: Exchange | None = None) -> None:
        """Load the library and start the threads. exchange: all-reduce over processes. Raises OSError or RuntimeError."""
        self._library = ctypes.CDLL(str(library))  # ctypes releases the GIL during a call
        self._container = ctypes.c_void_p()
        self._check(
            self._library.AOTInductorModelContainerCreateWithDevice(
                ctypes.byref(self._container), ctypes.c_size_t(num_workers), b"cpu", None
            )
        )
        num_outputs = ctypes.c_size_t()
        self._check(self._library.AOTInductorModelContainerGetNumOutputs(self._container, ctypes.byref(num_outputs)))
        self._num_outputs = num_outputs.value
        self._shared = torch.zeros(LINE * (num_workers + 1), dtype=torch.int64, device="cpu")
        self._faults: list[BaseException] = []
        self._hook = EXCHANGE() if exchange is None else exchange_hook(exchange, self._faults)  # C has only its address
        self.workers = [
            torch.tensor(
                [
                    *(worker_index, 0 if exchange is None else exchange.rank, num_workers),
                    *(self._shared.data_ptr(), 0, ctypes.cast(self._hook, ctypes.c_void_p).value or 0),
                ]
            )
            for worker_index in range(num_workers)
        ]
        self._queues: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in range(num_workers - 1)]
        self._done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        reference = weakref.ref(self)  # a strong reference in a thread would keep the pool alive
        for tasks in self._queues:
            threading.Thread(target=_work, args=(reference, tasks, self._done), name="fastppo-worker", daemon=True).start()
        weakref.finalize(self, _dismiss, self._queues)

    def run(self, inputs: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """Call the library with each of the inputs and return the outputs in the same order.

        Worker w runs inputs w, w + num_workers, and so on, in parallel with the other workers.

        Raises RuntimeError, an exception of the exchange with other processes, or KeyboardInterrupt. The other threads have
        stopped by then.
        """
        num_workers = len(self._queues) + 1
        shares = [list(enumerate(inputs))[worker::num_workers] for worker in range(num_workers)]
        results: list[dict[int, list[Tensor]] | BaseException] = []
        at_work = 0
        try:
            for tasks, share in zip(self._queues, shares[1:], strict=True):
                tasks.put(share)
                at_work += 1
            results.append({index: self._run(tensors) for index, tensors in shares[0]})
            while at_work:
                results.append(self._done.get())
                at_work -= 1
        except BaseException as error:
            self._shared[-LINE] = 1  # tells the other workers not to wait for this thread
            with contextlib.suppress(queue.Empty):  # a thread that still computes while the process exits may crash it
                for _ in range(at_work):
                    self._done.get(timeout=END_SECONDS)
            if not isinstance(error, Exception):
                raise
            results.append(error)
        if self._faults:
            raise self._faults[0]
        outputs: dict[int, list[Tensor]] = {}
        for result in results:
            if isinstance(result, BaseException):
                raise RuntimeError("a worker of the compiled program failed") from result
            outputs |= result
        return [output for _, output in sorted(outputs.items())]

    def _run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Call the library once. After any exception, the other workers stop waiting for this thread."""
        try:
            given = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(list(tensors))
            inputs = (ctypes.c_void_p * len(given))(*(_get_pointer(capsule, None) for capsule in given))
            outputs = (ctypes.c_void_p * self._num_outputs)()
            run = self._library.AOTInductorModelContainerRun
            self._check(
                run(
                    self._container,
                    inputs,
                    ctypes.c_size_t(len(given)),
                    outputs,
                    ctypes.c_size_t(self._num_outputs),
                    None,
                    None,
                )
            )
            return torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(
                [_new_capsule(output, None, None) for output in outputs]
            )
        except BaseException:
            self._shared[-LINE] = 1
            raise

    def _check(self, code: int) -> None:
        if code != 0:
            raise RuntimeError(f"the compiled program returned error {code}")


def exchange_hook(exchange: Exchange, faults: list[BaseException]) -> Any:
    """`exchange.all_reduce` as a C function that works in place. Exceptions are appended to `faults`."""

    def add_up(data: int, size: int) -> int:
        try:
            x = torch.frombuffer((ctypes.c_float * size).from_address(data), dtype=torch.float32)
            x.copy_(exchange.all_reduce(x))
        except BaseException as error:  # an exception cannot pass through the C code
            faults.append(error)
            return 1
        return 0

    return EXCHANGE(add_up)


def _work(pool: "weakref.ref[WorkerPool]", tasks: "queue.SimpleQueue[Any]", done: "queue.SimpleQueue[Any]") -> None:
    torch.set_num_threads(1)
    while (share := tasks.get()) is not None:
        alive = pool()
        if alive is not None:
            try:
                done.put({index: alive._run(tensors) for index, tensors in share})
            except BaseException as error:
                done.put(error)
        del alive, share


def _dismiss(queues: "list[queue.SimpleQueue[Any]]") -> None:
    for tasks in queues:
        tasks.put(None)


_get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_get_pointer.restype, _get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype, _new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]

"""Several threads that run one compiled program at once, each on its own share of the rows, and add up what they find.

A second core is worth more as a second worker than as a helper inside each small product: for minibatches of 256 rows two
workers take 3.6 ms where one thread takes 5.5 and two OpenMP threads 4.1 (16 minibatches), and where other processes want the
cores too they lose less (benchmarks/LOG.md). What the workers exchange goes through `compile.native.all_reduce`; where several
processes share the rows, the caller's thread of each adds what its workers found to what the others' have. Knows nothing of
what the program computes, nor of how processes talk to each other.
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

LINE = 8  # int64 numbers of a worker in the shared tensor, see native.cpp
WORKER_FIELDS = 6
END_SECONDS = 5.0  # that threads have to stop after an error or Ctrl-C: each finishes a minibatch at most
_EXCHANGE = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_int64)


class Exchange(Protocol):
    """What a program needs of the other processes that run it at the same time."""

    @property
    def rank(self) -> int:
        """Of this process: 0, 1, ..."""
        ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all processes' x, the same bits in each; what it raises ends the program."""
        ...


class WorkerPool:
    """A compiled library and the threads that run it: the caller's and `num_workers - 1` of its own."""

    def __init__(self, library: Path, num_workers: int, exchange: Exchange | None = None) -> None:
        """Load the library and start the threads; exchange: of several processes. Raises OSError or RuntimeError."""
        self._library = ctypes.CDLL(str(library))  # calls through ctypes leave Python's lock to the other threads
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
        self._hook = _EXCHANGE() if exchange is None else _hook(exchange, self._faults)  # kept: C has only its address
        self.workers = [
            torch.tensor(
                [
                    *(worker_index, 0 if exchange is None else exchange.rank, num_workers),
                    *(self._shared.data_ptr(), 0, ctypes.cast(self._hook, ctypes.c_void_p).value or 0),
                ]
            )
            for worker_index in range(num_workers)
        ]
        self._jobs: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in range(num_workers - 1)]
        self._done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        reference = weakref.ref(self)  # a thread with a reference to the pool would keep it alive
        for job in self._jobs:
            threading.Thread(target=_work, args=(reference, job, self._done), name="fastppo-worker", daemon=True).start()
        weakref.finalize(self, _dismiss, self._jobs)

    def run(self, inputs: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """Call the library with each of the inputs, as many at once as there are workers, the first with the first, and return
        its outputs in their order.

        Raises RuntimeError, what the exchange with other processes raised, or KeyboardInterrupt, after which the other threads
        have stopped too.
        """
        num_workers = len(self._jobs) + 1
        shares = [list(enumerate(inputs))[worker::num_workers] for worker in range(num_workers)]
        results: list[dict[int, list[Tensor]] | BaseException] = []
        at_work = 0
        try:
            for job, share in zip(self._jobs, shares[1:], strict=True):
                job.put(share)
                at_work += 1
            results.append({index: self._run(tensors) for index, tensors in shares[0]})
            while at_work:
                results.append(self._done.get())
                at_work -= 1
        except BaseException as error:
            self._shared[-LINE] = 1  # the others do not wait for this thread any more
            with contextlib.suppress(queue.Empty):  # one that still computes while the process ends may crash it
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
        """One call of the library. Whatever it raises, the threads that wait for this one are told that it will not come."""
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


def _hook(exchange: Exchange, faults: list[BaseException]) -> Any:
    """`exchange.all_reduce` in place as a C function; what it raises is put into `faults`."""

    def add_up(data: int, size: int) -> int:
        try:
            x = torch.frombuffer((ctypes.c_float * size).from_address(data), dtype=torch.float32)
            x.copy_(exchange.all_reduce(x))
        except BaseException as error:  # C code lies between here and the caller
            faults.append(error)
            return 1
        return 0

    return _EXCHANGE(add_up)


def _work(pool: "weakref.ref[WorkerPool]", jobs: "queue.SimpleQueue[Any]", done: "queue.SimpleQueue[Any]") -> None:
    torch.set_num_threads(1)
    while (share := jobs.get()) is not None:
        alive = pool()
        if alive is not None:
            try:
                done.put({index: alive._run(tensors) for index, tensors in share})
            except BaseException as error:
                done.put(error)
        del alive, share


def _dismiss(jobs: "list[queue.SimpleQueue[Any]]") -> None:
    for job in jobs:
        job.put(None)


_get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_get_pointer.restype, _get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype, _new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]

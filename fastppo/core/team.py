"""Several threads that run one compiled program at once, each on its own share of the rows, and add up what they find.

A second core is worth more as a second worker than as a helper inside each small product: for minibatches of 256 rows two
workers take 3.6 ms where one thread takes 5.5 and two OpenMP threads 4.1 (16 minibatches), and where other processes want the
cores too they lose less (benchmarks/LOG.md). What the workers exchange goes through the operator `fastppo::all_reduce`, whose
C++ is compiled into each program. Knows nothing of what the program computes.
"""

import ctypes
import queue
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("fastppo::all_reduce", mutates_args=())
def all_reduce(x: Tensor, worker: Tensor) -> Tensor:
    """The sum of all workers' float32 `x`, in the order of their ranks; waits for them. In compiled programs only, see SHIM."""
    raise RuntimeError("fastppo::all_reduce runs in compiled programs only")


@all_reduce.register_fake
def _(x: Tensor, worker: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# worker: int64 (4,): rank, number of workers, address of the meeting place, calls so far.
# The meeting place has 64 bytes for each worker: calls it has come to, where its x lies, calls it has left; and 64 more whose
# first number is not 0 once a worker has failed. Nobody leaves before all have read. Who waits spins some 20 us, then yields.
MEETING_LINE = 8  # int64 numbers
WORKER_FIELDS = 4
SHIM = """
AOTITorchError aoti_torch_cpu_all_reduce(AtenTensorHandle x, AtenTensorHandle worker, AtenTensorHandle* result) {
    void *mine, *self_data, *sum_data;
    int64_t size;
    if (aoti_torch_clone(x, result) || aoti_torch_get_numel(x, &size) || aoti_torch_get_data_ptr(x, &mine) ||
        aoti_torch_get_data_ptr(worker, &self_data) || aoti_torch_get_data_ptr(*result, &sum_data)) return 1;
    auto self = static_cast<int64_t*>(self_data);
    auto sum = static_cast<float*>(sum_data);
    const int64_t rank = self[0], workers = self[1], call = ++self[3];
    auto place = reinterpret_cast<int64_t*>(self[2]);
    auto arrive_and_wait = [&](int64_t field) {
        __atomic_store_n(place + 8 * rank + field, call, __ATOMIC_RELEASE);
        for (int64_t other = 0; other < workers; ++other) {
            for (int64_t spins = 0; __atomic_load_n(place + 8 * other + field, __ATOMIC_ACQUIRE) < call; ++spins) {
                if (__atomic_load_n(place + 8 * workers, __ATOMIC_RELAXED)) return false;
                if (spins > 10000) std::this_thread::yield();
            }
        }
        return true;
    };
    __atomic_store_n(place + 8 * rank + 1, reinterpret_cast<int64_t>(mine), __ATOMIC_RELAXED);
    if (!arrive_and_wait(0)) return 1;
    for (int64_t other = 0; other < workers; ++other) {
        auto theirs = reinterpret_cast<const float*>(__atomic_load_n(place + 8 * other + 1, __ATOMIC_RELAXED));
        if (other == 0) __builtin_memcpy(sum, theirs, size * sizeof(float));
        else for (int64_t i = 0; i < size; ++i) sum[i] += theirs[i];
    }
    return arrive_and_wait(2) ? 0 : 1;
}
"""


class Team:
    """A compiled library and the threads that run it: the caller's and `num_workers - 1` of its own."""

    def __init__(self, library: Path, num_workers: int) -> None:
        """Load the library and start the threads. Raises OSError or RuntimeError."""
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
        self._place = torch.zeros(MEETING_LINE * (num_workers + 1), dtype=torch.int64)
        self.workers = [torch.tensor([rank, num_workers, self._place.data_ptr(), 0]) for rank in range(num_workers)]
        self._jobs: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in range(num_workers - 1)]
        self._done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        reference = weakref.ref(self)  # a thread that held the team would keep it alive
        for job in self._jobs:
            threading.Thread(target=_work, args=(reference, job, self._done), name="fastppo-worker", daemon=True).start()
        weakref.finalize(self, _dismiss, self._jobs)

    def run(self, inputs: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """Run the library once for each worker, at the same time: its inputs in, its outputs out. Raises RuntimeError."""
        for number, job in enumerate(self._jobs, start=1):
            job.put((number, inputs[number]))
        results: list[Any] = [self._run(inputs[0])] + [None] * len(self._jobs)
        for _ in self._jobs:
            number, result = self._done.get()
            results[number] = result
        for result in results:
            if isinstance(result, BaseException):
                raise RuntimeError("a worker of the compiled program failed") from result
        return results

    def _run(self, tensors: Sequence[Tensor]) -> "list[Tensor] | BaseException":
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
        except BaseException as error:
            self._place[-MEETING_LINE] = 1  # nobody waits for this worker any more
            return error

    def _check(self, code: int) -> None:
        if code != 0:
            raise RuntimeError(f"the compiled program returned error {code}")


def _work(team: "weakref.ref[Team]", jobs: "queue.SimpleQueue[Any]", done: "queue.SimpleQueue[Any]") -> None:
    torch.set_num_threads(1)
    while (job := jobs.get()) is not None:
        number, tensors = job
        alive = team()
        if alive is not None:
            done.put((number, alive._run(tensors)))
        del alive, tensors, job


def _dismiss(jobs: "list[queue.SimpleQueue[Any]]") -> None:
    for job in jobs:
        job.put(None)


_get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_get_pointer.restype, _get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype, _new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]

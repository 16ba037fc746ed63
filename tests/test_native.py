"""The helpers in C++ that compiled programs use: memory of tensors, and a compiler that does not work."""

import pytest

from fastppo.compile.compile_errors import CompileError
from fastppo.compile.inductor import compile_program
from fastppo.envs.classic import CartPole
from support.device_envs import setup
from support.kernels import share_helpers
from support.processes import in_a_process

POOL = """
import pathlib, queue, sys, threading
import numpy as np
import torch
from fastppo.compile import native

torch.set_num_threads(1)
before = torch.arange(1000.0)  # of the allocator from before: freed later, by its own means
native.load(pathlib.Path(sys.argv[1]))
SIZES = [0, 1, 63, 64, 65, 4096, 2**20 - 1, 2**20, 2**20 + 1, 10 * 2**20]
failures = []

def check(condition, *what):
    if not condition:
        failures.append(what)

def filled(size, value):
    tensor = torch.empty(size, dtype=torch.uint8)
    check(tensor.data_ptr() % 64 == 0, "alignment", size)
    return tensor.fill_(value), value

def worker(number, given, taken, rounds):
    generator = np.random.default_rng(number)
    held = []
    for index in range(rounds):
        held.append(filled(SIZES[generator.integers(len(SIZES))], (number * 37 + index) % 251))
        if len(held) > 12:
            given.put(held.pop(int(generator.integers(len(held)))))
        try:
            tensor, value = taken.get_nowait()
            check(bool((tensor == value).all()), "another thread's tensor")
        except queue.Empty:
            pass
    for tensor, value in held:
        check(bool((tensor == value).all()), "overwritten")

# freed by another thread than made them; threads end with blocks in their lists, and others begin
for _ in range(3):
    queues = [queue.SimpleQueue() for _ in range(3)]
    threads = [threading.Thread(target=worker, args=(n, queues[n], queues[n - 1], 150)) for n in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]

live = [filled(size, index) for index in range(40) for size in SIZES[:8]]
check(len({t.data_ptr() for t, _ in live if t.numel()}) == sum(t.numel() > 0 for t, _ in live), "one block twice")
check(all(bool((t == value).all()) for t, value in live), "overwritten")
address = torch.empty(1000, dtype=torch.uint8).data_ptr()
check(torch.empty(1024, dtype=torch.uint8).data_ptr() == address, "a block that was freed is used again")

tensor = torch.arange(500.0)
array = tensor.numpy()
del tensor
check(array.sum() == 500 * 499 / 2, "an array keeps its tensor")
check(torch.from_numpy(array + 1).sum().item() == 500 * 501 / 2, "from numpy")
del array
grown = torch.arange(100, dtype=torch.uint8)
for size in (0, 50, 65, 5000, 2**20 + 1, 10, 0, 200):
    kept = grown[:min(size, len(grown))].clone()
    grown.resize_(size)
    check(grown.data_ptr() % 64 == 0, "alignment after resize_")
    check(torch.equal(grown[:len(kept)], kept), "resize_", size)
    grown[len(kept):] = 7
storage = torch.arange(10.0).untyped_storage()
storage.resize_(100000)
check(torch.tensor([], dtype=torch.float32).set_(storage)[:10].tolist() == list(range(10)), "resize_ of a storage")
check(before.sum().item() == 999 * 500, "from before")
del before
check(torch.randn(64, 64).matmul(torch.randn(64, 64)).isfinite().all(), "arithmetic")
print("failures", failures)
"""


@pytest.mark.usefixtures("inductor")
def test_memory_of_tensors_under_the_pool(programs_dir, tmp_path):
    """Sizes around every border, tensors freed by other threads, threads that end, numpy, resize_: aligned and never shared.

    In a process of its own: what it changes is for good.
    """
    assert in_a_process(POOL, tmp_path, share_helpers(programs_dir, tmp_path)) == "failures []\n"


@pytest.mark.parametrize(
    ("compiler", "told"),
    [
        (None, r"^there is no C\+\+ compiler; install g\+\+ or name one in CXX$"),
        ("#!/bin/sh\nexit 1\n", r"^native\.cpp does not compile: "),
        (
            "#!/bin/sh\nprintf '\\nno such header\\nand much more\\n' >&2\nexit 1\n",
            r"^native\.cpp does not compile: no such header$",
        ),
        ("not a program", r"^OSError: .*Exec format error"),
    ],
    ids=["missing", "silent", "talkative", "no program"],
)
def test_a_compiler_that_does_not_work_is_told_in_one_line(compiler, told, tmp_path, monkeypatch):
    """For the helpers, which are compiled first: CompileError, one line, nothing left behind."""
    cache = tmp_path / "cache"
    if compiler is not None:
        (tmp_path / "c++").write_text(compiler)
        (tmp_path / "c++").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    ours = setup(CartPole())
    with pytest.raises(CompileError, match=told) as caught:
        compile_program(ours.program(), ours.arguments(), cache)
    assert "\n" not in str(caught.value)
    assert not list(cache.iterdir())

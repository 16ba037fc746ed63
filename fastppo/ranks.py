"""Data-parallel training in several processes: `torchrun --nproc-per-node 4 -m fastppo.train`.

Each of the K processes is a rank with N / K environments and all parameters. Ranks communicate through torch.distributed, with
gloo on CPUs and NCCL on GPUs. All such calls are in this module. If a rank is lost, the others raise a TrainingFault. Knows
nothing of what is trained.
"""

import contextlib
import os
import re
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastppo.errors import RankLost, TrainingFault, UsageError, brief
from fastppo.system.cpus import machine_cores

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store  # some builds of torch lack it

Value = TypeVar("Value")
Number = TypeVar("Number", int, float)
Rows = TypeVar("Rows", Tensor, NDArray[Any])

# Limit for a rank that is alive but does not arrive. Longer than any work that one rank does alone, environments aside.
TIMEOUT_SECONDS = 300.0
SILENT_SECONDS = 30  # limit for a machine that no longer answers


@dataclass(frozen=True)
class Ranks:
    """This process's place among the ranks. `Ranks()` is a single process: its methods return their arguments.

    All ranks must call the collective methods in the same order. They raise TrainingFault if a rank is lost.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # rank on this machine
    device: torch.device | str = "cpu"  # device of the tensors to exchange
    store: Any = None  # torch.distributed's; it survives the loss of a rank if torchrun hosts it

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    @property
    def launcher(self) -> str:
        """The command that started this process, up to "-m"."""
        if self.size == 1:
            return "python"
        local_size = _number("LOCAL_WORLD_SIZE", self.size)
        return f"torchrun --nproc-per-node {local_size}" if local_size == self.size else "torchrun ..."

    def share(self, x: Rows, dim: int = 0) -> Rows:
        """This rank's part of axis `dim`, as a view. The number of ranks must divide the size of the axis."""
        part = x.shape[dim] // self.size
        return x[(slice(None),) * dim + (slice(self.rank * part, (self.rank + 1) * part),)]

    def gather(self, x: Rows, dim: int = 0) -> Rows:
        """All ranks' parts joined along axis `dim`, on every rank. The inverse of `share`."""
        if self.size == 1:
            return x
        if isinstance(x, np.ndarray):
            return self.gather(torch.from_numpy(x).to(self.device), dim).cpu().numpy()
        # bytes, since not every backend supports every dtype
        own = x.contiguous().reshape(-1).view(torch.uint8)
        parts = [torch.empty_like(own) for _ in range(self.size)]
        with self._others():
            torch.distributed.all_gather(parts, own)
        return torch.cat([part.view(x.dtype).view(x.shape) for part in parts], dim)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x as a new tensor, with equal bits on every rank."""
        if self.size == 1:
            return x
        x = x.clone(memory_format=torch.contiguous_format)
        with self._others():
            torch.distributed.all_reduce(x)
        return x

    def total(self, *sums: Tensor) -> tuple[Tensor, ...]:
        """`all_reduce` of several tensors of one dtype in one exchange. Implements core.losses.Total."""
        if self.size == 1:
            return sums
        parts = self.all_reduce(torch.cat([x.reshape(-1) for x in sums])).split([x.numel() for x in sums])
        return tuple(part.view_as(x) for part, x in zip(parts, sums, strict=True))

    def highest(self, *numbers: Number) -> list[Number]:
        """The elementwise maximum over ranks, for example of a signal that one rank has received."""
        if self.size == 1:
            return list(numbers)
        x = torch.tensor(numbers, device=self.device)
        with self._others():
            torch.distributed.all_reduce(x, torch.distributed.ReduceOp.MAX)
        highest: list[Number] = x.tolist()
        return highest

    def check(self, error: Exception | None) -> None:
        """Raise an error on all ranks if any rank has one. Ranks without one raise the first failed rank's message and type."""
        (failed,) = self.highest(int(error is not None))
        if not failed:
            return
        if self.size == 1 and error is not None:
            raise error
        found: list[Any] = [None] * self.size
        with self._others():
            torch.distributed.all_gather_object(found, None if error is None else (isinstance(error, UsageError), str(error)))
        is_usage, message = next(failure for failure in found if failure is not None)
        if error is not None:
            raise error
        raise (UsageError if is_usage else TrainingFault)(message)

    def agree(self, value: Value) -> Value:
        """Rank 0's value on every rank. It must be picklable."""
        if self.size == 1:
            return value
        values = [value]
        with self._others():
            torch.distributed.broadcast_object_list(values, device=torch.device(self.device))
        return values[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.highest(0)

    def learn_settings(self) -> dict[str, Any]:
        """Arguments for an eager core.ppo.learn on several ranks. A compiled one needs `num_ranks` and this object instead."""
        if self.size == 1:
            return {}
        worker = torch.tensor([0, self.rank], device=self.device)
        return {"num_ranks": self.size, "worker": worker, "all_reduce": lambda x, _worker, _over_ranks: self.all_reduce(x)}

    def close(self) -> None:
        """Leave the process group. Other ranks notice at their next exchange."""
        if self.size > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    @contextlib.contextmanager
    def _others(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # torch.distributed's errors are RuntimeErrors
            # strip gloo's source location in front and its guesses at the end
            reason = re.sub(r"^\[\S*\] ", "", str(error)).partition(". ")[0]
            message = f"rank {self.rank} of {self.size}: another rank has gone: {reason[:200]}"
            raise RankLost(message, not self._is_first_to_report()) from None

    def _is_first_to_report(self) -> bool:
        """Whether this rank calls this first on its machine. It then reports in place of rank 0, which may be lost."""
        try:
            return bool(self.store.add(f"told on machine {os.environ.get('GROUP_RANK')}", 1) == 1)
        except RuntimeError:  # rank 0 hosted the store, or the network is cut
            return self.local_rank <= 1


ALONE = Ranks()


@contextlib.contextmanager
def checked(ranks: Ranks) -> Iterator[None]:
    """Raise a TrainingFault or UsageError of one process in all processes, at the end of the block."""
    failed: TrainingFault | UsageError | None = None
    try:
        yield
    except RankLost:
        raise
    except (TrainingFault, UsageError) as error:
        failed = error
    ranks.check(failed)


def start_ranks(device: torch.device, timeout: float = TIMEOUT_SECONDS) -> Ranks:
    """Connect to the other processes started by torchrun. Returns `Ranks()` without torchrun.

    With CUDA, each rank of a machine gets its own GPU as the current device. On CPUs, each rank gets an equal part of the
    machine's cores for eager programs, unless OMP_NUM_THREADS differs from torchrun's default of 1.

    Args:
        device: the device to train on, "cpu" or "cuda", the same for all ranks.
        timeout: seconds that a rank waits for the others.

    Raises:
        UsageError: torchrun's environment variables are incomplete, there are fewer GPUs than ranks, or ranks are missing.
    """
    size = _number("WORLD_SIZE", 1)
    if size == 1:
        return Ranks()
    rank, local_rank = _number("RANK"), _number("LOCAL_RANK", 0)
    local_size = _number("LOCAL_WORLD_SIZE", size)
    if device.type == "cuda":
        if device.index is not None:
            raise UsageError(f"--device {device}: each of the {local_size} ranks has a GPU of its own; use --device cuda")
        if torch.cuda.device_count() < local_size:
            raise UsageError(
                f"--nproc-per-node {local_size}: each rank wants a GPU of its own and there are {torch.cuda.device_count()}; "
                f"use --nproc-per-node {max(torch.cuda.device_count(), 1)}, or --device cpu"
            )
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
    elif device.type != "cpu":
        raise UsageError(f"--device {device} trains in one process: with torchrun use --device cpu or cuda")
    else:
        torch.set_num_threads(threads_per_rank(local_size))
    from torch.distributed.rendezvous import rendezvous

    waits = timedelta(seconds=timeout)
    try:
        store, rank, size = next(rendezvous("env://", timeout=waits))
        store = _for_this_start(store, rank, size, timeout)
        torch.distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=waits,
            device_id=device if device.type == "cuda" else None,
        )
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"rank {rank} of {size} did not meet the others at MASTER_ADDR={os.environ.get('MASTER_ADDR')} "
            f"MASTER_PORT={os.environ.get('MASTER_PORT')} ({brief(error)}): start them with torchrun --nproc-per-node {size}"
        ) from None
    _watch_connections()
    return Ranks(rank, size, local_rank, device, store)


def _for_this_start(store: "Store", rank: int, size: int, timeout: float) -> "Store":
    """A part of the store for the ranks of this start. Raises RuntimeError if they do not arrive in time.

    torchrun's store survives a restart and still holds the addresses of lost ranks. Machines may disagree on the number of
    restarts (https://github.com/pytorch/pytorch/issues/135712). So rank 0 gives each start a unique name, and marks it complete
    once all other ranks have joined it.
    """
    from torch.distributed.distributed_c10d import PrefixStore

    if rank == 0:
        start = uuid.uuid4().hex
        store.set("start", start)
        store.wait([f"{start}/{other}" for other in range(1, size)], timedelta(seconds=timeout))
        store.set(f"{start}/complete", "")
        return PrefixStore(start, store)
    joined, end = "", time.monotonic() + timeout
    while time.monotonic() < end:
        start = store.get("start").decode()
        if not store.check([f"{start}/{rank}"]):  # otherwise the name belongs to an earlier start
            store.set(f"{start}/{rank}", "")
            joined = start
        if start == joined and store.check([f"{start}/complete"]):
            return PrefixStore(start, store)
        time.sleep(0.05)
    raise RuntimeError("rank 0 did not come")


def _watch_connections() -> None:
    """Close this process's connections when the other machine is off or unreachable, even while they are idle.

    A process that is only busy is not affected, since its kernel answers. Without this, gloo waits for its timeout.
    """
    if sys.platform != "linux":
        return
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the descriptor of the listing itself is closed by now
            if not os.readlink(entry).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6):
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENT_SECONDS // 3)
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, SILENT_SECONDS // 3)
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * SILENT_SECONDS)


def is_first_of_machine() -> bool:
    """Whether this process has local rank 0; before `start_ranks` too."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def is_alone() -> bool:
    """Whether torchrun has started no other process; before `start_ranks` too."""
    return _number("WORLD_SIZE", 1) == 1


def threads_per_rank(local_size: int) -> int:
    """Threads for each rank on this machine: OMP_NUM_THREADS if the user set it, else an equal part of the cores.

    torchrun sets an unset OMP_NUM_THREADS to 1, so a value of 1 is not taken as the user's choice.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "1")
    if wanted != "1":
        return torch.get_num_threads()
    return max(1, machine_cores() // local_size)


def check_shares(
    num_envs: int, num_steps: int, minibatch_size: int, num_shards: int, num_ranks: int, rows_per_unit: int = 1
) -> None:
    """Check that K ranks, G shards, N environments and M rows a minibatch give equal parts. Raises UsageError.

    rows_per_unit: rows of a minibatch that stay together.
    """
    if num_shards % num_ranks:
        raise UsageError(
            f"--minibatch-shards {num_shards} is not a multiple of the {num_ranks} ranks; nearest that are: "
            f"{_nearest(num_shards, lambda value: value % num_ranks == 0)}"
        )
    parts = f"{num_ranks} ranks" if num_shards == num_ranks else f"--minibatch-shards {num_shards}"
    if num_envs % num_shards:
        raise UsageError(
            f"--num-envs {num_envs} does not fall into equal parts for {parts}; nearest that do: "
            f"{_nearest(num_envs, lambda value: value % num_shards == 0)}"
        )
    if minibatch_size // rows_per_unit % num_shards:
        batch_size, unit = num_envs * num_steps, num_shards * rows_per_unit
        legal = _nearest(minibatch_size, lambda rows: rows % unit == 0 and batch_size % rows == 0, batch_size)
        counts = " or ".join(str(batch_size // int(rows)) for rows in legal.split(" or "))
        raise UsageError(
            f"minibatches of {minibatch_size} rows do not fall into equal parts for {parts}; nearest that do: "
            f"--minibatch-size {legal}, or --num-minibatches {counts}"
        )


def _nearest(value: int, fits: Callable[[int], bool], most: int | None = None) -> str:
    """The nearest legal numbers below and above, as '8 or 12'."""
    below = next((number for number in range(value - 1, 0, -1) if fits(number)), None)
    above = next((number for number in range(value + 1, (most or 2**31) + 1) if fits(number)), None)
    return " or ".join(str(number) for number in (below, above) if number is not None)


def _number(name: str, default: int | None = None) -> int:
    """A number from an environment variable of torchrun, or the default. Raises UsageError if neither is there."""
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal():
        raise UsageError(
            f"WORLD_SIZE={os.environ.get('WORLD_SIZE')} is set but {name} is {text or 'not'}: "
            f"start with torchrun --nproc-per-node {os.environ.get('WORLD_SIZE')}, or unset WORLD_SIZE"
        )
    return int(text)

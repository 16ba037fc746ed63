"""Processes that train one agent together: `torchrun --nproc-per-node 4 -m fastppo.train`. Knows nothing of what is trained.

Each process is a rank with N / K of the environments and all of the parameters. What they tell each other goes through
torch.distributed, gloo on CPUs and NCCL on GPUs, and through here; a rank that is gone is a TrainingFault in the others.
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
    from torch.distributed.distributed_c10d import Store  # which some builds of torch lack

Value = TypeVar("Value")
Rows = TypeVar("Rows", Tensor, NDArray[Any])

# For a rank that is there and does not come: longer than the slowest thing that one of them does alone, its environments aside.
TIMEOUT_SECONDS = 300.0
SILENT_SECONDS = 30  # for a machine that does not answer any more


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together. `Ranks()` is one process alone: all that it does is hand things back.

    Methods that talk to the others are called by all ranks, in the same order; they raise TrainingFault where one is gone.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among those on this machine
    device: torch.device | str = "cpu"  # where what is exchanged has to be
    store: Any = None  # torch.distributed's, which outlives a rank where torchrun has it

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    @property
    def launcher(self) -> str:
        """What started this process, before "-m"."""
        if self.size == 1:
            return "python"
        local_size = _number("LOCAL_WORLD_SIZE", self.size)
        return f"torchrun --nproc-per-node {local_size}" if local_size == self.size else "torchrun ..."

    def share(self, x: Rows, dim: int = 0) -> Rows:
        """This rank's part of the axis `dim`, a view; the size of the axis is a multiple of the number of ranks."""
        part = x.shape[dim] // self.size
        return x[(slice(None),) * dim + (slice(self.rank * part, (self.rank + 1) * part),)]

    def gather(self, x: Rows, dim: int = 0) -> Rows:
        """All ranks' parts joined along the axis `dim`, on every rank: what `share` takes apart."""
        if self.size == 1:
            return x
        if isinstance(x, np.ndarray):
            return self.gather(torch.from_numpy(x).to(self.device), dim).cpu().numpy()
        # bytes: not every backend knows every dtype
        own = x.contiguous().reshape(-1).view(torch.uint8)
        parts = [torch.empty_like(own) for _ in range(self.size)]
        with self._others():
            torch.distributed.all_gather(parts, own)
        return torch.cat([part.view(x.dtype).view(x.shape) for part in parts], dim)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, a new tensor; the same bits on every rank."""
        if self.size == 1:
            return x
        x = x.clone(memory_format=torch.contiguous_format)
        with self._others():
            torch.distributed.all_reduce(x)
        return x

    def total(self, *sums: Tensor) -> tuple[Tensor, ...]:
        """core.losses.Total: `all_reduce` of several tensors of one dtype in one exchange."""
        if self.size == 1:
            return sums
        parts = self.all_reduce(torch.cat([x.reshape(-1) for x in sums])).split([x.numel() for x in sums])
        return tuple(part.view_as(x) for part, x in zip(parts, sums, strict=True))

    def highest(self, *numbers: int) -> list[int]:
        """The largest of all ranks' numbers, each by itself: of a signal that one of them has received, for one."""
        if self.size == 1:
            return list(numbers)
        x = torch.tensor(numbers, device=self.device)
        with self._others():
            torch.distributed.all_reduce(x, torch.distributed.ReduceOp.MAX)
        return x.tolist()

    def check(self, error: Exception | None) -> None:
        """Raise on every rank what was raised on one: its own there, the first one's message elsewhere, of the same kind."""
        (failed,) = self.highest(int(error is not None))
        if not failed:
            return
        if self.size == 1 and error is not None:
            raise error
        found: list[Any] = [None] * self.size
        with self._others():
            torch.distributed.all_gather_object(found, None if error is None else (isinstance(error, UsageError), str(error)))
        is_usage, message = next(told for told in found if told is not None)
        if error is not None:
            raise error
        raise (UsageError if is_usage else TrainingFault)(message)

    def agree(self, value: Value) -> Value:
        """Rank 0's value, on every rank; anything that can be pickled."""
        if self.size == 1:
            return value
        values = [value]
        with self._others():
            torch.distributed.broadcast_object_list(values, device=torch.device(self.device))
        return values[0]

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.highest(0)

    def learn_settings(self) -> dict[str, Any]:
        """What an eager core.ppo.learn takes to be one of several. Compiled, it takes `num_ranks` alone, and is given this."""
        if self.size == 1:
            return {}
        worker = torch.tensor([0, self.rank], device=self.device)
        return {"num_ranks": self.size, "worker": worker, "all_reduce": lambda x, _worker, _over_ranks: self.all_reduce(x)}

    def close(self) -> None:
        """Leave; the others notice when they ask for something."""
        if self.size > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    @contextlib.contextmanager
    def _others(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # torch.distributed's own errors are of this kind too
            # without the line of gloo's source before it and the guesses behind it
            reason = re.sub(r"^\[\S*\] ", "", str(error)).partition(". ")[0]
            message = f"rank {self.rank} of {self.size}: another rank has gone: {reason[:200]}"
            raise RankLost(message, not self._is_first_to_tell()) from None

    def _is_first_to_tell(self) -> bool:
        """Whether no other rank of this machine has asked this: rank 0, which speaks otherwise, may be the one that is gone."""
        try:
            return bool(self.store.add(f"told on machine {os.environ.get('GROUP_RANK')}", 1) == 1)
        except RuntimeError:  # it was rank 0's, or is on the other side of a cut
            return self.local_rank <= 1


ALONE = Ranks()


@contextlib.contextmanager
def checked(ranks: Ranks) -> Iterator[None]:
    """A fault or wrong use in one process, raised in all of them once they are here."""
    failed: TrainingFault | UsageError | None = None
    try:
        yield
    except RankLost:
        raise
    except (TrainingFault, UsageError) as error:
        failed = error
    ranks.check(failed)


def start_ranks(device: torch.device, timeout: float = TIMEOUT_SECONDS) -> Ranks:
    """Meet the other processes that torchrun has started; `Ranks()` where it has not.

    On GPUs each rank of a machine gets its own, which becomes the current one. Eager programs of each rank get an equal part
    of the machine's cores, where torchrun has set the one thread that it sets without being asked.

    Args:
        device: what is trained on, as all ranks name it: "cpu" or "cuda".
        timeout: seconds that a rank waits for the others before it gives up.

    Raises:
        UsageError: the environment of torchrun is not complete, there are fewer GPUs than ranks, or the others are not there.
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
    """A part of the store for the ranks that are there now. Raises RuntimeError where they do not come.

    torchrun's own store outlives a restart, and with it the addresses of ranks that are gone; how many restarts there were is
    not the same on every machine (https://github.com/pytorch/pytorch/issues/135712). So rank 0 names each start, and calls it
    complete once all others have answered to that name.
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
        if not store.check([f"{start}/{rank}"]):  # else this is that of a rank before this one
            store.set(f"{start}/{rank}", "")
            joined = start
        if start == joined and store.check([f"{start}/complete"]):
            return PrefixStore(start, store)
        time.sleep(0.05)
    raise RuntimeError("rank 0 did not come")


def _watch_connections() -> None:
    """Have this process's connections end when the other machine is off or cut off, whether or not something is under way.

    Its kernel answers for a process that is only busy. Without this, gloo waits for its timeout.
    """
    if sys.platform != "linux":
        return
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # one that was for listing them, and is closed by now
            if not os.readlink(entry).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6):
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENT_SECONDS // 3)
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, SILENT_SECONDS // 3)
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * SILENT_SECONDS)


def threads_per_rank(local_size: int) -> int:
    """Threads for each of the ranks on this machine: OMP_NUM_THREADS where somebody set it, else an equal part of the cores.

    torchrun sets it to 1 for every rank unless it is set already, so a 1 does not count as somebody's wish.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "1")
    if wanted != "1":
        return torch.get_num_threads()
    return max(1, machine_cores() // local_size)


def check_shares(
    num_envs: int, num_steps: int, minibatch_size: int, num_shards: int, num_ranks: int, rows_per_unit: int = 1
) -> None:
    """Refuse what cannot be cut into equal parts: K ranks, G shards, N environments, M rows a minibatch. Raises UsageError.

    rows_per_unit: of a minibatch, that stay together.
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
    """'8 or 12': the nearest legal numbers below and above."""
    below = next((number for number in range(value - 1, 0, -1) if fits(number)), None)
    above = next((number for number in range(value + 1, (most or 2**31) + 1) if fits(number)), None)
    return " or ".join(str(number) for number in (below, above) if number is not None)


def _number(name: str, default: int | None = None) -> int:
    """A number that torchrun has put into the environment."""
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal():
        raise UsageError(
            f"WORLD_SIZE={os.environ.get('WORLD_SIZE')} is set but {name} is {text or 'not'}: "
            f"start with torchrun --nproc-per-node {os.environ.get('WORLD_SIZE')}, or unset WORLD_SIZE"
        )
    return int(text)

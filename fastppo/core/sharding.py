"""Share one program's work between several calls: threads of a process (workers) and processes (ranks).

Knows nothing of what is computed, nor of how workers and ranks communicate.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from fastppo.core.contracts import AllReduce, Execution


@dataclass(frozen=True)
class Shard:
    """One call's part of the work. With one worker and one rank every method returns its argument.

    The workers of a rank get the same tensors, and each computes its own part of them. Each rank gets the tensors of its own
    environments. All methods return the same bits to every worker.

    Attributes:
        worker: int64: the number of this worker in [0, num_workers), the rank of its process, then the arguments of all_reduce.

    Raises:
        ValueError: there are several workers or ranks, and `worker` is None.
    """

    worker: Tensor | None = None
    num_workers: int = 1
    num_ranks: int = 1
    all_reduce: AllReduce | None = None

    @classmethod
    def of(cls, worker: Tensor | None, execution: Execution) -> Self:
        """The part of the call with this `worker`."""
        return cls(worker, execution.num_workers, execution.num_ranks, execution.all_reduce)

    def __post_init__(self) -> None:
        if self.worker is None and self.num_workers * self.num_ranks > 1:
            raise ValueError(
                f"num_workers={self.num_workers} and num_ranks={self.num_ranks} need `worker`, "
                "which part of the rows is this call's"
            )

    def mine(self, x: Tensor, dim: int) -> Tensor:
        """This worker's part of the axis `dim`, which num_workers divides."""
        if self.worker is None or self.num_workers == 1:
            return x
        return x.unflatten(dim, (self.num_workers, -1)).index_select(dim, self.worker[:1]).squeeze(dim)

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """The whole axis `dim` from the parts of all workers of this rank: the inverse of `mine`. One exchange."""
        if self.worker is None or self.num_workers == 1:
            return x
        whole = x.new_zeros(*x.shape[:dim], self.num_workers, *x.shape[dim:])
        return self._reduce(whole.index_copy(dim, self.worker[:1], x.unsqueeze(dim)), over_ranks=False).flatten(dim, dim + 1)

    def sum(self, *xs: Tensor) -> tuple[Tensor, ...]:
        """The sums of each worker's own xs over all workers of all ranks. One exchange."""
        if self.num_workers * self.num_ranks == 1:
            return xs
        sums = self._reduce(torch.cat([x.reshape(-1) for x in xs]), over_ranks=True).split([x.numel() for x in xs])
        return tuple(total.view_as(x) for total, x in zip(sums, xs, strict=True))

    def sum_over_ranks(self, *xs: Tensor) -> tuple[Tensor, ...]:
        """The sums over all ranks of xs that are the same for each worker of a rank: a `core.losses.Total`. One exchange."""
        if self.worker is None or self.num_ranks == 1:
            return xs
        if self.num_workers > 1:
            first = self.worker[0] == 0
            xs = tuple(torch.where(first, x, 0.0) for x in xs)
        return self.sum(*xs)

    def sum_and_max(self, *xs: Tensor, largest: Tensor) -> tuple[Tensor, ...]:
        """`sum` of xs, followed by the maximum of `largest`, (), over all workers of all ranks. One exchange.

        For the maximum each worker puts its value into its own place in a vector of zeros, and the vectors are summed.
        """
        if self.worker is None or self.num_workers * self.num_ranks == 1:
            return (*xs, largest)
        places = torch.arange(self.num_workers * self.num_ranks, device=largest.device)
        place = self.worker[0] if self.num_ranks == 1 else self.worker[1] * self.num_workers + self.worker[0]
        *sums, each = self.sum(*xs, torch.where(places == place, largest, 0.0))
        return (*sums, each.amax())

    def _reduce(self, x: Tensor, over_ranks: bool) -> Tensor:
        assert self.all_reduce is not None
        assert self.worker is not None
        return self.all_reduce(x, self.worker, over_ranks)

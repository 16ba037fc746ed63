"""What several threads, or processes, share of one update. Knows nothing of what is computed."""

from torch import Tensor


def share(x: Tensor, dim: int, worker: Tensor | None, num_workers: int) -> Tensor:
    """This worker's part of the axis `dim`; all of it for one who works alone."""
    if worker is None or num_workers == 1:
        return x
    return x.unflatten(dim, (num_workers, -1)).index_select(dim, worker[:1]).squeeze(dim)

"""Rows of a rollout on a GPU, written on the host: one pinned buffer for all keys of a step, and one copy of it.

Knows nothing of environments.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes; a view of another dtype must begin at a multiple of its size


class PinnedRows:
    """T + 1 rows of several tensors of a rollout on a device, next to each other on the host.

    The host writes row t of all keys to `host`, then `upload(t)` queues one copy to the device, which spreads it to the
    tensors there. A row of the host may be written again once the device has done what was queued before.
    """

    def __init__(self, tensors: Mapping[str, Tensor], keys: Sequence[str], later: Sequence[str] = ()) -> None:
        """Allocate the buffers.

        Args:
            tensors: of the rollout by key, (T+1, ...) on the device.
            keys: of those tensors, whose row t is uploaded by `upload(t)`.
            later: keys whose row t is uploaded by `upload(t + 1)`, since they are known after the step.
        """
        (num_rows,) = {tensors[key].shape[0] for key in keys}
        shift = dict.fromkeys(keys, 0) | dict.fromkeys(later, 1)
        places, end = {}, 0
        for key in shift:
            size = tensors[key][0].nbytes
            places[key] = slice(end, end + size)
            end += -(-size // ALIGNMENT) * ALIGNMENT
        device = tensors[keys[0]].device
        # one row more: of keys that come later row T is never uploaded, and row -1 is nobody's
        self._rows = pinned(torch.zeros(num_rows + 1, end, dtype=torch.uint8, device="cpu"), device)
        self._staged = torch.zeros(end, dtype=torch.uint8, device=device)
        self.host: dict[str, Tensor] = {}  # (T+1, ...) by key
        self._spread: list[tuple[tuple[Tensor, ...], Tensor, int]] = []  # rows on the device, their place, the shift
        for key, after in shift.items():
            x = tensors[key]
            written = self._rows[after : num_rows + after, places[key]].view(x.dtype)
            self.host[key] = written.unflatten(1, x.shape[1:])
            staged = self._staged[places[key]].view(x.dtype).view(x.shape[1:])
            self._spread.append((x.unbind(0), staged, after))

    def upload(self, t: int) -> None:
        """Queue the copy of row t, and of row t - 1 of the keys that come later."""
        self._staged.copy_(self._rows[t], non_blocking=True)
        for rows, staged, after in self._spread:
            if t >= after:
                rows[t - after].copy_(staged)


def pinned(x: Tensor, device: torch.device) -> Tensor:
    """`x` in memory that a GPU reads by itself; as it is for another device."""
    return x.pin_memory() if device.type == "cuda" else x

"""IMPALA's residual CNN (Espeholt et al., 2018, arXiv 1802.01561, figure 3, the larger one), as CleanRL's ppo_procgen has it.

Three sequences of a convolution, a maximum over 3 x 3 pixels with stride 2, and two residual blocks of two convolutions; then
one layer of features. Pure functions of weights by name. Knows nothing of observations or of the flat buffer.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastppo.core.contracts import Weights

FILTERS = (16, 32, 32)  # of the three sequences
BLOCKS = 2  # in a sequence

Activation = Callable[[Tensor], Tensor]


def impala_shapes(image: tuple[int, int, int], size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every weight. image: (C, H, W). size: number of features."""
    channels, height, width = image
    for sequence, filters in enumerate(FILTERS):
        yield f"{sequence}.weight", (filters, channels, 3, 3)
        yield f"{sequence}.bias", (filters,)
        for name in _block_names(sequence):
            yield f"{name}.weight", (filters, filters, 3, 3)
            yield f"{name}.bias", (filters,)
        channels, height, width = filters, (height + 1) // 2, (width + 1) // 2
    yield "features.weight", (channels * height * width, size)
    yield "features.bias", (size,)


def _block_names(sequence: int) -> list[str]:
    """The names of a sequence's convolutions in its residual blocks, two for each."""
    return [f"{sequence}.{block}.{part}" for block in range(BLOCKS) for part in range(2)]


def impala(weights: Weights, prefix: str, x: Tensor, activation: Activation) -> Tensor:
    """(R, C, H, W) -> (R, size). prefix: of the names of its weights."""

    def convolved(name: str, x: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(x, weights[f"{prefix}{name}.weight"], weights[f"{prefix}{name}.bias"], padding=1)

    for sequence in range(len(FILTERS)):
        x = torch.nn.functional.max_pool2d(convolved(str(sequence), x), kernel_size=3, stride=2, padding=1)
        names = _block_names(sequence)
        for first, second in zip(names[::2], names[1::2], strict=True):
            x = x + convolved(second, activation(convolved(first, activation(x))))
    features = activation(x).movedim(1, -1).flatten(1)  # in the order of memory
    return activation(torch.addmm(weights[f"{prefix}features.bias"], features, weights[f"{prefix}features.weight"]))

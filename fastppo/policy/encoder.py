"""Turn any observation into one vector: numbers as they are, categories one-hot, images through a CNN."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastppo.core.contracts import Obs, Weights
from fastppo.policy.impala import impala, impala_shapes
from fastppo.policy.mlp import ACTIVATIONS
from fastppo.policy.network import Shaped, check_shapes, draw_as_torch
from fastppo.policy.spaces import ObsLeaf

# (filters, kernel, stride) of the convolutions of Mnih et al., 2015, "Human-level control through deep reinforcement learning"
NATURE_CNN = ((32, 8, 4), (64, 4, 2), (64, 3, 1))


@dataclass(frozen=True)
class Encoder(Shaped):
    """Any observation as one vector. Each image has its own CNN: Nature's (Mnih et al., 2015) or IMPALA's. A `Part`.

    leaves: those of `spaces.obs_spec`.
    cnn_size: number of features of the last layer of a CNN. cnn_activation: after each of its layers.
    cnn: "nature" or "impala".
    """

    leaves: tuple[ObsLeaf, ...]
    cnn_size: int = 512
    cnn_activation: str = "relu"
    cnn: str = "nature"
    shapes: dict[str, tuple[int, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        shapes: dict[str, tuple[int, ...]] = {}
        for leaf in self.leaves:
            if leaf.kind != "image":
                continue
            if self.cnn == "impala":
                named = impala_shapes(channels_first(leaf.shape), self.cnn_size)
                shapes |= {f"cnn.{leaf.key}.{name}": shape for name, shape in named}
                continue
            channels, height, width = channels_first(leaf.shape)
            for layer, (filters, kernel, stride) in enumerate(NATURE_CNN):
                shapes[f"cnn.{leaf.key}.{layer}.weight"] = (filters, channels, kernel, kernel)
                shapes[f"cnn.{leaf.key}.{layer}.bias"] = (filters,)
                channels, height, width = filters, (height - kernel) // stride + 1, (width - kernel) // stride + 1
            shapes[f"cnn.{leaf.key}.{len(NATURE_CNN)}.weight"] = (channels * height * width, self.cnn_size)
            shapes[f"cnn.{leaf.key}.{len(NATURE_CNN)}.bias"] = (self.cnn_size,)
        object.__setattr__(self, "shapes", shapes)

    @property
    def size(self) -> int:
        """Length of the vector."""
        return sum(self.cnn_size if leaf.kind == "image" else leaf.size for leaf in self.leaves if leaf.kind != "mask")

    def init(self, generator: torch.Generator) -> Tensor:
        """Orthogonal weights, gain sqrt(2), zero biases; of IMPALA's CNN as torch.nn does by default."""
        params = torch.zeros(self.num_params, dtype=torch.float32, device="cpu")
        if self.cnn == "impala":
            draw_as_torch(self.weights(params), generator)
            return params
        for name, weight in self.weights(params).items():
            if name.endswith(".weight"):
                matrix = params.new_empty(weight.shape)
                weight.copy_(torch.nn.init.orthogonal_(matrix, math.sqrt(2.0), generator=generator))
        return params

    def weights(self, params: Tensor) -> dict[str, Tensor]:
        """Views of its section. A filter (F, C, k, k) is stored as (F, k, k, C), channels last: see `_convolve`."""
        parts = params.split([math.prod(shape) for shape in self.shapes.values()])
        return {
            name: part.view(shape) if len(shape) < 4 else part.view(shape[0], shape[2], shape[3], shape[1]).permute(0, 3, 1, 2)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def flatten(self, weights: Weights) -> Tensor:
        """The inverse of `weights`. Raises KeyError or ValueError where name or shape differ."""
        check_shapes(weights, self.shapes)
        own = (weights[name].permute(0, 2, 3, 1) if len(shape) == 4 else weights[name] for name, shape in self.shapes.items())
        return torch.cat([torch.empty(0, dtype=torch.float32, device="cpu"), *(weight.flatten() for weight in own)])

    def encode(self, weights: Weights, obs: Obs) -> Tensor:
        """obs (..., *shape), or its leaves by key -> (..., size)."""
        given = {"obs": obs} if isinstance(obs, Tensor) else obs
        parts = []
        for leaf in self.leaves:
            if leaf.kind != "mask":
                x = encode(leaf, given[leaf.key])
                parts.append(self._convolve(weights, leaf, x) if leaf.kind == "image" else x)
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def _convolve(self, weights: Weights, leaf: ObsLeaf, pixels: Tensor) -> Tensor:
        """(..., C, H, W) -> (..., cnn_size).

        Channels last in memory: the convolutions of 256 Atari screens, forward and backward, take 138 ms on one thread instead
        of 222 (benchmarks/LOG.md).
        """
        activation = ACTIVATIONS[self.cnn_activation]
        x = pixels.reshape(-1, *pixels.shape[-3:]).contiguous(memory_format=torch.channels_last)
        if self.cnn == "impala":
            return impala(weights, f"cnn.{leaf.key}.", x, activation).reshape(*pixels.shape[:-3], -1)
        for layer, (_, _, stride) in enumerate(NATURE_CNN):
            weight, bias = weights[f"cnn.{leaf.key}.{layer}.weight"], weights[f"cnn.{leaf.key}.{layer}.bias"]
            x = activation(nn.functional.conv2d(x, weight, bias, stride))
        weight, bias = (weights[f"cnn.{leaf.key}.{len(NATURE_CNN)}.{part}"] for part in ("weight", "bias"))
        features = x.movedim(1, -1).flatten(1)  # in the order of memory
        return activation(torch.addmm(bias, features, weight)).reshape(*pixels.shape[:-3], -1)


def encode(leaf: ObsLeaf, x: Tensor) -> Tensor:
    """A leaf x (..., *leaf.shape) of an observation as floats: images (..., C, H, W), all others (..., leaf.size)."""
    if leaf.kind == "image":
        if len(leaf.shape) == 2:
            x = x.unsqueeze(-3)
        elif channels_first(leaf.shape) != leaf.shape:
            x = x.movedim(-1, -3)
        return x.float() * leaf.scale
    lead = x.shape[: x.ndim - len(leaf.shape)]
    x = x.reshape(*lead, -1)
    if leaf.kind == "categories":
        one_hot = [
            x[..., k : k + 1] == torch.arange(first, first + number, device=x.device)
            for k, (first, number) in enumerate(leaf.categories)
        ]
        return torch.cat(one_hot, -1).float()
    return x.float() * leaf.scale if leaf.scale != 1.0 else x.float()


def channels_first(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(C, H, W) of an image of that shape, see `core/space_rules.py`."""
    if len(shape) == 2:
        return (1, *shape)
    return shape if shape[0] <= shape[2] else (shape[2], shape[0], shape[1])  # type: ignore[return-value]

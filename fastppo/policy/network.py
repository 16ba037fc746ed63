"""The contract of networks: pure functions of one flat parameter buffer. Knows nothing of learning or of environments.

The buffer is one tensor (P,); every weight is a view of it. The gradient norm, Adam and a copy of the parameters then take one
operation each instead of one per layer.
"""

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastppo.core.contracts import Policy, Weights
from fastppo.policy.distributions import Family


class Network(Policy, Protocol):
    """A `core.contracts.Policy` whose parameters can be made, saved and restored."""

    @property
    def distribution(self) -> Family:
        """Of the actions."""
        ...

    @property
    def num_params(self) -> int:
        """P, the length of the flat buffer."""
        ...

    def init(self, generator: torch.Generator) -> Tensor:
        """A fresh flat buffer (P,) on the CPU."""
        ...

    def flatten(self, weights: Weights) -> Tensor:
        """The inverse of `weights`: a new flat buffer, (P,). Raises KeyError or ValueError where name or shape differ."""
        ...


class DistributionMixin:
    """The methods of `core.contracts.Policy` that depend on the action distribution alone."""

    distribution: Family

    @property
    def rnn_state_size(self) -> int:
        """0: the policy is not recurrent."""
        return 0

    def sample(self, dist: Any, noise: Tensor) -> Tensor:
        """An action from the distribution and its noise."""
        return self.distribution.sample(dist, noise)

    def log_prob(self, dist: Any, action: Tensor) -> Tensor:
        """Log-density of the action, (...)."""
        return self.distribution.log_prob(dist, action)

    def entropy(self, dist: Any) -> Tensor:
        """Entropy in nats, (...)."""
        return self.distribution.entropy(dist)

    def sources(self) -> list[Path] | None:
        """The source files of this folder and of the folder of the class."""
        folders = {Path(__file__).parent, Path(inspect.getfile(type(self))).parent}
        return sorted(path for folder in folders for path in folder.glob("*.py"))


def draw_as_torch(weights: Weights, generator: torch.Generator) -> None:
    """Draw matrices (in, out), filters (out, in, k, k) and their biases as torch.nn.Linear and Conv2d do by default, in place.

    Uniform between -1 / sqrt(number of inputs) and that. Other weights stay as they are.
    """
    for name, weight in weights.items():
        filters = weights.get(f"{name.rpartition('.')[0]}.weight")
        if name.endswith((".weight", ".bias")) and filters is not None and filters.ndim in (2, 4):
            bound = 1.0 / math.sqrt(filters[0].numel() if filters.ndim == 4 else filters.shape[0])
            weight.copy_(torch.empty(weight.shape, dtype=weight.dtype).uniform_(-bound, bound, generator=generator))


class Part(Protocol):
    """A part of a network, with its own section of the flat buffer."""

    @property
    def num_params(self) -> int:
        """Length of its section."""
        ...

    def init(self, generator: torch.Generator) -> Tensor:
        """A fresh section (num_params,) on the CPU."""
        ...

    def weights(self, params: Tensor) -> dict[str, Tensor]:
        """Views of its section, by name. No other part has these names."""
        ...

    def flatten(self, weights: Weights) -> Tensor:
        """The inverse of `weights`; the mapping may also hold other parts' weights. Raises KeyError or ValueError."""
        ...


class Shaped:
    """The size of a `Part`, from the shapes of its weights."""

    shapes: dict[str, tuple[int, ...]]  # name -> shape, in the order of the buffer

    @property
    def num_params(self) -> int:
        """Length of its section."""
        return sum(math.prod(shape) for shape in self.shapes.values())


class Composed(DistributionMixin):
    """A network of parts. Their sections follow one another in the flat buffer."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts, in the order of the buffer."""
        raise NotImplementedError

    @property
    def num_params(self) -> int:
        """P, the length of the flat buffer."""
        return sum(part.num_params for part in self.parts)

    def init(self, generator: torch.Generator) -> Tensor:
        """A fresh flat buffer (P,) on the CPU."""
        return torch.cat([part.init(generator) for part in self.parts])

    def weights(self, params: Tensor) -> dict[str, Tensor]:
        """Views of the flat buffer `params`, (P,), by name."""
        stretches = params.split([part.num_params for part in self.parts])
        views: dict[str, Tensor] = {}
        for part, stretch in zip(self.parts, stretches, strict=True):
            views |= part.weights(stretch)
        return views

    def flatten(self, weights: Weights) -> Tensor:
        """The inverse of `weights`: a new flat buffer, (P,). Raises KeyError or ValueError where name or shape differ."""
        return torch.cat([part.flatten(weights) for part in self.parts])


def check_shapes(weights: Weights, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise KeyError or ValueError where a name is missing or a shape differs."""
    for name, shape in shapes.items():
        if tuple(weights[name].shape) != tuple(shape):
            raise ValueError(f"weight {name} is {tuple(weights[name].shape)}, not {tuple(shape)}")

"""Actor and critic networks as pure functions of one flat parameter buffer. Knows nothing of learning or of environments.

The buffer is one tensor (P,); every weight is a view of it. The gradient norm, Adam and a copy of the parameters are then
one operation each instead of one per layer. `MLPActorCritic` takes vectors, `ActorCritic` whatever `spaces.obs_spec` describes,
`ModulePolicy` is somebody's own torch.nn.Module; those with memory are in recurrent.py.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastppo.core.contracts import Obs, Policy, Weights
from fastppo.errors import UsageError, brief
from fastppo.policy.distributions import DIAGONAL_NORMAL, Distribution, MultiCategorical, choices, mask_logits
from fastppo.policy.spaces import ACTION_MASK, ActionSpec, ObsLeaf, ObsSpec

Family = Distribution | MultiCategorical

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "elu": torch.nn.functional.elu,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
}

# (filters, kernel, stride) of the convolutions of Mnih et al., 2015, "Human-level control through deep reinforcement learning"
NATURE_CNN = ((32, 8, 4), (64, 4, 2), (64, 3, 1))


class Network(Policy, Protocol):
    """A `core.contracts.Policy` with parameters to make, keep and restore."""

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


class _Acts:
    """What every network does with its distribution; a part of `core.contracts.Policy`."""

    distribution: Family

    @property
    def rnn_state_size(self) -> int:
        """Nothing is remembered."""
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


def _rows(obs: Tensor) -> Tensor:
    """(..., D) -> (1, R, D)."""
    return obs.reshape(1, -1, obs.shape[-1])


@dataclass(frozen=True)
class MLPActorCritic(_Acts):
    """Multi-layer perceptrons for actor and critic, apart or on a shared backbone; a `core.contracts.Policy`.

    obs_size: D, observations are (..., D). action_size: A, the number of logits or of action components.
    """

    obs_size: int
    action_size: int
    distribution: Family
    hidden_sizes: tuple[int, ...] = (64, 64)
    activation: str = "tanh"
    share_backbone: bool = False
    log_std_init: float = 0.0
    shapes: dict[str, tuple[int, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shapes", self._weight_shapes())

    @property
    def num_params(self) -> int:
        """P, the length of the flat buffer."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def _weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every weight, in the order they lie in the buffer. Matrices are (in, out)."""
        shapes: dict[str, tuple[int, ...]] = {}
        for trunk in ("backbone",) if self.share_backbone else ("actor", "critic"):
            sizes = (self.obs_size, *self.hidden_sizes)
            for layer, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
                shapes[f"{trunk}.{layer}.weight"] = (fan_in, fan_out)
                shapes[f"{trunk}.{layer}.bias"] = (fan_out,)
        features = (self.obs_size, *self.hidden_sizes)[-1]
        for head, size in (("actor", self.action_size), ("critic", 1)):
            shapes[f"{head}.head.weight"] = (features, size)
            shapes[f"{head}.head.bias"] = (size,)
        if self.distribution is DIAGONAL_NORMAL:
            shapes["actor.log_std"] = (self.action_size,)
        return shapes

    def init(self, generator: torch.Generator) -> Tensor:
        """A fresh flat buffer (P,) on the CPU: orthogonal weights, gain sqrt(2), 0.01 for the actor's head and 1 for the
        critic's, zero biases (Andrychowicz et al., 2021, arXiv 2006.05990; Engstrom et al., 2020, arXiv 2005.12729)."""
        params = torch.zeros(self.num_params, dtype=torch.float32, device="cpu")
        for name, weight in self.weights(params).items():
            if name.endswith(".weight"):
                gain = {"actor.head.weight": 0.01, "critic.head.weight": 1.0}.get(name, math.sqrt(2.0))
                torch.nn.init.orthogonal_(weight, gain, generator=generator)
            elif name == "actor.log_std":
                weight.fill_(self.log_std_init)
        return params

    def weights(self, params: Tensor) -> dict[str, Tensor]:
        """Views of the flat buffer `params`, (P,), by name.

        A head's matrix (features, A) lies in the buffer as (A, features): with A = 2 its gradient takes MKL 4 us instead of
        25, the forward product 6 instead of 22 (256 rows, one thread).
        """
        parts = params.split([math.prod(shape) for shape in self.shapes.values()])
        return {
            name: part.view(shape[::-1]).mT if name.endswith("head.weight") else part.view(shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def flatten(self, weights: Weights) -> Tensor:
        """The inverse of `weights`: a new flat buffer, (P,). Raises KeyError or ValueError where name or shape differ."""
        check_shapes(weights, self.shapes)
        return torch.cat(
            [(weights[name].mT if name.endswith("head.weight") else weights[name]).flatten() for name in self.shapes]
        )

    def actor(self, weights: Weights, obs: Tensor) -> Any:
        """Distribution parameters for obs (..., D): logits (..., A), or (mean, log_std) of (..., A) each."""
        (features,) = self._features(weights, _rows(obs), self._trunks[:1])
        return self._actor_head(weights, features, obs.shape[:-1])

    def critic(self, weights: Weights, obs: Tensor) -> Tensor:
        """V(obs): (..., D) -> (...)."""
        (features,) = self._features(weights, _rows(obs), self._trunks[-1:])
        return self._critic_head(weights, features, obs.shape[:-1])

    def actor_critic(self, weights: Weights, obs: Tensor) -> tuple[Any, Tensor]:
        """Both; a shared backbone runs once."""
        return self.both(weights, _rows(obs), obs.shape[:-1])

    def both(self, weights: Weights, x: Tensor, shape: torch.Size) -> tuple[Any, Tensor]:
        """`actor_critic` of rows x (1, R, D), or (2, R, D) where actor and critic see something of their own.

        shape: of what is returned, R numbers in all.
        """
        features = self._features(weights, x, self._trunks)
        return self._actor_head(weights, features[0], shape), self._critic_head(weights, features[-1], shape)

    @property
    def _trunks(self) -> tuple[str, ...]:
        return ("backbone",) if self.share_backbone else ("actor", "critic")

    def _features(self, weights: Weights, x: Tensor, trunks: tuple[str, ...]) -> Tensor:
        """Last hidden layer of each trunk: (1 or K, R, D) -> (K, R, features), K trunks and R rows.

        The trunks are of one shape and run as one batched product: with 256 rows a 64x64 layer of both, forward and backward,
        takes 91 us instead of 133 on two cores, because each core works through a network of its own.
        """
        activation = ACTIVATIONS[self.activation]
        if len(trunks) == 1:  # acting: 40 us for eight observations, 74 the other way
            (x,) = x
            for layer in range(len(self.hidden_sizes)):
                x = activation(torch.addmm(weights[f"{trunks[0]}.{layer}.bias"], x, weights[f"{trunks[0]}.{layer}.weight"]))
            return x.unsqueeze(0)
        x = x.expand(len(trunks), -1, -1)  # (K, R, D)
        for layer in range(len(self.hidden_sizes)):
            weight, bias = (
                torch.stack([weights[f"{trunk}.{layer}.{part}"] for trunk in trunks]) for part in ("weight", "bias")
            )  # (K, in, out), (K, out)
            x = activation(torch.baddbmm(bias.unsqueeze(1), x, weight))
        return x

    def _actor_head(self, weights: Weights, features: Tensor, shape: torch.Size) -> Any:
        # transposed, (A, R): a narrow output as A long rows, so that what follows reads whole vectors of it
        out = torch.addmm(weights["actor.head.bias"].unsqueeze(1), weights["actor.head.weight"].mT, features.mT)
        out = out.mT.reshape(*shape, -1)  # (..., A)
        return (out, weights["actor.log_std"].expand_as(out)) if "actor.log_std" in weights else out

    def _critic_head(self, weights: Weights, features: Tensor, shape: torch.Size) -> Tensor:
        value = torch.mv(features, weights["critic.head.weight"].squeeze(1)) + weights["critic.head.bias"]  # (R,)
        return value.reshape(shape)


class Part(Protocol):
    """A piece of a network, with its own stretch of the flat buffer."""

    @property
    def num_params(self) -> int:
        """Numbers it has in the buffer."""
        ...

    def init(self, generator: torch.Generator) -> Tensor:
        """A fresh stretch, (num_params,), on the CPU."""
        ...

    def weights(self, params: Tensor) -> dict[str, Tensor]:
        """Views of its stretch, by names that no other part has."""
        ...

    def flatten(self, weights: Weights) -> Tensor:
        """The inverse of `weights`, which may hold those of other parts too. Raises KeyError or ValueError."""
        ...


class Shaped:
    """What a `Part` whose weights have these shapes takes of the buffer."""

    shapes: dict[str, tuple[int, ...]]  # name -> shape, in the order of the buffer

    @property
    def num_params(self) -> int:
        """Numbers it has in the buffer."""
        return sum(math.prod(shape) for shape in self.shapes.values())


class Composed(_Acts):
    """A network of parts, which lie in the flat buffer one behind the other."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """In the order of the buffer."""
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


@dataclass(frozen=True)
class Encoder(Shaped):
    """Any observation as one vector: its leaves become numbers, images through a Nature CNN each (Mnih et al., 2015). A `Part`.

    leaves: what `spaces.obs_spec` found.
    cnn_size: features that a CNN ends in. cnn_activation: after each of its layers.
    """

    leaves: tuple[ObsLeaf, ...]
    cnn_size: int = 512
    cnn_activation: str = "relu"
    shapes: dict[str, tuple[int, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        shapes: dict[str, tuple[int, ...]] = {}
        for leaf in self.leaves:
            if leaf.kind != "image":
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
        """Orthogonal weights, gain sqrt(2), zero biases."""
        params = torch.zeros(self.num_params, dtype=torch.float32, device="cpu")
        for name, weight in self.weights(params).items():
            if name.endswith(".weight"):
                matrix = params.new_empty(weight.shape)
                weight.copy_(torch.nn.init.orthogonal_(matrix, math.sqrt(2.0), generator=generator))
        return params

    def weights(self, params: Tensor) -> dict[str, Tensor]:
        """Views of its stretch. A filter (F, C, k, k) lies there as (F, k, k, C), channels last: see `_convolve`."""
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
        """(..., *shape), or leaves of that by key -> (..., size)."""
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
        for layer, (_, _, stride) in enumerate(NATURE_CNN):
            weight, bias = weights[f"cnn.{leaf.key}.{layer}.weight"], weights[f"cnn.{leaf.key}.{layer}.bias"]
            x = activation(nn.functional.conv2d(x, weight, bias, stride))
        weight, bias = (weights[f"cnn.{leaf.key}.{len(NATURE_CNN)}.{part}"] for part in ("weight", "bias"))
        features = x.movedim(1, -1).flatten(1)  # as they lie in memory
        return activation(torch.addmm(bias, features, weight)).reshape(*pixels.shape[:-3], -1)


@dataclass(frozen=True)
class ActorCritic(Composed):
    """Any observation: an `Encoder` that actor and critic share, then an `MLPActorCritic`. Illegal actions are masked.

    `mlp.obs_size` is `encoder.size`.
    """

    encoder: Encoder
    mlp: MLPActorCritic
    distribution: Family = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "distribution", self.mlp.distribution)

    @property
    def parts(self) -> tuple[Part, ...]:
        """In the order of the buffer."""
        return self.encoder, self.mlp

    def actor(self, weights: Weights, obs: Obs) -> Any:
        """Distribution parameters for obs (..., *shape) or leaves of it by key: logits (..., A), or (mean, log_std)."""
        return masked(self.mlp.actor(weights, self.encoder.encode(weights, obs)), obs, self.mlp)

    def critic(self, weights: Weights, obs: Obs) -> Tensor:
        """V(obs), (...)."""
        return self.mlp.critic(weights, self.encoder.encode(weights, obs))

    def actor_critic(self, weights: Weights, obs: Obs) -> tuple[Any, Tensor]:
        """Both at once."""
        dist, value = self.mlp.actor_critic(weights, self.encoder.encode(weights, obs))
        return masked(dist, obs, self.mlp), value


def masked(dist: Any, obs: Obs, mlp: MLPActorCritic) -> Any:
    """`dist` with the logits of illegal actions masked, where the observation tells which those are."""
    if isinstance(obs, Tensor) or ACTION_MASK not in obs:
        return dist
    return mask_logits(dist, obs[ACTION_MASK], choices(mlp.distribution, mlp.action_size))


def check_shapes(weights: Weights, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise KeyError or ValueError where a name is missing or a shape differs."""
    for name, shape in shapes.items():
        if tuple(weights[name].shape) != tuple(shape):
            raise ValueError(f"weight {name} is {tuple(weights[name].shape)}, not {tuple(shape)}")


def encode(leaf: ObsLeaf, x: Tensor) -> Tensor:
    """A leaf of an observation as floats: images (..., C, H, W), all others (..., leaf.size). x: (..., *leaf.shape)."""
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
    """(C, H, W) of an image of that shape, see `spaces.is_image_shape`."""
    if len(shape) == 2:
        return (1, *shape)
    return shape if shape[0] <= shape[2] else (shape[2], shape[0], shape[1])  # type: ignore[return-value]


ModuleFactory = Callable[[Any, int], nn.Module]


class ModulePolicy(_Acts):
    """Somebody's own module as a `Network`: compiled, captured and kept as ours are.

    The module is made by `factory(inputs, num_outputs)`: `inputs` is the shape (*shape) of what it will be given without the
    leading batch axis, or a dict of shapes by leaf where there are several. It is called with floats (R, *shape), or a dict of
    them (images as (C, H, W) in [0, 1], categories one-hot, all others flat, masks not at all), in eval mode, and returns
    (outputs (R, num_outputs), value (R,) or (R, 1)). Outputs are logits, or the means of continuous actions, whose log standard
    deviations are one more weight. Parameters without requires_grad stay as they are, and so do buffers; both are kept.
    """

    def __init__(self, factory: ModuleFactory, obs: ObsSpec, action: ActionSpec, log_std_init: float, seed: int = 0) -> None:
        """seed: of whatever the module draws for its first weights. Raises UsageError where it breaks the contract above."""
        self.leaves = obs.observed
        self.distribution = action.distribution
        self.choices = choices(action.distribution, action.size)
        self.log_std_init = log_std_init
        inputs = {leaf.key: encode(leaf, torch.zeros(2, *leaf.shape, dtype=leaf.dtype, device="cpu")) for leaf in self.leaves}
        shapes = {key: tuple(x.shape[1:]) for key, x in inputs.items()}
        given: Any = shapes["obs"] if list(shapes) == ["obs"] else shapes
        try:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs' too, and leave them so
                self.module = factory(given, action.size)
        except Exception as error:  # whatever somebody's module may raise
            raise UsageError(f"policy({given}, {action.size}) failed: {brief(error)}") from error
        if not isinstance(self.module, nn.Module):
            raise UsageError(f"policy({given}, {action.size}) must return a torch.nn.Module, not {type(self.module).__name__}")
        trained = {name: weight for name, weight in self.module.named_parameters() if weight.requires_grad}
        wrong = next((f"{name} is {weight.dtype}" for name, weight in trained.items() if weight.dtype != torch.float32), None)
        if wrong or not trained:
            raise UsageError(
                f"policy: its weight {wrong}; all must be float32" if wrong else "policy: it has no weights to train"
            )
        self.shapes = {name: weight.shape for name, weight in trained.items()}
        if self.distribution is DIAGONAL_NORMAL:
            self.shapes[LOG_STD] = torch.Size([action.size])
        self.module.eval().requires_grad_(False)
        try:
            result = self.module(inputs["obs"] if list(shapes) == ["obs"] else inputs)
        except Exception as error:
            raise UsageError(f"policy: its module failed on float32 inputs {given}, two at once: {brief(error)}") from error
        parts = result if isinstance(result, tuple) else (result,)
        got = [(tuple(x.shape), x.dtype) if isinstance(x, Tensor) else (type(x).__name__, None) for x in parts]
        value_shapes = [((2,), torch.float32), ((2, 1), torch.float32)]
        if len(got) != 2 or got[0] != ((2, action.size), torch.float32) or got[1] not in value_shapes:
            told = ", ".join(f"{shape} {dtype or ''}".strip() for shape, dtype in got)
            raise UsageError(
                f"policy: its module must return a tuple of outputs (R, {action.size}) and value (R,) in float32; "
                f"for R = 2 it returned {told}"
            )

    @property
    def fixed(self) -> dict[str, Tensor]:
        """What the module computes with and training leaves as it is: buffers and frozen parameters, by name."""
        tensors = itertools.chain(self.module.named_parameters(), self.module.named_buffers())
        return {name: tensor for name, tensor in tensors if name not in self.shapes}

    @property
    def num_params(self) -> int:
        """P, the length of the flat buffer."""
        return sum(shape.numel() for shape in self.shapes.values())

    def init(self, generator: torch.Generator) -> Tensor:
        """The weights that the module was made with, (P,)."""
        weights = dict(self.module.named_parameters())
        if LOG_STD in self.shapes:
            weights[LOG_STD] = nn.Parameter(torch.full(self.shapes[LOG_STD], self.log_std_init), requires_grad=False)
        return self.flatten(weights)

    def weights(self, params: Tensor) -> dict[str, Tensor]:
        """Views of the flat buffer `params`, (P,), by name."""
        parts = params.split([shape.numel() for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def flatten(self, weights: Weights) -> Tensor:
        """The inverse of `weights`: a new flat buffer, (P,). Raises KeyError or ValueError where name or shape differ."""
        check_shapes(weights, self.shapes)
        return torch.cat([weights[name].detach().flatten() for name in self.shapes])

    def actor(self, weights: Weights, obs: Obs) -> Any:
        """Distribution parameters for obs (..., *shape) or leaves of it by key: logits (..., A), or (mean, log_std)."""
        return self.actor_critic(weights, obs)[0]

    def critic(self, weights: Weights, obs: Obs) -> Tensor:
        """V(obs), (...)."""
        return self.actor_critic(weights, obs)[1]

    def actor_critic(self, weights: Weights, obs: Obs) -> tuple[Any, Tensor]:
        """Both at once."""
        given = {"obs": obs} if isinstance(obs, Tensor) else obs
        inputs = {leaf.key: encode(leaf, given[leaf.key]) for leaf in self.leaves}
        first = self.leaves[0]
        lead = given[first.key].shape[: given[first.key].ndim - len(first.shape)]
        inputs = {key: x.reshape(-1, *x.shape[len(lead) :]) for key, x in inputs.items()}
        own = {name: weight for name, weight in weights.items() if name != LOG_STD}
        only = inputs["obs"] if list(inputs) == ["obs"] else inputs
        out, value = torch.func.functional_call(self.module, own, (only,))
        out, value = out.reshape(*lead, -1), value.reshape(lead)
        if self.distribution is DIAGONAL_NORMAL:
            return (out, weights[LOG_STD].expand_as(out)), value
        return (mask_logits(out, given[ACTION_MASK], self.choices) if ACTION_MASK in given else out), value


LOG_STD = "fastppo.log_std"  # no module of somebody's has a weight of this name

"""A torch.nn.Module of the user as a policy."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastppo.core.contracts import Obs, Weights
from fastppo.errors import UsageError, brief
from fastppo.policy.distributions import log_std_shape, masked, parameters
from fastppo.policy.encoder import encode
from fastppo.policy.network import DistributionMixin, check_shapes
from fastppo.policy.spaces import ACTION_MASK, ActionSpec, ObsSpec
from fastppo.system.named import load_named

ModuleFactory = Callable[[Any, int], nn.Module]
LOG_STD = "fastppo.log_std"  # no user's module has a weight of this name


def named_factory(name: str | None) -> ModuleFactory | None:
    """The factory that --policy names; None without one. Imports its module. Raises UsageError with the nearest names."""
    return None if name is None else load_named(name, "--policy")


class ModulePolicy(DistributionMixin):
    """A module of the user as a `Network`. It is compiled, captured and saved like the built-in networks.

    The module is made by `factory(inputs, num_outputs)`: `inputs` is the shape (*shape) of its input without the batch axis,
    or a dict of shapes by leaf if there are several. It is called in eval mode with floats (R, *shape), or a dict of them:
    images as (C, H, W) in [0, 1], categories one-hot, all others flat, no masks. It returns (outputs (R, num_outputs), value
    (R,) or (R, 1)). Outputs are the logits of all choices, then the means of all continuous components, both in the order of
    the action space; the log standard deviations of the means are one more weight. --action-distribution normal-state-std adds
    a further output for each component to these; of beta, alphas and then betas come instead of means, before their softplus.
    Parameters without requires_grad and buffers are saved but not trained.
    """

    def __init__(self, factory: ModuleFactory, obs: ObsSpec, action: ActionSpec, log_std_init: float, seed: int = 0) -> None:
        """seed: for the random initial weights of the module. Raises UsageError if the module breaks the contract above."""
        self.leaves = obs.observed
        self.distribution = action.distribution
        self.log_std_init = log_std_init
        inputs = {leaf.key: encode(leaf, torch.zeros(2, *leaf.shape, dtype=leaf.dtype, device="cpu")) for leaf in self.leaves}
        shapes = {key: tuple(x.shape[1:]) for key, x in inputs.items()}
        given: Any = shapes["obs"] if list(shapes) == ["obs"] else shapes
        try:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the GPUs' generators
                self.module = factory(given, action.size)
        except Exception as error:  # a user's module may raise anything
            raise UsageError(f"policy({given}, {action.size}) failed: {brief(error)}") from error
        if not isinstance(self.module, nn.Module):
            raise UsageError(f"policy({given}, {action.size}) must return a torch.nn.Module, not {type(self.module).__name__}")
        trained = {name: weight for name, weight in self.module.named_parameters() if weight.requires_grad}
        lazy = next((name for name, weight in trained.items() if is_lazy(weight)), None)
        if lazy is not None:
            raise UsageError(f"policy: its weight {lazy} has no shape yet: give the layer its sizes instead of Lazy")
        wrong = next((f"{name} is {weight.dtype}" for name, weight in trained.items() if weight.dtype != torch.float32), None)
        if wrong or not trained:
            raise UsageError(
                f"policy: its weight {wrong}; all must be float32" if wrong else "policy: it has no weights to train"
            )
        self.shapes = {name: weight.shape for name, weight in trained.items()}
        if (shape := log_std_shape(action.distribution, action.size)) is not None:
            self.shapes[LOG_STD] = torch.Size(shape)
        self.module.eval().requires_grad_(False)
        try:
            result = self.module(inputs["obs"] if list(shapes) == ["obs"] else inputs)
        except Exception as error:
            raise UsageError(f"policy: its module failed on float32 inputs {given}, two at once: {brief(error)}") from error
        parts = result if isinstance(result, tuple) else (result,)
        got = [(tuple(x.shape), x.dtype) if isinstance(x, Tensor) else (type(x).__name__, None) for x in parts]
        value_shapes = [((2,), torch.float32), ((2, 1), torch.float32)]
        if len(got) != 2 or got[0] != ((2, action.size), torch.float32) or got[1] not in value_shapes:
            returned = ", ".join(f"{shape} {dtype or ''}".strip() for shape, dtype in got)
            raise UsageError(
                f"policy: its module must return a tuple of outputs (R, {action.size}) and value (R,) in float32; "
                f"for R = 2 it returned {returned}"
            )

    def sources(self) -> None:
        """None: the module's code may be anywhere and may call anything."""

    @property
    def fixed(self) -> dict[str, Tensor]:
        """Buffers and frozen parameters by name: training does not change them."""
        tensors = itertools.chain(self.module.named_parameters(), self.module.named_buffers())
        return {name: tensor for name, tensor in tensors if name not in self.shapes}

    @property
    def num_params(self) -> int:
        """P, the length of the flat buffer."""
        return sum(shape.numel() for shape in self.shapes.values())

    def init(self, generator: torch.Generator) -> Tensor:
        """The initial weights of the module, (P,)."""
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
        """Distribution parameters for obs (..., *shape), or its leaves by key."""
        return self.actor_critic(weights, obs)[0]

    def critic(self, weights: Weights, obs: Obs) -> Tensor:
        """V(obs), (...)."""
        return self.actor_critic(weights, obs)[1]

    def actor_critic(self, weights: Weights, obs: Obs) -> tuple[Any, Tensor]:
        """Distribution parameters and V(obs)."""
        given = {"obs": obs} if isinstance(obs, Tensor) else obs
        inputs = {leaf.key: encode(leaf, given[leaf.key]) for leaf in self.leaves}
        first = self.leaves[0]
        lead = given[first.key].shape[: given[first.key].ndim - len(first.shape)]
        inputs = {key: x.reshape(-1, *x.shape[len(lead) :]) for key, x in inputs.items()}
        own = {name: weight for name, weight in weights.items() if name != LOG_STD}
        only = inputs["obs"] if list(inputs) == ["obs"] else inputs
        out, value = torch.func.functional_call(self.module, own, (only,))
        out, value = out.reshape(*lead, -1), value.reshape(lead)
        dist = parameters(out, weights.get(LOG_STD), self.distribution)
        return (masked(dist, given[ACTION_MASK], self.distribution) if ACTION_MASK in given else dist), value

"""A policy as a torch.nn.Module that holds all its tensors, so that it can be traced. Knows nothing of files."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastppo.core.contracts import Obs, normalize_obs
from fastppo.policy.agent import Agent, unseen_by_actor
from fastppo.policy.rnn import RecurrentActorCritic


class DeployedPolicy(nn.Module):
    """`Agent.act`, deterministic and on the CPU. Weights, statistics and action bounds are buffers.

    Inputs are the parts of an observation as the environment returns them, by name, tensors (N, ...): `obs` or `obs.NAME`, and
    `action_mask` if the policy has one; without the parts that only the critic reads. Returns actions (N, ...) for the
    environment; of a Dict or Tuple its leaves as one flat tuple, in the order of the space.

    A recurrent policy also takes `memory` (N, S), the state of the actor, and returns the next state behind the actions. It
    resets nothing: the caller sets the rows of new episodes to zero.
    """

    @torch.inference_mode(False)  # inference tensors cannot be traced
    def __init__(self, agent: Agent) -> None:
        super().__init__()
        self.obs, self.action, self.network = agent.obs, agent.action, agent.network
        self.normalization = agent.normalization
        moments: dict[str, Any] = {"mean": agent.normalization.obs_mean, "scale": agent.normalization.obs_scale}
        bounds = {f"{leaf.key}.{name}": getattr(leaf, name) for leaf in agent.action.leaves for name in ("low", "high")}
        self.names = {
            "weight": self._own("weight", agent.weights),
            "bounds": self._own("bounds", bounds),
            **{kind: self._own(kind, tensors or {}) for kind, tensors in moments.items()},
        }

    def _own(self, kind: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Register copies as buffers. Returns the name of the buffer, which has no dots, by the name of the tensor."""
        names = {name: f"{kind}/{name.replace('.', '/')}" for name in tensors}
        for name, tensor in tensors.items():
            self.register_buffer(names[name], tensor.detach().cpu().clone())
        return names

    def _owned(self, kind: str) -> dict[str, Tensor]:
        return {name: self.get_buffer(buffer) for name, buffer in self.names[kind].items()}

    @property
    def rnn_state_size(self) -> int:
        """Size of the actor's state of each environment; 0: not recurrent."""
        return self.network.actor_size if isinstance(self.network, RecurrentActorCritic) else 0

    def step(self, inputs: Mapping[str, Tensor]) -> tuple[Any, Tensor | None]:
        """Parameters of the action distribution, as `distributions.parameters` returns them, and the next state."""
        leaves: dict[str, Tensor] = {}
        unseen = unseen_by_actor(self.network)
        for leaf in self.obs:
            if leaf.key in unseen:
                continue
            x = inputs[leaf.key]
            x = x != 0 if leaf.kind == "mask" else x.to(leaf.dtype)
            leaves[leaf.key] = x.reshape(-1, *leaf.shape)
        if unseen:
            rows = next(iter(leaves.values())).shape[0]
            leaves |= {leaf.key: torch.zeros(rows, *leaf.shape, dtype=leaf.dtype) for leaf in self.obs if leaf.key in unseen}
        obs: Obs = self.obs.join(leaves)
        if self.names["mean"]:
            moments: dict[str, Any] = {"obs_mean": self._owned("mean"), "obs_scale": self._owned("scale")}
            obs = normalize_obs(obs, self.normalization._replace(**moments))
        if isinstance(self.network, RecurrentActorCritic):
            return self.network.step(self._owned("weight"), obs, inputs["memory"])
        return self.network.actor(self._owned("weight"), obs), None

    def forward(self, inputs: dict[str, Tensor]) -> Tensor | tuple[Tensor, ...]:
        """The leaves of the likeliest actions; for a recurrent policy also the next state. A tensor if that is all."""
        dist, memory = self.step(inputs)
        bounds, spec = self._owned("bounds"), self.action
        leaves = [replace(leaf, low=bounds[f"{leaf.key}.low"], high=bounds[f"{leaf.key}.high"]) for leaf in spec.leaves]
        action = replace(spec, leaves=tuple(leaves)).to_env(spec.distribution.mode(dist))
        outputs = [*(leaf.find(action) for leaf in leaves), *([] if memory is None else [memory])]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

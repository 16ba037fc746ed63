"""Recurrent networks: an LSTM or GRU between the encoder and the layers of actor and critic.

Knows nothing of learning or of environments. The recurrent state of an environment is one row of S numbers, so a rollout, a
checkpoint or an exported file holds one matrix (N, S).
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fastppo.core.contracts import Obs, Weights
from fastppo.core.recurrence import NUM_GATES, NUM_STATES, Cells, gru, gru_step, lstm, lstm_step
from fastppo.policy.actor_critic import masked_by
from fastppo.policy.distributions import Family
from fastppo.policy.encoder import Encoder
from fastppo.policy.mlp import MLPActorCritic
from fastppo.policy.network import Composed, Part, Shaped, check_shapes


@dataclass(frozen=True)
class Rnn(Shaped):
    """Layers of LSTM or GRU cells, one stack for each of K users (an actor and a critic, or both together). A `Part`.

    A row of the state holds the numbers of the first user, then those of the second. A user has, layer by layer, h and for an
    LSTM c. S = K L H for a GRU, 2 K L H for an LSTM.
    """

    kind: Literal["lstm", "gru"]
    input_size: int
    hidden_size: int  # H
    num_layers: int = 1  # L
    num_users: int = 2  # K
    shapes: dict[str, tuple[int, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        users, size, gates = self.num_users, self.hidden_size, NUM_GATES[self.kind] * self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in range(self.num_layers):
            shapes[f"rnn.{layer}.input.weight"] = (users, size if layer else self.input_size, gates)
            shapes[f"rnn.{layer}.input.bias"] = (users, gates)
            shapes[f"rnn.{layer}.hidden.weight"] = (users, size, gates)
            if self.kind == "gru":  # of gate n alone: r multiplies this bias, and not that of the input
                shapes[f"rnn.{layer}.hidden.bias"] = (users, size)
        object.__setattr__(self, "shapes", shapes)

    @property
    def rnn_state_size(self) -> int:
        """S, the size of the state of all users."""
        return self.num_users * self.user_size

    @property
    def user_size(self) -> int:
        """Size of each user's state, S / K."""
        return self.num_layers * NUM_STATES[self.kind] * self.hidden_size

    def init(self, generator: torch.Generator) -> Tensor:
        """Orthogonal weights of gain 1, zero biases (as CleanRL's ppo_atari_lstm)."""
        params = torch.zeros(self.num_params, dtype=torch.float32, device="cpu")
        for name, weight in self.weights(params).items():
            if name.endswith(".weight"):
                for users in weight:
                    torch.nn.init.orthogonal_(users, generator=generator)
        return params

    def weights(self, params: Tensor) -> dict[str, Tensor]:
        """Views of its section. Each weight holds all users."""
        parts = params.split([math.prod(shape) for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def flatten(self, weights: Weights) -> Tensor:
        """The inverse of `weights`. Raises KeyError or ValueError where name or shape differ."""
        check_shapes(weights, self.shapes)
        return torch.cat([weights[name].flatten() for name in self.shapes])

    def step(self, weights: Weights, x: Tensor, rnn_state: Tensor) -> tuple[Tensor, Tensor]:
        """One step: x (R, input_size), rnn_state (R, S) -> out (K, R, H), the next state.

        A state (R, S / K) is that of the first user: then only this user takes the step.
        """
        users = rnn_state.shape[-1] // self.user_size
        parts = NUM_STATES[self.kind]
        states = rnn_state.view(-1, users, self.num_layers * parts, self.hidden_size).transpose(0, 1)  # (K, R, L parts, H)
        out, after = x.expand(users, -1, -1), []
        for layer in range(self.num_layers):
            gates = self._gates(weights, layer, out, users)
            h, *c = states[:, :, layer * parts : (layer + 1) * parts].unbind(2)
            weight = weights[f"rnn.{layer}.hidden.weight"][:users]
            if self.kind == "lstm":
                out, c_after, _ = lstm_step(gates, weight, h, c[0])
                after += [out, c_after]
            else:
                out, _ = gru_step(gates, weight, weights[f"rnn.{layer}.hidden.bias"][:users], h)
                after.append(out)
        return out, torch.stack(after, 2).transpose(0, 1).reshape(rnn_state.shape)

    def unroll(
        self, weights: Weights, x: Tensor, episode_start: Tensor, rnn_state: Tensor, cells: Cells
    ) -> tuple[Tensor, Tensor]:
        """T steps: x (T, n, input_size), episode_start (T, n), rnn_state (n, S) -> out (K, T n, H), states (T, n, S)."""
        steps, number = episode_start.shape
        parts = NUM_STATES[self.kind]
        states = rnn_state.view(number, self.num_users, self.num_layers * parts, self.hidden_size).transpose(0, 1)
        out, after = x.reshape(-1, x.shape[-1]).expand(self.num_users, -1, -1), []
        for layer in range(self.num_layers):
            gates = self._gates(weights, layer, out, self.num_users).unflatten(1, (steps, number)).transpose(0, 1)
            h, *c = (state.contiguous() for state in states[:, :, layer * parts : (layer + 1) * parts].unbind(2))
            weight = weights[f"rnn.{layer}.hidden.weight"]
            if self.kind == "lstm":
                passed, c_after = lstm(gates, weight, episode_start, h, c[0], cells)  # (T, K, n, H)
                after += [passed, c_after]
            else:
                passed = gru(gates, weight, weights[f"rnn.{layer}.hidden.bias"], episode_start, h, cells)
                after.append(passed)
            out = passed.transpose(0, 1).flatten(1, 2)
        return out, torch.stack(after, 3).transpose(1, 2).reshape(steps, number, self.rnn_state_size)

    def _gates(self, weights: Weights, layer: int, x: Tensor, users: int) -> Tensor:
        """The inputs' part of the gates: (K, R, D) -> (K, R, G H)."""
        bias, weight = weights[f"rnn.{layer}.input.bias"][:users], weights[f"rnn.{layer}.input.weight"][:users]
        return torch.baddbmm(bias.unsqueeze(1), x, weight)


@dataclass(frozen=True)
class RecurrentActorCritic(Composed):
    """An encoder, an rnn, then the layers of actor and critic; a `core.contracts.RecurrentPolicy`.

    `rnn.input_size` is `encoder.size`, `mlp.obs_size` is `rnn.hidden_size`. Actor and critic have separate states if the
    rnn has two users.
    """

    encoder: Encoder
    rnn: Rnn
    mlp: MLPActorCritic
    distribution: Family = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "distribution", self.mlp.distribution)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts, in the order of the buffer."""
        return self.encoder, self.rnn, self.mlp

    @property
    def rnn_state_size(self) -> int:
        """S, the size of the recurrent state of an environment."""
        return self.rnn.rnn_state_size

    @property
    def actor_size(self) -> int:
        """Size of the first part of the state, the only one that acting needs."""
        return self.rnn.user_size

    def step(self, weights: Weights, obs: Obs, rnn_state: Tensor) -> tuple[Any, Tensor]:
        """One step: obs (N, *shape), rnn_state (N, S) -> parameters of the distribution, the next state (N, S).

        From rnn_state (N, actor_size), the next state has that size too.
        """
        out, rnn_state = self.rnn.step(weights, self.encoder.encode(weights, obs), rnn_state)
        return masked_by(self.mlp.actor(weights, out[0]), obs, self.distribution), rnn_state

    def value_from_state(self, weights: Weights, obs: Obs, rnn_state: Tensor) -> Tensor:
        """V(obs), (...), for obs (..., *shape) and the state before it, rnn_state (..., S)."""
        x = self.encoder.encode(weights, obs)
        out, _ = self.rnn.step(weights, x.reshape(-1, x.shape[-1]), rnn_state.reshape(-1, self.rnn_state_size))
        return self.mlp.critic(weights, out[-1]).reshape(rnn_state.shape[:-1])

    def unroll(
        self, weights: Weights, obs: Obs, episode_start: Tensor, rnn_state: Tensor, cells: Cells
    ) -> tuple[Any, Tensor, Tensor]:
        """T steps of n environments at once: the distribution's parameters (T, n, ...), V (T, n), state after each (T, n, S).

        obs: (T, n, *shape). episode_start: (T, n) bool; the state before such a step is zero. rnn_state: (n, S), before step 0.
        """
        out, rnn_state = self.rnn.unroll(weights, self.encoder.encode(weights, obs), episode_start, rnn_state, cells)
        dist, value = self.mlp.both(weights, out, episode_start.shape)
        return masked_by(dist, obs, self.distribution), value, rnn_state

    # a recurrent policy computes nothing without its state
    def actor(self, weights: Weights, obs: Obs) -> Any:
        """See `step`."""
        raise NotImplementedError

    critic = actor_critic = actor

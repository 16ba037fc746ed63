"""What the pure functions of the core ask of a policy and of an environment, and the tuples that they take and return.

Knows nothing of how these are made.

Letters: T num_steps, N num_envs, B = T * N, M minibatch size, E update epochs, P number of parameters.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from fastppo.core.adam import AdamState
from fastppo.core.gradient import grad_and_aux
from fastppo.core.recurrence import STEPS, Cells
from fastppo.core.scan import scan

Weights = Mapping[str, Tensor]
Obs = Tensor | Mapping[str, Tensor]  # one tensor, or the leaves of a structured observation by their key in the rollout


# (x, worker, over_ranks) -> the sum of x over the workers of this process or, with over_ranks, over all workers of all ranks.
# Every caller gets the same bits.
AllReduce = Callable[[Tensor, Tensor, bool], Tensor]


@dataclass(frozen=True)
class Execution:
    """How a program runs on the machine. Results are the same but for rounding.

    Attributes:
        microbatch_size: the most rows that go through the networks at once; None: all. A policy with memory takes at least one
            step of all environments, and in a minibatch one environment. The gradients of a minibatch's parts are summed. Parts
            that fit a core's cache make large compiled minibatches faster (benchmarks/LOG.md).
        num_workers: threads that call the program at once, each for its own part of the environments and minibatches.
        num_ranks: processes that share an update, each with its own environments and its own rows of each minibatch.
        all_reduce: their exchange; None where there is one worker and one rank.
        bind_act: `bind_act(params, normalization)(obs, noise)` instead of core.acting.act in the loop of `collect`; None: that.
        scan, grad_and_aux, cells: loops, gradient and recurrent cells; the compiler has its own.
    """

    microbatch_size: int | None = None
    num_workers: int = 1
    num_ranks: int = 1
    all_reduce: AllReduce | None = None
    bind_act: Callable[[Tensor, "Normalization"], Callable[[Obs, Tensor], Tensor]] | None = None
    scan: Callable[..., Any] = scan
    grad_and_aux: Callable[..., Any] = grad_and_aux
    cells: Cells = STEPS


EAGER = Execution()


class Policy(Protocol):
    """What acting and learning need of a policy. `obs` is an `Obs`; `dist` is what `actor` returns: a tensor or several."""

    @property
    def rnn_state_size(self) -> int:
        """S, how many numbers a `RecurrentPolicy` remembers of each environment; 0 for a policy without memory."""
        ...

    def weights(self, params: Tensor) -> Weights:
        """Views of the flat buffer `params`, (P,), under the names of the weights."""
        ...

    def actor(self, weights: Weights, obs: Any) -> Any:
        """Parameters of the action distribution for obs (..., *obs_shape)."""
        ...

    def critic(self, weights: Weights, obs: Any) -> Tensor:
        """V(obs), (...)."""
        ...

    def actor_critic(self, weights: Weights, obs: Any) -> tuple[Any, Tensor]:
        """Both at once: a shared backbone runs once."""
        ...

    def sample(self, dist: Any, noise: Tensor) -> Tensor:
        """An action (..., *action_shape) from the distribution and the noise drawn for it."""
        ...

    def log_prob(self, dist: Any, action: Tensor) -> Tensor:
        """Log-density of `action`, (...)."""
        ...

    def entropy(self, dist: Any) -> Tensor:
        """Entropy in nats, (...)."""
        ...

    def sources(self) -> list[Path] | None:
        """The files whose text says what it computes, for the cache of compiled programs; None where that is not known."""
        ...


class RecurrentPolicy(Policy, Protocol):
    """A policy that remembers S numbers of each environment: zeros before an episode's first observation."""

    def step(self, weights: Weights, obs: Any, rnn_state: Tensor) -> tuple[Any, Tensor]:
        """dist for obs (N, ...), and the memory after it, (N, S), from that before."""
        ...

    def value_from_state(self, weights: Weights, obs: Any, rnn_state: Tensor) -> Tensor:
        """V(obs), (...), for rnn_state (..., S) before it."""
        ...

    def unroll(
        self, weights: Weights, obs: Any, episode_start: Tensor, rnn_state: Tensor, cells: Cells
    ) -> tuple[Any, Tensor, Tensor]:
        """dist and V for obs (T, n, ...), and the memory after each, (T, n, S), from that before the first one, (n, S).

        episode_start: (T, n) bool, an episode's first observation.
        """
        ...


class Normalization(NamedTuple):
    """The frozen statistics that a rollout is acted and learned under; all 0-d or of the observation's shape.

    obs_mean, obs_scale: normalised obs = clamp((obs - obs_mean) * obs_scale, -10, 10), by leaf; leaves without one, and all
        where it is None, stay as they are. float32; or float64, in which a leaf is then normalised: float32 has no room for the
        digits of 1.7e9 + 0.5.
    reward_scale: normalised reward = clamp(reward * reward_scale, -10, 10); None: rewards as they are.
    return_mean, return_std: units of the critic when returns are standardised over the rollout (`norm_returns`).
    """

    obs_mean: Mapping[str, Tensor] | None
    obs_scale: Mapping[str, Tensor] | None
    reward_scale: Tensor | None
    return_mean: Tensor
    return_std: Tensor


class Coefficients(NamedTuple):
    """The settings of `learn` that are plain numbers, each () float32.

    They are inputs, so that a compiled program serves all their values, annealed or chosen by a sweep.
    """

    learning_rate: Tensor
    clip_coef: Tensor
    ent_coef: Tensor
    vf_coef: Tensor
    gamma: Tensor
    gae_lambda: Tensor
    max_grad_norm: Tensor
    target_kl: Tensor  # infinity: no KL stop
    adam_eps: Tensor


class CollectResult(NamedTuple):
    """What `collect` returns."""

    running: tuple[Tensor, ...]  # the environments after the last step
    obs: Tensor  # (T, N, *obs_shape), what was acted on
    action: Tensor  # (T, N, *action_shape), as sampled
    reward: Tensor  # (T, N)
    terminated: Tensor  # (T, N) bool
    truncated: Tensor  # (T, N) bool
    valid: Tensor  # (T, N) bool, false where the step only reset the environment
    finite: Tensor  # () bool, of all observations and rewards

    @classmethod
    def from_tensors(cls, tensors: Sequence[Tensor]) -> "CollectResult":
        """The result from the tensors in it, in their order."""
        rows = len(tensors) - (len(cls._fields) - 1)  # `running` has as many tensors as the other fields leave
        return cls(tuple(tensors[:rows]), *tensors[rows:])

    @classmethod
    def join(cls, results: Sequence["CollectResult"]) -> "CollectResult":
        """The result of all environments, from those of workers that each had a part of them."""
        running = tuple(torch.cat(parts) for parts in zip(*(result.running for result in results), strict=True))
        steps = [torch.cat(parts, 1) for parts in zip(*(result[1:-1] for result in results), strict=True)]
        return cls._make((running, *steps, torch.stack([result.finite for result in results]).all()))


class EnvStep(Protocol):
    """One step of N environments that are functions on tensors."""

    def __call__(
        self, running: tuple[Tensor, ...], action: Tensor, random: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor, Tensor]]:
        """`running, (reward, terminated, truncated)`, each (N,), for action (N, *action_shape) and random (N, K); pure.

        Where an episode has ended the step resets: next-step autoreset.
        """
        ...

    def sources(self) -> list[Path] | None:
        """The files whose text says what it computes, for the cache of compiled programs; None where that is not known."""
        ...


class LearnResult(NamedTuple):
    """What `learn` returns. Nothing in it has been on the host."""

    params: Tensor  # (P,)
    adam: AdamState
    minibatch_metrics: Tensor  # (E * B / M, len(MINIBATCH_METRICS))
    explained_variance: Tensor  # ()
    return_mean: Tensor  # () of this rollout's returns, for the next Normalization
    return_std: Tensor  # ()
    summary: Tensor  # (len(SUMMARY),), all that the host reads, in one tensor

    @classmethod
    def from_tensors(cls, tensors: Sequence[Tensor]) -> "LearnResult":
        """The result from the tensors in it, in their order."""
        behind = 1 + len(AdamState._fields)
        return cls(tensors[0], AdamState(*tensors[1:behind]), *tensors[behind:])


def normalize_obs(obs: Obs, normalization: Normalization) -> Obs:
    """Observations as the networks see them, float32 where normalised; shapes as `obs`."""
    mean, scale = normalization.obs_mean, normalization.obs_scale
    if mean is None or scale is None:
        return obs

    def standardized(key: str, x: Tensor) -> Tensor:
        if key not in mean:
            return x
        if mean[key].dtype is torch.float64:
            x = x.double()
        return ((x - mean[key]) * scale[key]).clamp(-10.0, 10.0).float()

    return standardized("obs", obs) if isinstance(obs, Tensor) else {key: standardized(key, x) for key, x in obs.items()}


def has_final_obs(rollout: Mapping[str, Tensor]) -> bool:
    """Whether the rollout has final observations: its environments reset within the step."""
    return any(key.startswith("final_") for key in rollout.keys())  # noqa: SIM118 (a TensorDict iterates over rows)


def obs_of(rollout: Mapping[str, Tensor], prefix: Literal["", "final_"] = "") -> Obs:
    """What was observed: the tensor under `obs` where it is alone, else the leaves, `obs.name` and `action_mask`, by key."""
    if prefix + "obs" in rollout and "action_mask" not in rollout:
        return rollout[prefix + "obs"]
    keys = [key for key in sorted(rollout.keys()) if key.removeprefix(prefix).partition(".")[0] in ("obs", "action_mask")]
    return {key.removeprefix(prefix): rollout[key] for key in keys if key.startswith(prefix)}

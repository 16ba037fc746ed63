"""`learn` and `act` of a multi-layer perceptron with the signatures of core.ppo.learn and core.acting.act, fused.

What has no parameters is done by PyTorch before: normalising observations, and turning a structured one into a vector.
"""

import ctypes
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import median
from typing import Any, TypeGuard

import torch
from torch import Tensor

from fastppo.compile import native
from fastppo.compile.workers import exchange_hook
from fastppo.core.adam import AdamState
from fastppo.core.contracts import Coefficients, LearnResult, Normalization, Obs, Policy, has_final_obs, normalize_obs, obs_of
from fastppo.core.ppo import LearnConfig
from fastppo.core.seed_axis import SeedAxis
from fastppo.fused import operators
from fastppo.fused.operators import ActCall, Actors
from fastppo.policy.actor_critic import ActorCritic
from fastppo.policy.distributions import CATEGORICAL, DIAGONAL_NORMAL, choices, continuous_of
from fastppo.policy.mlp import MLPActorCritic
from fastppo.policy.spaces import ACTION_MASK
from fastppo.ranks import ALONE, Ranks

Covered = MLPActorCritic | ActorCritic
ONE = SeedAxis(1)
TRY_AGAIN = 50  # calls after which the other number is tried again
SERIAL_WORK = 2**22  # multiplications of a call of `act` that one thread does alone; starting a second one takes 30 us


def covers(network: Policy) -> TypeGuard[Covered]:
    """Whether the fused programs compute this network: perceptrons, on anything but images, whose continuous actions have
    one standard deviation for all states."""
    if isinstance(network, ActorCritic):
        has_images = any(leaf.kind == "image" for leaf in network.encoder.leaves)
        return covers(network.mlp) and not has_images and not network.critic_only
    return isinstance(network, MLPActorCritic) and continuous_of(network.distribution) in (None, DIAGONAL_NORMAL)


def mlp_of(network: Covered) -> MLPActorCritic:
    """The layers of actor and critic."""
    return network.mlp if isinstance(network, ActorCritic) else network


def description(network: Covered) -> list[int]:
    """The network as `operators.network_shape` takes it."""
    mlp = mlp_of(network)
    numbers = choices(mlp.distribution, mlp.action_size)
    activation = operators.ACTIVATIONS.index(mlp.activation)
    sizes = (len(mlp.hidden_sizes), *mlp.hidden_sizes)
    return [mlp.obs_size, mlp.action_size, activation, int(mlp.share_backbone), int(mlp.layer_norm), *sizes, *numbers]


def network_input(network: Covered, obs: Obs, normalization: Normalization) -> Tensor:
    """The vectors (..., D) float32, contiguous, that the first layer gets."""
    obs = normalize_obs(obs, normalization)
    x = network.encoder.encode({}, obs) if isinstance(network, ActorCritic) else obs
    assert isinstance(x, Tensor)
    return x.contiguous()


def mask_of(obs: Obs) -> Tensor | None:
    """The action mask in an observation, contiguous."""
    return None if isinstance(obs, Tensor) or ACTION_MASK not in obs else obs[ACTION_MASK].contiguous()


def bind_act(network: Covered, params: Tensor, normalization: Normalization) -> Callable[[Obs, Tensor], Tensor]:
    """core.acting.act in the loop of a compiled program: `bind_act(network, params, normalization)(obs, noise)`.

    The parameters are packed once. Observations of environments on the device are one tensor, without a mask.
    """
    numbers = description(network)
    dtype, columns = operators.action_type(numbers)
    packed = native.mlp_pack(params, numbers, operators.packed_size(numbers))

    def act(obs: Obs, noise: Tensor) -> Tensor:
        assert isinstance(obs, Tensor)
        x = network_input(network, obs, normalization)
        action: Tensor = native.mlp_act_packed(packed, x, noise.contiguous(), numbers, columns, dtype is torch.int64)
        return action.squeeze(-1) if mlp_of(network).distribution is CATEGORICAL else action

    return act


class FusedLearn:
    """core.ppo.learn. Its results depend on `num_parts`, and not on the number of threads, which it chooses by measurement."""

    def __init__(
        self, network: Covered, config: LearnConfig, num_parts: int, axis: SeedAxis = ONE, ranks: Ranks = ALONE
    ) -> None:
        """num_parts: into how many parts rows are cut, and the most threads; with several seeds, how many learn at once."""
        self.network, self.config, self.axis, self.ranks = network, config, axis, ranks
        self.threads = ThreadCount(num_parts)
        self._description = description(network)
        self._is_one_choice = mlp_of(network).distribution is CATEGORICAL  # its actions have no axis of choices
        self._num_parts = 1 if axis.shape else num_parts
        self._faults: list[BaseException] = []
        self._hook = None if ranks.size == 1 else exchange_hook(ranks, self._faults)  # C has only its address
        self._address = 0 if self._hook is None else ctypes.cast(self._hook, ctypes.c_void_p).value or 0

    def __call__(self, *args: Any) -> LearnResult:
        """As core.ppo.learn; with an axis of S seeds in all arguments, in all results too. Raises RuntimeError."""
        started = time.perf_counter()
        number = self.threads.number
        if not self.axis.shape:
            result = self.with_threads(number, *args)
        else:
            with ThreadPoolExecutor(number) as pool:
                result = self.axis.stack(list(pool.map(lambda seed: self.with_threads(1, *seed), self.axis.unstack(args))))
        self.threads.took(time.perf_counter() - started)
        return result

    def with_threads(
        self,
        num_threads: int,
        params: Tensor,
        adam: AdamState,
        rollout: Mapping[str, Tensor],
        permutation: Tensor,
        coefficients: Coefficients,
        normalization: Normalization,
    ) -> LearnResult:
        """The update of one seed on so many threads."""
        config, raw = self.config, obs_of(rollout)
        action = rollout["action"]
        switches = (config.advantage_estimator == "monte-carlo", config.norm_returns, config.norm_adv, config.clip_reward)
        try:
            tensors = operators.mlp_learn(
                params=params,
                adam=list(adam),
                obs=network_input(self.network, raw, normalization),
                final_obs=self._final_input(rollout, normalization),
                action_mask=mask_of(raw),
                action=action.unsqueeze(-1) if self._is_one_choice else action,
                steps=[rollout[key] for key in ("reward", "terminated", "truncated", "valid")],
                permutation=permutation,
                coefficients=list(coefficients),
                reward_scale=normalization.reward_scale,
                returns=[normalization.return_mean, normalization.return_std],
                network=self._description,
                minibatch_size=config.minibatch_size,
                switches=[int(x) for x in (*switches, config.clip_vloss, config.recompute_advantage)],
                execution=[self._num_parts, num_threads, self.ranks.rank, self.ranks.size, self._address],
            )
        except RuntimeError:
            if self._faults:
                raise self._faults[0] from None
            raise
        return LearnResult.from_tensors(tensors)

    def _final_input(self, rollout: Mapping[str, Tensor], normalization: Normalization) -> Tensor | None:
        if not has_final_obs(rollout):
            return None
        return network_input(self.network, obs_of(rollout, "final_"), normalization)


class ThreadCount:
    """How many threads share a call: as many as there are parts or, where that is faster on this machine just now, one."""

    def __init__(self, most: int) -> None:
        self.number = most
        self._numbers = sorted({1, most})
        self._calls = 0
        self._seconds: dict[int, deque[float]] = {number: deque(maxlen=3) for number in self._numbers}

    def took(self, seconds: float) -> None:
        """Note the time of a call with `number` threads, and choose the number for the next one."""
        self._calls += 1
        self._seconds[self.number].append(seconds)
        other = next((number for number in self._numbers if number != self.number), self.number)
        if len(self._seconds[other]) < 3 or self._calls % TRY_AGAIN == 0:
            self.number = other
        else:
            self.number = min(self._numbers, key=lambda number: median(self._seconds[number]))


class FusedAct:
    """core.acting.act. `bind` packs the parameters once for a whole rollout."""

    def __init__(self, network: Covered, num_threads: int, axis: SeedAxis = ONE) -> None:
        """num_threads: how many share a call that is large enough. axis: of seeds, in all arguments and in the action."""
        self.network = network
        self._to_vector = axis.map(partial(network_input, network), at_once=True)
        self._description = description(network)
        self._actors = Actors(self._description, axis.size)
        self._num_threads = num_threads
        self._is_one_choice = mlp_of(network).distribution is CATEGORICAL

    def __call__(self, params: Tensor, normalization: Normalization, obs: Obs, noise: Tensor) -> Tensor:
        """One action per environment, (N, *action_shape)."""
        action: Tensor = self.bind((params, normalization), (obs, noise))(obs, noise)
        return action

    def bind(self, fixed: tuple[Any, ...], rest: tuple[Any, ...]) -> Callable[..., Tensor]:
        """`self(*fixed, *given)` as a function of `given`, which has the shapes, strides and types of `rest`.

        A step of eight environments takes 10 us, of which the C++ function takes 1.5.
        """
        params, normalization = fixed
        obs, noise = rest
        self._actors.set(params.contiguous())
        num_rows = noise.shape[-2]
        large = num_rows * self.network.num_params > SERIAL_WORK
        call = ActCall(num_rows=num_rows, num_threads=self._num_threads if large else 1)
        mean, scale = normalization.obs_mean, normalization.obs_scale
        is_vector = isinstance(obs, Tensor) and obs.dtype is torch.float32 and isinstance(self.network, MLPActorCritic)
        if not is_vector or (mean is not None and mean["obs"].dtype is not torch.float32):
            return partial(self._act_on_any, call, normalization)
        kept: list[Tensor] = []
        if mean is not None and scale is not None:
            kept = [mean["obs"].contiguous(), scale["obs"].contiguous()]
            call.obs_mean, call.obs_scale = kept[0].data_ptr(), kept[1].data_ptr()
        return partial(self._act, call, kept)

    def _act_on_any(self, call: Any, normalization: Normalization, obs: Obs, noise: Tensor) -> Tensor:
        """Observations that PyTorch has to turn into vectors first."""
        mask = mask_of(obs)
        call.action_mask = None if mask is None else mask.data_ptr()
        return self._act(call, mask, self._to_vector(obs, normalization), noise)

    def _act(self, call: Any, _kept: Any, obs: Tensor, noise: Tensor) -> Tensor:
        """_kept: tensors that `call` points to, which live as long as this function is bound."""
        obs, noise = obs.contiguous(), noise.contiguous()
        action = operators.empty_action(noise, self._description)
        call.obs, call.noise, call.action = obs.data_ptr(), noise.data_ptr(), action.data_ptr()
        self._actors.act(call)
        return action.squeeze(-1) if self._is_one_choice else action

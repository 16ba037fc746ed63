"""The environments of S seeds as one vector environment of S * N. Each seed's environments behave as in a run of their own.

Environments s * N to (s + 1) * N - 1 belong to seed s. `reset` takes a list of S seeds. Some environments can be seeded one by
one: Gymnasium's in processes, its CartPole, EnvPool's, ALE's and JAX's. They form one vector environment of S * N. 80 CartPoles
then step in 105 us instead of the 740 us of ten times eight. Other vector classes may share one generator among their
environments, so each seed gets its own instance. Knows nothing of policies.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space
from torch import Tensor
from torch.utils._pytree import tree_map

from fastppo.envs.autoreset import is_tensor, numbers_in
from fastppo.envs.cartpole import SeededCartPole
from fastppo.envs.device import Action, DeviceEnv, Running, StepResult, TorchVectorEnv, autoreset_step, start
from fastppo.envs.envpool import EnvPoolVectorEnv
from fastppo.envs.grouped import GroupedVectorEnv
from fastppo.envs.numbered import INFO_KEYS, SUCCESS, NumberedVectorEnv
from fastppo.envs.shared_rows import rows_of

ResetSeeds = int | Sequence[int] | None  # S seeds, or the first of them; None: generators continue


class SeedsVectorEnv(VectorWrapper):
    """A vector environment of S * N that can be seeded one by one. Environment i of a seed is seeded with seed + i."""

    def __init__(self, envs: VectorEnv, num_seeds: int) -> None:
        super().__init__(envs)
        self.num_seeds = num_seeds

    def reset(self, *, seed: ResetSeeds = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """seed: S seeds, or the first of them."""
        if seed is None:
            return self.env.reset(options=options)
        each: Any = np.add.outer(_each(seed, self.num_seeds), np.arange(self.num_envs // self.num_seeds)).ravel()
        return self.env.reset(seed=each if _is_ale(self.env) else each.tolist(), options=options)


class JoinedVectorEnv(VectorEnv[Any, Any, Any]):
    """S vector environments of N each, stepped one after another. Infos contain only the entries that training reads."""

    def __init__(self, envs: Sequence[VectorEnv], info_names: Sequence[str] = (SUCCESS,)) -> None:
        """info_names: of numbers in the infos, as AutoresetEnvs takes them."""
        first = envs[0]
        self.envs = tuple(envs)
        self._info_names = tuple(info_names)
        self.num_envs = first.num_envs * len(envs)
        self.metadata = first.metadata
        self.spec = first.spec
        self.single_observation_space, self.single_action_space = first.single_observation_space, first.single_action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._obs: list[Any] = [None] * len(envs)  # last observation of each

    def reset(self, *, seed: ResetSeeds = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """seed: S seeds, or the first. options: each environment gets its part of a reset_mask (S * N,)."""
        seeds = [None] * len(self.envs) if seed is None else _each(seed, len(self.envs))
        infos: list[dict[str, Any]] = []
        for index, (envs, one) in enumerate(zip(self.envs, seeds, strict=True)):
            mask = None if options is None else options.get("reset_mask")
            own = options if mask is None else {**(options or {}), "reset_mask": mask[self._rows(index)]}
            infos.append({})
            if own is None or mask is None or own["reset_mask"].any():
                self._obs[index], infos[index] = envs.reset(seed=one, options=own)
        return _joined(self._obs), self._joined_info(infos)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """actions: (S * N, ...)."""
        results = [envs.step(rows_of(actions, self._rows(index))) for index, envs in enumerate(self.envs)]
        *parts, infos = zip(*results, strict=True)
        self._obs = list(parts[0])
        obs, reward, terminated, truncated = map(_joined, parts)
        return obs, reward, terminated, truncated, self._joined_info(infos)

    def close_extras(self, **kwargs: Any) -> None:
        """Close all S environments."""
        for envs in self.envs:
            envs.close(**kwargs)

    def _rows(self, index: int) -> slice:
        size = self.num_envs // len(self.envs)
        return slice(index * size, (index + 1) * size)

    def _joined_info(self, infos: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Join the infos' entries that envs/autoreset.py reads. Environments without an action mask allow all actions."""
        joined: dict[str, Any] = {}
        for key in (*INFO_KEYS, "final_obs", "final_observation"):
            known = next((info[key] for info in infos if info.get(key) is not None), None)
            if known is not None and (isinstance(known, list) or getattr(known, "dtype", None) == np.dtype(object)):
                size = self.num_envs // len(self.envs)
                joined[key] = [row for info in infos for row in ([None] * size if info.get(key) is None else info[key])]
            elif known is not None:
                joined[key] = _joined([_blank(known) if info.get(key) is None else info[key] for info in infos])
        joined |= self._joined_numbers(infos)
        if any("final_info" in info for info in infos):
            joined["final_info"] = self._joined_numbers([info.get("final_info") for info in infos])
        if "action_mask" in joined and not is_tensor(joined["action_mask"]):
            size = self.num_envs // len(self.envs)
            masks = [info.get("_action_mask", np.full(size, info.get("action_mask") is not None)) for info in infos]
            joined["_action_mask"] = np.concatenate(masks)
        return joined

    def _joined_numbers(self, infos: Sequence[Any]) -> dict[str, Any]:
        """Join the numbers to be logged. Environments without one have nan."""
        size = self.num_envs // len(self.envs)
        found = [numbers_in(info, self._info_names, size) for info in infos]
        names = dict.fromkeys(name for numbers in found for name in numbers)
        likes = {name: next(numbers[name] for numbers in found if name in numbers) for name in names}
        return {name: _joined([numbers.get(name, like * math.nan) for numbers in found]) for name, like in likes.items()}


def _each(seed: int | Sequence[int], number: int) -> list[int]:
    return list(range(seed, seed + number)) if isinstance(seed, int) else [int(one) for one in seed]


def _blank(batch: Any) -> Any:
    """Zeros of the same structure, shapes and dtypes."""
    if isinstance(batch, Mapping):
        return {name: _blank(part) for name, part in batch.items()}
    if isinstance(batch, tuple):
        return tuple(map(_blank, batch))
    return torch.zeros_like(batch) if is_tensor(batch) else np.zeros_like(batch)


def _joined(batches: Sequence[Any]) -> Any:
    """Concatenate batches (N, ...) or structures of them."""
    first = batches[0]
    if isinstance(first, Mapping):
        return {name: _joined([batch[name] for batch in batches]) for name in first}
    if isinstance(first, tuple):
        return tuple(_joined(parts) for parts in zip(*batches, strict=True))
    return torch.cat(list(batches)) if is_tensor(first) else np.concatenate(batches)


class SeededTorchVectorEnv(TorchVectorEnv):
    """Environments on the device, with tensors of `running` (S, N, ...) and one generator per seed."""

    def __init__(self, env: DeviceEnv, num_envs: int, num_seeds: int, device: torch.device | str = "cpu") -> None:
        """num_envs: N, the number per seed."""
        super().__init__(env, num_seeds * num_envs, device)
        self.num_seeds = num_seeds
        self.generators = [torch.Generator(self.device) for _ in range(num_seeds)]
        for generator in self.generators:
            generator.seed()

    def draw(self, *leading: int) -> Tensor:
        """Uniform random numbers (S, *leading, N, K), each seed's from its own generator."""
        shape = (*leading, self.num_envs // self.num_seeds, self.env.num_random)
        return torch.stack(
            [torch.rand(shape, generator=one, dtype=torch.float32, device=self.device) for one in self.generators]
        )

    def reset(self, *, seed: ResetSeeds = None, options: dict[str, Any] | None = None) -> tuple[Tensor, dict[str, Any]]:
        """seed: S seeds, or the first of them."""
        if seed is not None:
            for generator, one in zip(self.generators, _each(seed, self.num_seeds), strict=True):
                generator.manual_seed(one)
        each = [start(self.env, random) for random in self.draw()]
        self.running = tree_map(lambda *x: torch.stack(x), *each)
        return self.running.obs.flatten(0, 1), {}

    def advance(self, running: Running, action: Action) -> tuple[Running, StepResult]:
        """Step all environments as one batch, since they are independent of each other."""
        together = tree_map(lambda x: x.flatten(0, 1), running)
        after, result = autoreset_step(self.env, together, action, self.draw().flatten(0, 1))
        return tree_map(lambda x: x.unflatten(0, (self.num_seeds, -1)), after), result


def many(make: Callable[[int], VectorEnv], num_envs: int, num_seeds: int, info_names: Sequence[str] = (SUCCESS,)) -> VectorEnv:
    """The environments of S seeds. make(K): a vector environment of K environments, of the same class for each K."""
    made = make(num_envs)
    if isinstance(made, TorchVectorEnv):
        envs = SeededTorchVectorEnv(made.env, num_envs, num_seeds, made.device)
        envs.spec = made.spec
        return envs
    one_by_one = type(made.unwrapped) in (NumberedVectorEnv, GroupedVectorEnv, EnvPoolVectorEnv)
    if one_by_one or isinstance(made, SeededCartPole) or _is_ale(made) or _is_jax(made):
        made.close()
        return SeedsVectorEnv(make(num_envs * num_seeds), num_seeds)
    return JoinedVectorEnv([made, *(make(num_envs) for _ in range(num_seeds - 1))], info_names)


def _is_ale(envs: VectorEnv) -> bool:
    return type(envs.unwrapped).__module__.startswith("ale_py.")


def _is_jax(envs: VectorEnv) -> bool:
    """Whether it is envs/jax.py's, which is not imported for it."""
    return type(envs.unwrapped).__module__ == "fastppo.envs.jax"

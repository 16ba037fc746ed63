"""Open the environments of a run: try a copy, make them, check them. Raises UsageError with one clear line.

Knows nothing of networks or the training loop.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from gymnasium.vector import VectorEnv

from fastppo.config import TrainConfig
from fastppo.envs.agents import AgentRows
from fastppo.envs.autoreset import AutoresetEnvs
from fastppo.envs.check import ONE_BY_ONE, Tried, check_envs, try_copy
from fastppo.envs.deadline import Deadline
from fastppo.envs.device import TorchVectorEnv
from fastppo.envs.factory import MadeEnvs, are_one_by_one, env_maker, make_training_envs
from fastppo.envs.grouped import GroupedVectorEnv
from fastppo.envs.halves import HalvesVectorEnv
from fastppo.envs.wrappers import DEFAULT_SIZE, RESCALED, RESIZED
from fastppo.errors import ENVIRONMENT_ERRORS, UsageError
from fastppo.policy.spaces import ActionSpec, ObsSpec, action_spec, obs_spec
from fastppo.ranks import Ranks
from fastppo.training.by_spaces import by_spaces

SHORT_EPISODE = 10.0  # steps; a row that only resets is then 9 % or more of all
COPIED_GENERATOR = (
    "check: if its module has a random generator, each process has a copy of it, and environments of two processes may be "
    "alike: use --vectorization sync, or draw from self.np_random"
)


@dataclass(frozen=True)
class OpenedEnvs:
    """The environments, their spaces, and the findings of the check. The fields are those of Task."""

    envs: AutoresetEnvs
    engine: str
    why: str
    obs: ObsSpec
    action: ActionSpec
    findings: tuple[str, ...]
    has_copies: bool


def open_environments(
    config: TrainConfig,
    local: TrainConfig,
    given: VectorEnv | None,
    device: torch.device,
    ranks: Ranks,
    deadline: Deadline,
    cleanup: contextlib.ExitStack,
) -> OpenedEnvs:
    """Make this process's environments, or use the given ones, and check them. Raises UsageError."""
    copy = Copy(local, deadline, cleanup)
    local = replace(local, autoreset=choose_autoreset(local, given, copy, ranks))
    copy.config = local
    if given is None:
        made, engine, why = copy.beside(lambda: make_training_envs(local.env_config, device, deadline, copy.tried))
        envs = AutoresetEnvs(made, deadline, local.env_config.info_names)
        cleanup.callback(envs.close)
    else:
        if config.env_halves == "on":
            raise UsageError("--env-halves on makes environments from --env-id, which yours were not: leave it off")
        made, engine, why = given, "given", "a vector environment of your own"
        envs = AutoresetEnvs(made, deadline, local.env_config.info_names)
    number = made.num_envs // envs.num_agents
    if number != config.num_seeds * local.num_envs:
        raise UsageError(f"--num-envs {local.num_envs}: {config.env_id} comes with {number} environments")
    if isinstance(made.unwrapped, TorchVectorEnv):  # --backend gymnasium wraps it
        made.unwrapped.share = (ranks.rank, ranks.size)
    if isinstance(made, TorchVectorEnv) and made.device != device:
        raise UsageError(f"--device {device}: the environments given are on {made.device}")
    action = action_spec(made.single_action_space, config.squash_actions, config.action_distribution)
    checks = config.check_env and not config.resume
    tried = copy.tried() if checks and engine in ONE_BY_ONE else copy.result
    mask_size = tried.mask_size if tried is not None and tried.ran else info_mask_size(envs)
    if tried is not None and tried.ran and mask_size is not None:
        mask_size //= envs.num_agents  # the copy has one of all agents
    obs = obs_spec(made.single_observation_space, mask_size, action, config.norm_obs)
    findings = check_envs(made, config.env_id, engine, deadline, tried) if checks else []
    if findings and tried is not None and not tried.repeats and has_processes(made):
        findings.append(COPIED_GENERATOR)
    return OpenedEnvs(envs, engine, why, obs, action, tuple(findings), tried is None or tried.was_made)


def choose_autoreset(local: TrainConfig, given: VectorEnv | None, copy: "Copy", ranks: Ranks) -> Any:
    """What --autoreset means, the same in all processes; "auto" for environments that reset as their class says."""
    if given is not None or not are_one_by_one(local.env_config):
        if local.autoreset != "auto":
            raise UsageError(
                f"--autoreset {local.autoreset} is for environments that are made one by one, and these reset as their class "
                "says: leave it off"
            )
        return "auto"
    if local.autoreset != "auto":
        return local.autoreset
    # of one environment there may be no copy beside it
    tries = ranks.is_main and local.check_env and local.num_envs * local.num_seeds > 1
    is_short = tries and copy.tried().episode_length < SHORT_EPISODE
    return ranks.agree("same-step" if is_short else "next-step")


def chosen_by_environment(config: TrainConfig, found: OpenedEnvs) -> tuple[TrainConfig, list[str]]:
    """The settings with those that were left to the environment, so that a resumed run has them too, and lines that say so."""
    chosen, lines = by_spaces(config, found.obs, found.action)
    metadata = found.envs.envs.metadata
    if RESIZED in metadata and config.resize is None:
        chosen["resize"] = DEFAULT_SIZE
        height, width = DEFAULT_SIZE
        lines.append(f"pictures of {metadata[RESIZED]} pixels are resized to {height} x {width} (--resize 0 keeps them)")
    if RESCALED in metadata and config.rescale_action is None:
        chosen["rescale_action"] = True
        lines.append(f"actions of {metadata[RESCALED]} are learned as -1 to 1 (--rescale-action False: as they are)")
    if found.engine in ONE_BY_ONE and found.envs.keeps_final_obs:
        chosen["autoreset"] = "same-step"
    return with_agents(replace(config, **chosen), found), lines


def with_agents(config: TrainConfig, found: OpenedEnvs) -> TrainConfig:
    """The settings with the number of agents of an environment that has several. Raises UsageError for another --num-agents."""
    rows = found.envs.envs if isinstance(found.envs.envs, AgentRows) else None
    if config.num_agents is not None and rows is None:
        raise UsageError(f"--num-agents is for environments of PettingZoo, and {config.env_id} has one agent: leave it off")
    if rows is None:
        return config
    if config.num_agents not in (None, rows.num_agents):
        raise UsageError(f"--num-agents {config.num_agents}: {config.env_id} has {rows.num_agents}")
    return replace(config, num_agents=rows.num_agents)


def has_processes(made: VectorEnv) -> bool:
    """Whether the environments run in groups, most of them in other processes."""
    if isinstance(made, HalvesVectorEnv):
        made = made.envs[0]
    return isinstance(made.envs_of_agents if isinstance(made, AgentRows) else made, GroupedVectorEnv)


class Copy:
    """One more environment to try out, beside those of the run. It is made once, at the first call of `tried`."""

    def __init__(self, config: TrainConfig, deadline: Deadline, cleanup: contextlib.ExitStack) -> None:
        """cleanup: closes it, after the run."""
        self.config, self.deadline = config, deadline
        self.result: Tried | None = None
        self._open = cleanup.enter_context(contextlib.ExitStack())

    def tried(self) -> Tried:
        """The result of the trial."""
        if self.result is None:
            config = self.config
            number = config.num_envs * config.num_seeds
            self.result = try_copy(env_maker(config.env_config), number, self.deadline, self._open)
        return self.result

    def beside(self, make: Callable[[], MadeEnvs]) -> MadeEnvs:
        """The result of `make`; of a second call, with the copy closed, if there can be no more environments beside it."""
        try:
            return make()
        except UsageError:
            if self.result is None or not self.result.was_made:
                raise
            self._open.close()
            return make()


def info_mask_size(envs: AutoresetEnvs) -> int | None:
    """Size of each environment's info["action_mask"], or None. Resets the environments."""
    if isinstance(envs.envs, TorchVectorEnv):
        return None
    with contextlib.suppress(*ENVIRONMENT_ERRORS):  # it will fail again when training starts, and is reported there
        _, mask = envs.reset_and_mask(None)  # with a seed, EnvPool would rebuild all its environments
        return None if mask is None else math.prod(mask.shape[1:])
    return None

"""Make a `Task` from settings: environments, networks, devices, threads. Raises UsageError with one clear line. Writes nothing.

Knows nothing of the training loop or of the files in run directories.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from fastppo import random_streams
from fastppo.bounds import flag
from fastppo.config import TrainConfig
from fastppo.core.seed_axis import SeedAxis
from fastppo.envs.autoreset import AutoresetEnvs, ResetSeed
from fastppo.envs.deadline import Deadline
from fastppo.envs.device import TorchVectorEnv
from fastppo.envs.halves import HalvesVectorEnv
from fastppo.errors import UsageError
from fastppo.policy.agent import Agent
from fastppo.policy.make_network import make_network
from fastppo.policy.module_policy import ModuleFactory, ModulePolicy
from fastppo.policy.network import Network
from fastppo.policy.spaces import ActionSpec, ObsSpec
from fastppo.random_streams import Stream, seed_of
from fastppo.ranks import TIMEOUT_SECONDS, Ranks, checked, start_ranks
from fastppo.rollout.env_step import states_of
from fastppo.run.tracking import check_installed
from fastppo.system.cpus import available_cores
from fastppo.system.devices import choose_device, resolved
from fastppo.system.modes import plain
from fastppo.training.evaluations import Evaluator, make_watchers
from fastppo.training.init_from import start_from
from fastppo.training.opening import OpenedEnvs, chosen_by_environment, open_environments
from fastppo.training.reproducibility import made_with, versions
from fastppo.training.resumed_settings import shaping
from fastppo.training.shares import check_same, share_of, with_shards
from fastppo.training.state import PolicySnapshot, TrainState, checkpoint_of, gather_environments, init_state, normalization_of
from fastppo.training.thread_trial import choose, minibatch_of
from fastppo.training.unused_settings import unused_settings

# Rows of a microbatch. Compiled loops write the intermediates of a pass to memory. Those of a small pass stay in the CPU cache:
# half the time at minibatches of 8192 rows and two threads (57 to 73 ms an epoch of 65,536 rows instead of 114). At minibatches
# of 256 rows the time is the same.
ROWS_PER_PASS = 1024
MIN_WORKER_ROWS = 32  # rows of a minibatch per worker of a compiled `learn`; 16 is no faster (benchmarks/LOG.md)
ENDLESS_SECONDS = 86_400.0  # with --env-timeout 0, how long ranks wait for each other


@dataclass(frozen=True)
class Task:
    """Everything that training needs, checked and ready."""

    config: TrainConfig  # the settings of all seeds and processes
    local: TrainConfig  # the settings of this process: N / K environments, M / K rows of a minibatch
    configs: tuple[TrainConfig, ...]  # the settings of each seed
    ranks: Ranks
    device: torch.device
    envs: AutoresetEnvs
    engine: str  # how the environments are run
    why: str  # reason for the choice of engine
    obs: ObsSpec
    action: ActionSpec
    network: Network
    states: tuple[TrainState, ...]  # a fresh state for each seed
    workers: int  # threads of a compiled `learn`
    threads: int  # threads of eager programs before any trial, and of a compiled program with one worker
    trial: Callable[[], object] | None  # timed to choose the number of eager threads; None: the number is fixed
    provenance: dict[str, str]
    findings: tuple[str, ...]  # lines on the environments from the check
    notes: tuple[str, ...]  # other lines to print
    render_env: AutoresetEnvs | None  # for videos
    evaluator: Evaluator | None  # for --eval-every
    has_copies: bool  # False: no second copy of the environments could be made

    @property
    def made(self) -> VectorEnv:
        """The vector environment without the autoreset wrapper."""
        return self.envs.envs

    @property
    def on_device(self) -> bool:
        """Whether the environments are functions of tensors on the device."""
        return isinstance(self.made, TorchVectorEnv)

    @property
    def in_halves(self) -> bool:
        """Whether one half of the environments steps while the policy acts for the other."""
        return isinstance(self.made, HalvesVectorEnv)

    @property
    def axis(self) -> SeedAxis:
        """The axis of seeds in tensors of all seeds."""
        return SeedAxis(self.config.num_seeds)

    @property
    def restarts(self) -> bool:
        """Whether environments restart at checkpoints. Environments on the device do not: checkpoints store their state."""
        return self.config.exact_resume and not self.on_device

    def environment_seeds(self) -> ResetSeed:
        """The seeds for the reset at a start, resume or restart. With several runs, a list with one seed each.

        Environment i gets seed + i, with i counted over all processes. Environments on tensors get no offset, because each
        process draws the random numbers of all.
        """
        draws_for_all = isinstance(self.made.unwrapped, TorchVectorEnv)
        offset = 0 if draws_for_all else self.ranks.rank * self.local.num_envs
        each = [
            environment_seed(own.seed, state.iteration) + offset for own, state in zip(self.configs, self.states, strict=True)
        ]
        return each if self.axis.shape else each[0]

    def data_of(self, state: TrainState | PolicySnapshot) -> dict[str, Any]:
        """A state or policy snapshot as plain data for a checkpoint."""
        made_by = {**self.provenance, **versions()}
        data = checkpoint_of(self.network, self.made.single_observation_space, self.obs, self.action, made_by, state)
        return data if isinstance(state, PolicySnapshot) else {**data, "settings": shaping(self.config)}

    def agent_of(self, state: TrainState) -> Agent:
        """The policy of a state."""
        space = self.made.single_observation_space
        return Agent(space, self.obs, self.action, self.network, state.params, normalization_of(state))

    def describe(self) -> list[str]:
        """Lines for the user: environments, findings of the check, device, threads."""
        parts = max(self.config.num_seeds, self.ranks.size)
        number = str(self.config.num_envs) if parts == 1 else f"{parts} x {self.local.num_envs}"
        agents = "" if self.config.num_agents is None else f" of {self.config.num_agents} agents"
        where = f"device {self.device}"
        if self.ranks.size > 1:
            where = f"{self.ranks.size} processes, this one on {self.device}"
        threads = f"{torch.get_num_threads()} eager, {self.workers} compiled"
        return [
            f"{self.config.env_id}: {number} environments{agents}, {self.engine} ({self.why})",
            *self.findings,
            f"{where}, {self.network.num_params:,} parameters; CPU threads: {threads}",
        ]


def environment_seed(seed: int, iteration: int) -> int:
    """The environments' seed for a run that starts or continues at `iteration`."""
    return random_streams.environment_seed(seed, Stream.ENVIRONMENTS, iteration)


def prepare(config: TrainConfig, policy: ModuleFactory | None, given: VectorEnv | None, cleanup: contextlib.ExitStack) -> Task:
    """Make the task. All settings are checked here, before any file is written.

    Args:
        policy, given: the `policy` and `envs` arguments of `train`.
        cleanup: closes the opened resources.

    Raises:
        UsageError: a setting is not possible.
    """
    if given is not None and config.num_seeds > 1:
        raise UsageError(f"--num-seeds {config.num_seeds} makes environments from --env-id, which yours were not: leave it off")
    device, ranks = meet_ranks(config, cleanup)
    config, note = with_shards(config, ranks)
    local = share_of(config, ranks)
    deadline = cleanup.enter_context(contextlib.closing(Deadline(config.env_timeout)))
    if given is not None:
        asked = [*config.preprocessing.flags, *(["--max-episode-steps"] if config.max_episode_steps else [])]
        if asked:
            raise UsageError(f"{asked[0]} wraps environments that are made from --env-id, which yours were not: leave it off")
        config = named_after(given, config)
    with checked(ranks):
        found = open_environments(config, local, given, device, ranks, deadline, cleanup)
    config, lines = chosen_by_environment(config, found)
    local = share_of(config, ranks)
    with checked(ranks):
        render_env, evaluator = make_watchers(config, given, device, deadline, ranks, cleanup)
    configs = seed_configs(config)
    workers = choose_workers(local, found.obs) if device.type == "cpu" else 1
    with plain():
        network, networks = make_networks(configs, found, policy)
        found = replace(found, action=replace(found.action, distribution=network.distribution))
        threads = choose_threads(local, network)
        torch.set_num_threads(threads)  # before the first parallel operation, which is in `init`
        states = [init_state(own, of_seed, found.obs, device) for own, of_seed in zip(configs, networks, strict=True)]
        started = start_from(config, network, found.obs, found.action, states, ranks)
        trial, thread_note = try_threads(config, local, found, network, states[0].params, threads)
    start_device_envs(found.envs.envs, config, network, states, ranks)
    unused = unused_settings(config, network, found.obs, found.action, device)
    return Task(
        config=config,
        local=local,
        configs=tuple(configs),
        ranks=ranks,
        device=device,
        network=network,
        states=tuple(states),
        workers=workers,
        threads=threads,
        trial=trial,
        provenance=made_with(device, torch.get_num_threads(), workers),
        notes=tuple(line for line in (*lines, note, started, thread_note, *unused) if line),
        render_env=render_env,
        evaluator=evaluator,
        **vars(found),
    )


def meet_ranks(config: TrainConfig, cleanup: contextlib.ExitStack) -> tuple[torch.device, Ranks]:
    """The device of this process, and the ranks. Raises UsageError."""
    device = choose_device(config.device)
    statistics = next((name for name in ("norm_obs", "norm_reward", "rnd_coef") if getattr(config, name)), None)
    if device.type == "mps" and statistics is not None:
        raise UsageError(
            f"{flag(statistics)} keeps statistics in float64, which mps has not: leave it off, or use --device cpu"
        )
    if config.track is not None:
        check_installed(config.track)
    if device.type == "cuda":  # CUDA graphs are captured on the current GPU; cleanup restores the caller's
        cleanup.callback(torch.cuda.set_device, torch.cuda.current_device())
        torch.cuda.set_device(resolved(device))
    ranks = start_ranks(device, TIMEOUT_SECONDS + (config.env_timeout or ENDLESS_SECONDS))
    cleanup.callback(ranks.close)
    with checked(ranks):
        check_same(config, ranks.agree(config), ranks)
    return resolved(ranks.device if ranks.size > 1 else device), ranks


def make_networks(
    configs: Sequence[TrainConfig], found: OpenedEnvs, policy: ModuleFactory | None
) -> tuple[Network, list[Network]]:
    """The network for the programs, and one network per seed to initialise its parameters. Raises UsageError."""
    networks = [make_network(found.obs, found.action, own, policy, seed_of(own.seed, Stream.PARAMETERS)) for own in configs]
    if not all(alike(networks[0], other) for other in networks[1:]):
        raise UsageError("policy: its buffers or frozen weights differ by seed, and --num-seeds shares them: train one by one")
    return networks[0], networks


def try_threads(
    config: TrainConfig, local: TrainConfig, found: OpenedEnvs, network: Network, params: Tensor, threads: int
) -> tuple[Callable[[], object] | None, str | None]:
    """Set the fastest number of threads for eager learning, if the settings leave it open. Returns the trial and a line."""
    if threads == 1 or config.num_threads is not None or config.compile in ("on", "inductor") or params.device.type != "cpu":
        return None, None
    rows = min(local.rows_per_minibatch, ROWS_PER_PASS) if found.obs.has_images else local.rows_per_minibatch
    trial = minibatch_of(network, params, found.obs, found.action, rows, local.num_steps)
    choice = choose(trial, threads)
    torch.set_num_threads(choice.number)
    return trial, choice.note


def seed_configs(config: TrainConfig) -> list[TrainConfig]:
    """The settings of each seed, from --seed upwards. With one seed, `[config]`."""
    if config.num_seeds == 1:
        return [config]
    seeds = range(config.seed, config.seed + config.num_seeds)
    resume = None if config.resume is None else Path(config.resume)
    return [
        replace(
            config, seed=seed, num_seeds=1, run_dir=None, resume=None if resume is None else str(resume / seed_folder(seed))
        )
        for seed in seeds
    ]


def seed_folder(seed: int) -> str:
    """The name of a seed's folder in the joint run directory."""
    return f"seed-{seed}"


def named_after(envs: VectorEnv, config: TrainConfig) -> TrainConfig:
    """`config` with env_id taken from the given environments, unless the settings name one."""
    if config.env_id != TrainConfig.env_id:
        return config
    spec = getattr(envs, "spec", None)
    return replace(config, env_id=type(envs.unwrapped).__name__ if spec is None else spec.id)


def start_device_envs(
    made: VectorEnv, config: TrainConfig, network: Network, states: Sequence[TrainState], ranks: Ranks
) -> None:
    """Give environments on the device their first state, so that it has its shapes, and a resumed run's `states` too."""
    if not isinstance(made, TorchVectorEnv):
        return
    made.reset()  # start_collector resets it again, with a seed
    if config.resume:
        for state, environments in zip(states, states_of(made, nothing_remembered(network, made)), strict=True):
            state.environments = gather_environments(environments, ranks)


def nothing_remembered(network: Network, made: TorchVectorEnv) -> tuple[Tensor, ...]:
    """A recurrent policy's state for a checkpoint of environments on the device, all zeros. () without a recurrent policy."""
    episode_start = torch.zeros_like(made.running.done)
    return (
        (episode_start.new_zeros(*episode_start.shape, network.rnn_state_size, dtype=torch.float32), episode_start)
        if network.rnn_state_size
        else ()
    )


def alike(one: Network, other: Network) -> bool:
    """Whether both networks have equal buffers and frozen weights."""
    if not isinstance(one, ModulePolicy) or not isinstance(other, ModulePolicy):
        return True
    return all(torch.equal(tensor, other.fixed[name]) for name, tensor in one.fixed.items())


def choose_threads(config: TrainConfig, network: Network) -> int:
    """Threads of eager programs: --num-threads, or one for a minibatch of fewer than 16 M multiplications.

    For less work, synchronisation costs more than a second thread saves. With 9,155 parameters on two cores, one thread is
    faster at 256 rows and two are faster at 4096 (benchmarks/LOG.md).
    """
    if config.num_threads is not None:
        return config.num_threads
    return 1 if config.rows_per_minibatch * network.num_params < 2**24 else usable_threads()


def usable_threads() -> int:
    """torch's number of threads, limited to the cores of this process."""
    return min(torch.get_num_threads(), available_cores())


def choose_workers(config: TrainConfig, obs: ObsSpec) -> int:
    """Threads of a compiled `learn`. Each has a part of the environments and minibatches (compile/workers.py), or some seeds.

    There are at most as many as cores, or --num-threads. With one seed, several workers have equal parts, with at least
    MIN_WORKER_ROWS rows of a minibatch each.
    """
    if obs.has_images:  # large convolutions parallelise better within each operation
        return 1
    cores = config.num_threads or usable_threads()
    if config.num_seeds > 1:
        return min(cores, config.num_seeds)
    most = min(cores, config.rows_per_minibatch // MIN_WORKER_ROWS)
    units = config.rows_per_minibatch // config.rows_per_unit
    return max(k for k in range(1, max(most, 1) + 1) if config.num_rows % k == 0 and units % k == 0)

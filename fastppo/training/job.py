"""The open resources of one call of `train`: a run for each seed, and the shared buffers, programs and environments."""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastppo.analysis.rendered_episodes import Recorder
from fastppo.callbacks import Callback
from fastppo.compile.selector import Kernels, ProgramSelector
from fastppo.core.adam import AdamState
from fastppo.core.seed_axis import SeedAxis
from fastppo.find_preset import describe
from fastppo.rollout.collector import Collector
from fastppo.rollout.storage import RnnState, allocate_rollout
from fastppo.run.directory import RunDirectory
from fastppo.run.display import Display, NoDisplay, make_display
from fastppo.run.signals import StopSignals
from fastppo.system.devices import WITH_FAST_PROGRAMS
from fastppo.system.modes import plain
from fastppo.system.tensordicts import TensorDict
from fastppo.training.device_trial import DeviceTrial
from fastppo.training.halves_trial import HalvesTrial
from fastppo.training.multi_seed import make_seed_directories, reopen_seeds
from fastppo.training.programs import build_programs
from fastppo.training.reproducibility import guarantees
from fastppo.training.resume import make_directory, reopen
from fastppo.training.setup import Task
from fastppo.training.thread_trial import Watch
from fastppo.training.training_run import TrainingRun
from fastppo.training.update import FrozenInputs, frozen_inputs


@dataclass
class Buffers:
    """The inputs of the programs, allocated once. Tensors of several seeds have the axis of seeds first.

    The lists have one entry per seed, for the current iteration.
    """

    axis: SeedAxis
    rollout: TensorDict  # filled by the collector
    rnn_state: RnnState | None  # filled by the collector, for a recurrent policy
    learn_rollout: dict[str, Tensor]  # the tensors of both, the rollout argument of `learn`
    params: Tensor  # (P,), or (S, P); each seed's state holds a view
    adam: AdamState
    permutation: Tensor  # (E, units), or (S, E, units)
    rollouts: list[dict[str, Tensor]]  # each seed's part of `learn_rollout`: views
    permutations: list[Tensor]  # each seed's part of `permutation`: views
    noises: list[Tensor]  # (T, N / K, ...), this process's part
    inputs: list[FrozenInputs]
    noise_dim: int  # position of the axis of seeds in `noise`

    @property
    def noise(self) -> Tensor:
        """The noise of all seeds, the collector's input."""
        noise: Tensor = self.axis.stack(self.noises, self.noise_dim)
        return noise

    def learn_arguments(self) -> tuple[Any, ...]:
        """The arguments of `learn`."""
        normalization, coefficients = self.axis.stack(self.inputs)
        return self.params, self.adam, self.learn_rollout, self.permutation, coefficients, normalization


def allocate_buffers(task: Task) -> Buffers:
    """Allocate the buffers of all seeds. `params` of the states become views of one tensor."""
    config, axis, states, device = task.config, task.axis, task.states, task.device
    num_rows, rnn_state_size = task.local.num_rows, task.network.rnn_state_size
    rollout = allocate_rollout(
        config.num_steps,
        num_rows,
        task.obs,
        task.action,
        task.envs.keeps_final_obs,
        device,
        axis.size if axis.shape else None,
        rnn_state_size > 0,
    )
    tensors: dict[str, Tensor] = dict(rollout.items())
    rnn_state: RnnState | None = None
    if rnn_state_size:
        tensors["rnn_state"] = torch.zeros(*axis.shape, num_rows, rnn_state_size, dtype=torch.float32, device=device)
        rnn_state = RnnState(tensors["rnn_state"])
    params = axis.stack([state.params for state in states])
    for state, own in zip(states, axis.unstack(params), strict=True):
        state.params = own  # acting and learning use the same tensor
    units = task.local.batch_size // config.rows_per_unit
    assert config.update_epochs is not None  # chosen by the environment's spaces if the preset leaves it open
    # zeros: on a GPU programs are run and captured before the first permutation, and an index out of range ends the process
    permutation = torch.zeros(*axis.shape, config.update_epochs, units, dtype=torch.int64, device=device)
    return Buffers(
        axis=axis,
        rollout=rollout,
        rnn_state=rnn_state,
        learn_rollout=tensors,
        params=params,
        adam=axis.stack([state.adam for state in states]),
        permutation=permutation,
        rollouts=axis.unstack(tensors),
        permutations=axis.unstack(permutation),
        noises=[draw_noise(task, torch.Generator(device)) for _ in states],
        inputs=[frozen_inputs(state, 0.0, config) for state in states],
        noise_dim=0 if task.on_device else 1,  # environments on the device run seed by seed, the others step by step
    )


def draw_noise(task: Task, generator: torch.Generator) -> Tensor:
    """The action noise of one seed, (T, N / K, ...). Every process draws the noise of all and takes its part.

    With gSDE an environment has the same noise for --sde-sample-freq steps.
    """
    config, held = task.config, 1
    if config.action_distribution == "gsde":
        held = config.sde_sample_freq or config.num_steps
    noise = task.action.distribution.noise(task.action.noise_shape(-(-config.num_steps // held), config.num_rows), generator)
    noise = noise if held == 1 else noise.repeat_interleave(held, 0)[: config.num_steps]
    return task.ranks.share(noise, 1).contiguous()


@dataclass
class Job:
    """A running training job."""

    task: Task
    runs: list[TrainingRun]  # one for each seed
    top: RunDirectory | None  # the joint directory, if there are several seeds
    display: Display
    buffers: Buffers
    selector: ProgramSelector
    thread_watch: Watch | None
    guarantees: list[str]  # lines on reproducibility
    stop: StopSignals
    device_trial: DeviceTrial | None = None
    halves_trial: HalvesTrial | None = None
    stopped_by: int = 0  # number of the signal that stopped the loop, equal in all processes
    collector: Collector | None = None
    iterations: int = 0  # number done by this process
    start_seconds: float = math.nan  # seconds from the start of the process to the first iteration
    first_update_seconds: float = math.nan  # seconds from the start of the process to the end of the first iteration

    @property
    def running(self) -> list[int]:
        """Indices of the seeds that are still training."""
        return [index for index, run in enumerate(self.runs) if not run.over]

    def environments_of(self, index: int) -> dict[str, Any] | None:
        """The current state of one seed's environments; see Collector.state_dicts."""
        states = None if self.collector is None else self.collector.state_dicts()
        return None if states is None else states[index]


def start_job(
    task: Task, place: Path, callbacks: Sequence[Callback], cleanup: contextlib.ExitStack, kernels: Kernels | None = None
) -> Job:
    """Open the runs, allocate the buffers, load or build the programs.

    Args:
        place: parent of the run directory, if the settings name none.
        kernels: the functions of the fused programs; None: use none of these.

    Raises:
        UsageError: the directory cannot be made or reopened.
    """
    runs, top, display = open_runs(task, place, callbacks, cleanup)
    buffers = allocate_buffers(task)
    specs = build_programs(task, buffers.learn_arguments(), buffers.noise)
    num_threads = 1 if task.workers > 1 else task.threads
    mode = task.config.compile
    if task.device.type not in WITH_FAST_PROGRAMS:
        mode = "off"
        display.note(f"nobody has run fastppo on {task.device.type} yet; programs are eager there")
    with plain():
        selector = ProgramSelector(mode, specs, num_threads, display.note, task.ranks, kernels)
    thread_watch = None
    if task.trial is not None and selector.name == "eager" and torch.get_num_threads() > 1:
        thread_watch = Watch(task.trial, display.note, task.provenance)
    promises = guarantees(task.device, selector.may_change, task.restarts or task.on_device, thread_watch is not None)
    for line in promises if task.config.verbose > 1 else ():
        display.note(line)
    return Job(task, runs, top, display, buffers, selector, thread_watch, promises, StopSignals())


def open_runs(
    task: Task, place: Path, callbacks: Sequence[Callback], cleanup: contextlib.ExitStack
) -> tuple[list[TrainingRun], RunDirectory | None, Display]:
    """Make or reopen the run directory, or those of all seeds, and print what will be trained.

    Returns:
        A run for each seed; the joint directory, if there are several seeds; the display.

    Raises:
        UsageError: the directory cannot be made or reopened.
    """
    config, several = task.config, task.axis.size > 1
    top: RunDirectory | None = None
    described = describe(config)
    notes = [] if described is None else [described]
    if several and config.resume:
        top, directories, notes = reopen_seeds(task, cleanup)
    elif several:
        top, directories = make_seed_directories(task, place, cleanup)
    elif config.resume:
        directory, notes = reopen(config, task.states[0], task, cleanup)
        directories = [directory]
    else:
        directories = [make_directory(task, place, cleanup)]

    display = _open_display(task, cleanup)
    for line in (f"run directory {(top or directories[0]).path}", *notes, *task.notes, *task.describe()):
        display.note(line)
    if not task.ranks.is_main:
        callbacks = ()
    elif task.render_env is not None and config.record_every is not None:
        callbacks = (*callbacks, Recorder(task.render_env, config.record_every, display.note))
    runs = []
    for own, state, directory in zip(task.configs, task.states, directories, strict=True):
        note = partial(_note_of_seed, display, own.seed) if several else display.note
        runs.append(TrainingRun(own, state, directory, task, callbacks, note, top))
        cleanup.callback(runs[-1].close)
    return runs, top, display


def _open_display(task: Task, cleanup: contextlib.ExitStack) -> Display:
    configs = task.configs
    seeds = f"seed {configs[0].seed}" if len(configs) == 1 else f"seeds {configs[0].seed} to {configs[-1].seed}"
    title = f"fastppo · {task.config.env_id} · {seeds}"
    shows = task.ranks.is_main and task.config.verbose
    display: Display = make_display(task.config.plain, title) if shows else NoDisplay()
    cleanup.callback(display.close)  # restores the terminal's cursor in all cases
    return display


def _note_of_seed(display: Display, seed: int, line: str) -> None:
    display.note(f"seed {seed}: {line}")

"""Training, from top to bottom: collect a rollout, learn from it, move the statistics, log, repeat.

`train(config)` is the whole job. What a step or an update computes is in core/; what an iteration means for a run, its counters
and checkpoints and logs, is in training_run.py. With --num-seeds S there are S runs, whose environments and programs are one.
"""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from fastppo import random_streams
from fastppo.analysis.video import Recorder
from fastppo.callbacks import Callback
from fastppo.compile.selector import ProgramSelector
from fastppo.config import TrainConfig, default_runs, with_absolute_paths
from fastppo.core.minibatches import draw_permutation
from fastppo.core.seed_axis import of_seed, stack
from fastppo.envs.autoreset import ResetSeed
from fastppo.envs.device import TorchVectorEnv
from fastppo.errors import RankLost, TrainingFault
from fastppo.policy.module_policy import ModuleFactory
from fastppo.presets import describe
from fastppo.random_streams import Stream
from fastppo.ranks import Ranks, checked
from fastppo.rollout.collector import Collector, start_collector
from fastppo.rollout.storage import STEP_KEYS, Outcomes, RnnState, allocate_rollout
from fastppo.run.directory import RunDirectory
from fastppo.run.display import Display, NoDisplay, make_display
from fastppo.run.signals import StopSignals
from fastppo.system.cpus import is_forked
from fastppo.system.modes import plain
from fastppo.system.paths import current_directory
from fastppo.system.platforms import SIGPIPE, peak_memory_mib, process_age
from fastppo.training.multi_seed import keep_joint, make_directories, reopen_all, shown_row
from fastppo.training.reproducibility import guarantees, versions
from fastppo.training.setup import Task, make_jobs, prepare
from fastppo.training.state import normalization_of
from fastppo.training.thread_trial import Watch
from fastppo.training.training_run import AgentRun, TrainResult, make_directory, reopen, schedule_at, share_environments

Opened = tuple[list[AgentRun], RunDirectory | None, Display]


def train(
    config: TrainConfig,
    policy: ModuleFactory | None = None,
    *,
    callbacks: Sequence[Callback] = (),
    envs: VectorEnv | None = None,
) -> TrainResult:
    """Train an agent as `config` says and keep everything in its run directory; with num_seeds S agents at once.

    Args:
        policy: `policy(inputs, num_outputs) -> torch.nn.Module`, a network of your own instead of ours: see
            fastppo.policy.module_policy.ModulePolicy for what it is given and returns.
        callbacks: called in their order between iterations, see fastppo.callbacks; for each seed by itself.
        envs: a vector environment of your own instead of one made from env_id, trained and evaluated on, and left open. The run
            is named after the id it was registered with, or its class, unless env_id is set.

    Raises:
        UsageError: a setting that cannot be; nothing has been written.
        TrainingFault: an environment failed or a number was not finite; a checkpoint from before it has been written.
        KeyboardInterrupt: after SIGINT, once the iteration is finished and a checkpoint written.
        SystemExit: likewise after SIGTERM, or when stdout is a pipe that its reader has closed; 128 + SIGTERM or SIGPIPE.
    """
    place = current_directory()  # before the code of an environment changes it
    config = with_absolute_paths(config, place)
    return train_in(default_runs(config, place), config, policy, callbacks, envs)


def train_in(
    runs: Path,
    config: TrainConfig,
    policy: ModuleFactory | None = None,
    callbacks: Sequence[Callback] = (),
    envs: VectorEnv | None = None,
) -> TrainResult:
    """`train`, with absolute paths. runs: where a run directory goes that `config` does not name."""
    with contextlib.ExitStack() as cleanup:
        if torch.is_inference_mode_enabled():  # no tensor of a run that goes on may be of that kind
            cleanup.enter_context(torch.inference_mode(False))
        cleanup.callback(torch.set_num_threads, torch.get_num_threads())
        if config.num_threads is not None or is_forked():  # before the first operation that threads would share
            torch.set_num_threads(config.num_threads or 1)
        task = prepare(config, policy, envs, cleanup)
        opened = open_runs(task, runs, callbacks, cleanup)
        return _train(task, opened, policy, envs)


def _train(task: Task, opened: Opened, policy: ModuleFactory | None, given: VectorEnv | None) -> TrainResult:
    runs, top, display = opened
    config, ranks, device, action, several = task.config, task.ranks, task.device, task.action, task.several
    states = task.states

    # --- what the programs take: buffers made once; of several seeds one for all, with a leading axis
    num_seeds = config.num_seeds if several else None
    keeps_final_obs = task.envs.keeps_final_obs
    rnn_state_size = task.network.rnn_state_size
    rollout = allocate_rollout(
        config.num_steps, task.local.num_envs, task.obs, action, keeps_final_obs, device, num_seeds, rnn_state_size > 0
    )
    rollout_tensors: dict[str, Tensor] = dict(rollout.items())
    rnn_state: RnnState | None = None
    if rnn_state_size:
        lead = (*((len(runs),) if several else ()), task.local.num_envs)
        rollout_tensors["rnn_state"] = torch.zeros(*lead, rnn_state_size, dtype=torch.float32, device=device)
        rnn_state = RnnState(rollout_tensors["rnn_state"])
    rollouts = [of_seed(rollout_tensors, index) for index in range(len(runs))] if several else [rollout_tensors]
    steps_of = [{key: rows[key][:-1] for key in STEP_KEYS} for rows in rollouts]
    params = stack([state.params for state in states]) if several else states[0].params
    adam = stack([state.adam for state in states]) if several else states[0].adam
    if several:
        for state, own in zip(states, params, strict=True):
            state.params = own  # a view: what acts and learns is one tensor
    units = task.local.batch_size // config.rows_per_unit
    permutations = torch.empty(len(runs), config.update_epochs, units, dtype=torch.int64, device=device)
    permutation = permutations if several else permutations[0]
    noise_shape = action.noise_shape(config.num_steps, config.num_envs)
    noises = [action.distribution.noise(noise_shape, torch.Generator(device))] * len(runs)  # (T, N, ...) of each seed
    goes_by = [(normalization_of(state), schedule_at(0.0, config, device)) for state in states]

    def joined_noise() -> Tensor:
        if several:  # environments on the device are stepped seed by seed, others step by step
            return torch.stack(noises, 0 if task.on_device else 1)
        return noises[0] if ranks.size == 1 else ranks.share(noises[0], 1).contiguous()

    normalization, schedule = stack(goes_by) if several else goes_by[0]
    example = (params, adam, rollout_tensors, permutation, schedule, normalization)
    jobs = make_jobs(task, example, joined_noise())
    with plain():
        tiers = ProgramSelector(config.compile, jobs, 1 if task.workers > 1 else task.threads, display.note, ranks)
    watch = None
    if task.trial is not None and tiers.name == "eager" and torch.get_num_threads() > 1:
        watch = Watch(task.trial, display.note, task.provenance)
    promises = guarantees(device, tiers.may_change, task.restarts or task.on_device, watch is not None)
    for line in promises:
        display.note(line)

    start_seconds = first_update_seconds = math.nan
    stop, stopped_by = StopSignals(), 0  # the latter as all ranks see it
    collector: Collector | None = None
    try:
        with checked(ranks):
            collector = start_collector(task.envs, rollout, task.obs, action, environment_seeds(task, runs), rnn_state)
        assert collector is not None
        kept = [share_environments(state.environments, ranks) for state in states if state.environments is not None]
        if len(kept) == len(runs):
            collector.load_state_dicts(kept)
        start_seconds = process_age()
        mark, iterations = time.perf_counter(), 0
        while not (stopped_by := ranks.highest(stop.received or 0)[0]):
            running = [index for index, run in enumerate(runs) if not run.over]
            if not running:
                break
            before = collector.state_dicts()
            for index in running:
                goes_by[index] = runs[index].begin(None if before is None else before[index])
                draw_minibatches(task, permutations[index], states[index].generators["minibatches"])
                noises[index] = action.distribution.noise(noise_shape, states[index].generators["actions"])
            normalization, schedule = stack(goes_by) if several else goes_by[0]
            noise = joined_noise()

            # collect: T steps of N environments under frozen parameters and statistics
            iteration, checkpoints = states[0].iteration, runs[0].checkpoints  # only a run alone restarts at checkpoints
            restart = checkpoints.restarts_at(iteration + 1)
            with checked(ranks):
                if iterations > 0 and checkpoints.restarts_at(iteration):
                    collector.reset(environment_seeds(task, runs))
                elif config.reset_each_rollout and iteration > 0 and not checkpoints.restarts_at(iteration):
                    collector.reset(None)
                phases = collector.collect(tiers.act(normalization), noise, cut=config.reset_each_rollout or restart)

            # learn: E epochs of minibatches, one call
            learn_started = time.perf_counter()
            outcomes = of_all(collector.outcomes(), ranks)
            steps = steps_of if ranks.size == 1 else [tensors_of(outcomes, device)]
            if config.norm_reward or (config.norm_obs and iteration == 0):
                for index in running:
                    goes_by[index] = (runs[index].normalize(rollouts[index], steps[index]), goes_by[index][1])
                normalization, schedule = stack(goes_by) if several else goes_by[0]
            with plain(), torch.no_grad():
                learned = tiers.learn(params, adam, rollout_tensors, permutation, schedule, normalization)
            adam = learned.adam
            metrics = {}  # of the seeds that go on
            for index in running:
                update = of_seed(learned, index) if several else learned
                with faults_of(runs[index], rollouts[index], several):
                    metrics[index] = runs[index].learn(update, rollouts[index])
            learn_seconds = time.perf_counter() - learn_started
            if watch is not None and tiers.name == "eager":
                watch.update(iteration, learn_seconds)

            # account: from account to account, what logging and checkpoints take is in the next iteration's time
            now = time.perf_counter()
            seconds, mark = now - mark, now
            if iterations == 0:
                first_update_seconds = process_age()
            iterations += 1
            for index in metrics:
                own_outcomes = Outcomes(*(rows[..., index, :] for rows in outcomes)) if several else outcomes
                runs[index].account(own_outcomes, metrics[index], goes_by[index][1], phases, learn_seconds, seconds)
                with faults_of(runs[index], rollouts[index], several):
                    runs[index].tell(partial(state_dict_of, collector, index))
            eta = max(run.eta for run in runs)
            if metrics:
                share_done = sum(min(run.progress, 1.0) for run in runs) / len(runs)
                display.update(shown_row(runs), share_done, eta, f"{task.engine} · {device} · {tiers.name}")
            if display.reader_gone:  # `| head -3`: the end is that of a signal
                stop.received = SIGPIPE
            with plain():
                tiers.update(iterations, eta)
            for index in metrics:
                with faults_of(runs[index], rollouts[index], several):
                    runs[index].keep(partial(state_dict_of, collector, index))
            for index in running:
                if runs[index].over and runs[index].fault is None:
                    runs[index].rest(state_dict_of(collector, index))
        for index, run in enumerate(runs):
            if not run.over:
                run.rest(state_dict_of(collector, index))
            if run.enough:
                run.note(f"training ends here: {run.enough}")
    except TrainingFault as fault:
        ended = reported(fault, runs, {} if collector is None else collector.kept())
        if not isinstance(fault, RankLost):
            leave_together(ranks)
        if stop.received and ranks.size == 1:  # a signal to all processes of a job has ended those of the environments too
            display.note(f"{ended}\nstopped by {stop.name}")
            raise stop.exception() from fault
        raise ended from fault
    except KeyboardInterrupt:
        for run in runs:
            run.note(f"stopped at once; iterations up to {run.checkpoints.iteration} are kept, {run.checkpoints.go_on}")
        raise
    finally:
        display.close()
        for run in runs:
            run.close()
        if given is None and task.has_copies:
            task.envs.close()  # evaluation has the machine to itself
        tiers.close()
        stop.restore()

    # --- what came out
    if ranks.size > 1:
        stop.received = stopped_by or None
    about = {
        "start_seconds": start_seconds,
        "first_update_seconds": first_update_seconds,
        "compile_seconds": tiers.compile_seconds,
        "tier": tiers.name,
        "backend": task.engine,
        "device": str(device),
        "peak_memory_mib": peak_memory_mib(),
        "reproducibility": promises,
        "made_with": task.provenance,
        "versions": versions(),
    }
    if several:  # what one of them cannot write is no reason to lose another's last state
        for run in runs:
            with contextlib.suppress(TrainingFault):
                run.checkpoints.finish(run.state)
    evaluated_in = given if task.has_copies else task.made
    results = [run.finish(about, stop.name, policy, evaluated_in, not stop.received) for run in runs if run.fault is None]
    failed = [run for run in runs if run.fault is not None]
    if top is not None and results:
        result = keep_joint(top, config, results, [run.config.seed for run in failed], display.note)
    elif results:
        (result,) = results
    if results:
        steps, seconds, sps = (result.summary[key] for key in ("global_step", "seconds", "sps"))
        display.note(f"{steps:,} steps in {seconds:.1f} s, {sps:,.0f} steps/s; results in {result.run_dir}")
    if stop.received:
        display.note(f"stopped by {stop.name}; {runs[0].checkpoints.go_on}")
        leave_together(ranks)
        raise stop.exception()
    if failed:
        raise TrainingFault("\n".join(f"seed {run.config.seed}: {run.fault}" for run in failed))
    return result


def open_runs(task: Task, place: Path, callbacks: Sequence[Callback], cleanup: contextlib.ExitStack) -> Opened:
    """Make or reopen the directory of a run, or those of all seeds, and tell people what is about to be trained.

    Args:
        place: where a directory goes that the settings do not name.

    Returns:
        A run for each seed; the directory that theirs are in, where there are several; where lines for people go.

    Raises:
        UsageError: the directory cannot be had.
    """
    config, configs, states = task.config, task.configs, task.states
    fresh = [task.data_of(state) for state in states]
    top: RunDirectory | None = None
    notes: list[str | None] = [describe(config)]
    if task.several and config.resume:
        top, directories, notes = reopen_all(config, configs, states, task.network, fresh, cleanup)
    elif task.several:
        top, directories = make_directories(config, place, configs, fresh, cleanup)
    elif config.resume:
        directory, notes = reopen(config, task.restarts, states[0], task.network, fresh[0], cleanup, task.ranks)
        directories = [directory]
    else:
        directories = [make_directory(config, place, fresh[0], task.ranks)]
        cleanup.callback(directories[0].unlock)

    named = f"seeds {configs[0].seed} to {configs[-1].seed}" if task.several else f"seed {config.seed}"
    title = f"fastppo · {config.env_id} · {named}"
    display: Display = make_display(config.plain, title) if task.ranks.is_main else NoDisplay()
    cleanup.callback(display.close)  # whatever happens: a terminal gets its cursor back
    for line in (f"run directory {(top or directories[0]).path}", *notes, *task.notes, *task.describe()):
        if line is not None:
            display.note(line)
    if not task.ranks.is_main:
        callbacks = ()
    elif task.render_env is not None and config.record_every is not None:
        callbacks = (*callbacks, Recorder(task.render_env, config.record_every, display.note))
    runs = []
    for own, state, directory in zip(configs, states, directories, strict=True):
        note = partial(_note_of_seed, display, own.seed) if task.several else display.note
        runs.append(
            AgentRun(own, state, directory, task.data_of, task.agent_of, callbacks, task.restarts, note, top, task.ranks)
        )
        cleanup.callback(runs[-1].close)
    return runs, top, display


def _note_of_seed(display: Display, seed: int, line: str) -> None:
    display.note(f"seed {seed}: {line}")


def draw_minibatches(task: Task, out: Tensor, generator: torch.Generator) -> None:
    """This process's part of an iteration's minibatches, (E, B / K), or of environments (E, N / K) for a policy with memory."""
    config, ranks = task.config, task.ranks
    unit, num_shards = config.rows_per_unit, config.minibatch_shards or 1
    size = config.rows_per_minibatch // unit
    draw_permutation(out, generator, config.num_steps // unit, config.num_envs, size, num_shards, ranks.rank, ranks.size)


@contextlib.contextmanager
def faults_of(run: AgentRun, rollout: Mapping[str, Tensor], several: bool) -> Iterator[None]:
    """A fault of one of several seeds ends that one: it is kept and told, and the others go on. rollout: its own."""
    try:
        yield
    except TrainingFault as fault:
        if not several:
            raise
        if run.fault is None:
            run.fault = run.report(fault, {key: rows.cpu() for key, rows in rollout.items()})
            run.note(f"{fault}; the other seeds go on")


def reported(fault: TrainingFault, runs: Sequence[AgentRun], kept: Mapping[str, Tensor]) -> TrainingFault:
    """Keep what all runs have reached; the fault as the user is told it. kept: the rollout as far as it came."""
    told = fault
    for index, run in enumerate(runs):
        if run.over:
            with contextlib.suppress(TrainingFault):
                run.checkpoints.finish(run.state)
        else:
            told = run.report(fault, kept if len(runs) == 1 else {key: rows[:, index] for key, rows in kept.items()})
    return told


def leave_together(ranks: Ranks) -> None:
    """Wait for the one that writes: torchrun ends all processes once one of them has left with an exit code."""
    with contextlib.suppress(RankLost):
        ranks.barrier()


def of_all(outcomes: Outcomes, ranks: Ranks) -> Outcomes:
    """What the rollouts of all processes brought: (T, N)."""
    if ranks.size == 1:
        return outcomes
    rows = ranks.gather(np.stack([x.astype(np.float32) for x in outcomes[:-1]]), 2)  # (5, T, N): one exchange
    terminated, truncated, valid, episode_end = rows[1:] > 0
    return Outcomes(rows[0], terminated, truncated, valid, episode_end, ranks.gather(outcomes.cut))


def tensors_of(outcomes: Outcomes, device: torch.device) -> dict[str, Tensor]:
    """`reward terminated truncated valid`, (T, N), by key of the rollout."""
    return {key: torch.from_numpy(getattr(outcomes, key)).to(device) for key in STEP_KEYS}


def environment_seed(seed: int, iteration: int) -> int:
    """Seed of the environments of a run that starts, or goes on, at `iteration`."""
    return random_streams.environment_seed(seed, Stream.ENVIRONMENTS, iteration)


def environment_seeds(task: Task, runs: Sequence[AgentRun]) -> ResetSeed:
    """What the environments are reset with where the runs start, go on or restart: of several, one each.

    Of several processes' the i-th one has seed + i, as in one process. Functions on tensors draw what those of all draw.
    """
    draws_for_all = isinstance(task.made.unwrapped, TorchVectorEnv)
    offset = 0 if draws_for_all else task.ranks.rank * task.local.num_envs
    each = [environment_seed(run.config.seed, run.state.iteration) + offset for run in runs]
    return each if len(runs) > 1 else each[0]


def state_dict_of(collector: Collector, index: int) -> dict[str, Any] | None:
    """That seed's environments as they stand, see Collector.state_dicts."""
    states = collector.state_dicts()
    return None if states is None else states[index]

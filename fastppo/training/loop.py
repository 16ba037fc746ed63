"""Training, from top to bottom: collect a rollout, learn from it, account for it, keep it, repeat.

`train(config)` is the whole job. What a step or an update computes is in core/; what an iteration means for a run, its counters
and checkpoints and logs, is in training_run.py; how training ends is in ends.py. With --num-seeds S there are S runs, whose
environments and programs are one.
"""

import contextlib
import reprlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from fastppo.callbacks import Callback, CallbackFunction, checked_callbacks
from fastppo.config import TrainConfig
from fastppo.core.minibatches import draw_permutation
from fastppo.envs.factory import is_on_device
from fastppo.errors import Interrupted, UsageError
from fastppo.fused.kernels import Kernels
from fastppo.given_settings import default_runs, with_absolute_paths
from fastppo.policy.module_policy import ModuleFactory, named_factory
from fastppo.ranks import Ranks, checked, is_alone, is_first_of_machine
from fastppo.rollout.collector import Collector, start_collector
from fastppo.rollout.step_collector import StepCollector
from fastppo.rollout.storage import STEP_KEYS, Outcomes, Phases
from fastppo.run.metrics import infos_said
from fastppo.system.cpus import is_forked
from fastppo.system.devices import enough_memory
from fastppo.system.modes import plain
from fastppo.system.named import importable_name
from fastppo.system.paths import current_directory
from fastppo.system.platforms import SIGPIPE, process_age
from fastppo.training.arguments import GivenEnvs, arguments
from fastppo.training.callback_list import has_on_step
from fastppo.training.device_trial import try_devices
from fastppo.training.ends import finish, isolating_fault, keeping_state
from fastppo.training.halves_trial import try_halves
from fastppo.training.job import Job, draw_noise, start_job
from fastppo.training.multi_seed import shown_row
from fastppo.training.results import TrainResult
from fastppo.training.setup import Task, prepare
from fastppo.training.state import share_environments
from fastppo.training.training_run import Times, TrainingRun


def train(
    config: TrainConfig | str | None = None,
    policy: ModuleFactory | None = None,
    *,
    callbacks: Sequence[Callback | CallbackFunction] = (),
    envs: GivenEnvs | None = None,
    env_fn: Callable[..., Any] | None = None,
    **settings: Any,
) -> TrainResult:
    """Train an agent and keep everything in its run directory; with num_seeds S agents at once.

    train("LunarLander-v3", seed=3) is `python -m fastppo.train --env-id LunarLander-v3 --seed 3`: it starts from the preset of
    the environment. train(TrainConfig("LunarLander-v3")) has exactly these settings.

    Args:
        config: settings, or an env_id.
        policy: `policy(inputs, num_outputs) -> torch.nn.Module`, a network of your own instead of ours: see
            fastppo.policy.module_policy.ModulePolicy for what it is given and returns. One that can be imported is recorded as
            config.policy, module:name, and the command line finds it there.
        callbacks: called in their order between iterations, see fastppo.callbacks; for each seed by itself.
        envs: an environment of your own, several in a list, a vector environment, or a simulator of tensors as in
            envs/simulators.py; trained and evaluated on, and left open. The run is named after the id that it was registered
            with, or its class, unless env_id is set. A function or class is an env_fn.
        env_fn: a function or class that makes one environment from env_kwargs, instead of env_id. With an argument num_envs it
            makes a vector environment. It is recorded as env_id, module:name, and evaluation imports it from there; one that
            cannot be imported (a lambda) has to be given again.
        settings: fields of TrainConfig, instead of those of `config` or of the preset. Values in env_kwargs may be any objects:
            a function or class is recorded by its name, and others have to be given again.

    Raises:
        UsageError: a setting is not possible. Nothing has been written.
        TrainingFault: an environment failed or a number was not finite; a checkpoint from before it has been written.
        Interrupted: a KeyboardInterrupt, after SIGINT, once the iteration is finished and a checkpoint written; its `result` is
            what would have been returned. In a notebook, or at Python's prompt, that is returned instead: an interrupted cell
            keeps it. summary["stopped_by"] says so. A second interrupt stops at once, without a result.
        SystemExit: likewise after SIGTERM, or when stdout is a pipe that its reader has closed; 128 + SIGTERM or SIGPIPE.
    """
    place = current_directory()  # before the code of an environment changes it
    if policy is not None and not callable(policy):
        raise UsageError(f"policy must be a class or function that makes a torch.nn.Module, got {reprlib.repr(policy)}")
    with arguments(config, envs, env_fn, settings) as (chosen, own):
        chosen = with_absolute_paths(chosen, place)
        try:
            return train_in(default_runs(chosen, place), chosen, policy, checked_callbacks(callbacks), own)
        except Interrupted as interrupted:
            if not hasattr(sys, "ps1"):  # no prompt: a loop over calls of `train` has to end too
                raise
            return interrupted.result


def train_in(
    place: Path,
    config: TrainConfig,
    policy: ModuleFactory | None = None,
    callbacks: Sequence[Callback] = (),
    envs: VectorEnv | None = None,
) -> TrainResult:
    """`train`, with absolute paths. place: where a run directory goes that `config` does not name."""
    if policy is None:
        policy = named_factory(config.policy)
    else:
        config = replace(config, policy=importable_name(policy))
    with contextlib.ExitStack() as cleanup:
        if torch.is_inference_mode_enabled():  # its tensors could not be trained on
            cleanup.enter_context(torch.inference_mode(False))
        cleanup.callback(torch.set_num_threads, torch.get_num_threads())
        if config.num_threads is not None or is_forked():  # before the first operation that threads would share
            torch.set_num_threads(config.num_threads or 1)
        alone, briefly = envs is None and is_alone(), partial(train_briefly, policy)
        trial = try_devices(config, alone, briefly)
        if trial is not None:
            config = replace(config, device=trial.chosen)  # a resumed run keeps it
        watches = any(map(has_on_step, callbacks))
        halves = try_halves(config, alone and not watches, briefly, None if trial is None else trial.seconds["cuda"])
        if halves is not None:
            config = replace(config, env_halves=halves.chosen)
        job = open_job(place, config, policy, callbacks, envs, cleanup)
        job.device_trial, job.halves_trial = trial, halves
        for tried in (trial, halves):
            if tried is not None:
                job.display.note(tried.note)
        with keeping_state(job, envs), enough_memory(job.task.device, "while training"):
            run_iterations(job)
        return finish(job, policy, envs)


def open_job(
    place: Path,
    config: TrainConfig,
    policy: ModuleFactory | None,
    callbacks: Sequence[Callback],
    envs: VectorEnv | None,
    cleanup: contextlib.ExitStack,
) -> Job:
    """Make everything that training needs. Raises UsageError."""
    kernels = start_kernels(config, policy, cleanup)  # the compiler works while the environments are made and checked
    task = prepare(config, policy, envs, cleanup)
    refuse_watching(callbacks, task)
    with enough_memory(task.device, "before the first iteration"):
        return start_job(task, place, callbacks, cleanup, kernels)


def train_briefly(policy: ModuleFactory | None, config: TrainConfig, callback: CallbackFunction) -> None:
    """Train without results, for a trial. Raises what a signal to stop raises."""
    with contextlib.ExitStack() as cleanup:
        job = open_job(Path(), config, policy, checked_callbacks([callback]), None, cleanup)
        cleanup.callback(job.stop.restore)
        cleanup.callback(job.selector.close)
        with enough_memory(job.task.device, "while training"):
            run_iterations(job)
        if job.stop.received is not None:
            raise job.stop.exception()


def refuse_watching(callbacks: Sequence[Callback], task: Task) -> None:
    """Raise UsageError for a callback of steps where a program steps the environments, or steps are of several seeds."""
    watching = next((type(callback).__name__ for callback in callbacks if has_on_step(callback)), None)
    if watching is not None and is_on_device(task.envs.envs):
        raise UsageError(f"{watching}.on_step: --backend torch steps environments in a program; use on_iteration")
    if watching is not None and task.in_halves:
        raise UsageError(f"{watching}.on_step: --env-halves on has no step of all environments; leave it off")
    if watching is not None and task.config.num_seeds > 1:
        raise UsageError(f"{watching}.on_step is for one seed: with --num-seeds {task.config.num_seeds} use on_iteration")


def start_kernels(config: TrainConfig, policy: ModuleFactory | None, cleanup: contextlib.ExitStack) -> Kernels | None:
    """The functions of the fused programs, loaded or being built; None where the settings rule these programs out."""
    on_cpu = config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available())
    is_covered = policy is None and config.rnn is None and config.action_distribution == "normal" and not config.bf16
    is_covered = is_covered and not config.env_id.startswith("ALE/")  # pictures are not
    if not is_covered or config.compile not in ("auto", "on") or not on_cpu:
        return None
    kernels = Kernels(builds=is_first_of_machine())
    cleanup.callback(kernels.close)
    return kernels


def run_iterations(job: Job) -> None:
    """Train until all runs are over or a signal asks to stop. Raises TrainingFault."""
    collector = start_environments(job)
    mark = time.perf_counter()
    while not stop_requested(job) and job.running:
        begin(job, collector)
        phases = collect(job, collector)
        update = learn(job, collector)
        now = time.perf_counter()  # the time of logging and checkpoints counts for the next iteration
        times = Times(now - mark, phases.env, phases.act, update.seconds)
        mark = now
        account(job, update, times)
        keep(job, update)
    for index, run in enumerate(job.runs):
        if not run.over:
            run.mark_resumable(job.environments_of(index))
        if run.enough:
            run.note(f"training ends here: {run.enough}")


def start_environments(job: Job) -> Collector:
    """Reset the environments, or put them where a checkpoint left them."""
    task, buffers = job.task, job.buffers
    with checked(task.ranks):
        seed = task.environment_seeds()
        job.collector = start_collector(task.envs, buffers.rollout, task.obs, task.action, seed, buffers.rnn_state)
    assert job.collector is not None
    if isinstance(job.collector, StepCollector) and job.runs[0].callbacks.of_steps:
        job.collector.on_step = job.runs[0].on_step
    saved = [share_environments(state.environments, task.ranks) for state in task.states if state.environments is not None]
    if len(saved) == len(task.states):
        job.collector.load_state_dicts(saved)
    job.start_seconds = process_age()
    return job.collector


def stop_requested(job: Job) -> bool:
    """Whether a process has received a signal to stop; all processes get the same answer."""
    (job.stopped_by,) = job.task.ranks.highest(job.stop.received or 0)
    return job.stopped_by > 0


def begin(job: Job, collector: Collector) -> None:
    """Draw an iteration's random numbers and freeze what it acts and learns under."""
    environments = collector.state_dicts()
    for index in job.running:
        run, buffers = job.runs[index], job.buffers
        generators = run.state.generators
        buffers.inputs[index] = run.begin_iteration(None if environments is None else environments[index])
        draw_minibatches(job.task, buffers.permutations[index], generators["minibatches"])
        buffers.noises[index] = draw_noise(job.task, generators["actions"])


def draw_minibatches(task: Task, out: Tensor, generator: torch.Generator) -> None:
    """This process's part of an iteration's minibatches, (E, B / K), or of environments (E, N / K) for a policy with memory."""
    config, ranks = task.config, task.ranks
    unit, num_shards = config.rows_per_unit, config.minibatch_shards or 1
    size = config.rows_per_minibatch // unit
    draw_permutation(out, generator, config.num_steps // unit, config.num_rows, size, num_shards, ranks.rank, ranks.size)


def collect(job: Job, collector: Collector) -> Phases:
    """T steps of N environments under frozen parameters and statistics."""
    task, buffers = job.task, job.buffers
    iteration, resets = task.states[job.running[0]].iteration, task.config.reset_each_rollout
    restarts_at = job.runs[0].checkpoints.restarts_at  # only the run of a single seed restarts its environments at checkpoints
    normalization, _ = buffers.axis.stack(buffers.inputs)
    with checked(task.ranks):
        if job.iterations > 0 and restarts_at(iteration):
            collector.reset(task.environment_seeds())
        elif resets and iteration > 0 and not restarts_at(iteration):
            collector.reset(None)
        return collector.collect(job.selector.act(normalization), buffers.noise, cut=resets or restarts_at(iteration + 1))


class Update(NamedTuple):
    """What an iteration brought."""

    outcomes: list[Outcomes]  # of each seed and all processes, (T, N)
    metrics: dict[int, dict[str, float]]  # by index of the seeds whose update was applied
    seconds: float  # that learning took


def learn(job: Job, collector: Collector) -> Update:
    """E epochs of minibatches, one call for all seeds."""
    started = time.perf_counter()
    task, buffers, running = job.task, job.buffers, job.running
    config, ranks, axis = task.config, task.ranks, buffers.axis
    info_names = () if ranks.size == 1 else config.env_config.info_names
    outcomes = global_outcomes(collector.outcomes(), ranks, info_names)
    if config.rnd_coef > 0:  # the rollout's rewards get a bonus, those of the outcomes do not
        outcomes = outcomes._replace(reward=outcomes.reward.copy())
    for index in running if config.norm_obs or config.norm_reward or config.rnd_coef > 0 else ():
        rollout = buffers.rollouts[index]
        normalization = job.runs[index].normalize(rollout, global_steps(rollout, outcomes, ranks))
        buffers.inputs[index] = buffers.inputs[index]._replace(normalization=normalization)
    with plain(), torch.no_grad():
        result = job.selector.learn(*buffers.learn_arguments())
    buffers.adam = result.adam
    metrics = {}
    for index, own_result in enumerate(axis.unstack(result)):
        if index in running:
            with isolating_fault(job, index):
                metrics[index] = job.runs[index].apply_update(own_result, buffers.rollouts[index])
    seconds = time.perf_counter() - started
    if job.thread_watch is not None and job.selector.name == "eager":
        job.thread_watch.update(task.states[0].iteration, seconds)
    return Update(axis.unstack(outcomes, -2), metrics, seconds)


def global_outcomes(outcomes: Outcomes, ranks: Ranks, info_names: Sequence[str] = ()) -> Outcomes:
    """The outcomes of the rollouts of all processes: (T, N). info_names: of numbers that the infos may have."""
    if ranks.size == 1:
        return outcomes
    has_infos = np.full_like(outcomes.valid, bool(outcomes.infos))
    rows = ranks.gather(np.stack([x.astype(np.float32) for x in (*outcomes[:5], has_infos)]), 2)  # (6, T, N): one exchange
    terminated, truncated, valid, episode_end, has_infos = rows[1:] > 0
    parts = None if outcomes.reward_parts is None else ranks.gather(outcomes.reward_parts.astype(np.float32), 2)
    infos = {}
    if has_infos.any():  # in some process, and all have to take part
        missing = np.full_like(outcomes.reward, np.nan)
        infos = {name: ranks.gather(outcomes.infos.get(name, missing).astype(np.float32), 1) for name in info_names}
    return Outcomes(rows[0], terminated, truncated, valid, episode_end, ranks.gather(outcomes.cut), parts, infos)


def global_steps(rollout: dict[str, Tensor], outcomes: Outcomes, ranks: Ranks) -> dict[str, Tensor]:
    """`reward terminated truncated valid` of all processes, (T, N), on the device.

    rollout: (T+1, N / K, ...) of this process. outcomes: the result of `global_outcomes`.
    """
    if ranks.size == 1:
        return {key: rollout[key][:-1] for key in STEP_KEYS}
    device = rollout["reward"].device
    return {key: torch.from_numpy(getattr(outcomes, key)).to(device) for key in STEP_KEYS}


def account(job: Job, update: Update, times: Times) -> None:
    """Count what the iteration brought, log it, call the callbacks, show it."""
    task, runs, selector = job.task, job.runs, job.selector
    if job.iterations == 0:
        job.first_update_seconds = process_age()
    job.iterations += 1
    for index, metrics in update.metrics.items():
        runs[index].record(update.outcomes[index], metrics, job.buffers.inputs[index].coefficients, times)
        evaluate(job, runs[index])
        with isolating_fault(job, index):
            runs[index].log_and_call_back(partial(job.environments_of, index))
    if update.metrics:
        progress = sum(min(run.progress, 1.0) for run in runs) / len(runs)
        row = shown_row(runs)
        engine = " · ".join([task.engine, str(task.device), selector.name, *infos_said(row)])
        job.display.update(row, progress, max(run.eta for run in runs), engine)
    if job.display.reader_gone:  # `| head -3`: training ends as after a signal
        job.stop.received = SIGPIPE


def evaluate(job: Job, run: TrainingRun) -> None:
    """Evaluate the policy where --eval-every asks for it. The time counts for the next iteration."""
    evaluator, state = job.task.evaluator, run.state
    if evaluator is None or not run.evaluation_due:
        return
    agent, seed = job.task.agent_of(state), run.config.seed
    result = evaluator.evaluate(agent, seed, state.global_step, run.note, lambda: job.stop.received is not None)
    if result is not None:
        run.take_evaluation(result)


def keep(job: Job, update: Update) -> None:
    """Between iterations: use programs that have been compiled, write checkpoints."""
    with plain():
        job.selector.update(job.iterations, max(run.eta for run in job.runs))
    for index in update.metrics:
        run = job.runs[index]
        if run.fault is None:
            with isolating_fault(job, index):
                run.checkpoint_if_due(partial(job.environments_of, index))
        if run.over and run.fault is None:
            run.mark_resumable(job.environments_of(index))

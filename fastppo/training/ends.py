"""The end of training: faults, signals and the final report. Knows nothing of iterations."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from gymnasium.vector import VectorEnv

from fastppo.config import TrainConfig
from fastppo.envs.registry import find_spec
from fastppo.envs.render import declared_modes, shows_windows
from fastppo.errors import Interrupted, RankLost, TrainingFault
from fastppo.policy.module_policy import ModuleFactory
from fastppo.ranks import Ranks
from fastppo.system.platforms import peak_memory_mib
from fastppo.training.job import Job
from fastppo.training.multi_seed import save_joint_results
from fastppo.training.reproducibility import versions
from fastppo.training.results import Ending, TrainResult, finish_run


@contextlib.contextmanager
def keeping_state(job: Job, given: VectorEnv | None) -> Iterator[None]:
    """Context around the loop. After a fault it saves the last resumable state and reports it. It always closes all resources.

    given: the caller's own environments, which stay open.
    """
    try:
        yield
    except TrainingFault as fault:
        ended = _report(fault, job)
        if not isinstance(fault, RankLost):
            _leave_together(job.task.ranks)
        if job.stop.received and job.task.ranks.size == 1:  # the signal also ended the environments' processes
            job.display.note(f"{ended}\nstopped by {job.stop.name}")
            raise job.stop.exception() from fault
        raise ended from fault
    except KeyboardInterrupt:
        for run in job.runs:
            run.note(f"stopped at once; iterations up to {run.checkpoints.iteration} are kept, {run.checkpoints.go_on}")
        raise
    finally:
        job.display.close()
        for run in job.runs:
            run.close()
        if given is None and job.task.has_copies:
            job.task.envs.close()  # frees the machine for the evaluation
        job.selector.close()
        job.stop.restore()


@contextlib.contextmanager
def isolating_fault(job: Job, index: int) -> Iterator[None]:
    """With several seeds, a fault ends only its seed's run. It is reported, its state is saved, and the others continue."""
    run = job.runs[index]
    try:
        yield
    except TrainingFault as fault:
        if len(job.runs) == 1:
            raise
        rollout = {key: rows.cpu() for key, rows in job.buffers.rollouts[index].items()}
        run.fault = run.report_fault(fault, rollout)
        run.note(f"{fault}; the other seeds go on")


def _report(fault: TrainingFault, job: Job) -> TrainingFault:
    """Save the states of all runs. Returns the fault with a message for the user."""
    saved = {} if job.collector is None else job.collector.snapshot()  # (T+1, N) or (T+1, S, N), possibly incomplete
    reported = fault
    for run, rollout in zip(job.runs, job.task.axis.unstack(saved, 1), strict=True):
        if run.over:
            with contextlib.suppress(TrainingFault):
                run.checkpoints.finish(run.state)
        else:
            reported = run.report_fault(fault, rollout)
    return reported


def _leave_together(ranks: Ranks) -> None:
    """Wait until rank 0 has written its files. torchrun ends all processes as soon as one exits with an error."""
    with contextlib.suppress(RankLost):
        ranks.barrier()


def finish(job: Job, policy: ModuleFactory | None, given: VectorEnv | None) -> TrainResult:
    """Write the results of all runs. policy, given: the `policy` and `envs` arguments of `train`.

    Raises:
        TrainingFault: a seed had a fault, or results cannot be written.
        Interrupted, SystemExit: a signal stopped the loop.
    """
    task, runs, stop, note = job.task, job.runs, job.stop, job.display.note
    if task.ranks.size > 1:
        stop.received = job.stopped_by or None
    if len(runs) > 1:
        for run in runs:  # first, since an error in one seed's results must not lose another seed's last state
            with contextlib.suppress(TrainingFault):
                run.checkpoints.finish(run.state)
    evaluated_in = given if task.has_copies else task.made
    ending = Ending(_about(job), stop.name, policy, evaluated_in, not stop.received)
    results = [finish_run(run, task, ending) for run in runs if run.fault is None]
    failed = [run for run in runs if run.fault is not None]
    result = None
    if results:
        result = results[0]
        if job.top is not None:
            result = save_joint_results(job.top, task.config, results, [run.config.seed for run in failed], note)
        if task.config.reset_each_rollout and result.summary["eval_episodes"]:
            note(
                f"returns in training are of at most {task.config.num_steps} steps, where every rollout cuts its episodes "
                "(--reset-each-rollout); this evaluation played whole ones"
            )
        note(_last_line(result, task.config.resume is not None, stop.received is not None))
        if given is None and not stop.received and _opens_windows(task.config):
            how = "--render human" if shows_windows() else "--video"
            note(f"to watch it: python -m fastppo.evaluate {results[0].run_dir} {how}")
    if stop.received:
        note(f"stopped by {stop.name}; {runs[0].checkpoints.go_on}")
        _leave_together(task.ranks)
        exception = stop.exception()
        raise Interrupted(result) if isinstance(exception, KeyboardInterrupt) and result is not None else exception
    if failed:
        raise TrainingFault("\n".join(f"seed {run.config.seed}: {run.fault}" for run in failed))
    assert result is not None
    return result


def _last_line(result: TrainResult, is_resumed: bool, is_stopped: bool) -> str:
    """How far the run came, how fast, and where the results are."""
    steps, seconds, sps = (result.summary[key] for key in ("global_step", "seconds", "sps"))
    if is_resumed and sps == 0.0 and not is_stopped:
        more = "--total-timesteps or --num-iterations asks for more"
        return f"nothing left to train: the run has all its {steps:,} steps ({more}); results in {result.run_dir}"
    speed = f"{sps:,.0f} steps/s{' since it was resumed' if is_resumed else ''}"
    return f"{steps:,} steps in {seconds:.1f} s, {speed}; results in {result.run_dir}"


def _opens_windows(config: TrainConfig) -> bool:
    """Whether the class of the environment declares images, which `evaluate --render human` shows in a window."""
    return config.backend != "envpool" and "rgb_array" in declared_modes(find_spec(config.env_id))


def _about(job: Job) -> Mapping[str, Any]:
    """The entries of summary.json that are equal for all seeds: timing, device and versions."""
    return {
        "start_seconds": job.start_seconds,
        "first_update_seconds": job.first_update_seconds,
        "compile_seconds": job.selector.compile_seconds,
        "tier": job.selector.name,
        "deviations": job.selector.deviations,
        "backend": job.task.engine,
        "env_halves": "on" if job.task.in_halves else "off",
        "env_halves_trial": None if job.halves_trial is None else job.halves_trial.summary,
        "device": str(job.task.device),
        "device_trial": None if job.device_trial is None else job.device_trial.summary,
        "peak_memory_mib": peak_memory_mib(),
        "reproducibility": job.guarantees,
        "made_with": job.task.provenance,
        "versions": versions(),
    }

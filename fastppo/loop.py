"""Training, from top to bottom: collect a rollout, learn from it, move the statistics, log, repeat.

`train(config)` is the whole job. What a step or an update computes is in core/; what is kept on disk is in run/.
"""

import contextlib
import math
import os
import resource
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor
from torch.utils._pytree import tree_map

from fastppo.callbacks import Callback, View
from fastppo.checkpoints import Checkpoints
from fastppo.config import TrainConfig, check_resumable
from fastppo.core import programs
from fastppo.core.programs import MINIBATCH_METRICS, SUMMARY, Learned, Schedule, obs_of
from fastppo.envs.atari import atari_settings
from fastppo.envs.autoreset import AutoresetEnvs
from fastppo.envs.backends import engine_name, make_envs
from fastppo.envs.check import check_envs
from fastppo.envs.deadline import Deadline
from fastppo.envs.device import TorchVectorEnv
from fastppo.envs.drawn import make_drawn
from fastppo.envs.probe import choose_vectorization
from fastppo.errors import ENVIRONMENT_ERRORS, TrainingFault, UsageError, brief
from fastppo.evaluate import evaluate_config
from fastppo.loading import load_policy
from fastppo.plot import plot_curves
from fastppo.policy.agent import Agent, make_network
from fastppo.policy.networks import ModuleFactory, Network
from fastppo.policy.normalization import (
    discounted_return,
    update_moments,
)
from fastppo.policy.spaces import action_spec, obs_spec
from fastppo.presets import describe
from fastppo.reproducibility import differences, guarantees, made_with, versions
from fastppo.rollout import Collector, allocate_rollout, env_step_of, pack, start_collector, state_of
from fastppo.run.directory import RunDirectory
from fastppo.run.display import make_display
from fastppo.run.episodes import WINDOW
from fastppo.run.loggers import Loggers
from fastppo.run.signals import StopSignals
from fastppo.run.tracking import Tracker, check_installed
from fastppo.state import TrainState, checkpoint_of, frozen, init_state, load_state, normalization_of, snapshot
from fastppo.tiers import Job, Tiers
from fastppo.video import Recorder

# Compiled loops stream what a pass leaves behind through memory; parts that stay in the cache take half the time at minibatches
# of 8192 rows and two threads (57 to 73 ms an epoch of 65,536 rows instead of 114), and the same at 256.
ROWS_PER_PASS = 1024
MIN_WORKER_ROWS = 32  # of a minibatch, for each worker of a compiled `learn`; with 16 nothing is gained (benchmarks/LOG.md)
MIN_WORKER_ENVS = 64  # for each worker of a compiled `collect`
SPS_WINDOW = 10  # iterations behind the steps per second shown and logged
MIN_BEST_EPISODES = 10  # a mean over fewer episodes is luck, and makes no best model


@dataclass(frozen=True)
class TrainResult:
    """What `train` returns."""

    run_dir: Path
    summary: Mapping[str, Any]
    policy: Agent


def train(
    config: TrainConfig,
    policy: ModuleFactory | None = None,
    *,
    callbacks: Sequence[Callback] = (),
    envs: VectorEnv | None = None,
) -> TrainResult:
    """Train an agent as `config` says and keep everything in its run directory.

    Args:
        policy: `policy(inputs, num_outputs) -> torch.nn.Module`, a network of your own instead of ours: see
            fastppo.policy.networks.ModulePolicy for what it is given and returns.
        callbacks: called in their order between iterations, see fastppo.callbacks.
        envs: a vector environment of your own instead of one made from env_id, trained and evaluated on, and left open. The run
            is named after the id it was registered with, or its class, unless env_id is set.

    Raises:
        UsageError: a setting that cannot be; nothing has been written.
        TrainingFault: an environment failed or a number was not finite; a checkpoint from before it has been written.
        KeyboardInterrupt: after SIGINT, once the iteration is finished and a checkpoint written.
        SystemExit: likewise after SIGTERM, or when stdout is a pipe that its reader has closed; 128 + SIGTERM or SIGPIPE.
    """
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(torch.set_num_threads, torch.get_num_threads())
        return _train(config, policy, callbacks, envs, cleanup)


def _train(
    config: TrainConfig,
    policy: ModuleFactory | None,
    callbacks: Sequence[Callback],
    given: VectorEnv | None,
    cleanup: contextlib.ExitStack,
) -> TrainResult:
    # --- what is trained, where: everything that can be refused is refused before anything is written
    device = choose_device(config.device)
    if config.track is not None:
        check_installed(config.track)
    seeds = derive_seeds(config.seed)
    deadline = cleanup.enter_context(contextlib.closing(Deadline(config.env_timeout)))
    if given is None:
        made, backend, why = make_own(config, device, deadline)
        envs = AutoresetEnvs(made, deadline)
        cleanup.callback(envs.close)
    else:
        made, backend, why = given, "given", "a vector environment of your own"
        envs = AutoresetEnvs(made, deadline)
        config = named_after(given, config)
    if made.num_envs != config.num_envs:
        raise UsageError(f"--num-envs {config.num_envs}: {config.env_id} comes with {made.num_envs} environments")
    if isinstance(made, TorchVectorEnv) and made.device != device:
        raise UsageError(f"--device {device}: the environments given are on {made.device}")
    obs_space = made.single_observation_space
    action = action_spec(made.single_action_space, config.squash_actions)
    obs = obs_spec(obs_space, info_mask_size(envs), action)
    findings = []
    if config.check_env and not config.resume:
        findings = check_envs(made, config.env_id, config.env_kwargs, backend, deadline)
    drawn = None
    if config.record_every is not None:
        drawn = make_recorded(config, given, deadline)
        cleanup.callback(drawn.close)
    network = make_network(obs, action, config, policy, seeds["parameters"])
    state = init_state(config, network, obs, device, seeds)
    workers = 1 if obs.has_images else choose_workers(config)  # large convolutions share themselves out better
    torch.set_num_threads(choose_threads(config, network))
    provenance = made_with(device, torch.get_num_threads(), workers)
    data_of = partial(checkpoint_of, network, obs_space, obs, action, {**provenance, **versions()})
    # environments on the device are kept in checkpoints as they stand; others can only be restarted at them
    restarts = config.exact_resume and not isinstance(made, TorchVectorEnv)

    if isinstance(made, TorchVectorEnv):
        made.reset(seed=0)  # for the form of its state; start_collector resets it again
    if config.resume:
        if isinstance(made, TorchVectorEnv):
            state.environments = state_of(made)
        directory, notes = reopen(config, restarts, state, network, data_of(state), cleanup)
    else:
        directory, notes = make_directory(config, data_of(state)), [describe(config)]
        cleanup.callback(directory.unlock)
    display = make_display(config.plain, f"fastppo · {config.env_id} · seed {config.seed}")
    cleanup.callback(display.close)  # whatever happens: a terminal gets its cursor back
    display.note(f"run directory {directory.path}")
    for line in notes:
        if line is not None:
            display.note(line)
    display.note(f"{config.env_id}: {config.num_envs} environments, {backend} ({why})")
    for line in findings:
        display.note(line)
    display.note(
        f"device {device}, {network.num_params:,} parameters; CPU threads: {torch.get_num_threads()} eager, {workers} compiled"
    )
    tracker = (
        None if config.track is None else partial(Tracker, config.track, config.track_project, directory.path, asdict(config))
    )
    loggers = Loggers(directory.metrics, display.note, state.iteration if config.resume else None, tracker)
    cleanup.callback(loggers.close)
    loggers.log_config(config.to_json())
    if drawn is not None and config.record_every is not None:
        callbacks = (*callbacks, Recorder(drawn, config.record_every, display.note))

    def agent_of() -> Agent:
        return Agent(obs_space, obs, action, network, state.params, normalization_of(state))

    checkpoints = Checkpoints(directory, config, restarts, data_of, state.iteration, display.note)

    # --- the programs, and the buffers that they live in
    rollout = allocate_rollout(config.num_steps, config.num_envs, obs, action, envs.keeps_final_obs, device)
    rollout_tensors: dict[str, Tensor] = dict(rollout.items())
    permutation = torch.empty(config.update_epochs, config.batch_size, dtype=torch.int64, device=device)
    epochs = permutation.unbind(0)  # views made once
    act_noise_shape = action.noise_shape(config.num_steps, config.num_envs)
    normalization = normalization_of(state)
    learn = partial(programs.learn, policy=network, **learn_settings(config))
    if obs.has_images:  # what a CNN leaves behind for its gradient is 100 kB a row
        learn = partial(learn, rows_per_pass=ROWS_PER_PASS)
    fast_learn = partial(learn, rows_per_pass=ROWS_PER_PASS, num_workers=workers) if device.type == "cpu" else learn
    learn_example = (state.params, state.adam, rollout_tensors, permutation, schedule_at(0.0, config, device), normalization)
    jobs = {"learn": Job(learn, fast_learn, learn_example)}
    noise_example = torch.zeros(act_noise_shape, device=device)
    seed = environment_seed(config.seed, state.iteration)
    if isinstance(made, TorchVectorEnv):
        collect = partial(programs.collect, policy=network, env_step=env_step_of(made, action))
        fast_collect = partial(collect, num_workers=workers if config.num_envs >= MIN_WORKER_ENVS * workers else 1)
        collect_example = (state.params, normalization, pack(made.running), noise_example, made.draw(config.num_steps))
        jobs["collect"] = Job(collect, fast_collect if device.type == "cpu" else collect, collect_example)
    else:
        act = partial(programs.act, network, network.weights(state.params))
        act_example = (state.params, normalization, tree_map(lambda x: x[0], obs_of(rollout_tensors)), noise_example[0])
        jobs["act"] = Job(act, partial(programs.act_from_params, policy=network), act_example)
    tiers = Tiers(config.compile, jobs, 1 if workers > 1 else torch.get_num_threads(), display.note)
    exact = restarts or isinstance(made, TorchVectorEnv)
    promises = guarantees(device, tiers.may_change, exact)
    for line in promises:
        display.note(line)

    recent: deque[tuple[float, int]] = deque([(0.0, 0)], maxlen=SPS_WINDOW + 1)  # (seconds, steps) of this process
    first_second, first_step, first_iteration = state.seconds, state.global_step, state.iteration
    start_seconds = first_update_seconds = math.nan
    stop, resting = StopSignals(), state  # resting: the state before the iteration under way
    stage = f"iteration {state.iteration + 1}"
    enough: str | None = None  # why training ends before its time
    view: View | None = None
    collector: Collector | None = None
    try:
        collector = start_collector(envs, rollout, obs, action, seed)
        if state.environments is not None:
            collector.load_state_dict(state.environments)
        progress = first_progress = progress_of(state, config)
        start_seconds = process_age()
        mark = time.perf_counter()
        while progress < 1.0 and not stop.received and not enough:
            resting, stage = frozen(state, collector.state_dict()), f"iteration {state.iteration + 1}"
            normalization, schedule = normalization_of(state), schedule_at(progress, config, device)
            restart = checkpoints.restarts_at(state.iteration + 1)
            for epoch in epochs:
                torch.randperm(config.batch_size, generator=state.generators["minibatches"], out=epoch)

            # collect: T steps of N environments under frozen parameters and statistics
            noise = action.distribution.noise(act_noise_shape, state.generators["actions"])
            with torch.inference_mode():
                if state.iteration > first_iteration and checkpoints.restarts_at(state.iteration):
                    collector.reset(environment_seed(config.seed, state.iteration))
                elif config.reset_each_rollout and state.iteration > 0 and not checkpoints.restarts_at(state.iteration):
                    collector.reset(None)
                phases = collector.collect(tiers.act(normalization), noise, cut=config.reset_each_rollout or restart)

            # learn: E epochs of minibatches, one call
            learn_started = time.perf_counter()
            with torch.no_grad():
                learned = tiers.learn(state.params, state.adam, rollout_tensors, permutation, schedule, normalization)
            metrics = read_metrics(learned)  # sync: once per iteration, for the log
            state.params.copy_(learned.params)
            state.adam = learned.adam
            move_statistics(state, rollout_tensors, learned, config)
            learn_seconds = time.perf_counter() - learn_started

            # account
            reward, terminated, truncated, valid, episode_end, cut = collector.outcomes()
            if restart and not config.reset_each_rollout:
                episode_end[-1] &= ~cut  # half an episode is none
            finished = state.episodes.update(reward, episode_end, valid)
            state.iteration += 1
            if restart:
                state.episodes.forget_running()
            state.global_step += int(valid.sum())
            # from account to account: what logging and checkpoints take is in the next iteration's time, nothing is left out
            now = time.perf_counter()
            seconds, mark = now - mark, now
            state.seconds += seconds
            if math.isnan(first_update_seconds):
                first_update_seconds = process_age()
            recent.append((state.seconds - first_second, state.global_step - first_step))
            progress = progress_of(state, config)

            return_mean = state.episodes.return_mean
            new_best = finished > 0 and len(state.episodes.returns) >= MIN_BEST_EPISODES and return_mean >= state.best_return
            improved = new_best and return_mean > state.best_return
            if new_best:
                state.best_return = return_mean
                # kept are the parameters after this update, one past those that played
                checkpoints.best = snapshot(state)

            row: dict[str, int | float] = {
                "iteration": state.iteration,
                "global_step": state.global_step,
                "seconds": round(state.seconds, 6),
                "sps": (recent[-1][1] - recent[0][1]) / (recent[-1][0] - recent[0][0]),
                "episodic_return_mean": return_mean,
                "episodic_length_mean": state.episodes.length_mean,
                "episodes": state.episodes.episodes,
                "terminations": int((terminated & valid).sum()),
                "truncations": int((truncated & ~terminated & valid).sum()),
                "loss": metrics["policy_loss"] + config.vf_coef * metrics["value_loss"] - config.ent_coef * metrics["entropy"],
                **metrics,
                "learning_rate": schedule.learning_rate.item(),
                "env_share": phases.env / seconds,
                "act_share": phases.act / seconds,
                "learn_share": learn_seconds / seconds,
            }
            solved = config.stop_at_return is not None and return_mean >= config.stop_at_return
            if solved and len(state.episodes.returns) == WINDOW:
                enough = f"the last {WINDOW} episodes return {return_mean:.4g}, as --stop-at-return asks"
            logs = state.iteration % config.log_interval == 0 or progress >= 1.0
            if logs:
                loggers.log(row)
            if callbacks:
                resting, stage = frozen(state, collector.state_dict()), f"after iteration {state.iteration}"
                seen = MappingProxyType(row)
                view = View(config, directory.path, state.iteration, state.global_step, min(progress, 1.0), seen, agent_of)
                enough = enough or tell(callbacks, view)
            if enough and not logs:
                loggers.log(row)
            eta = (state.seconds - first_second) * max(1.0 - progress, 0.0) / max(progress - first_progress, 1e-9)
            engine = f"{backend} · {device} · {tiers.name}"
            display.update({**row, "new_best": improved}, min(progress, 1.0), eta, engine)
            if display.reader_gone:  # `| head -3`: the end is that of a signal
                stop.received = signal.SIGPIPE
            tiers.update(len(recent) - 1, eta)
            if checkpoints.update(state, collector.state_dict) and view is not None:
                tell(callbacks, view, "on_checkpoint")
        state.environments = collector.state_dict()
        resting = state
        if enough:
            display.note(f"training ends here: {enough}")
    except TrainingFault as fault:
        raise checkpoints.report(fault, stage, resting, {} if collector is None else collector.kept()) from fault
    except KeyboardInterrupt:
        display.note(f"stopped at once; iterations up to {checkpoints.iteration} are kept, {checkpoints.go_on}")
        raise
    finally:
        display.close()
        loggers.close()
        if given is None:
            envs.close()  # evaluation has the machine to itself
        tiers.close()
        stop.restore()

    # --- what came out
    checkpoints.finish(state)
    if view is not None:
        tell(callbacks, view, "on_end")
    summary: dict[str, Any] = {
        "env_id": config.env_id,
        "seed": config.seed,
        "global_step": state.global_step,
        "iterations": state.iteration,
        "seconds": state.seconds,
        "sps": (state.global_step - first_step) / max(state.seconds - first_second, 1e-9),
        "start_seconds": start_seconds,
        "first_update_seconds": first_update_seconds,
        "compile_seconds": tiers.compile_seconds,
        "tier": tiers.name,
        "backend": backend,
        "device": str(device),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "best_return_mean": state.best_return,
        "eval_return_mean": math.nan,
        "eval_return_std": math.nan,
        "eval_episodes": 0,
        "stopped_by": stop.name or enough,
        "reproducibility": promises,
        "made_with": provenance,
        "versions": versions(),
    }
    try:
        if state.best_return == -math.inf or not directory.best.exists():  # too few episodes to judge by: it is the last one
            directory.save(directory.best, data_of(state))
        directory.write_json(directory.summary, summary)  # before evaluation, which may take long, or fail
        draw_curves(directory, config, display.note)
        agent = load_policy(directory.path, policy=policy)
        if config.eval_episodes and not stop.received:
            result = evaluate_config(agent, config, config.eval_episodes, seeds["evaluation"], envs=given)
            summary |= {f"eval_{key}": value for key, value in result.items()}
            directory.write_json(directory.summary, summary)
            display.note(
                f"best model: return {result['return_mean']:.1f} +- {result['return_std']:.1f} in {result['episodes']} episodes"
            )
    except OSError as error:
        raise TrainingFault(
            f"training is over and kept, but its results could not be written ({error.strerror}); once they can be, "
            f"{checkpoints.go_on}"
        ) from None
    display.note(
        f"{state.global_step:,} steps in {state.seconds:.1f} s, {summary['sps']:,.0f} steps/s; results in {directory.path}"
    )
    if stop.received:
        display.note(f"stopped by {stop.name}; {checkpoints.go_on}")
        raise stop.exception()
    return TrainResult(directory.path, summary, agent)


def make_own(config: TrainConfig, device: torch.device, deadline: Deadline) -> tuple[VectorEnv, str, str]:
    """The environments that `config` names, which engine runs them, and why that one; raises UsageError."""
    vectorization, why = "auto", f"as --backend {config.backend} asks"
    if config.backend in ("auto", "gymnasium"):
        vectorization, why = choose_vectorization(
            config.env_id, config.num_envs, config.vectorization, config.env_kwargs, config.num_threads, deadline
        )
    made = make_envs(
        config.env_id,
        config.num_envs,
        config.backend,
        vectorization,
        config.env_kwargs,
        device,
        atari_settings(config),
        config.num_threads,
        deadline,
    )
    return made, engine_name(made, config.env_id, config.backend, vectorization), why


def make_recorded(config: TrainConfig, given: VectorEnv | None, deadline: Deadline) -> AutoresetEnvs:
    """The one environment that --record-every draws; raises UsageError where there is none."""
    if given is not None:
        raise UsageError("--record-every makes an environment of its own from --env-id, which yours were not: leave it off")
    return make_drawn(config.env_id, config.backend, config.env_kwargs, atari_settings(config), deadline)


def named_after(envs: VectorEnv, config: TrainConfig) -> TrainConfig:
    """`config` with the name of environments that were not made from it, unless it says one itself."""
    if config.env_id != TrainConfig.env_id:
        return config
    spec = getattr(envs, "spec", None)
    return replace(config, env_id=type(envs.unwrapped).__name__ if spec is None else spec.id)


def tell(callbacks: Sequence[Callback], view: View, moment: str = "on_iteration") -> str | None:
    """Call all of them; what to say where one has seen enough. Raises TrainingFault where one raises."""
    enough = None
    for callback in callbacks:
        name = type(callback).__name__
        try:
            if getattr(callback, moment)(view) is True:
                enough = enough or f"{name} has seen enough"
        except Exception as error:  # whatever somebody's code may raise
            raise TrainingFault(f"{name}.{moment} raised {brief(error)}") from error
    return enough


def make_directory(config: TrainConfig, start: Mapping[str, Any]) -> RunDirectory:
    """The directory of a new run, locked, with its settings and `start`, the checkpoint of iteration 0; raises UsageError."""

    def fill(directory: RunDirectory) -> None:
        directory.write_text(directory.config, config.to_json())
        directory.keep(0, start, config.keep_checkpoints)

    return RunDirectory.create(config.run_dir, config.env_id, config.seed, fill)


def reopen(
    config: TrainConfig,
    restarts: bool,
    state: TrainState,
    network: Network,
    fresh: Mapping[str, Any],
    cleanup: contextlib.ExitStack,
) -> tuple[RunDirectory, list[str | None]]:
    """Put the state of the run that --resume names back into `state`.

    Args:
        restarts: its environments restart at checkpoints, see Checkpoints.
        fresh: the checkpoint of `state` as it is now.
        cleanup: gets the directory's unlocking.

    Returns:
        The directory, locked, and lines on how it goes on.

    Raises:
        UsageError: the run cannot go on, or not with these settings.
    """
    directory = RunDirectory(Path(config.resume or ""))
    before = TrainConfig.from_json(directory.config)
    check_resumable(before, config)
    try:
        directory.lock()
        cleanup.callback(directory.unlock)
        path, checkpoint, damage = directory.newest(kept_only=restarts)
        lost = load_state(state, network, checkpoint, fresh, path)
        directory.write_text(directory.config, config.to_json())
    except OSError as error:
        raise UsageError(f"--resume {directory.path} cannot be written: {error.strerror}") from None
    if restarts:
        environments = "the environments restart as they did there: what comes is what came, or would have come, after it"
    elif state.environments is not None:
        environments = "the environments go on where they were"
    else:
        environments = "the environments start new episodes"
        state.episodes.forget_running()  # those of before have no end
        state.return_carry.zero_()
    changed = differences(checkpoint["made_with"], fresh["made_with"])
    length = (config.total_timesteps, config.num_iterations)
    annealed = [name for name, on in (("learning rate", config.anneal_lr), ("clip range", config.anneal_clip)) if on]
    return directory, [
        damage,
        f"going on from iteration {state.iteration}, step {state.global_step}; {environments}",
        *lost,
        f"not as before, so last bits may differ: {changed}" if changed else None,
        f"another length: {' and '.join(annealed)} annealed to it from here on, not from the start"
        if annealed and length != (before.total_timesteps, before.num_iterations)
        else None,
    ]


def draw_curves(directory: RunDirectory, config: TrainConfig, note: Callable[[str], None]) -> None:
    """curves.png; a picture that cannot be drawn is no fault of the run. Raises OSError where the disk is full."""
    try:
        plot_curves(directory.metrics, directory.curves, f"{config.env_id}, seed {config.seed}")
    except OSError:
        raise
    except Exception as error:  # whatever somebody's matplotlib may raise
        note(f"curves.png could not be drawn ({brief(error)})")


def choose_device(wanted: str) -> torch.device:
    """The device that --device names; auto is the GPU when there is one. Raises UsageError for one that is not there."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(wanted)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {wanted}: this machine has {torch.cuda.device_count()} CUDA devices; use auto or cpu")
    return device


def choose_threads(config: TrainConfig, network: Network) -> int:
    """Threads of eager programs: --num-threads, or one for a minibatch of fewer than 16 M multiplications.

    Below that handing over costs more than it gives: with 9,155 parameters on two cores one thread is faster at 256 rows, two
    are at 4096 (benchmarks/LOG.md).
    """
    if config.num_threads is not None:
        return config.num_threads
    return 1 if config.rows_per_minibatch * network.num_params < 2**24 else torch.get_num_threads()


def choose_workers(config: TrainConfig) -> int:
    """Threads of a compiled `learn`, each with a part of the environments and of each minibatch (core/team.py).

    As many as there are cores, or --num-threads, as long as each has MIN_WORKER_ROWS rows of a minibatch and parts are equal.
    """
    most = min(config.num_threads or torch.get_num_threads(), config.rows_per_minibatch // MIN_WORKER_ROWS)
    return max(k for k in range(1, max(most, 1) + 1) if config.num_envs % k == 0 and config.rows_per_minibatch % k == 0)


def learn_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings of programs.learn."""
    return {
        "minibatch_size": config.rows_per_minibatch,
        "gamma": config.gamma,
        "gae_lambda": config.gae_lambda,
        "advantage_estimator": config.advantage,
        "norm_returns": config.norm_returns,
        "norm_adv": config.norm_adv,
        "clip_reward": config.clip_reward,
        "clip_vloss": config.clip_vloss,
        "vf_coef": config.vf_coef,
        "max_grad_norm": config.max_grad_norm,
        "target_kl": config.target_kl,
        "adam_eps": config.adam_eps,
    }


def process_age() -> float:
    """Seconds since this process was started, imports included; nan where /proc does not tell."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return math.nan
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def environment_seed(seed: int, iteration: int) -> int:
    """Seed of the environments of a run that starts, or goes on, at `iteration`."""
    return int(np.random.SeedSequence([seed, iteration]).generate_state(1)[0]) % 2**31


def derive_seeds(seed: int) -> dict[str, int]:
    """Independent streams from one seed: each random generator has its own."""
    names = ("parameters", "actions", "minibatches", "evaluation")
    numbers = np.random.SeedSequence(seed).generate_state(len(names))
    return {name: int(number) % 2**31 for name, number in zip(names, numbers, strict=True)}


def info_mask_size(envs: AutoresetEnvs) -> int | None:
    """Numbers in each environment's info["action_mask"]; None where there is none. Resets the environments."""
    if isinstance(envs.envs, TorchVectorEnv):
        return None
    with contextlib.suppress(*ENVIRONMENT_ERRORS):  # one that fails here fails when training starts, where it is reported
        _, mask = envs.reset_and_mask(None)  # a seed would have EnvPool make all its environments anew
        return None if mask is None else math.prod(mask.shape[1:])
    return None


def progress_of(state: TrainState, config: TrainConfig) -> float:
    """Share of the run that is done: iterations where --num-iterations was given, else steps."""
    if config.num_iterations is not None:
        return state.iteration / config.num_iterations
    return state.global_step / config.total_timesteps


def schedule_at(progress: float, config: TrainConfig, device: torch.device) -> Schedule:
    """Learning rate and clip range for the iteration that starts at `progress`."""
    rest = 1.0 - progress
    learning_rate = config.learning_rate * (rest if config.anneal_lr else 1.0)
    clip_coef = config.clip_coef * (rest if config.anneal_clip else 1.0)
    return Schedule(*(torch.tensor(value, device=device) for value in (learning_rate, clip_coef, config.ent_coef)))


def move_statistics(state: TrainState, rollout: Mapping[str, Tensor], learned: Learned, config: TrainConfig) -> None:
    """Take the rollout's valid rows into the statistics of observations and returns."""
    state.return_mean, state.return_std = learned.return_mean, learned.return_std
    valid = rollout["valid"][:-1]
    if state.obs_moments is not None:
        state.obs_moments = {
            key: update_moments(moments, rollout[key][:-1].flatten(0, 1), valid.flatten())
            for key, moments in state.obs_moments.items()
        }
    if state.return_moments is not None:
        done = rollout["terminated"][:-1] | rollout["truncated"][:-1]
        running, state.return_carry = discounted_return(rollout["reward"][:-1], done, valid, state.return_carry, config.gamma)
        state.return_moments = update_moments(state.return_moments, running.flatten(), valid.flatten())


def read_metrics(learned: Learned) -> dict[str, float]:
    """Means over the minibatches that moved the parameters; raises TrainingFault where one is not finite."""
    summary = dict(zip(SUMMARY, learned.summary.tolist(), strict=True))
    if not summary["finite"]:
        rows = learned.minibatch_metrics.cpu().numpy()  # (E * B / M, K)
        found = np.argwhere(~np.isfinite(rows))
        if len(found):
            index, key = found[0]
            raise TrainingFault(
                f"{MINIBATCH_METRICS[key]} is not finite in minibatch {index} of the update, which was not applied"
            )
        raise TrainingFault("a parameter is not finite after the update, which was not applied")
    keys = ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "explained_variance", "grad_norm")
    return {**{key: summary[key] for key in keys}, "updates": int(summary["updates"])}

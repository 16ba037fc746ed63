"""One agent's run: its settings, its state, its directory, and what an iteration of training means for all three.

loop.py drives one of these, or one for each of many seeds, which then share environments and programs and nothing else. Knows
nothing of how a rollout or an update is made: it is told what they brought.
"""

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from fastppo.analysis.curves import plot_curves
from fastppo.analysis.evaluation import EvaluationPlan, evaluate_config
from fastppo.analysis.loading import load_policy
from fastppo.callbacks import Callback, View, is_yes
from fastppo.config import TrainConfig, check_resumable
from fastppo.core.contracts import LearnResult, Normalization, Schedule
from fastppo.core.ppo import MINIBATCH_METRICS, SUMMARY
from fastppo.errors import RankLost, TrainingFault, UsageError, brief
from fastppo.policy.agent import Agent
from fastppo.policy.module_policy import ModuleFactory
from fastppo.policy.network import Network
from fastppo.ranks import ALONE, Ranks
from fastppo.rollout.storage import Outcomes, Phases
from fastppo.run.directory import OthersDirectory, RunDirectory
from fastppo.run.episodes import WINDOW
from fastppo.run.loggers import Loggers, NoLoggers
from fastppo.run.metrics import METRICS, ordered_row
from fastppo.run.tracking import Tracker
from fastppo.training.checkpoints import Checkpoints
from fastppo.training.reproducibility import differences
from fastppo.training.state import (
    PolicySnapshot,
    TrainState,
    frozen,
    load_state,
    normalization_of,
    snapshot,
    update_obs_moments,
    update_return_moments,
)

SPS_WINDOW = 10  # iterations behind the steps per second shown and logged
ENDLESS_STEPS = 1_000  # of each environment without an end of an episode, after which that is told

Note = Callable[[str], None]


@dataclass(frozen=True)
class TrainResult:
    """What `train` returns. Of many seeds: the joint summary, the policy evaluated best, and each seed's own result."""

    run_dir: Path
    summary: Mapping[str, Any]
    policy: Agent
    seeds: tuple["TrainResult", ...] = ()


class AgentRun:
    """A run under way. `over` says whether it still takes part."""

    def __init__(
        self,
        config: TrainConfig,
        state: TrainState,
        directory: RunDirectory,
        data_of: Callable[[TrainState | PolicySnapshot], dict[str, Any]],
        agent_of: Callable[[TrainState], Agent],
        callbacks: Sequence[Callback],
        restarts: bool,
        note: Note,
        top: RunDirectory | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        """Open the logs of a run whose directory has been made, or reopened, and locked.

        Args:
            data_of: a state, or the policy of one, as plain data for a checkpoint. agent_of: a state as a policy.
            restarts: its environments restart at checkpoints, see Checkpoints.
            note: takes a line for people.
            top: the directory of all seeds, where this is one of several.
            ranks: the processes that train it together; each has all of this, and the first one writes and speaks.
        """
        self.config, self.state, self.directory, self.callbacks, self.note = config, state, directory, callbacks, note
        tracker = None
        if config.track is not None:
            tracker = partial(Tracker, config.track, config.track_project, directory.path, asdict(config))
        self.loggers: Loggers | NoLoggers = NoLoggers()
        if directory.is_written:
            self.loggers = Loggers(directory.metrics, note, state.iteration if config.resume else None, tracker)
        self.loggers.log_config(config.to_json())
        self.checkpoints = Checkpoints(
            directory, config, restarts, data_of, state.iteration, note, None if top is None else top.path, ranks.launcher
        )
        self.enough: str | None = None  # why training ends before its time
        self.fault: TrainingFault | None = None  # why it cannot go on
        self.row: dict[str, int | float] = {}  # of the last iteration
        self._record = state.best_return  # before the last iteration
        self._data_of, self._agent_of = data_of, agent_of
        self._recent: deque[tuple[float, int]] = deque([(0.0, 0)], maxlen=SPS_WINDOW + 1)  # (seconds, steps) of this process
        self._first_second, self._first_step = state.seconds, state.global_step
        self._first_progress = self.progress
        self._ranks = ranks
        self._due = False  # a checkpoint
        self._told_endless = False
        # the state before what is under way; of its environments this process's, or those of all
        self._resting, self._stage, self._has_all = state, f"iteration {state.iteration + 1}", True
        self._view: View | None = None

    @property
    def progress(self) -> float:
        """Share of the run that is done: iterations where --num-iterations was given, else steps."""
        if self.config.num_iterations is not None:
            return self.state.iteration / self.config.num_iterations
        return self.state.global_step / self.config.total_timesteps

    @property
    def over(self) -> bool:
        """Whether it has all its steps, has seen enough, or cannot go on."""
        return self.progress >= 1.0 or self.enough is not None or self.fault is not None

    @property
    def eta(self) -> float:
        """Seconds to go, at the speed of this process."""
        done = max(self.progress - self._first_progress, 1e-9)
        return (self.state.seconds - self._first_second) * max(1.0 - self.progress, 0.0) / done

    def begin(self, environments: dict[str, Any] | None) -> tuple[Normalization, Schedule]:
        """Before an iteration: what it goes by. environments: as they stand, see Collector.state_dicts."""
        self._resting, self._stage = frozen(self.state, environments), f"iteration {self.state.iteration + 1}"
        self._has_all = False
        return normalization_of(self.state), schedule_at(self.progress, self.config, self.state.params.device)

    def normalize(self, rollout: Mapping[str, Tensor], steps: Mapping[str, Tensor]) -> Normalization:
        """Add a rollout to the statistics that it is learned with.

        To those of returns always: acting does not depend on the scale of rewards. To those of observations only in the first
        iteration, which acts before anything is known of them: its policy, whose actions hardly depend on what it sees, learns
        from normalised observations all the same.

        Args:
            rollout: (T+1, N / K, ...) of this process. steps: (T, N) `reward terminated truncated valid` of all processes.
        """
        update_return_moments(self.state, steps, self.config.gamma)
        if self.state.iteration == 0:
            update_obs_moments(self.state, rollout, self._ranks.total)
        return normalization_of(self.state)

    def learn(self, learned: LearnResult, rollout: Mapping[str, Tensor]) -> dict[str, float]:
        """Take up an update and add the rollout to the statistics of observations. Raises TrainingFault.

        rollout: (T+1, N / K, ...) of this process.

        Returns:
            The iteration's metrics.
        """
        metrics = read_metrics(learned)  # sync: once per iteration, for the log
        state = self.state
        state.params.copy_(learned.params)
        state.adam, state.return_mean, state.return_std = learned.adam, learned.return_mean, learned.return_std
        if state.iteration > 0:  # else see `normalize`
            update_obs_moments(state, rollout, self._ranks.total)
        return metrics

    def account(
        self, outcomes: Outcomes, metrics: Mapping[str, float], schedule: Schedule, phases: Phases, learn: float, seconds: float
    ) -> None:
        """Count what the rollout brought; `row` is then the iteration's.

        Args:
            outcomes: (T, N) each. metrics: as `learn` returned them.
            phases, learn, seconds: what the iteration took, and in which part of it.
        """
        state, config = self.state, self.config
        reward, terminated, truncated, valid, episode_end, cut = outcomes
        restart = self.checkpoints.restarts_at(state.iteration + 1)
        if restart and not config.reset_each_rollout:
            episode_end[-1] &= ~cut  # half an episode is none
        state.episodes.update(reward, episode_end, valid)
        if restart:
            state.episodes.forget_running()
        state.iteration += 1
        state.global_step += int(valid.sum())
        state.seconds += seconds
        self._record = state.best_return
        found = state.best.update(state.episodes.finished, state.episodes.running_length, partial(snapshot, state))
        self.checkpoints.best = found or self.checkpoints.best  # written with the next checkpoint
        self._recent.append((state.seconds - self._first_second, state.global_step - self._first_step))

        (before, steps_before), (now, steps_now) = self._recent[0], self._recent[-1]
        self.row = ordered_row(
            {
                "iteration": state.iteration,
                "global_step": state.global_step,
                "seconds": round(state.seconds, 6),
                "sps": (steps_now - steps_before) / (now - before),
                "episodic_return_mean": state.episodes.return_mean,
                "episodic_length_mean": state.episodes.length_mean,
                "episodes": state.episodes.episodes,
                "terminations": int((terminated & valid).sum()),
                "truncations": int((truncated & ~terminated & valid).sum()),
                "loss": metrics["policy_loss"] + config.vf_coef * metrics["value_loss"] - config.ent_coef * metrics["entropy"],
                **metrics,
                "learning_rate": schedule.learning_rate.item(),
                "env_share": phases.env / seconds,
                "act_share": phases.act / seconds,
                "learn_share": learn / seconds,
            }
        )

    @property
    def new_best(self) -> bool:
        """Whether the last iteration has found a better policy than before."""
        return self.state.best_return > self._record

    def tell(self, environments: Callable[[], dict[str, Any] | None]) -> None:
        """Log the iteration, and ask the callbacks, which may end the run. Raises TrainingFault where one raises.

        environments: as they stand now, for a fault.
        """
        config, state = self.config, self.state
        solved = config.stop_at_return is not None and state.episodes.return_mean >= config.stop_at_return
        if solved and len(state.episodes.returns) == WINDOW:
            self.enough = f"the last {WINDOW} episodes return {state.episodes.return_mean:.4g}, as --stop-at-return asks"
        self._tell_endless()
        logs = state.iteration % config.log_interval == 0 or self.progress >= 1.0
        if logs:
            self.loggers.log(self.row)
        failed: TrainingFault | None = None
        if self.callbacks:
            self._resting, self._stage = frozen(state, environments()), f"after iteration {state.iteration}"
            seen, progress = MappingProxyType(self.row), min(self.progress, 1.0)
            policy = partial(self._agent_of, state)
            self._view = View(config, self.directory.path, state.iteration, state.global_step, progress, seen, policy)
            try:
                self.enough = self.enough or _tell(self.callbacks, self._view)
            except TrainingFault as fault:
                failed = fault
        self._due = self.checkpoints.due(state.iteration)
        has_failed, enough, due = self._ranks.highest(failed is not None, self.enough is not None, self._due)
        if has_failed:
            self._ranks.check(failed)
        self._due = bool(due)
        self.enough = self.enough or ("another rank has seen enough" if enough else None)
        if self.over:
            self.checkpoints.best = state.best.finish() or self.checkpoints.best
        if self.enough and not logs:
            self.loggers.log(self.row)

    def _tell_endless(self) -> None:
        """Say it once where no episode ends, as in an environment without a time limit."""
        state = self.state
        many = state.global_step >= ENDLESS_STEPS * self.config.num_envs or self.progress >= 1.0
        if many and state.episodes.episodes == 0 and not self._told_endless:
            self._told_endless = True
            self.note(
                f"no episode has ended in {state.global_step:,} steps, so there is no episodic_return_mean yet "
                "(for a time limit: --env-kwargs max_episode_steps=1000)"
            )

    def keep(self, environments: Callable[[], dict[str, Any] | None]) -> None:
        """Write a checkpoint where one is due. environments: as they stand. Raises TrainingFault where a callback does."""
        if not self._due:
            return
        self.state.environments = self._of_all(environments())
        failed: TrainingFault | None = None
        if self.checkpoints.update(self.state) and self._view is not None:
            try:
                _tell(self.callbacks, self._view, "on_checkpoint")
            except TrainingFault as fault:
                failed = fault
        self._ranks.check(failed)

    def report(self, fault: TrainingFault, rollout: Mapping[str, Tensor]) -> TrainingFault:
        """Keep the state before the fault, and the rollout as far as it came; the fault as the user is told it."""
        resting = self._resting
        if not self._has_all and not isinstance(fault, RankLost):
            resting = replace(resting, environments=self._of_all(resting.environments))
        return self.checkpoints.report(fault, self._stage, resting, rollout)

    def rest(self, environments: dict[str, Any] | None) -> None:
        """The state is now one to go on from; environments: as they stand."""
        self.state.environments = self._of_all(environments)
        self._resting, self._has_all = self.state, True

    def _of_all(self, environments: dict[str, Any] | None) -> dict[str, Any] | None:
        """The environments of all processes, from those of this one."""
        return gather_environments(environments, self._ranks)

    def close(self) -> None:
        """Write what is left of the logs. A second call does nothing."""
        self.loggers.close()

    def finish(
        self,
        about: Mapping[str, Any],
        stopped_by: str | None,
        policy: ModuleFactory | None,
        envs: VectorEnv | None,
        evaluates: bool,
    ) -> TrainResult:
        """The last checkpoint, the summary, the picture, and the evaluation of the best policy.

        Args:
            about: the part of the summary that is about how it was made.
            stopped_by: a signal's name.
            policy: as `train` was given it. envs: to evaluate in, as evaluate_config takes them.
            evaluates: whether to evaluate.

        Raises:
            TrainingFault: the results cannot be written.
        """
        directory, state, config = self.directory, self.state, self.config
        self.checkpoints.finish(state)
        if self._view is not None:
            _tell(self.callbacks, self._view, "on_end")
        summary: dict[str, Any] = {
            "env_id": config.env_id,
            "seed": config.seed,
            "global_step": state.global_step,
            "iterations": state.iteration,
            "seconds": state.seconds,
            "sps": (state.global_step - self._first_step) / max(state.seconds - self._first_second, 1e-9),
            **about,
            "best_return_mean": state.best_return,
            "eval_return_mean": math.nan,
            "eval_return_std": math.nan,
            "eval_episodes": 0,
            "stopped_by": stopped_by or self.enough,
        }
        if not directory.is_written:
            return TrainResult(directory.path, summary, self._agent_of(state))
        try:
            if state.best_return == -math.inf or not directory.best.exists():  # too few episodes to judge by: the last one
                directory.save(directory.best, self._data_of(state))
            directory.write_json(directory.summary, summary)  # before evaluation, which may take long, or fail
            with drawing_curves(self.note):
                plot_curves(directory.metrics, directory.curves, f"{config.env_id}, seed {config.seed}")
            agent = load_policy(directory.path, policy=policy)
            if config.eval_episodes and evaluates:
                try:
                    result = self._evaluated(agent, envs)
                except KeyboardInterrupt:
                    again = f"python -m fastppo.evaluate {directory.path}"
                    self.note(f"training is over and kept; only its evaluation was interrupted, do it with: {again}")
                    raise
                summary |= {f"eval_{key}": value for key, value in result.items()}
                directory.write_json(directory.summary, summary)
        except OSError as error:
            raise TrainingFault(
                f"training is over and kept, but its results could not be written ({error.strerror}); once they can be, "
                f"{self.checkpoints.go_on}"
            ) from None
        return TrainResult(directory.path, summary, agent)

    def _evaluated(self, agent: Agent, envs: VectorEnv | None) -> dict[str, Any]:
        """What `evaluate_config` says of best.pt; nothing, and a line, where there can be no environments for it."""
        try:
            config = self.config
            plan = EvaluationPlan(config.eval_episodes, config.seed, trained_steps=self.state.global_step)
            result = evaluate_config(agent, config, plan, envs, self.note)
        except UsageError as error:  # those that trained could be made: this one may exist only once
            self.note(f"best.pt was not evaluated: {error}; later: python -m fastppo.evaluate {self.directory.path}")
            return {}
        if result["episodes"]:
            mean, std = result["return_mean"], result["return_std"]
            self.note(f"best model: return {mean:.1f} +- {std:.1f} in {result['episodes']} episodes")
        return result


def gather_environments(environments: dict[str, Any] | None, ranks: Ranks) -> dict[str, Any] | None:
    """The environments of all processes as one, from those of each; see Collector.state_dicts."""
    if environments is None or ranks.size == 1:
        return environments
    return {**environments, "running": [ranks.gather(x) for x in environments["running"]]}


def share_environments(environments: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """This process's part of `gather_environments`' result."""
    if ranks.size == 1:
        return environments
    return {**environments, "running": [ranks.share(x) for x in environments["running"]]}


def make_directory(config: TrainConfig, place: Path, start: Mapping[str, Any], ranks: Ranks = ALONE) -> RunDirectory:
    """The directory of a new run, locked, with its settings and `start`, the checkpoint of iteration 0; raises UsageError."""
    directory: RunDirectory | None = None
    refused: UsageError | None = None
    if ranks.is_main:
        fill = partial(fill_directory, config, start)
        try:
            directory = RunDirectory.create(config.run_dir, config.env_id, config.seed, fill, place)
        except UsageError as error:
            refused = error
    ranks.check(refused)
    path = ranks.agree(None if directory is None else directory.path)
    return directory or OthersDirectory(path or Path())


def fill_directory(config: TrainConfig, start: Mapping[str, Any], directory: RunDirectory) -> None:
    """What a run is resumed from, from its first moment on."""
    directory.write_text(directory.config, config.to_json())
    directory.keep(0, start, config.keep_checkpoints)


def reopen(
    config: TrainConfig,
    restarts: bool,
    state: TrainState,
    network: Network,
    fresh: Mapping[str, Any],
    cleanup: contextlib.ExitStack,
    ranks: Ranks = ALONE,
) -> tuple[RunDirectory, list[str | None]]:
    """Put the state of the run that --resume names back into `state`.

    Args:
        restarts: its environments restart at checkpoints, see Checkpoints.
        fresh: the checkpoint of `state` as it is now.
        cleanup: gets the directory's unlocking.
        ranks: of which the first reads and tells the others.

    Returns:
        The directory, locked, and lines on how it goes on.

    Raises:
        UsageError: the run cannot go on, or not with these settings.
    """
    directory = (RunDirectory if ranks.is_main else OthersDirectory)(Path(config.resume or ""))
    found: tuple[TrainConfig, Path, dict[str, Any], str | None] | None = None
    refused: UsageError | None = None
    try:
        if ranks.is_main:
            before = TrainConfig.from_json(directory.config)
            check_resumable(before, config)
            directory.lock()
            cleanup.callback(directory.unlock)
            found = (before, *directory.newest(kept_only=restarts))
    except UsageError as error:
        refused = error
    except OSError as error:
        refused = UsageError(f"--resume {directory.path} cannot be written: {error.strerror}")
    ranks.check(refused)
    found = ranks.agree(found)
    assert found is not None
    before, path, checkpoint, damage = found
    lost = load_state(state, network, checkpoint, fresh, path)
    try:
        directory.write_text(directory.config, config.to_json())
    except OSError as error:
        refused = UsageError(f"--resume {directory.path} cannot be written: {error.strerror}")
    ranks.check(refused)
    if restarts:
        environments = "the environments restart as they did there: what comes is what came, or would have come, after it"
    elif state.environments is not None:
        environments = "the environments go on where they were"
    else:
        environments = "the environments start new episodes"
        state.forget_running()  # those of before have no end
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


@contextlib.contextmanager
def drawing_curves(note: Note) -> Iterator[None]:
    """curves.png; a picture that cannot be drawn is no fault of the run. Raises OSError where the disk is full."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # whatever somebody's matplotlib may raise
        note(f"curves.png could not be drawn ({brief(error)})")


def named_after(envs: VectorEnv, config: TrainConfig) -> TrainConfig:
    """`config` with the name of environments that were not made from it, unless it says one itself."""
    if config.env_id != TrainConfig.env_id:
        return config
    spec = getattr(envs, "spec", None)
    return replace(config, env_id=type(envs.unwrapped).__name__ if spec is None else spec.id)


def schedule_at(progress: float, config: TrainConfig, device: torch.device) -> Schedule:
    """Learning rate and clip range for the iteration that starts at `progress`."""
    rest = 1.0 - progress
    learning_rate = config.learning_rate * (rest if config.anneal_lr else 1.0)
    clip_coef = config.clip_coef * (rest if config.anneal_clip else 1.0)
    values = (learning_rate, clip_coef, config.ent_coef)
    return Schedule(*(torch.tensor(value, dtype=torch.float32, device=device) for value in values))


def read_metrics(learned: LearnResult) -> dict[str, float]:
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
    return {**{name: summary[name] for name in METRICS if name in summary}, "updates": int(summary["updates"])}


def _tell(callbacks: Sequence[Callback], view: View, moment: str = "on_iteration") -> str | None:
    """Call all of them; what to say where one has seen enough. Raises TrainingFault where one raises."""
    enough = None
    for callback in callbacks:
        name = type(callback).__name__
        try:
            if is_yes(getattr(callback, moment)(view)):
                enough = enough or f"{name} has seen enough"
        except Exception as error:  # whatever somebody's code may raise
            raise TrainingFault(f"{name}.{moment} raised {brief(error)}") from error
    return enough

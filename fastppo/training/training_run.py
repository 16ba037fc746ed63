"""One agent's run: its settings, its state, its directory, and what an iteration of training means for all three.

loop.py drives one run, or one for each of many seeds, which share environments and programs and nothing else. Knows nothing of
how a rollout or an update is made.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import Tensor

from fastppo.analysis.evaluation import EvaluationResult
from fastppo.callbacks import Callback, StepView, View
from fastppo.config import TrainConfig
from fastppo.core.contracts import Coefficients, LearnResult, Normalization
from fastppo.envs.autoreset import Step
from fastppo.envs.factory import is_on_device
from fastppo.errors import RankLost, TrainingFault
from fastppo.rollout.storage import Outcomes
from fastppo.run.directory import RunDirectory
from fastppo.run.episodes import WINDOW, info_means
from fastppo.run.loggers import Loggers, NoLoggers
from fastppo.run.metrics import RARE, info_name, ordered_row, part_name
from fastppo.run.tracking import Tracker
from fastppo.training.callback_list import CallbackList, Recorded
from fastppo.training.checkpoints import Checkpoints
from fastppo.training.diagnosis import PATIENCE, Diagnosis, share_at_bounds
from fastppo.training.running_statistics import add_observations, add_returns
from fastppo.training.setup import Task
from fastppo.training.state import PolicySnapshot, TrainState, gather_environments, normalization_of, preserved, snapshot
from fastppo.training.update import FrozenInputs, adapted_factor, frozen_inputs, read_metrics

SPS_WINDOW = 10  # iterations behind the steps per second shown and logged
ENDLESS_STEPS = 1_000  # steps of each environment without the end of an episode before a line says so

Note = Callable[[str], None]
Environments = dict[str, Any]  # one seed's, see Collector.state_dicts


@dataclass(frozen=True)
class Times:
    """Seconds of one iteration, and of its parts."""

    total: float
    env: float
    act: float
    learn: float


class Speed:
    """How fast this process trains, from the state it started with."""

    def __init__(self, state: TrainState, progress: float) -> None:
        """progress: share of the run that is done."""
        self._seconds, self._step, self._progress = state.seconds, state.global_step, progress
        self._recent: deque[tuple[float, int]] = deque([(0.0, 0)], maxlen=SPS_WINDOW + 1)  # (seconds, steps) since then

    def update(self, state: TrainState) -> None:
        """After an iteration."""
        self._recent.append((state.seconds - self._seconds, state.global_step - self._step))

    @property
    def recent(self) -> float:
        """Steps per second in the last SPS_WINDOW iterations."""
        (before, steps_before), (now, steps_now) = self._recent[0], self._recent[-1]
        return (steps_now - steps_before) / (now - before)

    @property
    def mean(self) -> float:
        """Steps per second since the start."""
        seconds, steps = self._recent[-1]
        return steps / max(seconds, 1e-9)

    def eta(self, progress: float) -> float:
        """Seconds that are left, at the mean speed."""
        done = max(progress - self._progress, 1e-9)
        return self._recent[-1][0] * max(1.0 - progress, 0.0) / done


@dataclass(frozen=True)
class ResumePoint:
    """The state that is kept if a fault comes now."""

    state: TrainState
    stage: str  # what is under way, as "iteration 3"
    has_all: bool  # whether its environments are those of all processes, or of this one


class TrainingRun:
    """A run under way.

    Each iteration calls `begin_iteration`, `apply_update`, `record`, `log_and_call_back`, `checkpoint_if_due`. Each takes what
    the one before returned, or does nothing where that was left out.
    """

    def __init__(
        self,
        config: TrainConfig,
        state: TrainState,
        directory: RunDirectory,
        task: Task,
        callbacks: Sequence[Callback],
        note: Note,
        top: RunDirectory | None = None,
    ) -> None:
        """Open the logs of a run whose directory has been made, or reopened, and locked.

        Args:
            task: what is trained, of all seeds and processes. Every process has a run, and only the main one writes.
            note: prints a line for people.
            top: the directory of all seeds, where this is one of several.
        """
        self.config, self.state, self.directory, self.note = config, state, directory, note
        tracker = None
        if config.track is not None:
            tracker = partial(Tracker, config.track, config.track_project, directory.path, asdict(config))
        self.loggers: Loggers | NoLoggers = NoLoggers()
        if directory.is_written:
            resume_at = state.iteration if config.resume else None
            iterations = config.num_iterations or config.total_timesteps // config.batch_size
            self.loggers = Loggers(directory.metrics, note, resume_at, tracker, iterations)
        self.loggers.log_config(config.to_json())
        self.checkpoints = Checkpoints(
            directory,
            config,
            task.restarts,
            task.data_of,
            state.iteration,
            note,
            None if top is None else top.path,
            task.ranks.launcher,
        )
        self.callbacks = CallbackList(callbacks)
        self._recorded = Recorded()
        self._step_view: View | None = None  # for the steps of this iteration
        self.infos: dict[str, int | float] = {}  # what the infos of the last episodes said, by column
        self._unseen = set(config.log_info)  # names that no info has had so far
        self.speed = Speed(state, self.progress)
        self.enough: str | None = None  # why training ends before its time
        self.fault: TrainingFault | None = None  # why this run cannot go on
        self.row: dict[str, int | float] = {}  # metrics of the last iteration
        self._task = task
        self.new_best = False  # whether the last iteration found a better policy than before
        self._evaluation: EvaluationResult | None = None  # of the policy after the last iteration
        self._resume_point = ResumePoint(state, f"iteration {state.iteration + 1}", has_all=True)
        self._checkpoint_due = False
        self._diagnosis = Diagnosis(config, task.action.num_logits == task.action.size)
        self._at_bounds = 0.0  # in an iteration not long ago
        self._has_noted_endless = False

    @property
    def progress(self) -> float:
        """Share of the run that is done: iterations where --num-iterations was given, else steps."""
        if self.config.num_iterations is not None:
            return self.state.iteration / self.config.num_iterations
        return self.state.global_step / self.config.total_timesteps

    @property
    def over(self) -> bool:
        """Whether it has all its steps, has ended early, or cannot go on."""
        return self.progress >= 1.0 or self.enough is not None or self.fault is not None

    @property
    def eta(self) -> float:
        """Seconds that are left, at the speed of this process."""
        return self.speed.eta(self.progress)

    @property
    def evaluation_due(self) -> bool:
        """Whether --eval-every asks for an evaluation after this iteration: each K-th one, and the last one."""
        every = self.config.eval_every
        return every is not None and (self.state.iteration % every == 0 or self.progress >= 1.0)

    def begin_iteration(self, environments: Environments | None) -> FrozenInputs:
        """What the iteration acts and learns under. environments: as they stand, see Collector.state_dicts."""
        state = preserved(self.state, environments)
        self._resume_point = ResumePoint(state, f"iteration {state.iteration + 1}", has_all=False)
        self._step_view = self._view() if self.callbacks.of_steps else None
        return frozen_inputs(self.state, self.progress, self.config)

    def on_step(self, t: int, action: Any, step: Step) -> None:
        """Call the callbacks that watch steps. Raises TrainingFault where one raises."""
        if self._step_view is not None:
            seen = StepView(t, action, step.obs, step.reward, step.terminated, step.truncated, step.infos)
            self.callbacks.on_step(self._step_view, seen)

    def normalize(self, rollout: Mapping[str, Tensor], steps: Mapping[str, Tensor]) -> Normalization:
        """Add a rollout to the statistics that it is learned with, and with --rnd-coef the bonus to its rewards.

        Args:
            rollout: (T+1, N / K, ...) of this process. steps: (T, N) `reward terminated truncated valid` of all processes.
        """
        state, ranks = self.state, self._task.ranks
        add_observations(state, rollout, self.config, ranks.total, has_learned=False)
        if state.novelty is not None:
            state.novelty, bonus = state.novelty.added_to(rollout, steps["valid"], normalization_of(state), self.config, ranks)
            self._recorded.record("charts/rnd_bonus", float(bonus.sum() / steps["valid"].sum().clamp(min=1)))
            steps = {**steps, "reward": steps["reward"] + bonus}
            reward = rollout["reward"][:-1]
            if self.config.clip_reward:  # `learn` does not, with a bonus: see learn_config
                reward.sign_()
            reward += ranks.share(bonus, 1)
        add_returns(state, steps, self.config.gamma)
        return normalization_of(state)

    def apply_update(self, result: LearnResult, rollout: Mapping[str, Tensor]) -> dict[str, float]:
        """Put new parameters into the state and add the rollout to the statistics of observations.

        rollout: (T+1, N / K, ...) of this process.

        Returns:
            The iteration's metrics.

        Raises:
            TrainingFault: a number is not finite. The state is then as before.
        """
        metrics = read_metrics(result)
        state = self.state
        state.params.copy_(result.params)
        state.adam, state.return_mean, state.return_std = result.adam, result.return_mean, result.return_std
        state.learning_rate_factor = adapted_factor(state.learning_rate_factor, metrics["approx_kl"], self.config)
        add_observations(state, rollout, self.config, self._task.ranks.total, has_learned=True)
        if state.iteration % PATIENCE == 1:
            self._at_bounds = share_at_bounds(self._task.action, rollout["action"][:-1])
        return metrics

    def record(self, outcomes: Outcomes, metrics: Mapping[str, float], coefficients: Coefficients, times: Times) -> None:
        """Count the iteration's steps and episodes, and make its row of metrics.

        Args:
            outcomes: (T, N) each, of all processes. metrics: the result of `apply_update`. coefficients: of the iteration.
        """
        state = self.state
        restart = self.checkpoints.restarts_at(state.iteration + 1)
        if restart and not self.config.reset_each_rollout:
            outcomes.episode_end[-1] &= ~outcomes.cut  # an episode that the restart cuts off does not count
        state.episodes.update(outcomes.reward, outcomes.episode_end, outcomes.valid, outcomes.reward_parts)
        if restart:
            state.episodes.forget_running()
        state.iteration += 1
        state.global_step += int(outcomes.valid.sum())
        state.seconds += times.total
        self.speed.update(state)
        before, self._evaluation = state.best_return, None
        self._keep_best(state.best.update(state.episodes.finished, state.episodes.running_length, partial(snapshot, state)))
        self.new_best = state.best_return > before
        said = info_means(outcomes.infos, outcomes.episode_end & outcomes.valid)
        self._unseen -= said.keys()
        infos = {info_name(name): mean for name, mean in said.items()}
        self.infos |= infos
        self.row = self._row(outcomes, metrics, coefficients, times) | infos | self._recorded.take()

    def _keep_best(self, found: PolicySnapshot | None) -> None:
        """Keep a policy that training has found to be the best, unless evaluations say which is."""
        if found is None or (self.state.is_evaluated and self.config.eval_every is not None):
            return
        self.state.best_evaluation = -math.inf  # --eval-every was on before a resume, and is off now
        self.checkpoints.best = found  # written with the next checkpoint

    def take_evaluation(self, result: EvaluationResult) -> None:
        """Account for the evaluation of the policy after this iteration. The best one of whole episodes becomes best.pt."""
        state = self.state
        self._evaluation = result
        mean, std, ended = (result.report[key] for key in ("return_mean", "return_std", "episodes"))
        self.row |= {"eval_return_mean": mean, "eval_return_std": std}
        if result.remark is None and mean >= state.best_evaluation:
            self.new_best = self.new_best or mean > state.best_evaluation
            state.best_evaluation, self.checkpoints.best = mean, snapshot(state)
        best = ", the best so far" if self.new_best and result.remark is None else ""
        returns = f"return {mean:.1f} +- {std:.1f} in {ended} episodes{best}" if ended else "no return"
        self.note(f"evaluation at step {state.global_step:,}: {returns}")
        if result.remark is not None:
            self.note(result.remark)

    def _row(
        self, outcomes: Outcomes, metrics: Mapping[str, float], coefficients: Coefficients, times: Times
    ) -> dict[str, int | float]:
        state, config = self.state, self.config
        terminated, truncated, valid = outcomes.terminated, outcomes.truncated, outcomes.valid
        entropy = coefficients.ent_coef.item() * metrics["entropy"]
        return ordered_row(
            {
                "iteration": state.iteration,
                "global_step": state.global_step,
                "seconds": round(state.seconds, 6),
                "sps": self.speed.recent,
                "episodic_return_mean": state.episodes.return_mean,
                "episodic_length_mean": state.episodes.length_mean,
                "episodes": state.episodes.episodes,
                "terminations": int((terminated & valid).sum()),
                "truncations": int((truncated & ~terminated & valid).sum()),
                "loss": metrics["policy_loss"] + config.vf_coef * metrics["value_loss"] - entropy,
                **metrics,
                "learning_rate": coefficients.learning_rate.item(),
                "env_share": times.env / times.total,
                "act_share": times.act / times.total,
                "learn_share": times.learn / times.total,
                **({} if config.eval_every is None else dict.fromkeys(RARE, math.nan)),  # until `take_evaluation`
                **{part_name(index): mean for index, mean in enumerate(state.episodes.part_means)},
            }
        )

    def log_and_call_back(self, environments: Callable[[], Environments | None]) -> None:
        """Log the iteration and call the callbacks, which may end the run. Raises TrainingFault where one raises.

        environments: returns them as they stand now.
        """
        config, state, ranks = self.config, self.state, self._task.ranks
        self.enough = self._solved()
        self._note_endless_episodes()
        self._note_unseen_infos()
        for line in self._diagnosis.update(self.row, self.progress, self._at_bounds):
            self.note(line)
        logs = state.iteration % config.log_interval == 0 or self.progress >= 1.0 or self._evaluation is not None
        fault: TrainingFault | None = None
        if self.callbacks:
            stage = f"after iteration {state.iteration}"
            self._resume_point = ResumePoint(preserved(state, environments()), stage, has_all=False)
            try:
                enough = self.callbacks.on_iteration(self._view())
                self.enough = self.enough or enough
            except TrainingFault as raised:
                fault = raised
            self.row |= self._recorded.take()
        due = self.checkpoints.due(state.iteration)
        has_fault, enough_somewhere, due_somewhere = ranks.highest(fault is not None, self.enough is not None, due)
        self.enough = self.enough or ("another rank has seen enough" if enough_somewhere else None)
        if logs or self.enough:
            self.loggers.log(self.row)
        if has_fault:
            ranks.check(fault)
        self._checkpoint_due = bool(due_somewhere)
        if self.over:
            self._keep_best(state.best.finish())

    def _solved(self) -> str | None:
        """Why training ends here, if the return is what --stop-at-return asks for: that of an evaluation, with --eval-every."""
        episodes, wanted, evaluation = self.state.episodes, self.config.stop_at_return, self._evaluation
        if self.config.eval_every is None:
            what, mean, has_all = f"the last {WINDOW} episodes", episodes.return_mean, len(episodes.returns) == WINDOW
        elif evaluation is not None:
            what, mean, has_all = "the evaluation's episodes", evaluation.report["return_mean"], evaluation.remark is None
        else:
            return None
        if wanted is None or not has_all or not mean >= wanted:
            return None
        return f"{what} return {mean:.4g}, as --stop-at-return asks"

    def _view(self) -> View:
        state, row, policy = self.state, MappingProxyType(self.row), partial(self._task.agent_of, self.state)
        path, progress = self.directory.path, min(self.progress, 1.0)
        made = self._task.envs.envs
        envs = None if is_on_device(made) else made
        return View(self.config, path, state.iteration, state.global_step, progress, row, policy, self._recorded.record, envs)

    def _note_endless_episodes(self) -> None:
        """Say once where no episode ends, as in an environment without a time limit."""
        state = self.state
        many = state.global_step >= ENDLESS_STEPS * self.config.num_envs or self.progress >= 1.0
        if many and state.episodes.episodes == 0 and not self._has_noted_endless:
            self._has_noted_endless = True
            self.note(
                f"no episode has ended in {state.global_step:,} steps, so there is no episodic_return_mean yet "
                "(for a time limit: --max-episode-steps 1000)"
            )

    def _note_unseen_infos(self) -> None:
        """Say once where --log-info names what the episodes' last infos do not have."""
        if self._unseen and self.state.episodes.episodes > 0:
            self.note(
                f"--log-info {' '.join(sorted(self._unseen))}: no such number in the info of the first episodes' last steps"
            )
            self._unseen = set()

    def checkpoint_if_due(self, environments: Callable[[], Environments | None]) -> None:
        """Write a checkpoint where one is due. Raises TrainingFault where a callback raises.

        environments: returns them as they stand now.
        """
        if not self._checkpoint_due:
            return
        self._checkpoint_due = False
        self.state.environments = gather_environments(environments(), self._task.ranks)
        fault: TrainingFault | None = None
        try:
            if self.checkpoints.update(self.state):
                self.callbacks.on_checkpoint()
        except TrainingFault as raised:
            fault = raised
        self._task.ranks.check(fault)

    def mark_resumable(self, environments: Environments | None) -> None:
        """Mark the state as resumable. environments: as they stand."""
        self.state.environments = gather_environments(environments, self._task.ranks)
        self._resume_point = replace(self._resume_point, state=self.state, has_all=True)

    def report_fault(self, fault: TrainingFault, rollout: Mapping[str, Tensor]) -> TrainingFault:
        """Keep the last resumable state and the rollout as far as it came. Returns the fault with words for the user."""
        point = self._resume_point
        state = point.state
        if not point.has_all and not isinstance(fault, RankLost):
            state = replace(state, environments=gather_environments(state.environments, self._task.ranks))
        return self.checkpoints.report(fault, point.stage, state, rollout)

    def close(self) -> None:
        """Write the rest of the logs. A second call does nothing."""
        self.loggers.close()

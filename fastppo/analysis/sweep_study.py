"""The study of a sweep on disk: Optuna's trials in study.db, and the best settings in best.json. Knows nothing of processes."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastppo.analysis.search_space import Space
from fastppo.analysis.sweep_trial import PARTS, Outcome, SweepPlan, write_preset
from fastppo.config import TrainConfig
from fastppo.errors import UsageError, brief
from fastppo.random_streams import Stream, seed_of
from fastppo.run.files import lock_directory
from fastppo.run.panel import number

if TYPE_CHECKING:
    import optuna


def open_directory(directory: Path) -> int | None:
    """Make or reopen the directory of a study and lock it against other sweeps. Returns the lock, which the caller closes.

    Raises:
        UsageError: Optuna is not installed, or the directory contains other files or cannot be written.
    """
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise UsageError("fastppo sweep needs a package that is not installed: pip install 'fastppo[sweep]'") from None
    try:
        if directory.exists() and not (directory / "study.db").exists() and any(directory.iterdir()):
            raise UsageError(f"--study-dir {directory} is not empty and holds no study; choose another")
        directory.mkdir(parents=True, exist_ok=True)
        return lock_directory(directory, f"--study-dir {directory}: another sweep is writing to it; stop that one first")
    except OSError as error:
        raise UsageError(f"--study-dir {directory} cannot be written: {error.strerror}; choose another") from None


def open_study(plan: SweepPlan, fixed: str, trials: int) -> "optuna.Study":
    """The study in the plan's directory, or a new one. Trials that were running when the last sweep ended are marked as failed.

    Args:
        fixed: the flags of fastppo.train for all trials.
        trials: their planned number; a quarter of them, 5 to 10, are drawn at random.

    Raises:
        UsageError: study.db is not a study, or its trials are not comparable with those of this plan.
    """
    import optuna
    import sqlalchemy

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    database = plan.directory / "study.db"
    try:
        study = optuna.create_study(
            storage=sqlalchemy.URL.create("sqlite", database=str(database)).render_as_string(),
            study_name="fastppo",
            direction="maximize",
            load_if_exists=True,
            pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=PARTS // 4),
        )
    except Exception as error:  # SQLAlchemy raises its own errors for a file that is no database
        raise UsageError(f"{database} cannot be used as a study ({brief(error)})") from None
    _check_comparable(study, plan, fixed)
    for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    # a new seed each time: the same seed would draw the same settings again; 32 bits, for numpy's RandomState
    sampler_seed = seed_of(len(study.trials), Stream.SWEEP_SAMPLER) % 2**32
    study.sampler = optuna.samplers.TPESampler(
        n_startup_trials=min(10, max(trials // 4, 5)), seed=sampler_seed, constant_liar=True
    )
    if not study.trials:  # try the settings of the preset first
        study.enqueue_trial(_encoded(plan.base, plan.space))
    return study


def _check_comparable(study: "optuna.Study", plan: SweepPlan, fixed: str) -> None:
    """Store in a new study what all its trials share. Raise UsageError if an older study differs in that."""
    ranges = {name: [dimension.kind, list(dimension.values)] for name, dimension in plan.space.items()}
    common = {"--env-id": plan.env_id, "--steps": plan.steps, "--seeds": plan.seeds, "--space": json.dumps(ranges)}
    before = study.user_attrs
    for name, value in {**common, "what follows --": fixed}.items():
        if before and before.get(name) != value:
            raise UsageError(
                f"{name} cannot change in {plan.directory}, where trials have {before.get(name)}, not {value}: "
                "values would not be comparable; choose another --study-dir"
            )
        study.set_user_attr(name, value)


def _encoded(base: TrainConfig, space: Space) -> dict[str, Any]:
    """The settings of `base` as draws from the space. Settings outside the space are omitted."""
    given = {"minibatch_size": base.rows_per_minibatch, "hidden_sizes": base.hidden_sizes or (64, 64)}  # None in base
    values = {name: given.get(name, getattr(base, name)) for name in space}
    draws = {name: space[name].encode(list(value) if isinstance(value, tuple) else value) for name, value in values.items()}
    return {name: draw for name, draw in draws.items() if draw is not None}


def finished(study: "optuna.Study") -> "list[optuna.trial.FrozenTrial]":
    """Trials that have an outcome. Trials that a signal interrupted have none."""
    return [trial for trial in study.get_trials(deepcopy=False) if "outcome" in trial.user_attrs]


def completed(study: "optuna.Study") -> "list[optuna.trial.FrozenTrial]":
    """Trials with a value, the best first."""
    with_value = [trial for trial in finished(study) if trial.user_attrs["outcome"] == "complete" and trial.value is not None]
    return sorted(with_value, key=lambda trial: -(trial.value or 0.0))


def record_outcome(study: "optuna.Study", plan: SweepPlan, trial: "optuna.Trial", outcome: Outcome) -> bool:
    """Store the outcome of a trial, and write best.json if it is the best so far. Returns whether it is."""
    from optuna.trial import TrialState

    trial.set_user_attr("outcome", outcome.state)
    states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
    study.tell(trial, outcome.value, states[outcome.state])
    if outcome.state != "complete" or completed(study)[0].number != trial.number:
        return False
    _write_best(study, plan)
    return True


def _write_best(study: "optuna.Study", plan: SweepPlan) -> None:
    """Write best.json: the settings of the best trial and the steps of its runs."""
    best = completed(study)[0]
    source = (
        f"fastppo sweep, trial {best.number} of {plan.directory}: mean return {number(best.value or 0.0)} "
        f"in the last quarter of {plan.steps} steps, seeds 1 to {plan.seeds}"
    )
    settings = {**best.user_attrs["settings"], "total_timesteps": plan.steps}
    write_preset(plan.directory / "best.json", plan.env_id, settings, source)

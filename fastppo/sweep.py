"""Search for the settings that learn an environment best: `python -m fastppo.sweep --env-id Acrobot-v1 --trials 50`.

Optuna chooses what to try and when to give up on it; each trial trains in processes of its own, seed after seed, so that what
goes wrong in one costs that trial only. Knows of training its command line and metrics.csv. Costs no torch.

What is maximised: the mean over seeds of the mean of `episodic_return_mean` over the last quarter of a run's steps.
"""

import contextlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn
from rich.table import Table

from fastppo.analysis.search_space import OF_THE_SWEEP, Space, built_in_space, read_space, to_settings
from fastppo.bounds import flag
from fastppo.cli import parse, parse_train, run
from fastppo.config import TrainConfig
from fastppo.envs.envpool import task_of
from fastppo.envs.registry import find_spec
from fastppo.errors import TrainingFault, UsageError, brief
from fastppo.random_streams import Stream, seed_of
from fastppo.run.display import number
from fastppo.run.files import file_name, lock_directory, replace_file
from fastppo.run.metrics_file import read_rows
from fastppo.run.signals import StopSignals
from fastppo.system.cpus import available_cores
from fastppo.system.paths import absolute, current_directory
from fastppo.system.platforms import own_group
from fastppo.system.text import duration

if TYPE_CHECKING:
    import optuna

TRAIN = (sys.executable, "-m", "fastppo.train")
PARTS = 20  # of a seed's steps: at the end of each a trial is compared with those before it
TAIL = 0.25  # share of the steps whose returns count
POLL_SECONDS = 0.25
GRACE_SECONDS = 30.0  # for a training process that was asked to stop; then it is killed
SHOWN = 5  # trials in the table at the end
MIN_FOR_IMPORTANCE = 10  # complete trials; of fewer it says nothing


@dataclass(frozen=True)
class SweepConfig:
    """Search for settings that learn an environment best, among ranges; flags of fastppo.train that stay fixed follow after --.

    The same command again goes on where it was. The best settings so far are in best.json, for --preset.
    """

    env_id: str = TrainConfig.env_id
    """Gymnasium id; what is not searched is as the environment's preset has it."""
    trials: int = 50
    """Trials altogether, those of before included."""
    timeout: float | None = None
    """Seconds after which no trial is started any more."""
    seeds: int = 2
    """Seeds that each trial trains, 1 to this many; the value of a trial is their mean."""
    steps: int | None = None
    """Total timesteps of each seed; default: those of the preset."""
    space: str | None = None
    """What is searched, a .json or .toml file: see fastppo/analysis/search_space.py. Default: a space after the RL Zoo's."""
    study_dir: str | None = None
    """Directory of the study and its runs; default sweeps/<env>."""
    jobs: int = 1
    """Trials at once; each gets its share of the CPU threads."""

    def __post_init__(self) -> None:
        for name in ("trials", "seeds", "steps", "jobs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{flag(name)} must be a whole number of at least 1, got {value}")
        if self.timeout is not None and not self.timeout > 0:
            raise UsageError(f"--timeout must be above 0 seconds, got {self.timeout}")


@dataclass(frozen=True)
class Search:
    """All that a trial needs to know."""

    directory: Path
    env_id: str
    base: TrainConfig
    """What a trial's settings are put over."""
    space: Space
    steps: int
    seeds: int
    num_threads: int | None
    place: Path
    """Where the processes start: the environment's module is found from there."""


@dataclass
class Attempt:
    """A trial under way: a training process for each seed, one after the other."""

    trial: "optuna.Trial"
    path: Path
    started: float
    settings: dict[str, Any] = field(default_factory=dict)
    values: list[float] = field(default_factory=list)
    """Of the seeds that are done."""
    process: "Process | None" = None
    reported: int = 0
    """Parts of the seed under way."""
    task: TaskID | None = None


class Process:
    """A process, and a thread that keeps what it prints.

    Its output is a pipe of ours: should we be killed, it finds the pipe closed, and a training process then stops by itself.
    It is in a session of its own, so that Ctrl-C reaches us alone.
    """

    def __init__(self, command: Sequence[str], output: Path, place: Path) -> None:
        self.output = output
        pipes: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self._process = subprocess.Popen(command, cwd=place, **own_group(), **pipes)
        assert self._process.stdout is not None
        self._reader = threading.Thread(target=_keep, args=(self._process.stdout, output), daemon=True)
        self._reader.start()

    def poll(self) -> int | None:
        """The exit code of a process that has ended."""
        code = self._process.poll()
        if code is not None:
            self._reader.join(timeout=5.0)
        return code

    def terminate(self) -> None:
        """SIGTERM, which ends training after the iteration under way."""
        self._process.terminate()

    def wait(self) -> None:
        """Until it has ended; killed after GRACE_SECONDS."""
        try:
            self._process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def complaint(self) -> str:
        """The line of its output that says what went wrong, or the last one."""
        lines = self.output.read_text(encoding="utf-8", errors="replace").strip().splitlines() if self.output.exists() else []
        told = [line for line in lines if line.startswith(("fault: ", "error: "))]
        return (told or lines or [""])[-1][:300]


def _keep(source: IO[bytes], path: Path) -> None:
    with source:
        with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
            while line := source.readline():
                file.write(line)
        while source.read(2**16):  # after a full disk: the process is not to wait for us
            pass


# --- the learning curve

Curve = list[tuple[int, float]]  # (global_step, episodic_return_mean), nan before the first episode has ended


def read_curve(run_dir: Path) -> Curve:
    """The learning curve of a run, finished or under way; [] before its first row."""
    curve = []
    for row in read_rows(run_dir / "metrics.csv"):
        with contextlib.suppress(KeyError, ValueError):
            curve.append((int(row["global_step"]), float(row["episodic_return_mean"])))
    return curve


def score(curve: Curve, steps: int) -> float:
    """Mean return over the last quarter of the steps; nan where no episode ended."""
    tail = [value for step, value in curve if step > (1.0 - TAIL) * steps and math.isfinite(value)]
    return sum(tail) / len(tail) if tail else math.nan


def at_parts(curve: Curve, steps: int) -> list[float]:
    """The return at the end of each part that is over, of PARTS in a whole run; nan before the first episode has ended."""
    ends = [[value for step, value in curve if step * PARTS >= part * steps] for part in range(1, PARTS + 1)]
    return [values[0] for values in ends if values]


# --- a trial


def begin(search: Search, trial: "optuna.Trial") -> Attempt:
    """Draw the settings of a trial and start its first seed. Raises UsageError for settings that cannot be together."""
    attempt = Attempt(trial, search.directory / f"trial-{trial.number:04}", time.monotonic())
    found = {name: dimension.suggest(trial) for name, dimension in search.space.items()}
    trial.set_user_attr("found", found)
    attempt.settings = to_settings(search.base, found)
    trial.set_user_attr("found", {name: attempt.settings[name] for name in found})  # of minibatches those that divide
    trial.set_user_attr("settings", attempt.settings)
    attempt.path.mkdir(parents=True, exist_ok=True)
    source = f"trial {trial.number} of the sweep in {search.directory}"
    _write_preset(attempt.path / "preset.json", search.env_id, attempt.settings, source)
    start_seed(search, attempt)
    return attempt


def start_seed(search: Search, attempt: Attempt) -> None:
    """Train the next seed of a trial in a process of its own."""
    seed = len(attempt.values) + 1
    run_dir = attempt.path / f"seed-{seed}"
    command = [*TRAIN, "--plain", "--preset", str(attempt.path / "preset.json"), "--run-dir", str(run_dir), "--seed", str(seed)]
    command += ["--total-timesteps", str(search.steps), "--eval-episodes", "0"]
    if search.num_threads is not None:
        command += ["--num-threads", str(search.num_threads)]
    attempt.process, attempt.reported = Process(command, run_dir.with_suffix(".txt"), search.place), 0


def advance(search: Search, attempt: Attempt) -> tuple[str, float | None, str] | None:
    """Look after a trial: report its curve to the pruner, start its next seed.

    Returns:
        None while it goes on; else how it ended, "complete", "pruned" or "failed", its value, and a word on that.
    """
    process = attempt.process
    assert process is not None
    code = process.poll()  # before the curve is read, which then is whole
    seed = len(attempt.values) + 1
    curve = read_curve(attempt.path / f"seed-{seed}")
    if code:
        return "failed", None, process.complaint() or f"exit code {code}"
    returns = at_parts(curve, search.steps)
    for part in range(attempt.reported, len(returns)):
        attempt.reported = part + 1
        if not math.isfinite(returns[part]):
            continue
        attempt.trial.report(returns[part], (seed - 1) * PARTS + part + 1)
        finished = code is not None and seed == search.seeds
        if not finished and attempt.trial.should_prune():
            process.terminate()
            process.wait()
            return "pruned", None, f"at {(part + 1) / PARTS:.0%} of seed {seed}, return {number(returns[part])}"
    if code is None:
        return None
    value = score(curve, search.steps)
    if not math.isfinite(value):
        return "failed", None, f"no episode of seed {seed} ended in the last quarter of its steps: give it more --steps"
    attempt.values.append(value)
    if len(attempt.values) < search.seeds:
        start_seed(search, attempt)
        return None
    return "complete", sum(attempt.values) / search.seeds, ""


# --- the study


def open_directory(directory: Path) -> int | None:
    """Make the directory of a study, or find one there, and keep other sweeps out; returns the lock, to be closed.

    Raises UsageError where Optuna is missing, or the directory holds something else, or cannot be written.
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


def open_study(directory: Path, asked: dict[str, Any], trials: int) -> "optuna.Study":
    """The study in a directory, a new one where there is none. Trials that were running when it was left have failed.

    Args:
        asked: what has to be the same for the values of trials to be comparable.

    Raises:
        UsageError: the file is none of a study, or the study is of something else.
    """
    import optuna
    import sqlalchemy

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    database = directory / "study.db"
    try:
        study = optuna.create_study(
            storage=sqlalchemy.URL.create("sqlite", database=str(database)).render_as_string(),
            study_name="fastppo",
            direction="maximize",
            load_if_exists=True,
            pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=PARTS // 4),
        )
    except Exception as error:  # of SQLAlchemy's: whatever is there instead of a study
        raise UsageError(f"{database} cannot be used as a study ({brief(error)})") from None
    before = study.user_attrs
    for name, value in asked.items():
        if before and before.get(name) != value:
            raise UsageError(
                f"{name} cannot change in {directory}, where trials have {before.get(name)}, not {value}: "
                "values would not be comparable; choose another --study-dir"
            )
        study.set_user_attr(name, value)
    for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    # a seed of its own each time: the same one would draw what has been tried; of 32 bits, as numpy's RandomState takes it
    sampler_seed = seed_of(len(study.trials), Stream.SWEEP_SAMPLER) % 2**32
    study.sampler = optuna.samplers.TPESampler(
        n_startup_trials=min(10, max(trials // 4, 5)), seed=sampler_seed, constant_liar=True
    )
    return study


def done(study: "optuna.Study") -> "list[optuna.trial.FrozenTrial]":
    """Trials that came to an end of their own: those that somebody's Ctrl-C or kill cut short have no `outcome`."""
    return [trial for trial in study.get_trials(deepcopy=False) if "outcome" in trial.user_attrs]


def completed(study: "optuna.Study") -> "list[optuna.trial.FrozenTrial]":
    """Trials with a value, the best first."""
    with_value = [trial for trial in done(study) if trial.user_attrs["outcome"] == "complete" and trial.value is not None]
    return sorted(with_value, key=lambda trial: -(trial.value or 0.0))


def _search(study: "optuna.Study", search: Search, config: SweepConfig, stop: StopSignals) -> None:
    """Trials until there are enough, the time is over, or a signal comes."""
    terminal = sys.stdout.isatty()
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=Console(), disable=not terminal, transient=True) as screen:
        say = _sayer(screen.console if terminal else None)
        left = f"{len(done(study))} of {config.trials} trials are there already; " if done(study) else ""
        say(f"{left}studying {', '.join(search.space)}: {search.steps:,} steps a trial, seeds 1 to {search.seeds}")
        deadline = math.inf if config.timeout is None else time.monotonic() + config.timeout
        attempts: list[Attempt] = []
        try:
            while not stop.received:
                while len(attempts) < config.jobs and len(done(study)) + len(attempts) < config.trials:
                    if time.monotonic() >= deadline:
                        break
                    _begin(study, search, attempts, say)
                if not attempts:
                    break
                time.sleep(POLL_SECONDS)
                for attempt in tuple(attempts):
                    ended = advance(search, attempt)
                    _show(screen, attempt, search)
                    if ended is not None:
                        attempts.remove(attempt)
                        if attempt.task is not None:
                            screen.remove_task(attempt.task)
                        say(_end(study, search, attempt.trial, *ended, time.monotonic() - attempt.started))
        finally:
            _abandon(study, attempts)


def _begin(study: "optuna.Study", search: Search, attempts: list[Attempt], say: Callable[[str], None]) -> None:
    trial = study.ask()
    try:
        attempts.append(begin(search, trial))
    except UsageError as error:
        say(_end(study, search, trial, "failed", None, str(error), 0.0))


def _end(
    study: "optuna.Study", search: Search, trial: "optuna.Trial", how: str, value: float | None, note: str, seconds: float
) -> str:
    """Tell the study how a trial ended, keep the best settings; the line that says so."""
    from optuna.trial import TrialState

    trial.set_user_attr("outcome", how)
    states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
    study.tell(trial, value, states[how])
    best = completed(study)[:1]
    if how == "complete" and best[0].number == trial.number:
        _write_best(study, search)
        note = "the best so far"
    shown = ", ".join(_shown(name, value) for name, value in trial.user_attrs["found"].items())
    head = f"trial {trial.number:3}  {how:8} {'-' if value is None else number(value):>8}  {duration(seconds):>7}"
    return f"{head}  {f'({note}) ' if note else ''}{shown}"


def _abandon(study: "optuna.Study", attempts: Sequence[Attempt]) -> None:
    """Stop the processes of trials under way, which have failed, and are made up for when the sweep goes on."""
    from optuna.trial import TrialState

    processes = [attempt.process for attempt in attempts if attempt.process is not None]
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait()
    for attempt in attempts:
        study.tell(attempt.trial, state=TrialState.FAIL)


def _write_best(study: "optuna.Study", search: Search) -> None:
    """best.json: the settings of the best trial, as long as its runs were, and where they come from."""
    best = completed(study)[0]
    source = (
        f"fastppo sweep, trial {best.number} of {search.directory}: mean return {number(best.value or 0.0)} "
        f"in the last quarter of {search.steps} steps, seeds 1 to {search.seeds}"
    )
    settings = {**best.user_attrs["settings"], "total_timesteps": search.steps}
    _write_preset(search.directory / "best.json", search.env_id, settings, source)


def _write_preset(path: Path, env_id: str, settings: dict[str, Any], source: str) -> None:
    preset = {"settings": settings, "env_id": env_id, "source": source[:500]}
    replace_file(path, (json.dumps(preset, indent=2) + "\n").encode())


# --- what a person sees


def _sayer(console: Console | None) -> Callable[[str], None]:
    """Lines above the bars of a terminal, or plain ones."""
    if console is None:
        return lambda line: print(line, flush=True)
    return lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True)


def _show(screen: Progress, attempt: Attempt, search: Search) -> None:
    """The bar of a trial."""
    if attempt.task is None:
        attempt.task = screen.add_task(f"trial {attempt.trial.number}", total=search.seeds * PARTS, note="")
    seed = len(attempt.values) + 1
    screen.update(attempt.task, completed=len(attempt.values) * PARTS + attempt.reported, note=f"seed {seed}")


def _report(study: "optuna.Study", search: Search) -> None:
    """The best trials and the importance of settings, and how to use what was found."""
    best = completed(study)[:SHOWN]
    if not best:
        last = done(study)[-1:]
        raise TrainingFault(
            f"no trial came to its end: see {search.directory}" + (f"/trial-{last[0].number:04}" if last else "")
        )
    importance: dict[str, float] = {}
    if len(completed(study)) >= MIN_FOR_IMPORTANCE:
        from optuna.importance import get_param_importances

        importance = get_param_importances(study)
    table = Table(box=None, header_style="dim")
    table.add_column("trial")
    for trial in best:
        table.add_column(str(trial.number), justify="right")
    if importance:
        table.add_column("importance", justify="right")
    table.add_row("value", *(number(trial.value or 0.0) for trial in best), style="bold green")
    for name in sorted(search.space, key=lambda name: -importance.get(name, 0.0)):
        cells = [_value(trial.user_attrs["found"][name]) for trial in best]
        table.add_row(name, *cells, *([f"{importance.get(name, 0.0):.0%}"] if importance else []))
    Console().print(table)
    path = search.directory / "best.json"
    print(f"best settings: {path}; to train with them:\nfastppo train --preset {shlex.quote(str(path))}")


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _shown(name: str, value: Any) -> str:
    """'gamma 0.99', 'norm_obs' or 'no norm_obs'."""
    if isinstance(value, bool):
        return name if value else f"no {name}"
    return f"{name} {_value(value)}"


# --- the command line


def _fixed_names(fixed: Sequence[str]) -> set[str]:
    """The settings that flags of fastppo.train set: ['--num-envs=4', '--no-norm-obs'] -> {'num_envs', 'norm_obs'}."""
    flags = [arg[2:].partition("=")[0].replace("-", "_") for arg in fixed if arg.startswith("--")]
    return {re.sub("^no_", "", name) for name in flags}


def _main(args: Sequence[str]) -> None:
    own, fixed = (args[: args.index("--")], args[args.index("--") + 1 :]) if "--" in args else (args, [])
    config = parse(SweepConfig, own, prog="python -m fastppo.sweep")
    names = _fixed_names(fixed)
    taken = next((name for name in ("env_id", *OF_THE_SWEEP) if name in names), None)
    if taken is not None:
        raise UsageError(
            f"{flag(taken)} after --: the sweep sets that itself; before -- there are --env-id, --steps and --seeds"
        )
    # before the environment's module is imported, which may change it
    place = absolute("sweeps", "--study-dir", current_directory()).parent
    base = parse_train(["--env-id", config.env_id, *fixed])
    task_of(base.env_id) if base.backend == "envpool" else find_spec(base.env_id)
    steps = config.steps or base.total_timesteps
    space = built_in_space(base, steps, names) if config.space is None else read_space(place / config.space, names)
    directory = place / (config.study_dir or Path("sweeps") / file_name(config.env_id))
    num_threads = None
    if config.jobs > 1 and "num_threads" not in names:
        num_threads = max(available_cores() // config.jobs, 1)
    search = Search(directory, config.env_id, base, space, steps, config.seeds, num_threads, place)

    ranges = {name: [dimension.kind, list(dimension.values)] for name, dimension in space.items()}
    asked = {"--env-id": config.env_id, "--steps": steps, "--seeds": config.seeds, "--space": json.dumps(ranges)}
    go_on = f"to go on: {shlex.join(['fastppo', 'sweep', *args])}"
    with contextlib.ExitStack() as cleanup:
        lock = open_directory(directory)
        if lock is not None:
            cleanup.callback(os.close, lock)
        study = open_study(directory, {**asked, "what follows --": shlex.join(fixed)}, config.trials)
        if not study.trials:  # what the preset has is the first to be tried, where the space has it
            study.enqueue_trial(_encoded(base, space))
        stop = StopSignals()
        cleanup.callback(stop.restore)
        try:
            _search(study, search, config, stop)
        except KeyboardInterrupt:  # a second one
            stop.received = stop.received or signal.SIGINT
        if stop.received:
            print(f"stopped by {stop.name}; {len(done(study))} of {config.trials} trials are kept, {go_on}", flush=True)
            raise stop.exception()
        _report(study, search)
        if len(done(study)) < config.trials:
            print(f"--timeout: {len(done(study))} of {config.trials} trials; {go_on}")


def _encoded(base: TrainConfig, space: Space) -> dict[str, Any]:
    """The settings of `base` as draws of the space, without those that it cannot draw."""
    said = {"minibatch_size": base.rows_per_minibatch, "hidden_sizes": base.hidden_sizes or (64, 64)}  # where defaults are None
    values = {name: said.get(name, getattr(base, name)) for name in space}
    draws = {name: space[name].encode(list(value) if isinstance(value, tuple) else value) for name, value in values.items()}
    return {name: draw for name, draw in draws.items() if draw is not None}


def console(args: Sequence[str] | None = None) -> int:
    """Entry point: the exit code."""
    return run(_main, sys.argv[1:] if args is None else args)


if __name__ == "__main__":
    sys.exit(console())

"""Search for the settings that learn an environment best: `python -m fastppo.sweep --env-id Acrobot-v1 --trials 50`."""

import contextlib
import os
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastppo.analysis.search_space import OF_THE_SWEEP, built_in_space, read_space
from fastppo.analysis.sweep_search import Search, SweepLimits, print_best
from fastppo.analysis.sweep_study import finished, open_directory, open_study
from fastppo.analysis.sweep_trial import SweepPlan
from fastppo.bounds import flag
from fastppo.cli import parse, parse_train, run
from fastppo.config import TrainConfig
from fastppo.envs.envpool import task_of
from fastppo.envs.registry import find_spec, shorten_spinning
from fastppo.errors import UsageError
from fastppo.run.files import file_name
from fastppo.run.signals import StopSignals
from fastppo.system.cpus import available_cores
from fastppo.system.paths import absolute, current_directory


@dataclass(frozen=True)
class SweepConfig:
    """Search ranges for the settings that learn an environment best. Flags of fastppo.train after -- apply to all trials.

    The same command again continues the sweep. The best settings so far are in best.json, for --preset.
    """

    env_id: str = TrainConfig.env_id
    """Gymnasium id. Settings that are not searched are those of the environment's preset."""
    trials: int = 50
    """Trials altogether, those of earlier sweeps in the same directory included."""
    timeout: float | None = None
    """Seconds after which no further trial starts."""
    seeds: int = 2
    """Each trial trains with the seeds 1 to this number. The value of a trial is their mean."""
    steps: int | None = None
    """Total timesteps of each seed. Default: those of the preset."""
    space: str | None = None
    """The search space, a .json or .toml file: see fastppo/analysis/search_space.py. Default: ranges after the RL Zoo's."""
    study_dir: str | None = None
    """Directory of the study and its runs. Default: sweeps/<env>."""
    jobs: int = 1
    """Trials at once. Each gets an equal share of the CPU threads."""

    def __post_init__(self) -> None:
        for name in ("trials", "seeds", "steps", "jobs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{flag(name)} must be a whole number of at least 1, got {value}")
        if self.timeout is not None and not self.timeout > 0:
            raise UsageError(f"--timeout must be above 0 seconds, got {self.timeout}")


def _fixed_names(fixed: Sequence[str]) -> set[str]:
    """The settings that flags of fastppo.train set: ['--num-envs=4', '--no-norm-obs'] -> {'num_envs', 'norm_obs'}."""
    flags = [arg[2:].partition("=")[0].replace("-", "_") for arg in fixed if arg.startswith("--")]
    return {re.sub("^no_", "", name) for name in flags}


def _plan(config: SweepConfig, fixed: Sequence[str]) -> SweepPlan:
    """What all trials have in common. fixed: flags of fastppo.train. Raises UsageError for wrong flags or a wrong space."""
    names = _fixed_names(fixed)
    own = {"env_id", *OF_THE_SWEEP} - ({"eval_episodes"} if "eval_every" in names else set())
    taken = next((name for name in sorted(own) if name in names), None)
    if taken is not None:
        raise UsageError(
            f"{flag(taken)} after --: the sweep sets that itself; before -- there are --env-id, --steps and --seeds"
        )
    # before the environment's module is imported, which may change it
    place = absolute("sweeps", "--study-dir", current_directory()).parent
    base = parse_train(["--env-id", config.env_id, *fixed])
    task_of(base.env_id) if base.backend == "envpool" else find_spec(base.env_id)
    shorten_spinning(base.env_id, base.backend)
    steps = config.steps or base.total_timesteps
    space = built_in_space(base, steps, names) if config.space is None else read_space(place / config.space, names)
    directory = place / (config.study_dir or Path("sweeps") / file_name(config.env_id))
    num_threads = None
    if config.jobs > 1 and "num_threads" not in names:
        num_threads = max(available_cores() // config.jobs, 1)
    return SweepPlan(directory, config.env_id, base, space, steps, config.seeds, num_threads, place)


def _main(args: Sequence[str]) -> None:
    own, fixed = (args[: args.index("--")], args[args.index("--") + 1 :]) if "--" in args else (args, [])
    config = parse(SweepConfig, own, prog="python -m fastppo.sweep")
    plan = _plan(config, fixed)
    go_on = f"to go on: {shlex.join(['fastppo', 'sweep', *args])}"
    with contextlib.ExitStack() as cleanup:
        lock = open_directory(plan.directory)
        if lock is not None:
            cleanup.callback(os.close, lock)
        study = open_study(plan, shlex.join(fixed), config.trials)
        stop = StopSignals()
        cleanup.callback(stop.restore)
        try:
            Search(study, plan, SweepLimits(config.trials, config.jobs, config.timeout)).run(stop)
        except KeyboardInterrupt:  # a second one
            stop.received = stop.received or signal.SIGINT
        kept = f"{len(finished(study))} of {config.trials} trials"
        if stop.received:
            print(f"stopped by {stop.name}; {kept} are kept, {go_on}", flush=True)
            raise stop.exception()
        print_best(study, plan)
        if len(finished(study)) < config.trials:
            print(f"--timeout: {kept}; {go_on}")


def console(args: Sequence[str] | None = None) -> int:
    """Entry point: the exit code."""
    return run(_main, sys.argv[1:] if args is None else args)


if __name__ == "__main__":
    sys.exit(console())

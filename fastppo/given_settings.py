"""Settings as a user gives them, in the place of others. Costs no torch."""

import reprlib
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from fastppo.bounds import flag
from fastppo.config import PATHS, TrainConfig
from fastppo.errors import UsageError, nearest
from fastppo.system.paths import absolute
from fastppo.system.text import whole_number

HABITS = {  # flags of CleanRL, Stable-Baselines3, its zoo and PufferLib, for the hint in an error
    "--env": "--env-id",
    "--gym-id": "--env-id",
    "--n-timesteps": "--total-timesteps",
    "--n-envs": "--num-envs",
    "--n-steps": "--num-steps",
    "--n-epochs": "--update-epochs",
    "--num-epochs": "--update-epochs",
    "--batch-size": "--minibatch-size",
    "--lr": "--learning-rate",
    "--clip-range": "--clip-coef",
    "--policy-kwargs": "--hidden-sizes",
    "--net-arch": "--hidden-sizes",
    "--activation-fn": "--activation",
    "--ortho-init": "--init",
    "--use-sde": "--action-distribution",
    "--cuda": "--device",
    "--wandb": "--track",
    "--wandb-project": "--track-project",
    "--wandb-project-name": "--track-project",
    "--load-model-path": "--init-from",
    "--lstm": "--rnn",
    "--use-rnn": "--rnn",
    "--eval-freq": "--eval-every",
    "--save-freq": "--checkpoint-iterations",
    "--checkpoint-interval": "--checkpoint-iterations",
    "--capture-video": "--record-every",
    "--exp-name": "--run-dir",
}
_NAMES = [field.name for field in fields(TrainConfig)]


def with_settings(config: TrainConfig, settings: Mapping[str, Any]) -> TrainConfig:
    """`config` with other values. Raises UsageError for an unknown name, an illegal value, or two that set the same thing."""
    unknown = next((name for name in settings if name not in _NAMES), None)
    if unknown is not None:
        ours = HABITS.get(flag(unknown), "")[2:].replace("-", "_")
        hint = f"; here it is {ours}" if ours else nearest(unknown[:100], _NAMES)
        raise UsageError(f"there is no setting {reprlib.repr(unknown)}{hint}")
    given = {name: value for name, value in settings.items() if value is not False}
    return replace(without_rivals(config, given), **settings)


def without_rivals(config: TrainConfig, given: Mapping[str, Any]) -> TrainConfig:
    """`config` without the settings that a given one replaces. Raises UsageError if both of a pair are given.

    given: values, or words of a command line. None does not replace anything.
    """
    given = {name: value for name, value in given.items() if str(value) != "None"}
    for one, other in (("total_timesteps", "num_iterations"), ("num_minibatches", "minibatch_size")):
        if one in given and other in given:
            raise UsageError(f"{flag(one)} and {flag(other)} set the same thing: give only one of them")
        if one in given:
            config = replace(config, **{other: None})  # type: ignore[arg-type]  # both are "int | None"
    if "clip_reward" in given and "norm_reward" not in given:
        config = replace(config, norm_reward=False)
    if "desired_kl" in given and "anneal_lr" not in given:
        config = replace(config, anneal_lr=False)
    if given.get("action_distribution", "gsde") != "gsde" and "sde_sample_freq" not in given:
        config = replace(config, sde_sample_freq=None)
    return with_fitting_minibatches(config, given)


def with_fitting_minibatches(config: TrainConfig, given: Mapping[str, Any]) -> TrainConfig:
    """`config` with the given sizes of a batch, and the nearest number of minibatches that is not larger and divides it.

    With --rnn it divides the environments, since minibatches are of whole ones. Otherwise only with --preset general: an
    environment that nobody has tuned should train with any sizes. given: values, or words.
    """
    sizes = [name for name in ("num_envs", "num_steps", "num_agents") if name in given]
    is_wanted = "rnn" in given or (config.preset == "general" and sizes)
    if not is_wanted or not given.keys().isdisjoint(("num_minibatches", "minibatch_size")):
        return config
    try:
        numbers: dict[str, Any] = {name: whole_number(str(given[name])) for name in sizes}
    except ValueError:  # reported when it is parsed or checked
        return config
    num_envs, num_steps = (numbers.get(name, getattr(config, name)) for name in ("num_envs", "num_steps"))
    batch_size = num_envs * num_steps * (numbers.get("num_agents", config.num_agents) or 1)
    if batch_size < 1:
        return config
    units = num_envs if "rnn" in given else batch_size
    fitting = next(number for number in range(config.minibatches_per_epoch, 0, -1) if units % number == 0)
    return replace(config, **numbers, minibatch_size=None, num_minibatches=fitting)


def with_absolute_paths(config: TrainConfig, place: Path | None) -> TrainConfig:
    """`config` with its directories made absolute, relative to `place`. Raises UsageError as `absolute`."""
    paths: dict[str, Any] = {name: getattr(config, name) for name in PATHS}
    paths = {name: path and str(absolute(path, flag(name), place)) for name, path in paths.items()}
    return replace(config, **paths)


def default_runs(config: TrainConfig, place: Path | None) -> Path:
    """The parent of run directories without a name: `runs` in `place`. Raises UsageError as `absolute`."""
    return Path() if config.run_dir or config.resume else absolute("runs", "--run-dir", place)

"""The search space of a sweep: a range or a choice for each setting. Resolves conflicts. Knows nothing of training.

A space is {"learning_rate": {"log": [1e-5, 1e-2]}, "num_steps": {"choice": [64, 128]}}, in a file of JSON or TOML:

choice         one of the values
uniform        between two numbers
log            between two numbers, uniform in the logarithm
one_minus_log  the same for 1 - x: gamma from 0.97 to 0.9999
power_of_two   between two powers of two
"""

import json
import math
import reprlib
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastppo.combinations import divisors
from fastppo.config import RESUMABLE, TrainConfig, check_setting, is_whole
from fastppo.envs.registry import is_atari
from fastppo.errors import UsageError, nearest
from fastppo.system.json_files import read_json, read_text

if TYPE_CHECKING:
    import optuna

KINDS = ("choice", "uniform", "log", "one_minus_log", "power_of_two")
# settings of TrainConfig for environment, length, hardware, output and storage
NOT_SEARCHED = RESUMABLE | {
    *("preset", "env_id", "env_kwargs", "max_episode_steps", "wrapper", "reward_weights", "vectorization", "backend"),
    *("seed", "num_seeds", "exact_resume", "init_from"),
}
# of these, the sweep itself sets these for each seed of a trial
OF_THE_SWEEP = ("seed", "run_dir", "resume", "total_timesteps", "num_iterations", "plain", "log_interval", "eval_episodes")
SEARCHED = [spec.name for spec in fields(TrainConfig) if spec.name not in NOT_SEARCHED]
ROLLOUTS = 8  # minimum of a trial: with fewer there is no learning curve


@dataclass(frozen=True)
class Dimension:
    """The search range of one setting."""

    name: str
    kind: str
    values: tuple[Any, ...]
    """The choices, or the two ends of the range."""

    def suggest(self, trial: "optuna.Trial") -> Any:
        """A value for the setting. Numbers are rounded to four digits, for readability."""
        if self.kind == "choice":
            return json.loads(trial.suggest_categorical(self.name, list(map(json.dumps, self.values))))
        low, high = self.values
        if self.kind == "power_of_two":
            return 2 ** trial.suggest_int(self.name, int(math.log2(low)), int(math.log2(high)))
        if self.kind == "one_minus_log":
            return round(1.0 - _four_digits(trial.suggest_float(self.name, 1.0 - high, 1.0 - low, log=True)), 12)
        if is_whole(self.name):
            return trial.suggest_int(self.name, low, high, log=self.kind == "log")
        return _four_digits(trial.suggest_float(self.name, low, high, log=self.kind == "log"))

    def encode(self, value: Any) -> Any:
        """The draw for which `suggest` returns `value`; None if there is none."""
        if self.kind == "choice":
            return json.dumps(value) if value in self.values else None
        if not isinstance(value, int | float) or not self.values[0] <= value <= self.values[1]:
            return None
        if self.kind == "power_of_two":
            return int(math.log2(value)) if _is_power_of_two(value) else None
        return 1.0 - value if self.kind == "one_minus_log" else value


Space = Mapping[str, Dimension]

BUILT_IN = {  # the RL Zoo's ranges (rl_zoo3/hyperparams_opt.py), some wider, so that this project's presets lie within
    "learning_rate": {"log": [1e-5, 1e-2]},
    "anneal_lr": {"choice": [True, False]},
    "num_steps": {"power_of_two": [32, 2048]},
    "minibatch_size": {"power_of_two": [32, 512]},
    "update_epochs": {"uniform": [1, 20]},
    "gamma": {"one_minus_log": [0.97, 0.9999]},
    "gae_lambda": {"one_minus_log": [0.9, 0.9999]},
    "clip_coef": {"choice": [0.1, 0.2, 0.3, 0.4]},
    "ent_coef": {"log": [1e-8, 0.1]},
    "max_grad_norm": {"uniform": [0.3, 5.0]},
    "norm_obs": {"choice": [True, False]},
    "norm_reward": {"choice": [True, False]},
    "hidden_sizes": {"choice": [[64], [64, 64], [256, 256]]},
    "activation": {"choice": ["tanh", "relu"]},
}


def built_in_space(base: TrainConfig, steps: int, fixed: Collection[str]) -> Space:
    """The built-in space for trials of `steps` steps that start from `base`, without the settings that are fixed."""
    space = {**BUILT_IN}
    longest = max(steps // (ROLLOUTS * base.num_envs), 1)
    high = min(2 ** int(math.log2(longest)), 2048)
    space["num_steps"] = {"power_of_two": [min(32, high), high]}
    without = set(fixed)
    if is_atari(base.env_id):
        without |= {"norm_obs", "hidden_sizes", "activation"}
    if base.policy is not None:
        without |= {"hidden_sizes", "activation"}
    if base.clip_reward:
        without.add("norm_reward")
    if "num_minibatches" in fixed:
        without.add("minibatch_size")
    return _parse({name: spec for name, spec in space.items() if name not in without}, "the built-in space")


def read_space(path: Path, fixed: Collection[str]) -> Space:
    """The space in a file of JSON, or of TOML if its name ends in .toml. Raises UsageError for an invalid file."""
    hint = "--space takes a .json or .toml file"
    if path.suffix == ".toml":
        try:
            data = tomllib.loads(read_text(path, hint))
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path} is damaged: {str(error)[:200]}") from None
    else:
        data = read_json(path, "a search space", hint)
    space = _parse(data, str(path))
    for name in space:
        if name in fixed:
            raise UsageError(f"{path}: {name} is searched, and fixed after --: leave it out of one of them")
    if "num_minibatches" in space and "minibatch_size" in space:
        raise UsageError(f"{path}: num_minibatches and minibatch_size say the same thing twice: search one of them")
    return space


def _parse(data: Mapping[str, Any], where: str) -> Space:
    if not data:
        raise UsageError(f"{where}: there is nothing in it to search")
    return {name: _dimension(name, spec, where) for name, spec in data.items()}


def _dimension(name: str, spec: Any, where: str) -> Dimension:
    if name not in SEARCHED:
        what = "is not for searching" if name in NOT_SEARCHED else "is no setting"
        raise UsageError(f"{where}: {reprlib.repr(name)} {what}{nearest(name[:100], SEARCHED)}")
    form = f'{{"{name}": {{"choice": [...]}}}}, or one of {", ".join(KINDS[1:])} with two numbers'
    if not isinstance(spec, dict) or len(spec) != 1:
        raise UsageError(f"{where}: {name} must be as in {form}; got {reprlib.repr(spec)}")
    ((kind, values),) = spec.items()
    if kind not in KINDS:
        raise UsageError(f"{where}: {name}: {reprlib.repr(kind)} is none of {', '.join(KINDS)}{nearest(kind[:100], KINDS)}")
    if not isinstance(values, list) or not values or (kind != "choice" and len(values) != 2):
        raise UsageError(f"{where}: {name} must be as in {form}; got {reprlib.repr(spec)}")
    for value in values:
        try:
            check_setting(name, tuple(value) if isinstance(value, list) else value)
        except UsageError as error:
            raise UsageError(f"{where}: {name}: {error}") from None
    if kind != "choice":
        _check_range(name, kind, values, where)
    return Dimension(name, kind, tuple(values))


def _check_range(name: str, kind: str, values: list[Any], where: str) -> None:
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) for value in values)
    if not numbers or values[0] > values[1]:
        raise UsageError(f"{where}: {name}: {kind} is from one number to a greater one, got {reprlib.repr(values)}")
    low, high = values
    if kind == "log" and low <= 0:
        raise UsageError(f"{where}: {name}: log needs numbers above 0, got {low}")
    if kind == "one_minus_log" and (high >= 1 or is_whole(name)):
        raise UsageError(f"{where}: {name}: one_minus_log needs numbers below 1, got {high}")
    if kind == "power_of_two" and not (_is_power_of_two(low) and _is_power_of_two(high)):
        raise UsageError(f"{where}: {name}: power_of_two needs two of 1, 2, 4, ..., got {low} and {high}")


def to_settings(base: TrainConfig, found: dict[str, Any]) -> dict[str, Any]:
    """The settings of a trial's preset file: `base` where it differs from the defaults, overridden by `found`.

    If the minibatches do not divide the batch of this trial, their size (or number) becomes the next smaller one that does, or
    the smallest.

    Raises UsageError for settings that contradict each other.
    """
    default = TrainConfig()
    names = {spec.name for spec in fields(TrainConfig)} - {"preset", "env_id", *OF_THE_SWEEP}
    settings = {name: getattr(base, name) for name in sorted(names) if getattr(base, name) != getattr(default, name)} | found
    for one, other in (("minibatch_size", "num_minibatches"), ("num_minibatches", "minibatch_size")):
        if one in found:
            settings.pop(other, None)
    batch = settings.get("num_envs", default.num_envs) * settings.get("num_steps", default.num_steps)
    name = "minibatch_size" if settings.get("minibatch_size") else "num_minibatches"
    wanted = settings.get(name, getattr(default, name))
    unit = settings.get("num_steps", default.num_steps) if settings.get("rnn") else 1  # rows that stay together
    legal = [number if name == "num_minibatches" else unit * number for number in divisors(batch // unit)]
    settings[name] = max((number for number in legal if number <= wanted), default=legal[0])
    TrainConfig(**settings)
    return settings


def _four_digits(value: float) -> float:
    return float(f"{value:.4g}")


def _is_power_of_two(value: float) -> bool:
    return value >= 1 and math.log2(value).is_integer()

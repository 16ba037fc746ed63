"""Find the settings that a run starts from: by environment, by name or in a file. Knows TrainConfig and gymnasium's ids.

Costs no torch. A file is data: {"settings": {"gamma": 0.98}, "source": "where it comes from", "env_id": "Hopper-v5"}. Only the
settings have to be there; `fastppo sweep` writes one. Files of Stable-Baselines3's zoo, ppo.yml, are read by sb3_settings.py.
"""

import os
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastppo.config import TrainConfig, check_setting, with_current_names
from fastppo.envs.registry import find_spec
from fastppo.errors import UsageError, nearest
from fastppo.given_settings import with_settings
from fastppo.presets import PRESETS, Preset
from fastppo.sb3_settings import read_zoo, without_version
from fastppo.system.json_files import read_json

FAMILIES: Mapping[str, str] = {  # packages that hold the environments' classes
    "gymnasium.envs.classic_control": "classic",
    "gymnasium.envs.box2d": "box2d",
    "gymnasium.envs.mujoco": "mujoco",
    "ale_py": "atari",
}


def choose_preset(env_id: str) -> Preset:
    """The environment's own preset, whatever its version, else its family's, else `general`, even for an unknown id.

    Makes no environment. Imports the module of module:EnvId.
    """
    name = env_id.rpartition(":")[2]
    environment = without_version(name)
    preset = PRESETS.get(environment)
    if preset is not None and without_version(preset.env_id) == environment:
        return preset
    if _is_atari(name):
        return PRESETS["atari"]
    package = _package_of(env_id)
    family = next((family for prefix, family in FAMILIES.items() if f"{package}.".startswith(f"{prefix}.")), "general")
    return PRESETS[family]


def preset_for(env_id: str | None = None, **settings: Any) -> TrainConfig:
    """The settings that the command line would start from for `env_id`, with others instead of the preset's.

    preset_for("Hopper-v5", gamma=0.98) is `--env-id Hopper-v5 --gamma 0.98`; preset_for(preset="box2d") is `--preset box2d`.

    Raises UsageError for an unknown name or an illegal value.
    """
    name = settings.pop("preset", "auto")
    for given, value in (("env_id", TrainConfig.env_id if env_id is None else env_id), ("preset", name)):
        check_setting(given, value)
    preset = choose_preset(env_id or TrainConfig.env_id) if name == "auto" else find_preset(name, env_id)
    return with_settings(preset.config(env_id), settings)


def check_applied(config: TrainConfig) -> None:
    """Raise UsageError where a setting `preset` names one of ours and all other settings have their defaults.

    That is TrainConfig(preset="LunarLander"), which names a preset without starting from it.
    """
    preset = PRESETS.get(config.preset)
    plain = {spec.name: spec.default for spec in fields(TrainConfig)}
    if preset is not None and preset.settings and all(getattr(config, name) == plain[name] for name in preset.settings):
        env_id = "" if config.env_id == TrainConfig.env_id else f'"{config.env_id}", '
        raise UsageError(
            f"--preset {preset.name} is only a name in TrainConfig, and none of its settings are there: "
            f'use preset_for({env_id}preset="{preset.name}")'
        )


FILE_KEYS = ("settings", "source", "env_id")
NOT_IN_FILES = ("preset", "env_id", "run_dir", "resume")  # of TrainConfig: which run it is, not how it learns


def load_preset(path: str | Path) -> TrainConfig:
    """The settings of a preset file, its environment among them; change them with `dataclasses.replace`.

    Raises UsageError for a file that is missing or damaged, or holds an unknown setting or an illegal value.
    """
    return read_preset(str(path)).config()


def read_preset(path: str) -> Preset:
    """The preset in a file, or the settings of a run: its directory or its config.json. Its name is the path.

    Raises UsageError as `load_preset`.
    """
    if os.path.isdir(path):
        return _run_preset(path, Path(path, "config.json"))
    form = '{"settings": {"gamma": 0.98}}'
    data = read_json(Path(path), f"a preset, {form} for example", "--preset takes a name, a .json file or a run")
    if "settings" not in data and {"env_id", "num_envs"} <= data.keys():
        return _run_preset(path, Path(path))
    _known(path, data, FILE_KEYS, "key of a preset file")
    settings, source, env_id = data.get("settings"), data.get("source", "a file"), data.get("env_id", TrainConfig.env_id)
    if not isinstance(settings, dict):
        raise UsageError(f"{path}: settings must be names with values, as in {form}, got {reprlib.repr(settings)}")
    settings = with_current_names(settings)
    if not isinstance(source, str) or not source.isprintable() or len(source) > 500:
        raise UsageError(f"{path}: source must be a line of text, got {reprlib.repr(source)}")
    _known(path, settings, [spec.name for spec in fields(TrainConfig) if spec.name not in NOT_IN_FILES], "setting of a preset")
    return _checked(Preset(path, env_id, source, settings))


def _run_preset(name: str, path: Path) -> Preset:
    """All settings in a run's config.json: the same command again, in a new directory."""
    config = TrainConfig.from_json(path)
    settings = {spec.name: getattr(config, spec.name) for spec in fields(config) if spec.name not in NOT_IN_FILES}
    return Preset(name, config.env_id, "the settings of that run", settings)


def _checked(preset: Preset) -> Preset:
    """The preset of a file, which its name is. Raises UsageError for an illegal value."""
    try:
        preset.config()  # for its checks
    except UsageError as error:
        raise UsageError(f"{preset.name}: {error}") from None
    return preset


def _known(path: str, data: Mapping[str, Any], names: Iterable[str], what: str) -> None:
    """Raise UsageError for the first name in `data` that is not in `names`."""
    unknown = next((name for name in data if name not in names), None)
    if unknown is not None:
        raise UsageError(f"{path}: {reprlib.repr(unknown)} is not a {what}{nearest(unknown[:100], names)}")


def _zoo_preset(path: str, env_id: str | None) -> Preset:
    """The settings of an environment in a file like the zoo's ppo.yml. Raises UsageError."""
    env_id, found = read_zoo(path, env_id, _is_atari)
    without = f", without what has no counterpart here: {'; '.join(found.left_out)}" if found.left_out else ""
    return _checked(Preset(path, env_id, f"in the zoo's format{without}", found.settings))


def find_preset(name: str, env_id: str | None = None) -> Preset:
    """The preset with that name, else in that file, or the settings of the run in that directory.

    A name that ends in .json, .yml or .yaml, or has a /, is a path. env_id: which of a .yml file's environments; None: the only
    one. Raises UsageError if there is none.
    """
    if name in PRESETS:
        return PRESETS[name]
    if name.endswith((".yml", ".yaml")):
        return _zoo_preset(name, env_id)
    if name.endswith(".json") or "/" in name or os.path.isdir(name):
        return read_preset(name)
    known, hint = ("auto", *PRESETS), nearest(name[:100], ("auto", *PRESETS))
    names = ", ".join(known)
    raise UsageError(f"--preset must be a name, a .json or .yml file or a run, got {name[:100]!r}{hint}\nthe names: {names}")


def describe(config: TrainConfig) -> str | None:
    """One line for people: the preset, its source, and its settings that differ from TrainConfig's defaults.

    None if no preset was chosen, or its file no longer exists.
    """
    if config.preset == "none":
        return None
    try:
        preset, plain = find_preset(config.preset, config.env_id), TrainConfig()
    except (UsageError, ValueError):  # ValueError: not a path
        return None
    values = {key: getattr(config, key) for key in preset.settings}
    shown = ", ".join(_show(key, value) for key, value in values.items() if value != getattr(plain, key))
    return f"preset {preset.name} ({config.env_id}; {preset.source}): {shown or 'the defaults of every flag'}"


def _is_atari(name: str) -> bool:
    """Whether it is an id of ale_py, whose environments are registered only once it has been imported."""
    return name.startswith("ALE/") or "NoFrameskip" in name


def _package_of(env_id: str) -> str:
    """Dotted name of the module that holds the environment's class; '' if unknown."""
    try:
        entry_point = find_spec(env_id).entry_point
    except UsageError:  # reported when the environment is made
        return ""
    if isinstance(entry_point, str):
        return entry_point.partition(":")[0]
    return getattr(entry_point, "__module__", "")


def _show(key: str, value: Any) -> str:
    """num_envs 8; norm_obs; no anneal_lr; hidden_sizes 256 256."""
    if isinstance(value, bool):
        return key if value else f"no {key}"
    return f"{key} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"

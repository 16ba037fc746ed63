"""The arguments of Stable-Baselines3's PPO as our settings, and the zoo's file of them. Knows TrainConfig. Costs no torch.

The formats are those of stable_baselines3/ppo/ppo.py and of hyperparams/ppo.yml in rl-baselines3-zoo: an environment id with a
mapping. What has no counterpart here is collected, to be named in one line. Nothing is evaluated or imported.
"""

import ast
import json
import math
import re
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastppo.combinations import MAX_BATCH_SIZE, divisors
from fastppo.errors import UsageError, nearest
from fastppo.system.json_files import read_text

# our settings where Stable-Baselines3 has another default, or does not do what ours does
DEFAULTS = {"num_envs": 1, "num_steps": 2048, "update_epochs": 10, "learning_rate": 3e-4, "anneal_lr": False}
AS_THEY_ARE = {"resize": (0,), "rescale_action": False}
BATCH_SIZE = 64
TORCH_ADAM_EPS = 1e-8  # with optimizer_kwargs that have no eps; without any it is 1e-5, as ours

WHOLE = {
    "n_envs": "num_envs",
    "n_steps": "num_steps",
    "n_epochs": "update_epochs",
    "n_timesteps": "total_timesteps",
    "seed": "seed",
}
NUMBERS = {name: name for name in ("gamma", "gae_lambda", "ent_coef", "vf_coef", "max_grad_norm")}
KL_STOP = 1.5  # of target_kl, where PPO.train stops there
SCHEDULES = {"learning_rate": ("learning_rate", "anneal_lr"), "clip_range": ("clip_coef", "anneal_clip")}
ACTIVATIONS = {"Tanh": "tanh", "ReLU": "relu", "ELU": "elu", "SiLU": "silu", "GELU": "gelu"}
SILENT = ("share_features_extractor", "full_std")  # policy_kwargs that are True as they are here
POLICIES = ("MlpPolicy", "CnnPolicy", "MultiInputPolicy", "ActorCriticPolicy", "ActorCriticCnnPolicy")
WRAPPERS = {  # the last part of a wrapper's name -> the setting, and the argument that it takes its value from
    "GrayScaleObservation": ("grayscale", None),
    "GrayscaleObservation": ("grayscale", None),
    "ResizeObservation": ("resize", "shape"),
    "YAMLCompatResizeObservation": ("resize", "shape"),
    "FrameSkip": ("frame_skip", "skip"),
    "TimeFeatureWrapper": ("time_aware", None),
    "AtariWrapper": ("clip_reward", None),  # the rest of it is what we do with Atari
}
OF_SB3 = ("stable_baselines3.", "sb3_contrib.", "rl_zoo3.", "rl_zoo.", "utils.", "gym.")  # wrappers that are of no use here


class Translation:
    """`settings` of ours, and `left_out`, what of the source has no counterpart among them."""

    def __init__(self, arguments: Mapping[str, Any], is_atari: bool = False) -> None:
        """arguments: those of PPO, and the zoo's own. Raises UsageError for a value that is none."""
        self.settings: dict[str, Any] = {**DEFAULTS, **AS_THEY_ARE}
        self.left_out: list[str] = []
        arguments = dict(arguments)
        batch_size = arguments.pop("batch_size", BATCH_SIZE)
        for name, value in arguments.items():
            if name in WHOLE:
                self.settings |= {} if value is None else {WHOLE[name]: whole(name, value)}
            elif name in NUMBERS:
                self.settings |= {} if value is None else {name: number(name, value)}
            elif name == "target_kl":
                self.settings |= {} if value is None else {name: KL_STOP * number(name, value)}
            elif name in SCHEDULES:
                self._schedule(name, value)
            elif name == "use_sde" and value is True:
                freq = arguments.get("sde_sample_freq", -1)
                self.settings["action_distribution"] = "gsde"
                self.settings["sde_sample_freq"] = None if freq == -1 else whole("sde_sample_freq", freq)
            elif name == "normalize_advantage":
                self.settings["norm_adv"] = bool(value)
            elif name == "clip_range_vf":
                self.settings["clip_vloss"] = value is not None and value == arguments.get("clip_range", 0.2)
                self._note(value is not None and not self.settings["clip_vloss"], name)
            elif name == "normalize":
                self._normalize(value)
            elif name == "policy":
                self._note(value not in POLICIES, f"policy {reprlib.repr(value)}")
            elif name == "policy_kwargs":
                self._policy(arguments_of(value) if isinstance(value, str) else value)
            elif name == "frame_stack":
                self.settings["atari_frame_stack" if is_atari else "frame_stack"] = whole(name, value)
            elif name == "env_kwargs" and is_plain(value):
                self.settings["env_kwargs"] = value
            elif name == "env_wrapper":
                self._wrappers(value or [], is_atari)
            else:
                self._note(value not in (None, False) and name != "sde_sample_freq", str(name)[:50])
        self._minibatches(whole("batch_size", batch_size))

    def _note(self, applies: bool, what: str) -> None:
        if applies:
            self.left_out.append(what)

    def _schedule(self, name: str, value: Any) -> None:
        """A number, or "lin_2.5e-4": linearly to 0."""
        setting, anneals = SCHEDULES[name]
        linear = isinstance(value, str) and value.startswith("lin_")
        self.settings |= {setting: number(name, value[4:] if linear else value), anneals: linear}

    def _normalize(self, value: Any) -> None:
        """True, or the arguments of VecNormalize."""
        value = value if isinstance(value, bool | dict) else arguments_of(str(value))
        given = value if isinstance(value, dict) else {"norm_obs": value, "norm_reward": value}
        for name in ("norm_obs", "norm_reward"):
            self.settings[name] = bool(given.get(name, True))
        for name in given:
            self._note(name not in ("norm_obs", "norm_reward", "gamma"), f"normalize {name}")

    def _policy(self, arguments: Any) -> None:
        arguments = arguments if isinstance(arguments, dict) else {}
        is_adam = class_name(arguments.get("optimizer_class", "Adam")) == "Adam"
        for name, value in arguments.items():
            if name == "net_arch":
                self._net_arch(value)
            elif name == "activation_fn" and class_name(value) in ACTIVATIONS:
                self.settings["activation"] = ACTIVATIONS[class_name(value)]
            elif name == "log_std_init":
                self.settings[name] = number(name, value)
            elif name == "features_extractor_kwargs" and isinstance(value, dict) and set(value) == {"features_dim"}:
                self.settings["cnn_size"] = whole("features_dim", value["features_dim"])
            elif name == "ortho_init":
                self.settings["init"] = "orthogonal" if value else "torch"
            elif name == "optimizer_class":
                self._note(class_name(value) != "Adam", f"policy_kwargs optimizer_class {reprlib.repr(class_name(value))}")
            elif name == "optimizer_kwargs" and isinstance(value, dict) and is_adam:
                self.settings["adam_eps"] = number("optimizer_kwargs eps", value.get("eps", TORCH_ADAM_EPS))
                for other in value:
                    self._note(other != "eps", f"policy_kwargs optimizer_kwargs {str(other)[:50]}")
            elif name != "optimizer_kwargs" or value:
                self._note(value is not (name in SILENT), f"policy_kwargs {name}")

    def _net_arch(self, value: Any) -> None:
        """Widths of both networks, or of each: [64, 64], dict(pi=[64], vf=[64]), [dict(pi=[64], vf=[64])]."""
        value = value[0] if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict) else value
        both = (value.get("pi", []), value.get("vf", [])) if isinstance(value, dict) else (value, value)
        if both[0] != both[1] or not isinstance(both[0], list) or not all(type(width) is int for width in both[0]):
            self.left_out.append(f"policy_kwargs net_arch {reprlib.repr(value)}: both networks have the same layers here")
        else:
            self.settings["hidden_sizes"] = tuple(both[0])

    def _wrappers(self, value: Any, is_atari: bool) -> None:
        """One wrapper or several, each as package.module.Class or with its arguments."""
        for given in value if isinstance(value, list) else [value]:
            (path, kwargs), *_ = given.items() if isinstance(given, dict) and given else [(given, {})]
            module, _, name = str(path).rpartition(".")
            setting, argument = WRAPPERS.get(name, (None, None))
            kwargs = kwargs if isinstance(kwargs, dict) else {}
            if setting is None and is_plain(kwargs) and not module.startswith(OF_SB3) and not is_atari:
                own = (f"{module}:{name}", *(f"{key}={json.dumps(value)}" for key, value in kwargs.items()))
                self.settings["wrapper"] = (*self.settings.get("wrapper", ()), *own)
                continue
            if setting is None or (argument is not None and argument not in kwargs) or is_atari != (setting == "clip_reward"):
                self.left_out.append(f"env_wrapper {reprlib.repr(name)}")
                continue
            asked = True if argument is None else kwargs[argument]
            if setting == "resize":
                asked = tuple(asked) if isinstance(asked, list | tuple) else (asked,)
            self.settings[setting] = asked

    def _minibatches(self, batch_size: int) -> None:
        """Minibatches of about that size: theirs may be smaller at the end of a rollout, ours are all of one size."""
        rows = self.settings["num_envs"] * self.settings["num_steps"]
        if rows > MAX_BATCH_SIZE:
            raise UsageError(f"n_envs x n_steps must be at most {MAX_BATCH_SIZE}, got {rows}")
        wanted = rows / batch_size
        count = min(divisors(rows), key=lambda count: abs(math.log(count / wanted)))
        self.settings["num_minibatches"] = count
        smaller = batch_size < rows and batch_size * count != rows
        self._note(smaller, f"batch_size {batch_size}: minibatches are of {rows // count} rows")


def number(name: str, value: Any) -> float:
    """A number, which YAML may have read as text ("3e-4"). Raises UsageError."""
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"{name} must be a number, got {reprlib.repr(value)}") from None


def whole(name: str, value: Any) -> int:
    """A whole number from 1 on, or a seed, which may be written 1e6. Raises UsageError."""
    found = number(name, value)
    if not found.is_integer() or found < (0 if name == "seed" else 1):
        raise UsageError(f"{name} must be a whole number, got {reprlib.repr(value)}")
    return int(found)


def is_plain(kwargs: Any) -> bool:
    """Whether it is a dict of numbers, texts and lists of these, by name."""
    if not isinstance(kwargs, dict) or not all(isinstance(name, str) for name in kwargs):
        return False
    values = [one for value in kwargs.values() for one in (value if isinstance(value, list) else [value])]
    return all(value is None or isinstance(value, str | int | float) for value in values)


def class_name(value: Any) -> str:
    """'ReLU' of "nn.ReLU" or of "<class 'torch.nn.modules.activation.ReLU'>"."""
    return re.sub(r"^<class '(.*)'>$", r"\1", str(value)).rpartition(".")[2]


def arguments_of(text: str) -> dict[str, Any]:
    """The zoo's "dict(net_arch=[64], activation_fn=nn.ReLU)" or "{'norm_obs': True}", read and never evaluated.

    A name such as nn.ReLU becomes the text "nn.ReLU". Raises UsageError for anything but such data.
    """
    try:
        data = _data(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        data = None
    if not isinstance(data, dict):
        raise UsageError(f"{reprlib.repr(text)} is not data such as dict(net_arch=[64, 64], activation_fn=nn.ReLU)")
    return data


def _data(node: ast.expr | None) -> Any:
    """The data that an expression writes down. Raises ValueError or TypeError for anything else."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        return {_name(word.arg): _data(word.value) for word in node.keywords}
    if isinstance(node, ast.Attribute | ast.Name):
        return ast.unparse(node)
    if isinstance(node, ast.List | ast.Tuple):
        return [_data(part) for part in node.elts]
    if isinstance(node, ast.Dict):
        return {_name(_data(key)): _data(value) for key, value in zip(node.keys, node.values, strict=True)}
    if node is None:
        raise ValueError("a dict that takes from another")
    return ast.literal_eval(node)


def _name(key: Any) -> str:
    """A key of a dict. Raises ValueError if it is no text."""
    if not isinstance(key, str):
        raise ValueError("a key that is no name")
    return key


def read_zoo(path: str, env_id: str | None, is_atari: Callable[[str], bool]) -> tuple[str, Translation]:
    """An environment of a file of the zoo, and its settings.

    Args:
        env_id: if it is not in the file, another version of it, "atari" for an Atari game, or "default" is taken. None: the
            only one in the file.
        is_atari: of an environment id.

    Raises:
        UsageError: PyYAML is missing, the file is missing or damaged, it has no such environment, or a value is illegal.
    """
    entries = _read_yaml(path, read_text(Path(path), "--preset takes a name, a .json or .yml file or a run"))
    if env_id is None and len(entries) != 1:
        raise UsageError(f"{path} has settings of {len(entries)} environments: name one with --env-id")
    wanted = next(iter(entries)) if env_id is None else env_id
    same = [name for name in entries if without_version(name) == without_version(wanted)]
    others = ["atari", "default"] if is_atari(wanted) else ["default"]
    name = next((name for name in (wanted, *reversed(same), *others) if name in entries), None)
    if name is None:
        raise UsageError(f"{path} has no settings of {wanted}{nearest(wanted, entries)}")
    if not isinstance(entries[name], dict):
        raise UsageError(f"{path}: {name} has no settings, but {reprlib.repr(entries[name])}")
    try:
        return wanted, Translation(entries[name], is_atari(wanted))
    except UsageError as error:
        raise UsageError(f"{path}: {name}: {error}") from None


def without_version(env_id: str) -> str:
    """'Hopper-v5' -> 'Hopper'."""
    return re.sub(r"-v\d+$", "", env_id)


def _read_yaml(path: str, text: str) -> dict[str, Any]:
    """The mappings of a YAML file by environment. Raises UsageError."""
    try:
        import yaml  # here: only these files need it
    except ImportError:
        raise UsageError(f"--preset {path} needs PyYAML, which is not installed: pip install 'fastppo[zoo]'") from None

    try:
        data = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UsageError(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(data, dict) or not data or not all(isinstance(name, str) for name in data):
        raise UsageError(f"{path} does not hold settings by environment, but {reprlib.repr(data)}")
    return data

"""Every setting of a training run, once: its name, type, default, help text and bounds. Knows nothing of how it is used.

Importing this module costs no torch: `--help` and a wrong flag answer at once. The string under each field is its help text.
"""

import json
import math
import re
import reprlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from tyro.constructors import PrimitiveConstructorSpec

from fastppo.errors import UsageError, nearest
from fastppo.system.paths import absolute

if TYPE_CHECKING:
    from fastppo.envs.factory import EnvConfig

MAX_JSON_BYTES = 2**20  # of a file of settings or results; config.json has two thousand
MAX_BATCH_SIZE = 2**31 - 1
MAX_THREADS = 4096
MAX_WIDTH = 2**16  # of a layer: two such are 16 GiB of weights
MAX_RNN_LAYERS = 16
MAX_SEEDS = 1024


def _parse_env_kwargs(pairs: list[str]) -> dict[str, Any]:
    """['a=1', 'b=text'] -> {'a': 1, 'b': 'text'}: values are JSON where they parse as such, else text."""
    kwargs: dict[str, Any] = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator or not key.isidentifier():
            raise UsageError(f"--env-kwargs takes KEY=VALUE pairs, got {pair!r}; write for example: --env-kwargs g=9.81")
        try:
            kwargs[key] = json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
        except json.JSONDecodeError:
            kwargs[key] = text
        except RecursionError:
            raise UsageError(f"--env-kwargs {key}: its value is nested too deep") from None
    return kwargs


EnvKwargs = Annotated[
    dict[str, Any],
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="[KEY=VALUE ...]",
        instance_from_str=_parse_env_kwargs,
        is_instance=lambda instance: isinstance(instance, dict),
        str_from_instance=lambda kwargs: [f"{key}={json.dumps(value)}" for key, value in kwargs.items()],
    ),
]

Activation = Literal["tanh", "relu", "elu", "silu", "gelu"]


@dataclass(frozen=True)
class TrainConfig:
    """Train a PPO agent on a Gymnasium environment."""

    preset: str = "none"
    """Settings to start from, which other flags override: auto (by env_id), none, a name, a .json file; see preset_for."""
    env_id: str = "CartPole-v1"
    """Gymnasium id; module:EnvId-v0 imports the module that registers the environment first."""
    env_kwargs: EnvKwargs = field(default_factory=dict)
    """Keyword arguments for the environment, as KEY=VALUE."""
    vectorization: Literal["auto", "entry-point", "sync", "grouped", "async"] = "auto"
    """How N environments become one: their own vector class, in one process, one a core, or one each. auto: by trial."""
    env_timeout: float = 300.0
    """Seconds that a step or reset of the environments may take before the run stops with a fault; 0: for ever."""
    backend: Literal["auto", "gymnasium", "torch", "envpool"] = "auto"
    """Who runs the environments: gymnasium, EnvPool, or torch, on the device with the policy. auto: as registered."""
    check_env: bool = True
    """Try the environment before training: spaces, types, bounds, seeding; what is wrong is told in a line each."""

    atari_noop_max: int = 30
    """Atari: up to this many frames without action at the start of a game."""
    atari_frame_skip: int = 4
    """Atari: frames that one action is held for."""
    atari_screen_size: int = 84
    """Atari: height and width of an observation in pixels."""
    atari_grayscale: bool = True
    """Atari: luminance instead of colour."""
    atari_frame_stack: int = 4
    """Atari: screens in one observation."""
    atari_sticky_actions: float = 0.0
    """Atari: probability that a frame repeats the action before (0.25 in Machado et al. 2018)."""
    atari_full_action_space: bool = False
    """Atari: all 18 actions instead of those that the game uses."""
    episodic_life: bool = True
    """Atari: a lost life ends an episode for the learner; the game goes on, and logs show its whole score."""
    fire_reset: bool = True
    """Atari: FIRE starts a game and a life where the game has it."""

    num_envs: int = 8
    """N, environments stepped in parallel."""
    num_steps: int = 128
    """T, steps of each environment per iteration."""
    reset_each_rollout: bool = False
    """Start every rollout with new episodes; those under way at its end are cut there, as by a time limit."""
    total_timesteps: int = 100_000
    """Stop at the end of the iteration that completes this many transitions (autoreset steps are not counted)."""
    num_iterations: int | None = None
    """Stop after this many iterations instead of by total_timesteps."""
    stop_at_return: float | None = None
    """Stop as soon as the last 100 episodes return this much on average."""

    learning_rate: float = 2.5e-3
    """Adam's step size."""
    anneal_lr: bool = True
    """Let the learning rate fall linearly to 0 over the run."""
    adam_eps: float = 1e-5
    """Adam's epsilon."""
    num_minibatches: int = 4
    """Minibatches per epoch."""
    minibatch_strata: int | None = None
    """G, groups of environments of which each minibatch has equal shares; default: the processes of torchrun, else 1."""
    minibatch_size: int | None = None
    """M, rows per minibatch; set it instead of num_minibatches."""
    update_epochs: int = 4
    """E, passes over each rollout."""

    advantage: Literal["gae", "monte-carlo"] = "gae"
    """Advantage estimator: GAE(lambda), or the discounted reward to the end of episode or rollout minus the value."""
    gamma: float = 0.99
    """Discount factor."""
    gae_lambda: float = 0.95
    """Lambda of GAE."""
    norm_adv: bool = True
    """Standardise advantages in each minibatch."""
    norm_returns: bool = False
    """Standardise the returns of each rollout before the critic learns them (with --advantage monte-carlo)."""
    norm_obs: bool = False
    """Normalise observations by running mean and standard deviation."""
    norm_reward: bool = False
    """Divide rewards by the running standard deviation of the discounted return."""
    clip_reward: bool = False
    """Learn from the sign of each reward, -1, 0 or 1; returns are shown as they are."""

    clip_coef: float = 0.2
    """Clip range of the probability ratio."""
    anneal_clip: bool = False
    """Let the clip range fall linearly to 0 over the run."""
    clip_vloss: bool = False
    """Clip the value's change as the ratio's."""
    ent_coef: float = 0.0
    """Weight of the entropy bonus."""
    vf_coef: float = 0.5
    """Weight of the squared value error, as in the paper and Stable-Baselines3 (CleanRL halves the error: 0.5 is 0.25 here)."""
    max_grad_norm: float = 0.5
    """Largest 2-norm of the gradient; inf: no clipping."""
    target_kl: float | None = None
    """Leave out the rest of an update once a minibatch's KL estimate exceeds this."""

    hidden_sizes: tuple[int, ...] | None = None
    """Widths of the hidden layers; default 64 64, and none after the convolutions of images."""
    activation: Activation = "tanh"
    """Activation of the hidden layers."""
    cnn_size: int = 512
    """Features of an image: width of the layer behind the three convolutions of the Nature CNN."""
    cnn_activation: Activation = "relu"
    """Activation of the Nature CNN."""
    share_backbone: bool = False
    """One network with two heads instead of an actor and a critic apart."""
    rnn: Literal["lstm", "gru"] | None = None
    """A memory behind what is observed, of one episode: lstm or gru. Minibatches are then of whole environments."""
    rnn_hidden_size: int = 64
    """Width of its state."""
    rnn_layers: int = 1
    """Its layers."""
    rnn_shared: bool = False
    """One memory for actor and critic instead of one each (always so with --share-backbone)."""
    log_std_init: float = 0.0
    """Initial log standard deviation of continuous actions."""
    squash_actions: bool = False
    """Map continuous actions to the environment's bounds by tanh instead of clipping them."""

    seed: int = 1
    """Seed of every random generator: the same seed gives the same bits on the CPU."""
    num_seeds: int = 1
    """Agents trained side by side in one process, with seeds from --seed on: each as it would be alone."""
    device: str = "auto"
    """auto (the GPU when there is one), cpu, cuda or cuda:N."""
    num_threads: int | None = None
    """Most CPU threads of the programs, and processes of --vectorization grouped; default: as many of the cores as help."""
    compile: Literal["off", "auto", "on"] = "auto"
    """Compiled programs: never, when the whole run ends sooner with them, or always."""

    run_dir: str | None = None
    """Directory for everything the run writes; default runs/<env>__<seed>__<time>."""
    resume: str | None = None
    """Go on with the run in this directory from its last checkpoint."""
    eval_episodes: int = 20
    """Episodes of the evaluation of the best model at the end; 0: none."""
    checkpoint_seconds: float = 30.0
    """Longest time between checkpoints; 0: after every iteration."""
    checkpoint_iterations: int | None = None
    """Iterations between checkpoints instead of checkpoint_seconds (50 with --exact-resume)."""
    keep_checkpoints: int = 2
    """Checkpoints kept: the newest is last.pt too, those before it are for the case that it is damaged."""
    exact_resume: bool = False
    """Restart the environments at every checkpoint from a seed of its own, so that a resumed run equals one not interrupted."""
    record_every: int | None = None
    """Iterations between videos of the policy, at most 1000 steps of one episode each, in the run directory; None: none."""
    log_interval: int = 1
    """Iterations between rows of metrics.csv and TensorBoard."""
    track: Literal["wandb", "mlflow", "trackio"] | None = None
    """Send metrics to an experiment tracker too; its own environment variables say where, WANDB_MODE=offline for one."""
    track_project: str = "fastppo"
    """The tracker's project, or experiment."""
    plain: bool = False
    """Log lines instead of the live display (always so when the output is no terminal)."""

    def __post_init__(self) -> None:
        for name in _KINDS:
            object.__setattr__(self, name, _plain(getattr(self, name)))
            check_setting(name, getattr(self, name))
        if self.clip_reward and self.norm_reward:
            raise UsageError("--clip-reward and --norm-reward both set the scale of rewards: choose one")
        if self.norm_returns and self.advantage != "monte-carlo":
            raise UsageError("--norm-returns is for --advantage monte-carlo: set that too, or use --norm-reward")
        if self.backend in ("torch", "envpool") and self.vectorization != "auto":
            raise UsageError(
                f"--vectorization {self.vectorization} is for --backend gymnasium; "
                f"{self.backend} steps all at once: leave it off"
            )
        if self.num_seeds > 1:
            self._check_seeds()
        self._check_minibatches()

    def _check_seeds(self) -> None:
        if self.track is not None:
            raise UsageError(f"--track {self.track} tells of one run: with --num-seeds {self.num_seeds} leave it off")
        if self.exact_resume:
            raise UsageError(
                f"--exact-resume is for one seed: with --num-seeds {self.num_seeds} leave it off "
                "(environments of --backend torch go on exactly by themselves)"
            )
        if self.batch_size * self.update_epochs * self.num_seeds > MAX_BATCH_SIZE:
            raise UsageError(
                f"--num-seeds {self.num_seeds} times {self.update_epochs} epochs of {self.batch_size} rows must be at most "
                f"{MAX_BATCH_SIZE}"
            )

    def _check_minibatches(self) -> None:
        if self.batch_size > MAX_BATCH_SIZE:
            raise UsageError(f"--num-envs {self.num_envs} x --num-steps {self.num_steps} must be at most {MAX_BATCH_SIZE}")
        name = "minibatch_size" if self.minibatch_size else "num_minibatches"
        value = self.minibatch_size or self.num_minibatches
        if self.rnn is not None:
            self._check_sequences(name, value)
        if self.batch_size % value:
            counts = divisors(self.batch_size)
            below = max(d for d in counts if d < value) if value > 1 else 1
            above = min((d for d in counts if d > value), default=self.batch_size)
            legal = " or ".join(str(d) for d in dict.fromkeys((below, above)))
            raise UsageError(
                f"{flag(name)} {value} does not divide the batch of {self.batch_size} (--num-envs {self.num_envs} x "
                f"--num-steps {self.num_steps}); nearest that do: {legal}"
            )
        if self.norm_adv and self.batch_size // self.minibatches_per_epoch < 2:
            raise UsageError("--norm-adv needs minibatches of at least 2 rows: lower --num-minibatches or set --no-norm-adv")
        if self.batch_size * self.update_epochs > MAX_BATCH_SIZE:
            raise UsageError(
                f"--update-epochs {self.update_epochs} times the batch of {self.batch_size} must be at most {MAX_BATCH_SIZE}; "
                f"largest --update-epochs: {MAX_BATCH_SIZE // self.batch_size}"
            )

    def _check_sequences(self, name: str, value: int) -> None:
        """Raise UsageError, with the nearest that are, unless minibatches are of whole sequences, as a memory learns."""
        rows = 1 if name == "num_minibatches" else self.num_steps
        legal = [rows * number for number in divisors(self.num_envs)]
        if value not in legal:
            below, above = (
                max((n for n in legal if n < value), default=None),
                min((n for n in legal if n > value), default=None),
            )
            nearest_two = " or ".join(str(number) for number in (below, above) if number is not None)
            raise UsageError(
                f"{flag(name)} {value}: --rnn {self.rnn} learns from whole sequences, so minibatches must divide --num-envs "
                f"{self.num_envs}; nearest that do: {flag(name)} {nearest_two}"
            )

    @property
    def batch_size(self) -> int:
        """B = T * N, rows of one rollout."""
        return self.num_steps * self.num_envs

    @property
    def minibatches_per_epoch(self) -> int:
        """B / M."""
        return self.batch_size // self.minibatch_size if self.minibatch_size else self.num_minibatches

    @property
    def rows_per_minibatch(self) -> int:
        """M."""
        return self.batch_size // self.minibatches_per_epoch

    @property
    def rows_per_unit(self) -> int:
        """Rows that stay together in a minibatch: one, or with a memory the T of an environment."""
        return 1 if self.rnn is None else self.num_steps

    @property
    def env_config(self) -> "EnvConfig":
        """The environments of this run; the one place where settings become those of envs/factory.py."""
        from fastppo.envs.atari import AtariSettings  # here: settings alone do not wait for gymnasium
        from fastppo.envs.factory import EnvConfig

        return EnvConfig(
            env_id=self.env_id,
            num_envs=self.num_envs,
            num_seeds=self.num_seeds,
            env_kwargs=self.env_kwargs,
            backend=self.backend,
            vectorization=self.vectorization,
            num_threads=self.num_threads,
            atari=AtariSettings(
                noop_max=self.atari_noop_max,
                frame_skip=self.atari_frame_skip,
                screen_size=self.atari_screen_size,
                grayscale=self.atari_grayscale,
                frame_stack=self.atari_frame_stack,
                sticky_actions=self.atari_sticky_actions,
                episodic_life=self.episodic_life,
                fire_reset=self.fire_reset,
                full_action_space=self.atari_full_action_space,
            ),
        )

    @property
    def iterations_per_checkpoint(self) -> int | None:
        """None: checkpoints are written by the clock."""
        return self.checkpoint_iterations or (EXACT_CHECKPOINT_ITERATIONS if self.exact_resume else None)

    def to_json(self) -> str:
        """The settings as JSON text, for config.json."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, path: Path) -> "TrainConfig":
        """Read config.json as data; a setting that it lacks, as an older version's does, has its default.

        Raises UsageError when it is missing, damaged or from another version of fastppo.
        """
        data = read_json(path, "the settings of a run", "is this a run directory of fastppo?")
        unknown = next((name for name in data if name not in _KINDS), None)
        if unknown is not None:
            raise UsageError(
                f"{path} does not hold the settings of this version of fastppo "
                f"(unknown: {reprlib.repr(unknown)}{nearest(unknown[:100], _KINDS)})"
            )
        try:
            return cls(**data)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None


def with_absolute_paths(config: TrainConfig, place: Path | None) -> TrainConfig:
    """`config` with its directories as seen from `place`; raises UsageError as `absolute`."""
    run_dir, resume = (
        path and str(absolute(path, name, place)) for path, name in ((config.run_dir, "--run-dir"), (config.resume, "--resume"))
    )
    return replace(config, run_dir=run_dir, resume=resume)


def default_runs(config: TrainConfig, place: Path | None) -> Path:
    """Where the run directories lie that nobody has named: runs in `place`; raises UsageError as `absolute`."""
    return Path() if config.run_dir or config.resume else absolute("runs", "--run-dir", place)


def read_run_config(run_dir: Path) -> TrainConfig:
    """The settings of one agent's run; raises UsageError as `from_json`, and for a directory of many seeds' runs."""
    config = TrainConfig.from_json(run_dir / "config.json")
    if config.num_seeds > 1:
        raise UsageError(
            f"{run_dir} holds the runs of {config.num_seeds} seeds: name one of them, {run_dir / f'seed-{config.seed}'} for one"
        )
    return config


def read_json(path: Path, what: str, hint: str) -> dict[str, Any]:
    """An object of JSON from a file that may be anybody's: read as data, MAX_JSON_BYTES at most, no name twice.

    Raises UsageError, which says with `hint` what to do about a file that cannot be opened, and that it does not hold `what`.
    """
    text = read_text(path, hint)
    try:
        data = json.loads(text, object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is damaged: {str(error)[:200]}") from None
    if not isinstance(data, dict):
        raise UsageError(f"{path} does not hold {what}, but {reprlib.repr(data)}")
    return data


def read_text(path: Path, hint: str) -> str:
    """The text of a regular file of at most MAX_JSON_BYTES; raises UsageError as `read_json`."""
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} is no regular file")
        with path.open("rb") as file:
            text = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}): {hint}") from None
    if len(text) > MAX_JSON_BYTES:
        raise UsageError(f"{path} is larger than any {path.name} of fastppo: {MAX_JSON_BYTES} bytes are read at most")
    try:
        return text.decode("utf-8-sig")
    except ValueError as error:
        raise UsageError(f"{path} is damaged: {error}") from None


# what may differ between a run and its continuation: how long, how it is shown, kept and computed, never what is learned
RESUMABLE = {"total_timesteps", "num_iterations", "eval_episodes", "checkpoint_seconds", "log_interval", "plain", "device"} | {
    "num_threads", "compile", "resume", "run_dir", "checkpoint_iterations", "keep_checkpoints", "stop_at_return", "check_env",
    "env_timeout", "track", "track_project", "record_every", "minibatch_strata"
}  # fmt: skip
EXACT_CHECKPOINT_ITERATIONS = 50  # restarts cut episodes: rarely, then


def check_resumable(before: TrainConfig, after: TrainConfig) -> None:
    """Raise UsageError naming the first setting that cannot change when a run goes on."""
    for spec in fields(TrainConfig):
        old, new = getattr(before, spec.name), getattr(after, spec.name)
        resumable = spec.name in RESUMABLE and not (spec.name == "checkpoint_iterations" and before.exact_resume)
        if old != new and not resumable:
            raise UsageError(f"{flag(spec.name)} {new} cannot change on --resume: the run in {after.resume} has {old}")
    if after.run_dir not in (None, before.run_dir, after.resume):
        raise UsageError(f"--run-dir {after.run_dir} cannot change on --resume: the run goes on in {after.resume}")


def divisors(number: int) -> list[int]:
    """All of them, in order."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def check_setting(name: str, value: Any) -> None:
    """Raise UsageError unless `value` is of the type and within the bounds of the setting, whatever the others are."""
    holds = _BOUNDS[name][0] if name in _BOUNDS else _anything
    if not _is(_KINDS[name], value) or (value is not None and not holds(value)):
        raise UsageError(f"{flag(name)} must be {legal(name)}, got {reprlib.repr(value)}")


def legal(name: str) -> str:
    """What the setting must be, in words."""
    return _BOUNDS[name][1] if name in _BOUNDS else described(_KINDS[name])


def is_whole(name: str) -> bool:
    """Whether the setting is a whole number."""
    return int in (_KINDS[name], *get_args(_KINDS[name]))


def flag(name: str) -> str:
    """'num_envs' -> '--num-envs'."""
    return "--" + name.replace("_", "-")


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of two values under one name each reader would take another."""
    data = dict(pairs)
    if len(data) < len(pairs):
        raise ValueError("a name stands in it twice")
    return data


_KINDS = get_type_hints(TrainConfig)  # name -> type of every setting


def _plain(value: Any) -> Any:
    """A setting as Python callers may pass it: lists become tuples, and NumPy's scalars Python's own."""
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    return value.item() if type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0 else value


def _is(kind: Any, value: Any) -> bool:
    """Whether a value is of the type that a setting is annotated with. True is no number, and 8.0 no whole one."""
    if get_origin(kind) in (Union, UnionType):  # the first where a Literal is among them
        return any(_is(part, value) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is(int, part) and part >= 1 for part in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and _is_json(value)
    if kind in (int, float):
        number = isinstance(value, int | kind) and not isinstance(value, bool)
        return number and (isinstance(value, float) or abs(value) < 2**63)
    return _is_text(value) if kind is str else isinstance(value, kind)


def _is_text(value: Any) -> bool:
    """Whether a value is text that files take; bytes that Python could not decode, of a file's name, are part of it."""
    return isinstance(value, str) and "\0" not in value and not re.search("[\ud800-\udc7f\udd00-\udfff]", value)


def _is_json(value: Any, depth: int = 16) -> bool:
    """Whether config.json can hold the value and give it back, a tuple as a list."""
    if isinstance(value, dict):
        return depth > 0 and all(isinstance(key, str) and _is_json(part, depth - 1) for key, part in value.items())
    if isinstance(value, list | tuple):
        return depth > 0 and all(_is_json(part, depth - 1) for part in value)
    return value is None or isinstance(value, str | bool | int | float)


def described(kind: Any) -> str:
    """What a setting of that type must be, in words."""
    if get_origin(kind) in (Union, UnionType):
        return f"{described(get_args(kind)[0])}, or nothing"
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if kind is bool:
        return "true or false"
    if get_origin(kind) is dict:
        return "names with values that JSON has, nested at most 16 deep"
    return {int: "a whole number", float: "a number"}.get(kind, "a text")


def _anything(value: Any) -> bool:
    return True


def _at_least(bound: int) -> tuple[Callable[[Any], bool], str]:
    return (lambda x: x >= bound), f"a whole number of at least {bound}"


_FINITE_POSITIVE = (lambda x: math.isfinite(x) and x > 0), "a number above 0"
_FINITE_NOT_NEGATIVE = (lambda x: math.isfinite(x) and x >= 0), "a number of at least 0"
_UNIT_INTERVAL = (lambda x: 0 <= x <= 1), "between 0 and 1"
_BOUNDS: dict[str, tuple[Callable[[Any], object], str]] = {
    **dict.fromkeys(
        ("num_envs", "num_steps", "total_timesteps", "num_iterations", "num_minibatches", "minibatch_size"), _at_least(1)
    ),
    **dict.fromkeys(("update_epochs", "log_interval"), _at_least(1)),
    "rnn_layers": ((lambda x: 1 <= x <= MAX_RNN_LAYERS), f"a whole number between 1 and {MAX_RNN_LAYERS}"),
    **dict.fromkeys(("checkpoint_iterations", "keep_checkpoints", "record_every", "minibatch_strata"), _at_least(1)),
    **dict.fromkeys(("atari_frame_skip", "atari_screen_size", "atari_frame_stack"), _at_least(1)),
    **dict.fromkeys(("eval_episodes", "seed", "atari_noop_max"), _at_least(0)),
    **dict.fromkeys(("learning_rate", "adam_eps", "clip_coef", "target_kl"), _FINITE_POSITIVE),
    **dict.fromkeys(("ent_coef", "vf_coef", "checkpoint_seconds", "env_timeout"), _FINITE_NOT_NEGATIVE),
    **dict.fromkeys(("gamma", "gae_lambda", "atari_sticky_actions"), _UNIT_INTERVAL),
    "max_grad_norm": ((lambda x: x > 0), "above 0"),
    "stop_at_return": (math.isfinite, "a number"),
    "num_seeds": ((lambda x: 1 <= x <= MAX_SEEDS), f"a whole number between 1 and {MAX_SEEDS}"),
    "log_std_init": ((lambda x: -20 <= x <= 20), "between -20 and 20"),
    "num_threads": ((lambda x: 1 <= x <= MAX_THREADS), f"a whole number between 1 and {MAX_THREADS}"),
    "hidden_sizes": ((lambda sizes: all(size <= MAX_WIDTH for size in sizes)), f"whole numbers between 1 and {MAX_WIDTH}"),
    **dict.fromkeys(
        ("cnn_size", "rnn_hidden_size"), ((lambda x: 1 <= x <= MAX_WIDTH), f"a whole number between 1 and {MAX_WIDTH}")
    ),
    "device": ((lambda x: re.fullmatch("auto|cpu|cuda(:(0|[1-9][0-9]?))?", x)), "auto, cpu, cuda or cuda:N"),
    **dict.fromkeys(("run_dir", "resume"), (str.strip, "the name of a directory")),
}

"""Every setting of a training run, declared once: name, type, bound, default and help text.

Knows nothing of how a setting is used. Costs no torch, so `--help` and a wrong flag answer at once.
The string under each field is its help text.
"""

import json
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_type_hints

from tyro.constructors import PrimitiveConstructorSpec

from fastppo.bounds import (
    DEVICE,
    DIRECTORY,
    FINITE,
    FRACTION,
    NAMES,
    NOT_NEGATIVE,
    PIXELS,
    POSITIVE,
    POSITIVE_OR_INFINITE,
    WEIGHTS,
    WIDTH,
    WIDTHS,
    Bound,
    at_least,
    between,
    described,
    flag,
    is_of_type,
    plain,
    within,
)
from fastppo.combinations import check_combinations
from fastppo.env_objects import with_objects
from fastppo.envs.preprocessing import Preprocessing, parse_pairs
from fastppo.errors import UsageError, nearest
from fastppo.system.json_files import read_json

if TYPE_CHECKING:
    from fastppo.envs.factory import EnvConfig

OLD_NAMES = {"minibatch_strata": "minibatch_shards"}  # of settings, in flags and files of older versions
LEFT_OPEN = ("resize", "rescale_action", "learning_rate", "update_epochs", "ent_coef")  # None: the environment chooses
EXACT_CHECKPOINT_ITERATIONS = 50  # few, since each restart of the environments truncates episodes

PATHS = ("run_dir", "resume", "init_from")
# marks a setting that may change when a run is resumed: how long it runs, and how it is shown, kept and computed
MAY_CHANGE = "may change on --resume"
LEARNING = "may change on --resume, and with it what is learned"
ENVIRONMENTS = "may change on --resume, where new episodes then start"


EnvKwargs = Annotated[
    dict[str, Any],
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="[KEY=VALUE ...]",
        instance_from_str=partial(parse_pairs, flag="--env-kwargs"),
        is_instance=lambda instance: isinstance(instance, dict),
        str_from_instance=lambda kwargs: [f"{key}={json.dumps(value)}" for key, value in kwargs.items()],
    ),
]

Activation = Literal["tanh", "relu", "elu", "silu", "gelu"]


@dataclass(frozen=True)
class TrainConfig:
    """Train a PPO agent on a Gymnasium environment."""

    env_id: Annotated[str, ENVIRONMENTS] = "CartPole-v1"
    """Gymnasium id; module:EnvId-v0, to import the module that registers it; module:NAME, a function or class to make one;
    jax:PACKAGE/NAME, an environment of JAX."""
    preset: str = "none"
    """Settings to start from, overridden by other flags: auto (by env_id), none, a name, a .json file, a run, a .yml file
    of the zoo of Stable-Baselines3."""
    env_kwargs: Annotated[EnvKwargs, ENVIRONMENTS] = field(default_factory=dict)
    """Keyword arguments for the environment, as KEY=VALUE."""
    max_episode_steps: Annotated[int | None, at_least(1), ENVIRONMENTS] = None
    """Time limit of an episode in the environment's own steps, told as truncation; default: the registered one."""
    wrapper: Annotated[tuple[str, ...], ENVIRONMENTS] = ()
    """A wrapper of each one, module:NAME [KEY=VALUE ...], as gymnasium.wrappers:FlattenObservation; several in order."""
    frame_skip: Annotated[int, at_least(1), ENVIRONMENTS] = 1
    """Steps that each action is repeated for; their rewards are summed."""
    grayscale: Annotated[bool, ENVIRONMENTS] = False
    """Greyscale pictures instead of colour."""
    resize: Annotated[tuple[int, ...] | None, PIXELS, ENVIRONMENTS] = None
    """Height and width of pictures in pixels, or one number for both; 0: as they are. Default: 84 if larger than 96."""
    frame_stack: Annotated[int, at_least(1), ENVIRONMENTS] = 1
    """Last observations in one."""
    rescale_action: bool | None = None
    """Continuous actions from -1 to 1, mapped linearly to the environment's bounds. Default: if these are far from that."""
    time_aware: Annotated[bool, ENVIRONMENTS] = False
    """Add the share of the time limit that has passed to the observation."""
    agent_id: Annotated[bool, ENVIRONMENTS] = False
    """PettingZoo: add a one-hot vector of the agent to its observation, since all agents have one policy."""
    num_agents: Annotated[int | None, at_least(1)] = None
    """PettingZoo: A, agents of each environment, each a row of the rollout. Default: as many as it has."""
    vectorization: Annotated[Literal["auto", "entry-point", "sync", "grouped", "async"], ENVIRONMENTS] = "auto"
    """How N environments are run: their own vector class, one process, one per core, one each. auto: fastest in a trial."""
    autoreset: Annotated[Literal["auto", "next-step", "same-step"], ENVIRONMENTS] = "auto"
    """When environments that are made one by one are reset: in the step after an episode's end, which is then no transition, or
    in the last step. auto: same-step if episodes are shorter than 10 steps in the check before training."""
    env_timeout: Annotated[float, NOT_NEGATIVE, MAY_CHANGE] = 300.0
    """Seconds that a step or reset of the environments may take before the run stops with a fault; 0: no limit."""
    backend: Annotated[Literal["auto", "gymnasium", "torch", "envpool"], ENVIRONMENTS] = "auto"
    """What runs the environments: gymnasium, EnvPool, or torch on the policy's device. auto: as registered."""
    env_halves: Annotated[Literal["auto", "on", "off"], MAY_CHANGE] = "auto"
    """on: two halves of the environments, of which one steps in other processes or threads while the policy acts for the other.
    auto: on a GPU, where that is faster in a trial."""
    check_env: Annotated[bool, MAY_CHANGE] = True
    """Check the environment before training: spaces, types, bounds, seeding; one line for each error."""

    atari_noop_max: Annotated[int, at_least(0), ENVIRONMENTS] = 30
    """Atari: most frames without an action at the start of a game."""
    atari_frame_skip: Annotated[int, at_least(1), ENVIRONMENTS] = 4
    """Atari: frames that each action is repeated for."""
    atari_screen_size: Annotated[int, at_least(1), ENVIRONMENTS] = 84
    """Atari: height and width of an observation in pixels."""
    atari_grayscale: Annotated[bool, ENVIRONMENTS] = True
    """Atari: greyscale instead of colour."""
    atari_frame_stack: Annotated[int, at_least(1), ENVIRONMENTS] = 4
    """Atari: frames in one observation."""
    atari_sticky_actions: Annotated[float, FRACTION, ENVIRONMENTS] = 0.0
    """Atari: probability that a frame repeats the previous action (0.25 in Machado et al. 2018)."""
    atari_full_action_space: Annotated[bool, ENVIRONMENTS] = False
    """Atari: all 18 actions instead of those that the game uses."""
    episodic_life: Annotated[bool, ENVIRONMENTS] = True
    """Atari: a lost life ends the learner's episode; the game continues, and logs show its full score."""
    fire_reset: Annotated[bool, ENVIRONMENTS] = True
    """Atari: press FIRE at the start of a game and of a life, in games that have it."""

    num_envs: Annotated[int, at_least(1), ENVIRONMENTS] = 8
    """N, environments stepped in parallel."""
    num_steps: Annotated[int, at_least(1), LEARNING] = 128
    """T, steps of each environment per iteration."""
    reset_each_rollout: Annotated[bool, LEARNING] = False
    """Start every rollout with new episodes; unfinished ones are truncated at its end."""
    total_timesteps: Annotated[int, at_least(1), MAY_CHANGE] = 100_000
    """Stop after the iteration that completes this many transitions (autoreset steps are not counted)."""
    num_iterations: Annotated[int | None, at_least(1), MAY_CHANGE] = None
    """Stop after this many iterations instead of by total_timesteps."""
    stop_at_return: Annotated[float | None, FINITE, MAY_CHANGE] = None
    """Stop when the mean return of the last 100 episodes, or with --eval-every of an evaluation, reaches this."""

    learning_rate: Annotated[float | None, POSITIVE, LEARNING] = 2.5e-3
    """Adam's step size. None: chosen by the environment's spaces and the length of the run."""
    anneal_lr: Annotated[bool, LEARNING] = True
    """Anneal the learning rate linearly to 0 over the run."""
    desired_kl: Annotated[float | None, POSITIVE, LEARNING] = None
    """Adapt the learning rate after each iteration instead of annealing it, so that the KL estimate stays near this."""
    adam_eps: Annotated[float, POSITIVE, LEARNING] = 1e-5
    """Adam's epsilon."""
    num_minibatches: Annotated[int, at_least(1), LEARNING] = 4
    """Minibatches per epoch."""
    minibatch_shards: Annotated[int | None, at_least(1), MAY_CHANGE] = None
    """G, groups of environments; each minibatch has equally many rows of each. Default: one per process of torchrun, else 1."""
    minibatch_size: Annotated[int | None, at_least(1), LEARNING] = None
    """M, rows per minibatch; set it instead of num_minibatches."""
    update_epochs: Annotated[int | None, at_least(1), LEARNING] = 4
    """E, passes over each rollout. None: chosen by the environment's spaces."""

    advantage: Annotated[Literal["gae", "monte-carlo"], LEARNING] = "gae"
    """Advantage estimator: GAE(lambda), or the discounted reward to the end of episode or rollout minus the value."""
    gamma: Annotated[float, FRACTION, LEARNING] = 0.99
    """Discount factor."""
    gae_lambda: Annotated[float, FRACTION, LEARNING] = 0.95
    """Lambda of GAE."""
    recompute_advantage: Annotated[bool, LEARNING] = False
    """Estimate advantages again before each epoch, with the critic as it is by then (Andrychowicz et al. 2021, 3.5)."""
    norm_adv: Annotated[bool, LEARNING] = True
    """Standardise advantages in each minibatch."""
    norm_returns: bool = False
    """Standardise the returns of each rollout before the critic learns them; its values are translated back."""
    norm_obs: bool = False
    """Normalise observations by their running mean and standard deviation."""
    norm_reward: bool = False
    """Divide rewards by the running standard deviation of the discounted return."""
    rnd_coef: Annotated[float, NOT_NEGATIVE] = 0.0
    """Weight of a reward for observations that are new, by random network distillation. Returns are logged without it."""
    reward_weights: Annotated[tuple[float, ...] | None, WEIGHTS] = None
    """Learn from the weighted sum of a reward that is a vector: a weight for each part. metrics.csv has each part's return."""
    clip_reward: bool = False
    """Learn from the sign of each reward, -1, 0 or 1; logged returns are unclipped."""

    clip_coef: Annotated[float, POSITIVE, LEARNING] = 0.2
    """Clip range of the probability ratio."""
    anneal_clip: Annotated[bool, LEARNING] = False
    """Anneal the clip range linearly to 0 over the run."""
    clip_vloss: Annotated[bool, LEARNING] = False
    """Clip the change of the value like the ratio."""
    ent_coef: Annotated[float | None, NOT_NEGATIVE, LEARNING] = 0.0
    """Weight of the entropy bonus. None: chosen by the environment's spaces."""
    ent_coef_end: Annotated[float | None, NOT_NEGATIVE, LEARNING] = None
    """Weight of the entropy bonus at the end of the run, reached linearly; default: it stays as it is."""
    vf_coef: Annotated[float, NOT_NEGATIVE, LEARNING] = 0.5
    """Weight of the squared value error, as in the paper and Stable-Baselines3 (CleanRL halves the error: 0.5 is 0.25 here)."""
    max_grad_norm: Annotated[float, POSITIVE_OR_INFINITE, LEARNING] = 0.5
    """Clip the gradient to this 2-norm; inf: no clipping."""
    target_kl: Annotated[float | None, POSITIVE, LEARNING] = None
    """Skip the rest of an update once a minibatch's KL estimate exceeds this."""

    policy: Annotated[str | None, MAY_CHANGE] = None
    """A network of your own instead of ours: module:NAME of a class or function (inputs, num_outputs) -> torch.nn.Module."""
    hidden_sizes: Annotated[tuple[int, ...] | None, WIDTHS] = None
    """Widths of the hidden layers; default 64 64, with images none after the convolutions."""
    activation: Activation = "tanh"
    """Activation of the hidden layers."""
    critic_only: tuple[str, ...] = ()
    """Parts of a Dict observation that only the critic sees, in training; the policy acts without them."""
    layer_norm: bool = False
    """Layer normalisation in the hidden layers, before each activation."""
    cnn: Literal["nature", "impala"] = "nature"
    """Network for images: of DQN in Nature, or IMPALA's residual one (256 features there: --cnn-size 256)."""
    cnn_size: Annotated[int, WIDTH] = 512
    """Features of an image: width of the layer after the convolutions."""
    cnn_activation: Activation = "relu"
    """Activation of the convolutions."""
    share_backbone: bool = False
    """One network with two heads instead of separate actor and critic."""
    rnn: Literal["lstm", "gru"] | None = None
    """Recurrent layers before the heads, reset at each episode. Minibatches are then of whole environments."""
    rnn_hidden_size: Annotated[int, WIDTH] = 64
    """Width of the recurrent state."""
    rnn_layers: Annotated[int, between(1, 16)] = 1
    """Number of recurrent layers."""
    rnn_shared: bool = False
    """Share the recurrent layers between actor and critic (always with --share-backbone)."""
    init: Literal["orthogonal", "torch"] = "orthogonal"
    """Initial weights: orthogonal, or as torch's Linear and Conv2d draw them (Stable-Baselines3's ortho_init=False)."""
    log_std_init: Annotated[float, within(-20, 20)] = 0.0
    """Initial log standard deviation of continuous actions; beta has none."""
    action_distribution: Literal["normal", "normal-state-std", "gsde", "beta"] = "normal"
    """Of continuous actions: normal, with one std or one for each state; gSDE (Raffin et al., 2021); beta, on the bounds."""
    sde_sample_freq: Annotated[int | None, at_least(1), LEARNING] = None
    """gSDE: steps that an environment keeps its noise matrix for; default: the whole rollout."""
    squash_actions: bool = False
    """Map continuous actions to the environment's bounds with tanh instead of clipping them."""

    seed: Annotated[int, at_least(0)] = 1
    """Seed of every random generator: the same seed gives the same bits on the CPU."""
    num_seeds: Annotated[int, between(1, 1024)] = 1
    """Agents trained side by side in one process, with consecutive seeds from --seed on; each result is as if trained alone."""
    device: Annotated[str, DEVICE, MAY_CHANGE] = "auto"
    """auto (the faster of GPU and CPU in a trial), cpu, cuda or cuda:N; mps (Apple) and xpu (Intel): eager, and never tried."""
    num_threads: Annotated[int | None, between(1, 4096), MAY_CHANGE] = None
    """Most CPU threads, and most processes of --vectorization grouped; default: as many as make training faster."""
    tf32: Annotated[bool, MAY_CHANGE] = False
    """NVIDIA GPUs: matrix products of float32 in TF32, faster and with 10 bits of mantissa."""
    bf16: Annotated[bool, MAY_CHANGE] = False
    """GPUs: networks compute in bfloat16, for images and wide layers; losses and Adam stay float32. Not with --rnn."""
    compile: Annotated[Literal["off", "auto", "on", "inductor"], MAY_CHANGE] = "auto"
    """Fast forms of acting and learning. off: none. auto: fused ones in C++ for multi-layer perceptrons, after some seconds the
    first time; of the rest those compiled by Inductor, if the run is shorter with them. on: both, before training starts.
    inductor: as on, without fused ones."""

    run_dir: Annotated[str | None, DIRECTORY, MAY_CHANGE] = None
    """Directory for everything the run writes; default runs/<env>__<seed>__<time>."""
    resume: Annotated[str | None, DIRECTORY, MAY_CHANGE] = None
    """Resume the run in this directory from its last checkpoint."""
    init_from: Annotated[str | None, DIRECTORY] = None
    """Start a new run with the weights and statistics of another one: its directory (best.pt) or one of its checkpoints."""
    eval_episodes: Annotated[int, at_least(0), MAY_CHANGE] = 20
    """Episodes of the final evaluation of the best model, and of each of --eval-every; 0: none."""
    eval_every: Annotated[int | None, at_least(1), MAY_CHANGE] = None
    """Iterations between evaluations in environments of their own, with the likeliest actions; default: none. best.pt is then
    the best evaluated policy, and --stop-at-return asks the evaluation."""
    checkpoint_seconds: Annotated[float, NOT_NEGATIVE, MAY_CHANGE] = 30.0
    """Longest time between checkpoints; 0: after every iteration."""
    checkpoint_iterations: Annotated[int | None, at_least(1), MAY_CHANGE] = None
    """Iterations between checkpoints instead of checkpoint_seconds (50 with --exact-resume)."""
    keep_checkpoints: Annotated[int, at_least(1), MAY_CHANGE] = 2
    """Checkpoints kept. The newest is also last.pt; older ones are used if it is damaged."""
    exact_resume: bool = False
    """Restart the environments at every checkpoint, so that a resumed run equals an uninterrupted one."""
    record_every: Annotated[int | None, at_least(1), MAY_CHANGE] = None
    """Iterations between videos of the policy, each at most 1000 steps of one episode; default: no videos."""
    log_interval: Annotated[int, at_least(1), MAY_CHANGE] = 1
    """Iterations between rows of metrics.csv and TensorBoard."""
    log_info: Annotated[tuple[str, ...], NAMES, MAY_CHANGE] = ()
    """Numbers in the info of an episode's last step to log as info_NAME, means over episodes; is_success is always logged."""
    track: Annotated[Literal["wandb", "mlflow", "trackio"] | None, MAY_CHANGE] = None
    """Send metrics to an experiment tracker too, configured by its own environment variables (such as WANDB_MODE=offline)."""
    track_project: Annotated[str, MAY_CHANGE] = "fastppo"
    """The tracker's project or experiment."""
    plain: Annotated[bool, MAY_CHANGE] = False
    """Log lines instead of the live display (always when the output is not a terminal)."""
    verbose: Annotated[int, between(0, 2), MAY_CHANGE] = 1
    """0: print nothing. 2, or --verbose alone: also what can be reproduced."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "verbose", int(self.verbose) if isinstance(self.verbose, bool) else self.verbose)
        for name in _TYPES:
            object.__setattr__(self, name, plain(getattr(self, name)))
            check_setting(name, getattr(self, name))
        check_combinations(self)

    @property
    def batch_size(self) -> int:
        """B = T * N * A, rows of one rollout."""
        return self.num_steps * self.num_rows

    @property
    def num_rows(self) -> int:
        """N * A, rows of one step: one for each environment, or each agent of it."""
        return self.num_envs * (self.num_agents or 1)

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
        """Rows that stay together in a minibatch: 1, or with a recurrent network the T of an environment."""
        return 1 if self.rnn is None else self.num_steps

    @property
    def preprocessing(self) -> Preprocessing:
        """The wrappers of each environment."""
        return Preprocessing(**{spec.name: getattr(self, spec.name) for spec in fields(Preprocessing)})

    @property
    def env_config(self) -> "EnvConfig":
        """The environments of this run; the one place where settings become those of envs/factory.py."""
        from fastppo.envs.atari import AtariSettings  # here: settings alone do not wait for gymnasium
        from fastppo.envs.factory import EnvConfig

        limit = self.max_episode_steps
        return EnvConfig(
            env_id=self.env_id,
            num_envs=self.num_envs,
            num_seeds=self.num_seeds,
            env_kwargs=with_objects(self.env_kwargs) | ({} if limit is None else {"max_episode_steps": limit}),
            preprocessing=self.preprocessing,
            backend=self.backend,
            vectorization=self.vectorization,
            num_threads=self.num_threads,
            autoreset=self.autoreset,
            log_info=self.log_info,
            halves=self.env_halves == "on",
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
        """None: checkpoints are written every checkpoint_seconds."""
        return self.checkpoint_iterations or (EXACT_CHECKPOINT_ITERATIONS if self.exact_resume else None)

    def to_json(self) -> str:
        """The settings as JSON text, for config.json."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, path: Path) -> "TrainConfig":
        """Read config.json as data. A setting that is missing, as in an older version's file, gets its default.

        Raises UsageError if the file is missing, damaged or from another version of fastppo.
        """
        data = with_current_names(read_json(path, "the settings of a run", "is this a run directory of fastppo?"))
        # what older versions did
        data = {"resize": (0,), "rescale_action": False, "autoreset": "next-step", **data}
        unknown = next((name for name in data if name not in _TYPES), None)
        if unknown is not None:
            raise UsageError(
                f"{path} does not hold the settings of this version of fastppo "
                f"(unknown: {reprlib.repr(unknown)}{nearest(unknown[:100], _TYPES)})"
            )
        try:
            return cls(**data)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None


def read_run_config(run_dir: Path) -> TrainConfig:
    """The settings of one agent's run. Raises UsageError as `from_json`, and for a directory of many seeds' runs."""
    config = TrainConfig.from_json(run_dir / "config.json")
    if config.num_seeds > 1:
        raise UsageError(
            f"{run_dir} holds the runs of {config.num_seeds} seeds: name one of them, such as {run_dir / f'seed-{config.seed}'}"
        )
    return config


_TYPES = get_type_hints(TrainConfig)  # type of every setting, by name
_DECLARED = {name: getattr(hint, "__metadata__", ()) for name, hint in get_type_hints(TrainConfig, include_extras=True).items()}
_BOUNDS = {name: bound for name, parts in _DECLARED.items() for bound in parts if isinstance(bound, Bound)}


def marked(mark: str) -> frozenset[str]:
    """The settings that are declared with that mark."""
    return frozenset(name for name, parts in _DECLARED.items() if mark in parts)


RESUMABLE = marked(MAY_CHANGE)


def check_setting(name: str, value: Any) -> None:
    """Raise UsageError unless `value` has the type of the setting and is within its bound. Other settings do not matter."""
    bound = _BOUNDS.get(name)
    if not (is_of_type(_TYPES[name], value) and (value is None or bound is None or bound.holds(value))):
        hint = f": write {int(value)}" if is_whole(name) and isinstance(value, float) and value.is_integer() else ""
        raise UsageError(f"{flag(name)} must be {legal(name)}, got {reprlib.repr(value)}{hint}")


def legal(name: str) -> str:
    """What the setting must be, in words."""
    return _BOUNDS[name].words if name in _BOUNDS else described(_TYPES[name])


def is_whole(name: str) -> bool:
    """Whether the setting is a whole number."""
    return int in (_TYPES[name], *get_args(_TYPES[name]))


def with_current_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a file, those with an old name under their current one."""
    return {OLD_NAMES.get(name, name): value for name, value in settings.items()}

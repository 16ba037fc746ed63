"""Choose the network that fits an environment's spaces and the settings."""

from typing import Literal, Protocol

from fastppo.errors import UsageError, nearest
from fastppo.policy.actor_critic import ActorCritic
from fastppo.policy.distributions import with_features
from fastppo.policy.encoder import Encoder
from fastppo.policy.mlp import MLPActorCritic
from fastppo.policy.module_policy import ModuleFactory, ModulePolicy
from fastppo.policy.network import Network
from fastppo.policy.rnn import RecurrentActorCritic, Rnn
from fastppo.policy.spaces import ActionSpec, ObsSpec


class NetworkConfig(Protocol):
    """The settings of the network; TrainConfig has them."""

    @property
    def hidden_sizes(self) -> tuple[int, ...] | None: ...
    @property
    def activation(self) -> str: ...
    @property
    def layer_norm(self) -> bool: ...
    @property
    def cnn(self) -> str: ...
    @property
    def cnn_size(self) -> int: ...
    @property
    def cnn_activation(self) -> str: ...
    @property
    def share_backbone(self) -> bool: ...
    @property
    def rnn(self) -> Literal["lstm", "gru"] | None: ...
    @property
    def rnn_hidden_size(self) -> int: ...
    @property
    def rnn_layers(self) -> int: ...
    @property
    def rnn_shared(self) -> bool: ...
    @property
    def critic_only(self) -> tuple[str, ...]: ...
    @property
    def init(self) -> Literal["orthogonal", "torch"]: ...
    @property
    def log_std_init(self) -> float: ...
    @property
    def action_distribution(self) -> str: ...
    @property
    def squash_actions(self) -> bool: ...


def make_network(
    obs: ObsSpec, action: ActionSpec, config: NetworkConfig, policy: ModuleFactory | None = None, seed: int = 0
) -> Network:
    """The network for these spaces.

    policy: makes a module of the user, which replaces the built-in networks; seed: for its weights. See `ModulePolicy`.
    """
    critic_only = leaves_of_critic(obs, config)
    if policy is not None:
        if config.rnn is not None:
            raise UsageError(f"--rnn {config.rnn} is a part of our networks, and policy= is a whole one of yours: leave it off")
        if config.init != "orthogonal":
            raise UsageError(
                f"--init {config.init} is for our networks, and yours draws its own weights: use --init orthogonal"
            )
        if critic_only:
            raise UsageError("--critic-only is for our networks, and yours gets the whole observation: leave it off")
        if config.action_distribution == "gsde":
            raise UsageError(
                "--action-distribution gsde is for our networks, whose last hidden layer it takes: set it to normal"
            )
        return ModulePolicy(policy, obs, action, config.log_std_init, seed)
    sizes = config.hidden_sizes
    if sizes is None:
        sizes = () if obs.has_images else (64, 64)
    encoder = Encoder(obs.leaves, config.cnn_size, config.cnn_activation, config.cnn)
    inputs = encoder.size if config.rnn is None else config.rnn_hidden_size
    mlp = MLPActorCritic(
        inputs,
        action.size,
        with_features(action.distribution, (inputs, *sizes)[-1]),
        sizes,
        config.activation,
        config.share_backbone,
        config.log_std_init,
        config.layer_norm,
    )
    if config.rnn is not None:
        users = 1 if config.rnn_shared or config.share_backbone else 2
        rnn = Rnn(config.rnn, encoder.size, config.rnn_hidden_size, config.rnn_layers, users)
        return RecurrentActorCritic(encoder, rnn, mlp)
    return mlp if obs.is_plain else ActorCritic(encoder, mlp, critic_only)


def leaves_of_critic(obs: ObsSpec, config: NetworkConfig) -> tuple[str, ...]:
    """The keys of the leaves that --critic-only names, each a part of the observation with all that is in it.

    Raises UsageError for a name that the observation has not, or where the actor is left with nothing or shares a layer.
    """
    if not config.critic_only:
        return ()
    if config.share_backbone or config.rnn is not None:
        other = "--share-backbone" if config.share_backbone else f"--rnn {config.rnn}"
        raise UsageError(f"--critic-only needs an actor and a critic with inputs of their own: leave {other} off")
    names = {leaf.key: leaf.key.partition(".")[2] for leaf in obs.observed}
    known = {part for name in names.values() for part in (name, name.partition(".")[0]) if part}
    for name in config.critic_only:
        if name not in known:
            its = nearest(name, known) or (f"; its parts: {', '.join(sorted(known))}" if known else ", which is no Dict")
            raise UsageError(f"--critic-only {name} is no part of the observation{its}")
    keys = tuple(key for key, name in names.items() if any(f"{name}.".startswith(f"{part}.") for part in config.critic_only))
    if len(keys) == len(names):
        raise UsageError("--critic-only leaves the actor nothing to observe: name fewer parts")
    return keys

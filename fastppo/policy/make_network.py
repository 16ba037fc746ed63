"""Choose the network that fits an environment's spaces and the settings."""

from typing import Literal, Protocol

from fastppo.errors import UsageError
from fastppo.policy.actor_critic import ActorCritic
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
    def init(self) -> Literal["orthogonal", "torch"]: ...
    @property
    def log_std_init(self) -> float: ...
    @property
    def squash_actions(self) -> bool: ...


def make_network(
    obs: ObsSpec, action: ActionSpec, config: NetworkConfig, policy: ModuleFactory | None = None, seed: int = 0
) -> Network:
    """The network for these spaces.

    policy: makes a module of the user, which replaces the built-in networks; seed: for its weights. See `ModulePolicy`.
    """
    if policy is not None:
        if config.rnn is not None:
            raise UsageError(f"--rnn {config.rnn} is a part of our networks, and policy= is a whole one of yours: leave it off")
        if config.init != "orthogonal":
            raise UsageError(f"--init {config.init} is for our networks, and yours draws its own weights: leave it off")
        return ModulePolicy(policy, obs, action, config.log_std_init, seed)
    sizes = config.hidden_sizes
    if sizes is None:
        sizes = () if obs.has_images else (64, 64)
    encoder = Encoder(obs.leaves, config.cnn_size, config.cnn_activation, config.cnn)
    mlp = MLPActorCritic(
        encoder.size if config.rnn is None else config.rnn_hidden_size,
        action.size,
        action.distribution,
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
    return mlp if obs.is_plain else ActorCritic(encoder, mlp)

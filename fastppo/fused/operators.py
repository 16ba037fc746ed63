"""The fused programs as PyTorch operators: `fastppo::mlp_learn` and `fastppo::mlp_act`, for CPU tensors.

The C++ files of this folder compute them; fused/kernels.py builds and loads those. Knows nothing of policies or settings.
"""

import ctypes
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastppo.core.ppo import MINIBATCH_METRICS, SUMMARY

SWITCHES = ("monte_carlo", "norm_returns", "norm_adv", "clip_reward", "clip_vloss", "recompute_advantage")
ACTIVATIONS = ("tanh", "relu", "elu", "silu", "gelu")  # in the order of vector.h


def _structure(name: str, **fields: Any) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


def _all(kind: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), kind)


_POINTER, _INTEGER = ctypes.c_void_p, ctypes.c_int64
NetworkShape = _structure(
    "NetworkShape",
    **_all(_INTEGER, "obs_size action_size num_hidden"),
    hidden_sizes=_POINTER,
    **_all(_INTEGER, "activation share_backbone layer_norm num_choices"),
    choices=_POINTER,
)
LearnCall = _structure(
    "LearnCall",
    network=NetworkShape,
    **_all(_POINTER, "params exp_avg exp_avg_sq step obs final_obs action_mask action reward terminated truncated valid"),
    **_all(_POINTER, "permutation learning_rate clip_coef ent_coef vf_coef gamma gae_lambda max_grad_norm target_kl adam_eps"),
    **_all(_POINTER, "reward_scale return_mean return_std"),
    **_all(_POINTER, "new_params new_exp_avg new_exp_avg_sq new_step minibatch_metrics explained_variance"),
    **_all(_POINTER, "new_return_mean new_return_std summary"),
    **_all(_INTEGER, "num_steps num_envs num_epochs num_minibatches minibatch_size"),
    **_all(_INTEGER, " ".join(SWITCHES)),
    **_all(_INTEGER, "num_parts num_threads rank num_ranks"),
    exchange=_POINTER,
)
ActCall = _structure(
    "ActCall",
    **_all(_POINTER, "obs obs_mean obs_scale action_mask noise action"),
    **_all(_INTEGER, "num_rows num_threads"),
)
EXECUTION = ("num_parts", "num_threads", "rank", "num_ranks", "exchange")


class _Library:
    """The loaded functions; None before `load`."""

    functions: ctypes.CDLL | None = None


def load(library: Path, digest: str) -> bool:
    """Load the C++ functions. False, and nothing is kept, if they are of other files. Raises OSError, AttributeError.

    digest: of the files (fused/sources.py).
    """
    functions = ctypes.CDLL(str(library))  # ctypes releases the GIL during a call
    functions.fastppo_sources.restype = ctypes.c_char_p
    if functions.fastppo_sources() != digest.encode():
        return False
    functions.fastppo_learn.argtypes, functions.fastppo_learn.restype = [_POINTER], ctypes.c_int32
    functions.fastppo_new_actors.argtypes, functions.fastppo_new_actors.restype = [_POINTER, _INTEGER], _POINTER
    functions.fastppo_delete_actors.argtypes, functions.fastppo_delete_actors.restype = [_POINTER], None
    functions.fastppo_set_actors.argtypes, functions.fastppo_set_actors.restype = [_POINTER, _POINTER], None
    functions.fastppo_act.argtypes, functions.fastppo_act.restype = [_POINTER, _POINTER], None
    _Library.functions = functions
    return True


def functions() -> ctypes.CDLL:
    """The loaded functions. Raises RuntimeError before `load`."""
    if _Library.functions is None:
        raise RuntimeError("the fused programs are not loaded: fastppo.fused.kernels builds and loads them")
    return _Library.functions


def network_shape(network: Sequence[int]) -> ctypes.Structure:
    """The C structure of [obs_size, action_size, activation, share_backbone, layer_norm, num_hidden, *hidden_sizes, *choices].

    activation: its index in ACTIVATIONS. choices: the number of logits of each choice; none for a diagonal Gaussian. Where they
    are fewer than action_size, the other outputs are means of normal components.
    """
    obs_size, action_size, activation, share_backbone, layer_norm, num_hidden, *sizes = network
    numbers = (ctypes.c_int64 * max(len(sizes), 1))(*sizes)
    start = ctypes.addressof(numbers)
    flags = (activation, share_backbone, layer_norm, num_choices(network))
    shape = NetworkShape(obs_size, action_size, num_hidden, start, *flags, start + 8 * num_hidden)
    shape.numbers = numbers  # ctypes keeps addresses, not what lies there
    return shape


def num_choices(network: Sequence[int]) -> int:
    """The number of choices in the list that `network_shape` takes; 0 for a diagonal Gaussian."""
    return len(network) - 6 - network[5]


def num_logits(network: Sequence[int]) -> int:
    """The number of logits of all choices. The other outputs are means of normal components."""
    return sum(network[6 + network[5] :])


def action_type(network: Sequence[int]) -> tuple[torch.dtype, int]:
    """Dtype and length of an action: the choices, int64 if that is all, then the normal components."""
    num_normal = network[1] - num_logits(network)
    return torch.float32 if num_normal else torch.int64, num_choices(network) + num_normal


def packed_size(network: Sequence[int]) -> int:
    """At least the number of floats that the C++ class Actor packs this network's parameters into, on every processor."""
    obs_size, action_size, _, share_backbone, layer_norm, num_hidden, *sizes = network
    hidden = [obs_size, *sizes[:num_hidden]]
    layers = list(pairwise(hidden)) * (1 if share_backbone else 2)
    heads = [(action_size, hidden[-1]), (1, hidden[-1])]
    matrices = sum(_padded(columns) * inner + _padded(inner) * columns for inner, columns in [*layers, *heads])
    vectors = sum((3 if layer_norm else 1) * _padded(columns) for _, columns in layers)
    return matrices + vectors + 2 * _padded(action_size) + _padded(1)  # heads' biases, log standard deviations


def _padded(number: int) -> int:
    """Rounded up to whole registers of the widest kind, 16 floats."""
    return -(-number // 16) * 16


def _address(x: Tensor | None, dtype: torch.dtype, *shape: int) -> int | None:
    """Where the tensor's numbers lie. Raises ValueError if it is not of this type and shape, contiguous and on the CPU."""
    if x is None:
        return None
    if x.dtype is not dtype or tuple(x.shape) != shape or not x.is_contiguous() or x.device.type != "cpu":
        raise ValueError(f"expected a contiguous {dtype} of shape {shape} on the CPU, got {x.dtype}, {tuple(x.shape)}")
    return x.data_ptr()


def _operator(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as an operator of PyTorch for CPU tensors. torch.library.custom_op imports Dynamo at its first call, 2 s."""
    name = f"fastppo::{function.__name__}"
    torch.library.define(name, torch.library.infer_schema(function, mutates_args=()))
    torch.library.impl(name, "cpu", function)
    operator: Callable[..., Any] = getattr(torch.ops.fastppo, function.__name__).default
    return operator


@_operator
def mlp_learn(
    params: Tensor,
    adam: Sequence[Tensor],
    obs: Tensor,
    final_obs: Tensor | None,
    action_mask: Tensor | None,
    action: Tensor,
    steps: Sequence[Tensor],
    permutation: Tensor,
    coefficients: Sequence[Tensor],
    reward_scale: Tensor | None,
    returns: Sequence[Tensor],
    network: Sequence[int],
    minibatch_size: int,
    switches: Sequence[int],
    execution: Sequence[int],
) -> list[Tensor]:
    """core.ppo.learn for a multi-layer perceptron; the tensors of its LearnResult, in their order.

    Args:
        params: (P,). adam: exp_avg (P,), exp_avg_sq (P,), step ().
        obs: (T+1, N, D) float32, the networks' input, normalised. final_obs: the same, where environments reset within a step.
        action_mask: (T+1, N, logits) bool. action: (T+1, N, choices) int64, or (T+1, N, choices + components) float32.
        steps: reward float32, terminated, truncated, valid bool, (T+1, N) each.
        permutation: (E, B) int64. coefficients: core.contracts.Coefficients. returns: their mean and std. All () float32.
        network: see `network_shape`. switches, execution: SWITCHES and EXECUTION in their order. exchange is the address of
            the function that sums over ranks, or 0.

    Raises:
        ValueError: a tensor of another type or shape. RuntimeError: an exchange failed, or the functions are not loaded.
    """
    rows, num_envs, obs_size = obs.shape
    num_params = params.numel()
    grid, kind = (rows, num_envs), torch.float32
    num_minibatches = permutation.numel() // minibatch_size
    results = _empty_results(params, num_minibatches)
    dtype, length = action_type(network)
    reward, *ends = steps
    if permutation.numel() and not 0 <= int(permutation.amin()) <= int(permutation.amax()) < (rows - 1) * num_envs:
        raise ValueError(f"permutation: expected numbers of {(rows - 1) * num_envs} rows")
    address = [
        *(_address(params, kind, num_params), *(_address(x, kind, num_params) for x in adam[:2]), _address(adam[2], kind)),
        *(_address(x, kind, *grid, obs_size) for x in (obs, final_obs)),
        *(_address(action_mask, torch.bool, *grid, num_logits(network)), _address(action, dtype, *grid, length)),
        *(_address(reward, kind, *grid), *(_address(x, torch.bool, *grid) for x in ends)),
        _address(permutation, torch.int64, *permutation.shape),
        *(_address(x, kind) for x in (*coefficients, reward_scale, *returns)),
        *(x.data_ptr() for x in results),
    ]
    sizes = (rows - 1, num_envs, len(permutation), num_minibatches, minibatch_size)
    shape = network_shape(network)
    call = LearnCall(shape, *address, *sizes, *switches, *execution[:-1], execution[-1] or None)
    if functions().fastppo_learn(ctypes.addressof(call)) != 0:
        raise RuntimeError("the exchange with other processes failed")
    return results


def _empty_results(params: Tensor, num_minibatches: int) -> list[Tensor]:
    """New tensors for a LearnResult, in its order."""
    shapes = [*[params.shape] * 3, (), (num_minibatches, len(MINIBATCH_METRICS)), (), (), (), (len(SUMMARY),)]
    return [params.new_empty(shape) for shape in shapes]


def _fake_learn(params: Tensor, *args: Any) -> list[Tensor]:
    permutation, minibatch_size = args[6], args[11]
    return _empty_results(params, permutation.numel() // minibatch_size)


torch.library.register_fake("fastppo::mlp_learn", _fake_learn)


class Actors:
    """The actors of S seeds, packed for many calls of `act`. A seed's axis is there where params are (S, P)."""

    def __init__(self, network: Sequence[int], num_seeds: int) -> None:
        """network: see `network_shape`. Raises RuntimeError if the functions are not loaded."""
        self._functions, self._shape = functions(), network_shape(network)
        self._actors = self._functions.fastppo_new_actors(ctypes.addressof(self._shape), num_seeds)

    def __del__(self) -> None:
        if getattr(self, "_actors", None):
            self._functions.fastppo_delete_actors(self._actors)

    def set(self, params: Tensor) -> None:
        """Pack the parameters, (P,) or (S, P), contiguous."""
        self._functions.fastppo_set_actors(self._actors, params.data_ptr())

    def act(self, call: ctypes.Structure) -> None:
        """One call, an ActCall."""
        self._functions.fastppo_act(self._actors, ctypes.addressof(call))


@_operator
def mlp_act(
    params: Tensor, obs: Tensor, action_mask: Tensor | None, noise: Tensor, network: Sequence[int], num_threads: int
) -> Tensor:
    """core.acting.act for a multi-layer perceptron: params (P,), obs (N, D) float32, action_mask (N, logits) bool, noise
    (N, A).

    Returns action (N, choices) int64, or (N, choices + components) float32. Packs the parameters; a run that acts often keeps
    `Actors`.

    Raises ValueError for a tensor of another type or shape, RuntimeError if the functions are not loaded.
    """
    num_rows, outputs = len(obs), network[1]
    action = empty_action(noise, network)
    actors = Actors(network, 1)
    _address(params, torch.float32, params.numel())
    actors.set(params)
    call = ActCall(
        *(_address(obs, torch.float32, num_rows, network[0]), None, None),
        *(_address(action_mask, torch.bool, num_rows, num_logits(network)), _address(noise, torch.float32, num_rows, outputs)),
        *(action.data_ptr(), num_rows, num_threads),
    )
    actors.act(call)
    return action


def empty_action(noise: Tensor, network: Sequence[int]) -> Tensor:
    """A new tensor for the actions that noise (..., A) samples, as `mlp_act` returns them."""
    dtype, length = action_type(network)
    return noise.new_empty((*noise.shape[:-1], length), dtype=dtype)


def _fake_act(
    params: Tensor, obs: Tensor, action_mask: Tensor | None, noise: Tensor, network: Sequence[int], *_: Any
) -> Tensor:
    return empty_action(noise, network)


torch.library.register_fake("fastppo::mlp_act", _fake_act)

"""Policies and spaces as plain data for a checkpoint, and back. The data is untrusted: it is checked before use."""

import math
import reprlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from numpy.typing import NDArray
from torch import Tensor

from fastppo.core.contracts import Normalization
from fastppo.errors import UsageError
from fastppo.policy.agent import Agent
from fastppo.policy.make_network import NetworkConfig, make_network
from fastppo.policy.module_policy import ModuleFactory, ModulePolicy
from fastppo.policy.network import Network
from fastppo.policy.normalization import RunningMoments, make_normalization
from fastppo.policy.spaces import MAX_NESTING, ActionSpec, ObsLeaf, ObsSpec, action_spec, obs_spec

MAX_NUMBERS, MAX_PARTS = 2**24, 1024  # of a space in a checkpoint


def policy_state(
    network: Network,
    params: Tensor,
    obs_space: gym.Space[Any],
    obs: ObsSpec,
    action_space: gym.Space[Any],
    obs_moments: Mapping[str, RunningMoments] | None,
    normalization: Normalization,
) -> dict[str, Any]:
    """A policy without its network settings, as plain data on the CPU that torch.load(weights_only=True) reads."""
    moments = None if obs_moments is None else {key: [x.cpu().clone() for x in kept] for key, kept in obs_moments.items()}
    return {
        "module": _module_name(network),
        "fixed": _copies(network.fixed) if isinstance(network, ModulePolicy) else {},
        "weights": _copies(network.weights(params)),
        "obs_space": space_to_data(obs_space),
        "info_mask_size": None if obs.info_mask is None else obs.info_mask.size,
        "action_space": space_to_data(action_space),
        "obs_moments": moments,
        "reward_scale": None if normalization.reward_scale is None else normalization.reward_scale.cpu().clone(),
        "return_mean": normalization.return_mean.cpu().clone(),
        "return_std": normalization.return_std.cpu().clone(),
    }


def weights_from_state(state: Mapping[str, Any], network: Network) -> Tensor:
    """`policy_state`'s weights as a flat buffer (P,). Buffers and frozen parameters are copied into a user's module.

    Raises UsageError for weights of another kind of network, KeyError or ValueError if names, shapes, dtypes or numbers do
    not fit. Memory is allocated only after the shapes were checked.
    """
    saved_name, module_name = state["module"], _module_name(network)
    if saved_name != module_name:
        wanted = (
            "ours: leave policy= out, or --policy"
            if saved_name is None
            else f"a {str(saved_name)[:100]} of your own: give what made it as policy=... in Python, or as --policy module:NAME"
        )
        made = "" if module_name is None else f", and policy= makes a {module_name}"
        raise UsageError(f"this run's network is {wanted}, as train and load_policy take it{made}")
    if isinstance(network, ModulePolicy):
        for name, tensor in network.fixed.items():
            saved = state["fixed"][name]
            if not isinstance(saved, Tensor) or saved.dtype != tensor.dtype or saved.shape != tensor.shape:
                raise ValueError(f"{name} is not {tensor.dtype} of {tuple(tensor.shape)}")
            tensor.copy_(saved)
    if not isinstance(state["weights"], Mapping):
        raise ValueError("the weights are not named")
    weights = {name: checked(weight, f"weight {name}", torch.float32) for name, weight in state["weights"].items()}
    params = network.flatten(weights)
    if len(params) != sum(weight.numel() for weight in weights.values()):
        raise ValueError(f"there are more weights than the {len(params)} numbers of the network")
    return params


def moments_from_state(state: Mapping[str, Any] | None, device: torch.device | str) -> dict[str, RunningMoments] | None:
    """`policy_state`'s obs_moments, on a device. Raises ValueError for invalid data."""
    if state is None:
        return None
    if not isinstance(state, Mapping) or not all(isinstance(saved, list) and len(saved) == 3 for saved in state.values()):
        raise ValueError("obs_moments are not three of each part of the observation")
    moments = {}
    for key, (mean, var, count) in state.items():
        mean = checked(mean, f"obs_moments of {key}", torch.float64)
        var = checked(var, f"obs_moments of {key}", torch.float64, mean.shape)
        count = checked(count, f"obs_moments of {key}", torch.float64, ())
        if (var < 0).any() or count < 0:
            raise ValueError(f"obs_moments of {key} are negative")
        moments[key] = RunningMoments(mean.to(device), var.to(device), count.to(device))
    return moments


def agent_from_state(
    state: Mapping[str, Any], config: NetworkConfig, device: torch.device | str = "cpu", policy: ModuleFactory | None = None
) -> Agent:
    """The inverse of `policy_state`. Raises UsageError, KeyError or ValueError if `state` does not fit `config`.

    Safe with untrusted data that `load_checkpoint` has read: everything is checked before it is used.
    """
    obs_space = space_from_data(state["obs_space"])
    action = action_spec(space_from_data(state["action_space"]), config.squash_actions, config.action_distribution)
    mask_size = state["info_mask_size"]
    if mask_size is not None and type(mask_size) is not int:
        raise ValueError(f"info_mask_size is a {type(mask_size).__name__}, not a number")
    moments = moments_from_state(state["obs_moments"], device)
    obs = obs_spec(obs_space, mask_size, action, normalize=moments or False)
    network = make_network(obs, action, config, policy)
    action = replace(action, distribution=network.distribution)
    scales = {name: state[name] for name in ("reward_scale", "return_mean", "return_std")}
    scales = {
        name: None if scale is None and name == "reward_scale" else checked(scale, name, torch.float32, ()).to(device)
        for name, scale in scales.items()
    }
    shapes = {leaf.key: leaf.shape for leaf in obs.normalized}
    if moments is not None and {key: tuple(leaf_moments.mean.shape) for key, leaf_moments in moments.items()} != shapes:
        raise ValueError("obs_moments are not those of the observation")
    normalization = make_normalization(moments, **scales, wide=obs.wide)
    params = weights_from_state(state, network).to(device)
    return Agent(obs_space, obs, action, network, params, normalization)


def difference_of_spaces(state: Mapping[str, Any], obs: ObsSpec, action: ActionSpec) -> str | None:
    """What differs between the spaces of a `policy_state` and others, as far as a network depends on it; None: nothing.

    Bounds may differ, and so may action masks. Raises KeyError, ValueError or UsageError if `state` does not hold spaces.
    """
    own_action, action = (action_spec(space, False) for space in (space_from_data(state["action_space"]), action.space))
    own_obs = obs_spec(space_from_data(state["obs_space"]), None, own_action, normalize=state["obs_moments"] or False)
    there, here = ({leaf.key: _described(leaf) for leaf in spec.observed} for spec in (own_obs, obs))
    for key in dict.fromkeys([*here, *there]):
        if there.get(key) != here.get(key):
            name = "the observation" if key == "obs" else key.replace("obs.", "the observation's part ", 1)
            return f"{name} is {there.get(key, 'missing')} there, and {here.get(key, 'missing')} in this run"
    if (own_action.distribution, own_action.size) != (action.distribution, action.size):
        return f"actions are {own_action.space} there, and {action.space} in this run"
    return None


def _described(leaf: ObsLeaf) -> str:
    """A part of an observation, as far as a network depends on it."""
    if leaf.kind == "categories":
        return f"{leaf.size} categories of {leaf.shape}"
    scaled = ", in [0, 255]" if leaf.scale != 1.0 else ""
    return f"{'an image' if leaf.kind == 'image' else 'numbers'} of shape {leaf.shape}{scaled}"


def checked(x: Any, name: str, dtype: torch.dtype, shape: tuple[int, ...] | None = None) -> Tensor:
    """Return x, a tensor of a checkpoint. Raises ValueError for another dtype, another shape or numbers that are not finite."""
    if not isinstance(x, Tensor) or x.layout != torch.strided or x.is_meta or x.dtype != dtype:
        got = f"of {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise ValueError(f"{name} is {got}, not a dense tensor of {dtype}")
    if shape is not None and x.shape != shape:
        raise ValueError(f"{name} is {tuple(x.shape)}, not {shape}")
    if not x.isfinite().all():
        raise ValueError(f"{name} is not finite")
    return x


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def _module_name(network: Network) -> str | None:
    """The class of the user's module; None for a built-in network."""
    return type(network.module).__qualname__ if isinstance(network, ModulePolicy) else None


def space_to_data(space: gym.Space[Any]) -> dict[str, Any]:
    """A supported space as plain data for a checkpoint."""
    if isinstance(space, Discrete):
        return {"type": "Discrete", "n": int(space.n), "start": int(space.start), "dtype": str(space.dtype)}
    if isinstance(space, MultiDiscrete):
        numbers, start = torch.from_numpy(space.nvec.astype(np.int64)), torch.from_numpy(space.start.astype(np.int64))
        return {"type": "MultiDiscrete", "nvec": numbers, "start": start, "dtype": str(space.dtype)}
    if isinstance(space, MultiBinary):
        return {"type": "MultiBinary", "shape": list(space.shape)}
    if isinstance(space, Dict):
        return {"type": "Dict", "spaces": {name: space_to_data(part) for name, part in space.spaces.items()}}
    if isinstance(space, Tuple):
        return {"type": "Tuple", "spaces": [space_to_data(part) for part in space.spaces]}
    assert isinstance(space, Box)
    low, high = torch.from_numpy(space.low.copy()), torch.from_numpy(space.high.copy())
    return {"type": "Box", "low": low, "high": high, "dtype": str(space.dtype)}


def space_from_data(data: Any) -> gym.Space[Any]:
    """The inverse of `space_to_data`. Raises KeyError or ValueError for data that describes no supported space.

    Sizes are checked against MAX_NUMBERS and MAX_PARTS before anything is allocated: the data is untrusted.
    """
    if _count_parts(data) > MAX_PARTS:
        raise ValueError(f"a space of more than {MAX_PARTS} parts, or nested more than {MAX_NESTING} deep")
    space = _space(data)
    if _count_numbers(space) > MAX_NUMBERS:
        raise ValueError(f"a space of more than {MAX_NUMBERS} numbers")
    return space


def _count_numbers(space: gym.Space[Any]) -> int:
    """How many numbers or choices a space has."""
    if isinstance(space, Dict | Tuple):
        return sum(map(_count_numbers, space.spaces.values() if isinstance(space, Dict) else space.spaces))
    if isinstance(space, Discrete | MultiDiscrete):
        return int(np.sum(space.n if isinstance(space, Discrete) else space.nvec))
    return math.prod(space.shape or ())


def _count_parts(data: Any, depth: int = 0) -> int:
    """Number of spaces that `data` describes, itself included. Counting stops above MAX_PARTS."""
    parts = data.get("spaces", ()) if isinstance(data, dict) else ()
    if depth == MAX_NESTING or len(parts) >= MAX_PARTS:
        return MAX_PARTS + 1
    count = 1
    for part in parts.values() if isinstance(parts, dict) else parts:
        count += _count_parts(part, depth + 1)
        if count > MAX_PARTS:
            break
    return count


def _space(data: Any) -> gym.Space[Any]:
    if not isinstance(data, dict):
        raise ValueError(f"a space is described by a dict, not by a {type(data).__name__}")
    kind = data["type"]
    if kind == "Discrete":
        n, start = data["n"], data["start"]
        _check_numbers([n], [start])
        dtype = np.dtype(_dtype({"dtype": "int64", **data}))  # older versions of fastppo stored no dtype
        if dtype == np.int64:  # the only dtype of older gymnasium
            return Discrete(n, start=start)
        if dtype.kind not in "iu" or not np.iinfo(dtype).min <= start <= start + n - 1 <= n + start <= np.iinfo(dtype).max:
            raise ValueError(f"a Discrete of {n} numbers from {start} on, of dtype {dtype}")
        return Discrete(n, start=start, dtype=dtype.type)
    if kind == "MultiDiscrete":
        numbers, start = _array(data["nvec"]), _array(data["start"])
        if numbers.dtype != np.int64 or start.dtype != np.int64 or numbers.shape != start.shape:
            raise ValueError("a MultiDiscrete whose nvec and start are not whole numbers, as many of each")
        _check_numbers(numbers.flatten().tolist(), start.flatten().tolist())
        return MultiDiscrete(numbers, dtype=_dtype(data), start=start)
    if kind == "MultiBinary":
        shape = data["shape"]
        if not isinstance(shape, list) or len(shape) > MAX_NESTING:
            raise ValueError(f"a MultiBinary of shape {reprlib.repr(shape)}")
        _check_numbers(shape, [])
        if math.prod(shape) > MAX_NUMBERS:
            raise ValueError(f"a space of more than {MAX_NUMBERS} numbers")
        return MultiBinary(shape)
    if kind == "Dict" and isinstance(data["spaces"], dict):
        return Dict([(name, _space(part)) for name, part in data["spaces"].items()])  # a list keeps the order, a dict is sorted
    if kind == "Tuple" and isinstance(data["spaces"], list):
        return Tuple([_space(part) for part in data["spaces"]])
    if kind == "Box":
        low, high = _array(data["low"]), _array(data["high"])
        if low.dtype != high.dtype or low.shape != high.shape or not (low <= high).all():
            raise ValueError("a Box whose bounds do not fit each other")
        return Box(low, high, dtype=_dtype(data))
    raise ValueError(f"unknown space {reprlib.repr(kind)}")


def _check_numbers(numbers: list[Any], starts: list[Any]) -> None:
    """Raise ValueError unless all are whole numbers and small enough for a network."""
    if not all(type(x) is int and 1 <= x <= MAX_NUMBERS for x in numbers) or sum(numbers) > MAX_NUMBERS:
        raise ValueError(f"a space of {reprlib.repr(numbers)}: at least 1 and at most {MAX_NUMBERS} are expected")
    if not all(type(x) is int and abs(x) < 2**62 for x in starts):
        raise ValueError(f"a space that starts at {reprlib.repr(starts)}")


def _array(x: Any) -> NDArray[Any]:
    if not isinstance(x, Tensor) or x.layout != torch.strided or x.numel() > MAX_NUMBERS:
        raise ValueError(f"a space's bounds are a {type(x).__name__}, not a dense tensor of at most {MAX_NUMBERS} numbers")
    return x.numpy()


def _dtype(data: Mapping[str, Any]) -> Any:
    name = data["dtype"]
    if name not in ("bool", *(f"{kind}{bits}" for kind in ("int", "uint", "float") for bits in (8, 16, 32, 64))):
        raise ValueError(f"a space of dtype {reprlib.repr(name)}")
    return np.dtype(name).type

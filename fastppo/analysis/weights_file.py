"""A policy's numbers as one safetensors file, by name, for programs that compute with them themselves.

Knows nothing of run directories or of command lines. Does not import torch at module level, as export_formats.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fastppo.analysis.export_formats import check_output
from fastppo.errors import TrainingFault, UsageError
from fastppo.run.files import replace_file
from fastppo.system.paths import absolute, current_directory

if TYPE_CHECKING:
    from torch import Tensor

    from fastppo.policy.agent import Agent


def export_weights(agent: "Agent", path: str | Path, metadata: Mapping[str, str] | None = None) -> str:
    """Write the weights of a policy, its statistics of observations and its action bounds to a .safetensors file.

    Weights have the names and shapes that `policy.weights` has: matrices are (in, out), filters (out, channels, height, width).
    An observation x is normalised as ((x - obs_mean) * obs_scale), clipped at -10 and 10.

    Args:
        agent: from `load_policy` or `train`.
        path: the file; it appears, or replaces another one, whole or not at all.
        metadata: text by name, in the file's header, beside the spaces.

    Returns:
        One line on the file.

    Raises:
        UsageError: the directory does not exist, the file cannot be written, or safetensors is not installed.
        TrainingFault: the file does not hold what it should; it is not written.
    """
    path = absolute(path, "--output", current_directory())
    check_output(path, "safetensors")
    from safetensors.torch import load, save

    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in _tensors(agent).items()}
    header = {"format": "pt", "observation_space": str(agent.obs_space), "action_space": str(agent.action.space)}
    content = save(tensors, {**header, **(metadata or {})})
    found = load(content)
    if found.keys() != tensors.keys() or not all(found[name].equal(tensor) for name, tensor in tensors.items()):
        raise TrainingFault(f"the file does not hold the policy's numbers, {path} was not written")
    try:
        replace_file(path, content)
    except OSError as error:
        raise UsageError(f"--output {path} cannot be written: {error.strerror}") from None
    numbers = sum(tensor.numel() for tensor in tensors.values())
    return f"{path} ({len(content) / 1e3:,.0f} kB): {len(tensors)} tensors of {numbers:,} numbers"


def _tensors(agent: "Agent") -> dict[str, "Tensor"]:
    """All numbers of a policy by name."""
    tensors = {**agent.weights, **getattr(agent.network, "fixed", {})}
    for name, statistics in (("obs_mean", agent.normalization.obs_mean), ("obs_scale", agent.normalization.obs_scale)):
        tensors |= {f"{name}.{key}": tensor for key, tensor in (statistics or {}).items()}
    for leaf in agent.action.leaves:
        if not leaf.numbers:
            tensors |= {f"{leaf.key}.low": leaf.low, f"{leaf.key}.high": leaf.high}
    return tensors

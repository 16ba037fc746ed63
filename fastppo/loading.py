"""A run directory back to a policy. Reads data only: nothing in the directory is executed."""

from pathlib import Path
from typing import Any

import torch

from fastppo.config import TrainConfig
from fastppo.errors import UsageError
from fastppo.policy.agent import Agent, agent_from_state
from fastppo.policy.networks import ModuleFactory
from fastppo.run.directory import RunDirectory, load_checkpoint


def load_policy(
    run_dir: str | Path,
    checkpoint: str = "best",
    device: torch.device | str = "cpu",
    policy: ModuleFactory | None = None,
) -> Agent:
    """The policy of a finished or running run, normalisation included.

    Args:
        checkpoint: "best" (highest mean episode return) or "last".
        policy: the factory of a network of your own, as `train` was given it.

    Raises:
        UsageError: no run directory, no such checkpoint, a damaged one, or another network than that of the run.
    """
    directory = RunDirectory(Path(run_dir))
    config = TrainConfig.from_json(directory.config)
    path = directory.best if checkpoint == "best" else directory.last
    return agent_from_checkpoint(load_checkpoint(path), config, path, device, policy)


def agent_from_checkpoint(
    state: dict[str, Any],
    config: TrainConfig,
    path: Path,
    device: torch.device | str = "cpu",
    policy: ModuleFactory | None = None,
) -> Agent:
    """The policy in a loaded checkpoint; raises UsageError when it does not hold what `config` describes."""
    try:
        return agent_from_state(state["policy"], config, device, policy)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"{path} does not hold the policy that its config.json describes ({error})") from None

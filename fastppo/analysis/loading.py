"""A run directory back to a policy. Reads data only: nothing in the directory is executed or imported."""

from pathlib import Path
from typing import Any

import torch

from fastppo.config import TrainConfig, read_run_config
from fastppo.errors import UsageError, brief
from fastppo.policy.agent import Agent
from fastppo.policy.codec import agent_from_state
from fastppo.policy.module_policy import ModuleFactory
from fastppo.run.checkpoint_file import load_checkpoint
from fastppo.run.directory import RunDirectory
from fastppo.system.modes import ours


def load_policy(
    run_dir: str | Path,
    checkpoint: str = "best",
    device: torch.device | str = "cpu",
    policy: ModuleFactory | None = None,
) -> Agent:
    """The policy of a finished or running run, normalisation included.

    Safe on a directory from somebody else: config.json and the checkpoint are read as data, checked before use, and refused
    where they are anything else. The environment is not made, nor the module imported that env_id may name: that is done by
    those who play with the policy, `python -m fastppo.evaluate` and `--resume`.

    Args:
        checkpoint: "best" (the policy whose training episodes returned most) or "last".
        policy: the factory of a network of your own, as `train` was given it.

    Raises:
        UsageError: no run directory, no such checkpoint, a damaged one, or another network than that of the run.
    """
    if checkpoint not in ("best", "last"):
        raise UsageError(f'checkpoint must be "best" or "last", got {checkpoint!r}')
    directory = RunDirectory(Path(run_dir))
    config = read_run_config(directory.path)
    path = directory.best if checkpoint == "best" else directory.last
    return agent_from_checkpoint(load_checkpoint(path), config, path, device, policy)


@ours
def agent_from_checkpoint(
    state: dict[str, Any],
    config: TrainConfig,
    path: Path,
    device: torch.device | str = "cpu",
    policy: ModuleFactory | None = None,
) -> Agent:
    """The policy in a loaded checkpoint; raises UsageError when it does not hold what `config` describes."""
    torch.empty(0, device=device)  # a device that is not there is no fault of the file's
    try:
        return agent_from_state(state["policy"], config, device, policy)
    except UsageError as error:
        raise UsageError(f"{path}: {str(error)[:300]}") from None
    except Exception as error:  # what the checks let pass, gymnasium and torch refuse as they please
        raise UsageError(f"{path} does not hold the policy that its config.json describes ({brief(error)})") from None

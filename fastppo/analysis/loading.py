"""Load a policy from a run directory. Reads data only: nothing in the directory is executed or imported."""

from pathlib import Path
from typing import Any

import torch

from fastppo.config import TrainConfig, read_run_config
from fastppo.errors import UsageError, brief
from fastppo.policy.agent import Agent
from fastppo.policy.codec import agent_from_state
from fastppo.policy.module_policy import ModuleFactory, named_factory
from fastppo.run.checkpoint_file import load_checkpoint
from fastppo.run.directory import RunDirectory
from fastppo.run.hub import fetch_run, is_on_hub
from fastppo.system.devices import choose_device
from fastppo.system.modes import ours
from fastppo.system.paths import path_of


def load_policy(
    run_dir: str | Path,
    checkpoint: str = "best",
    device: torch.device | str = "cpu",
    policy: ModuleFactory | None = None,
) -> Agent:
    """The policy of a finished or running run, normalisation included.

    Safe for a directory that is not yours: config.json and the checkpoint are read as data, checked before use, and refused if
    they are invalid. The environment is not made, and the module that env_id may name is not imported. Only
    `python -m fastppo.evaluate` and `--resume` do that, because they play with the policy.

    Args:
        run_dir: the directory, or "hf://owner/name" or "hf://owner/name@revision" of a run on the Hugging Face Hub.
        checkpoint: "best" (the policy with the highest mean return in training, or in --eval-every) or "last".
        device: where it acts; "auto" is the GPU if there is one.
        policy: the factory of your own network, if `train` had one.

    Raises:
        UsageError: no run directory, no such checkpoint or device, a damaged checkpoint, another network than in the run, or
            the Hub cannot be reached.
    """
    run = path_of(run_dir, "run_dir")
    device = choose_device(device)
    directory = fetch_run(run, checkpoint) if is_on_hub(run) else Path(run)
    config = read_run_config(directory)
    path = _path_of(directory, checkpoint)
    return agent_from_checkpoint(load_checkpoint(path), config, path, device, policy)


def load_run(run_dir: Path, config: TrainConfig, checkpoint: str, policy: ModuleFactory | None = None) -> tuple[Agent, int]:
    """A policy of a run with these settings, and the steps that it was trained for. Imports what config.policy names.

    Raises UsageError as `load_policy`, and for a network that cannot be imported.
    """
    path = _path_of(run_dir, checkpoint)
    state = load_checkpoint(path)
    agent = agent_from_checkpoint(state, config, path, policy=policy or named_factory(config.policy))
    return agent, int(state["global_step"])


def _path_of(run_dir: Path, checkpoint: str) -> Path:
    if checkpoint not in ("best", "last"):
        raise UsageError(f'checkpoint must be "best" or "last", got {checkpoint!r}')
    directory = RunDirectory(run_dir)
    return directory.best if checkpoint == "best" else directory.last


@ours
def agent_from_checkpoint(
    state: dict[str, Any],
    config: TrainConfig,
    path: Path,
    device: torch.device | str = "cpu",
    policy: ModuleFactory | None = None,
) -> Agent:
    """The policy in a loaded checkpoint. Raises UsageError if the checkpoint does not fit `config`."""
    try:
        return agent_from_state(state["policy"], config, device, policy)
    except UsageError as error:
        raise UsageError(f"{path}: {str(error)[:300]}") from None
    except Exception as error:  # gymnasium and torch raise anything for data that passes the checks
        raise UsageError(f"{path} does not hold the policy that its config.json describes ({brief(error)})") from None

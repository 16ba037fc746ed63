"""Turn a PPO model of Stable-Baselines3 into a run directory: `python -m fastppo.import_sb3 model.zip --env-id ID`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fastppo.cli import parse, run
from fastppo.config import EnvKwargs, TrainConfig
from fastppo.errors import UsageError
from fastppo.run.files import file_name
from fastppo.system.imports import lasting_imports
from fastppo.system.paths import absolute, current_directory, reading

if TYPE_CHECKING:
    from fastppo.run.directory import RunDirectory
    from fastppo.sb3.import_policy import ImportedPolicy

UNKNOWN = "unknown"  # env_id of a run that was imported without one


@dataclass(frozen=True)
class ImportSb3Config:
    """Turn a PPO or MaskablePPO model of Stable-Baselines3 into a run directory whose policy takes the same actions.

    `evaluate`, `export`, `load_policy` and `--init-from` take the directory; `--resume` does not, since the optimiser's state
    is not imported. The file is read as data: its pickles are never unpickled. Settings come from its JSON text, the network
    from its weights. What has no counterpart here is refused: recurrent policies, several inputs, a features extractor of
    one's own, an actor and a critic of different layers.
    """

    model: Annotated[str, tyro.conf.Positional]
    """The .zip file that PPO.save wrote."""
    env_id: str | None = None
    """The environment, as --env-id of train; it is made once, for its spaces. Default: spaces as the file describes them in
    text, and no environment, so that the run can be loaded, exported and continued, and not evaluated."""
    env_kwargs: EnvKwargs = field(default_factory=dict)
    """Keyword arguments for the environment, as KEY=VALUE."""
    output_dir: str | None = None
    """The run directory to write. Default: runs/<env>__sb3__<time>."""
    vecnormalize: str | None = None
    """Statistics of VecNormalize as a .npz file (see docs/from-sb3.md); none: it normalised rewards only."""


def _main(args: Sequence[str]) -> None:
    settings = parse(ImportSb3Config, args, prog="python -m fastppo.import_sb3")
    place = current_directory()
    output = None if settings.output_dir is None else absolute(settings.output_dir, "--output-dir", place)
    if output is not None:
        with reading():
            if output.exists() and (not output.is_dir() or any(output.iterdir())):
                raise UsageError(f"--output-dir {output} exists and is not empty: choose another")
    with lasting_imports():  # here, so that --help and wrong flags do not wait for it
        from fastppo.run.directory import RunDirectory
        from fastppo.sb3.archive import read_model
        from fastppo.sb3.import_policy import import_policy
        from fastppo.sb3.vec_normalize import read_statistics

    model = read_model(absolute(settings.model, "MODEL", place))
    statistics = read_statistics(model, settings.vecnormalize)
    spaces_of = None if settings.env_id is None else lambda config: _spaces(replace(config, env_kwargs=settings.env_kwargs))
    found = import_policy(model, settings.env_id or UNKNOWN, spaces_of, statistics)
    found = replace(found, config=replace(found.config, env_kwargs=settings.env_kwargs))
    source = f"Stable-Baselines3 {model.version}".strip()
    name = settings.env_id or file_name(Path(settings.model).stem)
    runs = absolute("runs", "--output-dir", place)
    directory = RunDirectory.create(
        None if output is None else str(output), name, "sb3", lambda made: _write(made, found, source), runs, "--output-dir"
    )
    directory.unlock()
    print(f"{directory.path}: the policy of {settings.model}, of {source}, after {found.steps:,} steps")
    if settings.env_id is None:
        print("without --env-id it cannot be evaluated; load_policy, export and --init-from take it")
    else:
        print(f"evaluate: fastppo evaluate {directory.path}")


def _spaces(config: TrainConfig) -> tuple[Any, Any]:
    """The spaces of the environment. Raises UsageError if it cannot be made."""
    from fastppo.envs.factory import make_envs

    envs = make_envs(replace(config, num_envs=1).env_config)
    try:
        return envs.single_observation_space, envs.single_action_space
    finally:
        envs.close()


def _write(directory: "RunDirectory", found: "ImportedPolicy", source: str) -> None:
    """Write config.json, best.pt and summary.json. Raises OSError."""
    import torch

    from fastppo.training.state import PolicySnapshot, checkpoint_of

    zero = torch.zeros((), dtype=torch.float32)
    policy = PolicySnapshot(
        params=found.params,
        obs_moments=found.obs_moments,
        return_moments=found.return_moments,
        return_mean=zero,
        return_std=zero + 1.0,
        iteration=0,
        global_step=found.steps,
        seconds=0.0,
        wide=found.obs.wide,
    )
    made_with = {"imported from": source}
    checkpoint = checkpoint_of(found.network, found.obs_space, found.obs, found.action, made_with, policy)
    directory.write_text(directory.config, found.config.to_json())
    directory.save(directory.best, checkpoint)
    summary = {"env_id": found.config.env_id, "global_step": found.steps, "made_with": made_with}
    directory.write_json(directory.summary, summary)


def console(args: Sequence[str] | None = None) -> int:
    """Entry point: the exit code."""
    return run(_main, sys.argv[1:] if args is None else args)


if __name__ == "__main__":
    sys.exit(console())

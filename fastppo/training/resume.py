"""Begin a run's directory, or go on with it: reopen the directory, check its newest checkpoint, put the state back.

Knows nothing of the loop.
"""

import contextlib
import math
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastppo.analysis.run_groups import setting_text
from fastppo.config import TrainConfig
from fastppo.core.adam import AdamState
from fastppo.errors import UsageError, brief
from fastppo.policy.codec import checked, difference_of_spaces, moments_from_state, weights_from_state
from fastppo.random_streams import Stream, seed_of
from fastppo.run.best import BestPolicy
from fastppo.run.directory import OthersDirectory, RunDirectory
from fastppo.training.reproducibility import differences
from fastppo.training.resumed_settings import MAKING, TRAINED_ON, as_trained, changes, check_resumable
from fastppo.training.setup import Task
from fastppo.training.state import PolicySnapshot, TrainState, snapshot, snapshot_data

Renewal = Literal["made anew", "other"] | None  # the environments: made in another way, or others; None: as they were


def make_directory(task: Task, place: Path, cleanup: contextlib.ExitStack) -> RunDirectory:
    """The directory of a new run with its settings and the checkpoint of iteration 0, locked until `cleanup`.

    place: where the directory goes if the settings name none. Raises UsageError.
    """
    config, ranks = task.config, task.ranks
    directory: RunDirectory | None = None
    refused: UsageError | None = None
    if ranks.is_main:
        fill = partial(fill_directory, config, task.data_of(task.states[0]))
        try:
            directory = RunDirectory.create(config.run_dir, config.env_id, config.seed, fill, place)
            cleanup.callback(directory.unlock)
        except UsageError as error:
            refused = error
    ranks.check(refused)
    path = ranks.agree(None if directory is None else directory.path)
    return directory or OthersDirectory(path or Path())


def fill_directory(config: TrainConfig, start: Mapping[str, Any], directory: RunDirectory) -> None:
    """Write what the run can be resumed from. start: the checkpoint of iteration 0."""
    directory.write_text(directory.config, config.to_json())
    directory.keep(0, start, config.keep_checkpoints)


def reopen(config: TrainConfig, state: TrainState, task: Task, cleanup: contextlib.ExitStack) -> tuple[RunDirectory, list[str]]:
    """Put the state of the run that --resume names back into `state`. The main process reads; the others get what it read.

    Args:
        config: of this run, one of task.configs. state: fresh, the one of task.states that belongs to it.
        cleanup: unlocks the directory.

    Returns:
        The directory, locked, and lines for people on where the run goes on.

    Raises:
        UsageError: the run cannot go on, or not with these settings.
    """
    ranks, fresh = task.ranks, task.data_of(state)
    directory = (RunDirectory if ranks.is_main else OthersDirectory)(Path(config.resume or ""))
    found: tuple[TrainConfig, Path, dict[str, Any], str | None] | None = None
    refused: UsageError | None = None
    try:
        if ranks.is_main:
            before = TrainConfig.from_json(directory.config)
            check_resumable(before, config)
            directory.lock()
            cleanup.callback(directory.unlock)
            found = (before, *directory.newest(kept_only=task.restarts))
    except UsageError as error:
        refused = error
    except OSError as error:
        refused = _not_writable(directory, error)
    ranks.check(refused)
    found = ranks.agree(found)
    assert found is not None
    before, path, checkpoint, damage = found
    try:
        before = as_trained(before, checkpoint)
    except (TypeError, UsageError) as error:
        raise _does_not_fit(path, error) from None
    changed = changes(before, config)
    renewed = renewal_of(changed)
    lost = load_state(state, task, checkpoint, fresh, path, renewed)
    try:
        if changed:  # what the iterations so far were trained with
            directory.write_text(directory.path / f"config-until-{state.iteration}.json", before.to_json())
        directory.write_text(directory.config, config.to_json())
    except OSError as error:
        refused = _not_writable(directory, error)
    ranks.check(refused)
    environments = _continue_environments(state, task.restarts and renewed is None)
    moved = differences(checkpoint["made_with"], fresh["made_with"])
    words = [f"{name} {setting_text(getattr(config, name))}" for name in changed]
    notes = [
        damage,
        f"resuming from iteration {state.iteration}, step {state.global_step}; {environments}",
        *lost,
        f"from here on: {', '.join(words)}" if words else None,
        "another environment: the returns so far do not count, and the search for the best policy starts anew"
        if renewed == "other"
        else None,
        f"different from before, so last bits may differ: {moved}" if moved else None,
        _annealing_note(before, config),
    ]
    return directory, [note for note in notes if note is not None]


def _does_not_fit(path: Path, error: Exception) -> UsageError:
    return UsageError(f"--resume: {path} does not fit the run's config.json ({brief(error)})")


def _not_writable(directory: RunDirectory, error: OSError) -> UsageError:
    return UsageError(f"--resume {directory.path} cannot be written: {error.strerror}")


def _continue_environments(state: TrainState, restarts: bool) -> str:
    """How the environments continue, for people. Unfinished episodes that cannot continue are dropped from the state."""
    if restarts:
        return "the environments restart as they did there, so the run continues as if it had not been interrupted"
    if state.environments is not None:
        return "the environments continue where they were"
    state.forget_running()
    state.return_carry.zero_()
    return "the environments start new episodes"


def _annealing_note(before: TrainConfig, config: TrainConfig) -> str | None:
    """A line for people if the run has a new length and something is annealed over it."""
    switches = {"learning rate": config.anneal_lr, "clip range": config.anneal_clip}
    switches["entropy bonus"] = config.ent_coef_end is not None
    annealed = [name for name, on in switches.items() if on]
    same = (config.total_timesteps, config.num_iterations) == (before.total_timesteps, before.num_iterations)
    if same or not annealed:
        return None
    return f"the run has a new length: {' and '.join(annealed)} annealed to it from this iteration on"


def renewal_of(changed: Collection[str]) -> Renewal:
    """What the changed settings mean for the environments."""
    renewed = TRAINED_ON.intersection(changed)
    return None if not renewed else "made anew" if renewed <= MAKING else "other"


def with_new_environments(checkpoint: Mapping[str, Any], expected: Mapping[str, Any], renewed: Renewal) -> Mapping[str, Any]:
    """The checkpoint with environments that start anew, as many as the fresh state has; with None as it is.

    Raises KeyError or TypeError if it is not a checkpoint.
    """
    if renewed is None:
        return checkpoint
    episodes, best = checkpoint["episodes"], checkpoint["best"]
    begins = torch.zeros_like(expected["best"]["spans"][0]["begins"])
    if renewed == "other":  # its returns say nothing of the other environment
        episodes, best = {**expected["episodes"], "episodes": episodes["episodes"]}, expected["best"]
    running = {key: value for key, value in expected["episodes"].items() if key.startswith("running")}
    novelty = checkpoint["novelty"]
    return {
        **checkpoint,
        "environments": None,
        "novelty": None if novelty is None else {**novelty, "carry": expected["novelty"]["carry"]},
        "return_carry": expected["return_carry"],
        "episodes": {**episodes, **running},
        "best": {**best, "spans": [{**span, "begins": begins} for span in best["spans"]]},
    }


def _completed(checkpoint: Mapping[str, Any], expected: Mapping[str, Any]) -> Mapping[str, Any]:
    """The checkpoint with what an older version did not have; that judged the best policy by the last 100 episodes."""
    added = {"best_evaluation": -math.inf, "learning_rate_factor": 1.0, "novelty": None, "settings": expected["settings"]}
    checkpoint = {**added, **checkpoint}
    if "best" in checkpoint:
        return checkpoint
    return {**checkpoint, "best": {**expected["best"], "score": checkpoint["best_return"]}}


def load_state(
    state: TrainState,
    task: Task,
    checkpoint: Mapping[str, Any],
    expected: Mapping[str, Any],
    path: Path,
    renewed: Renewal = None,
) -> list[str]:
    """Put the result of `state.checkpoint_of` back into a fresh state.

    Args:
        expected: the fresh state's own `checkpoint_of`, whose keys, types and shapes the checkpoint must have.
        path: of the checkpoint, for messages.
        renewed: whether the environments are others than those of the checkpoint.

    Returns:
        What could not be put back, a line each.

    Raises:
        UsageError: the checkpoint is of another run or another program.
    """
    device = state.params.device
    try:
        difference = difference_of_spaces(checkpoint["policy"], task.obs, task.action) if renewed == "other" else None
        if difference is not None:
            raise UsageError(f"--resume {path.parent.parent}: {difference}, so its network does not fit: start a new run")
        params = weights_from_state(checkpoint["policy"], task.network)
        made_on = checkpoint["made_with"]["device"]
        same_device = made_on.partition(":")[0] == device.type
        checkpoint = _completed(checkpoint if same_device else {**checkpoint, "environments": None}, expected)
        checkpoint = with_new_environments(checkpoint, expected, renewed)
        check_alike(expected, checkpoint)
        counts = [checkpoint["iteration"], checkpoint["global_step"], checkpoint["episodes"]["episodes"]]
        if min(counts) < 0:
            raise ValueError("its counters are below 0")
        _load_tensors(state, checkpoint)
        state.params.copy_(params)
        state.episodes.load_state_dict(checkpoint["episodes"])
        state.iteration, state.global_step = checkpoint["iteration"], checkpoint["global_step"]
        state.seconds = checkpoint["seconds"]
        state.best.load_state_dict(checkpoint["best"], partial(snapshot_from, state=state))
        state.best_evaluation = checkpoint["best_evaluation"]
        if renewed == "other":
            state.best, state.best_evaluation = BestPolicy(len(state.return_carry), snapshot(state)), -math.inf
        state.environments = checkpoint["environments"]
        if state.environments is not None:
            torch.Generator(device).set_state(state.environments["generator"])  # refused here, or not at all
        if same_device:
            for name, generator in state.generators.items():
                generator.set_state(checkpoint["generators"][name])
            return []
    except UsageError:
        raise
    except Exception as error:  # torch raises errors of many types for what the checks let pass
        raise _does_not_fit(path, error) from None
    # a generator of another device has another kind of state; the numbers of its start have been used
    for generator in state.generators.values():
        generator.manual_seed(seed_of(generator.initial_seed(), Stream.CONTINUED, state.iteration))
    return [f"random numbers start anew, since those of {made_on} cannot go on on {device}"]


def _load_tensors(state: TrainState, checkpoint: Mapping[str, Any]) -> None:
    """The optimiser's state and the statistics."""
    state.learning_rate_factor = checkpoint["learning_rate_factor"]
    state.novelty = None if state.novelty is None else state.novelty.restored(checkpoint["novelty"])
    policy, adam, params, device = checkpoint["policy"], checkpoint["adam"], state.params, state.params.device
    state.adam = AdamState(**{key: checked(adam[key], f"adam.{key}", params.dtype).to(device) for key in adam})
    state.obs_moments = moments_from_state(policy["obs_moments"], device)
    if state.return_moments is not None:
        moments = moments_from_state({"reward": checkpoint["return_moments"]}, device) or {}
        state.return_moments = moments["reward"]
    for key in ("return_mean", "return_std"):
        setattr(state, key, checked(policy[key], key, torch.float32, ()).to(device))
    state.return_carry = checked(checkpoint["return_carry"], "return_carry", torch.float32).to(device)


def snapshot_from(data: Any, state: TrainState) -> PolicySnapshot:
    """The inverse of `snapshot_data`, for the run of `state`. Raises ValueError for the policy of another run."""
    check_alike(snapshot_data(snapshot(state)), data, "best.policy")
    device = state.params.device
    names = ("params", "return_mean", "return_std")
    named = {name: checked(data[name], f"best.policy.{name}", torch.float32).to(device) for name in names}
    obs_moments = moments_from_state(data["obs_moments"], device)
    rewards = moments_from_state({"reward": data["return_moments"]}, device) if data["return_moments"] else None
    return PolicySnapshot(
        **{
            **data,
            **named,
            "wide": state.wide,
            "obs_moments": obs_moments or None,
            "return_moments": None if rewards is None else rewards["reward"],
        }
    )


_OPEN = ("made_with",)  # packages may have come or gone


def check_alike(expected: Any, given: Any, name: str = "") -> None:
    """Raise ValueError where plain data differs in keys, types, shapes or dtypes. Of lists, only those of tensors."""
    if name in ("generators", "settings") or (name == "environments" and given is None):  # checked where they are used
        return
    if type(expected) is not type(given):
        raise ValueError(f"{name or 'it'} is of type {type(given).__name__}, not {type(expected).__name__}")
    if isinstance(expected, list) and expected and isinstance(expected[0], Tensor):
        expected, given = dict(enumerate(expected)), dict(enumerate(given))
    if isinstance(expected, dict):
        if expected.keys() != given.keys() and name not in _OPEN:
            other = sorted(map(str, expected.keys() ^ given.keys()))
            raise ValueError(f"{name or 'the checkpoint'} has other keys than it should: {', '.join(other)}")
        for key in expected.keys() & given.keys():
            check_alike(expected[key], given[key], f"{name}.{key}".removeprefix("."))
    elif isinstance(expected, Tensor) and (expected.shape, expected.dtype) != (given.shape, given.dtype):
        raise ValueError(f"{name} is {tuple(given.shape)} {given.dtype}, not {tuple(expected.shape)} {expected.dtype}")

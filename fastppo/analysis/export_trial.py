"""Compare an exported file with its policy: random observations, the policy's outputs, and how far the file's outputs differ.

Knows nothing of file formats.
"""

import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Tuple
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from fastppo.analysis.export_formats import NEXT_MEMORY, Arrays
from fastppo.policy.agent import unseen_by_actor

if TYPE_CHECKING:
    from fastppo.policy.agent import Agent
    from fastppo.policy.deployment import DeployedPolicy

ROWS = 256  # observations of the comparison
STEPS = 8  # for a recurrent policy, the observations are sequences of this length
LARGEST_BOUND = 1e3  # a larger bound of an observation counts as no bound: no environment returns 1e38


class TrialStep(NamedTuple):
    """One batch of inputs and the policy's outputs."""

    inputs: Arrays
    episode_start: NDArray[np.bool_]  # (N,), rows whose recurrent state is zero
    outputs: Arrays

    def first_rows(self, rows: int) -> "TrialStep":
        """The same step with fewer rows."""
        inputs, outputs = ({name: x[:rows] for name, x in named.items()} for named in (self.inputs, self.outputs))
        return TrialStep(inputs, self.episode_start[:rows], outputs)


def make_trial(agent: "Agent", rnn_state_size: int) -> list[TrialStep]:
    """ROWS random observations, with masks, and the policy's outputs; STEPS steps for a recurrent policy, else one."""
    rng = np.random.default_rng(0)
    agent = copy.copy(agent)  # the caller's agent keeps its recurrent state
    agent.reset()
    info_mask = agent.obs.info_mask
    steps = STEPS if rnn_state_size else 1
    rows = ROWS // steps
    memory = np.zeros((rows, rnn_state_size), np.float32)
    trial = []
    mask: Any = None
    for number in range(steps):
        obs = _sample(agent.obs_space, rng, rows)
        if info_mask is not None:
            mask = rng.integers(2, size=(rows, *info_mask.shape), dtype=np.int8)  # the dtype of gymnasium's masks
        leaves = (leaf for leaf in agent.obs if leaf.key not in unseen_by_actor(agent.network))
        inputs = {leaf.key: mask if leaf is info_mask else leaf.find(obs) for leaf in leaves}
        episode_start = (np.arange(rows) + number) % 4 == 0  # in one step of four for each row
        agent.reset(episode_start)
        action = agent.act(obs, action_mask=mask)
        outputs = {leaf.key: leaf.find(action) for leaf in agent.action.leaves}
        if agent.rnn_state is not None:
            inputs["memory"] = np.where(episode_start[:, None], np.float32(0), memory)
            memory = agent.rnn_state[:, :rnn_state_size].cpu().numpy()  # the actor's part
            outputs[NEXT_MEMORY] = memory
        trial.append(TrialStep(inputs, episode_start, outputs))
    return trial


def _sample(space: "gym.Space[Any]", rng: np.random.Generator, rows: int) -> Any:
    """A batch of samples with the structure and dtypes of the space."""
    if isinstance(space, Dict):
        return {name: _sample(part, rng, rows) for name, part in space.spaces.items()}
    if isinstance(space, Tuple):
        return tuple(_sample(part, rng, rows) for part in space.spaces)
    if isinstance(space, Box) and np.issubdtype(space.dtype, np.floating):
        low = np.where(space.low < -LARGEST_BOUND, -np.inf, space.low)
        high = np.where(space.high > LARGEST_BOUND, np.inf, space.high)
        space = Box(low, high, dtype=space.dtype.type)
    batch = batch_space(space, rows)
    batch.seed(int(rng.integers(2**31)))
    return batch.sample()


def differences(policy: "DeployedPolicy", trial: list[TrialStep], run: Callable[[Arrays], Arrays]) -> tuple[float, float]:
    """How far the file's actions and recurrent states are from the policy's, on all rows at once and on one: see `_distance`.

    run: computes the outputs of the file from inputs. Its exceptions are not caught.
    """
    answered = [*_answers(run, trial), *_answers(run, [step.first_rows(1) for step in trial])]
    of_actions = max(_action_distance(policy, step, got) for step, got in answered)
    memories = [(step.outputs[NEXT_MEMORY], got[NEXT_MEMORY]) for step, got in answered if NEXT_MEMORY in got]
    return of_actions, max((_distance(expected, got) for expected, got in memories), default=0.0)


def _answers(run: Callable[[Arrays], Arrays], trial: list[TrialStep]) -> Iterator[tuple[TrialStep, Arrays]]:
    """Each step with the file's outputs. The file gets the recurrent state that it returned itself."""
    got: Arrays = {}
    for step in trial:
        inputs = dict(step.inputs)
        if NEXT_MEMORY in got:
            inputs["memory"] = np.where(step.episode_start[:, None], np.float32(0), got[NEXT_MEMORY])
        got = run(inputs)
        yield step, got


def _action_distance(policy: "DeployedPolicy", step: TrialStep, got: Arrays) -> float:
    """How far the file's actions are from the policy's: 0 if they are equal, infinite if they are outside the action space.

    For continuous actions, their `_distance`. For choices, the largest difference of log-probabilities: if rounding alone
    decides between two, either is right.
    """
    of_numbers, same_choices = 0.0, True
    for leaf in policy.action.leaves:
        one, expected = got[leaf.key], step.outputs[leaf.key]
        if one.shape != expected.shape or one.dtype != expected.dtype:
            return float("inf")
        if not all(leaf.space.contains(np.asarray(row)) for row in one):
            return float("inf")
        if leaf.numbers:
            same_choices &= np.array_equal(one, expected)
        else:
            of_numbers = max(of_numbers, _distance(expected, one))
    return of_numbers if same_choices else max(of_numbers, _distance_of_choices(policy, step, got))


def _distance_of_choices(policy: "DeployedPolicy", step: TrialStep, got: Arrays) -> float:
    import torch

    from fastppo.policy.distributions import MultiCategorical, choices, logits_of

    action = policy.action
    family = MultiCategorical(choices(action.distribution, action.size))
    with torch.no_grad():
        logits = logits_of(policy.step({name: torch.from_numpy(x) for name, x in step.inputs.items()})[0])
    best, other = (
        family.log_prob(logits, torch.cat([leaf.chosen(given[leaf.key]) for leaf in action.leaves if leaf.numbers], -1))
        for given in (step.outputs, got)
    )
    return float((best - other).abs().max())


def _distance(expected: NDArray[Any], got: NDArray[Any]) -> float:
    """The largest difference, divided by the largest number if that is above 1; infinite for another shape or dtype."""
    if got.shape != expected.shape or got.dtype != expected.dtype or not np.isfinite(got).all():
        return float("inf")
    wide = expected.astype(np.float64)
    return float(np.abs(got - wide).max() / max(1.0, np.abs(wide).max()))

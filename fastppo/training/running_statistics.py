"""When a rollout enters the running statistics of a run. Their maths is in policy/normalization.py.

They are frozen while a rollout is collected. Between acting and learning it adds its returns, since acting does not depend on
the scale of rewards. It adds its observations after learning. The first rollout adds them before: it acted before anything was
known of them, its actions hardly depended on what it saw, and it learns from normalised observations.
"""

from collections.abc import Mapping

from torch import Tensor

from fastppo.config import TrainConfig
from fastppo.core.losses import Total, alone
from fastppo.policy.normalization import discounted_return, update_moments
from fastppo.system.modes import ours
from fastppo.training.state import TrainState


@ours
def add_observations(
    state: TrainState, rollout: Mapping[str, Tensor], config: TrainConfig, total: Total = alone, *, has_learned: bool
) -> None:
    """Add the observations of a rollout's valid rows, where the state has statistics of them and this is the time.

    Args:
        rollout: (T+1, N / K, ...) of this process.
        total: adds up the sums of all processes.
        has_learned: whether the rollout has been learned from. It is called both before and after.
    """
    is_first = state.iteration == 0 and config.init_from is None  # --init-from brings statistics
    if state.obs_moments is not None and has_learned is not is_first:
        valid = rollout["valid"][:-1].flatten()
        state.obs_moments = {
            key: update_moments(moments, rollout[key][:-1].flatten(0, 1), valid, total)
            for key, moments in state.obs_moments.items()
        }


@ours
def add_returns(state: TrainState, steps: Mapping[str, Tensor], gamma: float) -> None:
    """Add a rollout's discounted returns, where the state has statistics of them.

    steps: (T, N) `reward terminated truncated valid` of all processes.
    """
    if state.return_moments is not None:
        reward, valid = steps["reward"], steps["valid"]
        done = steps["terminated"] | steps["truncated"]
        running, state.return_carry = discounted_return(reward, done, valid, state.return_carry, gamma)
        state.return_moments = update_moments(state.return_moments, running.flatten(), valid.flatten())

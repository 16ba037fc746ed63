"""Fill a rollout from two halves of the environments, of which one steps while the policy acts for the other.

Each half has a StepCollector for its columns of the rollout, so rows, masks, final observations, recurrent states and infos are
written as they are without halves. The noise of a row is the same too. Knows nothing of what steps the environments.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastppo.envs.autoreset import AutoresetEnvs, ResetSeed
from fastppo.errors import resetting
from fastppo.policy.spaces import ActionSpec, ObsSpec
from fastppo.rollout.step_collector import HostCollector, collect_in_turns
from fastppo.rollout.storage import Outcomes, Phases, RnnState
from fastppo.system.tensordicts import TensorDict


class HalvesCollector:
    """A Collector of both halves. It has no `state_dicts`: environments of processes cannot be restored from their state."""

    def __init__(
        self,
        halves: Sequence[AutoresetEnvs],
        rollout: TensorDict,
        obs: ObsSpec,
        action: ActionSpec,
        rnn_state: RnnState | None = None,
    ) -> None:
        """halves: of equal size, whose step is in two parts. rollout: [T+1, N]."""
        self.parts: list[HostCollector] = []
        self.columns: list[slice] = []
        stop = 0
        for half in halves:
            columns = slice(stop, stop := stop + half.num_envs)
            state = None if rnn_state is None else RnnState(rnn_state.start[columns])
            self.parts.append(HostCollector(half, rollout[:, columns], obs, action, state, columns.start))
            self.columns.append(columns)

    def reset(self, seed: ResetSeed) -> None:
        """Reset both halves; environment i with seed + i."""
        assert seed is None or isinstance(seed, int)  # halves are of one seed
        with resetting():
            for part in self.parts:
                part.begin(*part.envs.reset_and_mask(None if seed is None else seed + part.first))

    def collect(self, act: Callable[..., Any], noise: Tensor, cut: bool = False) -> Phases:
        """As Collector.collect, with `act` for one half at a time. The phases leave out what a half does meanwhile."""
        return collect_in_turns(self.parts, act, [noise[:, columns] for columns in self.columns], cut)

    def outcomes(self) -> Outcomes:
        """Rewards and ends of the last rollout, (T, N)."""
        return joined([part.outcomes() for part in self.parts])

    def snapshot(self) -> dict[str, Tensor]:
        """The rollout up to the current step, on the CPU."""
        rows = [part.snapshot() for part in self.parts]
        return {key: torch.cat([row[key] for row in rows], 1) for key in rows[0]}

    def state_dicts(self) -> list[dict[str, Any]] | None:
        """None: these environments cannot be restored from their state."""
        return None

    def load_state_dicts(self, states: Sequence[dict[str, Any]]) -> None:
        """Not supported, since `state_dicts` returns None."""
        raise NotImplementedError


def joined(parts: Sequence[Outcomes]) -> Outcomes:
    """The outcomes of all parts of the environments. A part without a number in its infos has nan."""
    names = [name for name in Outcomes._fields if name != "infos" and getattr(parts[0], name) is not None]
    arrays: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts], -1) for name in names}
    missing = [np.full_like(part.reward, np.nan) for part in parts]
    infos = {
        name: np.concatenate([part.infos.get(name, nan) for part, nan in zip(parts, missing, strict=True)], -1)
        for name in dict.fromkeys(name for part in parts for name in part.infos)
    }
    return Outcomes(**arrays, infos=infos)

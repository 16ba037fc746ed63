"""Which parameters of a run were the best, judged by the returns of its training episodes. Knows nothing of networks or files.

One iteration seldom has enough episodes to judge its parameters, and an episode may last several iterations. So consecutive
iterations form a span until it has enough episodes. An episode counts in each span in proportion to its steps there. The
parameters between two spans get the lower score of the two: after a collapse the second is low, before learning the first is.
If one iteration has enough episodes, it may judge its parameters alone.

The score is the mean minus its standard error, because the highest of many means is mostly luck.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastppo.run.episodes import Finished

MIN_EPISODES = 10  # needed to judge a policy, half of them in each of two spans
ALONE = 3.0  # standard errors below the mean for a single iteration: there are many of them, and no second span confirms one
MAX_UNKNOWN = 0.1  # share of a span's episodes, by weight, that may be unfinished when it is judged
MAX_WAITING = 2  # policies in memory that are not judged yet

Policy = TypeVar("Policy")


@dataclass
class Span(Generic[Policy]):
    """Consecutive iterations: the policy of the first one, and moments of the returns of their episodes."""

    policy: Policy | None  # None once it is judged
    begins: NDArray[np.int64]  # (N,) length of each environment's unfinished episode when the span began
    iterations: int = 0
    weight: float = 0.0  # sum of the episodes' shares in the span
    squares: float = 0.0  # sum of the squared shares
    mean: float = 0.0  # weighted mean of the returns
    deviation: float = 0.0  # weighted sum of squared differences from the mean

    def add(self, returns: NDArray[np.float64], shares: NDArray[np.float64]) -> None:
        """Add episodes, (F,) each (Chan, Golub and LeVeque, 1979, pairwise combination of moments)."""
        weight = float(shares.sum())
        if weight > 0.0:
            mean = float(shares @ returns) / weight
            share = weight / (self.weight + weight)
            self.deviation += float(shares @ (returns - mean) ** 2) + (mean - self.mean) ** 2 * self.weight * share
            self.mean += (mean - self.mean) * share
            self.weight += weight
            self.squares += float(shares @ shares)

    def bound(self, errors: float) -> float:
        """The mean minus `errors` standard errors; -inf with one episode or less."""
        number = self.weight**2 / self.squares if self.squares > 0.0 else 0.0  # effective number of episodes
        if number <= 1.0:
            return -math.inf
        return self.mean - errors * math.sqrt(self.deviation / self.weight / (number - 1.0))


class BestPolicy(Generic[Policy]):
    """Finds the best policy so far, iteration by iteration. Keeps at most MAX_WAITING unjudged policies."""

    def __init__(self, num_envs: int, policy: Policy) -> None:
        """policy: the one that acts in the first iteration."""
        self.score = -math.inf  # of the best policy; -inf: none was judged yet
        self.spans: list[Span[Policy]] = [Span(policy, np.zeros(num_envs, np.int64))]  # the last one is unfinished

    def update(self, finished: Finished, lengths: NDArray[np.int64], next_policy: Callable[[], Policy]) -> Policy | None:
        """Account for one iteration.

        Args:
            finished: the episodes that ended in it. lengths: (N,) steps of those unfinished after it.
            next_policy: returns a copy of the policy that acts in the next iteration.

        Returns:
            The best policy if it has changed, else None.
        """
        span = self.spans[-1]
        span.iterations += 1
        self._share_out(finished)
        for one in self.spans:  # restarted environments have dropped their unfinished episodes
            np.minimum(one.begins, lengths, out=one.begins)
        best = self._judge(lengths, self.spans[:-1])
        waiting = sum(one.policy is not None for one in self.spans)
        if waiting < MAX_WAITING and span.weight >= (MIN_EPISODES if span.iterations == 1 else MIN_EPISODES / 2):
            self.spans.append(Span(next_policy(), lengths.copy()))
            found = self._judge(lengths, self.spans[:-1])
            best = best if found is None else found
        return best

    def finish(self) -> Policy | None:
        """At the end of training: judge the remaining policies by the finished episodes. Returns as `update`.

        The spans stay as they are: a run that goes on for more steps judges these policies again, by whole episodes.
        """
        return self._judge(None, [replace(span) for span in self.spans])

    def forget_running(self) -> None:
        """Drop unfinished episodes: the environments start new ones."""
        for span in self.spans:
            span.begins[:] = 0

    def _share_out(self, finished: Finished) -> None:
        """Add each episode to the spans that it was played in."""
        if not len(finished.env):
            return
        begins = np.stack([span.begins[finished.env] for span in self.spans] + [finished.lengths])  # (spans + 1, F)
        again = np.ones(len(finished.env), bool)
        again[np.unique(finished.env, return_index=True)[1]] = False
        begins[:-1, again] = 0  # only an environment's first finished episode began before this iteration
        shares = np.diff(begins, axis=0) / finished.lengths
        for span, share in zip(self.spans, shares, strict=True):
            span.add(finished.returns, share)
            span.begins[finished.env] = 0

    def _judge(self, lengths: NDArray[np.int64] | None, spans: list[Span[Policy]]) -> Policy | None:
        """Judge the policies of `spans` with enough finished episodes. lengths: (N,) of unfinished ones; None: ignore them."""
        best = None
        for number, span in enumerate(spans):
            if span.policy is None:
                continue
            if lengths is not None:
                under_way = self.spans[number + 1].begins - span.begins  # (N,) steps in this span
                if (under_way / np.maximum(lengths, 1)).sum() > MAX_UNKNOWN * span.weight:
                    break
            policy, span.policy = span.policy, None
            score = self._score(number)
            if score > -math.inf and score >= self.score:
                self.score, best = score, policy
        judged = sum(span.policy is None for span in self.spans)
        del self.spans[: max(judged - 1, 0)]  # the last judged span is still needed to judge the next one
        return best

    def _score(self, number: int) -> float:
        """The score of the policy that began that span; -inf with too few episodes."""
        span, score = self.spans[number], -math.inf
        if span.iterations == 1 and span.weight >= MIN_EPISODES:
            score = span.bound(ALONE)
        if number > 0:
            judges = self.spans[number - 1 : number + 1]
            if min(one.weight for one in judges) >= MIN_EPISODES / 2:
                score = max(score, min(one.bound(1.0) for one in judges))
        return score

    def state_dict(self, data_of: Callable[[Policy], Any]) -> dict[str, Any]:
        """As plain data. data_of: turns a policy into plain data."""
        spans = [
            {
                **vars(span),
                "policy": None if span.policy is None else data_of(span.policy),
                "begins": torch.from_numpy(span.begins.copy()),
            }
            for span in self.spans
        ]
        return {"score": self.score, "spans": spans}

    def load_state_dict(self, state: Mapping[str, Any], policy_of: Callable[[Any], Policy]) -> None:
        """Restore a `state_dict`. Raises ValueError, TypeError or KeyError if it is not one."""
        shape, kinds = self.spans[-1].begins.shape, {"iterations": int, "begins": Tensor, "policy": object}
        spans: list[Span[Policy]] = []
        for data in state["spans"]:
            for name in Span.__dataclass_fields__:
                if not isinstance(data[name], kinds.get(name, float)):
                    raise ValueError(f"best.spans.{name} is of type {type(data[name]).__name__}")
            begins = data["begins"].numpy()
            if begins.dtype != np.int64 or begins.shape != shape:
                raise ValueError(f"best.spans.begins is {begins.shape} {begins.dtype}, not {shape} int64")
            policy = None if data["policy"] is None else policy_of(data["policy"])
            spans.append(Span(**{**data, "policy": policy, "begins": begins.copy()}))
        if not 1 <= len(spans) <= MAX_WAITING + 1:
            raise ValueError(f"best.spans has {len(spans)} entries")
        self.spans, self.score = spans, float(state["score"])

"""Which parameters of a run were the best, judged by the episodes that they played. Knows nothing of networks or files.

One iteration seldom has enough episodes to judge its parameters by, and an episode may span several iterations. So iterations
are joined to spans until enough episodes are known, and each episode counts in each span by the share of its steps that were
played in it. The parameters between two spans are judged by the worse of the two: after a collapse the second one is bad, and
before anything was learned the first one. Parameters whose own iteration has enough episodes may be judged by it alone.

A score is a mean minus its standard error, not a mean: the highest of many means is mostly luck.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastppo.run.episodes import Finished

MIN_EPISODES = 10  # that judge a policy; half of them in each of two spans
ALONE = 3.0  # standard errors off the mean of a single iteration, which is one of more and compared with no other
MAX_UNKNOWN = 0.1  # of a span's episodes, by weight, that may still be under way when it is judged
MAX_WAITING = 2  # policies kept in memory that are not judged yet

Policy = TypeVar("Policy")


@dataclass
class Span(Generic[Policy]):
    """Consecutive iterations: the policy that acted in the first of them, and moments of the returns of their episodes."""

    policy: Policy | None  # None once it is judged
    begins: NDArray[np.int64]  # (N,) steps that each environment's episode under way had when the span began
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
        """The mean minus so many of its standard errors; -inf of one episode or less."""
        number = self.weight**2 / self.squares if self.squares > 0.0 else 0.0  # effective number of episodes
        if number <= 1.0:
            return -math.inf
        return self.mean - errors * math.sqrt(self.deviation / self.weight / (number - 1.0))


class BestPolicy(Generic[Policy]):
    """Says after each iteration whether a better policy than before is known. Keeps at most MAX_WAITING policies."""

    def __init__(self, num_envs: int, policy: Policy) -> None:
        """policy: that acts in the first iteration."""
        self.score = -math.inf  # of the best one; -inf: none could be judged
        self.spans: list[Span[Policy]] = [Span(policy, np.zeros(num_envs, np.int64))]  # the last one is under way

    def update(self, finished: Finished, lengths: NDArray[np.int64], next_policy: Callable[[], Policy]) -> Policy | None:
        """Account for one iteration.

        Args:
            finished: the episodes that ended in it. lengths: (N,) steps of those under way after it.
            next_policy: a copy of what acts in the next iteration.

        Returns:
            The best policy where it is another one than before.
        """
        span = self.spans[-1]
        span.iterations += 1
        self._share_out(finished)
        for one in self.spans:  # where environments were restarted, the episodes under way are forgotten
            np.minimum(one.begins, lengths, out=one.begins)
        best = self._judge(lengths, self.spans[:-1])
        waiting = sum(one.policy is not None for one in self.spans)
        if waiting < MAX_WAITING and span.weight >= (MIN_EPISODES if span.iterations == 1 else MIN_EPISODES / 2):
            self.spans.append(Span(next_policy(), lengths.copy()))
            found = self._judge(lengths, self.spans[:-1])
            best = best if found is None else found
        return best

    def finish(self) -> Policy | None:
        """At the end: judge what is left by the episodes that are known; the best policy where it is another one."""
        return self._judge(None, self.spans)

    def forget_running(self) -> None:
        """Episodes under way end without counting: the environments start new ones."""
        for span in self.spans:
            span.begins[:] = 0

    def _share_out(self, finished: Finished) -> None:
        """Add episodes to the spans that their steps were played in."""
        if not len(finished.env):
            return
        begins = np.stack([span.begins[finished.env] for span in self.spans] + [finished.lengths])  # (spans + 1, F)
        again = np.ones(len(finished.env), bool)
        again[np.unique(finished.env, return_index=True)[1]] = False
        begins[:-1, again] = 0  # all but an environment's first episode began in this iteration
        shares = np.diff(begins, axis=0) / finished.lengths
        for span, share in zip(self.spans, shares, strict=True):
            span.add(finished.returns, share)
            span.begins[finished.env] = 0

    def _judge(self, lengths: NDArray[np.int64] | None, spans: list[Span[Policy]]) -> Policy | None:
        """Judge the policies of `spans` whose episodes are known. lengths: (N,), of those under way; None: forget them."""
        best = None
        for number, span in enumerate(spans):
            if span.policy is None:
                continue
            if lengths is not None:
                under_way = self.spans[number + 1].begins - span.begins  # steps in this span
                if (under_way / np.maximum(lengths, 1)).sum() > MAX_UNKNOWN * span.weight:
                    break
            policy, span.policy = span.policy, None
            score = self._score(number)
            if score > -math.inf and score >= self.score:
                self.score, best = score, policy
        judged = sum(span.policy is None for span in self.spans)
        del self.spans[: max(judged - 1, 0)]  # the last one judged is still to judge the next one
        return best

    def _score(self, number: int) -> float:
        """The score of the policy that acted first in that span; -inf where too few episodes judge it."""
        span, score = self.spans[number], -math.inf
        if span.iterations == 1 and span.weight >= MIN_EPISODES:
            score = span.bound(ALONE)
        if number > 0:
            judges = self.spans[number - 1 : number + 1]
            if min(one.weight for one in judges) >= MIN_EPISODES / 2:
                score = max(score, min(one.bound(1.0) for one in judges))
        return score

    def state_dict(self, data_of: Callable[[Policy], Any]) -> dict[str, Any]:
        """As plain data. data_of: a policy as such."""
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
        """Take up `state_dict`'s result. Raises ValueError, TypeError or KeyError for something else."""
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
            raise ValueError(f"best.spans are {len(spans)}")
        self.spans, self.score = spans, float(state["score"])

"""Says why a run does not learn, where its metrics show a reason, and the flag that helps. Knows metrics and settings only."""

import math
from collections.abc import Mapping

from torch import Tensor

from fastppo.config import TrainConfig
from fastppo.policy.spaces import ActionSpec

PATIENCE = 10  # iterations in a row that show the reason
STARVED = 500.0  # factor over --max-grad-norm of a gradient of which nothing is left for the policy
STILL = 1e-7  # KL estimate of an update that changes nothing
GONE = 0.02  # share of the first entropy
ANNEALED = 0.8  # progress after which small changes are meant
AT_BOUNDS = 0.9  # share of the numbers in actions


class Diagnosis:
    """Watches the metrics of a run whose returns do not rise. Each remark is made once."""

    def __init__(self, config: TrainConfig, is_discrete: bool) -> None:
        self._config, self._is_discrete = config, is_discrete
        self._first: Mapping[str, float] | None = None  # the first row after an episode has ended
        self._seen: dict[str, int] = {}  # by reason: iterations in a row
        self._said: set[str] = set()

    def update(self, row: Mapping[str, float], progress: float, at_bounds: float = 0.0) -> list[str]:
        """Lines for the user after an iteration. at_bounds: share of the numbers in continuous actions that were clipped."""
        if self._first is None and math.isfinite(row["episodic_return_mean"]):
            self._first = row
        reasons = {} if self._has_risen(row) else self._reasons(row, progress, at_bounds)
        self._seen = {name: self._seen.get(name, 0) + 1 for name in reasons}
        new = [name for name, count in self._seen.items() if count >= PATIENCE and name not in self._said]
        self._said.update(new)
        return [f"not learning? {reasons[name]}" for name in new]

    def _has_risen(self, row: Mapping[str, float]) -> bool:
        return self._first is not None and row["episodic_return_mean"] > self._first["episodic_return_mean"]

    def _reasons(self, row: Mapping[str, float], progress: float, at_bounds: float) -> dict[str, str]:
        """What the iteration shows, by name."""
        config, found = self._config, {}
        norm, limit = row["grad_norm"], config.max_grad_norm
        if norm > STARVED * limit and not config.norm_reward:
            found["starved"] = (
                f"a value loss of {row['value_loss']:.3g} makes the gradient {norm:.3g} long, which is clipped to {limit:g}, "
                "and leaves nothing for the policy: --norm-reward scales the rewards"
            )
        if row["approx_kl"] < STILL and progress < ANNEALED:
            found["still"] = f"updates do not change the policy (KL {row['approx_kl']:.1g}): raise --learning-rate"
        first = self._first["entropy"] if self._first is not None else math.nan
        if self._is_discrete and row["entropy"] < GONE * first:
            found["gone"] = f"the policy always takes the same actions (entropy {row['entropy']:.1g}): raise --ent-coef"
        if at_bounds > AT_BOUNDS:
            found["bounds"] = (
                f"{at_bounds:.0%} of the actions are clipped to their bounds: --rescale-action, or --squash-actions"
            )
        return found


def share_at_bounds(action: ActionSpec, stored: Tensor) -> float:
    """The share of the numbers in the actions of a rollout, (T, N, C), that a Box clips to its bounds; 0 for other spaces."""
    (leaf, *others) = action.leaves
    if others or leaf.numbers or action.num_logits or leaf.to_bounds != "clip":
        return 0.0
    clipped = (stored < leaf.low.to(stored)) | (stored > leaf.high.to(stored))
    return clipped.float().mean().item()  # sync: once in ten iterations

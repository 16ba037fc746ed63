"""Every metric of an iteration, once and in order: name, tag, text, how seeds combine, place in the live panel.

This list decides the columns of metrics.csv, the tags of TensorBoard and trackers, the cells of the panel, the table in
REFERENCE.md and the joint row of many seeds. The values come from training/training_run.py; those of the update come from
core, under the names they have here.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

Row = Mapping[str, int | float]
EVALUATION = "eval_return_mean"  # the column of --eval-every


class Metric(NamedTuple):
    """One metric of an iteration."""

    name: str
    """Column of metrics.csv."""
    tag: str | None
    """Name in TensorBoard and trackers, CleanRL's where it has one; None for the axes that the others are drawn over."""
    text: str
    """Its row in REFERENCE.md."""
    seeds: Literal["mean", "sum", "max"] = "mean"
    """How the values of several seeds become one."""
    label: str = ""
    """Its name in the live panel."""
    cell: tuple[int, int] | None = None
    """Its line and column in the live panel; None where that does not show it."""
    rare: bool = False
    """Whether it is there with some settings only, and nan in most iterations, in which logs leave it out."""


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "iteration", None, "Rollouts collected and learned from since the run began.", "max", label="iteration", cell=(1, 0)
        ),
        Metric(
            "global_step",
            None,
            "Transitions so far: steps of all environments, autoreset steps not counted.",
            "sum",
            label="step",
            cell=(0, 0),
        ),
        Metric("seconds", "time/seconds", "Time of all iterations so far, with logging and with those before a --resume."),
        Metric("sps", "charts/SPS", "Transitions per second over the last 10 iterations.", "sum", label="SPS", cell=(5, 2)),
        Metric(
            "episodic_return_mean",
            "charts/episodic_return",
            "Mean undiscounted return of the last 100 finished episodes, in the environment's rewards; nan before the first.",
        ),
        Metric(
            "episodic_length_mean",
            "charts/episodic_length",
            "Mean length of these episodes, in steps.",
            label="length",
            cell=(3, 0),
        ),
        Metric("episodes", "charts/episodes", "Episodes finished since the run began.", "sum", label="episodes", cell=(2, 0)),
        Metric("terminations", "charts/terminations", "Steps of this iteration that terminated an episode.", "sum"),
        Metric("truncations", "charts/truncations", "Steps of this iteration that truncated an episode.", "sum"),
        Metric(
            "loss",
            "losses/loss",
            "policy_loss + vf_coef * value_loss - ent_coef * entropy.",
            label="loss",
            cell=(5, 0),
        ),
        Metric(
            "policy_loss",
            "losses/policy_loss",
            "-E[min(r A, clip(r, 1 - c, 1 + c) A)]. This and the rows down to clipfrac are means over the updates.",
            label="policy loss",
            cell=(0, 1),
        ),
        Metric(
            "value_loss",
            "losses/value_loss",
            "E[(V - V_target)^2], or clipped with --clip-vloss. In units of normalised rewards with --norm-reward.",
            label="value loss",
            cell=(1, 1),
        ),
        Metric(
            "entropy",
            "losses/entropy",
            "Mean entropy of the policy's distribution, in nats.",
            label="entropy",
            cell=(2, 1),
        ),
        Metric(
            "approx_kl",
            "losses/approx_kl",
            "E[(r - 1) - log r]: estimate of the KL divergence from the policy that collected the rollout.",
            label="approx kl",
            cell=(3, 1),
        ),
        Metric(
            "clipfrac",
            "losses/clipfrac",
            "Share of transitions whose ratio r was outside the clip range.",
            label="clip fraction",
            cell=(4, 1),
        ),
        Metric(
            "explained_variance",
            "losses/explained_variance",
            "1 - Var[V_target - V] / Var[V_target] before the update: 1 is perfect, 0 as good as a constant.",
            label="explained var",
            cell=(5, 1),
        ),
        Metric("grad_norm", "losses/grad_norm", "2-norm of the gradient before clipping, mean over the updates."),
        Metric(
            "updates",
            "charts/updates",
            "Minibatches that moved the parameters: all of them, or fewer after a stop by --target-kl.",
            "sum",
        ),
        Metric(
            "learning_rate",
            "charts/learning_rate",
            "Adam's step size in this iteration.",
            label="learning rate",
            cell=(4, 0),
        ),
        Metric(
            "env_share",
            "time/env_share",
            "Share of the iteration's time spent in the environments' steps.",
            label="env",
            cell=(0, 2),
        ),
        Metric(
            "act_share",
            "time/act_share",
            "Share spent on choosing actions; with environments on the device it is part of env_share.",
            label="act",
            cell=(1, 2),
        ),
        Metric(
            "learn_share",
            "time/learn_share",
            "Share spent on learning. The rest is logging, evaluations, checkpoints, statistics and display.",
            label="learn",
            cell=(2, 2),
        ),
        Metric(
            EVALUATION,
            "eval/episodic_return",
            "With --eval-every: mean return of the evaluation after this iteration. Empty in other iterations.",
            rare=True,
        ),
        Metric(
            "eval_return_std", "eval/episodic_return_std", "Standard deviation of the returns of that evaluation.", rare=True
        ),
    )
}


RARE = frozenset(metric.name for metric in METRICS.values() if metric.rare)
PART = "episodic_return_"  # of the names of further columns, one for each part of a reward that is a weighted sum
INFO = "info_"  # of the names of columns for what the environments say in their infos


def part_name(index: int) -> str:
    """The column with the mean return of one part of the reward."""
    return f"{PART}{index}"


def info_name(name: str) -> str:
    """The column with the mean of a number in the environments' infos."""
    return f"{INFO}{name}"


def is_taken(name: str) -> bool:
    """Whether a column has that name already, or may have it."""
    return name in METRICS or name.startswith((PART, INFO))


def tag_of(name: str) -> str | None:
    """The tag of a column. What a callback records has the tag that it was given."""
    if name in METRICS:
        return METRICS[name].tag
    if name.startswith(PART):
        return f"charts/{name}"
    return f"info/{name.removeprefix(INFO)}" if name.startswith(INFO) else name if "/" in name else f"custom/{name}"


def may_be_empty(name: str) -> bool:
    """Whether a column has no value in some rows: rare metrics, what environments say, and what callbacks record."""
    return name in RARE or not (name in METRICS or name.startswith(PART))


def infos_said(row: Row) -> list[str]:
    """What the environments' infos say, for people: ["is_success 0.45"]."""
    return [f"{name.removeprefix(INFO)} {value:.4g}" for name, value in row.items() if name.startswith(INFO)]


def known(row: Row) -> dict[str, int | float]:
    """The row without the metrics that have no value in this iteration."""
    return {name: value for name, value in row.items() if math.isfinite(value) or not may_be_empty(name)}


def ordered_row(values: Row) -> dict[str, int | float]:
    """The values in the order of METRICS, then the parts of the reward; rare ones may be missing.

    Raises ValueError if another one is missing, or one is unknown.
    """
    names = [name for name in METRICS if name not in RARE or name in values]
    names += [part_name(index) for index in range(len(values) - len(names))]
    if values.keys() != set(names):
        raise ValueError(f"not the metrics of an iteration: {sorted(values.keys() ^ set(names))}")
    return {name: values[name] for name in names}


def joint_row(rows: Sequence[Row]) -> dict[str, int | float]:
    """One row from those of several seeds, each metric combined as METRICS says."""
    combine: dict[str, Callable[[Sequence[float]], int | float]] = {"mean": _mean, "sum": sum, "max": max}
    names = dict.fromkeys(name for row in rows for name in row)
    how = {name: METRICS[name].seeds if name in METRICS else "mean" for name in names}
    return {name: combine[how[name]]([row.get(name, math.nan) for row in rows]) for name in how}


def _mean(values: Sequence[float]) -> float:
    """The mean of the finite values; nan where there are none."""
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan

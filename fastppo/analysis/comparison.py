"""Compare settings by the last returns of their runs: performance profiles and probability of improvement.

The views of rliable (Agarwal et al. 2021, https://arxiv.org/abs/2108.13264), for each environment by itself, so that no score
has to be normalised. Knows nothing of files or command lines.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fastppo.analysis.curves import LABELS, add_legend, legend_columns, looks, plain_tick
from fastppo.analysis.run_groups import CURVE_RESAMPLES, MIN_FOR_INTERVAL, POINTS, Group, cut
from fastppo.analysis.statistics import bootstrap_interval, improvement, improvement_interval, interquartile_mean
from fastppo.errors import UsageError
from fastppo.system.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAME_LETTERS = 30  # of a setting beside its interval


def last_values(group: Group, metric: str) -> NDArray[np.float64]:
    """The last value of a column in each run of the group that has any, (S,)."""
    series = (run.series("global_step", metric)[1] for run in group.runs)
    return np.array([values[-1] for values in series if len(values)])


def comparable(groups: Sequence[Group], metric: str) -> dict[str, list[Group]]:
    """By environment, the groups whose runs have a value, best first: by interquartile mean.

    Raises UsageError if no environment has two.
    """
    having = [group for group in groups if len(last_values(group, metric))]
    environments: dict[str, list[Group]] = {}
    for group in sorted(having, key=lambda group: -interquartile_mean(last_values(group, metric))):
        environments.setdefault(group.env_id, []).append(group)
    compared = {env_id: here for env_id, here in environments.items() if len(here) > 1}
    if not compared:
        raise UsageError(
            f"--compare needs runs of two settings in the same environment, with values of {metric}: "
            "name their directories, or the one that holds them (runs)"
        )
    return compared


def draw_comparison(groups: Sequence[Group], metric: str) -> "Figure":
    """A figure with a row for each environment: performance profiles, and how probably the best setting is the better one.

    Colours are those of the page of curves. Raises UsageError as `comparable`.
    """
    from matplotlib.figure import Figure

    environments, looked = comparable(groups, metric), looks(groups)
    legends = {env_id: legend_columns(here) for env_id, here in environments.items()}
    heights = [3.9 + 0.22 * -(-len(here) // legends[env_id]) for env_id, here in environments.items()]
    figure = Figure(figsize=(10, sum(heights) + 0.3), layout="constrained")
    blocks = figure.subfigures(len(environments), 1, height_ratios=heights, squeeze=False)[:, 0]
    for block, (env_id, here) in zip(blocks, environments.items(), strict=True):
        block.suptitle(printable(env_id)[:100], fontsize=12, weight="bold", parse_math=False)
        profiles, intervals = block.subplots(1, 2)
        _draw_profiles(profiles, here, metric, looked)
        _draw_improvements(intervals, here, metric, looked)
        add_legend(block, here, looked, legends[env_id])
    figure.supxlabel(
        "last value of each run   shaded, bars: 95 % stratified bootstrap intervals, from three seeds on", fontsize=8
    )
    return figure


def _draw_profiles(axes: "Axes", groups: Sequence[Group], metric: str, looked: dict[str, tuple[str, str]]) -> None:
    """The share of runs above each value: the higher the curve, the better."""
    scores = [last_values(group, metric) for group in groups]
    low, high = min(map(np.min, scores)), max(map(np.max, scores))
    margin = 0.02 * (high - low) or 1.0
    grid = np.linspace(low - margin, high + margin, POINTS)
    for group, values in zip(groups, scores, strict=True):
        colour, dashes = looked[group.label]
        above = (values > grid[:, None]).astype(float)  # (P, S)
        axes.step(grid, above.mean(-1), where="post", color=colour, linestyle=dashes, linewidth=2.2)
        if len(values) >= MIN_FOR_INTERVAL:
            lower, upper = bootstrap_interval(above, CURVE_RESAMPLES, lambda rows: rows.mean(-1))
            axes.fill_between(grid, lower, upper, step="post", color=colour, alpha=0.15, linewidth=0)
    axes.set_title("performance profile: share of runs above", fontsize=10)
    axes.set_xlabel(printable(LABELS.get(metric, metric)), parse_math=False)
    axes.set_ylim(-0.03, 1.03)
    axes.xaxis.set_major_formatter(plain_tick)
    _plain(axes)


def _draw_improvements(axes: "Axes", groups: Sequence[Group], metric: str, looked: dict[str, tuple[str, str]]) -> None:
    """How probably a run of the best setting ends above one of each other."""
    best, *others = groups
    scores = last_values(best, metric)
    for index, other in enumerate(others):
        colour = looked[other.label][0]
        values = last_values(other, metric)
        if min(len(scores), len(values)) >= MIN_FOR_INTERVAL:
            axes.plot(
                improvement_interval(scores, values, CURVE_RESAMPLES), [index, index], color=colour, linewidth=7, alpha=0.35
            )
        axes.plot(improvement(scores, values), index, marker="o", color=colour, markersize=7)
    axes.axvline(0.5, color="#555555", linestyle=":", linewidth=1)
    axes.set_yticks(range(len(others)), [cut(printable(other.label), NAME_LETTERS) for other in others], parse_math=False)
    axes.set_ylim(len(others) - 0.5, -0.5)
    axes.set_xlim(-0.03, 1.03)
    axes.set_title("probability of improvement", fontsize=10)
    axes.set_xlabel(f"P({cut(printable(best.label), NAME_LETTERS)} > this)", parse_math=False)
    _plain(axes)


def _plain(axes: "Axes") -> None:
    axes.grid(alpha=0.13)
    axes.spines[["top", "right"]].set_visible(False)


def improvement_lines(groups: Sequence[Group], metric: str) -> list[str]:
    """A line for the user on each environment: how probably the best setting is better than the second.

    Raises UsageError as `comparable`.
    """
    lines = []
    for env_id, (best, second, *_) in comparable(groups, metric).items():
        scores, values = last_values(best, metric), last_values(second, metric)
        interval = ""
        if min(len(scores), len(values)) >= MIN_FOR_INTERVAL:
            interval = " (95 % {:.2f} to {:.2f})".format(*improvement_interval(scores, values, CURVE_RESAMPLES))
        likely = f"with probability {improvement(scores, values):.2f}{interval}"
        lines.append(f"{env_id}: {best.label} ends above {second.label} {likely}")
    return lines

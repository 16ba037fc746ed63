"""What each setting is worth on top of the presets: `python benchmarks/ablation.py --results ablation.jsonl`.

Each variant is one change of an environment's own preset. Two stages: `quick` environments, then `mujoco` ones, which are
EnvPool's. A run is the user's own command in a fresh process, with one thread; its result is the evaluation of its best model.
Runs that the results file holds already are not repeated. Seeds start at 101: presets are chosen with this script, and results
are shown on other seeds. Prints a table and, as the last line, one JSON object.
"""

import functools
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import learning
import numpy as np
import tyro
from numpy.typing import NDArray
from run_queue import Name, finished, run_missing

from fastppo.analysis.statistics import INTERVAL, RESAMPLES, interquartile_mean

Scores = NDArray[np.float64]
NAMES = ("variant", "env_id", "seed")  # of a run, in the results file


class Task(NamedTuple):
    """An environment: its flags, and the returns that count as 0 (random actions) and 1 (the best known, published or ours)."""

    flags: str
    random: float
    best: float


STAGES: Mapping[str, Mapping[str, Task]] = {
    "quick": {
        "CartPole-v1": Task("--backend envpool --total-timesteps 50k", 22, 500),
        "Acrobot-v1": Task("--backend envpool --total-timesteps 200k", -500, -73.5),
        "MountainCar-v0": Task("--backend envpool --total-timesteps 500k", -200, -110.4),
        "MountainCarContinuous-v0": Task("--backend envpool --total-timesteps 50k", -33, 94.6),
        "Pendulum-v1": Task("--backend envpool --total-timesteps 100k", -1221, -150),
        "LunarLander-v3": Task("--backend envpool --total-timesteps 300k", -178, 262.7),
    },
    "mujoco": {
        "HalfCheetah-v5": Task("--backend envpool --preset mujoco", -280, 5819),
        "Ant-v4": Task("--backend envpool --preset mujoco", -60, 3258),  # no contact forces, as in the published runs
        "Hopper-v5": Task("--backend envpool --preset mujoco", 18, 3130),
        "Walker2d-v5": Task("--backend envpool --preset mujoco", 2, 3768),
    },
}
BASE = "preset"
VARIANTS: Mapping[str, str] = {
    BASE: "",
    "recomputed advantages": "--recompute-advantage",
    "no recomputed advantages": "--no-recompute-advantage",
    "learning rate by KL 0.01": "--desired-kl 0.01",
    "learning rate not annealed": "--no-anneal-lr",
    "entropy bonus 0.01 to 0": "--ent-coef 0.01 --ent-coef-end 0",
    "layer normalisation": "--layer-norm",
    "no layer normalisation": "--no-layer-norm",
    "layer normalisation, no recomputed advantages": "--layer-norm --no-recompute-advantage",
    "torch's initial weights": "--init torch",
    "advantages not standardised": "--no-norm-adv",
    "value loss clipped": "--clip-vloss",
    "value loss not clipped": "--no-clip-vloss",
    "hidden layers of 256": "--hidden-sizes 256 256",
}


@dataclass(frozen=True)
class AblationConfig:
    """Train with each variant of the presets; the last line is one JSON object."""

    results: Path
    """A file with a line for each finished run, to which new ones are added."""
    stage: Literal["quick", "mujoco"] = "quick"
    """Which environments."""
    environments: tuple[str, ...] | None = None
    """Only these of the stage."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Which changes; the preset as it is always runs too."""
    seeds: tuple[int, ...] = (101, 102, 103)
    """One run each."""
    jobs: int = 1
    """Runs at once."""
    picture: Path | None = None
    """Draw the gains to this PNG."""


def run(variant: str, env_id: str, seed: int, stage: str) -> dict[str, Any]:
    """What learning.py says of one run. Raises RuntimeError if it fails."""
    flags = [*STAGES[stage][env_id].flags.split(), *VARIANTS[variant].split(), "--num-threads", "1"]
    with tempfile.TemporaryDirectory() as place:
        return learning.run(env_id, seed, Path(place, "run"), learning.LearningConfig.eval_episodes, flags)


def normalized(returns: Mapping[Name, float], variant: str, config: AblationConfig) -> Scores:
    """(environments, seeds): 0 for random actions, 1 for the best published return; NaN where a run is missing."""
    rows = []
    for env_id in environments(config):
        task = STAGES[config.stage][env_id]
        values = [returns.get((variant, env_id, seed), np.nan) for seed in config.seeds]
        rows.append((np.array(values) - task.random) / (task.best - task.random))
    return np.array(rows)


def interval(scores: Scores) -> tuple[float, float, float]:
    """Interquartile mean over all runs, and the 95 % interval of the stratified bootstrap: seeds are drawn by environment.

    scores: (environments, seeds). Agarwal et al., 2021, arXiv 2108.13264.
    """
    environments, seeds = scores.shape
    draws = np.random.default_rng(0).integers(seeds, size=(RESAMPLES, environments, seeds))
    drawn = np.take_along_axis(scores[None], draws, axis=2).reshape(RESAMPLES, -1)
    low, high = np.percentile(interquartile_mean(drawn), INTERVAL)
    return float(interquartile_mean(scores.reshape(-1))), float(low), float(high)


def environments(config: AblationConfig) -> tuple[str, ...]:
    """Those of the stage that are wanted."""
    return config.environments or tuple(STAGES[config.stage])


def summarize(config: AblationConfig, returns: Mapping[Name, float]) -> list[dict[str, Any]]:
    """Each variant that has all its runs: mean returns by environment, normalised score, and gain over the preset by seed."""
    base = normalized(returns, BASE, config)
    rows = []
    for variant in dict.fromkeys((BASE, *config.variants)):
        scores = normalized(returns, variant, config)
        if np.isnan(scores).any() or np.isnan(base).any():
            continue
        means = {
            env_id: float(np.mean([returns[variant, env_id, seed] for seed in config.seeds])) for env_id in environments(config)
        }
        rows.append({"variant": variant, "means": means, "score": interval(scores), "gain": interval(scores - base)})
    return rows


def table(rows: list[dict[str, Any]], config: AblationConfig) -> str:
    """The table in Markdown."""
    names = environments(config)
    lines = [f"| variant | {' | '.join(names)} | normalised (95 %) | gain (95 %) |", "|---" * (len(names) + 3) + "|"]
    for row in rows:
        means = " | ".join(f"{row['means'][env_id]:,.1f}" for env_id in names)
        score, gain = (f"{middle:.2f} ({low:.2f} to {high:.2f})" for middle, low, high in (row["score"], row["gain"]))
        lines.append(f"| {row['variant']} | {means} | {score} | {'' if row['variant'] == BASE else gain} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The gain of each variant with its interval, as a PNG."""
    from matplotlib.figure import Figure

    changed = [row for row in reversed(rows) if row["variant"] != BASE]
    figure = Figure(figsize=(7, 0.9 + 0.34 * len(changed)), layout="constrained")
    axes = figure.add_subplot()
    for place, row in enumerate(changed):
        middle, low, high = row["gain"]
        axes.plot((low, high), (place, place), color="tab:blue")
        axes.plot(middle, place, "o", color="tab:blue")
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(changed)), [row["variant"] for row in changed])
    axes.set_xlabel("gain over the preset, normalised return (95 %)")
    figure.savefig(path, dpi=120)


def main(config: AblationConfig) -> int:
    """Train what is missing, print, and return the exit code."""
    variants = dict.fromkeys((BASE, *config.variants))
    wanted = [(variant, env_id, seed) for seed in config.seeds for env_id in environments(config) for variant in variants]
    failed = run_missing(config.results, NAMES, wanted, functools.partial(run, stage=config.stage), config.jobs)
    returns = {name: line["evaluation"] for name, line in finished(config.results, NAMES).items()}
    rows = summarize(config, returns)
    if config.picture is not None and rows:
        draw(rows, config.picture)
    print(f"\n{table(rows, config)}\n")
    print(json.dumps({"variants": rows, "failed": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(AblationConfig)))

"""Speed by number of environments on the device: `python benchmarks/sweep.py`, CartPole-v1, T=128, E=4.

Prints a table and, last, one JSON object; --plot FILE draws it. GFLOP/s counts only matrix products, for acting, evaluating the
rollout and E epochs: 2 FLOP for each weight and row forward, 4 backward.
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import torch
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from sps import Workload, run_fastppo

from fastppo import TrainConfig
from fastppo.policy.make_network import make_network
from fastppo.policy.spaces import action_spec, obs_spec
from fastppo.rollout.storage import allocate_rollout

MEASURED_ITERATIONS, SECONDS = 5, 8.0  # at least so many iterations, or about so many seconds


@dataclass(frozen=True)
class SweepConfig:
    """Steps per second over the number of environments."""

    num_envs: tuple[int, ...] = (8, 32, 128, 512, 2048, 8192, 16384)
    """N."""
    num_steps: int = 128
    """T."""
    rounds: int = 3
    """Runs of each, in turn; the median is reported."""
    plot: Path | None = None
    """PNG to write."""


def main(config: SweepConfig) -> None:
    """Run all sizes in turn, round by round."""
    env = gym.make("CartPole-v1")
    obs, action = obs_spec(env.observation_space), action_spec(env.action_space, False)
    network = make_network(obs, action, TrainConfig())
    actor_params = network.num_params // 2
    flop = 2 * actor_params + 2 * network.num_params + 4 * 6 * network.num_params  # per transition
    workloads = {}
    for num_envs in config.num_envs:
        batch_size = num_envs * config.num_steps
        steps = max((MEASURED_ITERATIONS + 3) * batch_size, 100_000)
        steps = max(steps, int(SECONDS * min(25_000 * num_envs, 300_000)))
        workloads[num_envs] = Workload("CartPole-v1", num_envs, config.num_steps, 4, 4, steps, 0, "torch")
    runs = {num_envs: [] for num_envs in workloads}
    for number in range(config.rounds + 1):  # the first round compiles programs that are not in the cache; not measured
        for num_envs, workload in workloads.items():
            result = run_fastppo(workload)
            if number > 0:
                runs[num_envs].append(result)

    table = Table(title=f"CartPole-v1 on the device, T={config.num_steps} E=4, 4 minibatches, {torch.__version__}")
    for column in ("N", "steps/s", "least", "most", "us a step of N", "GFLOP/s", "collect", "learn", "MiB of rollout"):
        table.add_column(column, justify="right")
    points = []
    for num_envs, results in runs.items():
        sps = [result["sps"] for result in results]
        rollout = allocate_rollout(config.num_steps, num_envs, obs, action, False, torch.device("cpu"))
        point = {
            "num_envs": num_envs,
            "sps": statistics.median(sps),
            "spread": [min(sps), max(sps)],
            "gflops": statistics.median(sps) * flop / 1e9,
            "collect_share": statistics.median(result["env_share"] for result in results),
            "learn_share": statistics.median(result["learn_share"] for result in results),
            "rollout_bytes": sum(tensor.numel() * tensor.element_size() for tensor in rollout.values()),
        }
        points.append(point)
        table.add_row(
            f"{num_envs}",
            *(f"{value:,.0f}" for value in (point["sps"], *point["spread"], num_envs / point["sps"] * 1e6)),
            f"{point['gflops']:.0f}",
            *(f"{point[key]:.0%}" for key in ("collect_share", "learn_share")),
            f"{point['rollout_bytes'] / 2**20:.2f}",
        )
    Console(width=110).print(table)
    if config.plot:
        draw(points, config.plot)
    print(json.dumps({"points": points}))


def draw(points: list[dict[str, float]], path: Path) -> None:
    """Draw steps per second and GFLOP/s over N."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    num_envs = [point["num_envs"] for point in points]
    low, high = zip(*(point["spread"] for point in points), strict=True)
    axes.fill_between(num_envs, low, high, alpha=0.2, color="C0", linewidth=0)
    axes.plot(num_envs, [point["sps"] for point in points], "o-", color="C0", label="median of rounds; band: least to most")
    axes.set_xscale("log", base=2)
    axes.set_xticks(num_envs, [f"{number}" for number in num_envs])
    axes.set_ylim(0)
    axes.set_xlabel("environments")
    axes.set_ylabel("transitions per second")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value / 1000:.0f} k")
    axes.set_title("CartPole-v1 on the device, collecting and learning", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    right = axes.twinx()
    right.set_ylim(0, axes.get_ylim()[1] * points[-1]["gflops"] / points[-1]["sps"])
    right.set_ylabel("GFLOP/s of products")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(SweepConfig))

"""Learning curves of a run, drawn from its metrics.csv alone."""

import csv
from pathlib import Path

PANELS = (
    ("episodic_return_mean", "return (last 100 episodes)"),
    ("episodic_length_mean", "episode length"),
    ("sps", "steps per second"),
    ("value_loss", "value loss"),
    ("policy_loss", "policy loss"),
    ("entropy", "entropy"),
    ("approx_kl", "approx. KL"),
    ("clipfrac", "clip fraction"),
    ("explained_variance", "explained variance"),
)


def plot_curves(metrics_path: Path, output: Path, title: str) -> None:
    """Draw every panel against the steps taken, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # 0.7 s to import: only once training is over
    from matplotlib.figure import Figure

    with metrics_path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    steps = [int(row["global_step"]) for row in rows]
    figure = Figure(figsize=(13, 9), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for axes, (key, label) in zip(figure.subplots(3, 3).flat, PANELS, strict=True):
        axes.plot(steps, [float(row[key]) for row in rows], linewidth=1.5)
        axes.set_title(label, fontsize=10)
        axes.grid(alpha=0.3)
        if key == "value_loss":
            axes.set_yscale("log")  # it falls by orders of magnitude
        axes.ticklabel_format(axis="x", style="sci", scilimits=(0, 4))
    for axes in figure.axes[-3:]:
        axes.set_xlabel("environment steps")
    temporary = output.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=100)
    temporary.replace(output)

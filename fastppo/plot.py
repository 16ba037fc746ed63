"""Learning curves of a run, drawn from its metrics.csv alone."""

from pathlib import Path

from fastppo.run.metrics import read_rows

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
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # 0.45 s to import: only once training is over
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    rows = read_rows(metrics_path)
    steps = [int(row["global_step"]) for row in rows]
    figure = Figure(figsize=(13, 9))
    FigureCanvasAgg(figure)
    figure.suptitle(title, y=0.985)
    # 0.4 s of CPU time where layout="constrained" took 0.95: margins are fixed, so that nothing is drawn twice to be measured,
    # the step numbers stand once a column, and no label needs mathtext (10^2)
    figure.subplots_adjust(left=0.06, right=0.985, bottom=0.065, top=0.925, hspace=0.2, wspace=0.2)
    for axes, (key, label) in zip(figure.subplots(3, 3, sharex=True).flat, PANELS, strict=True):
        axes.plot(steps, [float(row[key]) for row in rows], linewidth=1.5)
        axes.set_title(label, fontsize=10, y=1.0)  # with a height given, nothing is measured
        axes.grid(alpha=0.3)
        axes.ticklabel_format(style="sci", scilimits=(-4, 6))
        if key == "value_loss":
            axes.set_yscale("log")  # it falls by orders of magnitude
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(LogFormatter())  # numbers where there is no decade to be seen
    for axes in figure.axes[-3:]:
        axes.ticklabel_format(axis="x", style="sci", scilimits=(0, 4))
        axes.set_xlabel("environment steps")
    temporary = output.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=100)
    temporary.replace(output)

"""A run, or one of several seeds, as one HTML page: curves, settings, versions, phases, faults, videos. Costs no torch.

The run directory is untrusted. It is read as data, the template escapes every text from it, and a link that leads out of it is
not followed. The page is self-contained. Its content security policy forbids scripts and the network.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from fastppo.analysis.curves import PALETTE, PANEL_COLUMNS, PANELS, RETURN, draw_page, inked, render, return_panels
from fastppo.analysis.run_groups import LARGEST, Group, Run, find_runs, read_run, setting_text
from fastppo.config import TrainConfig
from fastppo.errors import UsageError
from fastppo.run.files import is_inside
from fastppo.system.json_files import read_json
from fastppo.system.paths import reading
from fastppo.system.text import printable

MAX_VIDEO_BYTES = 20 * 2**20  # of all videos of a page
MAX_FAULT_LETTERS = 2**16
MAX_LETTERS = 2000  # of a value
VIDEOS = {".mp4": "video/mp4", ".webm": "video/webm", ".gif": "image/gif"}
PHASES = (("env_share", "environments", "#0072B2"), ("act_share", "actions", "#E69F00"), ("learn_share", "learning", "#009E73"))
CURVE = PALETTE[0].lower()  # as matplotlib writes it
INK = "#010203"  # placeholder for the colour of the page's text, which may be light or dark
STYLE = {**inked(INK), **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none")}


@reading()
def report_page(run_dir: Path, setting_texts: Mapping[str, str]) -> str:
    """The page as HTML. Raises UsageError if the run's settings cannot be read.

    setting_texts: the description of each setting.
    """
    from jinja2 import Environment  # imported here: --help and wrong flags must not wait for it

    template = Path(__file__).with_name("report_page.html.jinja").read_text(encoding="utf-8")
    config = TrainConfig.from_json(run_dir / "config.json")
    several = config.num_seeds > 1
    runs = sorted(map(read_run, find_runs([str(run_dir)])), key=lambda one: one.config.seed) if several else [read_run(run_dir)]
    summary, summaries = _summary(run_dir), [_summary(one.path) for one in runs]
    faults = [_fault(one.path) for one in runs]
    states = [_status(*each) for each in zip(runs, summaries, faults, strict=True)]
    seeds = f"seeds {runs[0].config.seed} to {runs[-1].config.seed}" if several else f"seed {config.seed}"
    environment = Environment(autoescape=True, finalize=_clean)
    videos, large_videos = _videos([one.path for one in runs])
    return environment.from_string(template).render(
        title=f"{config.env_id}, {seeds}",
        env_id=config.env_id,
        seeds=seeds,
        status=", ".join(f"{states.count(state)} {state}" if several else state for state in dict.fromkeys(states)),
        run_dir=run_dir.resolve().name,
        results=_joint_results(runs, summary) if several else _results(runs[0], summary),
        seed_rows=_seed_rows(runs, summaries, states) if several else [],
        faults=[
            (f" of seed {one.config.seed}" if several else "", text) for one, text in zip(runs, faults, strict=True) if text
        ],
        videos=videos,
        large_videos=large_videos,
        pictures=_pictures(runs),
        phases=_phases(runs[0]),  # seeds that train together share the times
        settings=_settings(config, setting_texts),
        made_with=[*_texts(summary.get("versions")), *_texts(summary.get("made_with"))],
        promises=_lines(summary.get("reproducibility")),
    )


def _clean(value: Any) -> Any:
    """Replace control characters, which HTML forbids, before the text is escaped. Does not change our own markup."""
    return value if hasattr(value, "__html__") else printable(str(value))


def _own(path: Path, run_dir: Path) -> bool:
    """Whether `path` is a file in the run directory and not a link that leads out of it."""
    return path.is_file() and is_inside(path, run_dir)


def _summary(run_dir: Path) -> dict[str, Any]:
    """summary.json; {} if the run has not ended or the file is damaged."""
    path = run_dir / "summary.json"
    try:
        return read_json(path, "the results of a run", "is this a run directory of fastppo?") if _own(path, run_dir) else {}
    except UsageError:
        return {}


def _number(value: Any) -> float | None:
    """A number of summary.json; None for null, which means a number that is not finite."""
    return float(value) if isinstance(value, int | float) and abs(value) < LARGEST else None


def _last(one: Run, name: str) -> float | None:
    """The last finite number of a column of metrics.csv."""
    values = one.columns.get(name, np.empty(0))
    values = values[np.isfinite(values)]
    return float(values[-1]) if len(values) else None


def _status(one: Run, summary: Mapping[str, Any], fault: str) -> str:
    """How the run ended, from the files in its directory."""
    if (_number(summary.get("global_step")) or 0.0) < (_last(one, "global_step") or 0.0) or not summary:
        return "ended with a fault" if fault else "not finished: under way, or killed"
    return f"stopped by {summary['stopped_by']}" if summary.get("stopped_by") else "finished"


def _results(one: Run, summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(name, value, remark) of each known result."""
    steps, seconds = _last(one, "global_step"), _last(one, "seconds")
    evaluation, spread = _number(summary.get("eval_return_mean")), _number(summary.get("eval_return_std"))
    best, last = _number(summary.get("best_return_mean")), _last(one, RETURN)
    results = []
    if evaluation is not None:
        of = f"± {spread or 0.0:.1f}, {_number(summary.get('eval_episodes')) or 0:.0f} episodes"
        results.append(("evaluation", f"{evaluation:,.1f}", of))
    if best is not None:
        by = "evaluation in training" if summary.get("best_by") == "evaluation" else "training episodes of best.pt"
        results.append(("best return", f"{best:,.1f}", by))
    if last is not None:
        results.append(("last return", f"{last:,.1f}", "mean of 100 episodes"))
    if steps is not None:
        results.append(
            ("steps", f"{steps:,.0f}", f"of {one.config.total_timesteps:,}" if not one.config.num_iterations else "")
        )
    if steps is not None and seconds:
        results.append(("steps per second", f"{steps / seconds:,.0f}", f"{seconds:,.1f} s"))
    return results


def _joint_results(runs: Sequence[Run], summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """As `_results`, of all seeds together."""
    results = []
    mean, spread = _number(summary.get("eval_return_mean")), _number(summary.get("eval_return_std"))
    middle, interval = _number(summary.get("eval_return_iqm")), summary.get("eval_return_interval")
    if mean is not None:
        results.append(("evaluation", f"{mean:,.1f}", f"± {spread or 0.0:.1f} over the seeds"))
    if middle is not None and isinstance(interval, list) and len(interval) == 2:
        low, high = (_number(end) or 0.0 for end in interval)
        results.append(("interquartile mean", f"{middle:,.1f}", f"95 % interval {low:,.1f} to {high:,.1f}"))
    last = [value for one in runs if (value := _last(one, RETURN)) is not None]
    if last:
        results.append(("last return", f"{sum(last) / len(last):,.1f}", "mean over the seeds"))
    steps, seconds = sum(_last(one, "global_step") or 0.0 for one in runs), max(_last(one, "seconds") or 0.0 for one in runs)
    results.append(("steps", f"{steps:,.0f}", "of all seeds"))
    if seconds:
        results.append(("steps per second", f"{steps / seconds:,.0f}", f"{seconds:,.1f} s"))
    return results


def _seed_rows(runs: Sequence[Run], summaries: Sequence[Mapping[str, Any]], states: Sequence[str]) -> list[tuple[str, ...]]:
    """A row of the table of seeds for each: seed, how it ended, steps, evaluation, best and last return."""
    rows = []
    for one, summary, state in zip(runs, summaries, states, strict=True):
        values = (_number(summary.get("eval_return_mean")), _number(summary.get("best_return_mean")), _last(one, RETURN))
        steps = f"{_last(one, 'global_step') or 0.0:,.0f}"
        rows.append((str(one.config.seed), state, steps, *("-" if value is None else f"{value:,.1f}" for value in values)))
    return rows


def _fault(run_dir: Path) -> str:
    """The first MAX_FAULT_LETTERS of fault.txt; "" if there is none."""
    path = run_dir / "fault.txt"
    if not _own(path, run_dir):
        return ""
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(MAX_FAULT_LETTERS)


def _videos(run_dirs: Sequence[Path]) -> tuple[list[dict[str, str]], list[str]]:
    """The newest videos up to MAX_VIDEO_BYTES together, each as a data URL, and the names of the others."""
    paths = [
        path
        for run_dir in run_dirs
        for path in (run_dir / "videos").glob("*")
        if path.suffix.lower() in VIDEOS and _own(path, run_dir)
    ]
    videos, too_large, room = [], [], MAX_VIDEO_BYTES
    for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True):
        size = path.stat().st_size
        name = path.name if len(run_dirs) == 1 else f"{path.parent.parent.name}: {path.name}"
        if size > room:
            too_large.append(name)
            continue
        room -= size
        mime = VIDEOS[path.suffix.lower()]
        data = f"data:{mime};base64,{base64.b64encode(path.read_bytes()).decode()}"
        videos.append({"name": name, "mime": mime, "data": data})
    return videos, too_large


def _pictures(runs: Sequence[Run]) -> list[tuple[str, Any]]:
    """(heading, SVG) of both pages of curves. They contain no text of the run: its name is in the heading of the page."""
    from markupsafe import Markup

    drawn = tuple(one for one in runs if one.columns)
    if not drawn:
        return []
    groups = [Group("", "", drawn)]
    pages = (
        ("Return", draw_page(groups, return_panels(groups), 2, STYLE)),
        ("Metrics", draw_page(groups, [("global_step", name) for name in PANELS], PANEL_COLUMNS, STYLE)),
    )
    pictures = []
    for heading, page in pages:
        svg = render(page, "svg", STYLE).decode()
        pictures.append((heading, Markup(svg[svg.index("<svg") :].replace(INK, "currentColor").replace(CURVE, "var(--curve)"))))
    return pictures


def _phases(one: Run) -> list[dict[str, str]]:
    """Shares of the run's time, in percent. Each row of metrics.csv is weighted by the seconds since the row before."""
    if any(name not in one.columns for name in ("seconds", *(name for name, _, _ in PHASES))):
        return []
    weights = np.diff(one.columns["seconds"], prepend=0.0)
    shares = np.stack([one.columns[name] for name, _, _ in PHASES])  # (phases, rows)
    rows = (weights > 0) & ((shares >= 0) & (shares <= 1)).all(0)  # False for NaN
    if not rows.any():
        return []
    percents = 100 * np.average(shares[:, rows], axis=1, weights=weights[rows])
    shown = [
        {"name": label, "percent": f"{percent:.1f}", "colour": colour}
        for (_, label, colour), percent in zip(PHASES, percents, strict=True)
    ]
    return [*shown, {"name": "the rest", "percent": f"{max(0.0, 100 - percents.sum()):.1f}", "colour": "#999999"}]


def _settings(config: TrainConfig, texts: Mapping[str, str]) -> list[dict[str, Any]]:
    """Every setting; those that differ from their defaults come first."""
    default = TrainConfig()
    settings = [
        {
            "name": spec.name,
            "value": setting_text(getattr(config, spec.name))[:MAX_LETTERS],
            "default": setting_text(getattr(default, spec.name)),
            "differs": getattr(config, spec.name) != getattr(default, spec.name),
            "help": texts.get(spec.name, ""),
        }
        for spec in fields(TrainConfig)
    ]
    return sorted(settings, key=lambda setting: not setting["differs"])


def _texts(mapping: Any) -> list[tuple[str, str]]:
    """(name, text) of those entries of an object of summary.json that are strings."""
    if not isinstance(mapping, dict):
        return []
    return [(name[:MAX_LETTERS], value[:MAX_LETTERS]) for name, value in mapping.items() if isinstance(value, str)]


def _lines(lines: Any) -> list[str]:
    """The strings of a list of summary.json."""
    return [line[:MAX_LETTERS] for line in lines if isinstance(line, str)] if isinstance(lines, list) else []

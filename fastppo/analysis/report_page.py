"""A run as one HTML page: curves, settings, versions, phases, fault, videos. Costs no torch.

The run directory is untrusted. It is read as data, the template escapes every text from it, and a link that leads out of it is
not followed. The page is self-contained. Its content security policy forbids scripts and the network.
"""

import base64
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from fastppo.analysis.curves import PALETTE, PANEL_COLUMNS, PANELS, RETURN, draw_page, inked, render, return_panels
from fastppo.analysis.run_groups import LARGEST, Group, Run, read_run, setting_text
from fastppo.config import TrainConfig
from fastppo.errors import UsageError
from fastppo.run.files import is_inside
from fastppo.system.json_files import read_json
from fastppo.system.text import printable

MAX_VIDEO_BYTES = 20 * 2**20  # of all videos of a page
MAX_FAULT_LETTERS = 2**16
MAX_LETTERS = 2000  # of a value
VIDEOS = {".mp4": "video/mp4", ".webm": "video/webm", ".gif": "image/gif"}
PHASES = (("env_share", "environments", "#0072B2"), ("act_share", "actions", "#E69F00"), ("learn_share", "learning", "#009E73"))
CURVE = PALETTE[0].lower()  # as matplotlib writes it
INK = "#010203"  # placeholder for the colour of the page's text, which may be light or dark
STYLE = {**inked(INK), **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none")}


def report_page(run_dir: Path, setting_texts: Mapping[str, str]) -> str:
    """The page as HTML. Raises UsageError if the run's settings cannot be read.

    setting_texts: the description of each setting.
    """
    from jinja2 import Environment  # imported here: --help and wrong flags must not wait for it

    template = Path(__file__).with_name("report_page.html.jinja").read_text(encoding="utf-8")
    one = read_run(run_dir)
    summary = _summary(run_dir)
    environment = Environment(autoescape=True, finalize=_clean)
    videos, large_videos = _videos(run_dir)
    fault = _fault(run_dir)
    return environment.from_string(template).render(
        title=f"{one.config.env_id}, seed {one.config.seed}",
        env_id=one.config.env_id,
        seed=one.config.seed,
        status=_status(one, summary, fault),
        run_dir=run_dir.resolve().name,
        results=_results(one, summary),
        fault=fault,
        videos=videos,
        large_videos=large_videos,
        pictures=_pictures(one),
        phases=_phases(one),
        settings=_settings(one.config, setting_texts),
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


def _fault(run_dir: Path) -> str:
    """The first MAX_FAULT_LETTERS of fault.txt; "" if there is none."""
    path = run_dir / "fault.txt"
    if not _own(path, run_dir):
        return ""
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(MAX_FAULT_LETTERS)


def _videos(run_dir: Path) -> tuple[list[dict[str, str]], list[str]]:
    """The newest videos up to MAX_VIDEO_BYTES together, each as a data URL, and the names of the others."""
    paths = [path for path in (run_dir / "videos").glob("*") if path.suffix.lower() in VIDEOS and _own(path, run_dir)]
    videos, too_large, room = [], [], MAX_VIDEO_BYTES
    for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True):
        size = path.stat().st_size
        if size > room:
            too_large.append(path.name)
            continue
        room -= size
        mime = VIDEOS[path.suffix.lower()]
        data = f"data:{mime};base64,{base64.b64encode(path.read_bytes()).decode()}"
        videos.append({"name": path.name, "mime": mime, "data": data})
    return videos, too_large


def _pictures(one: Run) -> list[tuple[str, Any]]:
    """(heading, SVG) of both pages of curves. They contain no text of the run: its name is in the heading of the page."""
    from markupsafe import Markup

    if not one.columns:
        return []
    groups = [Group("", "", (one,))]
    pages = (
        ("Return", draw_page(groups, return_panels(groups), 2, STYLE)),
        ("Losses and diagnostics", draw_page(groups, [("global_step", name) for name in PANELS], PANEL_COLUMNS, STYLE)),
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

"""The run directory of several seeds: a folder for each seed, and joint results.

TOP/config.json, summary.json and curves.png are for all seeds. TOP/seed-K is the run directory that `--seed K` alone would
write. Knows nothing of how they are trained.
"""

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastppo.analysis.curves import PANEL_COLUMNS, PANELS, draw_page, render, return_panels
from fastppo.analysis.run_groups import group_runs, read_run
from fastppo.analysis.statistics import bootstrap_interval, interquartile_mean
from fastppo.config import TrainConfig
from fastppo.errors import TrainingFault, UsageError
from fastppo.run.directory import RunDirectory
from fastppo.run.files import replace_file
from fastppo.run.metrics import EVALUATION, joint_row
from fastppo.training.results import TrainResult, drawing_curves
from fastppo.training.resume import fill_directory, reopen
from fastppo.training.resumed_settings import check_resumable
from fastppo.training.setup import Task, seed_folder
from fastppo.training.training_run import Note, TrainingRun


def make_seed_directories(task: Task, place: Path, cleanup: contextlib.ExitStack) -> tuple[RunDirectory, list[RunDirectory]]:
    """Make the joint directory and one for each seed, locked until `cleanup`. Raises the UsageError of RunDirectory.create."""
    config, configs = task.config, task.configs

    def fill(top: RunDirectory) -> None:
        top.write_text(top.config, config.to_json())
        for own, state in zip(configs, task.states, strict=True):
            path = top.path / seed_folder(own.seed)
            path.mkdir()
            fill_directory(own, task.data_of(state), RunDirectory(path))

    top = RunDirectory.create(config.run_dir, config.env_id, f"{configs[0].seed}-{configs[-1].seed}", fill, place)
    cleanup.callback(top.unlock)
    directories = [RunDirectory(top.path / seed_folder(own.seed)) for own in configs]
    for directory in directories:
        directory.lock()
        cleanup.callback(directory.unlock)
    return top, directories


def reopen_seeds(task: Task, cleanup: contextlib.ExitStack) -> tuple[RunDirectory, list[RunDirectory], list[str]]:
    """Restore all seeds from --resume. Returns joint directory, seed directories, lines. Errors as in `resume.reopen`."""
    top = RunDirectory(Path(task.config.resume or ""))
    check_resumable(TrainConfig.from_json(top.config), task.config)
    try:
        top.lock()
        cleanup.callback(top.unlock)
        directories, notes = [], []
        for own, state in zip(task.configs, task.states, strict=True):
            directory, lines = reopen(own, state, task, cleanup)
            directories.append(directory)
            notes += [f"seed {own.seed}: {line}" for line in lines]
        top.write_text(top.config, task.config.to_json())
    except OSError as error:
        raise UsageError(f"--resume {top.path} cannot be written: {error.strerror}") from None
    return top, directories, notes


def shown_row(runs: Sequence[TrainingRun]) -> dict[str, int | float]:
    """The values of an iteration for the display: metrics and best return, combined over seeds."""
    if len(runs) == 1:
        return {**runs[0].infos, **runs[0].row, "new_best": runs[0].new_best, "best_return": runs[0].state.best_return}
    known = [run.state.best_return for run in runs if math.isfinite(run.state.best_return)]
    return {
        **joint_row([run.infos | run.row for run in runs if run.row]),
        "new_best": any(run.new_best for run in runs),
        "best_return": sum(known) / len(known) if known else math.nan,
    }


def save_joint_results(
    top: RunDirectory, config: TrainConfig, results: Sequence[TrainResult], failed: Sequence[int], note: Note
) -> TrainResult:
    """Write summary.json and curves.png for all seeds, and print a line on the evaluation.

    `eval_return_mean` and `eval_return_std` are mean and standard deviation of the seeds' mean returns. `eval_return_iqm` is
    their interquartile mean. `eval_return_interval` is its 95 % bootstrap interval (Agarwal et al., 2021, arXiv 2108.13264).

    Args:
        results: results of the seeds without a fault. failed: the other seeds.

    Raises:
        TrainingFault: the files cannot be written.
    """
    summaries = [result.summary for result in results]
    steps, seconds = sum(one["global_step"] for one in summaries), max(one["seconds"] for one in summaries)
    joint: dict[str, Any] = {
        **summaries[0],
        "seed": config.seed,
        "num_seeds": config.num_seeds,
        "global_step": steps,
        "seconds": seconds,
        "sps": sum(one["sps"] for one in summaries),
        "best_return_mean": max(one["best_return_mean"] for one in summaries),
        "failed_seeds": list(failed),
    }
    means = np.array([one["eval_return_mean"] for one in summaries])
    played = np.isfinite(means).all()
    low, high = bootstrap_interval(means) if played and len(means) > 1 else (math.nan, math.nan)
    joint |= {
        "eval_return_mean": float(means.mean()),
        "eval_return_std": float(means.std()),
        "eval_return_iqm": float(interquartile_mean(means)),
        "eval_return_interval": [float(low), float(high)] if played else None,
        "eval_episodes": sum(one["eval_episodes"] for one in summaries),
        "stopped_by": next((one["stopped_by"] for one in summaries if one["stopped_by"]), None),
        "seeds": [
            {key: one[key] for key in ("seed", "global_step", "eval_return_mean", "eval_return_std")} for one in summaries
        ],
    }
    try:
        top.write_json(top.summary, joint)
        with drawing_curves(note):
            groups, _ = group_runs([read_run(result.run_dir) for result in results])
            evaluations = [panel for panel in return_panels(groups) if panel == ("global_step", EVALUATION)]
            page = draw_page(groups, [("global_step", column) for column in PANELS] + evaluations, PANEL_COLUMNS)
            replace_file(top.curves, render(page, "png"))
    except OSError as error:
        raise TrainingFault(f"training is over and kept, but {top.path} could not be written ({error.strerror})") from None
    if played and summaries[0]["eval_episodes"]:
        note(
            f"best models of {len(means)} seeds: mean {means.mean():.1f} +- {means.std():.1f}, "
            f"interquartile mean {joint['eval_return_iqm']:.1f}, 95 % interval {low:.1f} to {high:.1f}"
        )
    best = results[int(np.nanargmax(means)) if np.isfinite(means).any() else 0]
    return TrainResult(top.path, joint, best.policy, tuple(results))

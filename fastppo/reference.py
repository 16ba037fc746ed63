"""Makes REFERENCE.md: every flag of every verb, every metric, every key of summary.json.

`python -m fastppo.reference > REFERENCE.md` writes it. The texts of flags are in the settings classes, those of metrics in
run/metrics.py, those of summary.json here.
"""

import html
import importlib
import inspect
from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from fastppo.__main__ import VERBS, module_of
from fastppo.bounds import described, flag
from fastppo.cli import help_texts
from fastppo.config import TrainConfig, legal
from fastppo.run.metrics import METRICS

# the keys of summary.json, in their order; a number that is not finite is null
SUMMARY = {
    "env_id": "The environment.",
    "seed": "The seed.",
    "global_step": "Transitions, as in metrics.csv.",
    "iterations": "Iterations.",
    "seconds": "Time of training, including the time before a --resume.",
    "sps": "Transitions per second of this process, from its first iteration to its last.",
    "start_seconds": "From process start to the first iteration: imports, environments, programs.",
    "first_update_seconds": "From process start to the end of the first iteration.",
    "compile_seconds": "Time to load or build compiled programs, including those built in the background during training.",
    "tier": "The programs at the end: fused, compiled, compiled-cuda-graph, cuda-graph or eager.",
    "deviations": "Of each program that is not eager, its largest deviation from the eager one at its first call.",
    "backend": "What stepped the environments.",
    "env_halves": "Whether one half of the environments stepped while the policy acted for the other: on or off.",
    "env_halves_trial": "Seconds of an iteration with --env-halves on and off, if auto has tried them; null where that failed.",
    "device": "The device of parameters and rollout.",
    "device_trial": "Seconds of an iteration on each device, if --device auto has tried them; null where that failed.",
    "peak_memory_mib": "Peak resident memory of the process, in MiB.",
    "reproducibility": "What the run guarantees about equal bits, in sentences.",
    "made_with": "Hardware and thread numbers that the bits depend on.",
    "versions": "Versions of Python and of packages that the bits depend on.",
    "best_return_mean": "Mean return of the training episodes that chose best.pt, minus a standard error; null with too few. "
    "With --eval-every that of its evaluation.",
    "best_by": "What chose best.pt: training, or evaluation with --eval-every.",
    "eval_return_mean": "Mean return of best.pt in the evaluation, with the most likely actions; null without an evaluation.",
    "eval_return_std": "Standard deviation of the evaluation episodes' returns.",
    "eval_episodes": "Number of evaluation episodes.",
    "stopped_by": "Why training ended early: a signal, --stop-at-return or a callback; null if it did not.",
}

# the additional keys in the summary.json of many seeds
SEEDS_SUMMARY = {
    "num_seeds": "Number of seeds, from `seed` on.",
    "failed_seeds": "Seeds whose training failed; the numbers are of the others.",
    "eval_return_iqm": "Interquartile mean of the seeds' evaluations; eval_return_std is their standard deviation.",
    "eval_return_interval": "95 % bootstrap interval of eval_return_iqm: lower and upper end.",
    "seeds": "For each seed: seed, steps and evaluation.",
}


def reference() -> str:
    """REFERENCE.md."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    yield "# Reference"
    yield ""
    yield "Made from the code: `python -m fastppo.reference > REFERENCE.md`. For an introduction see [README](README.md)."
    for verb, what in VERBS.items():
        kind = settings_of(verb)
        module = module_of(verb)
        yield from ("", f"## fastppo {verb}", "", f"{what[0].upper()}{what[1:]}. `python -m fastppo.{module}` is the same.")
        if verb == "train":
            yield "Defaults are those of `TrainConfig()`. The command line starts from `--preset auto` and prints its choice."
        else:
            yield from ("", _text(inspect.getdoc(kind) or ""))
        yield from ("", *_table(("flag", "values", "default", "what it does"), _flags(kind)))
    yield from ("", "## metrics.csv", "")
    yield "A row every `--log-interval` iterations. TensorBoard and trackers get the same values, under CleanRL's tags."
    yield from ("", *_table(("column", "tag", "what it is"), _metrics()))
    yield ""
    yield "With `--reward-weights` there are further columns, `episodic_return_0` and so on (`charts/episodic_return_0`)."
    yield "Each is the mean return of one part of the reward, without its weight, in the episodes of `episodic_return_mean`."
    yield ""
    yield "`info_is_success` (`info/is_success`) is there where environments have `is_success` in their infos, and `info_NAME`"
    yield "(`info/NAME`) where `--log-info NAME` asks for it: means over the iteration's episodes, of each one's last step."
    yield "With `--rnd-coef` the column `charts/rnd_bonus` is the mean bonus of the iteration's transitions."
    yield "What a callback records has a column of that name. These are empty in rows without a value."
    yield from ("", "## summary.json", "", "Written when training has ended, and again after the evaluation.", "")
    yield from _table(("key", "what it is"), ((f"`{key}`", _text(text)) for key, text in SUMMARY.items()))
    yield from ("", "## summary.json of many seeds", "")
    yield "With `--num-seeds`: steps are summed, returns are means over the seeds. Additional keys:"
    yield ""
    yield from _table(("key", "what it is"), ((f"`{key}`", _text(text)) for key, text in SEEDS_SUMMARY.items()))
    yield ""


def settings_of(verb: str) -> type:
    """The settings class of a verb, as ImportSb3Config of import-sb3."""
    name = "".join(part.capitalize() for part in verb.split("-"))
    return TrainConfig if verb == "train" else getattr(importlib.import_module(f"fastppo.{module_of(verb)}"), f"{name}Config")


def _flags(kind: type) -> Iterator[tuple[str, ...]]:
    """(flag, values, default, text) of each setting."""
    texts, hints = help_texts(kind), get_type_hints(kind, include_extras=True)
    for spec in fields(kind):
        hint, name = hints[spec.name], f"`{flag(spec.name)}`"
        bare, remarks = getattr(hint, "__origin__", hint), getattr(hint, "__metadata__", ())
        parsers = [remark for remark in remarks if isinstance(remark, PrimitiveConstructorSpec)]
        values = legal(spec.name) if kind is TrainConfig else described(bare)
        values = values.removeprefix("one of ").removesuffix(", or nothing")
        if tyro.conf.Positional in remarks:
            name, values = spec.name.upper(), ""
        elif bare is bool:
            name, values = f"{name} `{flag('no_' + spec.name)}`", ""
        elif parsers:
            values = parsers[0].metavar
        yield name, _text(values), _default(spec), _text(" ".join(texts[spec.name].split()))


def _default(spec: Any) -> str:
    """The default as on the command line; empty if there is none."""
    value = spec.default
    if value is None or value is MISSING:
        return ""
    return f"`{flag(spec.name if value else 'no_' + spec.name)}`" if isinstance(value, bool) else f"`{value}`"


def _metrics() -> Iterator[tuple[str, ...]]:
    for name, metric in METRICS.items():
        yield f"`{name}`", f"`{metric.tag}`" if metric.tag else "", _text(metric.text)


def _table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> Iterator[str]:
    for cells in (head, ("---",) * len(head), *rows):
        yield f"| {' | '.join(cells)} |"


def _text(text: str) -> str:
    """Text escaped for Markdown."""
    return html.escape(text, quote=False).replace("|", "\\|").replace("*", "\\*")


if __name__ == "__main__":
    print(reference(), end="")

"""REFERENCE.md: every flag of every verb, every metric, every key of summary.json, from the texts in the code.

`python -m fastppo.reference > REFERENCE.md` writes it anew. The texts of flags stand where the flags do; those of what a run
logs are here, since one line of code often makes several of them.
"""

import html
import importlib
import inspect
from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from fastppo.__main__ import VERBS
from fastppo.bounds import described, flag
from fastppo.cli import help_texts
from fastppo.config import TrainConfig, legal
from fastppo.run.metrics import METRICS

# the keys of summary.json, in their order; null where there is no finite number
SUMMARY = {
    "env_id": "The environment.",
    "seed": "The seed.",
    "global_step": "Transitions, as in metrics.csv.",
    "iterations": "Iterations.",
    "seconds": "Time of training, those before a --resume included.",
    "sps": "Transitions per second of this process, from its first iteration to its last.",
    "start_seconds": "From process start to the first iteration: imports, the environments, the programs.",
    "first_update_seconds": "From process start to the end of the first iteration.",
    "compile_seconds": "Loading or building compiled programs; those built in the background took this long beside training.",
    "tier": "The programs at the end: eager, compiled or cuda-graph.",
    "backend": "What stepped the environments.",
    "device": "Where parameters and rollout were.",
    "peak_memory_mib": "Most resident memory of the process, in MiB.",
    "reproducibility": "What the run promises about its bits, in sentences.",
    "made_with": "Hardware and thread numbers that the bits depend on.",
    "versions": "Versions of Python and of packages that the bits depend on.",
    "best_return_mean": "Mean return of the training episodes that chose best.pt, less a standard error; null of too few.",
    "eval_return_mean": "Mean return of the evaluation of best.pt, likeliest actions; null without one.",
    "eval_return_std": "Standard deviation of its episodes' returns.",
    "eval_episodes": "Its episodes.",
    "stopped_by": "Why training ended before its time: a signal, --stop-at-return, a callback; null where it did not.",
}

# and those that the summary.json of many seeds has in addition
SEEDS_SUMMARY = {
    "num_seeds": "Seeds, from `seed` on.",
    "failed_seeds": "Those that could not go on; the numbers are of the others.",
    "eval_return_iqm": "Interquartile mean of the seeds' evaluations; eval_return_std is the standard deviation over them.",
    "eval_return_interval": "Its 95 % bootstrap interval, lower and upper end.",
    "seeds": "Of each: its seed, steps and evaluation.",
}


def reference() -> str:
    """REFERENCE.md."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    yield "# Reference"
    yield ""
    yield "Made from the code: `python -m fastppo.reference > REFERENCE.md`. How to use all this is in [README](README.md)."
    for verb, what in VERBS.items():
        kind = TrainConfig if verb == "train" else _settings_of(verb)
        yield from ("", f"## fastppo {verb}", "", f"{what[0].upper()}{what[1:]}. `python -m fastppo.{verb}` is the same.")
        if verb == "train":
            yield "Defaults are those of `TrainConfig()`; the command line starts from `--preset auto`, and says which that is."
        else:
            yield from ("", _text(inspect.getdoc(kind) or ""))
        yield from ("", *_table(("flag", "values", "default", "what it does"), _flags(kind)))
    yield from ("", "## metrics.csv", "")
    yield "A row every `--log-interval` iterations. TensorBoard and trackers have the same, under CleanRL's tags."
    yield from ("", *_table(("column", "tag", "what it is"), _metrics()))
    yield from ("", "## summary.json", "", "Written when training has ended, and again after the evaluation.", "")
    yield from _table(("key", "what it is"), ((f"`{key}`", _text(text)) for key, text in SUMMARY.items()))
    yield from ("", "## summary.json of many seeds", "")
    yield "Of `--num-seeds`: sums of steps, means over the seeds, and in addition:"
    yield ""
    yield from _table(("key", "what it is"), ((f"`{key}`", _text(text)) for key, text in SEEDS_SUMMARY.items()))
    yield ""


def _settings_of(verb: str) -> type:
    return getattr(importlib.import_module(f"fastppo.{verb}"), f"{verb.capitalize()}Config")


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
        yield name, _text(values), _default(spec), _text(texts[spec.name])


def _default(spec: Any) -> str:
    """As one would write it on the command line; nothing for what is not set."""
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
    """Text that Markdown shows as it is."""
    return html.escape(text, quote=False).replace("|", "\\|").replace("*", "\\*")


if __name__ == "__main__":
    print(reference(), end="")

"""Write a run's policy to one file: `python -m fastppo.export RUN_DIR --format onnx`. From Python: `fastppo.export`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from fastppo.analysis.export_formats import check_output
from fastppo.analysis.policy_export import Exported, export_policy
from fastppo.analysis.weights_file import export_weights
from fastppo.cli import parse, run
from fastppo.system.paths import absolute, current_directory
from fastppo.verbs import export

__all__ = ["ExportConfig", "Exported", "console", "export_policy", "export_weights"]


@dataclass(frozen=True)
class ExportConfig:
    """Write a run's policy to one file: normalisation, mask and action bounds included, for any number of observations at once.

    The inputs are the parts of an observation as the environment returns them, by name: `obs`, or `obs.NAME` of a Dict or
    Tuple, and `action_mask` if there is one. The output is `action`, the likeliest, as the environment takes it; of a Dict or
    Tuple, `action.NAME` for each part. The file does not sample and returns no values. It is compared with the run's policy
    before it appears.

    A policy with memory (--rnn) also takes `memory`, float32 (batch, S), and returns `next_memory` after the action. Start with
    zeros. At each step give back the last `next_memory`, with zeros in the rows where a new episode begins.
    """

    run_dir: Annotated[str | None, tyro.conf.Positional] = None
    """Directory of the run, or hf://owner/name of one on the Hugging Face Hub. Default: the newest one in runs/."""
    format: Literal["onnx", "torch", "safetensors"] = "onnx"
    """onnx: for onnxruntime and others, a .onnx file; torch: for torch.export.load, a .pt2 file; safetensors: no function, the
    policy's weights, statistics and action bounds by name."""
    output: str | None = None
    """The file. Default: policy.onnx, policy.pt2 or policy.safetensors in the run directory; here for a run on the Hub."""
    checkpoint: Literal["best", "last"] = "best"
    """Which policy: best.pt, the one with the highest return in training, or last.pt, the one at the end."""


def _main(args: Sequence[str]) -> None:
    settings = parse(ExportConfig, args, prog="python -m fastppo.export")
    if settings.output is not None:
        check_output(absolute(settings.output, "--output", current_directory()), settings.format)
    import torch  # here, so that --help and wrong flags do not wait for it

    torch.set_num_threads(1)
    print(export(settings.run_dir, settings.output, settings.format, checkpoint=settings.checkpoint))


def console(args: Sequence[str] | None = None) -> int:
    """Entry point: the exit code."""
    return run(_main, sys.argv[1:] if args is None else args)


if __name__ == "__main__":
    sys.exit(console())

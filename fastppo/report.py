"""Write a run as one HTML page: `python -m fastppo.report RUN_DIR`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastppo.analysis.report_page import report_page
from fastppo.cli import chosen_run, help_texts, parse, run
from fastppo.config import TrainConfig
from fastppo.errors import UsageError
from fastppo.run.files import replace_file
from fastppo.system.text import printable


@dataclass(frozen=True)
class ReportConfig:
    """Write RUN_DIR/report.html: the run as one page that needs no network, no script and no other file."""

    run_dir: Annotated[str | None, tyro.conf.Positional] = None
    """Directory of the run, finished or not, of one seed or several (--num-seeds). Default: the newest one in runs/."""


def _main(args: Sequence[str]) -> None:
    settings = parse(ReportConfig, args, prog="python -m fastppo.report")
    run_dir = Path(chosen_run(settings.run_dir))
    path = run_dir / "report.html"
    page = report_page(run_dir, help_texts(TrainConfig))
    try:
        replace_file(path, page.encode())
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from None
    print(printable(str(path)))


def console(args: Sequence[str] | None = None) -> int:
    """Entry point: the exit code."""
    return run(_main, sys.argv[1:] if args is None else args)


if __name__ == "__main__":
    sys.exit(console())

"""The two ways a run can end badly. Knows nothing of what went wrong: the message says that."""

import difflib
from collections.abc import Iterable


class UsageError(Exception):
    """The caller asked for something that cannot be: one or two lines that name the flag and the nearest right value.

    The command line prints the message and exits with 2; nothing has been written.
    """


class TrainingFault(Exception):
    """Training cannot go on: an environment failed or a number is not finite. What was reached is in the last checkpoint.

    The command line prints the message and exits with 3.
    """


def nearest(word: str, known: Iterable[str], count: int = 3) -> str:
    """'; nearest: a, b' for an error message, or '' when nothing known resembles `word`."""
    matches = difflib.get_close_matches(word, list(known), n=count, cutoff=0.5)
    return f"; nearest: {', '.join(matches)}" if matches else ""


def brief(error: BaseException) -> str:
    """'ValueError: the first line of its message', cut at 200 letters, for an error of somebody else's code in one of ours."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__

"""The two ways a run can end badly, and how environments do. Knows nothing of what went wrong: the message says that."""

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


class RankLost(TrainingFault):
    """Another process that trains the same agent is gone: what was reached since the last checkpoint is lost with it."""

    def __init__(self, message: str, is_told: bool = False) -> None:
        """is_told: another process of this machine says it."""
        super().__init__(message)
        self.is_told = is_told


class EnvironmentFailed(Exception):
    """An environment raised, or its process died: "environment 3: ValueError: ...". A note has the traceback from elsewhere."""


class NoAnswer(BaseException):
    """Environments took longer than --env-timeout; says for how long.

    No Exception, so that an environment that catches those, to try again, does not catch this one.
    """


# What running an environment's code may raise, and another's fault it is not: one that calls sys.exit() among them.
ENVIRONMENT_ERRORS = (Exception, SystemExit, NoAnswer)


def environment_fault(error: BaseException, when: str) -> TrainingFault:
    """What ENVIRONMENT_ERRORS are told as. A vector environment of others does not say which of them it was."""
    who = "an environment" if isinstance(error, EnvironmentFailed) else "the environments"
    return TrainingFault(f"{who} failed {when}: {brief(error)}")


def nearest(word: str, known: Iterable[str], count: int = 3) -> str:
    """'; nearest: a, b' for an error message, or '' when nothing known resembles `word`."""
    matches = difflib.get_close_matches(word, list(known), n=count, cutoff=0.5)
    return f"; nearest: {', '.join(matches)}" if matches else ""


def brief(error: BaseException) -> str:
    """'ValueError: the first line of its message', cut at 200 letters, for an error of somebody else's code in one of ours.

    Of an environment's failure that is named already, the message.
    """
    if isinstance(error, EnvironmentFailed | NoAnswer):
        return str(error)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__

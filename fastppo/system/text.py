"""Text for a terminal. Costs no torch."""

import math


def printable(message: str) -> str:
    """The message with control characters escaped: it may quote a file that somebody else wrote."""
    return "".join(letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in message)


def duration(seconds: float) -> str:
    """'42 s', '3:07' or '1:02:33'."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"

"""Text for a terminal. Costs no torch."""

import math
import re
from decimal import Decimal

WHOLE = re.compile(r"([+-]?[0-9][0-9_]*(?:\.[0-9_]*)?(?:[eE][+-]?[0-9]{1,2})?)([kKmMgGbB]?)", re.ASCII)
SCALES = {"": 0, "k": 3, "m": 6, "g": 9, "b": 9}


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


def whole_number(text: str) -> int:
    """100000, 100_000, 1e5, 100k or 0.1M as an int. Raises ValueError for other texts and for fractions."""
    match = WHOLE.fullmatch(text)
    if match is None or "__" in text:
        raise ValueError(f"{text[:100]!r} is not a whole number such as 100000, 1e5, 100k or 10M")
    number = Decimal(match[1].replace("_", "")).scaleb(SCALES[match[2].lower()])
    if number != number.to_integral_value():
        raise ValueError(f"{text[:100]!r} is not a whole number")
    return int(number)

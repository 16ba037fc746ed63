"""Reads text and JSON files as data, whoever wrote them. Costs no torch."""

import json
import reprlib
from pathlib import Path
from typing import Any

from fastppo.errors import UsageError
from fastppo.system.paths import MAX_LETTERS

MAX_JSON_BYTES = 2**20  # config.json has two thousand


def read_json(path: Path, what: str, hint: str) -> dict[str, Any]:
    """The JSON object in a file of at most MAX_JSON_BYTES, in which no name appears twice.

    Raises UsageError. Its message ends with `hint` if the file cannot be opened, and says if it does not hold `what`.
    """
    return parse_json(read_text(path, hint), str(path), what)


def parse_json(text: str, name: str, what: str) -> dict[str, Any]:
    """The JSON object in a text, as `read_json`. name: where the text is from. Raises UsageError."""
    try:
        data = json.loads(text, object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name} is damaged: {str(error)[:200]}") from None
    if not isinstance(data, dict):
        raise UsageError(f"{name} does not hold {what}, but {reprlib.repr(data)}")
    return data


def read_text(path: Path, hint: str) -> str:
    """The text of a regular file of at most MAX_JSON_BYTES; raises UsageError as `read_json`."""
    try:
        if path.parent.is_file():
            raise UsageError(f"{path.parent} is a file: give the directory of its run")
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} is not a regular file")
        with path.open("rb") as file:
            text = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{str(path)[:MAX_LETTERS]} cannot be read ({error.strerror}): {hint}") from None
    if len(text) > MAX_JSON_BYTES:
        raise UsageError(f"{path} is larger than any {path.name} of fastppo: at most {MAX_JSON_BYTES} bytes are read")
    try:
        return text.decode("utf-8-sig")
    except ValueError as error:
        raise UsageError(f"{path} is damaged: {error}") from None


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict. Raises ValueError if a name appears twice, since readers differ in which value they take."""
    data = dict(pairs)
    if len(data) < len(pairs):
        raise ValueError("a name appears twice")
    return data

"""What is done to the observations, actions and rewards of each environment. Settings only; envs/wrappers.py does it.

Costs no gymnasium.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from fastppo.errors import UsageError


@dataclass(frozen=True)
class Preprocessing:
    """Settings of the wrappers of an environment that is made one by one.

    The defaults change only large pictures, and actions whose bounds are far from -1 and 1.
    """

    frame_skip: int = 1
    """Steps that each action is repeated for."""
    grayscale: bool = False
    """Greyscale pictures instead of colour."""
    resize: tuple[int, ...] | None = None
    """Height and width of pictures, one number for both; (0,): as they are; None: large ones become 84 x 84."""
    frame_stack: int = 1
    """Last observations in one."""
    rescale_action: bool | None = None
    """Actions from -1 to 1 instead of the environment's bounds; None: where these are far from -1 and 1."""
    time_aware: bool = False
    """The observation includes the share of the time limit that has passed."""
    agent_id: bool = False
    """The observation of each of several agents includes a one-hot vector of the agent."""

    wrapper: tuple[str, ...] = ()
    """Wrappers of one's own, the innermost: module:NAME of each, followed by its arguments as KEY=VALUE."""
    reward_weights: tuple[float, ...] | None = None
    """The reward is the weighted sum of the parts of a vector; None: it is a number."""

    @property
    def flags(self) -> list[str]:
        """The flags of the settings that ask for a wrapper."""
        asked = (spec.name for spec in fields(self) if getattr(self, spec.name) not in (spec.default, False, (0,)))
        return ["--" + name.replace("_", "-") for name in asked]

    @property
    def wrappers(self) -> list[tuple[str, dict[str, Any]]]:
        """module:NAME and keyword arguments of each --wrapper. Raises UsageError for arguments without a wrapper."""
        found: list[tuple[str, list[str]]] = []
        for word in self.wrapper:
            if "=" not in word:
                found.append((word, []))
            elif not found:
                raise UsageError(f"--wrapper {word}: name the wrapper first, as --wrapper my_module:MyWrapper {word}")
            else:
                found[-1][1].append(word)
        return [(name, parse_pairs(pairs, f"--wrapper {name}")) for name, pairs in found]

    @property
    def words(self) -> str:
        """The flags for observations and actions with their values, for a line of text; '' without any."""
        words = []
        for name in replace(self, reward_weights=None).flags:
            value = getattr(self, name[2:].replace("-", "_"))
            words += [name, *([] if value is True else map(str, value) if isinstance(value, tuple) else [str(value)])]
        return " ".join(words)


def parse_pairs(pairs: Sequence[str], flag: str) -> dict[str, Any]:
    """['a=1', 'b=text'] -> {'a': 1, 'b': 'text'}: values are JSON where they parse as such, else text. Raises UsageError."""
    kwargs: dict[str, Any] = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator or not key.isidentifier():
            raise UsageError(f"{flag} takes KEY=VALUE pairs, got {pair!r}; write for example: {flag} g=9.81")
        try:
            kwargs[key] = json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
        except json.JSONDecodeError:
            kwargs[key] = text
        except RecursionError:
            raise UsageError(f"{flag} {key}: its value is nested too deeply") from None
    return kwargs


def said_of_text(kwargs: Mapping[str, Any]) -> str:
    """The hint at a value of --env-kwargs that is text and looks like a dict or list; "" if none."""
    for key, value in kwargs.items():
        if isinstance(value, str) and (value[:1], value[-1:]) in (("{", "}"), ("[", "]")):
            example = f"""'{key}={{"name": 5}}'"""
            return f"; --env-kwargs {key} is a text, since it is not JSON; in a shell write {example}, with all quotes"
    return ""

"""The callbacks of a run: which moments each of them gets, what they record, and the fault where one raises."""

from collections.abc import Sequence
from typing import Any

from fastppo.callbacks import Callback, StepView, View, is_yes
from fastppo.errors import TrainingFault, brief
from fastppo.run.metrics import is_taken


class CallbackList:
    """Calls a run's callbacks in their order; the later moments get the view of the last iteration."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = callbacks
        self._view: View | None = None
        self.of_steps = tuple(callback for callback in callbacks if has_on_step(callback))

    def __bool__(self) -> bool:
        return bool(self._callbacks)

    def on_step(self, view: View, step: StepView) -> None:
        """After a step, for those that have `on_step`. Raises TrainingFault where one raises."""
        for callback in self.of_steps:
            _called(callback, "on_step", view, step)

    def on_iteration(self, view: View) -> str | None:
        """After an iteration: why training ends here, where a callback says so. Raises TrainingFault where one raises."""
        self._view = view
        return self._call("on_iteration")

    def on_checkpoint(self) -> None:
        """After a checkpoint. Raises TrainingFault where a callback raises."""
        self._call("on_checkpoint")

    def on_end(self) -> None:
        """After the last checkpoint. Raises TrainingFault where a callback raises."""
        self._call("on_end")

    def _call(self, moment: str) -> str | None:
        enough = None
        for callback in self._callbacks if self._view is not None else ():
            if _called(callback, moment, self._view):
                enough = enough or f"{_name(callback)} has seen enough"
        return enough


def _called(callback: Callback, moment: str, *args: Any) -> bool:
    """Call a callback; whether it said yes. Raises TrainingFault where it raises."""
    try:
        return is_yes(getattr(callback, moment)(*args))
    except Exception as error:  # whatever somebody's code may raise
        raise TrainingFault(f"{_name(callback)}.{moment} raised {brief(error)}") from error


def _name(callback: Callback) -> str:
    return str(getattr(callback, "name", type(callback).__name__))


def has_on_step(callback: Callback) -> bool:
    """Whether a callback has an `on_step` of its own."""
    own = getattr(callback, "on_step", None)
    return own is not None and getattr(own, "__func__", None) is not Callback.on_step


class Recorded:
    """What callbacks record for the next row of metrics."""

    def __init__(self) -> None:
        self._values: dict[str, float] = {}

    def record(self, name: str, value: float) -> None:
        """See View.record."""
        if not isinstance(name, str) or not name.strip() or not name.isprintable() or is_taken(name):
            raise ValueError(f"record({name!r}, ...): choose another name, of letters, which fastppo does not use itself")
        try:
            self._values[name] = float(value)
        except (TypeError, ValueError):
            raise ValueError(f"record({name!r}, ...) takes a number, got a {type(value).__name__}") from None

    def take(self) -> dict[str, float]:
        """What was recorded since the last call."""
        taken, self._values = self._values, {}
        return taken

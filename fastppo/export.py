"""A run's policy as one file that needs neither fastppo nor its environment: `fastppo export RUN_DIR --format onnx|torch`.

Knows nothing of training. What is written is run before it gets its name, and has to act as `Agent.act` does.
"""

import contextlib
import copy
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
import tyro
from numpy.typing import NDArray

from fastppo.cli import parse, run
from fastppo.errors import TrainingFault, UsageError, brief
from fastppo.system.paths import absolute, current_directory

if TYPE_CHECKING:
    import gymnasium as gym
    from torch.export import ExportedProgram

    from fastppo.policy.agent import Agent
    from fastppo.policy.deployment import DeployedPolicy

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
ROWS = 256  # observations that a file is tried on
STEPS = 8  # in sequences of that length, where the policy has a memory
TOLERANCE = 1e-4  # see `_difference`: other kernels round otherwise
MEMORY = "next_memory"  # the output of that name
FAR = 1e3  # a bound of an observation beyond this is taken for none: 1e38 is no number that an environment shows

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class ExportConfig:
    """Write a run's policy to one file: normalisation, mask and action bounds included, for any number of observations at once.

    Inputs, by name, are the parts of an observation as the environment gives them: `obs`, or `obs.NAME` of a Dict or Tuple, and
    `action_mask` where there is one. The output is `action`, the likeliest, as the environment takes it; the file neither
    samples nor tells values. It has acted as the run's policy does before it appears.

    A policy with memory (--rnn) takes `memory` as well, float32 (batch, S), and returns `next_memory` behind the action: start
    with zeros and give back each time what was returned last, with zeros in the rows where a new episode begins.
    """

    run_dir: Annotated[str, tyro.conf.Positional]
    """Directory of the run."""
    format: Literal["onnx", "torch"] = "onnx"
    """onnx: for onnxruntime and others, a .onnx file; torch: for torch.export.load, a .pt2 file."""
    output: str | None = None
    """The file; policy.onnx or policy.pt2 in the run directory if left out."""
    checkpoint: Literal["best", "last"] = "best"
    """Which policy: the one whose training episodes returned most, or the one at the end."""


class Exported(NamedTuple):
    """A file that `export_policy` has written and tried."""

    path: Path
    inputs: dict[str, str]  # name -> "float32 (batch, 4)"
    outputs: dict[str, str]
    difference: float  # see `_difference`

    def __str__(self) -> str:
        """What there is to know, in a line."""
        taken, returned = (", ".join(f"{name} {what}" for name, what in x.items()) for x in (self.inputs, self.outputs))
        same = "the same actions" if self.difference == 0 else f"largest difference {self.difference:.1e}"
        order = f", {STEPS} steps of {ROWS // STEPS}" if "memory" in self.inputs else ""
        size = self.path.stat().st_size / 1e3
        return f"{self.path} ({size:,.0f} kB): {taken} -> {returned}; {same} on {ROWS} observations{order}"


class Step(NamedTuple):
    """What a file is shown at once, and how the policy answers."""

    inputs: Arrays  # (N, ...) each
    first: NDArray[np.bool_]  # (N,), where an episode begins: nothing is remembered
    outputs: Arrays

    def cut(self, rows: int) -> "Step":
        """The same of the first `rows`."""
        inputs, outputs = ({name: x[:rows] for name, x in named.items()} for named in (self.inputs, self.outputs))
        return Step(inputs, self.first[:rows], outputs)


def export_policy(agent: "Agent", path: str | Path, format: str = "onnx") -> Exported:
    """Write the policy's likeliest action as a function of the observation to one file, tried against `agent.act`.

    Of a policy with memory it is a function of `memory` too, float32 (batch, S), and returns actions and `next_memory`. Start
    with zeros and give back each time what was returned last, with zeros in the rows whose observation is the first one of an
    episode (gymnasium's vector environments return that one step after the end of the one before).

    Args:
        agent: as `load_policy` or `train` give it; with a network of your own, on the CPU. What it remembers stays as it is.
        path: the file, .onnx or .pt2. It appears, or replaces another, whole or not at all.
        format: "onnx", or "torch" for torch.export. The file takes a dict of arrays or of tensors (batch, ...), by name.

    Raises:
        UsageError: no such directory, a package that is missing, a network that cannot be traced.
        TrainingFault: what was written does not run, or does not act as the policy does; it is not kept.
    """
    path = absolute(path, "--output", current_directory())
    _check(path, format)
    from fastppo.policy.deployment import DeployedPolicy  # here, so that --help and wrong flags do not wait for torch

    policy = DeployedPolicy(agent)
    trial = _trial(agent, policy.rnn_state_size)
    temporary = path.with_suffix(".tmp" + path.suffix)
    try:
        with _silence():
            content = _content(policy, trial[0].cut(2), format)
            try:
                temporary.write_bytes(content)
            except OSError as error:
                raise UsageError(f"--output {path} cannot be written: {brief(error)}") from None
            try:
                play = _player(temporary, format)
                played = [*_played(play, trial), *_played(play, [step.cut(1) for step in trial])]
            except Exception as error:
                raise TrainingFault(f"the exported policy does not run, {path} was not written: {brief(error)}") from error
            difference = max(_difference(policy, step, got["action"]) for step, got in played)
            remembered = [(step.outputs[MEMORY], got[MEMORY]) for step, got in played if MEMORY in got]
            drift = max((_distance(expected, got) for expected, got in remembered), default=0.0)
        dtype = trial[0].outputs["action"].dtype
        most = TOLERANCE if dtype.kind != "f" else max(TOLERANCE, 2.0 * float(np.finfo(dtype).eps))
        for does, far, limit in (("act", difference, most), ("remember", drift, TOLERANCE)):
            if far > limit:
                raise TrainingFault(
                    f"the exported policy does not {does} as the run's does, {path} was not written: "
                    f"largest difference {far:.1e} on {ROWS} observations"
                )
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    inputs, outputs = ({name: _told(x) for name, x in named.items()} for named in (trial[0].inputs, trial[0].outputs))
    return Exported(path, inputs, outputs, difference)


def _check(path: Path, format: str) -> None:
    """Raise UsageError for what cannot work, before anything takes time."""
    if format not in SUFFIXES:
        raise UsageError(f'--format must be "onnx" or "torch", got {format!r}')
    if not os.path.isdir(path.parent):  # Path.is_dir raises for a name that is too long
        raise UsageError(f"--output {path}: there is no directory {path.parent}")
    if os.path.isdir(path):
        raise UsageError(f"--output {path} is a directory; nearest: --output {path / ('policy' + SUFFIXES[format])}")
    if path.suffix != SUFFIXES[format]:
        wanted = path.with_suffix(SUFFIXES[format])
        raise UsageError(f"--output {path}: --format {format} writes a {SUFFIXES[format]} file; nearest: --output {wanted}")
    if format == "onnx":
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise UsageError(
                f"--format onnx needs {error.name}, which is not installed: pip install 'fastppo[export]'"
            ) from None


def _content(policy: "DeployedPolicy", example: Step, format: str) -> bytes:
    """The file, as bytes; raises UsageError where torch cannot trace the network. example: of two observations."""
    import torch

    tensors = {name: torch.from_numpy(x) for name, x in example.inputs.items()}
    batch = torch.export.Dim("batch")
    shapes = ({name: {0: batch} for name in tensors},)
    try:
        with torch.no_grad():
            program = torch.export.export(policy, (tensors,), dynamic_shapes=shapes)
            return _onnx(program, list(tensors), list(example.outputs), shapes) if format == "onnx" else _pt2(program)
    except Exception as error:  # whatever somebody's network may do
        raise UsageError(f"torch.export cannot take this policy's network: {brief(error)}") from error


def _onnx(program: "ExportedProgram", inputs: list[str], outputs: list[str], shapes: Any) -> bytes:
    import torch

    result = torch.onnx.export(
        program, (), input_names=inputs, output_names=outputs, dynamic_shapes=shapes, dynamo=True, verbose=False
    )
    assert result is not None  # without a file name
    for node in result.model.graph:
        node.metadata_props.clear()  # the paths of this machine's source files
    return result.model_proto.SerializeToString()


def _pt2(program: "ExportedProgram") -> bytes:
    import torch

    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # the paths of this machine's source files
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def _player(path: Path, format: str) -> Callable[[Arrays], Arrays]:
    """The file as somebody without fastppo runs it, inputs and outputs by name."""
    if format == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return lambda inputs: dict(zip(names, session.run(None, inputs), strict=True))
    import torch

    module = torch.export.load(io.BytesIO(path.read_bytes())).module()

    def play(inputs: Arrays) -> Arrays:
        outputs = module({name: torch.from_numpy(x) for name, x in inputs.items()})
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        return {name: x.numpy() for name, x in zip(("action", MEMORY), outputs, strict=False)}

    return play


def _played(play: Callable[[Arrays], Arrays], trial: list[Step]) -> Iterator[tuple[Step, Arrays]]:
    """Each step with the file's outputs; what it remembers is what it has returned itself."""
    got: Arrays = {}
    for step in trial:
        inputs = dict(step.inputs)
        if MEMORY in got:
            inputs["memory"] = np.where(step.first[:, None], np.float32(0), got[MEMORY])
        got = play(inputs)
        yield step, got


def _trial(agent: "Agent", rnn_state_size: int) -> list[Step]:
    """ROWS observations, and masks, as inputs by name, and the policy's answers; of one with memory in STEPS steps."""
    rng = np.random.default_rng(0)
    agent = copy.copy(agent)  # its own memory stays
    agent.reset()
    info_mask = agent.obs.info_mask
    steps = STEPS if rnn_state_size else 1
    rows = ROWS // steps
    memory = np.zeros((rows, rnn_state_size), np.float32)
    trial = []
    mask: Any = None
    for number in range(steps):
        obs = _sample(agent.obs_space, rng, rows)
        if info_mask is not None:
            mask = rng.integers(2, size=(rows, *info_mask.shape), dtype=np.int8)  # the type of gymnasium's masks
        inputs = {leaf.key: mask if leaf is info_mask else leaf.find(obs) for leaf in agent.obs}
        first = (np.arange(rows) + number) % 4 == 0  # each row in one step of four
        agent.reset(first)
        outputs = {"action": agent.act(obs, action_mask=mask)}
        if agent.rnn_state is not None:
            inputs["memory"] = np.where(first[:, None], np.float32(0), memory)
            memory = agent.rnn_state[:, :rnn_state_size].cpu().numpy()  # the actor's part
            outputs[MEMORY] = memory
        trial.append(Step(inputs, first, outputs))
    return trial


def _sample(space: "gym.Space[Any]", rng: np.random.Generator, rows: int) -> Any:
    """Samples of the space, of its structure and types."""
    from gymnasium.spaces import Box, Dict, Tuple
    from gymnasium.vector.utils import batch_space

    if isinstance(space, Dict):
        return {name: _sample(part, rng, rows) for name, part in space.spaces.items()}
    if isinstance(space, Tuple):
        return tuple(_sample(part, rng, rows) for part in space.spaces)
    if isinstance(space, Box) and np.issubdtype(space.dtype, np.floating):
        low, high = np.where(space.low < -FAR, -np.inf, space.low), np.where(space.high > FAR, np.inf, space.high)
        space = Box(low, high, dtype=space.dtype.type)
    batch = batch_space(space, rows)
    batch.seed(int(rng.integers(2**31)))
    return batch.sample()


def _difference(policy: "DeployedPolicy", step: Step, got: NDArray[Any]) -> float:
    """How far the file's actions are from the policy's: 0 where they are equal, infinite where they are no actions.

    Of numbers, their `_distance`. Of choices, the largest difference of their log-probabilities: of two that are equally likely
    to the last bits, either may be taken.
    """
    import torch

    expected, action = step.outputs["action"], policy.action
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return float("inf")
    if np.array_equal(got, expected):
        return 0.0
    if not all(action.space.contains(np.asarray(one)) for one in got):
        return float("inf")
    if expected.dtype.kind == "f":
        return _distance(expected, got)
    with torch.no_grad():
        dist, _ = policy.step({name: torch.from_numpy(x) for name, x in step.inputs.items()})
        best, other = (
            action.distribution.log_prob(
                dist, torch.from_numpy(one - getattr(action.space, "start", 0)).reshape(len(got), *action.shape)
            )
            for one in (expected, got)
        )
    return float((best - other).abs().max())


def _distance(expected: NDArray[Any], got: NDArray[Any]) -> float:
    """The largest difference, relative to the largest number where that is above 1; infinite for other shapes or types."""
    if got.shape != expected.shape or got.dtype != expected.dtype or not np.isfinite(got).all():
        return float("inf")
    wide = expected.astype(np.float64)
    return float(np.abs(got - wide).max() / max(1.0, np.abs(wide).max()))


def _told(x: NDArray[Any]) -> str:
    return f"{x.dtype} ({', '.join(['batch', *map(str, x.shape[1:])])})"


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The exporters' words, printed, warned and logged, are for those who write them."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _main(args: Sequence[str]) -> None:
    settings = parse(ExportConfig, args, prog="python -m fastppo.export")
    output = settings.output or str(Path(settings.run_dir) / f"policy{SUFFIXES[settings.format]}")
    if settings.output is not None:
        _check(absolute(output, "--output", current_directory()), settings.format)
    import torch  # here, so that --help and wrong flags do not wait for it

    from fastppo.analysis.loading import load_policy

    torch.set_num_threads(1)
    print(export_policy(load_policy(settings.run_dir, settings.checkpoint), output, settings.format))


def console(args: Sequence[str] | None = None) -> int:
    """Entry point: the exit code."""
    return run(_main, sys.argv[1:] if args is None else args)


if __name__ == "__main__":
    sys.exit(console())

"""A run's policy as one file that needs neither fastppo nor its environment: `fastppo export RUN_DIR --format onnx|torch`.

Knows nothing of training. What is written is run before it gets its name, and has to act as `Agent.act` does.
"""

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
import tyro
from numpy.typing import NDArray

from fastppo.cli import parse, run
from fastppo.errors import TrainingFault, UsageError, brief

if TYPE_CHECKING:
    import gymnasium as gym
    from torch import nn
    from torch.export import ExportedProgram

    from fastppo.policy.agent import Agent

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
ROWS = 256  # observations that a file is tried on
TOLERANCE = 1e-4  # of an action's numbers, or of log-probability lost; other kernels, other roundings
FAR = 1e3  # a bound of an observation beyond this is none: nobody will see a number of 1e38

Inputs = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class ExportConfig:
    """Write a run's policy to one file: normalisation, mask and action bounds included, for any number of observations at once.

    Its inputs are the parts of an observation as the environment gives them, by name: `obs`, or `obs.NAME` of a Dict or Tuple,
    and `action_mask` where there is one. Its output is `action` as the environment takes it, the likeliest: the file does not
    sample. It is tried against the run's policy before it appears.
    """

    run_dir: Annotated[str, tyro.conf.Positional]
    """Directory of the run."""
    format: Literal["onnx", "torch"] = "onnx"
    """onnx: for onnxruntime and others; torch: for torch.export.load."""
    output: str | None = None
    """The file; policy.onnx or policy.pt2 in the run directory if left out."""
    checkpoint: Literal["best", "last"] = "best"
    """Which policy: the one with the highest mean return, or the one at the end."""


class Exported(NamedTuple):
    """A file that `export_policy` has written and tried."""

    path: Path
    inputs: dict[str, str]  # name -> "float32 (batch, 4)"
    output: str
    difference: float  # the largest, see `_difference`

    def __str__(self) -> str:
        """One line of all there is to know."""
        told = ", ".join(f"{name} {what}" for name, what in self.inputs.items())
        equal = "equal" if self.difference == 0 else f"largest difference {self.difference:.1e}"
        size = self.path.stat().st_size / 1e3
        return f"{self.path} ({size:,.0f} kB): {told} -> action {self.output}; {equal} on {ROWS} observations"


def export_policy(agent: "Agent", path: str | Path, format: str = "onnx") -> Exported:
    """Write the policy's likeliest action as a function of the observation: one file, tried against `agent.act`.

    Args:
        agent: as `fastppo.load_policy` or `fastppo.train` give it, a network of your own among them.
        path: the file, replaced where there is one. It appears whole or not at all.
        format: "onnx", or "torch" for torch.export. Both take a dict of arrays or tensors (batch, ...), by name.

    Raises:
        UsageError: a directory that is not there, a package that is missing, a network that torch.export cannot follow.
        TrainingFault: the file does not act as the policy does; it is not kept.
    """
    path = Path(path)
    _check(path, format)
    inputs, expected = _trial(agent)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with _silence():
            policy = _deployed(agent)
            content = _written(policy, {name: x[:2] for name, x in inputs.items()}, format)
            _write(temporary, content)
            try:
                play = _player(temporary, format)
                got, alone = play(inputs), play({name: x[:1] for name, x in inputs.items()})
            except Exception as error:
                raise TrainingFault(f"the exported policy does not run: {brief(error)}") from error
            difference = max(
                _difference(agent, policy, inputs, expected, got),
                _difference(agent, policy, {name: x[:1] for name, x in inputs.items()}, expected[:1], alone),
            )
        allowed = max(TOLERANCE, 2.0 * np.finfo(expected.dtype).eps) if expected.dtype.kind == "f" else TOLERANCE
        if not difference <= allowed:
            raise TrainingFault(
                f"the exported policy does not act as the run's does: largest difference {difference:.1e} on {ROWS} "
                f"observations; {path} was not written"
            )
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return Exported(path, {name: _told(x) for name, x in inputs.items()}, _told(expected), difference)


def _check(path: Path, format: str) -> None:
    """Raise UsageError for what cannot work, before anything takes time."""
    if format not in SUFFIXES:
        raise UsageError(f'--format must be "onnx" or "torch", got {format!r}')
    if not path.parent.is_dir():
        raise UsageError(f"--output {path}: there is no directory {path.parent}")
    if path.is_dir():
        raise UsageError(f"--output {path} is a directory: give a file in it, {path / ('policy' + SUFFIXES[format])}")
    if format == "onnx":
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise UsageError(
                f"--format onnx needs {error.name}, which is not installed: pip install 'fastppo[export]'"
            ) from None


def _deployed(agent: "Agent") -> "nn.Module":
    """`Agent.act`, deterministic and on the CPU, as a module that owns all it computes with."""
    import torch  # here, so that --help and wrong flags do not wait for it
    from torch import Tensor, nn

    from fastppo.core.programs import normalize_obs

    class Policy(nn.Module):
        """A dict of tensors (N, ...) as the environment gives them -> actions (N, ...) as it takes them."""

        def __init__(self) -> None:
            super().__init__()
            mean, scale = agent.normalization.obs_mean, agent.normalization.obs_scale
            self.weights = self._own("weight", agent.weights)
            self.mean, self.scale = self._own("mean", mean or {}), self._own("scale", scale or {})
            self.bounds = self._own("action", {"low": agent.action.low, "high": agent.action.high})

        def _own(self, kind: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
            """Copies as buffers, whose names may have no dots; returns those by the names given."""
            names = {name: f"{kind}/{name.replace('.', '/')}" for name in tensors}
            for name, tensor in tensors.items():
                self.register_buffer(names[name], tensor.detach().cpu().clone())
            return names

        def _all(self, names: dict[str, str]) -> dict[str, Tensor]:
            return {name: self.get_buffer(buffer) for name, buffer in names.items()}

        def dist(self, inputs: dict[str, Tensor]) -> Any:
            """Parameters of the distribution."""
            leaves = {}
            for leaf in agent.obs:
                x = inputs[leaf.key]
                x = x != 0 if leaf.kind == "mask" else x.to(leaf.dtype)
                leaves[leaf.key] = x.reshape(-1, *leaf.shape)
            seen: Any = agent.obs.join(leaves)
            if self.mean:
                moments = {"obs_mean": self._all(self.mean), "obs_scale": self._all(self.scale)}
                seen = normalize_obs(seen, agent.normalization._replace(**moments))
            return agent.network.actor(self._all(self.weights), seen)

        def forward(self, inputs: dict[str, Tensor]) -> Tensor:
            mode = agent.action.distribution.mode(self.dist(inputs))
            return replace(agent.action, **self._all(self.bounds)).to_env(mode)

    with torch.inference_mode(False):
        return Policy()


def _written(policy: "nn.Module", example: Inputs, format: str) -> bytes:
    """The file's content; raises UsageError where torch.export gives up. example: two observations."""
    import torch

    tensors = {name: torch.from_numpy(x) for name, x in example.items()}
    batch = torch.export.Dim("batch")
    shapes = ({name: {0: batch} for name in tensors},)
    try:
        with torch.inference_mode(False), torch.no_grad():
            program = torch.export.export(policy, (tensors,), dynamic_shapes=shapes)
            return _onnx(program, list(tensors), shapes) if format == "onnx" else _pt2(program)
    except Exception as error:  # whatever somebody's network may do
        raise UsageError(f"torch cannot export this policy's network: {brief(error)}") from error


def _onnx(program: "ExportedProgram", names: list[str], shapes: Any) -> bytes:
    import torch

    result = torch.onnx.export(
        program, (), input_names=names, output_names=["action"], dynamic_shapes=shapes, dynamo=True, verbose=False
    )
    assert result is not None
    for node in result.model.graph:
        node.metadata_props.clear()  # where this machine keeps which source file
    return result.model_proto.SerializeToString()


def _pt2(program: "ExportedProgram") -> bytes:
    import torch

    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # where this machine keeps which source file
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def _write(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise UsageError(f"--output {path.with_suffix('')} cannot be written: {brief(error)}") from None


def _player(path: Path, format: str) -> Callable[[Inputs], NDArray[Any]]:
    """The file, as somebody without fastppo runs it: inputs by name -> actions."""
    if format == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda inputs: session.run(None, inputs)[0]
    import torch

    module = torch.export.load(path).module()
    return lambda inputs: module({name: torch.from_numpy(x) for name, x in inputs.items()}).numpy()


def _trial(agent: "Agent") -> tuple[Inputs, NDArray[Any]]:
    """ROWS observations and masks, as inputs by name, and the policy's actions."""
    rng = np.random.default_rng(0)
    obs = _sample(agent.obs_space, rng)
    info_mask = agent.obs.info_mask
    mask = None if info_mask is None else rng.integers(2, size=(ROWS, *info_mask.shape), dtype=np.int8)  # as gymnasium's are
    inputs: Inputs = {leaf.key: mask if leaf is info_mask else leaf.find(obs) for leaf in agent.obs}
    return inputs, agent.act(obs, action_mask=mask)


def _sample(space: "gym.Space[Any]", rng: np.random.Generator) -> Any:
    """ROWS observations of the space, with a leading axis, of its structure and type."""
    from gymnasium.spaces import Box, Dict, Tuple
    from gymnasium.vector.utils import batch_space

    if isinstance(space, Dict):
        return {name: _sample(part, rng) for name, part in space.spaces.items()}
    if isinstance(space, Tuple):
        return tuple(_sample(part, rng) for part in space.spaces)
    if isinstance(space, Box) and np.issubdtype(space.dtype, np.floating):
        low, high = np.where(space.low < -FAR, -np.inf, space.low), np.where(space.high > FAR, np.inf, space.high)
        space = Box(low, high, dtype=space.dtype.type)
    batch = batch_space(space, ROWS)
    batch.seed(int(rng.integers(2**31)))
    return batch.sample()


def _difference(agent: "Agent", policy: Any, inputs: Inputs, expected: NDArray[Any], got: NDArray[Any]) -> float:
    """How far the file's actions are from the policy's: 0 where they are equal, infinite where they are of another kind.

    Of numbers, the largest difference, relative to the largest number where that is above 1. Of choices, the log-probability
    that the file's lose: two that are as good as each other may be taken for one another.
    """
    import torch

    if got.shape != expected.shape or got.dtype != expected.dtype:
        return float("inf")
    if np.array_equal(got, expected, equal_nan=expected.dtype.kind == "f"):
        return 0.0
    if expected.dtype.kind == "f":
        wide = expected.astype(np.float64)
        return float(np.abs(got - wide).max() / max(1.0, np.abs(wide).max()))
    first = torch.tensor(getattr(agent.action.space, "start", 0)).numpy()
    with torch.no_grad():
        dist = policy.dist({name: torch.from_numpy(x) for name, x in inputs.items()})
        best, other = (
            agent.action.distribution.log_prob(dist, torch.from_numpy(action - first).reshape(len(action), *agent.action.shape))
            for action in (expected, got)
        )
    return float((best - other).max())


def _told(x: NDArray[Any]) -> str:
    return f"{x.dtype} ({', '.join(['batch', *map(str, x.shape[1:])])})"


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """What the exporters have to say, on stdout, in warnings and in logs, is for their developers."""
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
    path = Path(settings.run_dir) / f"policy{SUFFIXES[settings.format]}" if settings.output is None else Path(settings.output)
    _check(path, settings.format)
    import torch  # here, so that --help and wrong flags do not wait for it

    from fastppo.loading import load_policy

    torch.set_num_threads(1)
    print(export_policy(load_policy(settings.run_dir, settings.checkpoint), path, settings.format))


def console(args: Sequence[str] | None = None) -> int:
    """Entry point: the exit code."""
    return run(_main, sys.argv[1:] if args is None else args)


if __name__ == "__main__":
    sys.exit(console())

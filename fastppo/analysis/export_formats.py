"""The file formats of an exported policy: ONNX and torch.export, and safetensors, which weights_file.py writes.

Turns a traced policy into the bytes of a file, and runs a file without fastppo. Knows nothing of run directories. Does not
import torch at module level, so that `fastppo export --help` is fast.
"""

import contextlib
import importlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from fastppo.errors import UsageError, brief

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from fastppo.policy.deployment import DeployedPolicy

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2", "safetensors": ".safetensors"}
PACKAGES = {"onnx": ("onnx", "onnxruntime", "onnxscript"), "torch": (), "safetensors": ("safetensors",)}
NEXT_MEMORY = "next_memory"  # second output of a recurrent policy

Arrays = dict[str, NDArray[Any]]  # (batch, ...) by name of the input or output


def check_output(path: Path, format: str) -> None:
    """Raise UsageError for an output file that cannot be written, or a format that is unknown or not installed."""
    if format not in SUFFIXES:
        raise UsageError(f"--format must be one of {', '.join(SUFFIXES)}, got {format!r}")
    if not os.path.isdir(path.parent):  # Path.is_dir raises for a name that is too long
        raise UsageError(f"--output {path}: there is no directory {path.parent}")
    if os.path.isdir(path):
        raise UsageError(f"--output {path} is a directory; nearest: --output {path / ('policy' + SUFFIXES[format])}")
    if path.suffix != SUFFIXES[format]:
        wanted = path.with_suffix(SUFFIXES[format])
        raise UsageError(f"--output {path}: --format {format} writes a {SUFFIXES[format]} file; nearest: --output {wanted}")
    for package in PACKAGES[format]:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UsageError(
                f"--format {format} needs {error.name}, which is not installed: pip install 'fastppo[export]'"
            ) from None


def file_content(policy: "DeployedPolicy", inputs: Arrays, outputs: list[str], format: str) -> bytes:
    """The exported policy as the bytes of a file.

    Args:
        inputs: an example with two observations. outputs: the names of the outputs.

    Raises:
        UsageError: torch cannot trace the network.
    """
    import torch

    tensors = {name: torch.from_numpy(x) for name, x in inputs.items()}
    batch = torch.export.Dim("batch")
    shapes = ({name: {0: batch} for name in tensors},)
    try:
        with torch.no_grad():
            program = torch.export.export(policy, (tensors,), dynamic_shapes=shapes)
            return _onnx(program, list(tensors), outputs, shapes) if format == "onnx" else _pt2(program)
    except Exception as error:  # a user's network may raise anything
        raise UsageError(f"torch.export cannot take this policy's network: {brief(error)}") from error


def _onnx(program: "ExportedProgram", inputs: list[str], outputs: list[str], shapes: Any) -> bytes:
    import torch

    result = torch.onnx.export(
        program, (), input_names=inputs, output_names=outputs, dynamic_shapes=shapes, dynamo=True, verbose=False
    )
    assert result is not None  # it is the program, since no file name was given
    for node in result.model.graph:
        node.metadata_props.clear()  # paths of source files on this machine
    return result.model_proto.SerializeToString()


def _pt2(program: "ExportedProgram") -> bytes:
    import torch

    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of source files on this machine
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def file_runner(path: Path, format: str, names: list[str]) -> Callable[[Arrays], Arrays]:
    """A function that runs the file without fastppo, from inputs to outputs. names: of the outputs, in their order."""
    if format == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
        return lambda inputs: dict(zip(names, session.run(names, inputs), strict=True))
    import torch

    module = torch.export.load(io.BytesIO(path.read_bytes())).module()

    def run(inputs: Arrays) -> Arrays:
        outputs = module({name: torch.from_numpy(x) for name, x in inputs.items()})
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        return {name: x.numpy() for name, x in zip(names, outputs, strict=True)}

    return run


@contextlib.contextmanager
def silent_exporters() -> Iterator[None]:
    """Suppress the output, warnings and logs of the exporters, which are for their developers."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)

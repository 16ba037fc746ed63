"""Export a policy to one file that needs neither fastppo nor its environment.

Knows nothing of training or of command lines. A new file is run before it gets its name, and must act like `Agent.act`.
"""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastppo.analysis.export_formats import NEXT_MEMORY, check_output, file_content, file_runner, silent_exporters
from fastppo.analysis.export_trial import ROWS, STEPS, differences, make_trial
from fastppo.errors import TrainingFault, UsageError, brief
from fastppo.system.paths import absolute, current_directory

if TYPE_CHECKING:
    from fastppo.policy.agent import Agent

TOLERANCE = 1e-4  # other kernels round differently


class Exported(NamedTuple):
    """A file that `export_policy` has written and compared with the policy."""

    path: Path
    inputs: dict[str, str]  # name -> "float32 (batch, 4)"
    outputs: dict[str, str]
    difference: float  # between the file's actions and the policy's; 0: equal

    def __str__(self) -> str:
        """One line for the user."""
        taken, returned = (", ".join(f"{name} {what}" for name, what in x.items()) for x in (self.inputs, self.outputs))
        same = "the same actions" if self.difference == 0 else f"largest difference {self.difference:.1e}"
        order = f", {STEPS} steps of {ROWS // STEPS}" if "memory" in self.inputs else ""
        size = self.path.stat().st_size / 1e3
        return f"{self.path} ({size:,.0f} kB): {taken} -> {returned}; {same} on {ROWS} observations{order}"


def export_policy(agent: "Agent", path: str | Path, format: str = "onnx") -> Exported:
    """Write the policy's likeliest action as a function of the observation to one file, and compare it with `agent.act`.

    The output is `action`; of a Dict or Tuple action space each part is one, `action.NAME`, in the order of the space.
    A recurrent policy has a second input `memory`, float32 (batch, S), and returns actions and `next_memory`. Start with zeros.
    At each step pass the last `next_memory`, with zeros in the rows whose observation is the first of an episode
    (gymnasium's vector environments return that observation one step after the end of the episode before).

    Args:
        agent: from `load_policy` or `train`; on the CPU if the network is your own. Its recurrent state does not change.
        path: the file, .onnx or .pt2. It appears, or replaces another file, whole or not at all.
        format: "onnx", or "torch" for torch.export. The file takes a dict of arrays or tensors (batch, ...), by name.

    Raises:
        UsageError: the directory does not exist, a package is missing, or the network cannot be traced.
        TrainingFault: the new file does not run or does not act like the policy; it is deleted.
    """
    path = absolute(path, "--output", current_directory())
    check_output(path, format)
    from fastppo.policy.deployment import DeployedPolicy  # imports torch: --help and wrong flags must not wait for it

    policy = DeployedPolicy(agent)
    trial = make_trial(agent, policy.rnn_state_size)
    example = trial[0].first_rows(2)
    temporary = path.with_suffix(".tmp" + path.suffix)
    try:
        with silent_exporters():
            content = file_content(policy, example.inputs, list(example.outputs), format)
            try:
                temporary.write_bytes(content)
            except OSError as error:
                raise UsageError(f"--output {path} cannot be written: {brief(error)}") from None
            try:
                of_actions, of_memories = differences(policy, trial, file_runner(temporary, format, list(example.outputs)))
            except Exception as error:
                raise TrainingFault(f"the exported policy does not run, {path} was not written: {brief(error)}") from error
        floats = [x.dtype for name, x in example.outputs.items() if name != NEXT_MEMORY and x.dtype.kind == "f"]
        tolerance = max([TOLERANCE, *(2.0 * float(np.finfo(dtype).eps) for dtype in floats)])
        for does, difference, most in (("act", of_actions, tolerance), ("remember", of_memories, TOLERANCE)):
            if difference > most:
                raise TrainingFault(
                    f"the exported policy does not {does} as the run's does, {path} was not written: "
                    f"largest difference {difference:.1e} on {ROWS} observations"
                )
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    inputs, outputs = ({name: _describe(x) for name, x in named.items()} for named in (example.inputs, example.outputs))
    return Exported(path, inputs, outputs, of_actions)


def _describe(x: NDArray[Any]) -> str:
    """Dtype and shape of an input or output: "float32 (batch, 4)"."""
    return f"{x.dtype} ({', '.join(['batch', *map(str, x.shape[1:])])})"

"""evaluate, plot and export, as functions: what the verbs of the same names do, for Python. Imports torch when first called."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from fastppo.analysis.export_formats import SUFFIXES, check_output
from fastppo.cli import chosen_run, open_run
from fastppo.system.paths import absolute, current_directory, importable, path_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fastppo.analysis.policy_export import Exported
    from fastppo.policy.module_policy import ModuleFactory
    from fastppo.training.arguments import GivenEnvs


class HasRunDir(Protocol):
    """A TrainResult."""

    @property
    def run_dir(self) -> Path:
        """Directory of the run."""
        ...


Run = str | Path | HasRunDir
Checkpoint = Literal["best", "last"]


def evaluate(
    run: Run | None = None,
    episodes: int = 20,
    *,
    checkpoint: Checkpoint = "best",
    deterministic: bool = True,
    seed: int = 0,
    policy: "ModuleFactory | None" = None,
    envs: "GivenEnvs | None" = None,
    verbose: bool = True,
) -> dict[str, Any]:
    """Play episodes with a run's policy: {"return_mean": 500.0, "return_std": 0.0, "episodes": 20}; nan, nan, 0 if none ended.

    Args:
        run: a run directory, or what `train` returned. None: the newest one in runs/.
        checkpoint: "best", the policy with the highest return in training or --eval-every, or "last", the one at the end.
        deterministic: take the likeliest action; otherwise sample.
        seed: of the environments and of sampling.
        policy: the factory of your own network, where config.json does not name it.
        envs: an environment, a list of them, a vector environment, or a function without arguments that makes one; given ones
            are not closed. None: made as for training.
        verbose: whether to print how it goes.

    Raises:
        UsageError: no such run, or an environment that cannot be made.
        TrainingFault: the environment failed.
    """
    from fastppo.analysis.evaluation import EvaluationPlan, evaluate_config
    from fastppo.analysis.loading import load_run
    from fastppo.evaluate import EvaluateConfig
    from fastppo.training.arguments import vector_of

    EvaluateConfig(episodes=episodes, seed=seed)  # for its checks
    place = current_directory()
    directory, _, config = open_run(_directory(run), checkpoint)
    with importable(place):
        agent, trained_steps = load_run(directory, config, checkpoint, policy)
        plan = EvaluationPlan(episodes, seed, deterministic, trained_steps)
        note: Callable[[str], None] = print if verbose else lambda line: None
        if envs is not None:
            config = replace(config, env_kwargs={})  # these are made already, or by the function
        if callable(envs):
            return evaluate_config(agent, config, plan, note=note, env_fn=envs)
        return evaluate_config(agent, config, plan, None if envs is None else vector_of(envs), note)


def plot(
    runs: Run | Sequence[Run] | None = None, *, metric: str = "episodic_return_mean", output: str | Path | None = None
) -> "Figure":
    """Draw a metric of runs over steps and seconds: a row for each environment, a colour for each setting.

    Args:
        runs: run directories, directories that hold some, or what `train` returned. None: the newest one in runs/.
        metric: a column of metrics.csv.
        output: a file to write the picture to, .png, .svg or .pdf.

    Returns:
        matplotlib's Figure: `figure.savefig("a.png")`. A notebook shows it.

    Raises:
        UsageError: no run that can be read, no such column, or a file that cannot be written.
    """
    from fastppo.analysis.curves import check_metric, check_place, draw_page, render, return_panels
    from fastppo.analysis.run_groups import read_groups
    from fastppo.errors import UsageError
    from fastppo.run.files import replace_file

    if output is not None:
        check_place(str(output))
    several = runs if isinstance(runs, Sequence) and not isinstance(runs, str) else [runs]
    if not several:
        raise UsageError("runs is an empty list: give a run directory, or None for the newest one in runs/")
    groups = read_groups([_directory(one) for one in several], print)
    check_metric(groups, metric)
    figure: Any = draw_page(groups, return_panels(groups, metric), columns=2)
    figure._repr_png_ = partial(render, figure, "png")  # what IPython asks for; pyplot, which has it, need not be imported
    if output is not None:
        path = Path(output) if Path(output).suffix else Path(f"{output}.png")
        try:
            replace_file(path, render(figure, path.suffix[1:]))
        except (OSError, ValueError) as error:
            raise UsageError(f"--output {output} cannot be written: {error}") from None
    return figure


def export(
    run: Run | None = None,
    output: str | Path | None = None,
    format: Literal["onnx", "torch", "safetensors"] = "onnx",
    *,
    checkpoint: Checkpoint = "best",
    policy: "ModuleFactory | None" = None,
) -> "Exported | str":
    """Write a run's policy to one file that needs neither fastppo nor the environment, and compare the two.

    Args:
        run: a run directory, or what `train` returned. None: the newest one in runs/.
        output: the file. Default: policy.onnx, policy.pt2 or policy.safetensors in the run directory; of hf://owner/name in the
            working directory.
        format: "onnx", for onnxruntime and others; "torch", for torch.export.load; "safetensors", the numbers alone.
        checkpoint: "best" or "last".
        policy: the factory of your own network, where config.json does not name it.

    Returns:
        `path`, and `inputs` and `outputs` by name; as text a line that says all this. See `fastppo.export.ExportConfig`. Of a
        safetensors file only the line.

    Raises:
        UsageError: no such run, a file that cannot be written, or a missing package.
        TrainingFault: the file does not act like the policy, and is not there.
    """
    place = current_directory()
    if output is not None or format not in SUFFIXES:
        check_output(absolute(str(output or "policy"), "--output", place), format)
    directory, folder, config = open_run(_directory(run), checkpoint)
    path = folder / f"policy{SUFFIXES[format]}" if output is None else Path(output)
    from fastppo.analysis.loading import load_run
    from fastppo.analysis.policy_export import export_policy
    from fastppo.analysis.weights_file import export_weights

    with importable(place):
        agent, _ = load_run(directory, config, checkpoint, policy)
    if format == "safetensors":
        return export_weights(agent, path, {"env_id": config.env_id, "settings": config.to_json()})
    exported = export_policy(agent, path, format)
    if config.preprocessing.words:
        print(f"the file does not contain {config.preprocessing.words}: prepare observations and actions as training did")
    return exported


def _directory(run: Run | None) -> str:
    """The run directory that is meant; the newest one where none is given. Raises UsageError."""
    return chosen_run(None) if run is None else path_of(getattr(run, "run_dir", run), "RUN_DIR")

"""--device: what cannot be had is said in one line, with what to do. The states of a machine with GPUs are pretended."""

import contextlib
import json

import pytest
import torch

from fastppo import train
from fastppo.config import TrainConfig
from fastppo.core import ppo
from fastppo.errors import TrainingFault, UsageError
from fastppo.ranks import start_ranks
from fastppo.system.devices import choose_device, enough_memory, resolved
from fastppo.train import console
from fastppo.training import job
from fastppo.training.setup import meet_ranks
from support.runs import tiny

OLD = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by downloading and "
    "installing a new version from the URL: http://www.nvidia.com/Download/index.aspx"
)
FULL = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 23.64 GiB of which 10.00 GiB is free. "
    "Process 7 has 3 GiB memory in use."
)


@pytest.fixture
def machine(monkeypatch):
    """Sets what PyTorch finds: machine(gpus=..., built=..., error=..., visible=...)."""

    def set_up(gpus=1, built=True, error=None, visible=None):
        def init():
            if error is not None:
                raise RuntimeError(error)

        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
        monkeypatch.setattr(torch.cuda, "init", init)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: built and gpus > 0 and error is None)
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return set_up


@pytest.mark.parametrize(
    ("wanted", "found", "line"),
    [
        ("cuda:1", {"gpus": 1}, "--device cuda:1: the only GPU is cuda:0: use it, or use --device cpu"),
        ("cuda:7", {"gpus": 4}, "--device cuda:7: the GPUs are cuda:0 to cuda:3: use one of them, or use --device cpu"),
        (
            "cuda",
            {"gpus": 0},
            "--device cuda: this machine has no GPU that PyTorch can use: check nvidia-smi, or use --device cpu",
        ),
        ("cuda", {"visible": ""}, "--device cuda: CUDA_VISIBLE_DEVICES= hides all GPUs: unset it, or use --device cpu"),
        ("cuda:0", {"visible": "-1"}, "--device cuda:0: CUDA_VISIBLE_DEVICES=-1 hides all GPUs: unset it, or use --device cpu"),
        (
            "cuda",
            {"error": OLD},
            "--device cuda: the GPU cannot be used (The NVIDIA driver on your system is too old (found version 11040)): "
            "update the NVIDIA driver, or use --device cpu",
        ),
        (
            "cuda",
            {"built": False},
            f"--device cuda: PyTorch {torch.__version__} is built without CUDA: install one with it "
            "(https://pytorch.org/get-started), or use --device cpu",
        ),
    ],
)
def test_a_gpu_that_cannot_be_had(machine, wanted, found, line):
    """One line with the reason, what to do, and the way out."""
    machine(**found)
    with pytest.raises(UsageError) as raised:
        choose_device(wanted)
    assert str(raised.value) == line


@pytest.mark.parametrize(
    ("wanted", "found", "expected"),
    [
        ("cuda:1", {"gpus": 2}, "cuda:1"),
        ("cuda", {"gpus": 1, "visible": "3"}, "cuda"),
        ("auto", {"gpus": 1}, "cuda"),
        ("auto", {"gpus": 0}, "cpu"),
        ("auto", {"error": OLD}, "cpu"),
        ("auto", {"built": False}, "cpu"),
        ("cpu", {"gpus": 4}, "cpu"),
    ],
)
def test_a_device_that_is_there(machine, wanted, found, expected):
    """What is asked for; auto never fails."""
    machine(**found)
    assert choose_device(wanted) == torch.device(expected)


def test_a_missing_gpu_ends_the_command(machine, tmp_path, capsys):
    """Exit code 2, one line, and no run directory."""
    machine(gpus=1)
    assert console(["--device", "cuda:1", "--run-dir", str(tmp_path / "run")]) == 2
    assert "--device cuda:1: the only GPU is cuda:0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_memory_that_is_not_enough_names_the_flags():
    """The first sentences of PyTorch's message, which say how much was asked for, and what makes it less."""
    with pytest.raises(TrainingFault) as raised, enough_memory(torch.device("cuda:0"), "while training"):
        raise torch.OutOfMemoryError(FULL)
    assert str(raised.value) == (
        "cuda:0 is out of memory while training (Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 23.64 GiB of which "
        "10.00 GiB is free): fewer --num-envs or --num-steps make the rollout smaller, more --num-minibatches the update"
    )


def test_a_run_that_is_out_of_memory_can_go_on(tmp_path, capsys, monkeypatch):
    """In the third iteration: exit code 3, one line, the state of two iterations kept, and --resume ends the run."""
    flags = ["--num-envs", "2", "--num-steps", "16", "--compile", "off", "--eval-episodes", "0", "--plain", "--device", "cpu"]
    calls, summarize = [], ppo.summarize

    def full(*args):
        calls.append(args)
        if len(calls) == 3:
            raise torch.OutOfMemoryError(FULL)
        return summarize(*args)

    monkeypatch.setattr(ppo, "summarize", full)
    run = str(tmp_path / "run")
    assert console([*flags, "--num-iterations", "4", "--run-dir", run]) == 3
    printed = capsys.readouterr()
    assert "out of memory while training (Tried to allocate 20.00 GiB" in printed.err
    assert "Traceback" not in printed.err
    assert console(["--resume", run, "--plain"]) == 0
    assert "resuming from iteration 2" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["global_step"] > 3 * 32 - 20


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_gpus_of_others(device, monkeypatch, tmp_path, capsys):
    """One line where there is none. Where PyTorch has one it is taken, with its index, as tensors name it."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    assert console(["--device", device, "--run-dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert f"--device {device}: PyTorch finds no GPU of " in error
    assert "or use --device cpu" in error
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    assert resolved(choose_device(device)) == torch.device(device, 0)


def test_mps_has_no_float64(monkeypatch):
    """Settings that keep statistics in it are named."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(UsageError, match=r"^--norm-obs keeps statistics in float64, which mps has not: leave it off, or"):
        meet_ranks(TrainConfig(device="mps", norm_obs=True, norm_reward=True), contextlib.ExitStack())


def test_another_gpu_trains_in_one_process(monkeypatch):
    """torchrun has no way for it to exchange gradients."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UsageError, match=r"^--device xpu trains in one process: with torchrun use --device cpu or cuda$"):
        start_ranks(torch.device("xpu"))


def test_programs_of_another_gpu_are_eager(tmp_path, monkeypatch, capsys):
    """And a line says that nobody has tried it. The CPU stands in for it."""
    monkeypatch.setattr(job, "WITH_FAST_PROGRAMS", ("cuda",))
    summary = train(tiny(tmp_path / "run", num_iterations=2, device="cpu", compile="on")).summary
    assert summary["tier"] == "eager"
    assert "nobody has run fastppo on cpu yet; programs are eager there" in capsys.readouterr().out

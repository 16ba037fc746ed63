"""A run that was stopped and goes on equals one that was not: the same bits where promised, and it is said where not."""

import csv
import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastppo import TrainingFault, train
from fastppo.run.metrics_file import read_rows
from fastppo.train import console
from fastppo.training.update import read_metrics
from support.resume import CASES, differing, result_of, settings_of, stopped_after
from support.runs import tiny


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.slow if case == "Atari" else ()) for case in CASES])
def test_stopped_and_resumed_equals_not_interrupted(case, tmp_path, monkeypatch):
    """Parameters, optimiser, statistics, generators, episodes, environments, the best policy and every logged number: the same

    bits, annealing included, whether the run was stopped at a checkpoint or between two.
    """
    config = settings_of(case, tmp_path / "whole")
    assert train(config).summary["tier"] == ("eager" if config.compile == "off" else "fused")
    whole, rows = result_of(tmp_path / "whole")
    assert len(rows) == 5
    for stop in (2, 3):
        run_dir = tmp_path / f"stopped-{stop}"
        config = settings_of(case, run_dir)
        assert stopped_after(stop, config, monkeypatch) == 143
        assert result_of(run_dir)[0]["last"]["iteration"] == stop
        train(replace(config, resume=str(run_dir)))
        resumed, resumed_rows = result_of(run_dir)
        assert differing(whole, resumed) == []
        assert rows == resumed_rows


def test_without_exact_resume_it_differs(tmp_path, monkeypatch, capsys):
    """And says so: what the tests above show is not there by itself."""
    config = replace(settings_of("entry point", tmp_path / "whole"), exact_resume=False, verbose=2)
    train(config)
    parted = replace(config, run_dir=str(tmp_path / "parted"))
    stopped_after(2, parted, monkeypatch)
    assert "new episodes, so other bits than without the stop (the same with --exact-resume)" in capsys.readouterr().out
    train(replace(parted, resume=parted.run_dir))
    assert "the environments start new episodes" in capsys.readouterr().out
    assert differing(result_of(tmp_path / "whole")[0], result_of(tmp_path / "parted")[0]) != []


@pytest.mark.usefixtures("needs_compiler")
@pytest.mark.slow  # half a minute of compiling each
@pytest.mark.parametrize(
    ("case", "compile", "tier"), [("device", "on", "fused + compiled"), ("entry point", "inductor", "compiled")]
)
def test_a_compiled_run_too(case, compile, tier, tmp_path, monkeypatch):
    """The same for compiled programs, whose state may live elsewhere."""
    train(settings_of(case, tmp_path / "whole", compile=compile, num_envs=2, num_steps=16))
    config = settings_of(case, tmp_path / "parted", compile=compile, num_envs=2, num_steps=16)
    stopped_after(3, config, monkeypatch)
    resumed = train(replace(config, resume=config.run_dir))
    assert resumed.summary["tier"] == tier
    assert differing(result_of(tmp_path / "whole"), result_of(tmp_path / "parted")) == []


def test_more_steps_than_planned(tmp_path, capsys):
    """A finished run goes on for longer and equals a longer one, where nothing is annealed; where it is, that is said."""
    config = settings_of("entry point", tmp_path / "long", anneal_lr=False, num_iterations=7)
    train(config)
    short = replace(config, run_dir=str(tmp_path / "short"), num_iterations=3)
    train(short)
    capsys.readouterr()
    assert console(["--resume", short.run_dir, "--num-iterations", "7"]) == 0
    assert "new length" not in capsys.readouterr().out
    assert differing(result_of(tmp_path / "long"), result_of(tmp_path / "short")) == []

    train(replace(short, run_dir=str(tmp_path / "annealed"), anneal_lr=True, anneal_clip=True))
    assert console(["--resume", str(tmp_path / "annealed"), "--num-iterations", "7"]) == 0
    assert "the run has a new length: learning rate and clip range" in capsys.readouterr().out


def test_a_restart_is_a_truncation(tmp_path):
    """Cut episodes are bootstrapped, not counted: 200 steps are longer than it is between two restarts."""
    config = settings_of("entry point", tmp_path / "run", env_id="Pendulum-v1", num_iterations=4)
    result = train(config)
    with (result.run_dir / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["truncations"]) for row in rows] == [0, 4, 0, 4]
    assert [int(row["terminations"]) for row in rows] == [0, 0, 0, 0]
    assert [int(row["episodes"]) for row in rows] == [0, 0, 0, 0]
    assert [int(row["global_step"]) for row in rows] == [128, 256, 384, 512]


def test_restarts_are_seeded(tmp_path):
    """Each restart has a seed of its own: the episodes after it are not those of the run's start again."""
    run = train(settings_of("sync", tmp_path / "run", checkpoint_iterations=1, num_iterations=3, learning_rate=1e-12))
    with (run.run_dir / "metrics.csv").open(newline="") as file:
        returns = {row["episodic_return_mean"] for row in csv.DictReader(file)}
    assert len(returns) == 3


def test_what_a_fault_leaves_goes_on_exactly(tmp_path):
    """An environment that fails in iteration 3 leaves iteration 2 as it was, random numbers included."""
    marker = tmp_path / "marker"
    kwargs = {"kind": "raise", "index": 2, "at": 70, "marker": str(marker)}
    common = {"env_id": "environments:FaultyVector-v0", "env_kwargs": kwargs, "checkpoint_iterations": 1, "num_iterations": 4}
    common["check_env"] = False  # which steps them too
    train(settings_of("entry point", tmp_path / "whole", **common))
    marker.touch()
    config = settings_of("entry point", tmp_path / "parted", **common)
    with pytest.raises(TrainingFault, match=r"iteration 3: .*step 6 .*the wheel came off"):
        train(config)
    marker.unlink()
    train(replace(config, resume=config.run_dir))
    assert differing(result_of(tmp_path / "whole"), result_of(tmp_path / "parted")) == []


def test_what_a_faulty_update_leaves_goes_on_exactly(tmp_path, monkeypatch):
    """No checkpoint but the fault's own: it holds iteration 2, not the random numbers and environments of half of the third."""
    train(settings_of("device", tmp_path / "whole"))
    config = settings_of("device", tmp_path / "parted")
    calls = []

    def failing(learned):
        calls.append(learned)
        if len(calls) == 3:
            raise TrainingFault("policy_loss is not finite")
        return read_metrics(learned)

    with monkeypatch.context() as patched:
        patched.setattr("fastppo.training.training_run.read_metrics", failing)
        with pytest.raises(TrainingFault, match="iterations up to 2 are kept"):
            train(config)
    train(replace(config, resume=config.run_dir))
    assert differing(result_of(tmp_path / "whole"), result_of(tmp_path / "parted")) == []


def test_a_setting_that_matters_is_named(tmp_path, capsys):
    """Threads change the order of sums; what the checkpoint was made with is kept, and a difference is told."""
    config = settings_of("device", tmp_path / "run", num_threads=1)
    train(config)
    path = tmp_path / "run" / "checkpoints" / "last.pt"
    kept = torch.load(path, weights_only=True)
    kept["made_with"] |= {"torch": "2.11.0", "compiled threads": "3"}
    torch.save(kept, path)
    capsys.readouterr()
    train(replace(config, resume=config.run_dir))
    told = capsys.readouterr().out
    assert re.search(r"different from before, so last bits may differ: compiled threads 3 -> 1, torch 2\.11\.0 -> 2\.", told)


def test_a_checkpoint_of_another_device_goes_on(tmp_path, capsys):
    """Its generators are of another kind: random numbers start anew, and that is said."""
    config = settings_of("device", tmp_path / "run")
    train(config)
    path = tmp_path / "run" / "checkpoints" / "last.pt"
    kept = torch.load(path, weights_only=True)
    kept["made_with"]["device"] = "cuda:0"
    kept["generators"] = dict.fromkeys(kept["generators"], torch.zeros(16, dtype=torch.uint8))
    torch.save(kept, path)
    capsys.readouterr()
    train(replace(config, resume=config.run_dir, num_iterations=6))
    told = capsys.readouterr().out
    assert "random numbers start anew, since those of cuda:0 cannot go on on cpu" in told
    assert "the environments start new episodes" in told


@pytest.mark.parametrize(
    ("damage", "goes_on_from"),
    [
        (lambda path: os.truncate(path, 3000), "iteration-4.pt"),
        (lambda path: path.write_bytes(b""), "iteration-4.pt"),
        (lambda path: path.unlink(), "iteration-5.pt"),  # the same under its other name
    ],
    ids=["truncated", "empty", "missing"],
)
def test_the_checkpoint_before_a_damaged_one(damage, goes_on_from, tmp_path, capsys):
    """The last few are kept: a damaged one is named, the one before is taken, and what came after is made again."""
    config = settings_of("device", tmp_path / "run", checkpoint_iterations=1)
    train(config)
    whole = result_of(tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["best.pt", "iteration-4.pt", "iteration-5.pt", "last.pt"]
    assert (checkpoints / "last.pt").samefile(checkpoints / "iteration-5.pt")
    capsys.readouterr()
    damage(checkpoints / "last.pt")
    assert console(["--resume", config.run_dir]) == 0
    assert f"resuming from {checkpoints / goes_on_from} instead" in capsys.readouterr().out
    assert differing(whole, result_of(tmp_path / "run")) == []


def test_keep_checkpoints(tmp_path):
    """As many as asked for, the newest of them; those of a future that a resumed run did not take are gone."""
    config = settings_of("device", tmp_path / "run", checkpoint_iterations=1, keep_checkpoints=3)
    train(config)
    checkpoints = tmp_path / "run" / "checkpoints"

    def kept():
        return sorted(path.name for path in checkpoints.glob("iteration-*"))

    assert kept() == ["iteration-3.pt", "iteration-4.pt", "iteration-5.pt"]
    shutil.copy(checkpoints / "iteration-3.pt", checkpoints / "last.pt")
    (checkpoints / "iteration-final.pt").write_text("somebody's own")
    train(replace(config, resume=config.run_dir, num_iterations=4))
    assert kept() == ["iteration-2.pt", "iteration-3.pt", "iteration-4.pt", "iteration-final.pt"][1:]


@pytest.mark.parametrize("flags", [["--checkpoint-iterations", "3"], ["--no-exact-resume"]])
def test_what_would_not_be_exact_is_refused(flags, tmp_path, capsys):
    """Restarts at other iterations, or none, would make another run of it."""
    config = settings_of("entry point", tmp_path / "run", num_iterations=2)
    train(config)
    assert console(["--resume", config.run_dir, *flags]) == 2
    assert "cannot change on --resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "promised"),
    [
        ({"compile": "off"}, "same seed: the same bits, with the versions"),
        (
            {"compile": "auto", "rnn": "gru", "rnn_hidden_size": 4},
            "until the run changes to faster programs (always with --compile on or off)",
        ),
        ({"exact_resume": True}, "stopped and resumed: the same as without the stop"),
        ({"backend": "torch"}, "stopped and resumed: the same as without the stop"),
    ],
    ids=str,
)
def test_what_is_promised_is_told_and_kept(settings, promised, tmp_path, capsys):
    """Printed at the start and kept in summary.json, with the versions of everything that has a part in it."""
    settings = {"exact_resume": False, "num_iterations": 1, "verbose": 2} | settings
    result = train(settings_of("entry point", tmp_path / "run", **settings))
    told = capsys.readouterr().out
    assert promised in told
    assert any(promised in line for line in result.summary["reproducibility"])
    assert {"python", "fastppo", "torch", "gymnasium", "numpy", "tensordict"} <= set(result.summary["versions"])
    assert set(result.summary["made_with"]) == {"device", "processor", "eager threads", "compiled threads"}
    assert np.all([line in told for line in result.summary["reproducibility"]])


def test_an_episode_does_not_go_on_in_another(tmp_path):
    """Without --exact-resume the environments start new episodes: none is 150 steps of before longer than its time limit."""
    settings = {"env_id": "Pendulum-v1", "num_steps": 150, "norm_reward": True}
    train(tiny(tmp_path / "run", **settings, num_iterations=1))
    train(tiny(tmp_path / "run", **settings, num_iterations=3, resume=str(tmp_path / "run")))
    rows = read_rows(tmp_path / "run" / "metrics.csv")
    assert [row["episodes"] for row in rows] == ["0", "0", "2"]
    assert float(rows[-1]["episodic_length_mean"]) == 200

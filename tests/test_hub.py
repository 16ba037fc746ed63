"""Runs on the Hugging Face Hub: pushed, loaded, evaluated. Against a Hub on this machine, through the library itself."""

import json
import os
import re
import sys

import numpy as np
import pytest
import torch

from fastppo import TrainConfig, UsageError, load_policy
from fastppo.__main__ import console
from fastppo.run.checkpoint_file import FORMAT
from support.fake_hub import TOKEN
from support.hostile import edit_config, refused

REPO = "me/cart"


@pytest.fixture
def pushed(run_dir, hub, tmp_path, monkeypatch):
    """A run that was pushed as REPO; the working directory is empty."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    (run_dir / "videos").mkdir()
    (run_dir / "videos" / "iteration-2.mp4").write_bytes(b"a video")
    (run_dir / "curves.png").write_bytes(b"a picture")
    edit_config(run_dir, init_from="/home/me/runs/x", preset="/home/me/preset.json")
    assert console(["push", str(run_dir), REPO, "--episodes", "3"]) == 0
    return run_dir


def test_push_and_load(pushed, hub, capsys):
    """What is uploaded, in the Hub's format of results; what is loaded and evaluated from there is the same policy."""
    from huggingface_hub import ModelCard

    files = hub.files[REPO]
    assert set(files) == {"README.md", "checkpoints/best.pt", "config.json", "curves.png", "replay.mp4", "summary.json"}
    assert files["checkpoints/best.pt"] == (pushed / "checkpoints" / "best.pt").read_bytes()
    assert files["replay.mp4"] == b"a video"
    config = json.loads(files["config.json"])
    assert (config["run_dir"], config["init_from"], config["preset"]) == (None, None, "none")
    assert b"/home/me" not in files["config.json"] + files["README.md"] + files["summary.json"]
    card = ModelCard(files["README.md"].decode())
    (result,) = card.data.eval_results
    summary = json.loads(files["summary.json"])
    assert (result.task_type, result.dataset_type, result.metric_type) == (
        "reinforcement-learning",
        "CartPole-v1",
        "mean_reward",
    )
    assert result.metric_value == f"{summary['eval_return_mean']:.2f} +/- {summary['eval_return_std']:.2f}"
    assert summary["eval_episodes"] == 3
    assert {"CartPole-v1", "reinforcement-learning", "fastppo"} <= set(card.data.tags)
    for words in ("![curves.png](curves.png)", f'load_policy("hf://{REPO}")', "--preset cart/config.json", '"norm_obs": true'):
        assert words in card.text
    obs = np.random.default_rng(0).normal(size=(100, 4)).astype(np.float32)
    np.testing.assert_array_equal(load_policy(f"hf://{REPO}").act(obs), load_policy(pushed).act(obs))
    capsys.readouterr()
    assert console(["evaluate", f"hf://{REPO}@main", "--episodes", "3"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["return_mean"] == summary["eval_return_mean"]
    assert console(["export", f"hf://{REPO}", "--format", "safetensors"]) == 0
    assert os.listdir() == ["policy.safetensors"]  # here, and not in the cache


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["evaluate", "hf://me/none"], "no such repository"),
        (["evaluate", f"hf://{REPO}@old"], "no such revision"),
        (["evaluate", f"hf://{REPO}", "--checkpoint", "last"], "holds no run"),
        (["evaluate", "hf://../../etc"], "owner/name"),
        (["push"], "missing argument: Directory of the run. (all flags"),
        (["push", "RUN", "me"], "owner/name"),
        (["push", "RUN", "others/cart"], "may not write"),
        (["push", "nowhere", REPO], "nowhere"),
        (["push", "RUN", REPO, "--episodes", "0"], "--episodes"),
    ],
)
def test_one_line(command, words, pushed, capsys):
    """What is wrong with a name, or not allowed: one line, exit code 2."""
    capsys.readouterr()
    assert console([str(pushed) if word == "RUN" else word for word in command]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1


def test_without_a_login_or_a_network(pushed, monkeypatch, capsys):
    """One line for each; a policy that was loaded before is still there."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", TOKEN[:-1] + "b")
    assert console(["push", str(pushed), REPO]) == 2
    assert "hf auth login" in capsys.readouterr().err
    load_policy(f"hf://{REPO}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    load_policy(f"hf://{REPO}")
    refused(lambda: load_policy("hf://me/other"), "hf://me/other", "cannot be reached")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(lambda: load_policy(f"hf://{REPO}"), "pip install 'fastppo[hub]'")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def bomb(run_dir):
    torch.save({"format": FORMAT, "policy": Bomb()}, run_dir / "checkpoints" / "best.pt")


def cut(run_dir):
    os.truncate(run_dir / "checkpoints" / "best.pt", 1000)


def no_config(run_dir):
    (run_dir / "config.json").unlink()


def huge_config(run_dir):
    (run_dir / "config.json").write_bytes(b" " * (2**20 + 1))


def other_network(run_dir):
    edit_config(run_dir, hidden_sizes=[9])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (bomb, "nothing in it was executed"),
        (cut, "damaged"),
        (no_config, "holds no run of fastppo"),
        (huge_config, "larger than"),
        (other_network, "does not hold the policy"),
    ],
)
def test_a_hostile_repository(change, words, run_dir, hub, tmp_path, monkeypatch):
    """A repository is a stranger's run directory: data, and refused in one line where it is more, or less."""
    monkeypatch.chdir(tmp_path)
    change(run_dir)
    hub.put("you/bad", run_dir)
    refused(lambda: load_policy("hf://you/bad"), words)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "names",
    [
        {"env_id": "evil:Env"},
        {"env_id": "evil.mod"},
        {"env_kwargs": {"x": {"__object__": "evil:print"}}},
        {"env_kwargs": {"x": [{"y": {"type": "f", "__object__": "evil:print"}}]}},
        {"env_kwargs": {"env_id": "evil:Env-v0"}},
        {"wrapper": ["evil:Wrapper"]},
        {"policy": "evil:Net"},
    ],
)
def test_a_repository_that_names_code(names, run_dir, hub, tmp_path, monkeypatch, capsys):
    """evaluate and export import nothing that a repository names; load_policy never does."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("open('executed', 'w')\n")
    edit_config(run_dir, **names)
    hub.put("you/bad", run_dir)
    for verb in ("evaluate", "export"):
        assert console([verb, "hf://you/bad"]) == 2
        error = capsys.readouterr().err
        assert re.search("names code to import, evil[:.]", error)
        assert len(error.splitlines()) == 1
    if "policy" not in names:
        load_policy("hf://you/bad")
    assert not (tmp_path / "executed").exists()
    assert TrainConfig.from_json(run_dir / "config.json")
    assert "evil" not in sys.modules


def test_an_unfinished_run_is_not_pushed(run_dir, hub, capsys):
    (run_dir / "summary.json").unlink()
    assert console(["push", str(run_dir), REPO]) == 2
    assert "has this run ended?" in capsys.readouterr().err
    assert hub.files == {}
    with pytest.raises(UsageError):
        load_policy(f"hf://{REPO}")

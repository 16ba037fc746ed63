"""Environments of OpenAI's gym 0.21 and 0.26: recognised by what they are, converted by shimmy."""

import sys

import numpy as np
import pytest
from environments import Walk

from fastppo import train
from fastppo.__main__ import console
from fastppo.analysis.rendered_episodes import play
from fastppo.envs.factory import EnvConfig, make_envs
from fastppo.envs.old_gym import is_old
from fastppo.envs.render import frames_per_second, make_render_env
from fastppo.run.metrics_file import read_rows
from support import gym_stand_in
from support.runs import tiny

MODULE = "support.gym_stand_in"


@pytest.fixture(autouse=True)
def _gym(monkeypatch):
    gym_stand_in.install(monkeypatch)


@pytest.mark.parametrize("name", ["Of21", "make_21", "Of26", "make_26", "Before-v0", "After-v0"])
def test_both_interfaces_train(name, tmp_path):
    """Episodes of five steps, truncated; rewards of 0 or 1; seeds reach the environment. The last two are in gym's registry."""
    result = train(tiny(tmp_path / "run", env_id=f"{MODULE}:{name}", num_steps=32, eval_episodes=1))
    row = read_rows(result.run_dir / "metrics.csv")[-1]
    assert float(row["episodic_length_mean"]) == 5
    assert (int(row["terminations"]), int(row["truncations"]) > 0) == (0, True)
    assert 0 <= float(row["episodic_return_mean"]) <= 5
    envs = make_envs(EnvConfig(f"{MODULE}:{name}", 2, "sync"))
    first, again, other = (np.array(envs.reset(seed=seed)[0]) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first[1], other[0])
    assert first[0, 0] != first[1, 0]


@pytest.mark.parametrize("name", ["Unseeded21", "Unseeded-v0"])
def test_without_a_seed(name, tmp_path, capsys):
    """It trains, and the check says that a seed does not repeat it. The second is in gym's registry, as Crafter's is."""
    train(tiny(tmp_path / "run", env_id=f"{MODULE}:{name}"))
    assert "reset with the same seed twice gave two different first observations" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["make_21", "make_26", "Before-v0", "After-v0"])
def test_videos(name):
    """gym 0.21 is told the mode when it renders, under the names of its metadata."""
    envs = make_render_env(EnvConfig(f"{MODULE}:{name}"))

    class Zero:
        def act(self, obs, deterministic=True, mask=None):
            return np.zeros(1, np.int64)

        def reset(self, done=None): ...

    frames = []
    assert play(Zero(), envs, frames.append, 0, True, 100) == (0.0, 5)
    assert [int(frame.max()) for frame in frames] == [0, 1, 2, 3, 4, 5]
    assert frames_per_second(envs) == (7 if name in ("make_21", "Before-v0") else 30)
    envs.close()


def test_what_is_not_installed(monkeypatch, tmp_path, capsys):
    """One line that names the extra."""
    monkeypatch.setitem(sys.modules, "shimmy.openai_gym_compatibility", None)
    flags = ["--env-id", f"{MODULE}:make_21", "--run-dir", str(tmp_path / "run"), "--plain"]
    assert console(["train", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(
        f"--env-id {MODULE}:make_21: an environment of OpenAI's gym needs a package that is not installed: "
        "pip install 'fastppo[gym]', or write it for gymnasium"
    )


def test_a_space_that_cannot_be_converted(monkeypatch, capsys):
    """One line."""
    monkeypatch.setattr(gym_stand_in.Of21, "action_space", "a space of another package")
    assert console(["train", "--env-id", f"{MODULE}:Of21"]) == 2
    assert "it is an environment of OpenAI's gym: Cannot convert space of type" in capsys.readouterr().err


def test_without_gym_itself(capsys):
    """Crafter's class is one of gym's only where gym can be imported."""
    assert console(["train", "--env-id", f"{MODULE}:StandsAlone"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("not a gymnasium Env; one of OpenAI's gym needs gym itself too: pip install gym")


def test_gymnasiums_own_are_not_old():
    """Nor any other object."""
    assert not is_old(Walk())
    assert not is_old(None)
    assert is_old(gym_stand_in.make_26())

"""--policy: a network of one's own on the command line, for every verb."""

import json
import re

import numpy as np
import pytest
import torch

from fastppo import TrainConfig, UsageError, load_policy, train
from fastppo.analysis.search_space import built_in_space
from fastppo.config import read_run_config
from fastppo.evaluate import console as evaluate
from fastppo.export import console as export
from fastppo.train import console
from support.networks import Relu, Small
from support.processes import Started, assert_same_run
from support.runs import rows_of, tiny

FLAGS = ["--num-envs", "2", "--num-steps", "16", "--num-iterations", "2", "--plain", "--compile", "off", "--eval-episodes", "2"]
NETS = """
import torch
from torch import nn

class Wide(nn.Module):
    def __init__(self, inputs, num_outputs, width=8):
        super().__init__()
        self.body = nn.Linear(*inputs, width)
        self.actor, self.critic = nn.Linear(width, num_outputs), nn.Linear(width, 1)

    def forward(self, obs):
        x = torch.relu(self.body(obs))
        return self.actor(x), self.critic(x)

class Nested:
    @staticmethod
    def make(inputs, num_outputs):
        return Wide(inputs, num_outputs, 5)

def wrong(inputs):
    return None

number = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch, request):
    """The folder that a command starts in, with a module of networks, which no other test sees."""
    name = re.sub(r"\W", "_", request.node.name)
    (tmp_path / f"nets_{name}.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    return f"nets_{name}"


@pytest.mark.long
def test_every_verb_finds_it(folder, tmp_path, capsys):
    """Train, evaluate, resume and export from the folder of the module, which config.json names."""
    assert console([*FLAGS, "--policy", f"{folder}:Wide", "--run-dir", "run"]) == 0
    assert read_run_config(tmp_path / "run").policy == f"{folder}:Wide"
    weights = torch.load("run/checkpoints/last.pt", weights_only=True)["policy"]["weights"]
    assert weights["body.weight"].shape == (8, 4)
    assert evaluate(["run", "--episodes", "2"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["episodes"] == 2
    assert console(["--resume", "run", "--num-iterations", "3"]) == 0
    assert len(rows_of(tmp_path / "run")) == 3
    pytest.importorskip("onnxruntime")
    assert export(["run"]) == 0
    assert (tmp_path / "run" / "policy.onnx").exists()


def test_it_is_what_python_trains(tmp_path):
    """By name and as an object: the same bits, and the same name in config.json."""
    by_name = train(tiny(tmp_path / "name", policy="support.networks:Small"))
    by_object = train(tiny(tmp_path / "object"), policy=Small)
    assert torch.equal(by_name.policy.params, by_object.policy.params)
    assert {read_run_config(result.run_dir).policy for result in (by_name, by_object)} == {"support.networks:Small"}
    # what is given in Python counts
    other = train(tiny(tmp_path / "other", policy="support.networks:Small"), policy=Relu)
    assert read_run_config(other.run_dir).policy == "support.networks:Relu"


def test_a_name_with_dots(folder, tmp_path):
    """A function of a class."""
    assert console([*FLAGS, "--policy", f"{folder}:Nested.make", "--run-dir", "run"]) == 0
    weights = torch.load("run/checkpoints/last.pt", weights_only=True)["policy"]["weights"]
    assert weights["body.weight"].shape == (5, 4)


def test_loading_imports_nothing(folder, tmp_path):
    """load_policy does not import what a directory names: it asks for the factory."""
    assert console([*FLAGS, "--policy", f"{folder}:Wide", "--run-dir", "run"]) == 0
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace(folder, "this_would_be_imported"))
    with pytest.raises(UsageError, match=r"a Wide of your own: give what made it as policy=\.\.\. in Python"):
        load_policy("run")
    assert evaluate(["run"]) == 2


@pytest.mark.long
def test_seeds_and_ranks(tmp_path):
    """Each seed has weights of its own; two processes train what one does."""
    result = train(tiny(tmp_path / "seeds", policy="support.networks:Small", num_seeds=2))
    one, two = (load_policy(seed.run_dir, policy=Small).params for seed in result.seeds)
    assert not torch.allclose(one, two)
    for size in (1, 2):
        flags = [*FLAGS, "--policy", "support.networks:Small", "--minibatch-shards", "2", "--no-check-env"]
        started = Started(tmp_path, size, [*flags, "--run-dir", str(tmp_path / str(size))])
        assert started.wait() == [0] * size, started.said("err")
    assert_same_run(tmp_path / "2", tmp_path / "1")


def test_a_run_starts_from_another_of_the_same_network(tmp_path):
    """--init-from takes its weights; one of another network says so."""
    theirs = train(tiny(tmp_path / "theirs", policy="support.networks:Small")).run_dir
    ours = train(tiny(tmp_path / "ours", policy="support.networks:Small", init_from=str(theirs), learning_rate=1e-12))
    np.testing.assert_allclose(ours.policy.params, load_policy(theirs, policy=Small).params, atol=1e-6)
    with pytest.raises(UsageError, match="of your own: give what made it as policy="):
        train(tiny(tmp_path / "mlp", init_from=str(theirs)))


def test_a_sweep_searches_no_widths(tmp_path):
    """They are those of our networks."""
    space = built_in_space(TrainConfig(policy="support.networks:Small"), 10_000, ())
    assert "learning_rate" in space
    assert not {"hidden_sizes", "activation"} & space.keys()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Wid", "has no 'Wid'; nearest: Wide"),
        ("number", "number is of type int, not a function or class"),
        ("wrong", r"policy\(\(4,\), 2\) failed: TypeError: wrong\(\) takes 1 positional argument"),
    ],
)
def test_a_wrong_name_is_one_line(folder, name, says, tmp_path, capsys):
    """With the nearest one, before anything is written."""
    assert console([*FLAGS, "--policy", f"{folder}:{name}", "--run-dir", "run"]) == 2
    error = capsys.readouterr().err
    assert re.search(says, error), error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_what_is_no_name_is_one_line(tmp_path, monkeypatch, capsys):
    """A module that is not there, one that is near, no module, and memory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_nets.py").write_text(NETS)
    for flags, says in (
        (
            ["--policy", "my_net:Wide"],
            "--policy my_net:Wide: module 'my_net' cannot be imported: it is neither installed nor in",
        ),
        (["--policy", "Wide"], "--policy Wide: write module:NAME, such as my_module:Wide"),
        (["--policy", "my_nets.py:Wide"], "write it with dots and without .py, as my_nets"),
        (["--policy", "a:B", "--rnn", "gru"], "--rnn gru is a part of our networks, and --policy is a whole one of yours"),
        (
            ["--policy", "my_nets:Wide", "--init", "torch"],
            "--init torch is for our networks, and yours draws its own weights: use --init orthogonal",
        ),
    ):
        assert console([*FLAGS, *flags, "--run-dir", "run"]) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

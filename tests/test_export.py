"""An exported file acts as the policy does, run by onnxruntime and by torch.export; what cannot be exported leaves nothing."""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import composites
import gymnasium as gym
import numpy as np
import pytest
import torch
from environments import ACTIONS, OBSERVATIONS
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary
from gymnasium.vector.utils import batch_space
from torch import nn

from fastppo import TrainConfig, TrainingFault, UsageError, load_policy, train
from fastppo.__main__ import console as fastppo_console
from fastppo.analysis.export_trial import differences, make_trial
from fastppo.export import console, export_policy
from fastppo.policy.agent import Agent
from fastppo.policy.deployment import DeployedPolicy
from fastppo.policy.distributions import choices
from fastppo.policy.make_network import make_network
from fastppo.policy.normalization import RunningMoments, make_normalization
from fastppo.policy.spaces import action_spec, obs_spec
from support.pages import PAGES, command_in, python_in, section

SUFFIX = {"onnx": ".onnx", "torch": ".pt2"}
PENDULUM = Box(np.float32([-1, -1, -8]), np.float32([1, 1, 8]))
CASES = {  # observation and action space, squash, whether a mask comes in the info
    "CartPole": (Box(-np.inf, np.inf, (4,), np.float32), Discrete(2), False, False),
    "Pendulum clipped": (PENDULUM, Box(-0.5, 0.5, (1,), np.float32), False, False),
    "Pendulum squashed": (PENDULUM, Box(-2.0, 2.0, (1,), np.float32), True, False),
    "masked choices": (OBSERVATIONS["masked"], ACTIONS["multi-discrete"], False, False),
    "mask in the info": (OBSERVATIONS["float64"], ACTIONS["discrete from -2"], False, True),
    "Dict": (Dict({"a.b": Dict(c=MultiBinary((2, 2))), "x": OBSERVATIONS["float32"]}), ACTIONS["box matrix"], False, False),
    "image": (OBSERVATIONS["image (H, W, C)"], ACTIONS["multi-binary"], False, False),
    "one-hot": (OBSERVATIONS["discrete"], ACTIONS["multi-discrete 2-D"], False, False),
}
PARTS = (OBSERVATIONS["float32"], composites.SPACES["hybrid"], True, True)  # of a Dict action


def format_params():
    """Both formats; onnx where its packages are."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        return [pytest.param("onnx", marks=pytest.mark.skip(reason=str(error))), "torch"]
    return ["onnx", "torch"]


MEMORIES = {  # case of the same name, settings of its memory
    "CartPole": {"rnn": "lstm", "rnn_layers": 2},
    "Pendulum squashed": {"rnn": "gru"},
    "masked choices": {"rnn": "lstm", "rnn_shared": True},
    "mask in the info": {"rnn": "gru", "rnn_layers": 2, "share_backbone": True},
}
both = pytest.mark.parametrize("format", format_params())


def make_agent(case, normalize=True, **settings):
    """A policy that nobody trained, whose actions vary, with statistics that have moved."""
    obs_space, action_space, squash, masked = CASES.get(case, PARTS)
    action = action_spec(action_space, squash)
    obs = obs_spec(obs_space, action.num_logits if masked else None, action)
    network = make_network(obs, action, TrainConfig(cnn_size=16, hidden_sizes=(8, 8), rnn_hidden_size=8, **settings))
    generator = torch.Generator().manual_seed(1)
    params = network.init(generator)
    params += torch.randn(params.shape, generator=generator) * (0.02 if obs.has_images else 1.0)
    moments = {}
    for leaf in obs.normalized if normalize else ():
        mean, var = torch.rand(2, *leaf.shape, generator=generator, dtype=torch.float64)
        moments[leaf.key] = RunningMoments(mean, var + 0.1, torch.tensor(9.0, dtype=torch.float64))
    normalization = make_normalization(moments, None, torch.zeros(()), torch.ones(()))
    return Agent(obs_space, obs, action, network, params, normalization)


def observed(agent, rows, seed=3):
    """Observations as the environment gives them, a mask from its info, and both by the names of the file's inputs."""
    space = batch_space(agent.obs_space, rows)
    space.seed(seed)
    obs, mask = space.sample(), None
    if agent.obs.info_mask is not None:
        mask = np.random.default_rng(seed).integers(2, size=(rows, agent.action.num_logits), dtype=np.int8)
    return obs, mask, {leaf.key: leaf.find(obs) if leaf is not agent.obs.info_mask else mask for leaf in agent.obs}


def player(path):
    """The file as its users run it: inputs by name -> a list of outputs."""
    if path.suffix == ".pt2":
        module = torch.export.load(path).module()

        def run(inputs):
            outputs = module({name: torch.from_numpy(x) for name, x in inputs.items()})
            return [x.numpy() for x in (outputs if isinstance(outputs, tuple) else (outputs,))]

        return run
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    names = [output.name for output in session.get_outputs()]
    assert names == ["action", "next_memory"][: len(names)]
    return lambda inputs: session.run(names, inputs)


def play(path, inputs):
    """Actions of a file without memory."""
    (action,) = player(path)(inputs)
    return action


def near_ties(agent, inputs):
    """Where the two best of a choice's logits are within 1e-5, (N, K)."""
    with torch.no_grad():
        logits, _ = DeployedPolicy(agent).step({name: torch.from_numpy(x) for name, x in inputs.items()})
    best = [part.topk(2).values for part in logits.split(choices(agent.action.distribution, agent.action.size), -1)]
    return torch.stack([two[:, 0] - two[:, 1] < 1e-5 for two in best], -1).numpy()


def assert_same(agent, inputs, got, expected):
    """Actions as the policy's, each one of the action space: choices exactly, but for near ties, numbers to 1e-5."""
    assert got.dtype == expected.dtype == agent.action.space.dtype
    assert got.shape == expected.shape == (len(expected), *agent.action.space.shape)
    assert all(agent.action.space.contains(np.asarray(action)) for action in got)
    if got.dtype.kind == "f":
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    else:
        different = (got != expected).reshape(len(expected), -1)
        assert not different.any() or near_ties(agent, inputs)[different].all()


@pytest.mark.parametrize(
    ("case", "format"),
    [
        *[(case, "onnx") for case in CASES],
        *[(case, "torch") for case in ("Pendulum squashed", "masked choices", "image")],  # an onnx file begins as a torch one
    ],
)
@pytest.mark.long
def test_a_file_acts_as_the_policy_does(case, format, tmp_path):
    """The same actions on 1000 observations at once, on 7 and on one: choices exactly, numbers to 1e-5."""
    for package in ("onnx", "onnxruntime", "onnxscript") if format == "onnx" else ():
        pytest.importorskip(package)
    agent = make_agent(case)
    path = tmp_path / f"policy{SUFFIX[format]}"
    export_policy(agent, path, format)
    for rows in (1000, 7, 1):
        obs, mask, inputs = observed(agent, rows)
        assert_same(agent, inputs, play(path, inputs), agent.act(obs, action_mask=mask))


@pytest.mark.parametrize(
    "case", [*list(MEMORIES)[:2], *[pytest.param(case, marks=pytest.mark.slow) for case in list(MEMORIES)[2:]]]
)
@pytest.mark.long
def test_a_file_remembers_as_the_policy_does(case, tmp_path):
    """In both formats, for 40 environments and for one: actions and memory over eight steps, episodes beginning in between.

    A policy that forgets at each step acts otherwise, and so does one that never forgets: a file that does either is noticed.
    """
    agent = make_agent(case, **MEMORIES[case])
    obs, mask, _ = observed(agent, 5)
    agent.act(obs, action_mask=mask)
    memory = agent.rnn_state
    size = 8 * agent.network.rnn.num_layers * (2 if agent.network.rnn.kind == "lstm" else 1)
    files = {}
    for format in (param for param in format_params() if isinstance(param, str)):
        told = str(export_policy(agent, tmp_path / f"policy{SUFFIX[format]}", format))
        assert re.search(rf"memory float32 \(batch, {size}\) -> action .*, next_memory float32 \(batch, {size}\); ", told)
        assert told.endswith(" on 256 observations, 8 steps of 32")
        files[format] = player(tmp_path / f"policy{SUFFIX[format]}")
    assert agent.rnn_state is memory

    for rows in (40, 1):
        forgetful, faithful = make_agent(case, **MEMORIES[case]), make_agent(case, **MEMORIES[case])
        agent.reset()
        memories = {format: np.zeros((rows, size), np.float32) for format in files}
        others = np.zeros(2, int)
        for step in range(8):
            obs, mask, inputs = observed(agent, rows, seed=step)
            first = np.arange(rows) % 3 == step % 3
            agent.reset(first)
            forgetful.reset()
            expected = agent.act(obs, action_mask=mask)
            others += [(other.act(obs, action_mask=mask) != expected).any() for other in (forgetful, faithful)]
            for format, run in files.items():
                memories[format][first] = 0
                given = {**inputs, "memory": memories[format]}
                action, memories[format] = run(given)
                assert_same(agent, given, action, expected)
                assert memories[format].dtype == np.float32
                np.testing.assert_allclose(memories[format], agent.rnn_state[:, :size], rtol=0, atol=1e-5)
        assert rows == 1 or (others > 0).all()


@pytest.mark.parametrize("case", CASES)
def test_the_cases_tell_what_they_are_for(case):
    """Actions vary, and would be others without the statistics, the mask or the bounds: a file without one is noticed."""
    agent = make_agent(case)
    obs, mask, inputs = observed(agent, 1000)
    action = agent.act(obs, action_mask=mask)
    assert len(np.unique(action.reshape(1000, -1), axis=0)) > 1
    if agent.obs.normalized:
        assert (make_agent(case, normalize=False).act(obs, action_mask=mask) != action).any()
    if "action_mask" in inputs:
        everything = np.ones_like(inputs["action_mask"])
        obs = {**obs, "action_mask": everything} if isinstance(obs, dict) else obs
        assert (agent.act(obs, action_mask=None if isinstance(obs, dict) else everything) != action).any()
    if case == "Pendulum clipped":
        assert {-0.5, 0.5} <= set(action.flatten().tolist())


class Own(nn.Module):
    """A network of somebody's own, with weights, frozen weights and buffers that are no zeros."""

    def __init__(self, inputs, num_outputs):
        super().__init__()
        self.norm = nn.BatchNorm1d(*inputs)
        self.frozen = nn.Linear(*inputs, 5).requires_grad_(False)
        self.actor, self.critic = nn.Linear(5, num_outputs), nn.Linear(5, 1)
        self.norm.running_mean.fill_(0.3)

    def forward(self, obs):
        """obs (R, D) -> outputs (R, A), value (R, 1)."""
        x = self.frozen(self.norm(obs)).tanh()
        return self.actor(x), self.critic(x)


class Branching(Own):
    """One that no tracer can follow: what is computed hangs on a number."""

    def forward(self, obs):
        """As Own's, but for some observations."""
        return super().forward(obs if obs.sum() > 0 else -obs)


def train_run(run_dir, policy=None, **settings):
    """A run of two iterations."""
    config = TrainConfig(num_envs=4, num_steps=32, num_iterations=2, eval_episodes=0, norm_obs=True, plain=True, compile="off")
    return train(replace(config, run_dir=str(run_dir), **settings), policy=policy)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run with a network of ours."""
    return train_run(tmp_path_factory.mktemp("export") / "run").run_dir


@both
def test_a_network_of_ones_own(format, tmp_path):
    """From Python it is exported as ours is."""
    agent = train_run(tmp_path / "run", Own).policy
    path = tmp_path / f"policy{SUFFIX[format]}"
    export_policy(agent, path, format)
    obs, _, inputs = observed(agent, 1000)
    different = play(path, inputs) != agent.act(obs)
    assert not different.any() or near_ties(agent, inputs)[different].all()


def test_a_network_that_cannot_be_traced(tmp_path, capsys):
    """A line, from Python and on the command line."""
    agent = train_run(tmp_path / "run", Branching).policy
    with pytest.raises(UsageError, match=r"torch\.export cannot take this policy's network: "):
        export_policy(agent, tmp_path / "policy.pt2", "torch")
    assert console([str(tmp_path / "run"), "--format", "torch"]) == 2
    assert "torch.export cannot take this policy's network: " in capsys.readouterr().err
    assert not list(tmp_path.rglob("policy*"))


@pytest.mark.parametrize("case", ["CartPole", "Pendulum squashed"])
def test_a_file_that_acts_otherwise_is_not_kept(case, tmp_path):
    """A fault that says how far off it is; a file that was there before stays."""

    class Other(Agent):
        def act(self, obs, deterministic=True, action_mask=None):
            return super().act(-obs, deterministic, action_mask)

    agent, path = make_agent(case), tmp_path / "policy.pt2"
    path.write_text("before")
    other = Other(agent.obs_space, agent.obs, agent.action, agent.network, agent.params, agent.normalization)
    with pytest.raises(TrainingFault, match=r"does not act as the run's does, .*policy\.pt2 was not written.*difference \d"):
        export_policy(other, path, "torch")
    assert [file.name for file in tmp_path.iterdir()] == ["policy.pt2"]
    assert path.read_text() == "before"


def test_a_file_that_remembers_otherwise_is_not_kept(tmp_path):
    """Even where no action has shown it."""

    class Other(Agent):
        steps = 0

        def act(self, obs, deterministic=True, action_mask=None):
            action = super().act(obs, deterministic, action_mask)
            self.steps += 1
            if self.steps == 8:
                self.rnn_state = self.rnn_state + 0.5
            return action

    agent = make_agent("CartPole", rnn="lstm")
    other = Other(agent.obs_space, agent.obs, agent.action, agent.network, agent.params, agent.normalization)
    with pytest.raises(TrainingFault, match=r"does not remember as the run's does, .*difference \d"):
        export_policy(other, tmp_path / "policy.pt2", "torch")
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_the_command_prints_one_line(run_dir, tmp_path):
    """What the file is, takes and returns, on stdout; nothing else anywhere, nor this machine's paths in the file."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "fastppo.export", str(run_dir), "--output", "a.onnx", "--checkpoint", "last"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(
        re.escape(str(tmp_path))
        + r"/a\.onnx \(\d+ kB\): obs float32 \(batch, 4\) -> action int64 \(batch\); the same actions on 256 observations\n",
        done.stdout,
    )
    assert [file.name for file in tmp_path.iterdir()] == ["a.onnx"]
    assert str(Path(__file__).parent.parent).encode() not in (tmp_path / "a.onnx").read_bytes()


def test_the_default_is_in_the_run_directory(run_dir, capfd):
    """policy.pt2 beside config.json, replaced the second time; as quiet."""
    for _ in range(2):
        assert fastppo_console(["export", str(run_dir), "--format", "torch"]) == 0
        out, error = capfd.readouterr()
        assert out.startswith(f"{run_dir / 'policy.pt2'} (")
        assert (len(out.splitlines()), error) == (1, "")
    assert [file.name for file in run_dir.glob("policy*")] == ["policy.pt2"]
    assert str(Path(__file__).parent.parent).encode() not in (run_dir / "policy.pt2").read_bytes()
    assert torch.export.load(run_dir / "policy.pt2").module()({"obs": torch.zeros(3, 4)}).shape == (3,)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["{tmp}/nothing"], ["config.json"]),
        (["{tmp}/damaged"], ["best.pt"]),
        (["{run}", "--output", "{tmp}/no/policy.onnx"], ["--output", "there is no directory {tmp}/no"]),
        (["{run}", "--output", "{tmp}"], ["--output {tmp} is a directory", "{tmp}/policy.onnx"]),
        (["{run}", "--output", "{tmp}/policy.pt2"], ["--format onnx", "--output {tmp}/policy.onnx"]),
        (["{run}", "--output", "{tmp}/policy", "--format", "torch"], ["--output {tmp}/policy.pt2"]),
        (
            ["{run}", "--output", f"{{tmp}}/{'x' * 255}.pt2", "--format", "torch"],
            ["--output {tmp}/xxx", "cannot be written: OSError"],
        ),
        (["{run}", "--format", "onxx"], ["onnx", "torch"]),
        (["{run}", "--checkpoint", "first"], ["best", "last"]),
        (["{run}", "--ouput", "x"], ["--output"]),
        ([], ["which run?"]),
    ],
)
def test_wrong_use(flags, named, run_dir, tmp_path, monkeypatch, capsys):
    """Exit code 2, one or two lines that help, and nothing written."""
    monkeypatch.chdir(tmp_path)
    damaged = tmp_path / "damaged"
    (damaged / "checkpoints").mkdir(parents=True)
    (damaged / "config.json").write_text((run_dir / "config.json").read_text())
    (damaged / "checkpoints" / "best.pt").write_bytes((run_dir / "checkpoints" / "best.pt").read_bytes()[:-100])
    before = sorted(tmp_path.rglob("*"))
    places = {"run": run_dir, "tmp": tmp_path}
    assert console([flag.format(**places) for flag in flags]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert 1 <= len(error.splitlines()) <= 2, error
    assert all(part.format(**places) in error for part in named), error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package(package, run_dir, tmp_path, monkeypatch, capsys):
    """The extra that brings it; torch.export needs none."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None if name == package else sys)
    assert console([str(run_dir), "--output", str(tmp_path / "policy.onnx")]) == 2
    error = capsys.readouterr().err
    assert error == f"error: --format onnx needs {package}, which is not installed: pip install 'fastppo[export]'\n"


def test_the_pages_file_runs(tmp_path, monkeypatch):
    """The command of docs/python.md and its lines of Python as they stand there."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    text = section("docs/python.md", "Export")
    command, example = shlex.split(command_in(text), comments=True), python_in(text)
    assert command[0].endswith("/fastppo")
    assert len(example.splitlines()) <= 4
    monkeypatch.chdir(tmp_path)
    train_run("runs/NAME")
    assert fastppo_console(command[1:]) == 0
    names = {"obs": np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)}
    exec(example, names)
    np.testing.assert_array_equal(names["action"], load_policy("runs/NAME").act(names["obs"]))


class Recorded(gym.vector.VectorWrapper):
    """Environments that keep each observation, the action that followed, and whether the step before had ended the episode."""

    def reset(self, *, seed=None, options=None):
        """As always."""
        self.obs, info = self.env.reset(seed=seed, options=options)
        self.over, self.kept = np.zeros(self.num_envs, bool), []
        return self.obs, info

    def step(self, actions):
        """As always."""
        self.kept.append((self.obs.copy(), actions.copy(), self.over))
        self.obs, reward, terminated, truncated, info = self.env.step(actions)
        self.over = terminated | truncated
        return self.obs, reward, terminated, truncated, info


@pytest.fixture(scope="module")
def remembering(tmp_path_factory):
    """A folder in which runs/NAME has a memory."""
    folder = tmp_path_factory.mktemp("memory")
    train_run(folder / "runs" / "NAME", rnn="lstm")
    return folder


SAME_STEP = 'num_envs=8, vectorization_mode="sync", vector_kwargs={"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}'


@pytest.mark.parametrize(
    ("changes", "right"),
    [
        ({}, True),
        ({"policy.reset(over)": "policy.reset(terminated | truncated)"}, False),
        ({"policy.reset(over)": "pass"}, False),
        ({"policy.reset(over)": "policy.reset(terminated | truncated)", "num_envs=8": SAME_STEP}, True),
        (
            {
                "policy.reset(over)": "memory[over] = 0",
                "policy.act(obs)": "action",
                "    obs, reward": "    {call}\n    obs, reward",
            },
            True,
        ),
    ],
    ids=["as it stands", "a step too early", "never", "reset within the step", "the exported file"],
)
@pytest.mark.long
def test_the_pages_memory(changes, right, remembering, monkeypatch):
    """The loop of docs/memory.md, and its other two ways, act as the policy does on one environment, episode by episode."""
    text = PAGES["docs/memory.md"]
    example = python_in(text)
    monkeypatch.chdir(remembering)
    names = {}
    if "policy.act(obs)" in changes:
        session = pytest.importorskip("onnxruntime").InferenceSession
        told = export_policy(load_policy("runs/NAME"), "policy.onnx")
        (size,) = re.search(r"memory float32 \(batch, (\d+)\)", str(told)).groups()
        start, call = (re.search(rf"`({name} = .*?)`", text).group(1) for name in ("memory", "action, memory"))
        names = {"session": session("policy.onnx"), "np": np, "S": int(size)}
        exec(start, names)
        changes = {old: new.replace("{call}", call) for old, new in changes.items()}
    for old, new in changes.items():
        assert example.count(old) == 1
        example = example.replace(old, new)
    make_vec = gym.make_vec
    monkeypatch.setattr(gym, "make_vec", lambda *args, **kwargs: Recorded(make_vec(*args, **kwargs)))
    exec(example, names)

    policy = load_policy("runs/NAME")
    within = names["envs"].metadata["autoreset_mode"] is gym.vector.AutoresetMode.SAME_STEP
    same, episodes = [], 0
    for index in range(8):
        policy.reset()
        for obs, action, over in names["envs"].kept:
            if over[index]:
                policy.reset()
                episodes += 1
            if within or not over[index]:  # otherwise the environment does not heed the action
                same.append(policy.act(obs[index]) == action[index])
    assert episodes > 20
    assert all(same) == right


@pytest.mark.parametrize(("format", "memory"), [("torch", {}), ("onnx", {"rnn": "gru"})])
@pytest.mark.long
def test_a_file_has_an_output_for_each_part_of_an_action(format, memory, tmp_path):
    """In the order of the space and of its types, then the memory; each part acts as the policy does."""
    for package in ("onnx", "onnxruntime", "onnxscript") if format == "onnx" else ():
        pytest.importorskip(package)
    agent = make_agent("parts", **memory)
    path = tmp_path / f"policy{SUFFIX[format]}"
    outputs = export_policy(agent, path, format).outputs
    assert {name: what for name, what in outputs.items() if name != "next_memory"} == {
        "action.move": "int64 (batch)",
        "action.aim.0": "float64 (batch, 2)",
        "action.aim.1": "int64 (batch, 1, 2)",
        "action.fire": "int8 (batch, 2)",
        "action.gas": "float16 (batch, 1, 1)",
    }
    assert list(outputs)[-1] == ("next_memory" if memory else "action.gas")
    obs, mask, inputs = observed(agent, 200)
    parts = composites.leaves(agent.action.space, agent.act(obs, action_mask=mask))
    if memory:
        inputs["memory"] = np.zeros((200, 8), np.float32)
    if format == "onnx":
        import onnxruntime

        got = onnxruntime.InferenceSession(path).run(list(outputs), inputs)
    else:
        got = [x.numpy() for x in torch.export.load(path).module()({name: torch.from_numpy(x) for name, x in inputs.items()})]
    for one, (_, space, other) in zip(got[: len(parts)], parts, strict=True):
        assert one.dtype == other.dtype == space.dtype
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
        assert len(np.unique(other, axis=0)) > 1


@pytest.mark.parametrize(
    ("name", "change", "least"),
    [
        ("action.gas", lambda x: x, 0.0),
        ("action.gas", lambda x: x - np.float16(0.01) * (x > 0.1), 0.005),
        ("action.fire", lambda x: 1 - x, 0.05),
        ("action.move", lambda x: x + 9, np.inf),
        ("action.aim.0", lambda x: x.astype(np.float32), np.inf),
        ("action.aim.1", lambda x: x.reshape(-1, 2), np.inf),
    ],
)
def test_a_file_that_differs_in_one_part_is_noticed(name, change, least):
    """Another number, another choice, an action outside its space, another type or shape."""
    agent = make_agent("parts")
    policy = DeployedPolicy(agent)

    def run(inputs):
        with torch.no_grad():
            parts = policy({key: torch.from_numpy(x) for key, x in inputs.items()})
        outputs = {leaf.key: x.numpy() for leaf, x in zip(agent.action.leaves, parts, strict=True)}
        return {**outputs, name: change(outputs[name])}

    found, _ = differences(policy, make_trial(agent, 0), run)
    assert found >= least
    assert least > 0 or found < 1e-6

"""Sweeps: what may be searched, that a sweep survives what goes wrong in a trial, goes on, and leaves a preset that trains."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from fastppo import TrainConfig, UsageError, load_preset, preset_for
from fastppo.analysis import sweep_search, sweep_trial, training_process
from fastppo.analysis.search_space import NOT_SEARCHED, OF_THE_SWEEP, SEARCHED, built_in_space, read_space, to_settings
from fastppo.analysis.sweep_trial import at_parts, read_curve, score
from fastppo.presets import PRESETS
from fastppo.sweep import console
from fastppo.system.cpus import available_cores
from fastppo.train import console as train_console
from support import processes

optuna = pytest.importorskip("optuna")

TINY = ["--compile", "off", "--num-threads", "1", "--num-envs", "4", "--hidden-sizes", "8", "--vectorization", "sync"]


def space_file(directory, text, name="space.json"):
    path = directory / name
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return path


def draws(space, count=60):
    """Values that a random sampler of Optuna's draws for the settings of a space."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    trials = [study.ask() for _ in range(count)]
    return [{name: dimension.suggest(trial) for name, dimension in space.items()} for trial in trials]


# --- the space


SPACE_TOML = """
learning_rate = { log = [1e-5, 1e-2] }
num_steps = { power_of_two = [16, 128] }
gamma = { one_minus_log = [0.9, 0.999] }
clip_coef = { uniform = [0.1, 0.4] }
update_epochs = { uniform = [1, 4] }
num_minibatches = { log = [1, 64] }
hidden_sizes = { choice = [[8], [16, 16]] }
norm_obs = { choice = [true, false] }
activation = { choice = ["tanh", "relu"] }
"""


def test_every_kind_of_range(tmp_path):
    """Values lie within the ends, and near both of them; whole numbers are whole; choices come as they were written."""
    found = draws(read_space(space_file(tmp_path, SPACE_TOML, "space.toml"), ()))
    column = {name: [values[name] for values in found] for name in found[0]}
    for name, low, high in [
        ("learning_rate", 1e-5, 1e-2),
        ("gamma", 0.9, 0.999),
        ("clip_coef", 0.1, 0.4),
        ("update_epochs", 1, 4),
        ("num_minibatches", 1, 64),
    ]:
        assert all(low <= value <= high for value in column[name]), name
    assert sum(value < 3.2e-4 for value in column["learning_rate"]) in range(15, 46)  # half of them below the geometric mean
    assert sum(value > 0.99 for value in column["gamma"]) in range(15, 46)
    assert set(column["update_epochs"]) == {1, 2, 3, 4}
    assert all(type(value) is int for value in column["num_minibatches"] + column["num_steps"])
    assert set(column["num_steps"]) == {16, 32, 64, 128}
    assert all(value in ([8], [16, 16]) for value in column["hidden_sizes"])
    assert set(column["norm_obs"]) == {True, False}
    assert set(column["activation"]) == {"tanh", "relu"}


@pytest.mark.parametrize(
    ("space", "says"),
    [
        ({"gama": {"choice": [0.9]}}, "'gama' is no setting; nearest: gamma"),
        ({"seed": {"choice": [1, 2]}}, "'seed' is not for searching"),
        ({"track": {"choice": ["wandb"]}}, "'track' is not for searching"),  # nor all else that may change on --resume
        ({"env_id": {"choice": ["X-v0"]}}, "'env_id' is not for searching"),
        ({"gamma": {"chioce": [0.9]}}, "gamma: 'chioce' is none of choice, uniform"),
        ({"gamma": {"chioce": [0.9]}}, "nearest: choice"),
        ({"gamma": [0.9, 0.99]}, 'gamma must be as in {"gamma": {"choice": [...]}}'),
        ({"gamma": {"choice": []}}, "gamma must be as in"),
        ({"gamma": {"uniform": [0.9]}}, "gamma must be as in"),
        ({"gamma": {"uniform": [0.9, 0.99], "log": [0.9, 0.99]}}, "gamma must be as in"),
        ({"gamma": {"uniform": [0.9, 1.5]}}, "gamma: --gamma must be between 0 and 1, got 1.5"),
        ({"gamma": {"choice": [0.9, "0.99"]}}, "gamma: --gamma must be between 0 and 1, got '0.99'"),
        ({"num_steps": {"uniform": [16, 64.5]}}, "num_steps: --num-steps must be a whole number of at least 1, got 64.5"),
        ({"gamma": {"uniform": [0.99, 0.9]}}, "gamma: uniform is from one number to a greater one"),
        ({"max_grad_norm": {"uniform": [1, math.inf]}}, "max_grad_norm: uniform is from one number"),
        ({"activation": {"uniform": ["relu", "tanh"]}}, "activation: uniform is from one number"),
        ({"ent_coef": {"log": [0, 0.1]}}, "ent_coef: log needs numbers above 0, got 0"),
        ({"gamma": {"one_minus_log": [0.9, 1.0]}}, "gamma: one_minus_log needs numbers below 1, got 1.0"),
        ({"num_steps": {"power_of_two": [16, 100]}}, "num_steps: power_of_two needs two of 1, 2, 4, ..., got 16 and 100"),
        ({"num_envs": {"choice": [4]}}, "num_envs is searched, and fixed after --"),
        (
            {"minibatch_size": {"choice": [8]}, "num_minibatches": {"choice": [8]}},
            "num_minibatches and minibatch_size say the same thing twice",
        ),
        ({}, "there is nothing in it to search"),
        ("[1]", "does not hold a search space"),
        ("gamma =", "is damaged"),
    ],
    ids=str,
)
def test_a_wrong_space(space, says, tmp_path, capsys):
    """One line that names the file, the setting and what would be right; exit code 2, nothing written."""
    path = space_file(tmp_path, space)
    assert console(["--space", str(path), "--study-dir", str(tmp_path / "study"), "--", "--num-envs", "4"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}")
    assert says in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_wrong_toml(tmp_path):
    with pytest.raises(UsageError, match=r"space\.toml is damaged"):
        read_space(space_file(tmp_path, "gamma = {", "space.toml"), ())


@pytest.mark.parametrize("flags", [[1, 2_000], [3, 20_000], [8, 100_000], [6, 1_000_000], [256, 100_000]], ids=str)
def test_the_built_in_space_goes_together(flags):
    """Whatever is drawn is a legal TrainConfig whose minibatches divide, with rollouts enough in a trial for a curve."""
    num_envs, steps = flags
    base = TrainConfig(num_envs=num_envs, num_minibatches=1)
    for found in draws(built_in_space(base, steps, ())):
        config = TrainConfig(**to_settings(base, found))
        assert config.batch_size % config.rows_per_minibatch == 0
        assert config.rows_per_minibatch <= found["minibatch_size"]
        assert config.batch_size <= max(steps / 8, num_envs)


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_can_be_searched_from(name):
    """Each preset under a draw of the built-in space is legal, and what the preset has and is not searched stays."""
    base = PRESETS[name].config()
    space = built_in_space(base, 100_000, ())
    assert ("norm_obs" in space) == (name != "atari")
    for found in draws(space, 20):
        settings = to_settings(base, found)
        TrainConfig(**settings)
        kept = set(PRESETS[name].settings) - set(found) - set(OF_THE_SWEEP) - {"num_minibatches"}
        assert {key: settings.get(key, getattr(TrainConfig(), key)) for key in kept} == {
            key: getattr(base, key) for key in kept
        }


def test_fixed_settings_are_not_searched():
    """Of the built-in space only the rest is; num_minibatches fixes the minibatch too."""
    space = built_in_space(TrainConfig(), 100_000, {"gamma", "num_minibatches"})
    assert not {"gamma", "minibatch_size"} & set(space)
    assert set(space) <= set(SEARCHED)
    assert not set(SEARCHED) & NOT_SEARCHED


# --- the value


def test_the_value_by_hand():
    """Rows after three quarters of the steps count, each as much; parts end at the first row that reaches them."""
    curve = [(25, 1.0), (50, math.nan), (75, 100.0), (76, 2.0), (90, math.nan), (101, 4.0)]
    assert score(curve, 100) == 3.0
    assert math.isnan(score([(100, math.nan)], 100))
    assert math.isnan(score([], 100))
    parts = at_parts([(7, 1.0), (9, math.nan), (21, 3.0)], 100)  # a part is 5 steps: 5, then 10, 15 and 20
    assert parts == [1.0, 3.0, 3.0, 3.0]
    assert len(at_parts(curve, 100)) == 20
    assert at_parts([], 100) == []


def test_a_curve_under_way(tmp_path):
    """Half a row, and a row without the return, do no harm."""
    assert read_curve(tmp_path) == []
    (tmp_path / "metrics.csv").write_text("iteration,global_step,episodic_return_mean,sps\n1,8,nan,5\n2,16,7.5,5\n3,24,8")
    curve = read_curve(tmp_path)
    assert [step for step, _ in curve] == [8, 16]
    assert curve[1][1] == 7.5


# --- sweeps with a stub in the place of training


STUB = """
import json, os, pathlib, signal, sys, time
from fastppo.system.cpus import is_forked

def console(args):
    assert not is_forked()  # such a process would train with one thread
    flags = dict(zip(args[1::2], args[2::2]))  # after --plain
    run_dir, steps = pathlib.Path(flags["--run-dir"]), int(flags["--total-timesteps"])
    run_dir.mkdir()
    (run_dir / "flags.json").write_text(json.dumps(flags))
    number = int(run_dir.parent.name.removeprefix("trial-"))
    plan = json.loads((pathlib.Path(__file__).parent / "plan.json").read_text()).get(str(number), "good")
    def stopped(*_):
        (run_dir / "stopped").touch()
        sys.exit(143)
    signal.signal(signal.SIGTERM, stopped)
    if plan == "fault":
        print("fault: policy_loss is not finite\\niterations up to 3 are kept", file=sys.stderr)
        return 3
    if plan == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    value = -10.0 if plan == "bad" else float("nan") if plan == "silent" else float(number + int(flags["--seed"]))
    with open(run_dir / "metrics.csv", "w") as file:
        file.write("iteration,global_step,episodic_return_mean,sps\\n")
        for row in range(1, 11 if plan in ("bad", "hang") else 21):
            file.write(f"{row},{row * steps // 20},{value},1\\n")
    if plan in ("bad", "hang"):
        time.sleep(600)  # it is stopped, however busy the machine is
    return 0
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """`stub(plan)` puts a script in the place of training: how each trial goes, "good" unless the plan says otherwise."""
    script = tmp_path / "stub" / "train_stub.py"
    script.parent.mkdir()
    script.write_text(STUB)
    monkeypatch.setattr(sweep_trial, "TRAIN", "train_stub")
    monkeypatch.setattr(training_process, "PRELOADED", processes.PRELOADED)
    monkeypatch.syspath_prepend(script.parent)
    monkeypatch.setattr(sweep_search, "POLL_SECONDS", 0.02)

    def plan(**how):
        (script.parent / "plan.json").write_text(json.dumps({name.removeprefix("trial_"): what for name, what in how.items()}))
        return script

    return plan


def study_of(directory):
    return optuna.load_study(study_name="fastppo", storage=f"sqlite:///{directory}/study.db")


def ends(directory):
    """The trials' states and values, by number."""
    return [(trial.state.name, trial.value) for trial in study_of(directory).trials]


@pytest.mark.long
def test_what_goes_wrong_costs_a_trial_only(tmp_path, stub, capsys):
    """A fault, a death by signal, a run without an episode, settings that cannot be together: told, and the sweep goes on."""
    stub(trial_0="fault", trial_1="die", trial_2="silent")
    directory = tmp_path / "study"
    args = ["--trials", "5", "--seeds", "2", "--steps", "1000", "--study-dir", str(directory)]
    assert console(args) == 0
    out = capsys.readouterr().out
    assert re.search(r"trial   0  failed .*\(fault: policy_loss is not finite\)", out)
    assert re.search(r"trial   1  failed .*\(exit code -9\)", out)
    assert re.search(r"trial   2  failed .*\(no episode of seed 1 ended", out)
    # seeds 1 and 2 of a trial pay its number plus the seed: the mean of 4 + 1 and 4 + 2 is the best
    assert ends(directory) == [("FAIL", None)] * 3 + [("COMPLETE", 4.5), ("COMPLETE", 5.5)]
    assert re.search(r"trial   4  complete +5.5 .*\(the best so far\)", out)
    assert f"fastppo train --preset {directory}/best.json" in out
    preset = json.loads((directory / "best.json").read_text())
    assert preset["source"].startswith("fastppo sweep, trial 4 of ")
    assert "mean return 5.5 in the last quarter of 1000 steps, seeds 1 to 2" in preset["source"]

    space = space_file(tmp_path, {"norm_reward": {"choice": [True]}})
    other = ["--trials", "1", "--steps", "1000", "--space", str(space), "--study-dir", str(tmp_path / "other")]
    assert console([*other, "--", "--clip-reward"]) == 3
    captured = capsys.readouterr()
    assert "(--clip-reward and --norm-reward both set the scale of rewards: choose one)" in captured.out
    assert captured.err.startswith("fault: no trial came to its end")


@pytest.mark.long
def test_what_a_trial_is_trained_with(tmp_path, stub):
    """Each seed its own directory and number, the same steps for all, the threads shared out; the preset has the rest."""
    stub()
    directory = tmp_path / "study"
    args = ["--env-id", "Pendulum-v1", "--trials", "2", "--seeds", "2", "--steps", "3000", "--jobs", "2"]
    assert console([*args, "--study-dir", str(directory), "--", "--gamma", "0.8"]) == 0
    for trial in ("trial-0000", "trial-0001"):
        for seed in ("1", "2"):
            flags = json.loads((directory / trial / f"seed-{seed}" / "flags.json").read_text())
            assert flags == {
                "--preset": str(directory / trial / "preset.json"),
                "--run-dir": str(directory / trial / f"seed-{seed}"),
                "--seed": seed,
                "--total-timesteps": "3000",
                "--eval-episodes": "0",
                "--num-threads": str(max(available_cores() // 2, 1)),
            }
        config = load_preset(directory / trial / "preset.json")
        assert (config.env_id, config.gamma) == ("Pendulum-v1", 0.8)
    # the first trial is the environment's own preset, as far as the space has it
    first, preset = load_preset(directory / "trial-0000" / "preset.json"), preset_for("Pendulum-v1")
    for name in ("learning_rate", "update_epochs", "clip_coef", "norm_reward", "anneal_lr", "gae_lambda"):
        assert getattr(first, name) == getattr(preset, name)


def test_a_sweep_by_evaluations(tmp_path, stub):
    """--eval-every after -- : its episodes are played, and the trial goes by its column, which these runs do not have."""
    stub()
    args = ["--trials", "1", "--seeds", "1", "--steps", "1000", "--study-dir", str(tmp_path / "study")]
    assert console([*args, "--", "--eval-every", "2", "--eval-episodes", "3"]) == 3
    flags = json.loads((tmp_path / "study" / "trial-0000" / "seed-1" / "flags.json").read_text())
    assert flags["--eval-episodes"] == "3"
    assert load_preset(tmp_path / "study" / "trial-0000" / "preset.json").eval_every == 2
    assert console([*args, "--", "--eval-episodes", "3"]) == 2


@pytest.mark.long
def test_pruning(tmp_path, stub, capsys):
    """A trial below the median of those before it is stopped by SIGTERM on its way, and has no value."""
    stub(trial_5="bad")
    directory = tmp_path / "study"
    assert console(["--trials", "7", "--seeds", "1", "--steps", "1000", "--study-dir", str(directory)]) == 0
    states = [state for state, _ in ends(directory)]
    assert states == ["COMPLETE"] * 5 + ["PRUNED", "COMPLETE"]
    assert (directory / "trial-0005" / "seed-1" / "stopped").exists()
    reported = study_of(directory).trials[5].intermediate_values
    assert max(reported) == 5  # the first quarter is not judged
    assert re.search(r"trial   5  pruned .*\(at 25% of seed 1, return -10\)", capsys.readouterr().out)


def sweep_process(script, directory, *args):
    """A sweep in a process of its own, with the stub in the place of training."""
    code = textwrap.dedent(f"""
        import sys
        from fastppo import sweep
        from fastppo.analysis import sweep_search, sweep_trial, training_process
        sweep_trial.TRAIN, sweep_search.POLL_SECONDS, training_process.PRELOADED = "train_stub", 0.02, []
        sys.path.insert(0, {str(script.parent)!r})
        sys.exit(sweep.console({["--seeds", "1", "--steps", "1000", "--study-dir", str(directory), *args]!r}))
    """)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition):
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.long
def test_a_sweep_that_is_stopped_goes_on(how, tmp_path, stub):
    """The training process ends with it; the trial under way has failed and is made up for; those done are not repeated."""
    script = stub(trial_1="hang")
    directory = tmp_path / "study"
    process = sweep_process(script, directory, "--trials", "3")
    wait_for((directory / "trial-0001" / "seed-1" / "metrics.csv").exists)
    process.send_signal(how)
    out, err = process.communicate(timeout=600)
    run_dir = directory / "trial-0001" / "seed-1"
    wait_for((run_dir / "stopped").exists)
    if how != signal.SIGKILL:
        assert process.returncode == 128 + how, err
        assert f"stopped by {how.name}; 1 of 3 trials are kept, to go on: fastppo sweep --seeds 1 --steps 1000" in out
        assert ends(directory)[1] == ("FAIL", None)
    assert json.loads((directory / "best.json").read_text())["source"].startswith("fastppo sweep, trial 0 of")

    assert console(["--seeds", "1", "--steps", "1000", "--study-dir", str(directory), "--trials", "3"]) == 0
    assert ends(directory) == [("COMPLETE", 1.0), ("FAIL", None), ("COMPLETE", 3.0), ("COMPLETE", 4.0)]


def test_a_study_is_of_one_thing(tmp_path, stub, capsys):
    """Other steps, seeds, environment, space or flags would give values that do not compare; more trials may be asked for."""
    stub()
    directory = tmp_path / "study"
    same = ["--seeds", "1", "--steps", "1000", "--study-dir", str(directory), "--trials", "1"]
    assert console(same) == 0
    assert console([*same, "--trials", "2"]) == 0
    assert len(ends(directory)) == 2
    capsys.readouterr()
    space = space_file(tmp_path, {"gamma": {"choice": [0.9]}})
    for changed, flag in [
        (["--steps", "2000"], "--steps"),
        (["--seeds", "2"], "--seeds"),
        (["--env-id", "Acrobot-v1"], "--env-id"),
        (["--space", str(space)], "--space"),
        (["--", "--vf-coef", "1"], "what follows --"),
    ]:
        assert console([*same, *changed]) == 2
        assert f"error: {flag} cannot change in {directory}" in capsys.readouterr().err
    assert len(ends(directory)) == 2


def test_a_directory_of_something_else(tmp_path, stub, capsys):
    """Not touched: files of somebody's, a study.db that is none, a study that another sweep is at."""
    script = stub(trial_0="hang")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    assert console(["--study-dir", str(tmp_path / "mine")]) == 2
    assert "is not empty and holds no study" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]

    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "study.db").write_text("no database at all" * 100)
    assert console(["--study-dir", str(tmp_path / "broken")]) == 2
    assert "study.db cannot be used as a study" in capsys.readouterr().err

    process = sweep_process(script, tmp_path / "busy", "--trials", "1")
    try:
        wait_for((tmp_path / "busy" / "trial-0000" / "seed-1" / "metrics.csv").exists)
        assert console(["--study-dir", str(tmp_path / "busy")]) == 2
        assert "another sweep is writing to it" in capsys.readouterr().err
    finally:
        process.kill()
        process.communicate()


def test_a_timeout(tmp_path, stub, capsys):
    """No trial starts after it, and the line says how to go on."""
    stub()
    args = ["--seeds", "1", "--steps", "1000", "--study-dir", str(tmp_path / "study")]
    assert console([*args, "--trials", "1"]) == 0
    assert console([*args, "--timeout", "1e-9"]) == 0  # over before the first trial, on any machine
    assert "--timeout: 1 of 50 trials; to go on: fastppo sweep --seeds 1" in capsys.readouterr().out
    assert len(ends(tmp_path / "study")) == 1


# --- the command line


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--trails", "3"], "nearest: --trials"),
        (["--trials", "0"], "--trials must be a whole number of at least 1, got 0"),
        (["--jobs", "0"], "--jobs must be a whole number of at least 1, got 0"),
        (["--timeout", "nan"], "--timeout must be above 0 seconds"),
        (["--env-id", "CartPol-v1"], "nearest: CartPole-v1"),
        (["--space", "none_such.json"], "none_such.json cannot be read"),
        (["--", "--num-env", "3"], "nearest: --num-envs"),
        (["--", "--gamma", "2"], "--gamma must be between 0 and 1"),
        (["--", "--seed", "3"], "--seed after --: the sweep sets that itself"),
        (["--", "--total-timesteps=3"], "--total-timesteps after --: the sweep sets that itself"),
    ],
    ids=str,
)
def test_wrong_use(args, says, tmp_path, monkeypatch, capsys):
    """One or two lines, exit code 2, nothing written."""
    monkeypatch.chdir(tmp_path)
    assert console(args) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.splitlines()) <= 2
    assert not list(tmp_path.iterdir())


def test_without_optuna(tmp_path, monkeypatch, capsys):
    """The extra to install, and nothing written."""
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert console(["--study-dir", str(tmp_path / "study")]) == 2
    assert "pip install 'fastppo[sweep]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_sweep_costs_no_torch(tmp_path, stub):
    """The whole of it: only the processes that train load torch, and --help loads Optuna no more than it does."""
    script = stub()
    code = textwrap.dedent(f"""
        import sys
        from fastppo import sweep
        from fastppo.analysis import sweep_trial, training_process
        sweep_trial.TRAIN, training_process.PRELOADED = "train_stub", []
        sys.path.insert(0, {str(script.parent)!r})
        assert sweep.console(["--gama"]) == 2 and not {{"torch", "optuna"}} & set(sys.modules)
        assert sweep.console(["--trials", "1", "--steps", "1000", "--study-dir", {str(tmp_path / "study")!r}]) == 0
        assert "torch" not in sys.modules
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- sweeps that train


@pytest.mark.long
def test_a_sweep_that_trains(tmp_path, monkeypatch, capsys):
    """Three trials, one of whose settings are a fault; the same command does nothing more; best.json is taken by --preset."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    space = space_file(
        tmp_path,
        {"learning_rate": {"choice": [1e-3, 1e30]}, "num_steps": {"choice": [12, 20]}, "minibatch_size": {"choice": [64]}},
    )
    directory = tmp_path / "study"
    args = ["--env-id", "environments:Walk-v0", "--trials", "3", "--seeds", "1", "--steps", "300"]
    args += ["--space", str(space), "--study-dir", str(directory), "--", *TINY]
    assert console(args) == 0
    out = capsys.readouterr().out
    faulty = [trial for trial in study_of(directory).trials if json.loads(trial.params["learning_rate"]) == 1e30]
    assert len(faulty) in (1, 2), "a fault and a success are wanted: another seed of the sampler's"
    assert len(re.findall(r"failed .*fault: .*not finite", out)) == len(faulty)
    assert all(trial.state.name == ("FAIL" if trial in faulty else "COMPLETE") for trial in study_of(directory).trials)

    best = study_of(directory).best_trial
    run_dir = directory / f"trial-{best.number:04}" / "seed-1"
    assert best.value == score(read_curve(run_dir), 300)
    trained = TrainConfig.from_json(run_dir / "config.json")
    assert (trained.learning_rate, trained.num_envs, trained.hidden_sizes) == (1e-3, 4, (8,))
    assert trained.rows_per_minibatch in (48, 40)  # 64 does not divide 48 or 80

    assert console(args) == 0
    assert "3 of 3 trials are there already" in capsys.readouterr().out
    assert len(study_of(directory).trials) == 3

    again = tmp_path / "again"
    assert train_console(["--preset", str(directory / "best.json"), "--eval-episodes", "0", "--run-dir", str(again)]) == 0
    assert (
        f"preset {directory}/best.json (environments:Walk-v0; fastppo sweep, trial {best.number} of" in capsys.readouterr().out
    )
    assert read_curve(again) == read_curve(run_dir)  # the same seed, the same bits

"""Models of Stable-Baselines3 as run directories: the same actions, from data alone. What is not data, or not ours: refused."""

import json
import os
import pickle
import zipfile
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from fastppo import TrainConfig, load_policy
from fastppo.__main__ import console
from fastppo.export import export_policy
from fastppo.train import console as train_console
from support.hostile import digest

NUMBERS = Box(-1.0, 1.0, (3,))


class Still(gym.Env):
    """Any spaces; nothing happens."""

    def __init__(self, observation_space=NUMBERS, action_space=Discrete(3)):  # noqa: B008  # spaces do not change
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 1.0, False, False, {}


def model_of(env, policy="MlpPolicy", kind=PPO, **settings):
    """A model whose actions differ from one observation to the next, and reach the bounds."""
    model = kind(policy, env, n_steps=16, device="cpu", **({"batch_size": 16} if kind is PPO else {}), **settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.policy.action_net.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
        if hasattr(model.policy, "log_std"):
            model.policy.log_std.fill_(-0.5)
    return model


def kwargs(**policy_kwargs):
    return {"policy_kwargs": policy_kwargs}


MODELS = {
    "CartPole": lambda: model_of("CartPole-v1"),
    "Pendulum": lambda: model_of("Pendulum-v1", **kwargs(net_arch=[32], activation_fn=torch.nn.ReLU)),
    "gSDE": lambda: model_of("Pendulum-v1", use_sde=True, sde_sample_freq=4, **kwargs(net_arch=[32])),
    "MultiDiscrete": lambda: model_of(Still(action_space=MultiDiscrete([3, 2, 4])), **kwargs(activation_fn=torch.nn.ELU)),
    "MultiBinary": lambda: model_of(Still(action_space=MultiBinary(4)), **kwargs(net_arch=dict(pi=[8, 8], vf=[8, 8]))),
    "categories": lambda: model_of(Still(MultiDiscrete([3, 4])), **kwargs(net_arch=[])),
    "bytes": lambda: model_of(Still(Box(0, 255, (5,), np.uint8))),
    "grid": lambda: model_of(Still(Box(0, 255, (3, 7, 7), np.uint8))),
    "image": lambda: model_of(
        Still(Box(0, 255, (44, 52, 3), np.uint8), Box(-50.0, 50.0, (2,))),
        "CnnPolicy",
        **kwargs(net_arch=[16], features_extractor_kwargs={"features_dim": 8}),
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def cartpole(folder, tmp_path, monkeypatch):
    """A model of CartPole, to change; the working directory is a new one."""
    monkeypatch.chdir(tmp_path)
    if not (folder / "cartpole.zip").exists():
        MODELS["CartPole"]().save(folder / "cartpole.zip")
    path = tmp_path / "model.zip"
    path.write_bytes((folder / "cartpole.zip").read_bytes())
    return path


def imported(path, *flags):
    """The directory of an imported model."""
    assert console(["import-sb3", str(path), "--output-dir", str(path.with_suffix("")), *flags]) == 0
    return path.with_suffix("")


@pytest.mark.parametrize("name", MODELS)
def test_the_same_actions(name, folder):
    """1,000 observations, or 100 pictures: the deterministic actions and the values are those of Stable-Baselines3."""
    model = MODELS[name]()
    model.save(folder / f"{name}.zip")
    policy = load_policy(imported(folder / f"{name}.zip"))
    model.observation_space.seed(0)
    rows = 100 if name == "image" else 1000
    obs = np.stack([model.observation_space.sample() for _ in range(rows)])
    if np.issubdtype(obs.dtype, np.floating):
        obs = np.clip(obs, -10.0, 10.0)  # an unbounded space draws from a normal distribution
    theirs, _ = model.predict(obs, deterministic=True)
    ours = policy.act(obs)
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0.0, atol=1e-5 if ours.dtype.kind == "f" else 0.0)
    assert len(np.unique(ours, axis=0)) > 1  # it says something
    if name == "Pendulum":
        assert (np.abs(ours) == 2.0).any()
        assert (np.abs(ours) < 2.0).any()
    if name == "gSDE":  # of the samples too: the standard deviation is that of theirs
        dist = model.policy.get_distribution(torch.from_numpy(obs)).distribution
        ours = policy.network.actor(policy.weights, torch.from_numpy(obs))[1]
        torch.testing.assert_close(ours, dist.scale.log(), rtol=1e-4, atol=1e-5)
        assert TrainConfig.from_json(folder / name / "config.json").sde_sample_freq == 4
    with torch.no_grad():
        values = model.policy.predict_values(model.policy.obs_to_tensor(obs)[0]).flatten().numpy()
    np.testing.assert_allclose(policy.value(obs), values, atol=1e-4)


def test_pictures_may_have_the_channels_last(folder):
    """Stable-Baselines3 transposes pictures before its policy sees them; here it takes them as the environment gives them."""
    model = MODELS["image"]()
    model.save(folder / "last.zip")
    run_dir = folder / "last"
    env = Box(0, 255, (44, 52, 3), np.uint8)
    gym.register("StillPictures-v0", lambda: Still(env, Box(-50.0, 50.0, (2,))))
    imported(folder / "last.zip", "--env-id", "StillPictures-v0")
    obs = np.random.default_rng(0).integers(0, 256, (50, 44, 52, 3), np.uint8)
    theirs, _ = model.predict(obs.transpose(0, 3, 1, 2), deterministic=True)
    np.testing.assert_allclose(load_policy(run_dir).act(obs), theirs, atol=1e-5)


def test_what_takes_an_imported_run(cartpole, capsys):
    """evaluate, export and --init-from do, and --resume does not: there is no state of an optimiser."""
    run_dir = imported(cartpole, "--env-id", "CartPole-v1")
    config = TrainConfig.from_json(run_dir / "config.json")
    assert (config.env_id, config.num_envs, config.num_steps, config.num_minibatches) == ("CartPole-v1", 1, 16, 1)
    assert (config.learning_rate, config.anneal_lr, config.clip_coef, config.update_epochs) == (3e-4, False, 0.2, 10)
    assert (config.rescale_action, config.resize) == (False, (0,))  # as the model was trained
    assert console(["evaluate", str(run_dir), "--episodes", "2"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["episodes"] == 2
    exported = export_policy(load_policy(run_dir), run_dir / "policy.pt2", "torch")
    assert exported.difference == 0.0
    flags = ["--preset", str(run_dir), "--num-iterations", "1", "--eval-episodes", "0", "--compile", "off"]
    assert train_console([*flags, "--init-from", str(run_dir), "--run-dir", "tuned"]) == 0
    assert "starts with the policy of" in capsys.readouterr().out
    assert train_console(["--resume", str(run_dir)]) == 2
    assert "has best.pt and no last.pt: a new run starts from it with --init-from" in capsys.readouterr().err


def test_statistics(tmp_path, monkeypatch, capsys):
    """VecNormalize's come from a file of numbers, as the page makes it; its pickle is not read, and they are not forgotten."""
    monkeypatch.chdir(tmp_path)
    envs = VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")]))
    model = model_of(envs)
    model.learn(16)
    model.save("model.zip")
    envs.save("vecnormalize.pkl")
    assert console(["import-sb3", "model.zip"]) == 2
    assert "--vecnormalize" in capsys.readouterr().err
    assert console(["import-sb3", "model.zip", "--vecnormalize", "vecnormalize.pkl"]) == 2
    assert "can execute anything" in capsys.readouterr().err
    page = (Path(__file__).parent.parent / "docs" / "from-sb3.md").read_text()
    exec(page.partition("```python\n")[2].partition("```")[0], {})
    run_dir = imported(tmp_path / "model.zip", "--vecnormalize", "stats.npz")
    obs = np.random.default_rng(0).normal(size=(1000, 3)).astype(np.float32)
    theirs, _ = model.predict(envs.normalize_obs(obs), deterministic=True)
    policy = load_policy(run_dir)
    np.testing.assert_allclose(policy.act(obs), theirs, atol=1e-5)
    assert TrainConfig.from_json(run_dir / "config.json").norm_reward
    assert float(policy.normalization.reward_scale) == pytest.approx(float(envs.ret_rms.var) ** -0.5, rel=1e-5)
    np.savez("stats.npz", mean=np.zeros(2), var=np.ones(2), count=1.0)
    assert console(["import-sb3", "model.zip", "--vecnormalize", "stats.npz"]) == 2
    assert "statistics of shape (2,)" in capsys.readouterr().err
    np.savez("stats.npz", mean=np.array([print], object), var=np.ones(2), count=1.0)
    assert console(["import-sb3", "model.zip", "--vecnormalize", "stats.npz"]) == 2
    assert "cannot be read" in capsys.readouterr().err


# --- what is refused


def rewritten(path, **changed):
    """The file with other entries; None: without it."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (entries | changed).items():
            if data is not None:
                archive.writestr(name, data)


def edited(**attributes):
    """A change of the model's JSON."""

    def change(path):
        data = json.loads(zipfile.ZipFile(path).read("data"))
        rewritten(path, data=json.dumps(data | attributes))

    return change


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def weights_of(data):
    """A change of the model's weights: what torch.save makes of `data`."""

    def change(path):
        torch.save(data, "weights.pth")
        rewritten(path, **{"policy.pth": Path("weights.pth").read_bytes()})
        Path("weights.pth").unlink()

    return change


def built_twice(path):
    """Weights whose pickle sets the state of an object that is not the whole."""
    with zipfile.ZipFile(path) as archive, archive.open("policy.pth") as file, zipfile.ZipFile(file) as inner:
        entries = {entry.filename: inner.read(entry) for entry in inner.infolist()}
    with zipfile.ZipFile("weights.pth", "w") as inner:
        for name, data in entries.items():
            inner.writestr(name, data[:-2] + b"}bb." if name.endswith("data.pkl") else data)
    rewritten(path, **{"policy.pth": Path("weights.pth").read_bytes()})
    Path("weights.pth").unlink()


def compressed(path):
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def saved(make):
    return lambda path: make().save(path)


def with_weight(name):
    """A change of the model: it has one more weight."""

    def change(path):
        model = PPO.load(path, device="cpu").policy.state_dict()
        weights_of(model | {name: torch.zeros(4, 4)})(path)

    return change


REFUSED = {
    "missing": (Path.unlink, "does not exist"),
    "no zip": (lambda path: path.write_bytes(b"no zip"), "no .zip file"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:5000]), "no .zip file"),
    "no data": (lambda path: rewritten(path, data=None), "no data in it"),
    "huge JSON": (lambda path: rewritten(path, data=b"[" * (2**24 + 1)), "larger than that of any model"),
    "deep JSON": (lambda path: rewritten(path, data=b"[" * 2**20), "damaged"),
    "no JSON": (lambda path: rewritten(path, data=b"\xff"), "damaged"),
    "no object": (lambda path: rewritten(path, data=b"3"), "does not hold"),
    "compressed": (compressed, "compressed"),
    "bomb": (weights_of({"a": Bomb()}), "nothing in it was executed"),
    "built twice": (built_twice, "BUILD"),
    "bare pickle": (lambda path: rewritten(path, **{"policy.pth": pickle.dumps(Bomb())}), "damaged"),
    "no weights": (weights_of([1, 2]), "not a state_dict"),
    "no names": (weights_of({1: torch.zeros(2)}), "not a state_dict"),
    "no tensors": (weights_of({"action_net.weight": 3}), "weights"),
    "other weights": (weights_of({"action_net.weight": torch.zeros(2, 3)}), "weights are not those"),
    "A2C": (saved(lambda: model_of("CartPole-v1", kind=A2C)), "no model of PPO"),
    "gSDE": (saved(lambda: model_of("Pendulum-v1", use_sde=True, **kwargs(full_std=False))), "full_std"),
    "sizes": (
        saved(lambda: model_of("CartPole-v1", **kwargs(net_arch=dict(pi=[8], vf=[8, 8])))),
        "layers of 8 and its critic of 8 8",
    ),
    "activation": (saved(lambda: model_of("CartPole-v1", **kwargs(activation_fn=torch.nn.Softplus))), "Softplus"),
    "several inputs": (saved(lambda: model_of(Still(Dict(a=NUMBERS)), "MultiInputPolicy")), "Dict is not supported"),
    "recurrent": (with_weight("lstm_actor.weight_ih_l0"), "recurrent"),
    "shared layers": (with_weight("mlp_extractor.shared_net.0.weight"), "shared_net"),
    "a huge space": (
        edited(action_space={":type:": "<class 'gymnasium.spaces.discrete.Discrete'>", "n": str(10**30)}),
        "Discrete",
    ),
    "a huge rollout": (edited(n_envs=2**40, n_steps=2**40), "n_steps must be at most"),
    "no settings": (edited(gamma=3.0), "--gamma"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_one_line(name, cartpole, capsys):
    """What no run of Stable-Baselines3's PPO wrote, and what ours cannot hold: one line, exit code 2, nothing written."""
    change, words = REFUSED[name]
    change(cartpole)
    before = digest(cartpole.parent)
    assert console(["import-sb3", "model.zip"]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "model.zip" in error
    assert len(error.splitlines()) == 1
    assert digest(cartpole.parent) == before


def test_pickles_and_paths_are_not_followed(cartpole):
    """A pickle in the JSON and names that lead out of the archive are not looked at."""
    data = json.loads(zipfile.ZipFile(cartpole).read("data"))
    data["clip_range"][":serialized:"] = pickle.dumps(Bomb()).hex()
    rewritten(cartpole, data=json.dumps(data), **{"../out": b"out", "/tmp/out-of-a-model": b"out"})
    imported(cartpole)
    assert sorted(path.name for path in cartpole.parent.iterdir()) == ["model", "model.zip"]
    assert not (cartpole.parent.parent / "out").exists()
    assert not Path("/tmp/out-of-a-model").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--env-id", "Pendulum-v1"], "trained on observations"),
        (["--env-id", "CartPol-v1"], "CartPol-v1"),
        (["--output-dir", "."], "--output-dir"),
        (["--output-dir", "model.zip/run"], "cannot be written"),
        (["--vecnormalize", "missing.npz"], "missing.npz"),
    ],
)
def test_wrong_flags(flags, words, cartpole, capsys):
    assert console(["import-sb3", str(cartpole), *flags]) == 2
    assert words in capsys.readouterr().err
    assert [path.name for path in cartpole.parent.iterdir()] == ["model.zip"]


def test_a_maskable_model(folder):
    """sb3-contrib's: the mask is given to `act`, as to its `predict`."""
    contrib = pytest.importorskip("sb3_contrib")
    model = model_of(Still(action_space=MultiDiscrete([3, 4])), kind=contrib.MaskablePPO, batch_size=16)
    model.save(folder / "maskable.zip")
    policy = load_policy(imported(folder / "maskable.zip"))
    draws = np.random.default_rng(0)
    obs, masks = draws.normal(size=(1000, 3)).astype(np.float32), draws.random((1000, 7)) < 0.5
    masks[:, [0, 3]] = True
    theirs, _ = model.predict(obs, action_masks=masks, deterministic=True)
    np.testing.assert_array_equal(policy.act(obs, action_mask=masks), theirs)

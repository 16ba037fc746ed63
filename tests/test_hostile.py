"""Run directories from somebody else are data: nothing in them is executed, and what is not as a run wrote it is refused.

Each row of the tables is one thing that a stranger, or a failing disk, may have done to a finished run, and words of the one or
two lines that it has to end in. What does the damage is Python's own pickle and zipfile and torch.save.
"""

import contextlib
import hashlib
import json
import os
import pickle
import shutil
import struct
import sys
import tracemalloc
import zipfile
from pathlib import Path

import gymnasium as gym
import pytest
import torch

from fastppo import TrainConfig, UsageError, load_policy
from fastppo.evaluate import console as evaluate_console
from fastppo.policy.codec import space_from_data, space_to_data
from fastppo.run.checkpoint_file import FORMAT, load_checkpoint
from fastppo.train import console

TINY = ["--num-envs", "2", "--num-steps", "16", "--num-minibatches", "2", "--num-iterations", "2", "--eval-episodes", "0"]
TINY += ["--hidden-sizes", "8", "--norm-obs", "--norm-reward", "--preset", "none"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with statistics, to copy and damage."""
    run_dir = tmp_path_factory.mktemp("hostile") / "run"
    assert console([*TINY, "--run-dir", str(run_dir)]) == 0
    for kept in (run_dir / "checkpoints").glob("iteration-*.pt"):  # a damaged last.pt is the only one there is
        kept.unlink()
    return run_dir


@pytest.fixture
def run_dir(finished, tmp_path):
    """A copy of it: tmp_path / "run"."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def digest(directory):
    """Everything in a directory: names, links and contents."""
    found = {}
    for path in sorted(directory.rglob("*")):
        kind = os.readlink(path) if path.is_symlink() else ""
        data = path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(directory))] = (kind, hashlib.sha256(data).hexdigest())
    return found


def refused(load, *words):
    """`load` ends in a UsageError of one or two lines, of letters that a terminal shows as they are, with these words."""
    with pytest.raises(UsageError) as caught:
        load()
    message = str(caught.value)
    assert len(message.splitlines()) <= 2, message
    assert len(message) < 600, message
    for word in words:
        assert word in message, message


# --- what executes


class Bomb:
    """Something whose unpickling calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def saved(path, data, protocol=2):
    """torch.save's archive."""
    torch.save(data, path, pickle_protocol=protocol)


def saved_as_before_torch_1_6(path, data):
    """A pickle without an archive."""
    torch.save(data, path, _use_new_zipfile_serialization=False)


def bare_pickle(path, data):
    path.write_bytes(pickle.dumps(data))


@pytest.mark.parametrize("write", [saved, saved_as_before_torch_1_6, bare_pickle])
@pytest.mark.parametrize("function", ["mkdir", "system", "eval", "exec"])
def test_a_pickle_bomb_does_not_go_off(write, function, run_dir, tmp_path, monkeypatch, capsys):
    """os.mkdir and its like in a checkpoint: refused by loading, evaluating and resuming; nothing is made or changed."""
    monkeypatch.chdir(tmp_path)
    made = tmp_path / "executed"
    call = {
        "mkdir": (os.mkdir, str(made)),
        "system": (os.system, f"mkdir {made}"),
        "eval": (eval, f"__import__('os').mkdir({str(made)!r})"),
        "exec": (exec, f"import os; os.mkdir({str(made)!r})"),
    }[function]
    for name in ("best", "last"):
        write(run_dir / "checkpoints" / f"{name}.pt", {"format": FORMAT, "policy": Bomb(*call)})
    before = digest(run_dir)
    words = ("best.pt", "nothing in it was executed", call[0].__name__) if write is saved else ("best.pt",)
    refused(lambda: load_policy(run_dir), *words)
    for verb, flags, name in ((evaluate_console, [str(run_dir)], "best.pt"), (console, ["--resume", str(run_dir)], "last.pt")):
        assert verb(flags) == 2
        error = capsys.readouterr().err
        assert name in error
        assert len(error.splitlines()) <= 2
    assert not made.exists()
    assert digest(run_dir) == before
    pickle.loads(pickle.dumps(Bomb(*call)))  # it is a bomb
    assert made.exists()


def test_two_locks(run_dir, tmp_path, monkeypatch):
    """What names code is refused by torch's reader too, were it to come past the check before it."""
    monkeypatch.setattr("fastppo.run.checkpoint_file._check_pickle", lambda data: None)
    saved(run_dir / "checkpoints" / "best.pt", {"format": FORMAT, "policy": Bomb(os.mkdir, str(tmp_path / "executed"))})
    refused(lambda: load_policy(run_dir), "best.pt", "nothing in it was executed")
    assert not (tmp_path / "executed").exists()


def test_loading_imports_nothing_that_config_json_names(run_dir, tmp_path, monkeypatch, capsys):
    """A module in env_id is imported where the environment is made, by evaluating and resuming, and not by load_policy."""
    (tmp_path / "stranger_module.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    edit_config(run_dir, env_id="stranger_module:CartPole-v1")
    load_policy(run_dir)
    assert "stranger_module" not in sys.modules
    assert evaluate_console([str(run_dir)]) == 2
    assert "imported" in capsys.readouterr().err


# --- what climbs out


def edit_config(directory, **settings):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | settings))


def test_a_config_cannot_move_the_run(run_dir, tmp_path, monkeypatch):
    """Resuming and evaluating write in the directory that the user names, whatever run_dir and resume its config.json has."""
    (tmp_path / "cwd").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    edit_config(run_dir, run_dir="../elsewhere", resume=str(tmp_path / "elsewhere"), preset="../elsewhere")
    assert evaluate_console([str(run_dir), "--episodes", "1"]) == 0
    assert console(["--resume", str(run_dir), "--num-iterations", "3", "--plain"]) == 0
    assert list((tmp_path / "elsewhere").iterdir()) == list((tmp_path / "cwd").iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cwd", "elsewhere", "run"]
    assert json.loads((run_dir / "config.json").read_text())["run_dir"] == str(run_dir)
    assert torch.load(run_dir / "checkpoints" / "last.pt")["iteration"] == 3


@pytest.mark.parametrize("name", ["metrics.csv", "config.json.tmp", "checkpoints/last.pt.tmp", "curves.png", "deep"])
def test_a_link_that_leads_out_is_not_written_through(name, run_dir, tmp_path, capsys):
    """--resume of a directory with a link to the user's own files leaves them as they are; a link inside is no matter."""
    (tmp_path / "mine").write_text("mine")
    (run_dir / "inside.csv").symlink_to("metrics.csv")
    (run_dir / name).unlink(missing_ok=True)
    (run_dir / name).symlink_to("../mine" if "/" not in name else "../../mine")
    before = digest(run_dir)
    assert console(["--resume", str(run_dir), "--num-iterations", "3"]) == 2
    assert Path(name).name in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "mine"
    assert digest(run_dir) == before


@pytest.mark.parametrize("name", ["../../evil", "best/../../../evil", "/evil"])
def test_names_in_an_archive_are_no_paths(name, run_dir, tmp_path):
    """An entry called ../../evil is refused, or never looked at, and written nowhere."""
    with zipfile.ZipFile(run_dir / "checkpoints" / "best.pt", "a") as archive:
        archive.writestr(name, "evil")
    before = digest(tmp_path)
    with contextlib.suppress(UsageError):
        load_policy(run_dir)
    assert digest(tmp_path) == before
    assert not Path("/evil").exists()


# --- checkpoints that are damaged, or no checkpoints


def rewritten(path, change, compression=zipfile.ZIP_STORED):
    """The archive with each entry as `change` of its name and data has it, checksums right."""
    with zipfile.ZipFile(path) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries:
            archive.writestr(name, change(name, data))


def replaced(old, new):
    """A change of the pickle that keeps its checksum right."""

    def change(path):
        def pickled(name, data):
            if name.endswith("/data.pkl"):
                assert old in data
                return data.replace(old, new, 1)
            return data

        rewritten(path, pickled)

    return change


def flipped(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_records(path):
    """Tensors that claim more than their records hold."""
    rewritten(path, lambda name, data: data[:1] if "/data/" in name else data)


def overlapping(path):
    """A thousand entries that are all the same bytes of the file."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"0" * 10_000)
        for index in range(1000):
            entry = zipfile.ZipInfo(f"archive/data/{index}")
            entry.header_offset, entry.CRC = archive.filelist[0].header_offset, archive.filelist[0].CRC
            entry.file_size = entry.compress_size = 10_000
            archive.filelist.append(entry)
        archive._didModify = True


def fifo(path):
    path.unlink()
    os.mkfifo(path)


def linked(target):
    def link(path):
        path.unlink()
        path.symlink_to(target)

    return link


def directory(path):
    path.unlink()
    path.mkdir()


def nested(levels):
    data = []
    for _ in range(levels):
        data = [data]
    return data


def laughs():
    """A billion elements in thirty lists."""
    data = [1]
    for _ in range(30):
        data = [data] * 2
    return data


def own(data):
    data["self"] = data
    return data


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (Path.unlink, ["does not exist"]),
        (fifo, ["no regular file"]),
        (linked("/dev/zero"), ["no regular file"]),
        (directory, ["no regular file"]),
        (lambda path: path.write_bytes(b""), ["damaged"]),
        (lambda path: path.write_bytes(b"no checkpoint"), ["damaged"]),
        (lambda path: os.truncate(path, path.stat().st_size - 1), ["damaged"]),
        (lambda path: os.truncate(path, path.stat().st_size // 2), ["damaged"]),
        (flipped, ["damaged", "checksum"]),
        (lambda path: rewritten(path, lambda name, data: data, zipfile.ZIP_DEFLATED), ["compressed"]),
        (overlapping, ["add up to more"]),
        (cut_records, ["damaged"]),
        (replaced(b"X\x06\x00\x00\x00policy", b"X\xff\xff\xff\x7fpolicy"), ["damaged"]),
        (replaced(b"torch._utils\n_rebuild_tensor_v2", b"torch._utils\n_rebuild_sparse_tensor"), ["_rebuild_sparse_tensor"]),
        (replaced(b"torch._utils\n_rebuild_tensor_v2", b"os\nsystem"), ["os.system", "nothing in it was executed"]),
        (replaced(b"ccollections\nOrderedDict\n", b"ccollections\nCounter\n"), ["collections.Counter"]),
        (lambda path: saved_as_before_torch_1_6(path, {"format": FORMAT}), ["damaged"]),
        (lambda path: saved(path, {"format": FORMAT}, protocol=4), ["refused"]),
        (lambda path: torch.jit.save(torch.jit.script(torch.nn.Identity()), path), ["checkpoint"]),
        (lambda path: saved(path, [1, 2]), ["no checkpoint of fastppo"]),
        (lambda path: saved(path, {"state_dict": {}}), ["no checkpoint of fastppo"]),
        (lambda path: saved(path, {"format": 99}), ["format 99", f"reads format {FORMAT}", "another version"]),
        (lambda path: saved(path, {"format": True}), ["format True"]),
        (lambda path: saved(path, {"format": "\x1b[2J" * 100}), [r"\x1b"]),
        (lambda path: saved(path, {"format": FORMAT, "x": nested(50)}), ["refused"]),
        (lambda path: saved(path, {"format": FORMAT, "x": laughs()}), ["refused"]),
        (lambda path: saved(path, own({"format": FORMAT})), ["refused"]),
        (lambda path: saved(path, {"format": FORMAT, "x": 10**30}), ["refused"]),
        (lambda path: saved(path, {"format": FORMAT, "x": "x" * 100_000}), ["refused"]),
        (lambda path: saved(path, {"format": FORMAT, "x": [None] * 2**20}), ["refused", "structure"]),
        (lambda path: saved(path, {"format": FORMAT, "x": {1.5: 1}}), ["refused"]),
        (lambda path: saved(path, {"format": FORMAT, "x": {1, 2}}), ["refused"]),
        (lambda path: saved(path, {"format": FORMAT, "x": torch.zeros(1).expand(10**12)}), ["refused", "larger"]),
        (lambda path: saved(path, {"format": FORMAT, "x": torch.zeros(1).expand(10**4)}), ["refused", "larger"]),
        (lambda path: saved(path, {"format": FORMAT, "x": list(torch.zeros(1000).expand(1000, 1000))}), ["refused", "larger"]),
        (lambda path: saved(path, {"format": FORMAT, "x": torch.zeros(2, requires_grad=True)}), ["refused", "gradient"]),
        (lambda path: saved(path, {"format": FORMAT, "x": torch.nn.Parameter(torch.zeros(2))}), ["refused", "parameter"]),
        (lambda path: saved(path, {"format": FORMAT, "x": torch.zeros(2, 2).to_sparse()}), ["refused", "sparse"]),
        (
            lambda path: saved(path, {"format": FORMAT, "x": torch.zeros(2, device="meta")}),
            ["refused", "_rebuild_meta_tensor_no_storage"],
        ),
    ],
)
def test_a_file_that_is_no_checkpoint(damage, words, run_dir):
    """One line that names the file and what is wrong with it, at once, and in little memory."""
    path = run_dir / "checkpoints" / "best.pt"
    damage(path)
    refused(lambda: load_policy(run_dir), str(path), *words)


@pytest.mark.parametrize("remembered", [False, True])
def test_much_out_of_little(remembered, run_dir):
    """A pickle of 300 kB that calls OrderedDict a thousand times on one long list: 10 GB, were it taken."""
    pairs = b"(" + b"".join(b"K\x01" + struct.pack("<cH", b"M", n) + b"\x86" for n in range(40_000)) + b"t"
    kind, call = b"ccollections\nOrderedDict\n", b"h\x00\x85R"
    calls = kind + b"q\x05)R" + (b"h\x05" + call) * 1000 if remembered else (kind + call) * 1000
    data = b"\x80\x02]q\x01(" + pairs + b"q\x00" + calls + b"e."
    path = run_dir / "checkpoints" / "best.pt"
    rewritten(path, lambda name, old: data if name.endswith("/data.pkl") else old)
    tracemalloc.start()
    refused(lambda: load_checkpoint(path), "refused", "dict")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


# --- checkpoints whose contents are wrong


def put(value, *keys):
    """A change of one place in a checkpoint."""

    def change(state):
        for key in keys[:-1]:
            state = state[key]
        if value is KeyError:
            del state[keys[-1]]
        else:
            state[keys[-1]] = value(state[keys[-1]]) if callable(value) else value

    return change


def box(**changes):
    data = {"type": "Box", "low": torch.zeros(4), "high": torch.ones(4), "dtype": "float32"}
    return put({**data, **changes}, "obs_space")


def nested_space(levels, kind):
    data = {"type": "Discrete", "n": 2, "start": 0}
    for _ in range(levels):
        data = {"type": kind, "spaces": [data] if kind == "Tuple" else {"a": data}}
    return put(data, "obs_space")


WEIGHT = ("weights", "actor.0.weight")
DISCRETE = {"type": "Discrete", "n": 2, "start": 0}
WRONG = {
    # weights
    "no weights": (put(KeyError, "weights"), "weights"),
    "weights are a list": (put([], "weights"), "not named"),
    "one is missing": (put(KeyError, *WEIGHT), "actor.0.weight"),
    "one too many": (put(torch.zeros(3), "weights", "extra"), "more weights"),
    "text": (put("text", *WEIGHT), "a str"),
    "none": (put(None, *WEIGHT), "NoneType"),
    "float64": (put(lambda x: x.double(), *WEIGHT), "float64"),
    "complex": (put(lambda x: x.to(torch.complex64), *WEIGHT), "complex64"),
    "integers": (put(lambda x: x.long(), *WEIGHT), "int64"),
    "transposed": (put(lambda x: x.mT.contiguous(), *WEIGHT), "(8, 4)"),
    "empty": (put(torch.zeros(0), *WEIGHT), "(0,)"),
    "nan": (put(lambda x: x * float("nan"), *WEIGHT), "not finite"),
    "infinite": (put(lambda x: x + float("inf"), *WEIGHT), "not finite"),
    # statistics
    "no moments": (put(KeyError, "obs_moments"), "obs_moments"),
    "moments are text": (put("text", "obs_moments"), "obs_moments"),
    "moments of nothing": (put({}, "obs_moments"), "obs_moments"),
    "moments of another part": (put(lambda x: {"other": x["obs"]}, "obs_moments"), "obs_moments"),
    "two moments": (put(lambda x: x[:2], "obs_moments", "obs"), "obs_moments"),
    "moments in float32": (put(lambda x: [part.float() for part in x], "obs_moments", "obs"), "float32"),
    "moments of another size": (put(lambda x: [x[0][:2], x[1][:2], x[2]], "obs_moments", "obs"), "obs_moments"),
    "negative variance": (put(lambda x: [x[0], -x[1], x[2]], "obs_moments", "obs"), "negative"),
    "infinite mean": (put(lambda x: [x[0] / 0.0, x[1], x[2]], "obs_moments", "obs"), "not finite"),
    "scale is a number": (put(1.0, "reward_scale"), "a float"),
    "mean of returns missing": (put(None, "return_mean"), "return_mean"),
    "mean of returns of a batch": (put(torch.zeros(3), "return_mean"), "return_mean"),
    "nan of returns": (put(torch.tensor(float("nan")), "return_std"), "return_std"),
    "a mask of text": (put("5", "info_mask_size"), "info_mask_size"),
    "a mask of many": (put(10**15, "info_mask_size"), "action_mask"),
    "a module": (put("Stranger", "module"), "Stranger"),
    "a module of another kind": (put([1] * 1000, "module"), "your own"),
    # spaces
    "no space": (put(KeyError, "obs_space"), "obs_space"),
    "space is text": (put("Box", "obs_space"), "a str"),
    "space without a type": (put({}, "obs_space"), "type"),
    "unknown space": (put({"type": "Graph"}, "obs_space"), "Graph"),
    "type is a list": (put({"type": [1] * 1000}, "obs_space"), "unknown space"),
    "larger box": (box(low=torch.zeros(5), high=torch.ones(5)), "obs_moments"),
    "bounds that differ": (box(low=torch.zeros(5)), "bounds"),
    "bounds of text": (box(low="0"), "bounds"),
    "bounds upside down": (box(low=torch.ones(4), high=torch.zeros(4)), "bounds"),
    "bounds of nan": (box(low=torch.full((4,), float("nan"))), "bounds"),
    "complex bounds": (box(low=torch.zeros(4, dtype=torch.complex64)), "bounds"),
    "box of objects": (box(dtype="O"), "dtype"),
    "box of records": (box(dtype="V1000000000"), "dtype"),
    "dtype is a list": (box(dtype=["float32"]), "dtype"),
    "box of nothing": (box(low=torch.zeros(0), high=torch.zeros(0)), "best.pt"),
    "many choices": (put({**DISCRETE, "n": 10**15}, "obs_space"), "1000000000000000"),
    "no choice": (put({**DISCRETE, "n": 0}, "obs_space"), "at least 1"),
    "half a choice": (put({**DISCRETE, "n": 2.0}, "obs_space"), "at least 1"),
    "true choices": (put({**DISCRETE, "n": True}, "obs_space"), "at least 1"),
    "a start far out": (put({**DISCRETE, "start": 2**63 - 1}, "obs_space"), "starts"),
    "a start of text": (put({**DISCRETE, "start": "0"}, "obs_space"), "starts"),
    "many actions": (put({**DISCRETE, "n": 10**7}, "action_space"), "actor.head"),
    "many bits": (put({"type": "MultiBinary", "shape": [10**12]}, "action_space"), "1000000000000"),
    "many dimensions": (put({"type": "MultiBinary", "shape": [1] * 10_000}, "action_space"), "MultiBinary"),
    "many bits in two": (put({"type": "MultiBinary", "shape": [10**6, 10**6]}, "action_space"), "numbers"),
    "bits of text": (put({"type": "MultiBinary", "shape": "4"}, "action_space"), "MultiBinary"),
    "categories that add up": (
        put(
            {"type": "MultiDiscrete", "nvec": torch.full((9,), 2**23), "start": torch.zeros(9).long(), "dtype": "int64"},
            "action_space",
        ),
        "at most",
    ),
    "categories of floats": (
        put({"type": "MultiDiscrete", "nvec": torch.ones(2), "start": torch.zeros(2), "dtype": "int64"}, "action_space"),
        "whole numbers",
    ),
    "nested in tuples": (nested_space(14, "Tuple"), "best.pt"),
    "nested in dicts": (nested_space(12, "Dict"), "best.pt"),
    "nested deep": (nested_space(17, "Tuple"), "best.pt"),
    "many parts": (put({"type": "Tuple", "spaces": [DISCRETE.copy() for _ in range(2000)]}, "obs_space"), "parts"),
    "parts are text": (put({"type": "Tuple", "spaces": "abc"}, "obs_space"), "unknown space"),
    "parts are a number": (put({"type": "Dict", "spaces": 5}, "obs_space"), "best.pt"),
    "no parts": (put({"type": "Dict", "spaces": {}}, "obs_space"), "nothing to observe"),
}


@pytest.mark.parametrize(("change", "word"), WRONG.values(), ids=WRONG)
def test_a_policy_that_is_none(change, word, run_dir):
    """What is in a checkpoint is checked before it is used: a line that names the file and what is wrong, in little memory."""
    path = run_dir / "checkpoints" / "best.pt"
    state = torch.load(path)
    change(state["policy"])
    torch.save(state, path)
    tracemalloc.start()
    refused(lambda: load_policy(run_dir), str(path), word)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


@pytest.mark.parametrize("policy", [None, [], "policy", 5, {}])
def test_a_checkpoint_without_a_policy(policy, run_dir):
    """The same where there is nothing to look into."""
    path = run_dir / "checkpoints" / "best.pt"
    torch.save({"format": FORMAT, "policy": policy}, path)
    refused(lambda: load_policy(run_dir), str(path))
    torch.save({"format": FORMAT}, path)
    refused(lambda: load_policy(run_dir), str(path), "policy")


STATE = {
    "a scalar for a weight": put(torch.zeros(()), "policy", *WEIGHT),
    "infinite weights": put(lambda x: x / 0.0, "policy", *WEIGHT),
    "weights are a list": put([], "policy", "weights"),
    "moments are text": put("text", "policy", "obs_moments"),
    "no moments": put(None, "policy", "obs_moments"),
    "moments of another size": put(lambda x: [x[0][:2], x[1][:2], x[2]], "policy", "obs_moments", "obs"),
    "mean of returns is text": put("text", "policy", "return_mean"),
    "moments of returns are text": put("text", "return_moments"),
    "moments of returns missing": put(None, "return_moments"),
    "adam is text": put("text", "adam"),
    "adam is empty": put({}, "adam"),
    "adam of another size": put(lambda x: {name: torch.zeros(3) for name in x}, "adam"),
    "adam of text": put(lambda x: dict.fromkeys(x, "text"), "adam"),
    "generators of text": put(lambda x: dict.fromkeys(x, "text"), "generators"),
    "generators of another size": put(lambda x: dict.fromkeys(x, torch.zeros(3, dtype=torch.uint8)), "generators"),
    "no generators": put(None, "generators"),
    "episodes are text": put("text", "episodes"),
    "returns are text": put(["text"], "episodes", "returns"),
    "returns are a number": put(5, "episodes", "returns"),
    "iteration is text": put("2", "iteration"),
    "iteration is negative": put(-2, "iteration"),
    "steps are missing": put(KeyError, "global_step"),
    "steps are half": put(0.5, "global_step"),
    "seconds are none": put(None, "seconds"),
    "best is a list": put([], "best_return"),
}


@pytest.mark.parametrize("change", STATE.values(), ids=STATE)
def test_resuming_from_what_is_no_state(change, run_dir, capsys):
    """--resume checks all that it takes up: exit code 2, a line, nothing written."""
    path = run_dir / "checkpoints" / "last.pt"
    state = torch.load(path)
    change(state)
    torch.save(state, path)
    before = digest(run_dir)
    assert console(["--resume", str(run_dir), "--num-iterations", "3"]) == 2
    error = capsys.readouterr().err
    assert "last.pt" in error
    assert len(error.splitlines()) <= 2
    assert digest(run_dir) == before


@pytest.mark.parametrize(
    "space",
    [
        gym.spaces.Box(-1.0, 1.0, (2, 3)),
        gym.spaces.Box(0, 255, (4, 84, 84), "uint8"),
        gym.spaces.Box(-float("inf"), float("inf"), (3,), "float64"),
        gym.spaces.Box(-5, 5, (), "int16"),
        gym.spaces.Discrete(5, start=-3),
        gym.spaces.MultiDiscrete([[2, 3], [4, 5]], start=[[1, 0], [0, -1]]),
        gym.spaces.MultiBinary([2, 3]),
        gym.spaces.Dict({"a": gym.spaces.Tuple([gym.spaces.Discrete(2)] * 3), "b": gym.spaces.MultiBinary([4])}),
    ],
    ids=lambda space: type(space).__name__,
)
def test_spaces_that_are_meant(space, tmp_path):
    """The checks let pass what a run writes, through a file and back."""
    torch.save({"format": FORMAT, "space": space_to_data(space)}, tmp_path / "checkpoint.pt")
    assert space_from_data(load_checkpoint(tmp_path / "checkpoint.pt")["space"]) == space


# --- config.json


def text(content):
    return lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (Path.unlink, ["cannot be read"]),
        (fifo, ["no regular file"]),
        (linked("/dev/zero"), ["no regular file"]),
        (directory, ["no regular file"]),
        (lambda path: os.truncate(path, 10**10), ["larger"]),
        (text(""), ["damaged"]),
        (text("{"), ["damaged"]),
        (text("[" * 100_000), ["damaged"]),
        (text('{"env_kwargs": ' + "[" * 900 + "]" * 900 + "}"), ["--env-kwargs", "nested"]),
        (text('{"a":' * 100_000), ["damaged"]),
        (text(b'{"env_id": "\xff\xfe"}'), ["damaged"]),
        (text('{"seed": 1}'.encode("utf-16")), ["damaged"]),
        (text('{"seed": ' + "9" * 10_000 + "}"), ["damaged"]),
        (text('{"seed": 1, "seed": 2}'), ["damaged", "twice"]),
        (text('{"env_kwargs": {"a": 1, "a": 2}}'), ["damaged", "twice"]),
        (text("null"), ["does not hold the settings", "None"]),
        (text("[1, 2]"), ["does not hold the settings"]),
        (text('"' + "x" * 100_000 + '"'), ["does not hold the settings"]),
        (text('{"warp_factor": 9}'), ["unknown", "warp_factor"]),
        (text('{"num_env": 9}'), ["unknown", "num_env", "nearest: num_envs"]),
        (text('{"__class__": 9}'), ["unknown", "__class__"]),
        (text('{"batch_size": 9}'), ["unknown", "batch_size"]),
        (text('{"' + "x" * 100_000 + '": 9}'), ["unknown"]),
        (text('{"\\u001b[2J": 9}'), ["unknown", r"\x1b"]),
    ],
)
def test_a_config_that_is_none(damage, words, run_dir):
    """One line that names the file, at once, and in little memory."""
    damage(run_dir / "config.json")
    tracemalloc.start()
    refused(lambda: load_policy(run_dir), str(run_dir / "config.json"), *words)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


INTEGERS = (
    "num_envs num_steps total_timesteps num_iterations num_minibatches minibatch_size update_epochs cnn_size seed num_threads"
)
FLOATS = "learning_rate adam_eps gamma gae_lambda clip_coef ent_coef vf_coef max_grad_norm target_kl log_std_init"
SWITCHES = "norm_adv norm_obs norm_reward anneal_lr share_backbone squash_actions plain atari_grayscale"
CHOICES = "vectorization backend advantage activation cnn_activation compile"
TEXTS = "env_id preset device run_dir resume"
WRONG_VALUES = {
    INTEGERS: ["4", True, 4.0, 0.5, -1, 10**30, [4], {}, float("nan"), float("inf")],
    FLOATS: ["0.5", True, [0.5], {}, float("nan"), 10**400],
    SWITCHES: [0, 1, "true", None, [], 1.0],
    CHOICES: ["no such choice", 1, None, True, ["auto"], {}],
    TEXTS: [1, True, [], {}, 1.5],
    "hidden_sizes": [64, "64", {}, [64.0], ["64"], [True], [0], [[64]], [None]],
    "env_kwargs": [None, [], "a=1", 5],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for names, values in WRONG_VALUES.items() for name in names.split() for value in values]
)
def test_a_setting_of_another_type(name, value, tmp_path):
    """Named as the flag that it is, with what it must be and the file it is in; from Python the same without the file."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({name: value}))
    flag = "--" + name.replace("_", "-")
    if value == 10**400:
        refused(lambda: TrainConfig.from_json(path), str(path), flag)
    else:
        refused(lambda: TrainConfig.from_json(path), str(path), f"{flag} must be ")
    refused(lambda: TrainConfig(**{name: value}), f"{flag} must be ")


def test_what_an_environment_cannot_be_given():
    """env_kwargs that config.json could not hold are refused before anything runs."""
    own = []
    own.append(own)
    for value in (object(), {1: 2}, {1, 2}, b"bytes", own, print):
        refused(lambda value=value: TrainConfig(env_kwargs={"key": value}), "--env-kwargs")
    TrainConfig(env_kwargs={"key": [1, (2.5, None), {"a": True}]})


def test_settings_that_an_older_version_lacked(run_dir):
    """A config.json with fewer settings has defaults for the rest, and one from an editor that marks its encoding is read."""
    (run_dir / "config.json").write_bytes(b'\xef\xbb\xbf{"hidden_sizes": [8], "learning_rate": 1}')
    assert TrainConfig.from_json(run_dir / "config.json") == TrainConfig(hidden_sizes=(8,), learning_rate=1.0)
    load_policy(run_dir)


@pytest.mark.parametrize(
    "settings",
    [
        {"hidden_sizes": [2**16]},
        {"hidden_sizes": [2**16, 2**16, 2**16]},
        {"hidden_sizes": [1] * 100_000},
        {"hidden_sizes": None},
        {"hidden_sizes": []},
        {"share_backbone": True},
        {"squash_actions": True},
    ],
    ids=lambda settings: str(settings)[:40],
)
def test_a_config_of_another_network(settings, run_dir):
    """A network that is not the checkpoint's is refused before memory is taken for it."""
    edit_config(run_dir, **settings)
    refused(lambda: load_policy(run_dir), "best.pt")


def test_batches_of_a_size_that_nobody_has():
    """Looking for the nearest divisors of a huge batch takes no time."""
    refused(lambda: TrainConfig(num_envs=2**40, num_steps=2**20), "--num-envs", "--num-steps")
    refused(lambda: TrainConfig(num_envs=2**30 + 1, num_steps=1, num_minibatches=7), "--num-minibatches 7", "5 or 13")


# --- whatever else may happen to a file


hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies


@pytest.fixture(scope="module")
def original(finished, tmp_path_factory):
    """A checkpoint's bytes, what is in it, and a place to put changed ones."""
    path = finished / "checkpoints" / "best.pt"
    return path.read_bytes(), load_checkpoint(path), tmp_path_factory.mktemp("flips") / "best.pt"


def equal(a, b):
    """Whether two checkpoints hold the same."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and (a == b or a != a)


@hypothesis.settings(max_examples=200, deadline=None, database=None, derandomize=True)
@hypothesis.given(
    flips=st.lists(st.tuples(st.integers(0), st.integers(1, 255)), min_size=1, max_size=4), end=st.none() | st.integers(0)
)
def test_flipped_bytes_and_cuts(original, flips, end):
    """A checkpoint with any bytes changed, or cut anywhere, is refused, or it holds exactly what it held."""
    data, state, path = original
    changed = bytearray(data if end is None else data[: end % len(data)])
    for place, mask in flips:
        if changed:
            changed[place % len(changed)] ^= mask
    path.write_bytes(changed)
    try:
        loaded = load_checkpoint(path)
    except UsageError:
        return
    assert equal(loaded, state)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@hypothesis.settings(max_examples=100, deadline=None, database=None, derandomize=True)
@hypothesis.given(settings=st.dictionaries(st.sampled_from(list(TrainConfig.__dataclass_fields__)), JSON, max_size=3))
def test_any_json_as_settings(settings, original):
    """config.json of any values: settings that are written as they were read, or a UsageError."""
    path = original[2].with_name("config.json")
    path.write_text(json.dumps(settings))
    try:
        config = TrainConfig.from_json(path)
    except UsageError:
        return
    path.write_text(config.to_json())
    assert TrainConfig.from_json(path).to_json() == config.to_json()


@hypothesis.settings(max_examples=100, deadline=None, database=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_any_value_anywhere_in_a_policy(original, data):
    """One place of a policy replaced by any plain value: a UsageError, or a policy that acts."""
    state, path = original[1]["policy"], original[2]
    places = [(key,) for key in state] + [(key, part) for key in state if isinstance(state[key], dict) for part in state[key]]
    place = data.draw(st.sampled_from(places))
    tensors = st.sampled_from([torch.zeros(()), torch.ones(4), torch.zeros(4, 8), torch.tensor([1, 2])])
    value = data.draw(JSON | tensors)
    changed = {key: dict(part) if isinstance(part, dict) else part for key, part in state.items()}
    put(value, *place)(changed)
    torch.save({"format": FORMAT, "policy": changed}, path)
    config = TrainConfig(hidden_sizes=(8,))
    from fastppo.analysis.loading import agent_from_checkpoint

    try:
        agent = agent_from_checkpoint(load_checkpoint(path), config, path)
    except UsageError:
        return
    agent.act(agent.obs_space.sample())


@pytest.mark.parametrize(
    "change",
    [
        put("text", "environments"),
        put({}, "environments"),
        put([], "environments", "running"),
        put(lambda x: x[:-1], "environments", "running"),
        put(lambda x: [part[:1] for part in x], "environments", "running"),
        put(lambda x: [part.double() for part in x], "environments", "running"),
        put(lambda x: torch.zeros_like(x) + 255, "environments", "generator"),
        put(torch.zeros(3, dtype=torch.uint8), "environments", "generator"),
        put("text", "made_with"),
        put({"device": 5}, "made_with"),
    ],
)
def test_resuming_environments_that_are_none(change, tmp_path, capsys):
    """Environments on the device go on where they were, if that is where such environments can be."""
    run_dir = tmp_path / "run"
    assert console([*TINY, "--backend", "torch", "--run-dir", str(run_dir), "--checkpoint-iterations", "5"]) == 0
    path = run_dir / "checkpoints" / "last.pt"
    state = torch.load(path)
    change(state)
    torch.save(state, path)
    before = digest(run_dir)
    capsys.readouterr()
    assert console(["--resume", str(run_dir), "--num-iterations", "3"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "does not fit the run's config.json" in error
    assert digest(run_dir) == before

"""Run directories from somebody else are data: nothing in them is executed, and what is not as a run wrote it is refused.

Each row of the tables is one thing that a stranger, or a failing disk, may have done to a finished run, and words of the one or
two lines that it has to end in. What does the damage is Python's own pickle and zipfile and torch.save.
"""

import contextlib
import json
import os
import pickle
import struct
import sys
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch

from fastppo import UsageError, load_policy
from fastppo.evaluate import console as evaluate_console
from fastppo.run.checkpoint_file import FORMAT, load_checkpoint
from fastppo.train import console
from support.hostile import digest, directory, edit_config, fifo, linked, refused, rewritten

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

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
    monkeypatch.setattr("fastppo.run.checkpoint_file._check_pickle", lambda data, is_module: None)
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


DAMAGES = [
    (Path.unlink, ["does not exist"]),
    (fifo, ["not a regular file"]),
    (linked("/dev/zero"), ["not a regular file"]),
    (directory, ["not a regular file"]),
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
    (lambda path: saved(path, [1, 2]), ["not a checkpoint of fastppo"]),
    (lambda path: saved(path, {"state_dict": {}}), ["not a checkpoint of fastppo"]),
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
]


@pytest.mark.parametrize(("damage", "words"), DAMAGES)
def test_a_file_that_is_no_checkpoint(damage, words, run_dir):
    """One line that names the file and what is wrong with it, at once, and in little memory."""
    path = run_dir / "checkpoints" / "best.pt"
    damage(path)
    refused(lambda: load_policy(run_dir), str(path), *words)


def test_damaged_files_from_the_hub(hub, run_dir):
    """The same files in a repository of the Hub are refused in the same words; what is no file cannot be in one."""
    path = run_dir / "checkpoints" / "best.pt"
    original = path.read_bytes()
    for number, (damage, words) in enumerate(DAMAGES):
        damage(path)
        is_file = path.is_file()
        if is_file:
            hub.put(f"you/bad-{number}", run_dir)
            refused(lambda number=number: load_policy(f"hf://you/bad-{number}"), *words)
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        path.unlink(missing_ok=True)
        path.write_bytes(original)
    assert len(hub.files) > 30
    hub.put("you/good", run_dir)
    load_policy("hf://you/good")


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


# --- whatever else may happen to a file


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

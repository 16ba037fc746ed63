"""Reads a checkpoint file as data. Nothing in the file is executed, and no more memory is used than the file is large.

Knows that checkpoints consist of plain data and dense tensors. Knows nothing of their meaning.
"""

import os
import pickle
import pickletools
import re
import reprlib
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastppo.errors import UsageError, brief
from fastppo.run.files import utf8_name
from fastppo.system.paths import reading

FORMAT = 2  # of the checkpoints that this version writes and reads
MAX_PICKLE_BYTES = 2**20  # of the pickle, without the tensors' numbers; each tensor adds 150 bytes
MAX_DEPTH = 32


@reading()
def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint as data. Nothing in it is executed, and no more memory is used than the file is large.

    Returns:
        Dicts, lists, strings, numbers, None and dense tensors on the CPU, as `RunDirectory.save` took them.

    Raises:
        UsageError: the file is missing, damaged, not a checkpoint, of another format, or holds more than data.
    """
    if not path.exists():
        if path.name == "last.pt" and (path.parent / "best.pt").exists():  # an imported run
            raise UsageError(f"{path.parent} has best.pt and no last.pt: a new run starts from it with --init-from")
        raise UsageError(f"{path} does not exist: is this a run directory of fastppo, and has it reached a checkpoint?")
    if not path.is_file():
        raise UsageError(f"{path} is not a regular file")
    state = _read(path, str(path), "checkpoint of fastppo")
    if not isinstance(state, dict) or "format" not in state:
        raise UsageError(f"{path} is not a checkpoint of fastppo")
    if type(state["format"]) is not int or state["format"] != FORMAT:
        wrote = reprlib.repr(state["format"])
        raise UsageError(f"{path} has format {wrote}, this fastppo reads format {FORMAT}: another version of fastppo wrote it")
    return state


def load_state_dict(path: Path, name: str) -> dict[str, Any]:
    """Read the `state_dict` of a torch.nn.Module that torch.save wrote, as data. As safe as `load_checkpoint`.

    Args:
        name: what the file is called in an error.

    Returns:
        Dense tensors on the CPU by name, if the file holds what it should.

    Raises:
        UsageError: the file is damaged, is no dict, or holds more than data.
    """
    state = _read(path, name, "state_dict of PyTorch", is_module=True)
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise UsageError(f"{name} is not a state_dict of PyTorch")
    return state


def _read(path: Path, name: str, what: str, is_module: bool = False) -> Any:
    """The data in a file of torch.save. Raises UsageError. is_module: whether it is the `state_dict` of a module."""
    try:
        _check_pickle(_structure(path), is_module)
        with utf8_name(path) as utf8:
            # mmap: no tensor claims more than the file holds, whatever version of torch reads it
            loaded = torch.load(utf8, map_location="cpu", weights_only=True, mmap=True)
            return _Copier(path.stat().st_size, is_module).copy(loaded)
    except _Refused as error:
        raise UsageError(f"{name} is refused, nothing in it was executed: {error}") from None
    except pickle.UnpicklingError:
        raise UsageError(f"{name} is refused, nothing in it was executed: it holds more than data") from None
    except Exception as error:  # zipfile and torch raise whatever a wrong byte leads them to
        raise UsageError(f"{name} is damaged or not a {what} ({brief(error)})") from None


class _Refused(Exception):
    """The file is undamaged, but fastppo would not have written it."""


def _structure(path: Path) -> bytes:
    """The pickle in a file of torch.save, after comparing its checksums. Raises _Refused, or what zipfile raises.

    torch does not check them when it reads. For a checkpoint of 7 MB this takes 3 ms, torch.load 4 (9 without mmap) and all of
    `load_checkpoint` 23, mostly for the copies.
    """
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size for entry in entries):
            raise _Refused("its entries are compressed")
        if sum(entry.file_size for entry in entries) > os.fstat(file.fileno()).st_size:  # a run may replace the file meanwhile
            raise _Refused("its entries add up to more than the file")
        names = [entry.filename for entry in entries]
        pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1 or len(set(names)) != len(names):
            raise _Refused("it is not an archive of torch.save")
        if archive.getinfo(pickles[0]).file_size > MAX_PICKLE_BYTES:
            raise _Refused("its structure is larger than that of any checkpoint")
        wrong = archive.testzip()
        if wrong is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {reprlib.repr(wrong)}")
        return archive.read(pickles[0])


# The instructions that torch.save writes for plain data and dense tensors. BUILD and NEWOBJ, which make objects, are not here.
_OPCODES = re.compile(
    "PROTO|MARK|STOP|NONE|NEW(TRUE|FALSE)|BININT[12]?|LONG1|BINFLOAT|BINUNICODE|EMPTY_(DICT|LIST|TUPLE)|TUPLE[123]?|APPENDS?|"
    "SETITEMS?|(LONG_)?BIN(PUT|GET)|GLOBAL|BINPERSID|REDUCE"
)
_GLOBALS = re.compile(
    r"torch\._utils _rebuild_tensor_v[23]|torch [A-Za-z0-9]+Storage|torch\.storage UntypedStorage|"
    r"torch (uint|int|float|bfloat|complex)[a-z0-9_]+|torch bool|collections OrderedDict"
)


def _check_pickle(data: bytes, is_module: bool = False) -> None:
    """Raise _Refused for anything but plain data and dense tensors.

    is_module: allow one BUILD at the end, which gives a module's `state_dict` its versions. torch sets nothing there but the
    attributes of an OrderedDict or the state of a tensor; the copy drops the first, and the second is no `state_dict`.

    `weights_only` already refuses code. This check names what it refuses. It also refuses what weights_only accepts: sparse
    tensors, tensors without a device, and calls that allocate much memory from a small file.
    """
    hooks = "collections OrderedDict"  # torch.save writes an empty one for each tensor; a filled one could use much memory
    places: set[Any] = set()  # memo entries that hold `hooks`
    fresh = False  # whether `hooks` is on top of the stack
    for opcode, argument, place in pickletools.genops(data):
        if not _OPCODES.fullmatch(opcode.name) and not (is_module and opcode.name == "BUILD" and place == len(data) - 2):
            raise _Refused(f"its pickle holds the instruction {opcode.name}")
        if opcode.name == "GLOBAL" and not _GLOBALS.fullmatch(str(argument)):
            name = ascii(argument)[1:-1].replace(" ", ".")[:100]
            raise _Refused(f"it names {name}, and the file should hold data only")
        if fresh and opcode.name in ("BINPUT", "LONG_BINPUT"):
            places.add(argument)
            continue
        if fresh and opcode.name != "EMPTY_TUPLE":
            raise _Refused("it makes a dict as torch.save does not")
        fresh = (opcode.name == "GLOBAL" and argument == hooks) or (opcode.name.endswith("BINGET") and argument in places)


class _Copier:
    """Copies plain data. Refuses a container that occurs twice: it could refer to itself, or repeat a million times."""

    def __init__(self, max_bytes: int, is_module: bool = False) -> None:
        """is_module: a module may name a tensor up to three times, and its `state_dict` is an OrderedDict."""
        self.bytes_left = max_bytes * (3 if is_module else 1)  # for tensors
        self.containers = (dict, list, OrderedDict) if is_module else (dict, list)
        self.seen: set[int] = set()

    def copy(self, value: Any, depth: int = 0) -> Any:
        """A deep copy of `value`. Raises _Refused for anything but plain data."""
        kind = type(value)
        if value is None or kind in (bool, float) or (kind is int and abs(value) < 2**63):
            return value
        if kind is str and len(value) <= 1000:
            return value
        if kind is Tensor:
            return self._tensor(value)
        if kind not in self.containers or depth == MAX_DEPTH or id(value) in self.seen:
            raise _Refused(f"it holds a {kind.__name__} where data was expected")
        self.seen.add(id(value))
        if kind is list:
            return [self.copy(part, depth + 1) for part in value]
        if not all(type(key) in (str, int) for key in value):
            raise _Refused("it holds a dict with a key that is not a name")
        return {self.copy(key): self.copy(part, depth + 1) for key, part in value.items()}

    def _tensor(self, tensor: Tensor) -> Tensor:
        self.bytes_left -= tensor.numel() * tensor.element_size()
        if tensor.requires_grad or self.bytes_left < 0:
            raise _Refused("its tensors are larger than the file, or require a gradient")
        return tensor.clone()

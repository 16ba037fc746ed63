"""Reads the zip file of a Stable-Baselines3 model as data: its JSON text and its weights. Nothing in it is unpickled.

The layout is that of stable_baselines3/common/save_util.py. In the JSON, what is not plain is a dict with a pickle under
":serialized:", which is never looked at, and with readable text of its attributes beside it.
"""

import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastppo.errors import UsageError, brief
from fastppo.run.checkpoint_file import load_state_dict
from fastppo.system.json_files import parse_json
from fastppo.system.paths import reading

MAX_DATA_BYTES = 2**24  # of the JSON text; that of an Atari model has 700 kB
MAX_VERSION_BYTES = 100
DATA, WEIGHTS, VERSION = "data", "policy.pth", "_stable_baselines3_version"


@dataclass(frozen=True)
class SavedModel:
    """What a model's file holds."""

    name: str  # of the file
    data: dict[str, Any]  # the arguments and attributes of the model
    weights: dict[str, Any]  # the state_dict of its policy: tensors, if the file holds what it should
    version: str  # of Stable-Baselines3; '' if the file does not say

    def refuse(self, why: str) -> UsageError:
        """The error to raise for a model that cannot be imported."""
        return UsageError(f"{self.name} cannot be imported: {why}")


@reading()
def read_model(path: Path) -> SavedModel:
    """The model in a file of `PPO.save`. No more memory is used than the file is large, apart from its JSON.

    Raises UsageError: the file is missing, damaged, no model of Stable-Baselines3, too large, or holds more than data where
    data was expected.
    """
    if not path.is_file():
        raise UsageError(
            f"{path} {'is no regular file' if path.exists() else 'does not exist'}: name the .zip file of PPO.save"
        )
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            entries = {name: _entry(archive, path, name) for name in (DATA, WEIGHTS)}
            data = archive.read(entries[DATA])
            version = _version(archive)
            with tempfile.TemporaryDirectory() as folder:
                weights = Path(folder, WEIGHTS)
                weights.write_bytes(archive.read(entries[WEIGHTS]))
                state = load_state_dict(weights, f"{path}: {WEIGHTS}")
    except UsageError:
        raise
    except Exception as error:  # zipfile raises whatever a wrong byte leads it to
        raise UsageError(f"{path} is damaged or no .zip file of Stable-Baselines3 ({brief(error)})") from None
    try:
        text = data.decode()
    except ValueError as error:
        raise UsageError(f"{path}: {DATA} is damaged: {error}") from None
    return SavedModel(str(path), parse_json(text, f"{path}: {DATA}", "the arguments of a model"), state, version)


def _entry(archive: zipfile.ZipFile, path: Path, name: str) -> zipfile.ZipInfo:
    """An entry of the file, which is as large as it says. Raises UsageError."""
    entries = [entry for entry in archive.infolist() if entry.filename == name]
    if len(entries) != 1:
        raise UsageError(f"{path} has {len(entries) or 'no'} {name} in it: is it a model of Stable-Baselines3?")
    (entry,) = entries
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
        raise UsageError(f"{path}: {name} is compressed, which Stable-Baselines3 does not do; save the model again")
    if entry.file_size > (MAX_DATA_BYTES if name == DATA else path.stat().st_size):
        raise UsageError(f"{path}: {name} of {entry.file_size:,} bytes is larger than that of any model")
    return entry


def _version(archive: zipfile.ZipFile) -> str:
    """The version of Stable-Baselines3 that wrote the file."""
    entry = next((entry for entry in archive.infolist() if entry.filename == VERSION), None)
    if entry is None or entry.file_size > MAX_VERSION_BYTES or entry.compress_type != zipfile.ZIP_STORED:
        return ""
    text = archive.read(entry).decode(errors="replace").strip()
    return text if text.isprintable() else ""

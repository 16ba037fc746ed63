"""Runs on the Hugging Face Hub: hf://owner/name as a run directory, and a folder as a repository.

The transfer is huggingface_hub's, with its login, cache and environment variables. Knows nothing of what is in the files.
"""

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path

from fastppo.errors import UsageError, brief
from fastppo.run.directory import RunDirectory

PREFIX = "hf://"
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


def is_on_hub(name: str | Path) -> bool:
    """Whether it names a run on the Hub."""
    return str(name).startswith(PREFIX)


def fetch_run(name: str, checkpoint: str) -> Path:
    """Download the run hf://owner/name[@revision], its config.json and one checkpoint: a run directory in the library's cache.

    Only these two files are asked for, and neither is read here. Raises UsageError: no such repository, run or revision, no
    connection, or huggingface_hub is missing.
    """
    repo, _, revision = name.removeprefix(PREFIX).partition("@")
    check_repo(repo, name)
    with told(name):
        from huggingface_hub import hf_hub_download

        paths = RunDirectory(Path())
        checkpoint_file = paths.best if checkpoint == "best" else paths.last
        hf_hub_download(repo, checkpoint_file.as_posix(), revision=revision or None)
        return Path(hf_hub_download(repo, paths.config.name, revision=revision or None)).parent


def upload_run(folder: Path, repo: str, private: bool, message: str) -> str:
    """Make the repository if there is none, and commit the files of a folder to it.

    Returns:
        The address of the repository.

    Raises:
        UsageError: no login, no right to write there, no connection, or huggingface_hub is missing.
    """
    check_repo(repo, repo)
    with told(repo):
        from huggingface_hub import HfApi

        api = HfApi()
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
        return str(address)


def check_repo(repo: str, given: str) -> None:
    """Raise UsageError unless it is owner/name."""
    if not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", repo):
        raise UsageError(f"a repository of the Hub is named owner/name, got {given[:200]!r}")


@contextlib.contextmanager
def told(name: str) -> Iterator[None]:
    """Raise what huggingface_hub raises as a UsageError of one line. name: of the run or repository."""
    try:
        from huggingface_hub import errors
    except ImportError:
        raise UsageError(f"{name} needs huggingface_hub, which is not installed: pip install 'fastppo[hub]'") from None
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)  # it tells of each attempt
    try:
        yield
    except UsageError:
        raise
    except errors.LocalEntryNotFoundError:
        raise UsageError(f"{name}: the Hub cannot be reached, and there is no copy on this machine") from None
    except errors.LocalTokenNotFoundError:
        raise UsageError(f"{name}: {LOGIN}") from None
    except errors.RevisionNotFoundError:
        raise UsageError(f"{name}: there is no such revision") from None
    except errors.RepositoryNotFoundError:
        raise UsageError(f"{name}: there is no such repository, or it is private: {LOGIN}") from None
    except errors.EntryNotFoundError:
        raise UsageError(f"{name}: it holds no run of fastppo, as `fastppo push` writes it") from None
    except errors.HfHubHTTPError as error:
        code = error.response.status_code
        what = LOGIN if code == 401 else "you may not write there" if code == 403 else brief(error)
        raise UsageError(f"{name}: the Hub answered {code}: {what}") from None
    except Exception as error:  # the transport's own errors, and whatever an answer leads the library to
        raise UsageError(f"{name}: the Hub cannot be used ({brief(error)})") from None
    finally:
        logger.setLevel(before)

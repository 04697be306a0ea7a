"""From what a user calls a model to its folder: a path, the packaged demo, or a hub id."""

from __future__ import annotations

import importlib.resources
import re
from pathlib import Path

from waterfill.sources.folder import FolderSource
from waterfill.types import WaterfillError

__all__ = ["resolve"]

WANTED = [
    "*.safetensors",
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.tiktoken",
    "LICENSE*",
    "*.md",
]
_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")


def resolve(model: str, trust_remote_code: bool = False, any_files: bool = False) -> FolderSource:
    """A model by its folder, hub id (``owner/name`` or ``owner/name@revision``), or ``demo``.

    ``demo`` is always the packaged model; a folder of that name is ``./demo``. `any_files` is as
    in `FolderSource`.
    """
    if not model.strip():  # which pathlib would take for the current folder
        raise WaterfillError("the model's name is empty; name a folder, a hub id, or demo")
    if model == "demo":
        return FolderSource(_demo(), name="demo")
    folder = Path(model).expanduser()
    if folder.is_dir():
        return FolderSource(folder, trust_remote_code, any_files=any_files)
    if folder.is_file():
        raise WaterfillError(f"{model} is a file; name the folder it lies in")
    name, _, revision = model.partition("@")
    if not _HUB_ID.match(name):
        raise WaterfillError(f"there is no folder {model}")
    fetched = _download(name, revision or None, trust_remote_code)
    return FolderSource(fetched, trust_remote_code, name, any_files)


def _demo() -> Path:
    folder = importlib.resources.files("waterfill") / "data" / "demo"
    if not isinstance(folder, Path) or not folder.is_dir():
        raise WaterfillError("this installation has no demo model; name a folder or a hub id")
    return folder


def _download(name: str, revision: str | None, trust_remote_code: bool) -> Path:
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise WaterfillError(
            f"there is no folder {name}; to fetch it from the hub: pip install 'waterfill[hf]'"
        ) from error
    wanted = [*WANTED, "*.py"] if trust_remote_code else WANTED
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except errors.GatedRepoError as error:
        raise WaterfillError(
            f"{name} asks you to accept its terms: do so at https://huggingface.co/{name}, "
            "then run: hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise WaterfillError(f"{name} has no revision {revision}") from error
    except errors.RepositoryNotFoundError as error:
        raise WaterfillError(
            f"there is no folder {name}, and the hub has no model of that name (a private one "
            "needs: hf auth login)"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise WaterfillError(
            f"there is no folder {name}; it is not in the local cache and the hub cannot be "
            "reached (offline, or HF_HUB_OFFLINE is set). Download it where there is a network and "
            "give its folder"
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError, ValueError) as error:
        raise WaterfillError(f"could not fetch {name} from the hub: {error}") from error

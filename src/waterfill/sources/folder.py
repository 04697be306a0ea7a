"""A model folder as the ecosystem lays it out: config.json, safetensors, tokenizer files."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from waterfill.container import MODEL
from waterfill.sources.base import find_duplicates
from waterfill.sources.safetensors_file import SafetensorsFile, open_safetensors
from waterfill.types import DTYPES, Array, FormatError, WaterfillError

__all__ = ["INDEX_NAME", "FolderSource", "may_lie_beside", "read_json"]

INDEX_NAME = "model.safetensors.index.json"

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
CODE = (".py", ".pyc", ".pyd", ".so", ".dll", ".sh", ".exe", ".bat", ".cmd")
BESIDE = (
    ".json",
    ".txt",
    ".model",
    ".jinja",
    ".md",
    ".tiktoken",
    ".spm",
    ".bpe",
    ".vocab",
    ".yaml",
)
LARGEST_BESIDE_NBYTES = 64 << 20
PIECE = 1 << 22
# Up to this size a fingerprint reads every byte, so that a copied folder keeps its own.
SMALL_NBYTES = 256 << 20


class FolderSource:
    """Tensors of a folder in one or several safetensors files.

    Parameters
    ----------
    path : folder
    trust_remote_code : whether its Python files may be run (and copied into an artifact)
    name : what to call it; default the folder's name
    any_files : take the files as they are, of a model or not: config.json may be missing, and
        without an index all of several safetensors files are meant
    """

    def __init__(
        self,
        path: Path | str,
        trust_remote_code: bool = False,
        name: str = "",
        any_files: bool = False,
    ) -> None:
        self.path = Path(path)
        self.trust_remote_code = trust_remote_code
        self.tokenizer: Any | None = None
        if not self.path.is_dir():
            raise WaterfillError(f"{self.path} is not a folder")
        self.name = name or self.path.resolve().name
        self.config = _any_config(self.path) if any_files else _config(self.path)
        paths = _weight_files(self.path, any_files)
        self._stamps = {path: _stamp(path) for path in paths}
        self.files = [open_safetensors(path) for path in paths]
        _refuse_own(self.path, self.files)
        self._home: dict[str, SafetensorsFile] = {}
        for file in self.files:
            for tensor in file.tensors:
                if tensor in self._home:
                    other = self._home[tensor].path.name
                    raise FormatError(f"tensor {tensor} is in both {other} and {file.path.name}")
                self._home[tensor] = file
        _check_index(self.path, self.files, self._home)

    @cached_property
    def tensors(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Tensor name -> (dtype, shape), in order of the files."""
        return {n: (f.tensors[n].dtype, f.tensors[n].shape) for n, f in self._home.items()}

    @property
    def files_beside(self) -> list[Path]:
        """Regular files of modest size that are neither weights nor (unless trusted) code."""
        return [
            f
            for f in sorted(self.path.iterdir())
            if may_lie_beside(f.name, self.trust_remote_code)
            and f.is_file()
            and f.stat().st_size <= LARGEST_BESIDE_NBYTES
        ]

    @property
    def layout(self) -> list[tuple[str, bytes]]:
        """Name and header of each weights file."""
        return [(file.path.name, file.header) for file in self.files]

    @property
    def beside(self) -> list[str]:
        """Names of `files_beside`, and of the index of several weights files."""
        index = [INDEX_NAME] if len(self.files) > 1 and (self.path / INDEX_NAME).is_file() else []
        return [file.name for file in self.files_beside] + index

    def read_beside(self, name: str) -> bytes | None:
        """A file beside the weights, or None if there is none of this name."""
        path = self.path / name
        return path.read_bytes() if path.is_file() else None

    def read(self, name: str) -> Array:
        """A tensor in the storage form of `waterfill.types.DTYPES`."""
        return self._file(name).read(name)

    def read_slice(self, name: str, index: int) -> Array:
        """Entry `index` of a tensor along its first axis."""
        return self._file(name).read_slice(name, index)

    def require_unchanged(self) -> None:
        """WaterfillError if a weights file is another than when this was opened."""
        for path, stamp in self._stamps.items():
            if _stamp(path) != stamp:
                raise WaterfillError(
                    f"{path} changed while it was being read; run again once nothing writes to it"
                )

    def fingerprint(self) -> str:
        """SHA-256 of the files' names, sizes and headers, and of their content.

        Content is every byte of a small model. Of one over 256 MiB it is the time of last change
        instead: reading 100 GB only to recognise them would take minutes.
        """
        digest = hashlib.sha256()
        small = sum(f.path.stat().st_size for f in self.files) <= SMALL_NBYTES
        for file in sorted(self.files, key=lambda f: f.path.name):
            stat = file.path.stat()
            digest.update(f"{file.path.name}\0{stat.st_size}\0".encode() + file.header)
            if small:
                with file.path.open("rb") as stream:
                    while piece := stream.read(PIECE):
                        digest.update(piece)
            else:
                digest.update(str(stat.st_mtime_ns).encode())
        return digest.hexdigest()

    def duplicates(self) -> dict[str, str]:
        """Tensors over 1 KiB that repeat an earlier one bit for bit -> the name of that one."""
        return find_duplicates(
            [(n, (d, s), math.prod(s) * DTYPES[d].itemsize) for n, (d, s) in self.tensors.items()],
            head=lambda name: self._file(name).read_bytes(name, 0, 1 << 16),
            pieces=self._pieces,
        )

    def _pieces(self, name: str) -> Iterator[bytes]:
        at = 0
        while piece := self._file(name).read_bytes(name, at, PIECE):
            at += len(piece)
            yield piece

    def _file(self, name: str) -> SafetensorsFile:
        try:
            return self._home[name]
        except KeyError:
            raise WaterfillError(f"{self.path} has no tensor {name}") from None


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        stat = path.stat()
    except OSError:
        return 0, 0, 0
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def may_lie_beside(name: str, code: bool = False) -> bool:
    """Whether a file of this name may belong to a model and be neither weights nor code."""
    path = Path(name)
    return (
        path.name == name
        and not name.startswith(".")
        and not set(name) & set("\\:\0")
        and (
            path.suffix in BESIDE
            or (code and path.suffix == ".py")
            or name.upper().startswith(("LICENSE", "NOTICE"))
        )
        and not name.endswith((".index.json", ".safetensors", *PICKLES))
        and (code or path.suffix not in CODE)
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; WaterfillError if it is missing or anything else."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise WaterfillError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path} holds no JSON object")
    return value


def _any_config(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / "config.json")
    except WaterfillError:
        return {}  # some tool's own, or none


def _config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise WaterfillError(
            f"{folder} has no config.json: a model folder holds config.json, *.safetensors and "
            "tokenizer files, as save_pretrained writes them"
        )
    return read_json(folder / "config.json")


def _weight_files(folder: Path, any_files: bool) -> list[Path]:
    single, index = folder / "model.safetensors", folder / INDEX_NAME
    if single.is_file():
        return [single]
    if index.is_file():
        names = sorted(set(_weight_map(index).values()))
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise FormatError(f"{index}: {name!r} is not a safetensors file of this folder")
            if not (folder / name).is_file():
                raise WaterfillError(
                    f"{folder} lacks {name}, which its index names; fetch it again"
                )
        return [folder / name for name in names]
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1 or (found and any_files):
        return found
    if found:
        raise WaterfillError(
            f"{folder} has {len(found)} safetensors files and no {INDEX_NAME} that says "
            "which belong to the model"
        )
    pickles = [f.name for f in sorted(folder.iterdir()) if f.suffix in PICKLES]
    if pickles:
        raise WaterfillError(
            f"{folder} has its weights as a pickle ({pickles[0]}), which can run code when opened; "
            "convert it to safetensors first (load it with transformers, where you trust it, and "
            "save_pretrained)"
        )
    raise WaterfillError(f"{folder} has no *.safetensors file")


def _refuse_own(folder: Path, files: list[SafetensorsFile]) -> None:
    if any(file.metadata.get("format") == MODEL for file in files):
        # What the header lists are coded parts: taken for tensors they would pass every check.
        raise WaterfillError(
            f"{folder} was compressed by waterfill already; name the original, or decompress it first"
        )


def _weight_map(index: Path) -> dict[str, str]:
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
        raise FormatError(f"{index} has no weight_map of tensor names to file names")
    return table


def _check_index(
    folder: Path, files: list[SafetensorsFile], home: Mapping[str, SafetensorsFile]
) -> None:
    index = folder / INDEX_NAME
    if len(files) == 1 and files[0].path.name == "model.safetensors":
        return  # an index beside a single file is a left-over that nobody reads
    if index.is_file():
        for tensor, name in _weight_map(index).items():
            if tensor not in home or home[tensor].path.name != name:
                raise FormatError(f"{index} says that {name} has tensor {tensor}; it does not")

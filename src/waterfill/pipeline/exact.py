"""Every bit kept: any safetensors checkpoint, one tensor at a time, with numpy alone.

No text is read and nothing is planned. Each tensor takes the codec ``lossless``, or ``raw`` where
that is no larger, and is decoded and compared before it counts. In memory are two copies of one
tensor and its coded form.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from waterfill import __version__
from waterfill.container import FILE_NAME, Reader, write
from waterfill.pipeline.encoding import encode_tensor, repeat
from waterfill.pipeline.planning import Progress, quiet
from waterfill.registry import find_codec
from waterfill.runtime import artifact
from waterfill.runtime.arrays import checkpoint_infos
from waterfill.runtime.files import original_files, original_texts, remember
from waterfill.runtime.pieces import Pieces
from waterfill.sources import FolderSource, Source
from waterfill.types import Point, Record, Spec, TensorInfo, WaterfillError

RAW = Point(0, 0, Spec("raw"))


def compress_exact(
    source: Source,
    out: Path,
    *,
    force: bool = False,
    command: str = "",
    progress: Progress = quiet,
) -> Record:
    """An artifact from which every tensor, and of a folder every weights file, comes back bit for bit.

    Parameters
    ----------
    source : of a folder, best opened with `any_files`
    out, force, command : as of `waterfill.compress`
    progress : called with ("encoding", bytes done, bytes in all)

    Raises
    ------
    WaterfillError
        If `out` exists or cannot be written, or a file is damaged or changes meanwhile; nothing is left at `out`.
    """
    artifact.refuse_existing(out, force, [source.path])
    work = out.with_name(out.name + ".work")
    try:
        exact = _Exact(source, Pieces(work / "pieces", f"{source.fingerprint()} {__version__}"))
        with artifact.new_folder(out, force) as folder:
            exact.encode(progress)
            _require_unchanged(source, work)
            exact.write(folder / FILE_NAME)
            record = _record(exact, folder / FILE_NAME, out.name, command)
            artifact.furnish(folder, source, record)
    except OSError as error:
        raise artifact.explain(error, out) from error
    shutil.rmtree(work, ignore_errors=True)
    return record


def _require_unchanged(source: Source, work: Path) -> None:
    if isinstance(source, FolderSource):
        try:
            source.require_unchanged()
        except WaterfillError:
            # Its pieces may be of another content than said.
            shutil.rmtree(work, ignore_errors=True)
            raise


class _Exact:
    """Tensors of a source on their way into a file, each encoded once and kept on disk."""

    def __init__(self, source: Source, pieces: Pieces) -> None:
        self.source, self.pieces = source, pieces
        repeats = source.duplicates()
        self.infos = {
            name: TensorInfo(name, shape, dtype, group=repeats.get(name, ""))
            for name, (dtype, shape) in source.tensors.items()
        }
        self.about: dict[str, Any] = {"waterfill": __version__, "model": source.name}
        if isinstance(source, FolderSource):
            self.about |= remember(source)
        # A piece made by an older codec is another piece.
        self._point = Point(0, 0, find_codec("lossless")().spec)
        self._described: list[dict[str, Any]] = []

    @property
    def original_nbytes(self) -> int:
        """Of the files; of tensors that come from none, as they would be stored."""
        if isinstance(self.source, FolderSource):
            return sum(file.path.stat().st_size for file in self.source.files)
        return sum(info.nbytes for info in self.infos.values())

    def encode(self, progress: Progress) -> None:
        """Encode what no earlier run has left."""
        done, total = 0, sum(info.nbytes for info in self.infos.values())
        for name, info in self.infos.items():
            if info.group:
                self._described.append(repeat(info))
            else:
                self._described.append(self.pieces.get(name, self._point) or self._encode(info))
            done += info.nbytes
            progress("encoding", done, total)

    def _encode(self, info: TensorInfo) -> dict[str, Any]:
        bits = self.source.read(info.name)
        encoded, why = encode_tensor(bits, info, None, self._point)[0], "every bit kept"
        if encoded.nbytes >= info.nbytes:
            encoded, why = encode_tensor(bits, info, None, RAW)[0], "stored: does not compress"
        del bits
        return self.pieces.put(info.name, self._point, encoded, {"why": why})

    def write(self, path: Path) -> int:
        """Write the weights file; its size."""
        return write(path, self._described, self._payloads(), self.about)

    def _payloads(self) -> Iterator[Iterator[bytes]]:
        for name, info in self.infos.items():
            yield iter(()) if info.group else self.pieces.payload(name, self._point)


def _record(exact: _Exact, file: Path, name: str, command: str) -> Record:
    """Check the file as written, and say what came of it."""
    source = exact.source
    with Reader(file) as reader:
        for _ in reader.verify():
            pass
        _check_files(reader, source)
        rows, nbytes = artifact.ledger(reader), reader.nbytes
    params = sum(info.size for info in exact.infos.values() if not info.group)
    return Record(
        name=name,
        nbytes=nbytes,
        bits_per_weight=8 * nbytes / max(params, 1),
        predicted={"kl_nats": 0.0},
        ledger=tuple(rows),
        about={
            "waterfill": __version__,
            "model": source.name,
            "local": Path(str(source.path)).exists(),
            "command": command,
            "original_nbytes": exact.original_nbytes,
            "params": params,
            "lossless": True,
            "plan_digest": artifact.plan_digest(rows),
            "numpy": np.__version__,
            "python": platform.python_version(),
            "warnings": _left_behind(source),
        },
    )


def _check_files(reader: Reader, source: Source) -> None:
    """WaterfillError unless the index gives back every header."""
    if isinstance(source, FolderSource):
        original_texts(reader.about)
        files = original_files(reader.about, checkpoint_infos(reader))
        if [f.header for f in files] != [f.header for f in source.files]:
            raise WaterfillError("a header did not come back as it was; please report this")


def _left_behind(source: Source) -> list[str]:
    """What a user should know is not in the artifact: one line, or none."""
    if not isinstance(source, FolderSource):
        return []
    taken = {p.name for p in source.files_beside} | {f.path.name for f in source.files}
    names = [p.name for p in sorted(source.path.iterdir()) if not p.name.startswith(".")]
    left = [n for n in names if n not in taken and not n.endswith(".index.json")]
    if not left:
        return []
    more = f" and {len(left) - 1} more" if len(left) > 1 else ""
    return [f"{left[0]}{more} of {source.path}: not part of the artifact"]

"""What changed between two checkpoints, as one file: each tensor in the way that takes fewest bytes."""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from waterfill import __version__
from waterfill.coding import delta
from waterfill.coding.lossless import words_of
from waterfill.coding.native import return_freed_memory
from waterfill.container import PATCH, chunks, describe, format_of, write
from waterfill.pipeline.planning import Progress, quiet
from waterfill.registry import find_codec
from waterfill.runtime.artifact import explain
from waterfill.runtime.checkpoints import open_tensors
from waterfill.runtime.digests import digest, model_digest
from waterfill.runtime.patch import FILE, as_integers, most_nbytes
from waterfill.sources import Checkpoint, FolderSource, Tensors
from waterfill.types import Array, Encoded, Spec, TensorInfo, WaterfillError, Weighting

__all__ = ["diff", "diff_to"]

# Where more than this share of the words changed, the ways to code them are tried on samples.
DENSE = 0.25
SAMPLES, SAMPLE_NBYTES = 16, 1 << 17
SPOOL_NBYTES = 64 << 20


def diff(base: Any, new: Any) -> bytes:
    """What turns one model into another, bit for bit.

    Parameters
    ----------
    base, new : dict of name -> torch tensor or numpy array, torch module, folder of safetensors
        files (a model's or not), artifact, or hub id

    Returns
    -------
    bytes
        A patch for `apply_`, or for ``waterfill patch`` once in a file.
    """
    with (
        tempfile.SpooledTemporaryFile(max_size=SPOOL_NBYTES) as spool,
        open_tensors(base) as before,
        open_tensors(new) as after,
    ):
        collected = _Collector(spool, quiet)
        collected.collect(before, after)
        return b"".join(chunks(collected.described, collected.payloads(), collected.about, PATCH))


def diff_to(
    base: Any, new: Any, out: str | Path, *, force: bool = False, progress: Progress = quiet
) -> dict[str, Any]:
    """As `diff`, into a file, one tensor in memory at a time; returns figures about it.

    Raises
    ------
    WaterfillError
        If `out` exists and `force` is not set or it is no patch, or a model cannot be read; nothing is left at `out`.
    """
    out = Path(out)
    if out.is_dir():
        raise WaterfillError(f"{out} is a folder; a patch is one file")
    if out.exists() and not force:
        raise WaterfillError(f"{out} exists; choose another name or replace it with --force")
    if out.exists() and format_of(out) != PATCH and not _is_empty(out):
        raise WaterfillError(
            f"{out} is not a patch, which --force would delete; choose another name"
        )
    return_freed_memory()
    with open_tensors(base) as before, open_tensors(new) as after:
        names = before.tensors.keys(), after.tensors.keys()
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(prefix=f"{out.name}.", dir=out.parent) as spool:
                made = _Collector(spool, progress)
                made.collect(before, after)
                nbytes = write(out, made.described, made.payloads(), made.about, PATCH)
        except OSError as error:
            raise explain(error, out) from error
    return {
        "path": str(out),
        "nbytes": nbytes,
        "model_nbytes": made.nbytes,
        "tensors": len(names[1]),
        "changed": sum(e["name"] in names[0] for e in made.described),
        "new": len(names[1] - names[0]),
        "removed": len(names[0] - names[1]),
        "base": made.about["base"],
        "result": made.about["result"],
    }


def _is_empty(path: Path) -> bool:
    return path.is_file() and path.stat().st_size == 0


class _Collector:
    """Coded changes, in a file until all of them are known."""

    def __init__(self, spool: IO[bytes], progress: Progress) -> None:
        self.described: list[dict[str, Any]] = []
        self.about: dict[str, Any] = {}
        self.nbytes = 0
        self._spool = spool
        self._progress = progress
        self._first: dict[tuple[Any, ...], TensorInfo] = {}
        self._made = self._coded = 0  # bytes that the base does not have, bytes of the patch

    def collect(self, base: Tensors, new: Tensors) -> None:
        """Compare every tensor, then what lies beside them."""
        before, after = [], []
        removed = [name for name in base.tensors if name not in new.tensors]
        for name in removed:
            before.append((name, *base.tensors[name], digest(base.read(name))))
        for done, (name, info) in enumerate(new.tensors.items(), 1):
            y = new.read(name)
            x = base.read(name) if name in base.tensors else None
            digests = (digest(y), "" if x is None else digest(x))
            after.append((name, *info, digests[0]))
            if x is not None:
                before.append((name, *base.tensors[name], digests[1]))
            if x is None or base.tensors[name] != info or digests[0] != digests[1]:
                alike = base.tensors.get(name) == info
                self._add(TensorInfo(name, info[1], info[0]), x if alike else None, y, digests)
            self.nbytes += y.nbytes
            del x, y  # else they would be there still while the next two are read
            self._progress("comparing", done, len(new.tensors))
        self.about |= {"waterfill": __version__, "base": model_digest(before)}
        self.about |= {"result": model_digest(after), "removed": removed}
        if isinstance(new, Checkpoint):
            self._add_files(base if isinstance(base, Checkpoint) else None, new)
        for source in (base, new):
            if isinstance(source, FolderSource):
                source.require_unchanged()

    def payloads(self) -> Iterator[list[bytes]]:
        """The parts of each entry, in order."""
        self._spool.seek(0)
        for item in self.described:
            yield [self._spool.read(length) for length, _ in item["parts"].values()]

    def _add(self, info: TensorInfo, x: Array | None, y: Array, digests: tuple[str, str]) -> None:
        first = self._first.setdefault((info.dtype, info.shape, digests), info)
        share = None
        if first is info:
            encoded, share = encode_tensor(info, x, y)
        else:
            spec = Spec("delta") if x is not None else Spec("raw")
            again = TensorInfo(info.name, info.shape, info.dtype, group=first.name)
            encoded = Encoded(spec, again, {})
        if x is None:
            self._made += info.nbytes
            if self._made > most_nbytes(self._coded + encoded.nbytes):
                encoded = _raw(info, y)  # or no reader would believe it
        self._put(encoded, {} if share is None else {"changed": round(share, 6)})

    def _put(self, encoded: Encoded, note: Mapping[str, Any]) -> None:
        self.described.append(describe(encoded, note))
        self._coded += encoded.nbytes
        for part in encoded.parts.values():
            self._spool.write(part)

    def _add_files(self, base: Checkpoint | None, new: Checkpoint) -> None:
        self.about["files"] = [
            {"name": name, "header": header.decode()} for name, header in new.layout
        ]
        listed: dict[str, Any] = {}
        for name in new.beside:
            data = new.read_beside(name) or b""
            listed[name] = [len(data), digest(np.frombuffer(data, np.uint8))]
            if base is None or base.read_beside(name) != data:
                info = TensorInfo(FILE + name, (len(data),), "U8", "file")
                self._put(Encoded(Spec("deflate"), info, {"bytes": zlib.compress(data, 9)}), {})
        self.about["beside"] = listed


def encode_tensor(info: TensorInfo, x: Array | None, y: Array) -> tuple[Encoded, float | None]:
    """The smallest form of a tensor (as a change from x, if that is given), and the share changed."""
    if x is None:
        return _plain(info, y), None
    sampled = list(_samples(x, y))
    share = sum(int(np.count_nonzero(a != b)) for a, b in sampled) / max(
        sum(a.size for a, _ in sampled), 1
    )
    modes: Sequence[Mode] = (_delta,)
    if share > DENSE:
        modes = (_delta, _xor, _plain_of)
        if len(sampled) > 1:
            a, b = (np.concatenate(part) for part in zip(*sampled, strict=True))
            part = TensorInfo(info.name, a.shape, info.dtype)
            modes = [min(modes, key=lambda mode: mode(part, a, b).nbytes)]
    best = min((mode(info, x, y) for mode in modes), key=lambda encoded: encoded.nbytes)
    if best.nbytes >= info.nbytes:
        best = min((best, _plain(info, y)), key=lambda encoded: encoded.nbytes)
    return best, share


def _samples(x: Array, y: Array) -> Iterator[tuple[Array, Array]]:
    """Slices of both, evenly spread; all of a small tensor as one."""
    a, b = words_of(x), words_of(y)
    length = SAMPLE_NBYTES // a.itemsize
    if a.size <= SAMPLES * length:
        yield a, b
        return
    for at in np.linspace(0, a.size - length, SAMPLES).astype(int):
        yield a[at : at + length], b[at : at + length]


Mode = Callable[[TensorInfo, Array, Array], Encoded]


def _delta(info: TensorInfo, x: Array, y: Array) -> Encoded:
    return Encoded(Spec("delta"), info, {"delta": delta.encode(x, y, info.dtype)})


def _xor(info: TensorInfo, x: Array, y: Array) -> Encoded:
    words = as_integers(info)
    inner = _plain(words, (words_of(x) ^ words_of(y)).reshape(info.shape))
    return Encoded(Spec("xor", {"of": inner.spec.to_json()}), info, inner.parts, inner.extra)


def _plain_of(info: TensorInfo, x: Array, y: Array) -> Encoded:
    return _plain(info, y)


def _plain(info: TensorInfo, y: Array) -> Encoded:
    """The whole tensor, coded or as it is."""
    lossless = find_codec("lossless")()
    parts, extra = lossless.encode(y, info, Weighting())
    if sum(map(len, parts.values())) < info.nbytes:
        return Encoded(lossless.spec, info, parts, extra)
    return _raw(info, y)


def _raw(info: TensorInfo, y: Array) -> Encoded:
    raw = find_codec("raw")()
    return Encoded(raw.spec, info, *raw.encode(y, info, Weighting()))

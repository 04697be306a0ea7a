"""One checkpoint and a chain of patches -> the checkpoint they lead to, as a folder."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from waterfill.coding.native import return_freed_memory
from waterfill.container import FILE_NAME
from waterfill.pipeline.planning import Progress, quiet
from waterfill.runtime.artifact import new_folder, refuse_existing
from waterfill.runtime.checkpoints import open_checkpoint
from waterfill.runtime.digests import digest, model_digest
from waterfill.runtime.files import check_name, header_of
from waterfill.runtime.patch import CHANGES, Info, Patch
from waterfill.sources import Checkpoint
from waterfill.sources.folder import INDEX_NAME, may_lie_beside
from waterfill.sources.safetensors_file import SafetensorsFile, open_safetensors
from waterfill.types import Array, FormatError, WaterfillError

__all__ = ["patch", "show_patch"]


def patch(
    base: str | Path,
    patches: Sequence[str | Path],
    out: str | Path,
    *,
    force: bool = False,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Apply patches in order to a checkpoint; one tensor in memory at a time.

    Parameters
    ----------
    base : folder of safetensors files, artifact, hub id, or ``"demo"``
    patches : files; each is for the result of the one before it
    out : folder to make
    force : replace `out` if it exists

    Returns
    -------
    What was made: path, bytes of its weights, digest.

    Raises
    ------
    WaterfillError
        If the base is another than the first patch is for, the chain is broken, or `out` exists;
        nothing is left at `out`.
    FormatError
        If a patch is damaged.
    """
    out = Path(out)
    refuse_existing(out, force)
    return_freed_memory()
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(open_checkpoint(base))
        refuse_existing(out, force, [source.path, *(Path(p) for p in patches)])
        opened = [stack.enter_context(Patch(p)) for p in patches]
        chain = _Chain(source, opened, progress)
        chain.check()
        with new_folder(out, force) as folder:
            nbytes = chain.write(folder)
    return {"path": str(out), "nbytes": nbytes, "result": opened[-1].result}


def show_patch(path: str | Path) -> dict[str, Any]:
    """What a patch does to each tensor and file; the rows' bytes sum to the patch."""
    with Patch(path) as opened:
        return {
            "path": str(opened.path),
            "nbytes": opened.nbytes,
            "base": opened.base,
            "result": opened.result,
            "ledger": opened.ledger(),
        }


class _Chain:
    """A base and the patches that follow each other from it."""

    def __init__(self, base: Checkpoint, patches: Sequence[Patch], progress: Progress) -> None:
        self.base = base
        self.patches = patches
        self.progress = progress
        # Of the base, and of the result of each patch: (dtype, shape), and digest, by tensor.
        self.infos: list[dict[str, Info]] = [dict(base.tensors)]
        self.digests: list[dict[str, str]] = [{} for _ in range(len(patches) + 1)]

    def check(self) -> None:
        """Refuse a chain that does not hold together, before any work."""
        for one, following in pairwise(self.patches):
            if following.base != one.result:
                raise WaterfillError(
                    f"{following.path} is for {following.base[:8]}, but {one.path} makes "
                    f"{one.result[:8]}: one between them is missing, or their order is another"
                )
        for done, name in enumerate(self.base.tensors, 1):
            self.digests[0][name] = digest(self.base.read(name))
            self.progress("reading", done, len(self.base.tensors))
        self.patches[0].require_base(self._model_digest(0))
        for one in self.patches:
            self.infos.append(one.infos(self.infos[-1]))

    def write(self, folder: Path) -> int:
        """Fill a folder with the result and verify it; returns the bytes of its weights."""
        written, total = 0, len(self.infos[-1])
        layout = _layout(self.patches[-1], self.infos[-1])
        for name, header, tensors in layout:
            with (folder / name).open("wb") as file:
                file.write(len(header).to_bytes(8, "little") + header)
                for tensor in tensors:
                    bits = self._value(tensor, len(self.patches))
                    file.write(np.ascontiguousarray(bits).reshape(-1).view(np.uint8).data)
                    del bits  # else it would be there still while the next is made
                    written += 1
                    self.progress("patching", written, total)
            self._check_written(open_safetensors(folder / name))
        self._complete()
        for stage, patch in enumerate(self.patches, 1):
            patch.require_result(self._model_digest(stage))
        self._write_beside(folder)
        return sum((folder / name).stat().st_size for name, *_ in layout)

    def _value(self, name: str, last: int) -> Array | None:
        """A tensor as it is after so many patches; its digests on the way are noted."""
        way, stage = [], last
        while stage and name in self.infos[stage]:
            way.append((name, stage))
            entry = self.patches[stage - 1].entries.get(name)
            if entry is not None and entry.info.group:
                name = entry.info.group
            elif entry is None or entry.spec.id in CHANGES:
                stage -= 1
            else:
                break
        value = self.base.read(name) if not stage and name in self.infos[0] else None
        for name, stage in reversed(way):
            digests, patch = self.digests[stage], self.patches[stage - 1]
            if name not in patch.entries:
                digests[name] = self.digests[stage - 1][name]
            elif patch.entries[name].info.group:
                digests[name] = digests[patch.entries[name].info.group]
            else:
                value = patch.restore(name, value, self.infos[stage - 1].get(name))
                digests[name] = digest(value)
        return value

    def _complete(self) -> None:
        """Note the digests of what is gone again later, or made anew: part of what is verified."""
        for stage in range(len(self.patches), 0, -1):
            known, entries = self.digests[stage], self.patches[stage - 1].entries
            for name in self.infos[stage].keys() - known.keys():
                group = entries[name].info.group if name in entries else ""
                if group in known:
                    known[name] = known[group]
                else:
                    self._value(name, stage)

    def _model_digest(self, stage: int) -> str:
        digests = self.digests[stage]
        return model_digest((n, *info, digests[n]) for n, info in self.infos[stage].items())

    def _check_written(self, file: SafetensorsFile) -> None:
        for name, span in file.tensors.items():
            if (span.dtype, span.shape) != self.infos[-1][name]:
                raise FormatError(f"{self.patches[-1].path}: {name} is not as its header says")

    def _write_beside(self, folder: Path) -> None:
        beside = self.patches[-1].beside
        if beside is None:
            for name in self.base.beside:
                (folder / name).write_bytes(self.base.read_beside(name) or b"")
            return
        for name, known in beside.items():
            if not may_lie_beside(name) and name != INDEX_NAME:
                raise FormatError(f"{self.patches[-1].path}: {name!r} may not lie beside weights")
            check_name(name, ("",))
            data = self._file(name)
            if data is None or known != [len(data), digest(np.frombuffer(data, np.uint8))]:
                raise WaterfillError(
                    f"{name} beside this base is not what it was beside the one the patch was made "
                    "from; the tensors fit, so copy that file from there and run again"
                )
            (folder / name).write_bytes(data)

    def _file(self, name: str) -> bytes | None:
        for patch in reversed(self.patches):
            carried = patch.file(name)
            if carried is not None:
                return carried
        return self.base.read_beside(name)


def _layout(patch: Patch, infos: Mapping[str, Info]) -> list[tuple[str, bytes, list[str]]]:
    """Name, header and tensors of each weights file of the result."""
    if patch.files is None:
        header = header_of(infos, {"format": "pt"})
        return [(FILE_NAME, header, list(infos))]
    layout = []
    try:
        for item in patch.files:
            name, header = item["name"], item["header"].encode()
            check_name(name, (".safetensors",))
            table = json.loads(header)
            table.pop("__metadata__", None)
            layout.append((name, header, sorted(table, key=lambda t: table[t]["data_offsets"])))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise FormatError(f"{patch.path}: the result's files are not as specified") from error
    listed = [tensor for *_, tensors in layout for tensor in tensors]
    if len({name for name, *_ in layout}) < len(layout) or sorted(listed) != sorted(infos):
        raise FormatError(f"{patch.path}: the result's files do not have its tensors")
    return layout

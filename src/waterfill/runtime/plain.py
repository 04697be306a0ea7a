"""An artifact back to a plain folder that transformers loads as ever."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from waterfill.container import FILE_NAME, Reader
from waterfill.runtime.arrays import checkpoint_infos, read_tensors
from waterfill.runtime.artifact import folder_of, new_folder, refuse_existing
from waterfill.types import DTYPES, Array

SHARD_NBYTES = 5 * 10**9
OWN_FILES = (FILE_NAME, "README.md", "report.html", "waterfill.json", "config.json")

Shards = list[dict[str, tuple[str, tuple[int, ...]]]]


def decompress(
    path: str | Path,
    out: str | Path,
    *,
    force: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> None:
    """Turn an artifact back into a plain safetensors folder.

    Parameters
    ----------
    path : artifact folder
    out : folder to make
    force : replace `out` if it exists
    progress : called with (done, total, what)

    Raises
    ------
    WaterfillError
        If `out` exists or cannot be written, or the artifact is damaged; nothing is left at `out`.
    """
    artifact, out = folder_of(path), Path(out)
    refuse_existing(out, force, [artifact])
    with new_folder(out, force) as folder:
        _decode_into(artifact, folder, progress)


def _decode_into(
    artifact: Path, folder: Path, progress: Callable[[int, int, str], None] | None
) -> None:
    with Reader(artifact) as reader:
        shards = _shard(checkpoint_infos(reader))
        tensors = read_tensors(reader)
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            name = (
                FILE_NAME
                if len(shards) == 1
                else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            )
            _write_shard(folder / name, shard, tensors, progress)
            weight_map |= dict.fromkeys(shard, name)
        if len(shards) > 1:
            total = sum(_nbytes(i) for shard in shards for i in shard.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / f"{FILE_NAME}.index.json").write_text(json.dumps(index, indent=1))
    _copy_beside(artifact, folder)


def _copy_beside(artifact: Path, folder: Path) -> None:
    """Copy tokenizer and configuration; the configuration loses its quantisation entry."""
    for file in sorted(artifact.iterdir()):
        if file.is_file() and file.name not in OWN_FILES:
            shutil.copyfile(file, folder / file.name)
    config = artifact / "config.json"
    if config.exists():
        plain = json.loads(config.read_text(encoding="utf-8"))
        plain.pop("quantization_config", None)
        (folder / "config.json").write_text(json.dumps(plain, indent=2), encoding="utf-8")


def _nbytes(info: tuple[str, tuple[int, ...]]) -> int:
    n = DTYPES[info[0]].itemsize
    for d in info[1]:
        n *= d
    return n


def _shard(infos: Mapping[str, tuple[str, tuple[int, ...]]]) -> Shards:
    shards: Shards = [{}]
    room = SHARD_NBYTES
    for name, info in infos.items():
        if shards[-1] and _nbytes(info) > room:
            shards.append({})
            room = SHARD_NBYTES
        shards[-1][name] = info
        room -= _nbytes(info)
    return shards


def _write_shard(
    path: Path,
    shard: Mapping[str, tuple[str, tuple[int, ...]]],
    tensors: Iterator[tuple[str, str, Array]],
    progress: Callable[[int, int, str], None] | None,
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, info in shard.items():
        end = offset + _nbytes(info)
        header[name] = {"dtype": info[0], "shape": list(info[1]), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(path.name + ".partial")
    try:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for done, expected in enumerate(shard, 1):
                name, _, bits = next(tensors)
                assert name == expected
                file.write(bits.tobytes())
                if progress:
                    progress(done, len(shard), f"decoding {name}")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

"""An artifact back to a plain folder that transformers loads as ever."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from waterfill.container import FILE_NAME
from waterfill.runtime.arrays import empty
from waterfill.runtime.artifact import (
    folder_of,
    new_folder,
    original_config,
    read_config,
    refuse_existing,
)
from waterfill.runtime.files import (
    Infos,
    OriginalFile,
    header_of,
    nbytes_of,
    original_files,
    original_texts,
)
from waterfill.runtime.reading import Artifact
from waterfill.types import DTYPES

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
    progress : called with (bytes done, bytes in all, what)

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
    path: Path, folder: Path, progress: Callable[[int, int, str], None] | None
) -> None:
    with Artifact(path) as artifact:
        infos = {n: (i.dtype, i.shape) for n in artifact.names if (i := artifact.info(n))}
        files = original_files(artifact.about, infos)
        _copy_beside(path, folder, plain_config=not files)
        for name, text in original_texts(artifact.about).items() if files else ():
            (folder / name).write_bytes(text)
        done, total = 0, sum(map(nbytes_of, infos.values()))
        for file in files or _standard_files(infos, folder):
            for name, nbytes in _write_file(folder / file.name, file, artifact):
                done += nbytes
                if progress:
                    progress(done, total, f"decoding {name}")


def _copy_beside(artifact: Path, folder: Path, plain_config: bool) -> None:
    """Copy tokenizer and texts, and the configuration as it was before ours."""
    for file in sorted(artifact.iterdir()):
        if file.is_file() and file.name not in OWN_FILES:
            shutil.copyfile(file, folder / file.name)
    if plain_config and (artifact / "config.json").exists():
        plain = original_config(read_config(artifact))
        (folder / "config.json").write_text(json.dumps(plain, indent=2), encoding="utf-8")


def _standard_files(infos: Infos, folder: Path) -> list[OriginalFile]:
    """Files as transformers names them, for tensors whose own are not known; writes their index."""
    shards = _shard(infos)
    count = len(shards)
    names = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    if count == 1:
        names = [FILE_NAME]
    else:
        weight_map = {t: name for name, shard in zip(names, shards, strict=True) for t in shard}
        total = sum(map(nbytes_of, infos.values()))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{FILE_NAME}.index.json").write_text(json.dumps(index, indent=1))
    return [
        OriginalFile(name, header_of(shard, {"format": "pt"}), shard)
        for name, shard in zip(names, shards, strict=True)
    ]


def _shard(infos: Infos) -> Shards:
    shards: Shards = [{}]
    room = SHARD_NBYTES
    for name, info in infos.items():
        if shards[-1] and nbytes_of(info) > room:
            shards.append({})
            room = SHARD_NBYTES
        shards[-1][name] = info
        room -= nbytes_of(info)
    return shards


def _write_file(path: Path, file: OriginalFile, artifact: Artifact) -> Iterator[tuple[str, int]]:
    """Write a file, yielding each tensor's name and bytes once it is there."""
    # One buffer for all: the system need not hand out, and clear, fresh pages for each tensor.
    nbytes, largest = max(((nbytes_of(i), n) for n, i in file.tensors.items()), default=(0, ""))
    buffer = empty(largest, "U8", (nbytes,))
    with path.open("wb") as stream:
        stream.write(len(file.header).to_bytes(8, "little") + file.header)
        for name, info in file.tensors.items():
            octets = buffer[: nbytes_of(info)]
            artifact.read(name, octets.view(DTYPES[info[0]]).reshape(info[1]))
            stream.write(memoryview(octets))  # type: ignore[arg-type]
            yield name, len(octets)

"""All arrays of an artifact at once, by one thread or several."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

import waterfill
from tests import checkpoints
from waterfill.container import FILE_NAME, Reader
from waterfill.runtime.arrays import read_tensors, unpack
from waterfill.types import Encoded, FormatError, Spec, TensorInfo

INFOS = {f"w{i}": ("BF16" if i % 2 else "I16", (40, 30 + i)) for i in range(9)}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arrays")
    data = {n: checkpoints.weights(shape, i) for i, (n, (_, shape)) in enumerate(INFOS.items())}
    checkpoints.write_file(folder / "model" / FILE_NAME, INFOS, data)
    waterfill.compress(folder / "model", folder / "out", lossless=True)
    return folder / "out"


@pytest.mark.parametrize("threads", [None, 1, 2, 5, 50])
def test_order_and_values_do_not_depend_on_threads(threads: int | None, out: Path) -> None:
    arrays = waterfill.load(out, threads=threads)
    assert list(arrays) == list(INFOS)
    with waterfill.Artifact(out) as artifact:
        for name, array in arrays.items():
            bits = artifact.read(name)
            if array.dtype == np.float32:
                bits = np.left_shift(bits, 16, dtype=np.uint32)
            assert array.tobytes() == bits.tobytes()


def test_few_tensors_are_in_memory_at_a_time(out: Path) -> None:
    made, taken = 0, 0
    lock = threading.Lock()

    def finish(bits: object, dtype: str) -> None:
        nonlocal made
        with lock:
            made += 1
            assert made <= taken + 3

    with Reader(out) as reader:
        for _ in read_tensors(reader, finish, threads=3):
            taken += 1
    assert made == taken == len(INFOS)


def test_damage_in_one_of_several_threads(out: Path, tmp_path: Path) -> None:
    with Reader(out) as reader:
        at = reader._data_start + reader.entries["w4"].parts["stream"][0]
    changed = bytearray((out / FILE_NAME).read_bytes())
    changed[at] ^= 1
    (tmp_path / FILE_NAME).write_bytes(changed)
    before = threading.active_count()
    with pytest.raises(FormatError, match="w4"):
        waterfill.load(tmp_path, threads=3)
    assert threading.active_count() == before


@pytest.mark.parametrize("stream", [b"", b"\5", b"\0abcd", b"\2\0\0"])
def test_what_is_wrong_with_a_tensor_is_said_with_its_name(stream: bytes) -> None:
    spec, info = Spec("lossless", {}, 2), TensorInfo("layer.t", (3,), "U8")
    with pytest.raises(FormatError, match=r"^layer\.t: "):
        unpack(Encoded(spec, info, {"stream": stream}))


@pytest.mark.parametrize("shape", [(2**47, 0), (2**33, 0), (2**40, 1, 0)])
@pytest.mark.parametrize("transposed", [False, True])
def test_an_axis_of_an_empty_tensor_may_be_as_long_as_it_likes(
    shape: tuple[int, ...], transposed: bool
) -> None:
    info = TensorInfo("t", shape, "F32", transposed=transposed)
    parts = {"codes": b"", "scales": b""}
    for name in ("integer", "float", "affine", "stack", "rotate", "lowrank"):
        assert unpack(Encoded(Spec(name), info, parts)).shape == shape

"""A second reader, written from docs/format: numpy and the standard library, no waterfill.

python docs/reader.py OUT  prints names, shapes, dtypes, means; the rest is in reader_*.py
"""

import json
import math
import sys
import zlib
from pathlib import Path

import numpy as np
from reader_coding import grid, integers, need, scales, sections, sparse
from reader_lossless import planes, words
from reader_paths import paths

FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
INTS = {f"{kind}{8 * n}": f"<{kind.lower()}{n}" for kind in "IU" for n in (1, 2, 4, 8)}
DTYPES = FLOATS | INTS | {"BOOL": "?", "F8_E4M3": "u1", "F8_E5M2": "u1"}


def raw(parts, m, n, dtype):
    return np.frombuffer(parts["bytes"], DTYPES[dtype])


def lossless(parts, m, n, dtype, coder="auto"):
    need(coder in ("auto", "rans", "huffman"), "option coder")
    width, of_version_1 = np.dtype(DTYPES[dtype]).itemsize, "planes" in parts
    read, data = (planes, parts["planes"]) if of_version_1 else (words, parts["stream"])
    return read(data, m * n, width, dtype).view(DTYPES[dtype])


def integer(parts, m, n, dtype, bits=4, group=128, pack="packed", solver="", damping=0, outliers=0):
    scale = np.frombuffer(parts["scales"], "<f2").reshape(m, -(-n // group)).astype("f4")
    if pack == "coded":
        codes = integers(parts["codes"], m, n)
    else:
        need(len(parts["codes"]) == (m * n * bits + 7) // 8, "length of packed codes")
        stream = np.unpackbits(np.frombuffer(parts["codes"], "u1"), bitorder="little")
        need(not stream[m * n * bits :].any(), "padding of packed codes")
        codes = stream[: m * n * bits].reshape(m, n, bits) @ (1 << np.arange(bits))
        codes -= 1 << (bits - 1)
    need((abs(2 * codes + 1) < 1 << bits).all(), "a code outside its range")
    values = (codes * np.repeat(scale, group, axis=1)[:, :n]).astype("f4")
    return sparse(values, parts["outliers"]) if "outliers" in parts else values


def trellis(parts, m, n, dtype, states=64, step=0, mmse=0, gains=False, rows=0, damping=0):
    columns, rows, gains, path = sections(parts["codes"], 4)
    q = 8 if m >= 512 else 4
    columns, rows = grid(columns, n, 126 * q), grid(rows, m, 252)
    step = scales(columns, q)
    step = step * np.frombuffer(gains, "<f2").astype("f4") if gains else step
    return paths(path, states, step, scales(-rows, 2), (-columns / q, rows / 2))


CODECS = {"raw": raw, "lossless": lossless, "integer": integer, "trellis": trellis}


def decode(entry, parts):
    """One index entry and its parts -> array; BF16 as float32, fp8 as its bits."""
    (codec, version, options), dtype, shape = entry["codec"], entry["dtype"], entry["shape"]
    known = {"lossless": (1, 2), "integer": (1, 2), "trellis": (2,)}.get(codec, (1,))
    need(codec in CODECS and version in known, f"codec {codec} version {version} is unknown here")
    m = shape[0] if len(shape) > 1 else 1
    n, turned = math.prod(shape) // max(m, 1), entry.get("transposed") and len(shape) > 1
    m, n = (n, m) if turned else (m, n)
    y = CODECS[codec](parts, m, n, dtype, **options)  # an unknown option is a TypeError
    if codec in ("integer", "trellis"):
        need(dtype in FLOATS, "rounded weights are floats")
        y = np.ldexp(y.T if turned else y, -entry.get("extra", {}).get("exponent", 0)).copy("C")
        if dtype == "BF16":  # to nearest, ties to even
            y = (y.view("<u4") + 0x7FFF + (y.view("<u4") >> 16 & 1)) >> 16
        y = y.astype(DTYPES[dtype])
    return ((y.astype("<u4") << 16).view("<f4") if dtype == "BF16" else y).reshape(shape)


def load(path):
    """Name -> array of every tensor of an artifact (its folder, or its weights file)."""
    data = (Path(path) / "model.safetensors" if Path(path).is_dir() else Path(path)).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    meta, (first, last) = header["__metadata__"], header["waterfill//index"]["data_offsets"]
    need(meta["format"] == "waterfill" and meta["version"] == "1", "container version")
    index = data[start + first : start + last]
    need(meta["crc"] == f"{zlib.crc32(index):08x}", "checksum of the index")
    rebuilt, found, at, out = {"__metadata__": meta}, {}, 0, {}

    def place(name, length):
        nonlocal at
        span, at = [at, at + length], at + length
        rebuilt[name] = {"dtype": "U8", "shape": [length], "data_offsets": span}
        return data[start + at - length : start + at]

    for entry in json.loads(zlib.decompress(index))["tensors"]:
        need(entry["name"] not in found, f"{entry['name']} occurs twice")
        found[entry["name"]] = entry, (parts := {})
        for part, (length, crc) in entry["parts"].items():
            parts[part] = place(f"{entry['name']}//{part}", length)
            need(zlib.crc32(parts[part]) == crc, f"checksum of {entry['name']} ({part})")
    place("waterfill//index", len(index))
    text = json.dumps(rebuilt, separators=(",", ":")).encode()
    need(data[8:start] == text + b" " * (-len(text) % 8), "header and index disagree")
    need(len(data) == start + at, "length of the file")
    for name, (entry, _) in found.items():
        array = decode(*found[entry.get("same_as", name)])
        if "index" in entry:
            slices = out.setdefault(name.removesuffix(f"[{entry['index']}]"), [])
            need(entry["index"] == len(slices), "slices come in order")
            slices.append(array)
        else:
            out[name] = array
    return {name: np.stack(a) if isinstance(a, list) else a for name, a in out.items()}


if __name__ == "__main__":
    for name, array in load(sys.argv[1]).items():
        print(name, array.shape, array.dtype, array.sum(dtype="f8") / max(array.size, 1))  # noqa: T201

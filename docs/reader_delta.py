"""Patches, read from docs/format/delta.md: numpy, and the readers beside this one; short and slow."""

import json
import math
import zlib

import numpy as np
from reader import CODECS, DTYPES
from reader_coding import EXP2, Source, frequencies, models, need, rans

BLOCK = 1 << 20
EXPONENTS = {"F64": (52, 0x7FF, 831), "F32": (23, 0xFF, 0), "F16": (10, 0x1F, 0)}
EXPONENTS |= {"BF16": (7, 0xFF, 0), "F8_E4M3": (3, 0xF, 0), "F8_E5M2": (2, 0x1F, 0)}


def geometric(rate, size):
    root = math.sqrt(math.sqrt(math.sqrt(2)))
    octave = -(-rate // 8)
    chance = math.ldexp(math.prod([root] * (8 * octave - rate)), 3 - octave)
    least = [s if s < 16 else (2 | s & 1) << (s - 16) // 2 + 3 for s in range(size)]
    t = np.minimum(chance * np.array(least), 41.0)
    beyond = np.ldexp(np.polyval(EXP2[::-1], t % 1), 40 - t.astype(int)).astype(int)
    return frequencies(np.maximum(beyond - np.append(beyond[1:], 0), 1))


def gap_models(source, contexts, size):
    rates = source.take(contexts)
    tables = models(source, np.count_nonzero(rates == 255), size)
    fitted = [geometric(int(rate), size) for rate in rates[rates < 255]]
    out = np.zeros((contexts, size), int)
    out[rates == 255] = tables
    out[rates < 255] = np.reshape(fitted, (-1, size))
    return out


def symbols(source, ids, read):
    table = read(source, ids.max() + 1, source.byte() + 1)
    return rans(Source(source.take(source.varint()).astype("u1")), 1, ids.size, table, ids)[0]


def number(symbol, bits):
    """The value of a symbol, its raw bits taken from the front of a list."""
    if symbol < 16:
        return int(symbol)
    width = (int(symbol) - 16) // 2 + 3
    need(width <= len(bits), "raw bits run out")
    raw, bits[:width] = sum(bit << i for i, bit in enumerate(bits[:width])), []
    return ((2 | int(symbol) & 1) << width) + raw


def moved(old, z, width, dtype):
    """The word `z` steps of zigzag away."""
    need(0 < z < 1 << width, "a change of nothing")
    top, mask = 1 << (width - 1), (1 << width) - 1
    step = (z >> 1) ^ -(z & 1)
    if dtype not in EXPONENTS:
        return old + step & mask
    flip = old & top
    x = (old ^ flip ^ top) + step & mask
    return (x ^ top if x & top else ~x & mask) ^ flip


def decode(data, old, dtype):
    """The new words of a tensor, from its old ones (unsigned, flat)."""
    source, new = Source(data), old.copy()
    width, changes = 8 * old.dtype.itemsize, source.varint()
    if changes:
        first, order = source.take(source.byte()), source.byte()
        need(first.size < 32 and (np.diff(first, prepend=0) > 0).all(), "contexts")
        shift, mask, offset = EXPONENTS.get(dtype, (0, 0, 0))
        exponent = np.clip((old >> old.dtype.type(shift)).astype("u8").astype(int) & mask, 0, 2047)
        context = np.searchsorted(first, np.clip(exponent - offset, 0, 255), "right")
        shape = first.size + 1, -(-old.size // BLOCK)
        counts = source.golomb(math.prod(shape), order).reshape(shape)
        need(counts.sum() == changes <= old.size, "counts")
        used = counts.sum(axis=1)[counts.sum(axis=1) > 0]
        ids = np.repeat(np.arange(used.size), used)
        gap, size = symbols(source, ids, gap_models), symbols(source, ids, models)
        ends = np.cumsum(counts.ravel()).reshape(shape)
        for block in range(shape[1]):
            left = np.unpackbits(np.frombuffer(source.data, "u1"), bitorder="little").tolist()
            had = len(left)
            for k in range(shape[0]):
                places = np.flatnonzero(context[block * BLOCK : (block + 1) * BLOCK] == k)
                places, rank = places + block * BLOCK, -1
                for i in range(ends[k, block] - counts[k, block], ends[k, block]):
                    rank += 1 + number(gap[i], left)
                    need(rank < places.size, "a change beyond its block")
                    at = places[rank]
                    new[at] = moved(int(old[at]), 1 + number(size[i], left), width, dtype)
            used_bits = had - len(left)
            need(not any(left[: -used_bits % 8]), "padding")
            source.take((used_bits + 7) // 8)
    need(not len(source.data), "bytes after a delta")
    return new


def apply(data, state):
    """(name -> (dtype, array)) of the new model, from the old one; hashes are the caller's."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    meta, (at, end) = header["__metadata__"], header["waterfill//index"]["data_offsets"]
    need(meta["format"] == "waterfill-patch" and meta["version"] == "1", "not a patch")
    need(
        meta["crc"] == f"{zlib.crc32(data[start + at : start + end]):08x}", "checksum of the index"
    )
    index = json.loads(zlib.decompress(data[start + at : start + end]))
    new = {name: held for name, held in state.items() if name not in index["about"]["removed"]}
    made = coded = 0
    for entry in index["tensors"]:
        name, dtype, parts = entry["name"], entry["dtype"], {}
        held = state.get(name, ("", np.empty(0)))
        if entry["kind"] != "file" and (dtype, entry["shape"]) != (held[0], list(held[1].shape)):
            made += math.prod(entry["shape"]) * np.dtype(DTYPES[dtype]).itemsize
        coded += sum(length for length, _ in entry["parts"].values())
    need(made <= 2**30 + 4096 * coded, "a patch of so few bytes promises too much")
    for entry in index["tensors"]:
        name, dtype, parts = entry["name"], entry["dtype"], {}
        for part, (length, crc) in entry["parts"].items():
            parts[part], start = data[start : start + length], start + length
            need(zlib.crc32(parts[part]) == crc, f"checksum of {name}")
        if entry["kind"] == "file":
            continue
        if "same_as" in entry:
            new[name] = new[entry["same_as"]]
            alike = new[name][0] == dtype and list(new[name][1].shape) == entry["shape"]
            need(alike, "what a tensor repeats")
            continue
        (codec, version, options), count = entry["codec"], math.prod(entry["shape"])
        if codec in ("delta", "xor"):
            need(version == 1, "version of a change")
            old = state[name][1].reshape(-1).view(f"<u{np.dtype(DTYPES[dtype]).itemsize}")
        if codec == "delta":
            words = decode(parts["delta"], old, dtype)
        elif codec == "xor":
            codec, _, options = options["of"]
            unsigned = f"U{8 * old.dtype.itemsize}"
            words = old ^ CODECS[codec](parts, 1, count, unsigned, **options)
        else:
            words = CODECS[codec](parts, 1, count, dtype, **options)
        new[name] = dtype, words.view(DTYPES[dtype]).reshape(entry["shape"])
    return new

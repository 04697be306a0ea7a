"""Words of any dtype <-> bytes, bit for bit: what the codec `lossless` and `waterfill.lossless` write.

Five kinds of stream, whichever is fewest bytes by count: *stored*; *constant*; *split*, a coded field
(for floats: the exponent and up to three mantissa bits) and planes of the rest, each stored, coded or
constant; *sparse*, one word that is frequent taken out; *deflated*, for what repeats itself.
``docs/format/lossless.md`` is the specification.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from waterfill.coding import gamma, huffman, rans, words
from waterfill.coding.alphabets import RARE
from waterfill.coding.entropy import decode_bytes, encode_bytes
from waterfill.coding.models import fit, read_models
from waterfill.coding.words import Field, Layout
from waterfill.types import DTYPES, FormatError

__all__ = ["EXPONENT_BITS", "decode", "encode"]

Words = NDArray[Any]
Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]

STORED, CONSTANT, SPLIT, SPARSE, DEFLATED = 0, 1, 2, 3, 4
PLANE_STORED, PLANE_CONSTANT, PLANE_CODED = 0, 1, 2
ESCAPE, HUFFMAN = 1, 2  # of a field
CODERS = ("auto", "rans", "huffman")
EXPONENT_BITS: Mapping[str, int] = {
    "F64": 11, "F32": 8, "F16": 5, "BF16": 8, "F8_E4M3": 4, "F8_E5M2": 5,
}  # fmt: skip
MANTISSA_BITS = 3  # of a field at most: further ones are as good as random
# A field of up to 32 symbols decodes several times faster: worth so much of all bits.
TOLERANCE = 1.0025
SAMPLE = 1 << 22  # words whose fields are counted, of a larger tensor
PROBE = 1 << 16  # words looked at to decide what is worth a try
PLANE_GAIN = 0.005  # of a word's bits that coding a plane must save to be worth its time
SPARSE_GAIN = 0.03  # bits a word that taking one out must promise
RUN = 4096
SLICE = 1 << 14  # bytes deflated for a try


def words_of(x: NDArray[Any]) -> Words:
    """A contiguous array's bits as unsigned words, (n,)."""
    return np.ascontiguousarray(x).reshape(-1).view(f"<u{x.dtype.itemsize}")


def encode(source: Words, dtype: str, coder: str = "auto", threads: int | None = None) -> bytes:
    """Code words.

    Parameters
    ----------
    source : unsigned integers of the width of `dtype`, (n,), contiguous; not changed
    dtype : a key of `waterfill.types.DTYPES`: tells where exponents are
    coder : of fields: "rans", "huffman" (1 % of a bf16 file larger, and several times as fast to
        decode without AVX-512), or "auto", whichever takes fewer bytes
    threads : threads over blocks; the bytes do not depend on it

    Returns
    -------
    bytes
        Self-contained but for n and the dtype; at most one byte more than the words, none for none.
    """
    if not source.size:
        return b""
    raw = source.view(np.uint8)
    if _is_constant(source):
        coded = bytes([CONSTANT]) + raw[: source.itemsize].tobytes()
    else:
        coded = min(_candidates(source, dtype, coder, threads), key=len)
        coded = _encode_deflated(raw, len(coded)) or coded
    return coded if len(coded) <= raw.size else bytes([STORED]) + raw.tobytes()


def _candidates(source: Words, dtype: str, coder: str, threads: int | None) -> Iterator[bytes]:
    yield _encode_split(source, dtype, coder, threads)
    frequent = _frequent(source, dtype)
    if frequent is not None:
        yield _encode_sparse(source, frequent, dtype, coder, threads)


def decode(data: rans.Buffer, out: Words, dtype: str, threads: int | None = None) -> None:
    """Inverse of `encode`: fill `out`, unsigned words (n,), contiguous.

    Raises
    ------
    FormatError
        On bytes that lie; `out` then holds anything.
    """
    source = np.frombuffer(data, np.uint8)
    if not out.size:
        if source.size:
            raise FormatError("bytes where there are no words")
        return
    if not source.size:
        raise FormatError("empty where words were promised")
    kind, body = int(source[0]), source[1:]
    if kind in (STORED, CONSTANT):
        if body.size != (out.nbytes if kind == STORED else out.itemsize):
            raise FormatError(f"{body.size} bytes where others belong")
        # Copied as bytes: the words lie one byte off.
        if kind == STORED:
            out.view(np.uint8)[:] = body
        else:
            out[:] = np.frombuffer(body.tobytes(), out.dtype)
    elif kind == SPLIT:
        _decode_split(body, out, dtype, threads)
    elif kind == SPARSE:
        _decode_sparse(body, out, dtype, threads)
    elif kind == DEFLATED:
        _inflate(body, out)
    else:
        raise FormatError(f"words of an unknown kind {kind}")


def _encode_split(source: Words, dtype: str, coder: str, threads: int | None) -> bytes:
    exponent = EXPONENT_BITS.get(dtype, 0)
    bits, field, counts = _choose_field(source, exponent) if exponent else (0, None, None)
    layout = Layout(source.itemsize, bits)
    kinds, described = bytearray(), b""
    stored = []
    for which in range(layout.planes):
        coded, kind = _encode_plane(source, layout, which, threads)
        kinds.append(kind)
        described += coded
        stored += [which] if kind == PLANE_STORED else []
    head = bytes([SPLIT, layout.field_bits, *kinds]) + described
    if field is None or counts is None:
        return words.assemble(head, source, layout, stored, None, threads)
    described, stream = _encode_field(source, layout, field, counts, coder, threads)
    return words.assemble(head + described, source, layout, stored, stream, threads)


def _decode_split(source: Bytes, out: Words, dtype: str, threads: int | None) -> None:
    bits = int(source[0]) if source.size else 255
    exponent = EXPONENT_BITS.get(dtype, 0)
    if not (bits == 0 or exponent <= bits <= exponent + MANTISSA_BITS) or bool(bits) != bool(exponent):  # fmt: skip
        raise FormatError(f"a field of {bits} bits in {dtype}")
    if bits >= 8 * out.itemsize:
        raise FormatError(f"a field of {bits} bits leaves nothing of {dtype}")
    layout = Layout(out.itemsize, bits)
    planes, at = _read_planes(source, 1, layout, out.size, threads)
    field = None
    if bits:
        field, escaped, at = _read_field(source, at, layout, out.size)
    ready: list[Bytes | int] = []
    for which, one in enumerate(planes):
        if one is None:
            nbytes = layout.plane_nbytes(which, out.size)
            if nbytes > source.size - at:
                raise FormatError("a stored plane is cut short")
            one, at = source[at : at + nbytes], at + nbytes
        ready.append(one)
    packed = int(source[1]) == PLANE_STORED
    if field is not None:
        if field.freqs is None and (source.size < at + 2 or int(source[at + 1]) >= field.size):
            raise FormatError("a Huffman code for more symbols than the field has")
        words.join_coded(source[at:], field, escaped, ready, layout, out, packed, threads)
    elif at != source.size:
        raise FormatError("bytes left over after the planes")
    else:
        words.join(ready, layout, out, packed, threads)


def _choose_field(source: Words, exponent: int) -> tuple[int, Field, Ints]:
    """How many bits the field has, what its symbols mean, and about how often each occurs."""
    most = min(exponent + MANTISSA_BITS, 8 * source.itemsize - 1)
    step = max(1, source.size // SAMPLE)
    counts = words.count(source, most, step)
    options = []
    for bits in range(exponent, most + 1):
        table = counts.reshape(1 << bits, -1).sum(axis=1)
        for size in (rans.FAST_ALPHABET, rans.MAX_ALPHABET):
            some, low, escape = _window(table, size, step > 1)
            estimate = _entropy_bits(some) + (int(some[-1]) * bits if escape else 0)
            estimate += 8 * some.size / step + int(counts.sum()) * (8 * source.itemsize - bits)
            handicap = 1.0 if some.size <= rans.FAST_ALPHABET else TOLERANCE
            options.append((handicap * estimate, bits, size, low, escape, some))
    _, bits, _, low, escape, some = min(options, key=lambda option: option[:3])
    return bits, Field(low, some.size, escape, fit(some[None]).freqs[0]), some


def _encode_field(
    source: Words, layout: Layout, field: Field, counts: Ints, coder: str, threads: int | None
) -> tuple[bytes, words.Encoded]:
    """What the head says of a field, and its stream, by the coder named or that of fewer bytes."""
    padded = np.zeros(256, np.int64)
    padded[: counts.size] = counts

    def coded(chosen: Field) -> tuple[bytes, words.Encoded]:
        stream = words.Encoded(source, layout, chosen, padded, threads)
        return _pack_field(chosen, layout, stream.escaped), stream

    def nbytes(option: tuple[bytes, words.Encoded]) -> int:
        return len(option[0]) + option[1].nbytes

    several = np.count_nonzero(counts) > 1  # or there is no Huffman code
    if coder == "huffman" and several:
        return coded(replace(field, freqs=None))
    first = coded(field)
    if coder == "rans" or not several:
        return first
    estimate = huffman.size_bits(padded) / 8 * (source.size / counts.sum())
    return (
        min(first, coded(replace(field, freqs=None)), key=nbytes)
        if estimate < nbytes(first)
        else first
    )


def _window(table: Ints, size: int, sampled: bool) -> tuple[Ints, int, bool]:
    """Counts of the symbols of at most `size`: a run of neighbouring values, then the escape if any.

    Values in a sample are not all there are: then there is an escape in any case.
    """
    present = np.flatnonzero(table)
    if not sampled and present[-1] - present[0] < size:
        return table[present[0] : present[-1] + 1], int(present[0]), False
    common = np.flatnonzero(table > table.sum() // RARE)
    low, last = int(common[0]), int(common[-1])
    if last - low >= size - 1:
        sums = np.concatenate([[0], np.cumsum(table)])
        low = int(np.argmax(sums[size - 1 :] - sums[: -(size - 1)]))
        last = low + size - 2
    inside = table[low : last + 1]
    if sampled:
        inside = np.maximum(inside, 1)
    rest = int(table.sum()) - int(table[low : last + 1].sum())
    return np.append(inside, max(rest, 1)), low, True


def _entropy_bits(counts: Ints) -> float:
    some = counts[counts > 0]
    return float(-(some * np.log2(some / some.sum())).sum())


def _pack_field(field: Field, layout: Layout, escaped: NDArray[np.uint32]) -> bytes:
    kind = (ESCAPE if field.escape else 0) | (HUFFMAN if field.freqs is None else 0)
    head = bytes([kind, field.size - 1]) + gamma.varint(field.low)
    if field.freqs is not None:
        head += fit(field.freqs[None].astype(np.int64)).data
    if field.escape:
        packed = gamma.pack_fixed(
            escaped.astype(np.int64), np.full(escaped.size, layout.field_bits)
        )
        head += gamma.varint(escaped.size) + packed
    return head


def _read_field(
    source: Bytes, at: int, layout: Layout, count: int
) -> tuple[Field, NDArray[np.uint32], int]:
    """What a field's symbols mean, the values that escaped, and where that ends."""
    kind = int(source[at]) if at + 2 <= source.size else 255
    if kind & ~(ESCAPE | HUFFMAN):
        raise FormatError("a field of an unknown kind, or cut short")
    escape, size = kind & ESCAPE, int(source[at + 1]) + 1
    low, at = gamma.read_varint(source, at + 2)
    if low + size - escape > 1 << layout.field_bits:
        raise FormatError(f"values beyond a field of {layout.field_bits} bits")
    freqs, n = None, 0
    if not kind & HUFFMAN:
        table, at = read_models(source, at, 1, size)
        freqs = table[0]
    if escape:
        n, at = gamma.read_varint(source, at)
        if n > count or n * layout.field_bits > 8 * (source.size - at):
            raise FormatError("escaped values are cut short")
    values, at = gamma.unpack_fixed(source, at, np.full(n, layout.field_bits))
    return Field(low, size, bool(escape), freqs), values.astype(np.uint32), at


def _encode_plane(source: Words, layout: Layout, which: int, threads: int | None) -> tuple[bytes, int]:  # fmt: skip
    """What the head says of a plane, and its kind."""
    probe = words.plane(_probe(source), layout, which)
    counts = np.bincount(probe)
    width = layout.first_bits if which == 0 else 8
    if counts.max() == probe.size:
        whole = words.plane(source, layout, which, threads)
        if (whole == probe[0]).all():
            return bytes([probe[0]]), PLANE_CONSTANT
    gain = width - _entropy_bits(counts) / probe.size
    if gain < PLANE_GAIN * 8 * source.itemsize:
        return b"", PLANE_STORED
    coded = encode_bytes(words.plane(source, layout, which, threads), threads)
    coded = gamma.varint(len(coded)) + coded
    if len(coded) >= layout.plane_nbytes(which, source.size):
        return b"", PLANE_STORED
    return coded, PLANE_CODED


def _read_planes(
    source: Bytes, at: int, layout: Layout, count: int, threads: int | None
) -> tuple[list[Bytes | int | None], int]:
    """Planes as far as the head has them (None: stored), and where it ends."""
    kinds = source[at : at + layout.planes]
    if kinds.size < layout.planes:
        raise FormatError("kinds of planes are cut short")
    at += layout.planes
    planes: list[Bytes | int | None] = []
    for which, kind in enumerate(kinds):
        if kind == PLANE_STORED:
            planes.append(None)
        elif kind == PLANE_CONSTANT:
            if at >= source.size or source[at] >> (layout.first_bits if which == 0 else 8):
                raise FormatError("a constant plane is cut short, or beyond its bits")
            planes.append(int(source[at]))
            at += 1
        elif kind == PLANE_CODED:
            length, at = gamma.read_varint(source, at)
            if length > source.size - at:
                raise FormatError("a coded plane is cut short")
            one = decode_bytes(source[at : at + length], count, threads)
            if which == 0 and layout.first_bits < 8 and (one >> layout.first_bits).any():
                raise FormatError("a plane has values beyond its bits")
            planes.append(one)
            at += length
        else:
            raise FormatError(f"a plane of an unknown kind {kind}")
    return planes, at


def _probe(source: Words) -> Words:
    """Runs of words spread over all of them, at most about `PROBE`."""
    if source.size <= PROBE:
        return source
    run = 1024
    starts = np.linspace(0, source.size - run, PROBE // run).astype(np.int64)
    return np.concatenate([source[s : s + run] for s in starts])


def _is_constant(source: Words) -> bool:
    first = source[0]
    return bool((source[:RUN] == first).all() and (source == first).all())


def _frequent(source: Words, dtype: str) -> Any:
    """The word that pays to be taken out: its rest need not be kept where it was; or None."""
    exponent = EXPONENT_BITS.get(dtype, 0)
    rest_bits = 8 * source.itemsize - exponent if exponent else 8 * (source.itemsize - 1)
    values, counts = np.unique(_probe(source), return_counts=True)
    share = counts.max() / counts.sum()
    return values[counts.argmax()] if share * rest_bits > SPARSE_GAIN and counts.max() > 2 else None


def _encode_sparse(
    source: Words, frequent: Any, dtype: str, coder: str, threads: int | None
) -> bytes:
    away = source != frequent
    mask = encode_bytes(np.packbits(away), threads)
    rest = source[away]
    inner = _encode_split(rest, dtype, coder, threads)
    if len(inner) > rest.nbytes:
        inner = bytes([STORED]) + rest.tobytes()
    return b"".join([bytes([SPARSE]), frequent.tobytes(), gamma.varint(len(mask)), mask, inner])


def _decode_sparse(source: Bytes, out: Words, dtype: str, threads: int | None) -> None:
    width = out.itemsize
    length, at = gamma.read_varint(source, width)
    if length > source.size - at:
        raise FormatError("a mask is cut short")
    mask = decode_bytes(source[at : at + length], (out.size + 7) // 8, threads)
    bits = np.unpackbits(mask)
    if bits[out.size :].any():
        raise FormatError("the padding of a mask is not zero")
    away = bits[: out.size].view(bool)
    n = int(np.count_nonzero(away))
    body = source[at + length :]
    if body.size and body[0] == SPARSE:
        raise FormatError("a sparse stream within a sparse stream")
    rest = np.empty(n, out.dtype)
    decode(body, rest, dtype, threads)
    out[:] = np.frombuffer(source[:width].tobytes(), out.dtype)
    out[away] = rest


def _encode_deflated(raw: Bytes, nbytes: int) -> bytes | None:
    """Deflated, where a try says that it will be fewer bytes, and it is."""
    starts = (0, max(0, raw.size // 2 - SLICE // 2), max(0, raw.size - SLICE))
    slices = [raw[s : s + SLICE].tobytes() for s in (starts if raw.size > 3 * SLICE else (0,))]
    if raw.size <= 3 * SLICE:
        slices = [raw.tobytes()]
    tried = sum(len(zlib.compress(s, 6)) for s in slices)
    if tried / sum(map(len, slices)) >= nbytes / raw.size:
        return None
    coded = bytes([DEFLATED]) + zlib.compress(raw.data, 9)
    return coded if len(coded) < nbytes else None


def _inflate(source: Bytes, out: Words) -> None:
    inflater = zlib.decompressobj()
    try:
        data = inflater.decompress(source.tobytes(), out.nbytes + 1)
    except zlib.error as error:
        raise FormatError(f"deflated words cannot be read ({error})") from error
    if len(data) != out.nbytes or not inflater.eof or inflater.unused_data:
        raise FormatError("deflated words of another length")
    out.view(np.uint8)[:] = np.frombuffer(data, np.uint8)


def check_dtype(dtype: str) -> None:
    """FormatError for a dtype that no words have."""
    if dtype not in DTYPES:
        raise FormatError(f"unknown dtype {dtype!r}")

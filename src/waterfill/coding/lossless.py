"""Words of any dtype <-> bytes, bit for bit: what the codec `lossless` and `waterfill.lossless` write.

Five kinds of stream, whichever is fewest bytes by count: *stored*; *constant*; *split*, a coded field
(for floats: the exponent and up to three mantissa bits) and planes of the rest, each stored, coded or
constant; *sparse*, one word that is frequent taken out; *deflated*, for what repeats itself.
``docs/format/lossless.md`` is the specification.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from waterfill.coding import gamma, rans, split
from waterfill.coding.entropy import decode_bytes, encode_bytes
from waterfill.coding.split import CODERS, EXPONENT_BITS
from waterfill.types import FormatError

__all__ = ["CODERS", "decode", "encode", "store", "words_of"]

Words = NDArray[Any]
Bytes = NDArray[np.uint8]

STORED, CONSTANT, SPLIT, SPARSE, DEFLATED = 0, 1, 2, 3, 4
SPARSE_GAIN = 0.03  # bits a word that taking one out must promise
RUN = 4096
SLICE = 1 << 14  # bytes deflated for a try


def words_of(x: NDArray[Any]) -> Words:
    """A contiguous array's bits as unsigned words, (n,)."""
    return np.ascontiguousarray(x).reshape(-1).view(f"<u{x.dtype.itemsize}")


def encode(
    source: Words, dtype: str, coder: str = "auto", threads: int | None = None, tries: bool = True
) -> bytes:
    """Code words.

    Parameters
    ----------
    source : unsigned integers of the width of `dtype`, (n,), contiguous; not changed
    dtype : a key of `waterfill.types.DTYPES`: tells where exponents are
    coder : of fields: "rans", "huffman" (0.4 % larger for bf16, and several times as fast to
        decode without AVX-512), or "auto", whichever takes fewer bytes
    threads : threads over blocks; the bytes do not depend on it
    tries : whether to look for a frequent word, and for repeats, which few tensors have and which takes
        as long as all else

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
    elif not tries:
        coded = split.encode(bytes([SPLIT]), source, dtype, coder, threads)
    else:
        coded = min(_candidates(source, dtype, coder, threads), key=len)
        coded = _encode_deflated(raw, len(coded)) or coded
    return coded if len(coded) <= raw.size else bytes([STORED]) + raw.tobytes()


def store(source: Words) -> bytes:
    """Words as they are, as of `encode`: for so few that coding them saves less than it takes."""
    return bytes([STORED]) + source.tobytes() if source.size else b""


def _candidates(source: Words, dtype: str, coder: str, threads: int | None) -> Iterator[bytes]:
    yield split.encode(bytes([SPLIT]), source, dtype, coder, threads)
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
        split.decode(body, out, dtype, threads)
    elif kind == SPARSE:
        _decode_sparse(body, out, dtype, threads)
    elif kind == DEFLATED:
        _inflate(body, out)
    else:
        raise FormatError(f"words of an unknown kind {kind}")


def _is_constant(source: Words) -> bool:
    first = source[0]
    return bool((source[:RUN] == first).all() and (source == first).all())


def _frequent(source: Words, dtype: str) -> Any:
    """The word that pays to be taken out: its rest need not be kept where it was; or None."""
    exponent = EXPONENT_BITS.get(dtype, 0)
    rest_bits = 8 * source.itemsize - exponent if exponent else 8 * (source.itemsize - 1)
    values, counts = np.unique(split.probe(source), return_counts=True)
    share = counts.max() / counts.sum()
    return values[counts.argmax()] if share * rest_bits > SPARSE_GAIN and counts.max() > 2 else None


def _encode_sparse(
    source: Words, frequent: Any, dtype: str, coder: str, threads: int | None
) -> bytes:
    away = source != frequent
    mask = encode_bytes(np.packbits(away), threads)
    rest = source[away]
    inner = split.encode(bytes([SPLIT]), rest, dtype, coder, threads)
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

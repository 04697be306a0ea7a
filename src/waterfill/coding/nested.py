"""A codec inside another: its parts as two byte strings of the codec around it, its notes as JSON.

The codec inside is given float32, so that nothing is rounded to the stored dtype twice.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, TypeVar

from waterfill.coding.sections import join, split
from waterfill.registry import Codec, Inner, make_codec
from waterfill.types import Floats, FormatError, TensorInfo, Weighting

__all__ = ["Coded", "between", "decode_inner", "encode_inner"]

Coded = tuple[bytes, bytes, dict[str, Any]]


class Wrapper(Protocol):
    """A codec with one inside."""

    @property
    def inner(self) -> Inner: ...


W = TypeVar("W", bound=Wrapper)


def between(one: W, other: W, t: float) -> W | None:
    """`Codec.between` where two codecs differ in nothing but what the codec inside can go between."""
    own, others = one.inner.codec, other.inner.codec
    if own.id != others.id or _around(other, one.inner) != one:
        return None
    middle = own.between(others, t)
    return None if middle is None else _around(one, Inner(middle))


def _around(wrapper: Any, inner: Inner) -> Any:
    return dataclasses.replace(wrapper, inner=inner)


def encode_inner(
    inner: Inner, matrix: Floats, info: TensorInfo, weighting: Weighting
) -> tuple[Coded, Floats]:
    """Code a matrix with the codec inside.

    Parameters
    ----------
    inner : Inner
    matrix : float32 (m, n)
    info : TensorInfo
        Of the tensor around; its shape may be another.
    weighting : Weighting
        Of the matrix as it is here.

    Returns
    -------
    (bytes, bytes, dict)
        Parts that grow with the rows, parts that do not (`Codec.shared`), and what `decode_inner`
        wants to know: ``version``, and ``extra`` and ``absent`` where there is something to say.
    float32 (m, n)
        What it decodes to.
    """
    codec, plain = inner.codec, _plain(info, matrix.shape)
    parts, extra = codec.encode(matrix.astype("<f4", copy=False), plain, weighting)
    absent = [name for name in codec.names if name not in parts]
    notes: dict[str, Any] = {"version": codec.version}
    if extra:
        notes["extra"] = dict(extra)
    if absent:
        notes["absent"] = absent
    each, once = _names(codec, absent)
    coded = join([parts[k] for k in each] or [b""]), join([parts[k] for k in once] or [b""])
    # Without rows a shape does not say how many columns there are.
    decoded = plain.matrix(codec.decode(parts, extra, plain)).reshape(matrix.shape)
    return (*coded, notes), decoded


def decode_inner(
    inner: Inner, coded: Coded, info: TensorInfo, shape: tuple[int, int] | None = None
) -> Floats:
    """Inverse of `encode_inner`: float32 (m, n), of `info.matrix_shape` where no shape is given.

    Raises
    ------
    FormatError
        On bytes or notes that lie, and on a version of the codec inside that is not known.
    """
    each, once, notes = coded
    version, extra = notes.get("version"), notes.get("extra", {})
    absent = notes.get("absent", [])
    if type(version) is not int or type(extra) is not dict or type(absent) is not list:
        raise FormatError(f"{info.name}: what is said of the codec inside is not to be understood")
    codec = make_codec(dataclasses.replace(inner.codec.spec, version=version))
    if any(type(name) is not str or name not in codec.parts for name in absent):
        raise FormatError(f"{info.name}: {codec.id} has no such parts as {absent}")
    parts: dict[str, bytes] = {}
    for names, data in zip(_names(codec, absent), (each, once), strict=True):
        if not names and data:
            raise FormatError(f"{info.name}: bytes that no part of {codec.id} claims")
        parts |= zip(names, split(data, len(names)) if names else [], strict=True)
    shape = shape or info.matrix_shape
    plain = _plain(info, shape)
    return plain.matrix(codec.decode(parts, extra, plain)).reshape(shape)


def _plain(info: TensorInfo, shape: tuple[int, ...]) -> TensorInfo:
    return TensorInfo(info.name, shape, "F32", info.kind)


def _names(codec: Codec, absent: list[str]) -> tuple[list[str], list[str]]:
    """Parts that grow with the rows, and those that do not."""
    there = [name for name in codec.names if name not in absent]
    return [k for k in there if k not in codec.shared], [k for k in there if k in codec.shared]

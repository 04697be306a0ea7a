"""How a size is named: bytes, average bits per weight, or a share of the original."""

from __future__ import annotations

import math
import re

from waterfill.types import BudgetError

_UNITS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


def parse_size(text: str) -> int:
    """``250MB``, ``1.5GiB`` or plain bytes -> bytes. KB is 1000 bytes, KiB is 1024."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([KMGT]?i?B?)\s*", text, re.IGNORECASE)
    unit = match[2].upper() if match else ""
    if unit and not unit.endswith("B"):
        unit += "B"
    if match is None or unit not in _UNITS:
        raise BudgetError(f"{text!r} is not a size; write for example 250MB, 1.5GiB or 1234567")
    return int(float(match[1]) * _UNITS[unit])


def parse_ratio(text: str) -> float:
    """``20%`` or ``0.2`` -> 0.2."""
    try:
        value = float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1.5:
        raise BudgetError(f"{text!r} is not a share; write for example 20% or 0.2")
    return value


def parse_budget(text: str) -> dict[str, str | float]:
    """``3`` (bits per weight), ``250MB`` or ``20%`` -> the argument of `budget_nbytes` that it is.

    A bare number above 128 is bytes: no weight has so many bits.
    """
    text = text.strip()
    if text.endswith("%"):
        parse_ratio(text)
        return {"ratio": text}
    try:
        bits = float(text)
    except ValueError:
        bits = math.inf
    if 0 < bits <= 128:
        return {"bits": bits}
    parse_size(text)
    return {"size": text}


def budget_nbytes(
    *,
    params: int,
    original_nbytes: int,
    size: str | int | None = None,
    bits: float | None = None,
    ratio: str | float | None = None,
) -> int:
    """Bytes the weights file may have; exactly one of size, bits and ratio must be given.

    Parameters
    ----------
    params : parameters in the checkpoint (a repeated tensor counted once)
    original_nbytes : bytes of the original checkpoint's tensors
    bits : average bits per weight over all parameters, every byte of the file counted
    ratio : share of the original's bytes
    """
    if sum(x is not None for x in (size, bits, ratio)) != 1:
        raise BudgetError("name one size: --size 250MB, --bits 3.2 or --ratio 20%")
    if size is not None:
        budget = parse_size(size) if isinstance(size, str) else size
    elif bits is not None:
        if not 0 < bits <= 128:
            raise BudgetError(f"{bits} is not a number of bits per weight; try 3.2")
        budget = int(params * bits / 8)
    else:
        assert ratio is not None
        budget = int(original_nbytes * (parse_ratio(ratio) if isinstance(ratio, str) else ratio))
    if budget <= 0:
        raise BudgetError("the size must be positive")
    return budget

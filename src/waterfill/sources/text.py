"""What stands beside the weights and is read as text: texts themselves, and the tokenizer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from waterfill.types import WaterfillError

__all__ = ["decode_text", "load_tokenizer"]

TOKENIZER_FILES = ("*token*", "*vocab*", "*.model", "*.spm")
MOST_CONTROLS = 0.02  # of all characters
MOST_NULS = 0.25  # they part documents, which may be short; of UTF-16 they are half
_CONTROLS = re.compile(r"[\x01-\x08\x0e-\x1f\x7f]")


def decode_text(data: bytes, path: Path, most: int | None = None) -> str:
    """Bytes of a file as text; WaterfillError if they are none.

    Parameters
    ----------
    data : UTF-8
    path : where they are from, for the message
    most : bytes to look at; a character cut in two there is dropped
    """
    part = data if most is None else data[:most]
    try:
        text = part.decode("utf-8")
    except UnicodeDecodeError as error:
        if len(part) == len(data) or error.reason != "unexpected end of data":
            raise WaterfillError(
                f"{path} is not UTF-8 text (byte {error.start}): name a text file, or convert it"
            ) from error
        text = part[: error.start].decode("utf-8")
    if not text.replace("\0", "").strip():
        return text  # nothing to read is not something else: the caller says so
    controls, nuls = len(_CONTROLS.findall(text)), text.count("\0")
    if controls > MOST_CONTROLS * len(text) or nuls > MOST_NULS * len(text):
        raise WaterfillError(
            f"{path} is not text: {controls + nuls} of its {len(text)} characters are control "
            "characters"
        )
    return text


def load_tokenizer(folder: Path | str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder; WaterfillError if there is none that opens."""
    import transformers

    folder = Path(folder)
    if not any(found for pattern in TOKENIZER_FILES for found in folder.glob(pattern)):
        raise WaterfillError(f"{folder} has no tokenizer, and this needs text")
    try:
        return transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # whatever a tokenizer file can provoke
        raise WaterfillError(f"cannot open the tokenizer of {folder}: {error}") from error

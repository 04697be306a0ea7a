"""Every token once, with the longest context, and errors that say what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from waterfill.evaluate import plain_windows, strided_windows, text_windows
from waterfill.types import WaterfillError


class Letters:
    """A tokenizer of one token a character; 1 is BOS and 2 is EOS."""

    bos_token_id = 1
    eos_token_id = 2

    def __init__(self, adds_bos: bool = True) -> None:
        self.adds_bos = adds_bos

    def encode(self, text: str, add_special_tokens: bool = True, **_: Any) -> list[int]:
        front = [1] if add_special_tokens and self.adds_bos else []
        return front + [10 + ord(c) for c in text]


@pytest.mark.parametrize("bos", [None, 1])
@pytest.mark.parametrize("count", [2, 3, 7, 8, 9, 31, 64])
@pytest.mark.parametrize(("window", "stride"), [(8, 4), (8, 7), (8, 1), (2, 1), (100, None)])
def test_each_token_is_scored_once_in_order(
    count: int, window: int, stride: int | None, bos: int | None
) -> None:
    ids = np.arange(100, 100 + count)
    if bos is not None and stride == window - 1 and window == 2:
        stride = 1
    rows = strided_windows(ids, window, stride, bos)
    scored = rows.tokens[rows.scored]
    assert scored.tolist() == ids[0 if bos else 1 :].tolist()
    assert rows.tokens.shape[1] <= window
    assert not rows.scored[:, 0].any()
    assert rows.protocol["tokens_scored"] == len(scored)
    if bos is not None:
        assert (rows.tokens[:, 0] == bos).all()


def test_later_windows_give_the_longest_context() -> None:
    rows = strided_windows(np.arange(40), 16, 4)
    assert rows.tokens.shape == (7, 16)
    for tokens, scored in zip(rows.tokens[1:], rows.scored[1:], strict=True):
        assert np.flatnonzero(scored).tolist() == [12, 13, 14, 15]
        assert (np.diff(tokens) == 1).all()


def test_plain_windows_count_every_position_once() -> None:
    rows = plain_windows(np.arange(100, 123), 10, [1], [2])
    assert sorted(rows.tokens[rows.scored].tolist()) == list(range(100, 123))
    assert (rows.tokens[:, 0] == 1).all() and (rows.tokens[:, -1] == 2).all()


def test_nul_separates_documents_and_is_not_scored(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc\0defg")
    rows = text_windows([tmp_path / "a.txt"], Letters(), window=16)
    assert rows.tokens[0].tolist() == [
        1,
        *(10 + ord(c) for c in "abc"),
        1,
        *(10 + ord(c) for c in "defg"),
    ]
    assert rows.scored[0].tolist() == [False, True, True, True, False, True, True, True, True]
    assert rows.protocol["documents"] == 2
    assert rows.protocol["texts"][0]["nbytes"] == 8
    assert len(rows.protocol["texts"][0]["sha256"]) == 64
    without = text_windows([tmp_path / "a.txt"], Letters(adds_bos=False), window=16)
    assert without.protocol["bos"] is None and without.protocol["document_break"] == 2


@pytest.mark.parametrize(
    ("content", "word"),
    [(b"", "no text"), (b"\0 \0", "no text"), (b"a", "two"), (b"ab\xff", "UTF-8")],
)
def test_text_that_cannot_be_used_is_refused(tmp_path: Path, content: bytes, word: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(WaterfillError, match=word):
        text_windows([tmp_path / "a.txt"], Letters())


def test_other_errors_say_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    with pytest.raises(WaterfillError, match="tokenizer"):
        text_windows([tmp_path / "a.txt"], None)
    with pytest.raises(WaterfillError, match="positions"):
        text_windows([tmp_path / "a.txt"], Letters(), window=100, max_positions=64)
    with pytest.raises(WaterfillError, match="stride"):
        strided_windows(np.arange(10), 4, 9)


def test_a_part_of_the_windows_says_so() -> None:
    rows = strided_windows(np.arange(40), 16, 4)[:2]
    assert len(rows) == 2
    assert rows.protocol["windows"] == 2
    assert rows.protocol["tokens_scored"] == 19

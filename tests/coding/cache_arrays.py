"""A small stored cache made of arrays alone, the same at every call."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from waterfill.coding import lossless
from waterfill.coding.cachegen import analysis_of, components, fit_table, pack_table
from waterfill.coding.cachegen_file import Writer
from waterfill.coding.cachegen_header import Header, Layer, Level, Rotation
from waterfill.coding.cachegen_rows import one_run, read_rows, turn_of
from waterfill.coding.cachegen_symbols import encode_chunk, fit_columns, pack_columns
from waterfill.coding.components import basis_of
from waterfill.coding.sections import join
from waterfill.types import Array, Floats

WIDTH, HEADS, TOKENS, FIRST, CHUNK = 4, 2, 11, 2, 8
ROTATION = Rotation((0, 1), (2, 3), (1.0, 0.0625))
LEVELS = (Level("fine", 0.0625), Level("coarse", 0.5), Level("exact", None))


def header(levels: tuple[Level, ...] = LEVELS) -> Header:
    """Two layers; the second has a window that begins at token 5."""
    shape = HEADS, WIDTH, WIDTH
    layers = Layer(0, *shape, 0, FIRST, 0), Layer(1, *shape, 5, 0, None)
    return Header(
        "00" * 32, None, "F32", 1, TOKENS, CHUNK, levels, layers, (ROTATION,), ((0, (3,)),)
    )


def states(seed: int = 0) -> tuple[Floats, Floats]:
    """Keys and values of all tokens, float32 (1, heads, tokens, width)."""
    rng = np.random.default_rng(seed)
    keys, values = rng.integers(-16, 17, (2, 1, HEADS, TOKENS, WIDTH)) / 8
    return keys.astype(np.float32), values.astype(np.float32)


def exact(pair: tuple[Array, Array]) -> bytes:
    return join([lossless.encode(lossless.words_of(x), "F32", "rans", 1) for x in pair])


def write(path: Path, of: Header) -> None:
    """The file of these states; its basis is the axes themselves, so that every machine writes it alike."""
    eye = np.broadcast_to(np.eye(WIDTH, dtype=np.float32), (HEADS, WIDTH, WIDTH)).copy()
    table = fit_table(np.zeros((HEADS, WIDTH), np.float32), basis_of(eye, eye), 0.0625)
    analysis = analysis_of(table, eye)
    offset = np.zeros(HEADS * WIDTH, np.float32)
    with Writer(path, of) as writer:
        writer.add(np.arange(TOKENS, dtype="<u4").tobytes())
        for number, layer in enumerate(of.layers):
            keys, values = states(number)
            writer.add(join([pack_table(table)] * 2))
            first = slice(layer.start, layer.start + layer.first)
            writer.add(exact((keys[:, :, first], values[:, :, first])) if layer.first else b"")
            turn = turn_of(
                (0, 1), (2, 3), np.array(ROTATION.frequencies), np.arange(3, 3 + TOKENS)[None]
            )
            plain = (
                read_rows(one_run(keys), "F32", turn.back)
                if layer.rotation == 0
                else read_rows(one_run(keys), "F32")
            )
            z = components(plain, analysis), components(read_rows(one_run(values), "F32"), analysis)
            columns = {}
            for level in of.levels:
                if level.step is not None:
                    columns[level.name] = fit_columns(z, level.step)
                writer.add(pack_columns(columns[level.name]) if level.step else b"")
            for chunk in of.chunks(layer):
                some = slice(*of.span(layer, chunk))
                for level in of.levels:
                    if level.step is None:
                        writer.add(exact((keys[:, :, some], values[:, :, some])))
                    else:
                        part = [np.ascontiguousarray(x[:, :, some]) for x in z]
                        writer.add(
                            encode_chunk(part, (offset, offset), level.step, columns[level.name])
                        )


def write_example(path: Path) -> None:
    """The worked example of the format's page: one layer, one head, three tokens."""
    of = Header(
        "ab" * 32, None, "F32", 1, 3, 32, (Level("coarse", 0.5),),
        (Layer(0, 1, 2, 2, 0, 1, None),), (), ((0, (0,)),),
    )  # fmt: skip
    keys = np.array([[[[1, 2], [3, -1.5], [0.5, 20]]]], np.float32)
    values = np.array([[[[1, 1], [0.5, 0], [-1, 0.5]]]], np.float32)
    eye = np.eye(2, dtype=np.float32)[None]
    basis = basis_of(np.diag([4, 1]).astype(np.float32)[None], eye)
    table = fit_table(np.zeros((1, 2), np.float32), basis, 0.5)
    analysis, offset = analysis_of(table, eye), np.zeros(2, np.float32)
    z = [components(read_rows(one_run(x[:, :, 1:]), "F32"), analysis) for x in (keys, values)]
    columns = fit_columns([x[:, :, :1] for x in z], 0.5)
    with Writer(path, of) as writer:
        writer.add(np.array([7, 8, 9], "<u4").tobytes())
        writer.add(join([pack_table(table)] * 2))
        writer.add(exact((keys[:, :, :1], values[:, :, :1])))
        writer.add(pack_columns(columns))
        writer.add(encode_chunk(z, (offset, offset), 0.5, columns))

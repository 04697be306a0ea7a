"""What calibration learns of a model's keys and values, and the small file that holds it.

Harm is in nats: an error e of a cached key costs ``e' W e`` nats of the next-token distributions of all
tokens that read it, W from the Fisher information at the attention's output (`calibrating`).
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from waterfill.coding.components import Basis, basis_of
from waterfill.types import FormatError

__all__ = [
    "FILE_NAME",
    "FORMAT",
    "CacheStatistics",
    "LayerStatistics",
    "load_statistics",
    "save_statistics",
]

FILE_NAME = "cache.safetensors"
FORMAT, VERSION = "waterfill-cache-statistics", 2

F32 = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class StreamStatistics:
    """Of keys or of values, each head's apart.

    Attributes
    ----------
    mean : float32 (heads, width)
    covariance : float32 (heads, width, width)
    harm : float32 (heads, width, width), nats per squared error: the matrix W
    samples : float32 (heads, tokens, width), whole blocks of consecutive tokens
    growth : float32 (1,), what large errors cost over what `harm` says of them
    """

    mean: F32
    covariance: F32
    harm: F32
    samples: F32
    growth: F32 = dataclasses.field(default_factory=lambda: np.ones(1, np.float32))

    @functools.cached_property
    def basis(self) -> Basis:
        """The basis of least harm."""
        return basis_of(self.covariance, self.harm)

    @property
    def of_large_errors(self) -> StreamStatistics:
        """The same with the harm of large errors."""
        return dataclasses.replace(
            self, harm=self.harm * self.growth, growth=np.ones_like(self.growth)
        )


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Of a layer; keys as they are before their rotation, where it is known."""

    keys: StreamStatistics
    values: StreamStatistics


@dataclass(frozen=True, eq=False)
class CacheStatistics:
    """Of a model.

    Attributes
    ----------
    layers : index of the layer -> its statistics
    protocol : text, tokens, and what else says how they were made, JSON-able
    """

    layers: Mapping[int, LayerStatistics]
    protocol: Mapping[str, Any]

    @property
    def of_large_errors(self) -> CacheStatistics:
        """The same with the harm of large errors."""
        layers = {
            index: LayerStatistics(one.keys.of_large_errors, one.values.of_large_errors)
            for index, one in self.layers.items()
        }
        return CacheStatistics(layers, self.protocol)


def save_statistics(statistics: CacheStatistics, path: Path) -> None:
    """Write the file, under a temporary name first."""
    from safetensors.numpy import save

    arrays = {}
    for index, layer in statistics.layers.items():
        for stream in ("keys", "values"):
            one = getattr(layer, stream)
            for field in dataclasses.fields(one):
                array = getattr(one, field.name)
                small = array.astype(np.float16) if field.name == "samples" else array
                arrays[f"{index}.{stream}.{field.name}"] = np.ascontiguousarray(small)
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "protocol": json.dumps(dict(statistics.protocol)),
    }
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(save(arrays, metadata))
    temporary.replace(path)


def load_statistics(path: Path) -> CacheStatistics:
    """Inverse of `save_statistics`.

    Raises
    ------
    FormatError
        If the file is none of the kind, or its arrays do not fit each other.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "np") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise FormatError(
            f"{path} is damaged, or holds no cache statistics: make them with waterfill calibrate-cache"
        ) from error
    except OSError as error:
        raise FormatError(f"{path} holds no cache statistics: {error}") from error
    if metadata.get("format") != FORMAT:
        raise FormatError(f"{path} holds no cache statistics")
    if metadata.get("version") != str(VERSION):
        raise FormatError(f"{path}: cache statistics of version {metadata.get('version')}")
    try:
        protocol = json.loads(metadata["protocol"])
        indices = sorted({int(name.partition(".")[0]) for name in arrays})
        layers = {
            i: LayerStatistics(*(_stream(arrays, f"{i}.{s}") for s in ("keys", "values")))
            for i in indices
        }
    except (KeyError, ValueError) as error:
        raise FormatError(f"{path}: cache statistics are incomplete: {error}") from error
    return CacheStatistics(layers, protocol)


def _stream(arrays: Mapping[str, Any], prefix: str) -> StreamStatistics:
    made = StreamStatistics(
        *(
            np.asarray(arrays[f"{prefix}.{field.name}"], np.float32)
            for field in dataclasses.fields(StreamStatistics)
        )
    )
    heads, width = made.mean.shape
    square = (heads, width, width)
    samples = made.samples.shape
    fits = made.covariance.shape == made.harm.shape == square and len(samples) == 3
    fits = fits and made.growth.shape == (1,)
    if not fits or (samples[0], samples[2]) != (heads, width):
        raise ValueError(f"{prefix}: shapes do not fit each other")
    if not all(np.isfinite(getattr(made, f.name)).all() for f in dataclasses.fields(made)):
        raise ValueError(f"{prefix}: numbers that are not finite")
    return made

"""One tensor, encoded and measured."""

from __future__ import annotations

import numpy as np
import pytest

from waterfill.pipeline.encoding import encode_tensor
from waterfill.registry import parse_spec
from waterfill.types import Point, TensorInfo, WaterfillError, from_float32


@pytest.mark.parametrize("text", ["trellis:step=0.5", "pyramid", "codebook"])
def test_weights_that_rounding_would_push_beyond_their_dtype_are_refused(text: str) -> None:
    info = TensorInfo("w", (16, 64), "F16", "linear")
    random = np.random.default_rng(0)
    point = Point(0, 0, parse_spec(text).spec)
    values = random.choice([-1, 1], info.shape) * random.uniform(60000, 65504, info.shape)
    with pytest.raises(WaterfillError, match=r"w: .*--keep"):
        encode_tensor(from_float32(values.astype(np.float32), "F16"), info, None, point)
    bits = from_float32((values / 2).astype(np.float32), "F16")
    encoded, nats = encode_tensor(bits, info, None, point)
    assert 0 < nats < np.square(values / 2).sum() / 2 and encoded.info == info

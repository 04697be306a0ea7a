"""Measured harm: perplexity, KL and agreement of a compressed model, and layer by layer.

Nothing here imports torch or transformers before it is asked to measure something.
"""

from waterfill.evaluate.activations import Activations
from waterfill.evaluate.language import compare, is_masked, max_positions, perplexity
from waterfill.evaluate.layers import layer_errors, layer_kl
from waterfill.evaluate.windows import (
    Windows,
    plain_windows,
    strided_windows,
    text_windows,
)

__all__ = [
    "Activations",
    "Windows",
    "compare",
    "is_masked",
    "layer_errors",
    "layer_kl",
    "max_positions",
    "perplexity",
    "plain_windows",
    "strided_windows",
    "text_windows",
]

"""``python -m bench.gallery [NAME ...] [--json FILE] [--quick]``: all claims, or some modules' only."""

from __future__ import annotations

import bench.gallery
from bench.harness import main_of

PROTOCOL = (
    "what papers claim, measured with our code on real layers: ratios of predicted nats (1/2 sum r e S e^T, S and r "
    "of the model's own calibration) at equal grid or at equal bytes of payload, summed over six linear layers of "
    "english-7m unless said otherwise; a ratio of at most 1 reproduces the claim. Bars only where one was set"
)

if __name__ == "__main__":
    main_of(bench.gallery, PROTOCOL)

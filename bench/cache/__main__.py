"""``python -m bench.cache [NAME ...] [--json FILE] [--quick]``: all claims, or some modules' only."""

from __future__ import annotations

import bench.cache
from bench.harness import main_of

PROTOCOL = (
    "KL of the next token against the same model with an exact cache, same text, teacher-forced: a prompt of 64 "
    "tokens, then 16 at a time, so that what is older comes from the cache; held-out windows of the model's full "
    "context; bytes are all that the cache holds at a window's end (codes, scales, tables, exact tokens, positions)"
)

if __name__ == "__main__":
    main_of(bench.cache, PROTOCOL)

"""The stairs: each verb of the command line as one function; the CLI and notebooks call these."""

from waterfill.pipeline.compare import compare, record_of, show
from waterfill.pipeline.compress import compress
from waterfill.pipeline.planning import plan, plan_json, price_statistics
from waterfill.pipeline.preparing import calibrate_to

__all__ = [
    "calibrate_to",
    "compare",
    "compress",
    "plan",
    "plan_json",
    "price_statistics",
    "record_of",
    "show",
]

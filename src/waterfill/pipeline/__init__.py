"""The stairs: each verb of the command line as one function; the CLI and notebooks call these."""

from waterfill.pipeline.caching import calibrate_cache_to, measure_caches
from waterfill.pipeline.compare import compare, record_of, show
from waterfill.pipeline.compress import compress
from waterfill.pipeline.diffing import diff, diff_to
from waterfill.pipeline.methods import compare_methods
from waterfill.pipeline.patching import patch, show_patch
from waterfill.pipeline.planning import plan, price_statistics
from waterfill.pipeline.plans import plan_json, read_plan
from waterfill.pipeline.preparing import calibrate_to, warnings_of
from waterfill.pipeline.survey import survey
from waterfill.pipeline.truncating import truncate

__all__ = [
    "calibrate_cache_to",
    "calibrate_to",
    "compare",
    "compare_methods",
    "compress",
    "diff",
    "diff_to",
    "measure_caches",
    "patch",
    "plan",
    "plan_json",
    "price_statistics",
    "read_plan",
    "record_of",
    "show",
    "show_patch",
    "survey",
    "truncate",
    "warnings_of",
]

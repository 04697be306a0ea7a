"""The stairs: each verb of the command line as one function; the CLI and notebooks call these."""

from waterfill.pipeline.compare import compare, record_of, show
from waterfill.pipeline.compress import compress
from waterfill.pipeline.planning import plan, plan_json, price_statistics

__all__ = ["compare", "compress", "plan", "plan_json", "price_statistics", "record_of", "show"]

"""Records as one self-contained HTML page."""

from waterfill.report.caching import cache_remarks, cache_rows, write_cache
from waterfill.report.comparison import comparison_rows, mixing, remarks, write_comparison
from waterfill.report.html import render, write

__all__ = [
    "cache_remarks",
    "cache_rows",
    "comparison_rows",
    "mixing",
    "remarks",
    "render",
    "write",
    "write_cache",
    "write_comparison",
]

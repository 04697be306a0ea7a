"""Records as one self-contained HTML page."""

from waterfill.report.comparison import comparison_rows, mixing, remarks, write_comparison
from waterfill.report.html import render, write

__all__ = ["comparison_rows", "mixing", "remarks", "render", "write", "write_comparison"]

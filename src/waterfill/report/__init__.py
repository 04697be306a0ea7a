"""Records as one self-contained HTML page."""

from waterfill.report.comparison import comparison_rows, mixing, write_comparison
from waterfill.report.html import render, write

__all__ = ["comparison_rows", "mixing", "render", "write", "write_comparison"]

"""Records as one self-contained HTML page."""

from waterfill.report.html import render, write

__all__ = ["render", "write"]

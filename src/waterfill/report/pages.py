"""Pages from templates: filled in with the style that all share, and written whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from waterfill.types import WaterfillError

__all__ = ["asset", "fill", "write_whole"]


def asset(name: str) -> str:
    """The text of a file of this package."""
    return resources.files("waterfill.report").joinpath(name).read_text(encoding="utf-8")


def fill(
    template: str, filters: Mapping[str, Callable[..., Any]] | None = None, **context: Any
) -> str:
    """A template of this package as a page; `css` is in its context.

    Raises
    ------
    WaterfillError
        If jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, FunctionLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise WaterfillError("reports need jinja2: pip install 'waterfill[cli]'") from error
    environment = Environment(
        loader=FunctionLoader(asset), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(filters or {})
    css = Markup(asset("report.css"))
    return environment.get_template(template).render(css=css, **context)


def write_whole(path: Path, page: str) -> Path:
    """Write a page, whole or not at all; returns its path."""
    unfinished = path.with_name(path.name + ".partial")
    unfinished.write_text(page, encoding="utf-8")
    unfinished.replace(path)
    return path

"""Runs text through a model block by block and leaves Statistics on disk.

Importing this loads numpy only; `calibrate` brings torch and transformers when it is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from waterfill.calibrate.statistics import Statistics

if TYPE_CHECKING:
    from waterfill.calibrate.run import calibrate

__all__ = ["Statistics", "calibrate"]


def __getattr__(name: str) -> Any:
    if name == "calibrate":
        try:
            from waterfill.calibrate.run import calibrate
        except ImportError as error:
            from waterfill.types import WaterfillError

            raise WaterfillError(
                f"calibration needs torch and transformers ({error}): pip install 'waterfill[hf]'"
            ) from error

        return calibrate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

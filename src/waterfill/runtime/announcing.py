"""Tell transformers of waterfill once it is there, without importing it.

`import waterfill` must stay light, and ``AutoModel...from_pretrained`` must know the method that an
artifact's config.json names. So a finder watches for the one module that keeps transformers' list
of such methods, and adds ours once it has been executed.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType

__all__ = ["announce"]

METHODS = "transformers.quantizers.auto"


def announce() -> None:
    """Register our quantizer with transformers: now if its list is loaded, else when it will be."""
    if METHODS in sys.modules:
        _register()
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


def _register() -> None:
    try:
        from waterfill.runtime.quantizer import register

        register()
    except Exception as error:
        # Whoever imports transformers for another reason must not fail over this; loading an
        # artifact without it still ends in an error, never in random weights.
        import warnings

        warnings.warn(
            f"waterfill cannot add itself to this version of transformers ({error!r}); "
            "waterfill.load_model works all the same",
            stacklevel=2,
        )


class _Watch:
    """Finds one module as the others would, once, and has `_register` run after it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != METHODS:
            return None
        from importlib.util import find_spec

        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader)  # type: ignore[assignment]
        return spec


class _Then:
    """A loader, and `_register` after it."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self._loader.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        # Whoever asks the module for its source or data finds the loader it would have had.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register()

"""waterfill compresses a neural network to the exact size its user names.

>>> import waterfill
>>> waterfill.compress("demo", "out/demo", bits=3.0)        # doctest: +SKIP
>>> arrays = waterfill.load("out/demo")                     # numpy only  # doctest: +SKIP
>>> model = waterfill.load_model("out/demo")                # transformers  # doctest: +SKIP

Once imported, transformers opens artifacts too: ``AutoModelForCausalLM.from_pretrained("out/demo")``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from waterfill.announcing import announce

__version__ = "0.1.0"

if TYPE_CHECKING:
    from waterfill import lossless as lossless
    from waterfill.pipeline.compare import compare as compare
    from waterfill.pipeline.compress import compress as compress
    from waterfill.pipeline.diffing import diff as diff
    from waterfill.pipeline.methods import compare_methods as compare_methods
    from waterfill.pipeline.patching import patch as patch
    from waterfill.pipeline.truncating import truncate as truncate
    from waterfill.registry import Codec as Codec
    from waterfill.registry import codec as codec
    from waterfill.runtime.apply import apply_ as apply_
    from waterfill.runtime.arrays import load as load
    from waterfill.runtime.cache.cache import KVCache as KVCache
    from waterfill.runtime.cache.fitting.calibrating import calibrate_cache as calibrate_cache
    from waterfill.runtime.cache.guard import Guard as Guard
    from waterfill.runtime.plain import decompress as decompress
    from waterfill.runtime.reading import Artifact as Artifact
    from waterfill.runtime.torch_model import load_model as load_model
    from waterfill.types import BudgetError as BudgetError
    from waterfill.types import FormatError as FormatError
    from waterfill.types import Record as Record
    from waterfill.types import WaterfillError as WaterfillError

# Public name -> the module that has it, imported at first use: `import waterfill` must stay quick
# and must not load torch.
_HOMES = {
    "Artifact": "runtime.reading",
    "BudgetError": "types",
    "Codec": "registry",
    "FormatError": "types",
    "Guard": "runtime.cache.guard",
    "KVCache": "runtime.cache.cache",
    "Record": "types",
    "WaterfillError": "types",
    "apply_": "runtime.apply",
    "calibrate_cache": "runtime.cache.fitting.calibrating",
    "codec": "registry",
    "compare": "pipeline",
    "compare_methods": "pipeline",
    "compress": "pipeline",
    "decompress": "runtime.plain",
    "diff": "pipeline",
    "load": "runtime.arrays",
    "load_model": "runtime.torch_model",
    "patch": "pipeline",
    "truncate": "pipeline",
}

_MODULES = ("lossless",)

__all__ = [*sorted([*_HOMES, *_MODULES]), "__version__"]


announce()


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"waterfill.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'waterfill' has no attribute {name!r}")
    return getattr(importlib.import_module(f"waterfill.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__

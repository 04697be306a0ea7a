"""What transformers asks of a quantisation method, answered for artifacts.

An artifact's weights file is no state dict that `from_pretrained` could load, so the model that it
has made is emptied before it looks for tensors, and gets afterwards all that `waterfill.load_model`
makes of the same class. For the inner load, whose tensors are plain, the same class swaps modules.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from waterfill.runtime.artifact import METHOD, WEIGHTS_KEY

__all__ = ["WaterfillConfig", "WaterfillQuantizer", "register"]


class WaterfillConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The entry ``quantization_config`` of an artifact's config.json.

    Parameters
    ----------
    residency : dense | packed | coded, as of `waterfill.load_model`
    memory : as of `waterfill.load_model`; one of the two at most
    filling : of a load in progress; never written
    entry : whatever else the entry has
    """

    def __init__(
        self,
        residency: str | None = None,
        memory: str | int | None = None,
        filling: Any = None,
        **entry: Any,
    ) -> None:
        self.quant_method = METHOD
        self.residency, self.memory, self.filling = residency, memory, filling
        self.entry = {k: v for k, v in entry.items() if k != "quant_method"}

    def to_dict(self) -> dict[str, Any]:
        """As in config.json."""
        wish = {"residency": self.residency, "memory": self.memory}
        set_ones = {k: v for k, v in wish.items() if v is not None}
        return {"quant_method": self.quant_method, **copy.deepcopy(self.entry), **set_ones}

    def to_diff_dict(self) -> dict[str, Any]:
        """The same: there are no defaults to leave out."""
        return self.to_dict()


class WaterfillQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads an artifact for `from_pretrained`."""

    requires_calibration = False

    def update_device_map(self, device_map: Any) -> Any:
        """The emptied model needs no map; the one that fills it gets what the user asked for."""
        if self.quantization_config.filling is not None:
            return device_map
        self._device_map = device_map
        return None

    def _prepared(self, config: Any) -> Any:
        # The key that stops whoever has not imported us; see `waterfill.runtime.artifact`.
        if getattr(config, WEIGHTS_KEY, None) is not None:
            setattr(config, WEIGHTS_KEY, None)
        if getattr(config, "dtype", None) is None:
            config.dtype = self.quantization_config.entry.get("dtype")
        return config

    # Of these three each version of transformers from 5.0 on calls at least one, with the
    # configuration and before it looks for files.
    def update_tp_plan(self, config: Any) -> Any:
        """The configuration, made ready."""
        return self._prepared(config)

    def update_ep_plan(self, config: Any) -> Any:
        """The configuration, made ready."""
        return self._prepared(config)

    def update_attn_implementation(self, config: Any) -> Any:
        """The configuration, made ready."""
        return self._prepared(config)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Any = None, **kwargs: Any
    ) -> None:
        if self.quantization_config.filling is not None:
            self.quantization_config.filling.before(model)
            return
        self._file = Path(checkpoint_files[0])
        self._config = copy.deepcopy(model.config)
        for tensors in (model._modules, model._parameters, model._buffers):
            tensors.clear()
        model._is_hf_initialized = True  # nothing here needs values
        known = model._keys_to_ignore_on_load_unexpected
        model._keys_to_ignore_on_load_unexpected = {".*"} if isinstance(known, set) else [".*"]
        model.all_tied_weights_keys = {}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self.quantization_config.filling is not None:
            self.quantization_config.filling.after(model)
            self.quantization_config.filling = None
            return
        from waterfill.runtime.torch_model import fill_model

        fill_model(model, self._file, self._config, self.quantization_config, self._device_map)

    def is_serializable(self) -> bool:
        """By `save_pretrained` of the model, which writes an artifact."""
        return True

    @property
    def is_trainable(self) -> bool:
        """No: integers have no gradient."""
        return False


def register() -> None:
    """Make transformers know the method; once is enough."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(WaterfillConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(WaterfillQuantizer)

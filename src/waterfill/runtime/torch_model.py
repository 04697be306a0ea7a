"""An artifact as a transformers model in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from waterfill.container import Reader
from waterfill.runtime.arrays import read_tensors
from waterfill.runtime.artifact import folder_of, original_config, read_config
from waterfill.types import Array, WaterfillError

if TYPE_CHECKING:
    import torch


def load_model(
    path: str | Path, *, dtype: str | None = None, trust_remote_code: bool = False
) -> Any:
    """Decode an artifact into the transformers model it was made from.

    Parameters
    ----------
    path : artifact folder
    dtype : "float32", "bfloat16", ...; default: as the checkpoint was stored
    trust_remote_code : run Python files that came with the model

    Returns
    -------
    transformers.PreTrainedModel, in evaluation mode

    Raises
    ------
    WaterfillError
        If torch or transformers is missing, the artifact has no config.json, or its original was
        quantised in a way that transformers cannot load here.
    FormatError
        If the file is damaged.
    """
    path = folder_of(path)
    with quiet_transformers(), Reader(path) as reader:
        config = plain_config(path, trust_remote_code)
        state = dict(read_tensors(reader, to_torch))
        with _said_of_quantised(config):
            model = model_class(config).from_pretrained(
                None,
                config=config,
                state_dict=state,
                dtype=dtype or "auto",
                trust_remote_code=trust_remote_code,
            )
    generation = path / "generation_config.json"
    if generation.exists() and hasattr(model, "generation_config"):
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(path)
    return model.eval()


@contextlib.contextmanager
def _said_of_quantised(config: Any) -> Iterator[None]:
    """Where a checkpoint was quantised before us, say that it is its own loader that fails."""
    entry = getattr(config, "quantization_config", None)
    try:
        yield
    except (ImportError, ValueError, RuntimeError) as error:
        if entry is None:
            raise
        method = entry.get("quant_method") if isinstance(entry, dict) else entry
        raise WaterfillError(
            f"the original is quantised ({method}) and transformers cannot load it here: {error}. "
            "waterfill decompress gives its files back, waterfill.load its arrays"
        ) from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own bars and notices off stderr while the body runs."""
    try:
        import torch
        from transformers.utils import logging
    except ImportError as error:
        raise WaterfillError(
            "this needs torch and transformers: pip install 'waterfill[hf]'"
        ) from error
    del torch
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def plain_config(path: Path, trust_remote_code: bool) -> Any:
    """The transformers configuration with the quantisation entry of the original, if it had one."""
    from transformers import AutoConfig

    original = original_config(read_config(path))
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    if "quantization_config" in original:
        config.quantization_config = original["quantization_config"]
    elif hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def model_class(config: Any) -> Any:
    """The transformers class that the configuration names, or the auto class that fits it."""
    import transformers

    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    return transformers.AutoModelForCausalLM


def to_torch(bits: Array, dtype: str) -> torch.Tensor:
    """Stored bits as a torch tensor of the checkpoint's dtype; shares memory where it can."""
    import torch

    views = {"BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
    if not bits.flags.writeable:
        bits = bits.copy()
    if dtype not in views:
        return torch.from_numpy(bits)
    signed = np.dtype(f"i{bits.dtype.itemsize}")
    return torch.from_numpy(bits.view(signed)).view(views[dtype])


def load_original(path: Path, trust_remote_code: bool) -> Any:
    """The uncompressed model in float32, in evaluation mode."""
    from transformers import AutoConfig

    with quiet_transformers():
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        cls = model_class(config)
        model = cls.from_pretrained(path, dtype="float32", trust_remote_code=trust_remote_code)
    return model.eval()

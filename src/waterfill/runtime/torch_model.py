"""An artifact as a transformers model in memory."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from waterfill.container import Reader
from waterfill.runtime.artifact import (
    ORIGINAL,
    WEIGHTS_KEY,
    folder_of,
    original_config,
    read_config,
    wishes,
)
from waterfill.runtime.residency import check, choose, forms_for
from waterfill.runtime.sizing import open_at
from waterfill.runtime.tensors import LazyTensor, lazy_tensors
from waterfill.types import WaterfillError

if TYPE_CHECKING:
    import torch

# Rows of `waterfill.runtime.residency` -> tensor -> form; what it is bound to goes into config.json.
Choose = functools.partial[dict[str, str]]


def load_model(
    path: str | Path,
    *,
    residency: str | None = None,
    memory: str | int | None = None,
    dtype: str | None = None,
    device: str | torch.device | None = None,
    size: str | int | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """An artifact as the transformers model it was made from.

    Tensors are decoded one by one as the model takes them: loading needs no more memory than the
    model will have, and one tensor.

    Parameters
    ----------
    path : artifact folder
    residency : how weights of linear layers and embeddings lie in memory (docs/running.md)
        dense: tensors of the checkpoint's dtype, the same bits as `decompress`;
        packed: low-bit integers, fastest for one token at a time, activations rounded to 8 bits;
        coded: entropy-coded, smallest, the same numbers as dense.
        Default: what the environment (WATERFILL_RESIDENCY, WATERFILL_MEMORY) or config.json says,
        else dense; on a device other than the CPU always dense.
    memory : instead of a residency, bytes or text such as ``1.2GB``: for each weight the fastest
        of the three, within so much for all of them
    dtype : "float32", "bfloat16", ...; default: as the checkpoint was stored
    device : where the model goes. Packed and coded weights stay on the CPU, and are decoded and
        sent for each use: correct, and slow
    size : bytes, or text such as ``3MB``, that the file might have been cut to: layers of quality
        beyond it are left out (docs/stack.md)
    trust_remote_code : run Python files that came with the model

    Returns
    -------
    transformers.PreTrainedModel, in evaluation mode

    Raises
    ------
    WaterfillError
        If torch or transformers is missing, the artifact has no config.json, or its original was
        quantised in a way that transformers cannot load here.
    BudgetError
        If the model cannot be had in so little `memory` or `size`; it states the least.
    FormatError
        If the file is damaged, or was changed while it was read.
    """
    path = folder_of(path)
    with quiet_transformers(), open_at(path, size) as reader:
        config = plain_config(path, trust_remote_code)
        choice = choice_of(residency, memory, wishes(read_config(path)), device)
        model, report = _load(
            model_class(config), config, reader, choice,
            dtype=dtype, device_map=_device_map(device), trust_remote_code=trust_remote_code,
        )  # fmt: skip
        _run_compressed(model, reader, choice)
    _say_missing(path, sorted(report["missing_keys"]))
    model.config.name_or_path = model.name_or_path = str(path)
    generation = path / "generation_config.json"
    if generation.exists() and hasattr(model, "generation_config"):
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(path)
    if device is not None:
        model.to(device)
    return model.eval()


def fill_model(model: Any, file: Path, config: Any, entry: Any, device_map: Any) -> None:
    """Make an emptied model what `load_model` would give: the end of ``from_pretrained``.

    Parameters
    ----------
    model : of the class to load
    file : the artifact's weights file
    config : of the model, as `from_pretrained` has prepared it
    entry : `waterfill.runtime.quantizer.WaterfillConfig` from config.json
    device_map : that the user gave
    """
    generation, place = getattr(model, "generation_config", None), model.name_or_path
    wish = {k: v for k in ("residency", "memory") if (v := getattr(entry, k)) is not None}
    del config.quantization_config
    if ORIGINAL in entry.entry:
        config.quantization_config = entry.entry[ORIGINAL]
    with Reader(file) as reader:
        choice = choice_of(None, None, wish, _only_device(device_map))
        made, _ = _load(
            type(model),
            config,
            reader,
            choice,
            dtype=config.dtype,
            device_map=device_map,
            entry=entry,
        )
        model.__dict__ = made.__dict__
        _run_compressed(model, reader, choice)
    model.config.name_or_path = model.name_or_path = place
    if generation is not None:
        model.generation_config = generation


def choice_of(
    residency: str | None, memory: str | int | None, wish: Mapping[str, Any], device: Any = None
) -> Choose:
    """How to choose each tensor's form: as the caller says, else the environment, else config.json.

    Raises
    ------
    WaterfillError
        If residency and memory are both given, or the residency is none.
    """
    if residency is None and memory is None:
        environment = {k: os.environ.get(f"WATERFILL_{k.upper()}") for k in ("residency", "memory")}
        said = {k: v for k, v in environment.items() if v} or wish
        residency, memory = said.get("residency"), said.get("memory")
        if device not in (None, "disk") and torch_device(device).type != "cpu":
            residency, memory = "dense", None
    if residency is not None and memory is not None:
        raise WaterfillError("name a residency or a memory, not both: a memory chooses residencies")
    if memory is not None:
        return functools.partial(choose, memory=memory)
    return functools.partial(forms_for, residency=check(residency or "dense"))


def _load(
    cls: Any,
    config: Any,
    reader: Reader,
    choice: Choose,
    *,
    dtype: Any = None,
    device_map: Any = None,
    entry: Any = None,
    **options: Any,
) -> tuple[Any, Mapping[str, Any]]:
    """A model of a class, its tensors decoded as transformers asks for them, and what it reports."""
    from waterfill.runtime.filling import Filling
    from waterfill.runtime.quantizer import WaterfillConfig

    state = lazy_tensors(reader)
    quantised = getattr(config, "quantization_config", None)
    keeps = _keeps(choice)
    if keeps and quantised is not None:
        raise WaterfillError(
            "the original is itself quantised, and only its own loader knows how: it can be loaded "
            'with residency="dense" alone'
        )
    if keeps:
        ours = entry or WaterfillConfig()
        ours = WaterfillConfig(**{**ours.to_dict(), **_wish(choice)})
        ours.filling = Filling(reader, state, choice)
        options["quantization_config"] = ours
    with _said_of_quantised(quantised):
        model, report = cls.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=dtype or getattr(config, "dtype", None) or _dtype_of(state),
            device_map=device_map,
            output_loading_info=True,
            **options,
        )
    return model, report


def _run_compressed(model: Any, reader: Reader, choice: Choose) -> None:
    """What a model needs beside its weights where some of them are not dense."""
    from waterfill.runtime.quick import quicken
    from waterfill.runtime.saving import saves_artifact

    if _keeps(choice):
        model.requires_grad_(
            False
        )  # else a norm's output would ask for a gradient through the next weight
        if getattr(model.config, "rescale_every", 0):
            # RWKV would halve its weights in place, and what they add to, lest float16 overflow.
            model.config.rescale_every = 0
        saves_artifact(model, reader)
        quicken(model)


def _say_missing(path: Path, names: list[str]) -> None:
    if names:
        more = ", ..." if len(names) > 3 else ""
        warnings.warn(
            f"{path} has no tensor for {', '.join(names[:3])}{more}: transformers fills in new ones",
            stacklevel=3,
        )


def _keeps(choice: Choose) -> bool:
    """Whether some weights may stay in another form than dense."""
    return bool(choice.keywords.get("residency") != "dense")


def _wish(choice: Choose) -> dict[str, Any]:
    """The choice, as it may stand in config.json."""
    return {"residency": None, "memory": None, **choice.keywords}


def _dtype_of(state: Mapping[str, LazyTensor]) -> Any:
    return next((t.dtype for t in state.values() if t.is_floating_point()), "float32")


def torch_device(device: Any) -> torch.device:
    """A device however it is named."""
    import torch

    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise WaterfillError(f"{device!r} is not a device of torch: {error}") from error


def _device_map(device: Any) -> Any:
    """What makes transformers load to a device at once; None if it cannot, or need not."""
    if device is None or torch_device(device).type == "cpu":
        return None
    return {"": torch_device(device)} if importlib.util.find_spec("accelerate") else None


def _only_device(device_map: Any) -> Any:
    """The device that a map puts the model on, or its first module; None without a map."""
    import torch

    if isinstance(device_map, str):  # transformers is to choose
        return "cuda" if torch.cuda.is_available() else None
    return next(iter(device_map.values()), None) if device_map else None


@contextlib.contextmanager
def _said_of_quantised(entry: Any) -> Iterator[None]:
    """Where a checkpoint was quantised before us, say that it is its own loader that fails."""
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
    config.transformers_weights = original.get(WEIGHTS_KEY)
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


def load_original(path: Path, trust_remote_code: bool, dtype: str = "float32") -> Any:
    """The uncompressed model, in evaluation mode; dtype ``auto`` is that of the checkpoint."""
    from transformers import AutoConfig

    with quiet_transformers():
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        cls = model_class(config)
        model = cls.from_pretrained(path, dtype=dtype, trust_remote_code=trust_remote_code)
    return model.eval()

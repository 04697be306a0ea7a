"""A model whose weights are in memory only while they are needed.

The model is built with its parameters on the meta device. Every module that owns parameters is a
door: its forward loads them as float32, runs, and drops them. Blocks (the items of the model's
outermost module lists) load all they contain at once, and are recomputed in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from waterfill.calibrate.loader import Loader, Slot, own_name
from waterfill.calibrate.lookups import EmbeddingWatch
from waterfill.calibrate.watch import Watch
from waterfill.sources.base import Source
from waterfill.types import WaterfillError

__all__ = ["block_names", "build_skeleton", "install_doors"]


def build_skeleton(source: Source) -> Any:
    """The model of a source without its weights: meta parameters, real buffers, eval mode."""
    import transformers

    if "quantization_config" in source.config:
        method = source.config["quantization_config"].get("quant_method", "an unnamed method")
        raise WaterfillError(
            f"{source.name} is already quantised ({method}); start from the original"
        )
    config = _config(source)
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if hasattr(part, "use_cache"):
            part.use_cache = False  # it would be filled twice where blocks are recomputed
    names = source.config.get("architectures") or [None]
    cls = getattr(transformers, str(names[0]), None)
    try:
        with _meta_parameters():
            if cls is not None and not source.config.get("auto_map"):
                # A fused kernel would hide what each expert gets.
                model = cls._from_config(
                    config, dtype=torch.float32, experts_implementation="eager"
                )
            elif source.trust_remote_code or cls is None:
                auto = transformers.AutoModelForCausalLM
                model = auto.from_config(
                    config, dtype=torch.float32, trust_remote_code=source.trust_remote_code
                )
            else:
                model = cls._from_config(config, dtype=torch.float32)
            model.tie_weights()
    except WaterfillError:
        raise
    except Exception as error:
        raise WaterfillError(
            f"transformers {transformers.__version__} cannot build {names[0]}: {error}"
        ) from error
    return model.eval()


def _config(source: Source) -> Any:
    import transformers

    try:
        if source.path is not None:
            return transformers.AutoConfig.from_pretrained(
                source.path, trust_remote_code=source.trust_remote_code, local_files_only=True
            )
        kind = source.config.get("model_type", "")
        return transformers.AutoConfig.for_model(**{**source.config, "model_type": kind})
    except Exception as error:
        raise WaterfillError(
            f"transformers {transformers.__version__} does not know the model type "
            f"{source.config.get('model_type')!r} of {source.name}: {error}"
        ) from error


@contextmanager
def _meta_parameters() -> Iterator[None]:
    """Parameters registered inside are moved to the meta device; buffers stay real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def block_names(model: nn.Module) -> list[str]:
    """Items of the outermost module lists, in order: what is loaded and recomputed as one."""
    found: list[str] = []

    def walk(prefix: str, module: nn.Module) -> None:
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            if isinstance(module, nn.ModuleList) and not isinstance(
                child, (nn.ModuleList, nn.ModuleDict)
            ):
                if any(True for _ in child.parameters()):
                    found.append(path)
            else:
                walk(path + ".", child)

    walk("", model)
    return found


def install_doors(
    loader: Loader, watch: Watch, gradients: Callable[[], bool], leave: Callable[[str], None]
) -> None:
    """Wrap the forward of every module that owns parameters.

    Parameters
    ----------
    loader : Loader
    watch : told of parameters as they come and go
    gradients : whether a backward pass will follow
    leave : called with a module's name when it has run and its weights are gone
    """
    blocks = set(block_names(loader.model))
    for name, module in loader.model.named_modules():
        deep = name in blocks
        slots = loader.slots(module, deep)
        if not slots:
            continue
        leaf = not any(True for _ in module.children())
        homes = [(slot, loader.home(slot, own_name(loader.model, slot))) for slot in slots]
        _install(module, name, homes, loader, watch, gradients if deep or leaf else _never, leave)


def _never() -> bool:
    return False


def _install(
    module: nn.Module,
    name: str,
    homes: list[tuple[Slot, str]],
    loader: Loader,
    watch: Watch,
    recompute: Callable[[], bool],
    leave: Callable[[str], None],
) -> None:
    inner = module.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        absent = [(s, h) for s, h in homes if s.module._parameters[s.attribute].is_meta]  # type: ignore[union-attr]
        if not absent:
            return inner(*args, **kwargs)
        watch.sweep()  # the weights of the block before, ere these come beside them
        values = loader.load({home for _, home in absent})
        before = [slot.module._parameters[slot.attribute] for slot, _ in absent]
        for blank, (_, home) in zip(before, absent, strict=True):
            scale = watch.scales.get(id(blank), 1.0)
            if scale != 1.0:
                values[home] *= scale
            watch.arrive(home, values[home], scale)
        try:
            for slot, home in absent:
                slot.module._parameters[slot.attribute] = nn.Parameter(
                    values[home], requires_grad=False
                )
            # Calling backward() switches function modes off, so a recomputed block brings its own.
            with EmbeddingWatch(watch, gradients=True) if watch.backward else nullcontext():
                return inner(*args, **kwargs)
        finally:
            for (slot, _), blank in zip(absent, before, strict=True):
                slot.module._parameters[slot.attribute] = blank
            while values:  # they make room for what `leave` computes
                watch.leave(values.popitem()[1])
            leave(name)

    def forward(*args: Any, **kwargs: Any) -> Any:
        wanted = recompute() and any(
            isinstance(a, torch.Tensor) and a.requires_grad for a in (*args, *kwargs.values())
        )
        if not wanted:
            return run(*args, **kwargs)
        return checkpoint(
            lambda *a: run(*a, **kwargs), *args, use_reentrant=False, preserve_rng_state=False
        )

    module.forward = forward

"""A model whose weights are in memory only while they are needed.

The model is built with its parameters on the meta device. Every module that owns parameters is a
door: its forward loads them as float32, runs, and drops them. Blocks (the items of the model's
outermost module lists) load all they contain at once, and are recomputed in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from waterfill.calibrate.names import Job, jobs_for
from waterfill.calibrate.watch import EmbeddingWatch, Watch
from waterfill.sources.base import Source
from waterfill.types import FLOAT_DTYPES, WaterfillError, to_float32

__all__ = ["Loader", "block_names", "build_skeleton", "install_doors", "load_all"]


def build_skeleton(source: Source) -> Any:
    """The model of a source without its weights: meta parameters, real buffers, eval mode."""
    import transformers

    if "quantization_config" in source.config:
        method = source.config["quantization_config"].get("quant_method", "an unnamed method")
        raise WaterfillError(
            f"{source.name} is already quantised ({method}); start from the original"
        )
    config = _config(source)
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


@dataclass(frozen=True)
class Slot:
    """Where a parameter hangs: ``module._parameters[attribute]``, known under several names."""

    module: nn.Module
    attribute: str
    names: tuple[str, ...]


class Loader:
    """Reads parameters of a skeleton from a source, as float32.

    Attributes
    ----------
    jobs : parameter name -> the Job that makes it
    """

    def __init__(self, model: Any, source: Source) -> None:
        self.model = model
        self.source = source
        shapes = {name: shape for name, (_, shape) in source.tensors.items()}
        self.all_jobs = jobs_for(model, shapes)
        self.jobs: dict[str, Job] = {out: job for job in self.all_jobs for out in job.outputs}
        self._checked: set[str] = set()
        names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        self._names = names
        self._load_buffers()

    def slots(self, module: nn.Module, deep: bool) -> list[Slot]:
        """Parameters of a module, with those of the modules inside it where `deep`."""
        owners = module.modules() if deep else [module]
        return [
            Slot(owner, attribute, tuple(self._names[id(parameter)]))
            for owner in owners
            for attribute, parameter in owner._parameters.items()
            if parameter is not None
        ]

    def home(self, slot: Slot, own: str) -> str:
        """The name under which the checkpoint has a slot's parameter."""
        for name in (own, *slot.names):
            if name in self.jobs:
                return name
        raise WaterfillError(f"the checkpoint has no tensor for the parameter {slot.names[0]}")

    def load(self, names: set[str]) -> dict[str, torch.Tensor]:
        """Parameters by name, each float32 in memory of its own."""
        found: dict[str, torch.Tensor] = {}
        for name in sorted(names):
            if name not in found:
                job = self.jobs[name]
                made = job.run((self._tensor(file) for file in job.files), self.model)
                found.update({n: _own(t) for n, t in made.items() if n in names})
        return found

    def _tensor(self, name: str) -> torch.Tensor:
        dtype, _ = self.source.tensors[name]
        bits = self.source.read(name)
        if dtype not in FLOAT_DTYPES:
            if dtype.startswith("F8"):
                raise WaterfillError(f"tensor {name} is {dtype}: start from the unquantised model")
            return torch.from_numpy(np.ascontiguousarray(bits))
        values = to_float32(bits, dtype)
        if name not in self._checked:
            if not np.isfinite(values).all():
                raise WaterfillError(f"tensor {name} has NaN or infinite values")
            self._checked.add(name)
        return torch.from_numpy(values)

    def _load_buffers(self) -> None:
        for name, buffer in self.model.named_buffers():
            if name in self.jobs:
                buffer.copy_(self.load({name})[name])


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, contiguous and alone in its storage: the watch knows parameters by storage."""
    tensor = tensor.contiguous()
    alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if alone else tensor.clone()


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
        homes = [(slot, loader.home(slot, _own_name(loader.model, slot))) for slot in slots]
        _install(module, name, homes, loader, watch, gradients if deep or leaf else _never, leave)


def _never() -> bool:
    return False


def _own_name(model: nn.Module, slot: Slot) -> str:
    if len(slot.names) == 1:
        return slot.names[0]
    for name in slot.names:
        if model.get_submodule(name.rpartition(".")[0]) is slot.module:
            return name
    return slot.names[0]


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
            for value in values.values():
                watch.leave(value)
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


def load_all(loader: Loader) -> Mapping[str, nn.Parameter]:
    """Put every parameter in its place for good, for a model that fits in memory."""
    placed: dict[str, nn.Parameter] = {}
    for slot in loader.slots(loader.model, deep=True):
        home = loader.home(slot, _own_name(loader.model, slot))
        if home not in placed:
            placed[home] = nn.Parameter(loader.load({home})[home], requires_grad=False)
        slot.module._parameters[slot.attribute] = placed[home]
    return placed

"""The KV cache by the command line's hand: its statistics beside a model, and what sizes of it cost."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from waterfill.calibrate.text import default_text, read_windows, write_itself
from waterfill.container import format_of
from waterfill.pipeline.compare import Yardstick
from waterfill.pipeline.planning import Progress, quiet
from waterfill.runtime.opening import OpenedModel, open_model
from waterfill.runtime.torch_model import quiet_transformers
from waterfill.sources.module import ModuleSource
from waterfill.sources.text import load_tokenizer
from waterfill.types import BudgetError, WaterfillError

__all__ = ["calibrate_cache_to", "measure_caches"]

TOKENS = 16384  # of calibration text
MEASURED = 4096  # tokens of the text that caches are measured on
WINDOW = 1024
STEPS = 32  # tokens that are timed


def calibrate_cache_to(
    model: str | Path,
    out: Path | None = None,
    texts: Sequence[Path] | Literal["self"] | None = None,
    *,
    tokens: int = TOKENS,
    window: int | None = None,
    seed: int = 0,
    force: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Statistics of a model's KV cache in a small file; beside the model `KVCache` finds it itself.

    Parameters
    ----------
    model : artifact, model folder, hub id or ``"demo"``
    out : file to make; default: ``cache.safetensors`` in the model's folder
    texts : text files; None: the packaged text; "self": text that the model writes
    tokens : of text, in all
    window : tokens at once; default up to 1024
    seed : of what is drawn
    force : replace statistics that are there

    Returns
    -------
    dict
        path, nbytes, layers and protocol

    Raises
    ------
    WaterfillError
        If there is no place for the file, something else is there, or the model has no such cache.
    """
    with quiet_transformers():
        opened = _open(model, "dense", trust_remote_code)
        path = _place(opened, out, force)
        windows = _windows(opened, texts, tokens, window, seed, trust_remote_code)
        from waterfill.runtime.cache.fitting.calibrating import calibrate_cache
        from waterfill.runtime.cache.fitting.statistics import save_statistics

        made = calibrate_cache(
            opened.model,
            windows.ids,
            seed=seed,
            protocol={"model": opened.name, "texts": windows.texts, "notes": windows.notes},
            progress=lambda done, total: progress("reading the text", done, total),
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    save_statistics(made, path)
    return {
        "path": str(path),
        "nbytes": path.stat().st_size,
        "layers": len(made.layers),
        "beside": out is None,
        "protocol": dict(made.protocol),
    }


def _open(model: str | Path, residency: str | None, trust_remote_code: bool) -> OpenedModel:
    opened = open_model(model, residency, trust_remote_code)
    if not opened.model.can_generate():
        raise WaterfillError(
            f"{type(opened.model).__name__} writes no text, so it has no use for a cache"
        )
    return opened


def _place(opened: OpenedModel, out: Path | None, force: bool) -> Path:
    from waterfill.runtime.cache.fitting.statistics import FILE_NAME, FORMAT

    if out is None and not opened.own_folder:
        raise WaterfillError(
            f"{opened.name} is no folder of yours: say with -o where the statistics go, "
            f"for example -o {FILE_NAME}"
        )
    path = opened.folder / FILE_NAME if out is None else out
    if path.is_dir():
        raise WaterfillError(f"{path} is a folder: name the file to make, {path / FILE_NAME}")
    if path.exists():
        if not force:
            raise WaterfillError(f"{path} exists; replace it with --force, or name another with -o")
        if format_of(path) != FORMAT:
            raise WaterfillError(f"{path} holds something else than cache statistics: name another")
    return path


def _windows(
    opened: OpenedModel,
    texts: Sequence[Path] | Literal["self"] | None,
    tokens: int,
    window: int | None,
    seed: int,
    trust_remote_code: bool,
) -> Any:
    longest = _longest(opened.model)
    if window is not None and longest is not None and window > longest:
        raise WaterfillError(f"{opened.name} takes {longest} tokens at once, not {window}")
    size = window or min(WINDOW, longest or WINDOW)
    if texts == "self":
        return write_itself(opened.model, tokens, size, seed)
    source = ModuleSource(opened.model, load_tokenizer(opened.folder, trust_remote_code))
    config = opened.model.config.get_text_config(decoder=True)
    vocabulary = getattr(config, "vocab_size", None)
    return read_windows(source, list(texts or [default_text()]), tokens, size, vocabulary)


def _longest(model: Any) -> int | None:
    from waterfill.runtime.cache.facts import context_of

    return context_of(model)


def measure_caches(
    model: str | Path,
    *,
    methods: Sequence[str] = (),
    sizes: Sequence[str] = (),
    bits: Sequence[float] = (),
    text: Sequence[str | Path] | None = None,
    statistics: str | Path | None = None,
    tokens: int | None = None,
    window: int | None = None,
    stock: bool = True,
    trust_remote_code: bool = False,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """What a KV cache of each method at each size costs, against an exact one.

    Parameters
    ----------
    model : artifact, model folder, hub id or ``"demo"``
    methods : as `KVCache` takes them; default: auto
    sizes : bytes of a whole cache that is full after a window, as text
    bits : the same by bits of each number in keys and values
    text : text files; default: a packaged text
    statistics : file of `calibrate_cache_to`; default: the one beside the model, if there is one
    tokens, window : read so much of the text, so much at once; default 4096 and up to 1024
    stock : also transformers' own quantised caches, where their backends are installed

    Returns
    -------
    dict
        model, cells (method, asked, nbytes, bytes_per_token, bits, kl_nats, kl_nats_stderr,
        top1_agreement, perplexity, tokens_per_second and that of an exact cache, chosen; or error),
        exact_bytes_per_token, exact_perplexity, statistics and protocol
    """
    import torch

    with quiet_transformers():
        opened = _open(model, None, trust_remote_code)
        size = window or min(WINDOW, _longest(opened.model) or WINDOW)
        windows = Yardstick.windows_of(
            opened.folder,
            opened.model,
            text,
            window=size,
            stride=max(1, size - 1),
            tokens=tokens or MEASURED,
            trust_remote_code=trust_remote_code,
        )
        bench = _Bench(opened.model, torch.from_numpy(windows.tokens), progress)
        own = bench.statistics(statistics)
        cells = list(bench.cells(methods or ("auto",), [*_asked(sizes, bits)], own))
        if stock:
            cells += bench.stock()
    return {
        "model": opened.name,
        "cells": cells,
        "exact_bytes_per_token": bench.exact_nbytes,
        "numbers_per_token": bench.numbers,
        "exact_perplexity": next((c["exact_perplexity"] for c in cells if "nbytes" in c), None),
        "statistics": None if own is None else dict(own.protocol),
        "protocol": {**windows.protocol, **bench.protocol},
    }


def _asked(sizes: Sequence[str], bits: Sequence[float]) -> Iterator[tuple[str, dict[str, Any]]]:
    for size in sizes:
        yield size, {"size": size}
    for number in bits:
        yield f"{number:g} bits", {"bits": number}


class _Bench:
    """A model and a text that caches are tried on, one after the other."""

    def __init__(self, model: Any, windows: Any, progress: Progress) -> None:
        from waterfill.runtime.cache.cache import KVCache

        self.model, self.windows, self.progress = model, windows, progress
        plain = KVCache(model, method="exact")  # says early where there is nothing to code
        known = [one for one in plain.facts if one is not None]
        self.exact_nbytes = sum(one.token_nbytes for one in known)
        self.numbers = sum(one.numbers for one in known)
        self.prefill = min(64, windows.shape[1] // 2)
        self.steps = min(STEPS, windows.shape[1] // 2)

    @property
    def protocol(self) -> dict[str, Any]:
        return {"prompt": self.prefill, "tokens at once": 16, "tokens timed": self.steps}

    def statistics(self, given: str | Path | None) -> Any:
        """The file that was named, or that lies beside the model; None if there is none."""
        from waterfill.runtime.cache.fitting.statistics import FILE_NAME, load_statistics

        beside = Path(str(self.model.name_or_path)) / FILE_NAME
        if given is None and not beside.is_file():
            return None
        return load_statistics(Path(given or beside))

    def cells(
        self, methods: Sequence[str], asked: Sequence[tuple[str, dict[str, Any]]], own: Any
    ) -> Iterator[dict[str, Any]]:
        from waterfill.runtime.cache.cache import KVCache

        for method in methods:
            fixed = ":" in method  # its options say all: no size is needed
            for label, options in [("", {})] if fixed or not asked else asked:
                about: dict[str, Any] = {"method": method, "asked": label}

                def make(method: str = method, options: Mapping[str, Any] = options) -> Any:
                    return KVCache(
                        self.model, **options, method=method, statistics=own,
                        tokens=self.windows.shape[1],
                    )  # fmt: skip

                try:
                    with warnings.catch_warnings(record=True) as caught:
                        warnings.simplefilter("always", UserWarning)
                        cache = make()
                except BudgetError as error:
                    yield {**about, "error": str(error)}
                    continue
                about["warnings"] = [str(one.message) for one in caught]
                about["budget_nbytes"] = cache.budget.nbytes
                about["chosen"] = _chosen(cache)
                about["predicted_nats"] = _predicted(cache)
                yield {**about, **self._measure(" ".join(f"{method} {label}".split()), cache)}

    def stock(self) -> Iterator[dict[str, Any]]:
        """transformers' own quantised caches."""
        from waterfill.evaluate.stock import stock_caches

        for name, make in stock_caches(self.model):
            try:
                found = self._measure(name, make)
            except (ValueError, RuntimeError, ImportError) as error:
                found = {"error": f"transformers: {error}"}
            yield {"method": name, "asked": "", "stock": True, **found}

    def _measure(self, name: str, cache: Any) -> dict[str, Any]:
        from waterfill.evaluate.caching import cache_fidelity
        from waterfill.evaluate.pace import decode_pace
        from waterfill.evaluate.stock import cache_nbytes

        again: Callable[[], Any] = cache if callable(cache) else _again(cache)
        done = 0

        def make() -> Any:
            nonlocal done
            self.progress(name, done, len(self.windows))
            done += 1
            return again()

        found = cache_fidelity(
            self.model,
            self.windows,
            make,
            lambda c: int(getattr(c, "nbytes", None) or cache_nbytes(c)),
            prefill=self.prefill,
        )
        self.progress(name, done, len(self.windows))
        mine, exact = decode_pace(
            self.model, self.windows[0], [again, self._exact], steps=self.steps
        )
        return {
            "nbytes": found.nbytes,
            "bytes_per_token": found.bytes_per_token,
            "bits": 8 * found.bytes_per_token / self.numbers,
            "kl_nats": found.kl_nats,
            "kl_nats_stderr": None
            if found.kl_error_nats != found.kl_error_nats
            else found.kl_error_nats,
            "top1_agreement": found.agreement,
            "perplexity": found.perplexity,
            "exact_perplexity": found.exact_perplexity,
            "tokens_per_second": mine,
            "exact_tokens_per_second": exact,
        }

    def _exact(self) -> Any:
        from waterfill.evaluate.stock import exact_cache

        return exact_cache(self.model)


def _again(cache: Any) -> Callable[[], Any]:
    """The same cache, empty: its plan is made once."""

    def make() -> Any:
        cache.reset()
        return cache

    return make


def _chosen(cache: Any) -> dict[str, int]:
    """Methods and how many layers have them."""
    ids = [choice.method.id for choice in cache.choices.values()]
    return {id: ids.count(id) for id in sorted(set(ids))}


def _predicted(cache: Any) -> float | None:
    nats = [choice.nats for choice in cache.choices.values()]
    return None if any(n is None for n in nats) else float(sum(nats))

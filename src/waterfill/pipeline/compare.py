"""Look at an artifact: its ledger, its measured harm, its record."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Self, TypeVar

from waterfill.container import Reader
from waterfill.pipeline.planning import Progress, quiet
from waterfill.runtime import artifact
from waterfill.runtime.arrays import checkpoint_infos, decode
from waterfill.runtime.sizing import open_at
from waterfill.runtime.tensors import to_torch
from waterfill.runtime.torch_model import load_model, load_original
from waterfill.sources import Source, open_source
from waterfill.sources.text import load_tokenizer
from waterfill.types import Record, WaterfillError

T = TypeVar("T")
METRICS = "metrics"


def show(path: str | Path, size: str | int | None = None) -> dict[str, Any]:
    """The ledger of an artifact, perhaps opened at a smaller size; its rows' bytes sum to the file."""
    with open_at(path, size) as reader:
        rows = artifact.ledger(reader)
        params = sum(r["params"] for r in rows)
        return {
            "path": str(reader.path),
            "nbytes": reader.nbytes,
            "params": params,
            "bits_per_weight": 8 * reader.nbytes / max(params, 1),
            "predicted_kl_nats": sum(r["predicted_nats"] for r in rows),
            "ledger": rows,
        }


def record_of(path: str | Path) -> Record:
    """Everything known of an artifact: ledger, plan, and measurements kept by `compare`."""
    folder = Path(path)
    shown = show(folder)
    stored = artifact.read_record(folder if folder.is_dir() else folder.parent)
    return Record(
        name=folder.name,
        nbytes=shown["nbytes"],
        bits_per_weight=shown["bits_per_weight"],
        metrics=stored.get(METRICS, {}),
        predicted={**stored.get("predicted", {}), "kl_nats": shown["predicted_kl_nats"]},
        ledger=tuple(shown["ledger"]),
        curve=tuple(stored.get("curve", ())),
        about=stored.get("about", {}),
    )


def compare(
    path: str | Path,
    against: str | Path,
    text: Sequence[str | Path] | None = None,
    *,
    window: int | None = None,
    stride: int | None = None,
    tokens: int | None = None,
    layers: bool = False,
    activations: str | None = None,
    size: str | int | None = None,
    trust_remote_code: bool = False,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Measure a compressed model against the original; the figures are kept beside the artifact.

    Parameters
    ----------
    path : artifact folder
    against : the original: folder, hub id or ``"demo"``
    text : text files; default: a packaged text
    window, stride, tokens : see `waterfill.evaluate.text_windows`
    layers : also measure each tensor alone
    activations : int8, e4m3, e5m2 (``int8:tensor``, ...): what the inputs of linear layers are
        rounded to; such figures are of more than the file, and are not kept beside it
    size : open the artifact at this size, as of `waterfill.load_model`; the figures are not kept then

    Returns
    -------
    dict
        As of `waterfill.evaluate.compare`, with ``predicted_kl_nats`` and ``layers``.
    """
    folder = artifact.folder_of(path)
    source = open_source(against, trust_remote_code=trust_remote_code)
    shown = show(folder, size)
    _check_alike(folder, source)
    yardstick = Yardstick.open(
        source,
        text,
        window=window,
        stride=stride,
        tokens=tokens,
        activations=activations,
        trust_remote_code=trust_remote_code,
    )
    metrics = yardstick.measure(folder, size, progress)
    metrics["nbytes"] = shown["nbytes"]
    metrics["predicted_kl_nats"] = shown["predicted_kl_nats"]
    predicted = record_of(path).predicted if size is None else {}
    if "kl_nats_calibration" in predicted:
        metrics["calibration_kl_nats"] = predicted["kl_nats_calibration"]
    if layers:
        metrics["layers"] = _layers(folder, size, yardstick, shown["ledger"], _watcher(progress))
    stored = artifact.read_record(folder)
    if stored and not activations and size is None:
        artifact.write_record(folder, {**stored, METRICS: metrics})
    return metrics


@dataclass(frozen=True, eq=False)
class Yardstick:
    """An original and a text, for any number of artifacts to be measured by.

    Attributes
    ----------
    original : transformers model in float32
    windows : waterfill.evaluate.Windows
    activations : see `waterfill.evaluate.Activations`, or None
    trust_remote_code : bool
    """

    original: Any
    windows: Any
    activations: str | None = None
    trust_remote_code: bool = False

    @property
    def protocol(self) -> dict[str, Any]:
        """What is measured on, and how, before anything is."""
        how = {"activations": self.activations} if self.activations else {}
        return {**self.windows.protocol, **how}

    @classmethod
    def open(
        cls,
        source: Source,
        text: Sequence[str | Path] | None = None,
        *,
        window: int | None = None,
        stride: int | None = None,
        tokens: int | None = None,
        activations: str | None = None,
        trust_remote_code: bool = False,
    ) -> Self:
        """Load the original and cut the text; parameters as of `compare`."""
        check_protocol(text, activations)
        if source.path is None:
            raise WaterfillError(
                "compare with a folder, a hub id or demo; or call waterfill.evaluate.compare"
            )
        if "quantization_config" in source.config:
            raise WaterfillError(f"{source.name} is itself quantised; compare with the original")
        original = load_original(source.path, trust_remote_code)
        windows = cls.windows_of(
            source.path,
            original,
            text,
            window=window,
            stride=stride,
            tokens=tokens,
            trust_remote_code=trust_remote_code,
        )
        return cls(original, windows, activations, trust_remote_code)

    @staticmethod
    def windows_of(
        folder: Path,
        model: Any,
        text: Sequence[str | Path] | None = None,
        *,
        window: int | None = None,
        stride: int | None = None,
        tokens: int | None = None,
        trust_remote_code: bool = False,
    ) -> Any:
        """A text cut for a model, by the tokenizer of a folder; parameters as of `compare`."""
        from waterfill import evaluate  # which needs torch; `show` must not

        return evaluate.text_windows(
            [Path(t) for t in text] if text else [_packaged_text()],
            load_tokenizer(folder, trust_remote_code),
            window=window,
            stride=stride,
            max_positions=evaluate.max_positions(model),
            max_tokens=tokens,
            masked=evaluate.is_masked(model),
        )

    def measure(
        self, folder: Path, size: str | int | None = None, progress: Progress = quiet
    ) -> dict[str, Any]:
        """An artifact's harm, as of `waterfill.evaluate.compare`; perhaps opened at a size."""
        from waterfill import evaluate

        compressed = load_model(
            folder,
            residency="dense",
            dtype="float32",
            size=size,
            trust_remote_code=self.trust_remote_code,
        )
        return evaluate.compare(
            self.original,
            compressed,
            self.windows,
            activations=self.activations,
            progress=_watcher(progress),
        )


def check_protocol(text: Sequence[str | Path] | None, activations: str | None) -> None:
    """Refuse what `Yardstick.open` could not use, before anything takes time."""
    from waterfill import evaluate

    if activations:
        evaluate.Activations.parse(activations)
    for path in text or ():
        Path(path).stat()


def _check_alike(folder: Path, source: Source) -> None:
    """WaterfillError if the artifact was clearly not made from this model."""
    config = artifact.read_config(folder)
    differs = [
        key for key in ("model_type", "architectures") if config.get(key) != source.config.get(key)
    ]
    with Reader(folder) as reader:
        for name, (_, shape) in checkpoint_infos(reader).items():
            if name in source.tensors and source.tensors[name][1] != shape:
                differs.append(f"the shape of {name}")
    if differs:
        raise WaterfillError(
            f"{folder} was not made from {source.path}: {differs[0]} differs; compare it with its original"
        )


def _layers(
    folder: Path,
    size: str | int | None,
    yardstick: Yardstick,
    ledger: Sequence[dict[str, Any]],
    watched: Any,
) -> list[dict[str, Any]]:
    from waterfill import evaluate

    predicted = {r["name"]: r["predicted_nats"] for r in ledger if r["predicted_nats"] > 0}
    with open_at(folder, size) as reader:
        weights = _Decoded(reader)
        measured = evaluate.layer_kl(
            yardstick.original, weights, yardstick.windows, list(predicted), progress=watched
        )
    return [{**row, "predicted_nats": predicted[row["name"]]} for row in measured]


class _Decoded(dict[str, Any]):
    """Decodes a tensor when it is asked for, so that one at a time is in memory."""

    def __init__(self, reader: Reader) -> None:
        super().__init__()
        self._reader = reader

    def __contains__(self, name: object) -> bool:
        return name in self._reader.entries

    def __missing__(self, name: str) -> Any:
        info = self._reader.entries[name].info
        return to_torch(decode(self._reader, name), info.dtype)


def _watcher(progress: Progress) -> Callable[[Iterable[T], str], Iterator[T]]:
    def watched(items: Iterable[T], label: str) -> Iterator[T]:
        listed = list(items)
        for done, item in enumerate(listed, 1):
            yield item
            progress(label, done, len(listed))

    return watched


def _packaged_text() -> Path:
    return Path(str(resources.files("waterfill") / "data" / "text" / "evaluation.txt"))

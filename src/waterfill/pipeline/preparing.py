"""Before the first price: what can be refused at once is, and statistics are found or made."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from waterfill.calibrate import Statistics
from waterfill.coding.native import device
from waterfill.coding.trellis_torch import find_device
from waterfill.pipeline.planning import Progress, check_same, quiet
from waterfill.plan.budget import budget_nbytes
from waterfill.plan.price import Rules
from waterfill.runtime import artifact
from waterfill.runtime.torch_model import quiet_transformers
from waterfill.sources import Source, open_source
from waterfill.types import DTYPES, TensorInfo, WaterfillError

Texts = Sequence[Path] | Literal["self"] | None


def check_early(source: Source, rules: Rules, **budget: Any) -> None:
    """Refuse patterns, codecs, sizes and devices that cannot be right, before minutes of calibration.

    What a tensor is (a matrix, transposed, in use at all) is not known yet; `Rules.check` is
    called again when it is.
    """
    if device() != "cpu":
        find_device(device())
    infos = {info.name: info for info in _guesses(source)}
    rules.check(infos, dict.fromkeys(infos, True))
    shapes = source.tensors.values()
    budget_nbytes(
        params=sum(math.prod(shape) for _, shape in shapes),
        original_nbytes=sum(math.prod(shape) * DTYPES[dtype].itemsize for dtype, shape in shapes),
        **budget,
    )


def _guesses(source: Source) -> Iterator[TensorInfo]:
    for name, (dtype, shape) in source.tensors.items():
        yield TensorInfo(name, shape, dtype)
        if len(shape) == 3:  # may turn out to be fused experts
            for i in range(shape[0]):
                yield TensorInfo(f"{name}[{i}]", shape[1:], dtype, index=i)


def statistics_for(
    source: Source,
    work: Path,
    calibration: str | Path | Sequence[str | Path] | None,
    tokens: int,
    progress: Progress,
) -> Statistics:
    """Statistics as the user asked: a folder made before, or a calibration run (resumed if begun)."""
    texts: Texts = None
    if calibration == "self":
        texts = "self"
    elif calibration is not None:
        paths = [calibration] if isinstance(calibration, (str, Path)) else list(calibration)
        texts = [Path(p) for p in paths]
        if len(texts) == 1 and (texts[0] / "statistics.json").exists():
            statistics = Statistics.open(texts[0])
            check_same(statistics, source)
            return statistics
    return _calibrate(source, work / "statistics", texts, tokens, progress)


def warnings_of(statistics: Statistics) -> list[str]:
    """What a user should hear of a model even where all went well: one line each."""
    unused = statistics.unused
    if not unused:
        return []
    own = [i for i in statistics.infos.values() if not i.group]
    share = sum(statistics.infos[n].size for n in unused) / max(sum(i.size for i in own), 1)
    what = f"{unused[0]} and {len(unused) - 1} more" if len(unused) > 1 else unused[0]
    return [
        f"{what}, {share:.1%} of all parameters, are in the checkpoint but not in the model that "
        "config.json describes (has it fewer layers?): kept exact"
    ]


def calibrate_to(
    model: str | Path | Any,
    out: Path,
    texts: Texts = None,
    *,
    tokens: int = 32768,
    method: str = "fisher",
    seed: int = 0,
    force: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = quiet,
) -> Statistics:
    """Statistics of a model in a folder of their own; an interrupted run is continued.

    Parameters
    ----------
    model, force, trust_remote_code : as in `waterfill.compress`
    out : folder to make; until all is done the work goes on beside it
    texts, tokens, method, seed : as in `waterfill.calibrate.calibrate`
    """
    artifact.refuse_existing(out, force)
    source = open_source(model, trust_remote_code=trust_remote_code)
    artifact.refuse_existing(out, force, [source.path])
    work = out.with_name(out.name + ".work")
    try:
        _calibrate(source, work / "statistics", texts, tokens, progress, method=method, seed=seed)
        artifact.replace(work / "statistics", out)
    except OSError as error:
        raise artifact.explain(error, out) from error
    shutil.rmtree(work, ignore_errors=True)
    return Statistics.open(out)


def _calibrate(
    source: Source, folder: Path, texts: Texts, tokens: int, progress: Progress, **options: Any
) -> Statistics:
    from waterfill.calibrate import calibrate  # which needs torch; `plan` and `show` must not

    begun = folder.exists()
    try:
        with quiet_transformers():
            return calibrate(
                source,
                folder,
                texts,
                tokens=tokens,
                progress=lambda done, total, _: progress("calibrating", done, total),
                **options,
            )
    except WaterfillError:  # of the model or the text: there is nothing to go on from
        if not begun:
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                folder.parent.rmdir()
        raise

"""Eight-bit activations: ZeroQuant-FP (Wu et al. 2023), measured on held-out text."""

from __future__ import annotations

from collections.abc import Iterator

from bench.gallery import ordering
from bench.harness import Row
from bench.models import WINDOW, source_of, text_of

MODEL = "english-7m"


def rows(quick: bool) -> Iterator[Row]:
    """KL of rounded inputs under exact weights, form against form."""
    from waterfill import evaluate
    from waterfill.runtime.torch_model import load_original
    from waterfill.sources.text import load_tokenizer

    path = source_of(MODEL).path
    assert path is not None
    model = load_original(path, False)
    windows = evaluate.text_windows(
        [text_of(MODEL, held_out=True)],
        load_tokenizer(path, False),
        window=WINDOW[MODEL],
        max_tokens=1024 if quick else 4096,
    )
    nats = {
        form: evaluate.compare(model, model, windows, activations=form)["kl_nats"]
        for form in ("int8", "e4m3", "e5m2", "int8:tensor", "e4m3:tensor")
    }
    for better, worse in (
        ("e4m3", "int8"),
        ("e4m3:tensor", "int8:tensor"),
        ("e4m3", "e5m2"),
        ("int8", "int8:tensor"),
        ("e4m3", "e4m3:tensor"),
    ):
        note = f"{nats[better]:.3g} and {nats[worse]:.3g} nats per token, {windows.scored.sum()} scored"
        yield ordering(f"inputs in {better} <= {worse}", nats[better] / nats[worse], note)

"""Finding a value by its key, far back: ``python -m bench.cache needle``.

A small decoder is trained to recall: pairs of a key and a value lie among filler, and at the end keys are
asked for. The context with its questions is the prompt; then the questions are put a second time, one
token at a time, and only these answers count, so that they come out of the cache as the method holds it.
Evicting methods choose by attention, so the first questions are what tells them which pairs matter, as in
the protocols of their papers; a pair that no question of the prompt names is lost to them by design, and
is not asked for here.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bench.cache import KEPT
from bench.harness import Row
from waterfill.runtime.cache.cache import KVCache
from waterfill.runtime.cache.facts import facts_of
from waterfill.runtime.cache.fitting.calibrating import calibrate_cache
from waterfill.runtime.cache.fitting.statistics import (
    CacheStatistics,
    load_statistics,
    save_statistics,
)
from waterfill.runtime.cache.method import find_method, method_ids
from waterfill.types import BudgetError

SYMBOLS = 32  # keys, values and fillers, each
START, ASK, KEY = 1, 2, 3
VALUE, FILLER = KEY + SYMBOLS, KEY + 2 * SYMBOLS
LENGTHS = (512, 1024, 2048)
ASKED, PAIRS = 4, 24
BANDS = ("early", "middle", "late")
BAR = 0.95
GOOD = 0.995  # accuracy at which a stage of training ends
ROWS, BATCH = 64, 16  # sequences of a length, and how many share a cache
VARIANTS = ("elastic:merged=0", "elastic:merged=0,attention=mean")  # beside the methods
BYTES, TOKENS = 8, 10  # times fewer, for methods that code, and for those that evict


@dataclass(frozen=True, eq=False)
class Asked:
    """Sequences of one length.

    Attributes
    ----------
    prompt : int64 (rows, tokens), the context and its questions
    keys, values : int64 (rows, ASKED), what is asked for again, and the answers
    depth : float32 (rows, ASKED), where each pair lies, 0 the beginning to 1 the end
    """

    prompt: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    depth: torch.Tensor


def haystack(
    rows: int, length: int, pairs: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Filler with pairs in it: tokens (rows, length), keys, values and places of pairs (rows, pairs)."""
    ids = torch.randint(FILLER, FILLER + SYMBOLS, (rows, length), generator=generator)
    ids[:, 0] = START
    keys = torch.rand(rows, SYMBOLS, generator=generator).argsort(1)[:, :pairs] + KEY
    values = torch.randint(VALUE, VALUE + SYMBOLS, (rows, pairs), generator=generator)
    slots = torch.rand(rows, (length - 1) // 2, generator=generator).argsort(1)
    places = slots[:, :pairs] * 2 + 1
    ids.scatter_(1, places, keys).scatter_(1, places + 1, values)
    return ids, keys, values, places


def asked(rows: int, length: int, seed: int) -> Asked:
    """Sequences of `length` tokens when all is said; the pairs asked for lie anywhere."""
    generator = torch.Generator().manual_seed(seed)
    context = length - 4 * ASKED
    ids, keys, values, places = haystack(rows, context, PAIRS, generator)
    keys, values, places = keys[:, :ASKED], values[:, :ASKED], places[:, :ASKED]
    prompt = torch.cat([ids, _questions(keys)], 1)
    return Asked(prompt, keys, values, places / context)


def _questions(keys: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.full_like(keys, ASK), keys], 2).flatten(1)


# -- training ----------------------------------------------------------------------------------


def pairs_only(rows: int, length: int, pairs: int, generator: torch.Generator) -> tuple[Any, ...]:
    """Nothing but pairs, the same ones again and again, each to be known once it was there."""
    _, keys, values, _ = haystack(rows, 2 * SYMBOLS + 2, pairs, generator)
    which = torch.randint(0, pairs, (rows, length // 2), generator=generator)
    same = which[:, :, None] == which[:, None]
    known = (same & torch.ones_like(same[0]).tril(-1)).any(2)
    ids = torch.stack([keys.gather(1, which), values.gather(1, which)], 2).flatten(1)
    ids = torch.cat([torch.full((rows, 1), START), ids], 1)[:, :-1]
    return ids, 1 + 2 * torch.arange(length // 2), torch.where(known, values.gather(1, which), -100)


def with_questions(
    rows: int, length: int, pairs: int, generator: torch.Generator
) -> tuple[Any, ...]:
    """A haystack and questions, half of them answered in the text, some put again."""
    count = min(64, length // 8)
    ids, keys, values, _ = haystack(rows, length - 3 * count, pairs, generator)
    which = torch.randint(0, pairs, (rows, count), generator=generator)
    # The same again some questions later, as the evaluation asks.
    again = torch.rand(rows, count, generator=generator) < 0.5
    which = torch.where(again, which.roll(ASKED, 1), which)
    wanted = values.gather(1, which)
    answered = torch.rand(rows, count, generator=generator) < 0.3
    other = torch.full_like(wanted, ASK)
    items = torch.stack([other, keys.gather(1, which), torch.where(answered, wanted, other)], 2)
    at = length - 3 * count + 1 + 3 * torch.arange(count)
    return torch.cat([ids, items.flatten(1)], 1), at, wanted


# Sequences of what kind, tokens, pairs, rows, steps at most, rate of learning.
STAGES: tuple[tuple[Callable[..., tuple[Any, ...]], int, int, int, int, float], ...] = (
    (pairs_only, 64, 8, 16, 2000, 1e-3),
    (with_questions, 64, 8, 16, 400, 1e-3),
    (with_questions, 128, 16, 12, 300, 1e-3),
    (with_questions, 256, PAIRS, 8, 200, 1e-3),
    (with_questions, 512, PAIRS, 4, 150, 5e-4),
    (with_questions, 1024, PAIRS, 2, 150, 3e-4),
    (with_questions, 2048, PAIRS, 1, 120, 2e-4),
)
AT_LEAST = 40  # steps of a stage


def new_model(seed: int = 0) -> Any:
    """An untrained decoder; one head of its first layer begins by looking at the token before.

    Without that, finding out that the token before matters takes most of the training. Most pairs of
    dimensions hardly turn, so that keys match as well far away as they do nearby.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    width, base, strength, planes = 32, 1e6, 6.0, 3
    config = LlamaConfig(
        vocab_size=FILLER + SYMBOLS, hidden_size=128, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=width, attention_bias=True,
        max_position_embeddings=max(LENGTHS) + 64, pad_token_id=0, bos_token_id=START,
        eos_token_id=None, rope_parameters={"rope_type": "default", "rope_theta": base},
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    attention = model.model.layers[0].self_attn
    turn = base ** (-torch.arange(planes) * 2 / width)
    with torch.no_grad():
        attention.k_proj.bias[:planes] = strength
        for head in range(2):
            own = attention.q_proj.bias[head * width : (head + 1) * width]
            own[:planes] = strength * turn.cos()
            own[width // 2 : width // 2 + planes] = -strength * turn.sin()
    return model


def train(seed: int = 0, say: Callable[[str], None] = lambda text: None) -> Any:
    """A decoder that recalls."""
    model = new_model(seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    done = 0
    for kind, length, pairs, rows, most, rate in STAGES:
        mean = 0.0
        for step in range(most):
            done += 1
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, done / 50)
            ids, at, wanted = kind(rows, length, pairs, generator)
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, at]
            scores = model.lm_head(hidden).flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(scores, wanted.flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            right = (scores.argmax(1) == wanted.flatten()).sum() / (wanted >= 0).sum()
            mean += (float(right) - mean) * 0.05
            if step >= AT_LEAST and mean > GOOD:
                break
        say(f"{kind.__name__} of {length}: {step + 1} steps, {mean:.3f} right")
    return model.eval()


@functools.cache
def model(dtype: torch.dtype = torch.bfloat16) -> Any:
    """The trained decoder, kept under out/bench/cache."""
    from transformers import LlamaForCausalLM

    folder = KEPT / "needle"
    if not (folder / "config.json").is_file():
        train(say=lambda text: sys.stdout.write(f"  {text}\n")).save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@functools.cache
def statistics() -> CacheStatistics:
    """Of the decoder's cache on sequences as in training, kept beside it."""
    path = KEPT / "needle" / "cache.safetensors"
    if not path.is_file():
        generator = torch.Generator().manual_seed(1)
        windows = with_questions(24, 512, PAIRS, generator)[0]
        found = calibrate_cache(model(torch.float32), windows, protocol={"texts": ["needle"]})
        save_statistics(found, path)
    return load_statistics(path)


# -- evaluation --------------------------------------------------------------------------------


@torch.no_grad()
def right(sample: Asked, make: Callable[[], Any]) -> torch.Tensor:
    """bool (rows, ASKED): which second answers are right, over caches made for BATCH rows."""
    found = []
    for low in range(0, len(sample.prompt), BATCH):
        some, cache = slice(low, low + BATCH), make()
        model()(input_ids=sample.prompt[some], past_key_values=cache, logits_to_keep=1)
        answers = []
        for token in _questions(sample.keys[some]).split(1, 1):
            scores = model()(input_ids=token, past_key_values=cache).logits[:, -1]
            answers.append(scores.argmax(1))
        found.append(torch.stack(answers[1::2], 1) == sample.values[some])
    return torch.cat(found)


@dataclass(frozen=True, eq=False)
class Tried:
    """A way to hold a cache, and which answers came out of it, of one length.

    Attributes
    ----------
    what : the method, and its share of bytes or tokens
    barred : whether the share is the one that is asked for
    found : bool (rows, ASKED)
    more : what else there is to say
    """

    what: str
    barred: bool
    found: torch.Tensor
    more: str


def rows(quick: bool) -> Iterator[Row]:
    """The exact cache, then every method there is, by length, then by depth; a quarter of the sequences if `quick`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices so small gain nothing from more, and sums come out alike
    try:
        yield from _rows(ROWS // 4 if quick else ROWS)
    finally:
        torch.set_num_threads(threads)


def _rows(count: int) -> Iterator[Row]:
    from transformers import DynamicCache

    seen: dict[str, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {}
    for length in LENGTHS:
        sample = asked(count, length, seed=length)
        exact = right(sample, lambda: DynamicCache(config=model().config))
        share = float(exact.float().mean())
        note = f"{PAIRS} pairs, {ASKED} asked for, {len(exact)} sequences"
        yield Row(f"needle, {length} tokens: exact cache", share, "accuracy", 0.99, ">=", note)
        for id in (*method_ids(), *VARIANTS):
            one = tried(id, sample, length)
            if one is None:
                continue
            ratio = float(one.found.sum() / exact.sum())
            name, bar = f"needle, {length} tokens: {one.what}", (BAR, ">=") if one.barred else ()
            yield Row(name, ratio, "of exact", *bar, note=f"{by_depth(one, sample)}; {one.more}")
            if one.barred:
                seen.setdefault(one.what, []).append((one.found, exact, sample.depth))
    for what, parts in seen.items():
        found, exact, depth = (torch.cat(some) for some in zip(*parts, strict=True))
        for band, name in enumerate(BANDS):
            inside = band_of(depth) == band
            ratio = float(found[inside].sum() / exact[inside].sum())
            note = f"{int(inside.sum())} questions, of all lengths with a bar"
            yield Row(f"needle, {name} in the text: {what}", ratio, "of exact", BAR, ">=", note)


def band_of(depth: torch.Tensor) -> torch.Tensor:
    """Index of the band that each depth is in."""
    return (depth * len(BANDS)).long().clamp_max(len(BANDS) - 1)


def by_depth(one: Tried, sample: Asked) -> str:
    """Accuracy in each band."""
    bands = band_of(sample.depth)
    parts = (f"{b} {float(one.found[bands == i].float().mean()):.3f}" for i, b in enumerate(BANDS))
    return ", ".join(parts)


def tried(id: str, sample: Asked, tokens: int) -> Tried | None:
    """A method at its share of the tokens or bytes, or at the least it fits in; None: it does not compress."""
    exact_nbytes = tokens * BATCH * sum(f.token_nbytes for f in facts_of(model()) if f is not None)
    # Calibration needs gradients, which `right` has switched off.
    options: dict[str, Any] = {"tokens": tokens, "batch": BATCH, "statistics": statistics()}
    method, _, rest = id.partition(":")
    if find_method(method).evicts:
        text = ",".join(filter(None, (f"share={1 / TOKENS}", rest)))
        found, most = _through(sample, {"method": f"{method}:{text}", **options})
        bytes_too = f"1/{exact_nbytes / most:.1f} of the bytes"
        # A variant says why a method does as it does: the bar is the method's own.
        return Tried(f"{id} at 1/{TOKENS} of the tokens", not rest, found, bytes_too)
    for times in range(BYTES, 1, -1):
        try:
            found, most = _through(sample, {"method": id, "size": exact_nbytes // times, **options})
        except BudgetError:
            continue
        note = f"1/{exact_nbytes / most:.1f} of the bytes held"
        note += "" if times == BYTES else f"; 1/{times + 1} is too small for it"
        return Tried(f"{id} at 1/{times} of the bytes", times == BYTES, found, note)
    return None


def _through(sample: Asked, options: dict[str, Any]) -> tuple[torch.Tensor, int]:
    """Which answers are right over caches of these options, and the bytes of the largest."""
    held: list[int] = []
    caches: list[KVCache] = []

    def make() -> KVCache:
        held.extend(cache.nbytes for cache in caches)
        caches[:] = [KVCache(model(), **options)]
        return caches[0]

    found = right(sample, make)
    return found, max([*held, caches[0].nbytes])

"""Train the small Llama that waterfill ships as its demo model.

Run from the repository root:

    python training/train_demo.py --texts texts --out src/waterfill/data/demo --minutes 40

The budget is wall-clock time rather than steps, so the same command gives a
sensible learning-rate schedule on a slow machine and on a fast one.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS = "<s>"
EOS = "</s>"
VOCABULARY = 2048
CONTEXT = 512
STEP_TOKENS = 4096
PEAK_RATE = 3e-3
FINAL_RATE = 5e-5
WARMUP = 0.03
HELD_OUT = 0.02
TECHNICAL_PIECE = 4000
REPORT_STEPS = 250

# Short windows are cheaper per token, so most of the training uses them and
# only the last part teaches the positions beyond.
SHORT_WINDOW = 256
SHORT_SHARE = 0.75
ATTENTION_ROWS = 128

# How often each text is seen relative to its size. The stories are a small
# part of the data but the part a reader tries first, hence the repetition.
WEIGHTS = {"tinystories": 4.0, "c4": 1.0, "wiki": 1.0, "technical": 1.0}

STORY_START = re.compile(
    r"\n\n(?=Once upon a time|Once there (?:was|were)|"
    r"One day, (?:a|an|two) |There (?:was|were) once)"
)
WIKI_DOCUMENT = re.compile(r"<doc [^>]*>\n(.*?)\n*</doc>", re.DOTALL)

# Quotation marks of some stories were decoded with the wrong character set by
# their publisher. Left alone, the model learns to write them that way.
REPAIRS = {
    "â€œ": '"',
    "â€\x9d": '"',
    "â€™": "'",
    "â€\u02dc": "'",
    "â€¦": "...",
    "â€“": "-",
    "â€”": "-",
    "â€": '"',
}


@dataclass
class Source:
    """Token streams of one text, with the weight it is sampled by."""

    name: str
    train: torch.Tensor
    held_out: torch.Tensor
    weight: float


def split_documents(name: str, text: str) -> list[str]:
    """Cut one raw text into documents.

    Parameters
    ----------
    name
        Which text it is; each has its own way of marking documents.
    text
        The whole file.

    Returns
    -------
    list of str
        Non-empty documents in file order.
    """
    if name == "tinystories":
        documents = STORY_START.split(repair(text))
    elif name == "wiki":
        documents = WIKI_DOCUMENT.findall(text)
    elif name == "c4":
        documents = text.split("\n")
    else:
        documents = list(gather_paragraphs(text, TECHNICAL_PIECE))
    return [stripped for document in documents if (stripped := document.strip())]


def repair(text: str) -> str:
    """Undo the wrong decoding of quotation marks, apostrophes and dashes."""
    for wrong, right in REPAIRS.items():
        text = text.replace(wrong, right)
    return text


def gather_paragraphs(text: str, size: int) -> Iterator[str]:
    """Join paragraphs into pieces of roughly ``size`` characters.

    The technical text has no document marks, and paragraphs alone would be
    too short to teach the model anything about long contexts.
    """
    piece: list[str] = []
    length = 0
    for paragraph in text.split("\n\n"):
        piece.append(paragraph)
        length += len(paragraph)
        if length >= size:
            yield "\n\n".join(piece)
            piece, length = [], 0
    if piece:
        yield "\n\n".join(piece)


def read_documents(folder: Path, seed: int) -> dict[str, tuple[list[str], list[str]]]:
    """Read all texts and hold out a few documents of each.

    Returns
    -------
    dict
        Text name to (training documents, held-out documents).
    """
    shuffler = random.Random(seed)
    parts = {}
    for name in WEIGHTS:
        documents = split_documents(name, (folder / f"{name}.txt").read_text(encoding="utf-8"))
        shuffler.shuffle(documents)
        count = count_held_out(documents)
        parts[name] = (documents[count:], documents[:count])
    return parts


def count_held_out(documents: list[str]) -> int:
    """Count the leading documents that make up the held-out share of characters."""
    budget = HELD_OUT * sum(map(len, documents))
    count = 0
    while budget > 0:
        budget -= len(documents[count])
        count += 1
    return count


def train_tokenizer(documents: list[str]) -> Tokenizer:
    """Train a byte-level BPE, which encodes any text without an unknown token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    # BOS is added by default, as Llama's own tokenizer does; the trailing EOS
    # of training documents is not, or every prompt would look finished.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str]) -> torch.Tensor:
    """Encode documents as one stream, each wrapped in BOS and EOS."""
    stream: list[int] = []
    for encoding in tokenizer.encode_batch([document + EOS for document in documents]):
        stream.extend(encoding.ids)
    return torch.tensor(stream)


def prepare(folder: Path, seed: int) -> tuple[Tokenizer, list[Source]]:
    """Build the tokenizer and the token streams from a folder of texts."""
    parts = read_documents(folder, seed)
    repeated = [
        document for name, (train, _) in parts.items() for document in train * int(WEIGHTS[name])
    ]
    tokenizer = train_tokenizer(repeated)
    sources = [
        Source(name, encode(tokenizer, train), encode(tokenizer, held), WEIGHTS[name])
        for name, (train, held) in parts.items()
    ]
    return tokenizer, sources


def build_model(tokenizer: Tokenizer, hidden: int, layers: int, inner: int) -> LlamaForCausalLM:
    """Build the untrained model."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
    )
    return LlamaForCausalLM(config)


def blocked_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **unused: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention in blocks of query rows.

    On the CPU this trains nearly twice as fast as PyTorch's own fused
    attention, whose backward pass dominates the step of so small a model.
    Windows are never padded, so the mask argument carries nothing new.
    """
    groups = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(groups, 1).transpose(-1, -2)
    value = value.repeat_interleave(groups, 1)
    blocks = []
    for start in range(0, query.shape[2], ATTENTION_ROWS):
        rows = query[:, :, start : start + ATTENTION_ROWS] * scaling
        end = start + rows.shape[2]
        scores = rows @ key[..., :end]
        hidden = torch.full(scores.shape[-2:], -1e30, dtype=scores.dtype).triu(start + 1)
        with torch.autocast("cpu", enabled=False):
            shares = torch.softmax(scores + hidden, -1)
        blocks.append(shares @ value[:, :, :end])
    return torch.cat(blocks, 2).transpose(1, 2).contiguous(), None


def sample_batch(sources: list[Source], window: int, generator: torch.Generator) -> torch.Tensor:
    """Draw random windows, choosing the text of each by weighted size."""
    sizes = torch.tensor([source.weight * len(source.train) for source in sources])
    count = STEP_TOKENS // window
    chosen = torch.multinomial(sizes, count, replacement=True, generator=generator)
    rows = []
    for index in chosen.tolist():
        stream = sources[index].train
        start = int(torch.randint(len(stream) - window, (1,), generator=generator))
        rows.append(stream[start : start + window])
    return torch.stack(rows)


def next_token_loss(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of every token but the first."""
    logits = model(batch, use_cache=False).logits[:, :-1]
    flat = logits.reshape(-1, logits.shape[-1]).float()
    return torch.nn.functional.cross_entropy(flat, batch[:, 1:].reshape(-1))


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, stream: torch.Tensor) -> float:
    """Mean loss over a held-out stream, cut into whole windows."""
    windows = stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    model.eval()
    total = 0.0
    for part in torch.split(windows, 8):
        total += float(next_token_loss(model, part)) * len(part)
    model.train()
    return total / len(windows)


def report_held_out(model: LlamaForCausalLM, sources: list[Source]) -> dict[str, float]:
    """Perplexity on each held-out text and on all of them together."""
    losses = {source.name: held_out_loss(model, source.held_out) for source in sources}
    sizes = {source.name: len(source.held_out) for source in sources}
    mean = sum(losses[name] * sizes[name] for name in losses) / sum(sizes.values())
    return {name: math.exp(loss) for name, loss in {**losses, "all": mean}.items()}


def learning_rate(progress: float) -> float:
    """Linear warmup, then a cosine, as a function of the share of time used."""
    if progress < WARMUP:
        return PEAK_RATE * (progress + 1e-3) / (WARMUP + 1e-3)
    angle = math.pi * min(1.0, (progress - WARMUP) / (1 - WARMUP))
    return FINAL_RATE + (PEAK_RATE - FINAL_RATE) * (1 + math.cos(angle)) / 2


def make_optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """AdamW that decays matrices but not norms."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)


def train_step(
    model: LlamaForCausalLM,
    optimizer: torch.optim.AdamW,
    batch: torch.Tensor,
    rate: float,
    bf16: bool,
) -> float:
    """Take one optimizer step and return its loss."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    autocast = torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()
    with autocast:
        loss = next_token_loss(model, batch)
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def train(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    sources: list[Source],
    options: argparse.Namespace,
) -> int:
    """Train until the time is up, saving and reporting now and then.

    Returns
    -------
    int
        Number of tokens seen.
    """
    generator = torch.Generator().manual_seed(options.seed)
    optimizer = make_optimizer(model)
    start = time.monotonic()
    step, average, progress = 0, 0.0, 0.0
    while progress < 1:
        window = SHORT_WINDOW if progress < SHORT_SHARE else CONTEXT
        batch = sample_batch(sources, window, generator)
        loss = train_step(model, optimizer, batch, learning_rate(progress), options.bf16)
        average = loss if step == 0 else 0.98 * average + 0.02 * loss
        step += 1
        seconds = time.monotonic() - start
        progress = seconds / (60 * options.minutes)
        if step % 50 == 0:
            speed = step * STEP_TOKENS / seconds
            print(
                f"step {step}  loss {average:.3f}  {speed:.0f} tokens/s  {progress:.0%}", flush=True
            )
        if step % REPORT_STEPS == 0:
            save(model, tokenizer, options.out)
            print_perplexities(report_held_out(model, sources))
    return step * STEP_TOKENS


def print_perplexities(perplexities: dict[str, float]) -> None:
    """Print held-out perplexities on one line."""
    print(
        "held out:",
        "  ".join(f"{name} {value:.2f}" for name, value in perplexities.items()),
        flush=True,
    )


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write the model (as bfloat16) and its tokenizer in the Hugging Face layout."""
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config.update(do_sample=True, temperature=0.7, top_p=0.9)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)
    wrapped.save_pretrained(out)
    name_tokenizer_class(out / "tokenizer_config.json")


def name_tokenizer_class(path: Path) -> None:
    """Name the tokenizer class the way both transformers 4 and 5 understand."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train the demo model of waterfill.")
    parser.add_argument(
        "--texts", type=Path, default=Path("texts"), help="folder with the training texts"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("demo"), help="folder to write the model to"
    )
    parser.add_argument("--minutes", type=float, default=40.0, help="wall-clock time for training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--inner", type=int, default=384, help="width of the feed-forward blocks")
    parser.add_argument(
        "--bf16", action="store_true", help="multiply in bfloat16 (keeps float32 weights)"
    )
    return parser.parse_args()


def main() -> None:
    """Train, report and save."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    tokenizer, sources = prepare(options.texts, options.seed)
    print("training tokens:", {source.name: len(source.train) for source in sources}, flush=True)
    model = build_model(tokenizer, options.hidden, options.layers, options.inner)
    AttentionInterface.register("blocked", blocked_attention)
    model.set_attn_implementation("blocked")
    print("parameters:", sum(p.numel() for p in model.parameters()), flush=True)
    seen = train(model, tokenizer, sources, options)
    save(model, tokenizer, options.out)
    print("tokens seen:", seen)
    print_perplexities(report_held_out(model, sources))


if __name__ == "__main__":
    main()

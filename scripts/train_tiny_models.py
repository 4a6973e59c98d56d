"""Train the two embedded models, `tiny-llama` and `tiny-moe`, from real text on a CPU.

They exist so that everything in this project can be tried, tested and measured without a model hub. Both are real language
models in the ordinary Hugging Face layout: a 5.5 M parameter Llama, and a 5 M parameter OLMoE (16 experts, top-4, fused
3-D expert parameters) trained on seven kinds of text so that its experts specialise.

    python scripts/train_tiny_models.py tokenizer --text-dir TEXT --out OUT
    python scripts/train_tiny_models.py tiny-llama --text-dir TEXT --out OUT
    python scripts/train_tiny_models.py tiny-moe   --text-dir TEXT --out OUT

TEXT holds `train/` and `domains/` as listed in `SOURCES`. Training is deterministic for a given thread count, writes an atomic
checkpoint every `--save-every` steps and continues from it when started again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

VOCAB = 4096
SEQ = 256
HOLD_OUT = 0.04  # the last 4 % of every text is never trained on

# (label, files, passes): how often each text is read in one run. Encyclopaedic text is read more often because the literature's
# yardstick, WikiText-2, is encyclopaedic.
GUTENBERG = ("train/gutenberg/*.txt",)
SOURCES: dict[str, list[tuple[str, tuple[str, ...], int]]] = {
    "tiny-llama": [
        ("c4", ("train/c4.txt",), 2),
        ("wikipedia", ("train/wikipedia.txt",), 4),
        ("gutenberg", GUTENBERG, 1),
    ],
    "tiny-moe": [
        ("c4", ("train/c4.txt",), 1),
        ("wikipedia", ("train/wikipedia.txt",), 2),
        ("gutenberg", GUTENBERG, 1),
        ("stackexchange", ("domains/stackexchange.txt",), 1),
        ("github", ("domains/github.txt",), 2),
        ("pubmed", ("domains/pubmed.txt",), 2),
        ("shakespeare", ("domains/shakespeare.txt",), 2),
    ],
}


def read(text_dir: Path, patterns: tuple[str, ...]) -> list[str]:
    files = sorted(f for p in patterns for f in text_dir.glob(p))
    if not files:
        raise SystemExit(f"no files match {patterns} in {text_dir}")
    return [f.read_text(encoding="utf-8") for f in files]


def train_part(text: str) -> str:
    return text[: int(len(text) * (1 - HOLD_OUT))]


def train_tokenizer(text_dir: Path, out: Path) -> None:
    """Byte-level BPE of 4,096 tokens on all texts; token 0 is `<|endoftext|>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    def lines():
        for patterns in {p: None for s in SOURCES.values() for _, p, _ in s}:
            for text in read(text_dir, patterns):
                yield from train_part(text)[:2_000_000].splitlines(keepends=True)

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(
        lines(),
        trainers.BpeTrainer(
            vocab_size=VOCAB, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok, eos_token="<|endoftext|>", clean_up_tokenization_spaces=False, model_max_length=1 << 30
    )
    fast.save_pretrained(out / "tokenizer")
    print(f"tokenizer: {len(fast)} tokens -> {out / 'tokenizer'}")


def token_stream(name: str, text_dir: Path, out: Path) -> tuple[np.ndarray, dict[str, dict[str, float]]]:
    """All training tokens of one run as one array [blocks, SEQ + 1], shuffled with a fixed seed, and what it holds."""
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(out / "tokenizer")
    blocks, stats = [], {}
    for label, patterns, passes in SOURCES[name]:
        texts = [train_part(t) for t in read(text_dir, patterns)]
        ids: list[int] = []
        for text in texts:
            for start in range(0, len(text), 1 << 18):
                ids += tok(text[start : start + (1 << 18)], verbose=False)["input_ids"]
            ids.append(tok.eos_token_id)
        array = np.asarray(ids[: len(ids) // (SEQ + 1) * (SEQ + 1)], dtype=np.uint16).reshape(-1, SEQ + 1)
        blocks += [array] * passes
        stats[label] = {"bytes": sum(len(t.encode()) for t in texts), "tokens": len(ids), "passes": passes}
    stream = np.concatenate(blocks)
    np.random.default_rng(0).shuffle(stream)
    return stream, stats


def build(name: str) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM, OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    common: dict[str, Any] = {
        "vocab_size": VOCAB,
        # The length it is trained at: rotary positions do not carry a model of this size further.
        "max_position_embeddings": SEQ,
        "tie_word_embeddings": True,
        "rope_theta": 10000.0,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    if name == "tiny-llama":
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=256,
                intermediate_size=704,
                num_hidden_layers=6,
                num_attention_heads=8,
                num_key_value_heads=4,
                **common,
            )
        )
    return OlmoeForCausalLM(
        OlmoeConfig(
            hidden_size=192,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=6,
            num_experts=16,
            num_experts_per_tok=4,
            norm_topk_prob=True,
            output_router_logits=True,
            router_aux_loss_coef=0.01,
            **common,
        )
    )


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))))


def save_atomic(state: dict, path: Path) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def train(name: str, args: argparse.Namespace) -> None:
    stream, stats = token_stream(name, args.text_dir, args.out)
    steps = len(stream) // args.batch
    if args.max_steps:
        steps = min(steps, args.max_steps)
    model = build(name)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{name}: {parameters:,} parameters, {steps} steps of {args.batch}x{SEQ} tokens; {json.dumps(stats)}", flush=True)
    decay = [p for p in model.parameters() if p.dim() >= 2]
    other = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}], lr=1.0, betas=(0.9, 0.95), fused=True
    )
    checkpoint, start = args.out / f"{name}.checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
        print(f"continuing at step {start}", flush=True)
    began = time.monotonic()
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, args.lr)
        block = torch.from_numpy(stream[step * args.batch : (step + 1) * args.batch].astype(np.int64))
        with torch.autocast("cpu", torch.bfloat16):
            out = model(input_ids=block[:, :-1], labels=None)
            loss = torch.nn.functional.cross_entropy(out.logits.float().flatten(0, 1), block[:, 1:].flatten())
            total = loss
            if name == "tiny-moe":
                from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

                config = model.config
                # Layer by layer: over all layers at once, as transformers does it by default, the busy experts of one layer make
                # up for the dead ones of another.
                losses = [
                    load_balancing_loss_func((logits,), config.num_experts, config.num_experts_per_tok)
                    for logits in out.router_logits
                ]
                balance = torch.stack(losses).mean()
                total = loss + config.router_aux_loss_coef * balance
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0 or step == steps - 1:
            spent = time.monotonic() - began
            print(
                f"step {step}/{steps} loss {loss.item():.4f} {spent:.0f} s, {spent / (step - start + 1):.2f} s a step", flush=True
            )
        if (step + 1) % args.save_every == 0:
            save_atomic({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, checkpoint)
    finish(name, model, stats, steps, args)


@torch.no_grad()
def perplexity(model: torch.nn.Module, ids: list[int], seqlen: int = SEQ) -> float:
    windows = len(ids) // seqlen
    total = 0.0
    for i in range(windows):
        x = torch.tensor(ids[i * seqlen : (i + 1) * seqlen])[None]
        logits = model(input_ids=x).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, x[0, 1:], reduction="sum").item()
    return math.exp(total / (windows * (seqlen - 1)))


def finish(name: str, model: torch.nn.Module, stats: dict, steps: int, args: argparse.Namespace) -> None:
    """Save in bfloat16 (what is shipped is what is measured), then measure on the held-out part of every text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = args.out / name
    tok = AutoTokenizer.from_pretrained(args.out / "tokenizer")
    model.config.output_router_logits = False
    model.to(torch.bfloat16).save_pretrained(folder)
    tok.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    scores = {}
    for label, patterns, _ in SOURCES[name]:
        held = "".join(t[int(len(t) * (1 - HOLD_OUT)) :] for t in read(args.text_dir, patterns))[:400_000]
        scores[label] = round(perplexity(model, tok(held, verbose=False)["input_ids"]), 2)
    if args.wikitext2:
        for split in ("valid", "test"):
            text = (args.wikitext2 / f"{split}.txt").read_text(encoding="utf-8")
            scores[f"wikitext2-{split}"] = round(perplexity(model, tok(text, verbose=False)["input_ids"]), 2)
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_seen": steps * args.batch * SEQ,
        "steps": steps,
        "sources": stats,
        "perplexity": scores,
        "seqlen": SEQ,
        "peak_learning_rate": args.lr,
        "batch": args.batch,
    }
    (args.out / f"{name}.facts.json").write_text(json.dumps(facts, indent=1))
    print(json.dumps(facts, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tokenizer", "tiny-llama", "tiny-moe"])
    parser.add_argument("--text-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--wikitext2", type=Path, help="folder with valid.txt and test.txt, measured at the end")
    parser.add_argument("--batch", type=int, default=32, help="sequences of 256 tokens a step")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--max-steps", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.what == "tokenizer":
        train_tokenizer(args.text_dir, args.out)
    else:
        train(args.what, args)


if __name__ == "__main__":
    main()

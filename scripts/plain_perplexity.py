"""Perplexity of a model folder with nothing but torch and transformers: an independent check of what `compress` exports and prints.

python -I scripts/plain_perplexity.py FOLDER TEXT --seqlen 256 --limit 256 [--expect 12.34]
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("text", type=Path)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--expect", type=float, help="fail unless the perplexity is this, to 1e-4 relative")
    args = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    ids = tokenizer(args.text.read_bytes().decode("utf-8"), return_tensors="pt").input_ids[0]
    windows = ids[: len(ids) // args.seqlen * args.seqlen].view(-1, args.seqlen)[: args.limit]
    total = 0.0
    with torch.no_grad():
        for window in windows:
            logits = model(input_ids=window[None]).logits[0, :-1].float()
            total += torch.nn.functional.cross_entropy(logits, window[1:]).item()
    value = math.exp(total / len(windows))
    foreign = sorted(m for m in sys.modules if m.split(".")[0] in ("compress", "maskllm", "compress_kernels"))
    print(
        f"perplexity {value:.4f} over {len(windows)} windows of {args.seqlen}, plain transformers (modules of this project loaded: {len(foreign)})"
    )
    if args.expect is not None and abs(value / args.expect - 1) > 1e-4:
        sys.exit(f"expected {args.expect:.4f}")


if __name__ == "__main__":
    main()

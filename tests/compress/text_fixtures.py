"""A tiny tokenizer, tiny language models and small text files, built on the spot, for the tests of text and of evaluation."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB = 300
WORDS = (
    "the",
    "of",
    "a",
    "mask",
    "keeps",
    "two",
    "weights",
    "four",
    "group",
    "token",
    "window",
    "block",
    "Ångström",
    "naïve",
    "数字",
)


def prose(words: int, seed: int = 0) -> str:
    """Reproducible nonsense of so many words, with sentences and paragraphs."""
    draw = random.Random(seed)
    parts: list[str] = []
    for index in range(words):
        parts.append(draw.choice(WORDS))
        parts.append("\n\n" if index % 40 == 39 else ". " if index % 9 == 8 else " ")
    return "".join(parts).rstrip()


def tiny_tokenizer(
    *, bos: bool = False, adds_bos: bool = False, eos: bool = True, adds_eos: bool = False
) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 300 tokens. `bos`/`eos`: it has the token; `adds_bos`/`adds_eos`: it puts it around a text by itself."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(
        [prose(400)],
        trainers.BpeTrainer(
            vocab_size=VOCAB,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if adds_bos or adds_eos:
        template = ["<s>"] * adds_bos + ["$A"] + ["</s>"] * adds_eos
        tok.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        bos_token="<s>" if bos or adds_bos else None,
        eos_token="</s>" if eos or adds_eos else None,
        model_max_length=64,  # so that a longer text would warn
    )


def tiny_model(seed: int = 0, vocab: int = VOCAB, positions: int = 128) -> LlamaForCausalLM:
    """A random Llama of one layer whose predictions are far from uniform."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=positions,
            attention_dropout=0.5,  # so that a test sees whether evaluation mode was entered
        )
    )
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    return model


DOCUMENTS = ["first\none", "", "zweites – Ü", "third\r\nline", "4", "five five", "six", "seven", "eight", "nine"]


def record_lines(field: str = "text") -> str:
    return "".join(json.dumps({"id": i, field: document}) + "\n" for i, document in enumerate(DOCUMENTS))


def write_records(folder: Path, kind: str, field: str = "text") -> Path:
    """DOCUMENTS in one of the file formats."""
    path = folder / kind
    if kind.endswith(".parquet"):
        pq.write_table(pa.table({"id": list(range(len(DOCUMENTS))), field: DOCUMENTS}), path, row_group_size=3)
    elif kind.endswith(".gz"):
        path.write_bytes(gzip.compress(record_lines(field).encode()))
    elif kind == "array.json":
        path.write_text(json.dumps([{field: document} for document in DOCUMENTS], indent=1), encoding="utf-8")
    else:
        path.write_text(record_lines(field), encoding="utf-8")
    return path

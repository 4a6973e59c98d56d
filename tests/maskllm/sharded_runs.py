"""One process of several that learn a tiny network and share it out: run by test_sharding.py through torchrun.

    torchrun ... sharded_runs.py CASES.json FOLDER
    a case: {"name": ..., "build": "llama", "shard": "logits", "settings": {...}, "stop": step or null}

The first process writes what the network has learned and remembers, and the losses, to FOLDER/NAME.safetensors; each
process writes to FOLDER/NAME.RANK.json the bytes that it holds of masked weights, and whether the network is bit for bit what it was once
the masks are off.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from maskllm.checkpoint import CheckpointStore
from maskllm.gumbel import Schedule, prior_logits
from maskllm.learner import Learner
from maskllm.parametrization import MaskTarget, own_parameter
from maskllm.patterns import Pattern
from maskllm.settings import LearnSettings
from maskllm.sharding import Sharding

PATTERN = Pattern(2, 4)
VOCAB = 48
# Weights of 16 and 32 rows that are shared out evenly, of 20 rows unevenly, and of 20 columns: a process of two has none of their rows.
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": None,
}
BASE: dict[str, Any] = {
    "steps": 4,
    "batch": 6,
    "micro_batch": 1,
    "parametrization": "scores",
    "temperature": Schedule(2.0, 0.2),
    "scale": Schedule(100.0, 300.0),
    "learning_rate": 0.02,
    "regulariser": 1e-4,
    "kl_weight": 0.5,
    "bf16": False,
    "clip": 1e-2,
}


def network(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "llama":
        model: Any = LlamaForCausalLM(LlamaConfig(**SIZES))
    elif kind == "gpt2":  # weights [in, out]
        own = {"n_embd": 32, "n_inner": 20, "n_layer": 2, "n_head": 2, "n_positions": 32, "pad_token_id": None}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, **own))
    else:
        built = (
            (MixtralConfig, MixtralForCausalLM) if kind == "mixtral" else (GptOssConfig, GptOssForCausalLM)
        )  # [E, out, in], [E, in, out]
        config = built[0](**SIZES, num_local_experts=3, num_experts_per_tok=2)
        config._experts_implementation = "eager"
        model = built[1](config)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2, generator=draw)
    return model.eval()


def batches(step: int, size: int) -> Tensor:
    draw = torch.Generator().manual_seed(step)
    return torch.randint(VOCAB, (size, 12), generator=draw)


def learner(kind: str, settings: LearnSettings, shard: Sharding, folder: Path | None = None) -> Learner:
    model = network(kind)
    targets = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head" and not name.endswith("gate"):
            targets.append(MaskTarget(name, module, "weight", -1))
        if isinstance(module, Conv1D):
            targets.append(MaskTarget(name, module, "weight", -2))
        last = -2 if kind == "gpt_oss" else -1
        targets += [MaskTarget(f"{name}.{n}", module, n, last) for n, p in module.named_parameters(recurse=False) if p.dim() == 3]
    scores = {t.name: getattr(t.module, t.parameter_name).detach().abs().movedim(t.contracted_dim, -1) for t in targets}
    kept = {name: PATTERN.best_of(score) for name, score in scores.items()}
    prior = {t.name: kept[t.name].movedim(-1, t.contracted_dim) for t in targets}
    logits = {n: prior_logits(m, PATTERN, settings.parametrization, strength=3, std=0.01, noise=False) for n, m in kept.items()}
    store = CheckpointStore(folder, {"run": "one"}) if folder else None
    blocks = list(model.transformer.h if kind == "gpt2" else model.model.layers)
    return Learner(model, targets, PATTERN, settings, logits, prior, Accelerator(cpu=True), store, blocks, shard)


def held(one: Learner) -> int:
    """Bytes of the storages of masked weights in this process."""
    storages = [own_parameter(target).untyped_storage() for target in one.targets]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def run(case: dict[str, Any], folder: Path, shard: Sharding) -> None:
    """Learn; with `stop` up to there, saving a checkpoint, from which another case of the same `store` goes on."""
    settings = LearnSettings(**{**BASE, **case["settings"]})
    one = learner(case["build"], settings, shard, folder / case["store"] if "store" in case else None)
    one.resume()
    losses, norms = [], []
    for record in one.steps(batches):
        losses.append(record.loss)
        norms.append(record.gradient_norm)
        if record.step == case.get("stop"):
            one.save()
            break
    with one.final():
        scores = one.model(input_ids=batches(99, 2), use_cache=False).logits
    found = {**one.updates.tensors(), **{f"mask/{name}": mask for name, mask in one.masks().items()}}
    found |= {"losses": torch.tensor(losses), "norms": torch.tensor(norms), "scores": scores.detach()}
    with torch.no_grad(), one.state.using("dense"):
        found["dense"] = one.model(input_ids=batches(99, 2), use_cache=False).logits
    flips = one.flipped()
    found["flipped"] = torch.tensor([flips[target.name] for target in one.targets])
    bytes_held = held(one)
    if one.accelerator.is_main_process:
        save_file({k: v.contiguous().clone() for k, v in found.items()}, folder / f"{case['name']}.safetensors")
    one.close()
    before = network(case["build"]).state_dict()
    same = all(torch.equal(value, before[name]) for name, value in one.model.state_dict().items())
    facts = {"bytes": bytes_held, "restored": same and before.keys() == one.model.state_dict().keys()}
    (folder / f"{case['name']}.{one.accelerator.process_index}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    Accelerator(cpu=True)  # meets the other processes
    for case in json.loads(Path(sys.argv[1]).read_text()):
        run(case, Path(sys.argv[2]), case.get("shard", "logits"))
    torch.distributed.destroy_process_group()

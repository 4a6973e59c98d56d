"""Tiny random models, one function an architecture: the real transformers classes with two layers and a vocabulary of 128.

Every size is divisible by 8. Weights are drawn with a fixed seed and a spread that makes routers choose different experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

VOCAB = 128
Model = Any  # a PreTrainedModel, whose annotations type-checkers cannot follow (`.to`, submodules)


def _build(config: transformers.PreTrainedConfig, seed: int = 0) -> Model:
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or name.endswith(("bias", "sinks")):
                parameter.normal_(0, 0.2 if parameter.dim() > 1 else 0.02, generator=generator)
    return model.eval()


_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def build(config: Callable[..., transformers.PreTrainedConfig], **changes: Any) -> Model:
    """Any architecture whose configuration has the common keys."""
    return _build(config(**{**_BASE, **changes}))


def llama(**changes: Any) -> Model:
    return build(transformers.LlamaConfig, **changes)


def qwen3(**changes: Any) -> Model:
    return _build(transformers.Qwen3Config(**{**_BASE, "tie_word_embeddings": True, **changes}))


def gemma3(**changes: Any) -> Model:
    """One layer with sliding attention (window 8), one with full: masks and position embeddings differ by layer."""
    own = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8}
    return _build(transformers.Gemma3TextConfig(**{**_BASE, **own, "tie_word_embeddings": True, **changes}))


def gpt2(**changes: Any) -> Model:
    own = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
    return _build(transformers.GPT2Config(**{**own, **changes}))


def mixtral(**changes: Any) -> Model:
    return _build(transformers.MixtralConfig(**{**_BASE, "num_local_experts": 4, "num_experts_per_tok": 2, **changes}))


def qwen2_moe(**changes: Any) -> Model:
    own = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "decoder_sparse_step": 1,
    }
    return _build(transformers.Qwen2MoeConfig(**{**_BASE, **own, **changes}))


def qwen3_moe(**changes: Any) -> Model:
    own = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
    return _build(transformers.Qwen3MoeConfig(**{**_BASE, **own, **changes}))


def olmoe(**changes: Any) -> Model:
    own = {"num_experts": 4, "num_experts_per_tok": 2}
    return _build(transformers.OlmoeConfig(**{**_BASE, **own, **changes}))


_DEEPSEEK: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}


def deepseek_v2(**changes: Any) -> Model:
    """A dense first layer, then a mixture; queries without low-rank factors as in V2-Lite."""
    own = {"q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1}
    return _build(transformers.DeepseekV2Config(**{**_BASE, **_DEEPSEEK, **own, **changes}))


def deepseek_v3(**changes: Any) -> Model:
    own = {"n_group": 1, "topk_group": 1}
    return _build(transformers.DeepseekV3Config(**{**_BASE, **_DEEPSEEK, **own, **changes}))


def gpt_oss(**changes: Any) -> Model:
    own = {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    return _build(transformers.GptOssConfig(**{**_BASE, **own, **changes}))


def llama4(**changes: Any) -> Model:
    """A dense first layer, then a mixture with a shared expert; chunked and full attention."""
    own = {
        "intermediate_size_mlp": 40,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "moe_layers": [1],
        "attention_chunk_size": 8,
        "layer_types": ["chunked_attention", "full_attention"],
        "no_rope_layers": [1, 0],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    return _build(transformers.Llama4TextConfig(**{**_BASE, **own, **changes}))


BUILDERS: dict[str, Callable[..., Model]] = {
    "llama": llama,
    "qwen3": qwen3,
    "gemma3": gemma3,
    "gpt2": gpt2,
    "mixtral": mixtral,
    "qwen2_moe": qwen2_moe,
    "qwen3_moe": qwen3_moe,
    "olmoe": olmoe,
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
    "gpt_oss": gpt_oss,
    "llama4": llama4,
}


def tokens(batch: int = 2, length: int = 24, seed: int = 0) -> torch.Tensor:
    """Random token ids, int64 `[batch, length]`."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))

"""find_weights: the exact matrices of every architecture, as views that cover each parameter once."""

from __future__ import annotations

import copy

import pytest
import tiny_configs
import torch
import transformers
from tiny_configs import BUILDERS
from torch import nn

from compress.errors import CompressError, UsageError
from compress.weights import by_parameter, decoder_blocks, find_weights

Shapes = dict[str, tuple[int, int]]


def mlp(inner: int, prefix: str = "mlp") -> Shapes:
    return {f"{prefix}.{p}_proj.weight": (inner, 32) for p in ("gate", "up")} | {f"{prefix}.down_proj.weight": (32, inner)}


def experts(count: int, inner: int, prefix: str = "mlp") -> Shapes:
    shapes: Shapes = {}
    for e in range(count):
        shapes |= {f"{prefix}.experts.{e}.{p}_proj": (inner, 32) for p in ("gate", "up")}
        shapes[f"{prefix}.experts.{e}.down_proj"] = (32, inner)
    return shapes


ATTENTION: Shapes = {f"self_attn.{p}_proj.weight": (32 if p in "qo" else 16, 32) for p in "qkvo"}
LATENT: Shapes = {
    "self_attn.kv_a_proj_with_mqa.weight": (24, 32),
    "self_attn.kv_b_proj.weight": (64, 16),
    "self_attn.o_proj.weight": (32, 32),
}
V2 = LATENT | {"self_attn.q_proj.weight": (64, 32)}
V3 = LATENT | {"self_attn.q_a_proj.weight": (16, 32), "self_attn.q_b_proj.weight": (64, 16)}
GPT2: Shapes = {
    "attn.c_attn.weight": (96, 32),
    "attn.c_proj.weight": (32, 32),
    "mlp.c_fc.weight": (128, 32),
    "mlp.c_proj.weight": (32, 128),
}
DENSE = ATTENTION | mlp(48)
SHARED = mlp(24, "mlp.shared_experts")
# The two layers of every model, written out from the architectures' papers and not from what the code says.
EXPECTED: dict[str, tuple[Shapes, Shapes]] = {
    "llama": (DENSE, DENSE),
    "qwen3": (DENSE, DENSE),
    "gemma3": (DENSE, DENSE),
    "gpt2": (GPT2, GPT2),
    "mixtral": (ATTENTION | experts(4, 48),) * 2,
    "qwen2_moe": (ATTENTION | experts(4, 24) | mlp(40, "mlp.shared_expert"),) * 2,
    "qwen3_moe": (ATTENTION | experts(8, 24),) * 2,
    "olmoe": (ATTENTION | experts(4, 48),) * 2,
    "deepseek_v2": (V2 | mlp(48), V2 | experts(4, 24) | SHARED),
    "deepseek_v3": (V3 | mlp(48), V3 | experts(4, 24) | SHARED),
    "gpt_oss": (ATTENTION | experts(4, 48),) * 2,
    "llama4": (
        ATTENTION | mlp(40, "feed_forward"),
        ATTENTION | experts(4, 48, "feed_forward") | mlp(48, "feed_forward.shared_expert"),
    ),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_finds_exactly_the_matrices_of_the_architecture(name: str) -> None:
    model = BUILDERS[name]()
    stack = "transformer.h" if name == "gpt2" else "model.layers"
    expected = {f"{stack}.{i}.{key}": shape for i, layer in enumerate(EXPECTED[name]) for key, shape in layer.items()}
    refs = find_weights(model)
    assert {ref.name: ref.shape for ref in refs} == expected
    assert len(refs) == len(expected)
    assert [(b.name, b.index) for b in decoder_blocks(model)] == [(f"{stack}.0", 0), (f"{stack}.1", 1)]
    for ref in refs:
        assert ref.name.startswith(f"{stack}.{ref.layer}.")
        assert ref.role == ref.name.removesuffix(".weight").rpartition(".")[2]
        assert ref.expert == (int(ref.name.split(".experts.")[1].split(".")[0]) if ".experts." in ref.name else None)
        assert ref.parameter is dict(model.named_parameters())[ref.full_name]
        assert ref.parameter.shape[ref.contracted_dim] == ref.shape[1]
    order = list(dict(model.named_parameters()))
    assert [order.index(ref.full_name) for ref in refs] == sorted(order.index(ref.full_name) for ref in refs)


@pytest.mark.parametrize("name", BUILDERS)
def test_views_cover_each_parameter_exactly_once_in_its_own_memory(name: str) -> None:
    model = BUILDERS[name]()
    untouched = {k: p.clone() for k, p in model.named_parameters()}
    refs = find_weights(model)
    for number, ref in enumerate(refs, start=1):
        assert ref.view().untyped_storage().data_ptr() == ref.parameter.untyped_storage().data_ptr()
        ref.view().fill_(number)
    for parameter in by_parameter(refs):
        values, counts = parameter.refs[0].parameter.unique(return_counts=True)
        written = {float(refs.index(ref) + 1): ref.shape[0] * ref.shape[1] for ref in parameter.refs}
        assert dict(zip(values.tolist(), counts.tolist(), strict=True)) == written
    found = {ref.full_name for ref in refs}
    assert all(torch.equal(p, untouched[k]) for k, p in model.named_parameters() if k not in found)


@pytest.mark.parametrize("name", BUILDERS)
def test_the_reported_matrix_is_the_one_that_is_applied(name: str) -> None:
    """Gate, up and down of one feed-forward network or expert, applied by hand, give what its module gives."""
    model = BUILDERS[name]()
    layer = 1
    refs = {ref.name: ref for ref in find_weights(model)}
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    if name == "gpt2":
        block = model.transformer.h[layer].mlp
        w1, w2 = (refs[f"transformer.h.1.mlp.{r}.weight"].view() for r in ("c_fc", "c_proj"))
        by_hand = block.act(x @ w1.T + block.c_fc.bias) @ w2.T + block.c_proj.bias
        torch.testing.assert_close(by_hand, block(x), rtol=1e-4, atol=1e-5)
        return
    fused = next(
        (m for n, m in model.model.layers[layer].named_modules() if n.endswith("experts") and hasattr(m, "gate_up_proj")), None
    )
    if fused is None:
        block = model.model.layers[layer].mlp
        gate, up, down = (refs[f"model.layers.1.mlp.{r}_proj.weight"].view() for r in ("gate", "up", "down"))
        torch.testing.assert_close((block.act_fn(x @ gate.T) * (x @ up.T)) @ down.T, block(x), rtol=1e-4, atol=1e-5)
        return
    expert, prefix = 2, next(n for n, m in model.named_modules() if m is fused)
    gate, up, down = (refs[f"{prefix}.{expert}.{r}_proj"].view() for r in ("gate", "up", "down"))
    if name == "gpt_oss":
        bias = fused.gate_up_proj_bias[expert]
        g = (x @ gate.T + bias[0::2]).clamp(max=fused.limit)
        u = (x @ up.T + bias[1::2]).clamp(-fused.limit, fused.limit)
        by_hand = (g * torch.sigmoid(fused.alpha * g) * (u + 1)) @ down.T + fused.down_proj_bias[expert]
    else:
        by_hand = (fused.act_fn(x @ gate.T) * (x @ up.T)) @ down.T
    # Llama-4's experts take the tokens of all experts, one expert's after the other's; the others take the routing.
    routing = () if name == "llama4" else (torch.full((5, 1), expert), torch.ones(5, 1))
    real = fused(x, *routing) if routing else fused(x.repeat(4, 1)).view(4, 5, 32)[expert]
    torch.testing.assert_close(by_hand, real, rtol=1e-4, atol=1e-5)


def test_slice_of_finds_the_same_place_in_another_tensor() -> None:
    for ref in find_weights(tiny_configs.gpt_oss()):
        assert torch.equal(ref.slice_of(ref.parameter.detach().clone()), ref.view())


def test_experts_in_a_module_list_and_routers_by_structure() -> None:
    """A mixture as remote code writes it: nn.Linear experts in a list, a Linear router, names that say nothing."""

    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w2 = nn.Linear(16, 24), nn.Linear(24, 16)

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chooser, self.parts = nn.Linear(16, 3), nn.ModuleList(Expert() for _ in range(3))

    model = nn.Module()
    model.stack = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(16, 16), "m": Mixture()}) for _ in range(2))
    refs = find_weights(model)
    assert len(refs) == 2 * (1 + 3 * 2)
    assert not any("chooser" in ref.name for ref in refs)
    third = next(ref for ref in refs if ref.name == "stack.1.m.parts.2.w1.weight")
    assert (third.expert, third.role, third.layer, third.contracted_dim, third.shape) == (2, "w1", 1, -1, (24, 16))
    assert [ref.name for ref in find_weights(model, ["*chooser*"])] == ["stack.0.m.chooser.weight", "stack.1.m.chooser.weight"]


@pytest.mark.parametrize(("gate_up", "down", "dim"), [((3, 16, 16), (3, 16, 8), -1), ((3, 16, 16), (3, 8, 16), -2)])
def test_fused_layout_without_flags_comes_from_the_shapes(gate_up: tuple[int, ...], down: tuple[int, ...], dim: int) -> None:
    """gate_up alone is square, so only the projection down tells how the experts are stored."""
    model = tiny_configs.mixtral(hidden_size=16, intermediate_size=8, num_local_experts=3, num_attention_heads=2)
    for layer in model.model.layers:
        moe = nn.Module()
        moe.gate_up_proj, moe.down_proj = nn.Parameter(torch.randn(gate_up)), nn.Parameter(torch.randn(down))
        layer.mlp.experts = moe
    refs = [ref for ref in find_weights(model) if ref.expert is not None]
    assert {ref.contracted_dim for ref in refs} == {dim}
    assert {ref.role: ref.shape for ref in refs} == {"gate_proj": (8, 16), "up_proj": (8, 16), "down_proj": (16, 8)}
    for layer in model.model.layers:
        del layer.mlp.experts.down_proj
    with pytest.raises(UsageError, match="neither flags nor shapes"):
        find_weights(model)
    assert find_weights(model, exclude=["*.experts.*"])


def test_patterns_on_matrix_names_and_parameter_names() -> None:
    model = tiny_configs.mixtral()
    assert {r.expert for r in find_weights(model, ["*.experts.2.*"])} == {2}
    assert len(find_weights(model, ["model.layers.0.mlp.experts.gate_up_proj"])) == 8
    assert not any(r.expert is not None for r in find_weights(model, exclude=["*.experts.*"]))
    assert {r.layer for r in find_weights(model, ["model.layers.1.*"], ["*.experts.*", "lm_head*"])} == {1}
    # "*gate*" means the gate projections; the router `mlp.gate` only when a pattern names nothing else.
    assert {r.role for r in find_weights(model, ["*gate*"])} >= {"gate_proj"}
    assert not any(r.full_name.endswith("mlp.gate.weight") for r in find_weights(model, ["*gate*"]))
    assert [r.name for r in find_weights(model, ["*.mlp.gate.weight"])] == [f"model.layers.{i}.mlp.gate.weight" for i in (0, 1)]
    assert [r.name for r in find_weights(model, ["lm_head*"])] == ["lm_head.weight"]
    with pytest.raises(UsageError, match="select nothing together"):
        find_weights(model, ["*.q_proj.*"], ["*.self_attn.*"])


@pytest.mark.parametrize("kind", ["include", "exclude"])
def test_a_pattern_without_match_names_the_nearest(kind: str) -> None:
    with pytest.raises(UsageError, match=r"'\*q_prj\*'.*self_attn\.q_proj"):
        find_weights(tiny_configs.llama(), **{kind: ["*q_prj*"]})


def test_norms_embeddings_and_tied_heads_are_refused_with_the_reason() -> None:
    with pytest.raises(UsageError, match="not a weight matrix"):
        find_weights(tiny_configs.llama(), ["*norm*"])
    with pytest.raises(UsageError, match="not a weight matrix"):
        find_weights(tiny_configs.llama(), ["*embed_tokens*"])
    for builder in (tiny_configs.qwen3, tiny_configs.gpt2):
        with pytest.raises(UsageError, match="tied"):
            find_weights(builder(), ["lm_head*"])
        assert find_weights(builder(), exclude=["lm_head*"])


def test_a_part_of_a_fused_parameter_is_no_parameter() -> None:
    model = tiny_configs.gpt_oss()
    with pytest.raises(UsageError, match=r"experts\.gate_up_proj"):
        by_parameter(find_weights(model, ["*.gate_proj"]))
    whole = by_parameter(find_weights(model))
    assert [p.name for p in whole] == list(dict.fromkeys(r.full_name for r in find_weights(model)))
    assert {len(p.refs) for p in whole if p.parameter_name == "gate_up_proj"} == {8}


def test_works_without_weights_on_the_meta_device() -> None:
    model = tiny_configs.qwen3_moe()
    assert [(r.name, r.shape) for r in find_weights(copy.deepcopy(model).to("meta"))] == [
        (r.name, r.shape) for r in find_weights(model)
    ]
    tied = tiny_configs.qwen3().to("meta")
    tied.tie_weights()  # moving to the meta device makes two parameters of one
    with pytest.raises(UsageError, match="tied"):
        find_weights(tied, ["lm_head*"])


def test_a_masked_parameter_does_not_pass_for_the_weight() -> None:
    class Half(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight / 2

    model = tiny_configs.llama()
    ref = find_weights(model)[0]
    nn.utils.parametrize.register_parametrization(ref.module, "weight", Half())
    with pytest.raises(CompressError, match="parametrization"):
        ref.view()


def test_a_model_without_decoder_layers_is_refused() -> None:
    with pytest.raises(UsageError, match="no list of decoder layers"):
        find_weights(nn.Sequential(nn.Linear(8, 8)))


def test_vision_towers_are_left_alone() -> None:
    """The tower has more layers and more weights than the language model; only the latter's blocks are decoder blocks."""
    text = tiny_configs.gemma3().config
    vision = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    }
    config = transformers.Gemma3Config(text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    assert sum(p.numel() for n, p in model.named_parameters() if "vision" in n) > 4 * sum(
        r.view().numel() for r in find_weights(model)
    )
    assert [block.name for block in decoder_blocks(model)] == [f"model.language_model.layers.{i}" for i in (0, 1)]
    assert {ref.name.split(".layers.")[0] for ref in find_weights(model)} == {"model.language_model"}

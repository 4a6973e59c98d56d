"""Streaming, profiling and quantising mixtures of every architecture: against brute force, resumable, one block in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_configs
import torch
import transformers
from text_fixtures import tiny_tokenizer
from tiny_configs import BUILDERS

from compress.errors import UsageError
from compress.moe.allocate import Budget
from compress.moe.assign import assign, matrix_bytes, statistics, statistics_json, super_experts
from compress.moe.mixture import find_mixture
from compress.moe.modes import Options, allocate_experts
from compress.moe.profile import profile_experts
from compress.moe.profile_store import LayerProfile, ProfileStore
from compress.moe.quantize_expert import Tokens, quantize_expert
from compress.moe.statistics import parse_statistics
from compress.packed_moe import LowBitMatrix
from compress.quantize.grid import Grid
from compress.quantize.model import quantize_model, rest_widths
from compress.quantize.quantizer import Quantizer
from compress.quantize.store import QuantizedStore, put_into
from compress.recipe_quantize import RestSection
from compress.stream import StreamedModel, open_streamed
from compress.structure import decoder_blocks
from compress.walk import eager_experts, measuring
from compress.weights import find_weights


def phimoe(**changes: Any) -> Any:
    own = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return tiny_configs._build(transformers.PhimoeConfig(**{**tiny_configs._BASE, **own, **changes}))


ARCHITECTURES = {
    **{n: BUILDERS[n] for n in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss")},
    "phimoe": phimoe,
}
PAIRS = ((1, 16), (2, 16), (4, 16))
QUANTIZER = Quantizer()


def saved(folder: Path, name: str, **changes: Any) -> tuple[Any, Path]:
    model = ARCHITECTURES[name](**changes)
    model.save_pretrained(folder / name)
    tiny_tokenizer().save_pretrained(folder / name)
    return model, folder / name


def batches(count: int = 2) -> list[torch.Tensor]:
    return [tiny_configs.tokens(2, 24, seed=i) for i in range(count)]


def in_memory(model: Any) -> StreamedModel:
    from compress.models import LoadedModel

    return StreamedModel(LoadedModel(model, None, "test"), None, torch.device("cpu"))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_streamed_model_puts_out_what_the_whole_one_does(name: str, tmp_path: Path) -> None:
    model, folder = saved(tmp_path, name)
    streamed = open_streamed(str(folder), stream=True)
    ids = tiny_configs.tokens()
    with torch.no_grad():
        assert torch.equal(streamed.model(input_ids=ids).logits, model(input_ids=ids).logits)
    for block in streamed.blocks:
        assert all(p.is_meta for p in block.module.parameters())
        with streamed.holding(block):
            assert not any(p.is_meta for p in block.module.parameters())
    assert not open_streamed(str(folder)).streamed  # small enough to be loaded whole


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_errors_are_those_of_the_block_with_one_expert_quantised(name: str, tmp_path: Path) -> None:
    """The identity over routed tokens against running the whole MoE block again, and single matrices likewise."""
    model = ARCHITECTURES[name]()
    texts = [*batches(), tiny_configs.tokens(1, 24, seed=7)]  # the last batch of a text may have fewer sequences
    store = ProfileStore(tmp_path, {})
    refs = find_weights(model)
    assert profile_experts(in_memory(model), refs, texts, PAIRS, QUANTIZER, store, fisher=True)
    block = decoder_blocks(model)[1]
    mixture = find_mixture(model, block, refs)
    assert mixture is not None
    profile = store.read(1)
    assert profile.shapes == {role: ref.shape for role, ref in mixture.experts[0].refs.items()}
    expert = mixture.experts[int(profile.frequency.argmax())]

    caught: list[torch.Tensor] = []
    hook = block.module.register_forward_hook(lambda m, a, out: caught.append(out))
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    before = mixture.module.register_forward_pre_hook(lambda m, args: seen.append(args))
    with torch.no_grad(), eager_experts(model):
        for ids in texts:
            model(input_ids=ids)
    before.remove()
    plain = torch.cat(caught)
    hidden, index, weights = (torch.cat(part) for part in zip(*seen, strict=True))
    assert profile.frequency[expert.index] == int((index == expert.index).sum())
    assert profile.residual == pytest.approx(float(plain.double().norm()), rel=1e-5)
    token, slot = (index == expert.index).nonzero(as_tuple=True)
    tokens = Tokens(hidden[token], weights[token, slot])
    with measuring(model):
        made = quantize_expert(expert, tokens, dict.fromkeys(expert.refs, PAIRS[1]), QUANTIZER)

    gradient = []
    for ids in texts:  # the gradient of the summed loss at the block's output, from the whole graph
        kept: list[torch.Tensor] = []

        def keep(m: Any, a: Any, out: torch.Tensor, kept: list[torch.Tensor] = kept) -> torch.Tensor:
            kept.append(out.detach().requires_grad_(True))
            return kept[-1]

        handle = block.module.register_forward_hook(keep)
        with eager_experts(model):
            logits = model(input_ids=ids).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        gradient.append(torch.autograd.grad(loss, kept[0])[0])
        handle.remove()

    for roles, squared, fisher in [
        (list(expert.refs), profile.squared, profile.fisher),
        *[([role], *profile.by_role[role]) for role in expert.refs],
    ]:
        originals = {role: expert.refs[role].view().clone() for role in roles}
        caught.clear()
        with torch.no_grad(), eager_experts(model):
            for role in roles:
                expert.refs[role].view().copy_(made[role].quantized.dequantize())
            for ids in texts:
                model(input_ids=ids)
            for role in roles:
                expert.refs[role].view().copy_(originals[role])
        change = torch.cat(caught).double() - plain.double()
        assert squared[expert.index, 1] == pytest.approx(float(change.square().sum()), rel=2e-3)
        assert fisher is not None
        expected = float((change.square() * torch.cat(gradient).double().square()).sum())
        assert fisher[expert.index, 1] == pytest.approx(expected, rel=2e-3)
    hook.remove()


def test_error_does_not_grow_with_bits(tmp_path: Path) -> None:
    model = ARCHITECTURES["olmoe"]()
    store = ProfileStore(tmp_path, {})
    pairs = tuple((bits, 16) for bits in (1, 2, 3, 4, 8))
    profile_experts(in_memory(model), find_weights(model), batches(8), pairs, QUANTIZER, store)
    for layer in store.layers():
        assert (np.diff(store.read(layer).squared, axis=1) <= 0).all()


def test_down_is_calibrated_on_what_the_quantised_gate_and_up_put_out() -> None:
    model = ARCHITECTURES["qwen3_moe"]()
    mixture = find_mixture(model, decoder_blocks(model)[0], find_weights(model))
    assert mixture is not None
    expert = mixture.experts[0]
    tokens = Tokens(torch.randn(200, 32), torch.rand(200))
    with measuring(model):
        made = quantize_expert(expert, tokens, dict.fromkeys(expert.refs, (2, 16)), QUANTIZER)
        gate, up = (tokens.hidden @ made[role].quantized.dequantize().T for role in ("gate_proj", "up_proj"))
    inner = torch.nn.functional.silu(gate) * up
    alone = QUANTIZER.quantize(expert.refs["down_proj"].view(), QUANTIZER.gram(inner, tokens.weights), 2, 16, 200)
    same = (alone.quantized.codes == made["down_proj"].quantized.codes).float().mean()
    assert same > 0.98  # the gram sums in another order, which may decide a tie


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_streamed_and_whole_quantise_to_the_same_codes(name: str, tmp_path: Path) -> None:
    model, folder = saved(
        tmp_path, name, num_hidden_layers=3, **({"layer_types": ["full_attention"] * 3} if name == "gpt_oss" else {})
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    stores = []
    for streamed in (in_memory(model), open_streamed(str(folder), stream=True)):
        refs = find_weights(streamed.model)
        shapes = {b.index: m for b in streamed.blocks if (m := find_mixture(streamed.model, b, refs)) is not None}
        widths = {i: [dict.fromkeys(m.roles, (2 + e % 2, 16)) for e in range(len(m.experts))] for i, m in shapes.items()}
        store = QuantizedStore(tmp_path / f"store{len(stores)}")
        rest = rest_widths(refs, [RestSection(include=["*q_proj*", "*kv_b*"], bits=None), RestSection(bits=4)], 16)
        assert quantize_model(streamed, refs, batches(), widths, rest, QUANTIZER, store)
        stores.append(store)
    assert stores[0].grids() == stores[1].grids()
    for matrix in stores[0].grids():
        assert "q_proj" not in matrix
        a, b = (store.read(matrix) for store in stores)
        assert torch.equal(a.codes, b.codes)
        assert torch.equal(a.scale, b.scale)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())  # the model in memory is as it was
    put_into(model, stores[0])
    for ref in find_weights(model):
        if ref.name in stores[0].grids():
            assert torch.equal(ref.view(), stores[0].read(ref.name).dequantize(ref.parameter.dtype))


def test_an_interrupted_run_ends_in_the_same_bits(tmp_path: Path) -> None:
    model = ARCHITECTURES["olmoe"](num_hidden_layers=3)
    refs = find_weights(model)
    widths = {i: [dict.fromkeys(("gate_proj", "up_proj", "down_proj"), (2, 16))] * 4 for i in range(3)}
    rest = rest_widths(refs, [RestSection(bits=4)], 16)

    def quantise(folder: str, stop_after: int | None) -> tuple[bool, QuantizedStore]:
        store, asked = QuantizedStore(tmp_path / folder), iter(range(100))
        stop = (lambda: False) if stop_after is None else (lambda: next(asked) >= stop_after)
        return quantize_model(in_memory(model), refs, batches(), widths, rest, QUANTIZER, store, asked_to_stop=stop), store

    done, straight = quantise("straight", None)
    stopped, _ = quantise("resumed", 1)
    assert done
    assert not stopped
    assert (tmp_path / "resumed" / "layer-00000.safetensors").is_file()
    assert not (tmp_path / "resumed" / "layer-00001.safetensors").is_file()
    done, resumed = quantise("resumed", None)
    assert done
    for i in range(3):
        assert straight.file(i).read_bytes() == resumed.file(i).read_bytes()


def test_a_profile_resumes_by_layers_and_refuses_another(tmp_path: Path) -> None:
    model = ARCHITECTURES["olmoe"](num_hidden_layers=3)
    refs = find_weights(model)
    first, again = ProfileStore(tmp_path / "a", {"model": "x"}), ProfileStore(tmp_path / "b", {"model": "x"})
    assert profile_experts(in_memory(model), refs, batches(), PAIRS, QUANTIZER, first)
    asked = iter(range(100))
    assert not profile_experts(in_memory(model), refs, batches(), PAIRS, QUANTIZER, again, asked_to_stop=lambda: next(asked) >= 2)
    assert again.layers() == [0, 1]
    kept = again.file(0).stat().st_mtime_ns
    assert profile_experts(in_memory(model), refs, batches(), PAIRS, QUANTIZER, again)
    assert again.file(0).stat().st_mtime_ns == kept
    assert [first.file(i).read_bytes() for i in range(3)] == [again.file(i).read_bytes() for i in range(3)]
    with pytest.raises(UsageError, match="another model"):
        ProfileStore(tmp_path / "a", {"model": "y"}).has(0)


def test_one_block_is_in_memory_at_a_time(tmp_path: Path) -> None:
    _, folder = saved(tmp_path, "olmoe", num_hidden_layers=6)
    streamed = open_streamed(str(folder), stream=True)
    most = 0
    load = streamed._load

    def watch(block: Any) -> None:
        nonlocal most
        load(block)
        most = max(most, sum(not next(b.module.parameters()).is_meta for b in streamed.blocks))

    streamed._load = watch  # type: ignore[method-assign]
    refs = find_weights(streamed.model)
    store = ProfileStore(tmp_path / "profile", {})
    assert profile_experts(streamed, refs, batches(), PAIRS, QUANTIZER, store, fisher=True, cache="disk", scratch=tmp_path)
    widths = {i: [dict.fromkeys(("gate_proj", "up_proj", "down_proj"), (2, 16))] * 4 for i in range(6)}
    assert quantize_model(streamed, refs, batches(), widths, {}, QUANTIZER, QuantizedStore(tmp_path / "codes"))
    assert most == 1
    assert store.layers() == list(range(6))


def test_starved_experts_are_rounded_and_said_so() -> None:
    model = ARCHITECTURES["mixtral"]()
    mixture = find_mixture(model, decoder_blocks(model)[0], find_weights(model))
    assert mixture is not None
    with measuring(model):
        none = quantize_expert(
            mixture.experts[0], Tokens(torch.empty(0, 32), torch.empty(0)), dict.fromkeys(mixture.roles, (2, 16)), QUANTIZER
        )
        few = quantize_expert(
            mixture.experts[0], Tokens(torch.randn(5, 32), torch.rand(5)), dict.fromkeys(mixture.roles, (2, 16)), QUANTIZER
        )
    assert {o.method for o in none.values()} == {"rtn"}
    assert all("no calibration token" in o.note for o in none.values())
    assert all("5 tokens for" in o.note for o in few.values())


def test_zeros_of_a_mask_stay_zero() -> None:
    weight = torch.randn(16, 32)
    weight.reshape(16, -1, 4)[..., 2:] = 0
    gram = QUANTIZER.gram(torch.randn(300, 32), None)
    made = QUANTIZER.quantize(weight, gram, 3, 16, 300).quantized
    assert bool((made.dequantize()[weight == 0] == 0).all())
    assert made.grid.kind == "asymmetric"
    with pytest.raises(UsageError, match="one-bit"):
        QUANTIZER.quantize(weight, gram, 1, 16, 300)


def profiles(layers: int = 2, experts: int = 4, seed: int = 0) -> list[LayerProfile]:
    draw = np.random.default_rng(seed)
    shapes = {"gate_proj": (24, 32), "up_proj": (24, 32), "down_proj": (32, 24)}
    pairs = ((1, 16), (2, 16), (3, 16))
    found = []
    for layer in range(layers):
        by_role = {role: (np.sort(draw.random((experts, 3)))[:, ::-1].copy(), None) for role in shapes}
        squared = sum(a for a, _ in by_role.values())
        frequency = draw.integers(10, 100, experts).astype(float)
        assert isinstance(squared, np.ndarray)
        found.append(
            LayerProfile(layer, frequency, frequency * 0.3, draw.random(experts), 2.0, squared, None, by_role, shapes, pairs)
        )
    return found


@pytest.mark.parametrize("granularity", ["expert", "projection", "gate-up", "layer"])
def test_assignments_keep_the_budget_and_finer_ones_cost_no_more(granularity: Any) -> None:
    found = profiles()
    cost: dict[str, float] = {}
    for name in (granularity, "layer"):
        made = assign(found, Budget(2.0), QUANTIZER, granularity=name, protect_super=False)
        assert made.average_bits(found) <= 2.0 + 1e-9
        assert set(made.widths) == {0, 1}
        assert all(set(e) == set(found[0].shapes) for experts in made.widths.values() for e in experts)
        cost[name] = sum(
            found[layer].by_role[role][0][e, bits - 1]
            for layer, experts in made.widths.items()
            for e, own in enumerate(experts)
            for role, (bits, _) in own.items()
        )
    assert cost[granularity] <= cost["layer"] + 1e-9


def test_byte_budgets_count_what_is_packed() -> None:
    for bits, kind in ((1, "midrise"), (2, "float"), (3, "asymmetric"), (4, "symmetric")):
        made = QUANTIZER.__class__(kind="float" if kind in ("midrise", "float") else kind).quantize(
            torch.randn(24, 40), None, bits, 16, 0
        )  # type: ignore[arg-type]
        packed = LowBitMatrix.of(made.quantized)
        parts = [part for part in (packed.codes, packed.scale, packed.zero) if part is not None]
        assert matrix_bytes(made.quantized.grid, 24, 40) == sum(part.numel() * part.element_size() for part in parts)
    found = profiles()
    made_ = assign(found, Budget(5000, "bytes"), QUANTIZER, granularity="projection", protect_super=False)
    assert made_.allocation.nbytes is not None
    assert made_.allocation.nbytes <= 5000
    with pytest.raises(UsageError, match="too small"):
        assign(found, Budget(100, "bytes"), QUANTIZER)


def test_pmq_of_a_profile_is_pmq_of_its_statistics() -> None:
    found = profiles(experts=6)
    given = parse_statistics(statistics_json(statistics(found, 16)))
    expected = allocate_experts(given, Budget(2.0), Options("pmq"))
    made = assign(found, Budget(2.0), QUANTIZER, mode="pmq", protect_super=False)
    assert {k: c.bits for k, c in expected.chosen.items()} == {k: c.bits for k, c in made.allocation.chosen.items()}


def test_super_experts_are_found_and_get_their_widest_candidate() -> None:
    found = profiles(experts=64)
    assert super_experts(found) == []
    found[1].peak[5] = 500.0
    assert super_experts(found) == ["layers.1.experts.5"]
    for granularity in ("expert", "projection"):
        made = assign(found, Budget(1.2), QUANTIZER, granularity=granularity)  # type: ignore[arg-type]
        assert {bits for bits, _ in made.widths[1][5].values()} == {3}
    free = assign(found, Budget(1.2), QUANTIZER, granularity="expert", protect_super=False)
    assert {bits for bits, _ in free.widths[1][5].values()} != {3} or free.protected == []


def test_the_grid_of_a_width() -> None:
    assert QUANTIZER.grid(1, 16) == Grid(1, 16, "midrise")
    assert QUANTIZER.grid(3, 16).kind == "float"
    assert Quantizer(kind="symmetric").grid(2, 16).kind == "symmetric"


def test_llama4_is_refused_with_a_reason() -> None:
    model = BUILDERS["llama4"]()
    with pytest.raises(UsageError, match="use_experts_implementation"):
        find_mixture(model, decoder_blocks(model)[1], find_weights(model))

"""One token through whole layers in one call: against the same network written down in float64, on every level of the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from sparse24_cases import LEVELS, need_kernel, numbers
from sparse24_matrices import random_24
from torch import Tensor
from torch.nn import functional

from compress_kernels.sparse24 import Packed24, cpu, pack, unpack
from compress_kernels.sparse24.decode import PROJECTIONS, Decoder, LayerParts, dense_tokens
from compress_kernels.sparse24.packing import to_int8
from compress_kernels.sparse24.reference import quantize_activations

HIDDEN, INNER, EPS = 36, 84, 1e-5


@pytest.fixture(autouse=True)
def all_features() -> Iterator[None]:
    need_kernel()
    yield
    cpu.use_features(cpu.FEATURES)


@pytest.fixture(params=LEVELS, ids=lambda names: names[-1] if names else "plain")
def level(request: pytest.FixtureRequest) -> tuple[str, ...]:
    if cpu.use_features(request.param) != request.param:
        pytest.skip(f"this machine lacks one of {', '.join(request.param)}")
    names: tuple[str, ...] = request.param
    return names


def layer(
    heads: int, kv_heads: int, dim: int, values: torch.dtype, seed: int, *, biased: bool, normed: bool, activation: str = "float"
) -> LayerParts:
    shapes = {"q": (heads * dim, HIDDEN), "k": (kv_heads * dim, HIDDEN), "v": (kv_heads * dim, HIDDEN)}
    shapes |= {"o": (HIDDEN, heads * dim), "gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
    weights = {name: random_24(*shape, seed=seed + i) / 4 for i, (name, shape) in enumerate(shapes.items())}
    if activation == "dense":
        weights = {name: (w + w.roll(1, 1)).bfloat16() for name, w in weights.items()}
        matrices = {name: Packed24(w, torch.empty(0, dtype=torch.uint8), None) for name, w in weights.items()}
    else:
        matrices = {name: pack(w, values) for name, w in weights.items()}
    biases = {n: numbers(shapes[n][0], seed=seed + 9) / 8 if biased and n in "qkv" else None for n in PROJECTIONS}
    norms = [1 + numbers(n, seed=seed + 10 + n) / 8 for n in (HIDDEN, HIDDEN, dim, dim)]
    own = norms[2:] if normed else [None, None]
    return LayerParts(matrices, biases, norms[0], norms[1], own[0], own[1], dim, EPS, activation)


def reference(
    layers: list[LayerParts], norm: Tensor, scaling: float, x: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, tokens: int
) -> tuple[Tensor, Tensor]:
    """The network's definition, in float64: its output and the keys and values of this token, `[2 * layers, kv_heads, dim]`."""

    def rms(v: Tensor, weight: Tensor) -> Tensor:
        return v / (v.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()

    def turn(v: Tensor) -> Tensor:
        a, b = v.chunk(2, -1)
        return v * cos.double().view(-1) + torch.cat([-b, a], -1) * sin.double().view(-1)

    def product(parts: LayerParts, name: str, v: Tensor) -> Tensor:
        matrix, bias = parts.matrices[name], parts.biases[name]
        if parts.activation == "int8":
            q, scale = quantize_activations(v.float().view(1, -1))
            v = (q.double() * scale.double()).view(-1)
        weight = matrix.values if parts.activation == "dense" else unpack(matrix, torch.float32)
        return weight.double() @ v + (0 if bias is None else bias.double())

    h, made = x.double().view(-1), []
    for index, p in enumerate(layers):
        n = rms(h, p.input_norm)
        q, k, v = (product(p, name, n).view(-1, p.head_dim) for name in "qkv")
        q, k = (rms(t, w) if w is not None else t for t, w in ((q, p.q_norm), (k, p.k_norm)))
        q, k = turn(q), turn(k)
        made += [k, v]
        keys, values = (
            torch.cat([cache[2 * index + j, 0, :, :tokens].double(), new.to(cache.dtype).double()[:, None]], 1)
            for j, new in enumerate((k, v))
        )
        group = len(q) // len(k)
        scores = torch.einsum("hd,htd->ht", q, keys.repeat_interleave(group, 0)) * scaling
        h = h + product(p, "o", torch.einsum("ht,htd->hd", scores.softmax(-1), values.repeat_interleave(group, 0)).reshape(-1))
        n = rms(h, p.post_norm)
        h = h + product(p, "down", functional.silu(product(p, "gate", n)) * product(p, "up", n))
    return rms(h, norm), torch.stack(made)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("values", "dtype", "activation"),
    [
        (torch.float32, torch.float32, "float"),
        (torch.bfloat16, torch.float32, "float"),
        (torch.bfloat16, torch.bfloat16, "float"),
        (torch.float16, torch.float16, "float"),
        (torch.int8, torch.float32, "float"),
        (torch.int8, torch.bfloat16, "float"),
        (torch.int8, torch.float32, "int8"),
        (torch.bfloat16, torch.float32, "dense"),
        (torch.bfloat16, torch.bfloat16, "dense"),
    ],
)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(6, 2, 20), (5, 1, 16), (3, 3, 4)])
def test_a_token_is_the_networks(
    level: tuple[str, ...],
    heads: int,
    kv_heads: int,
    dim: int,
    values: torch.dtype,
    dtype: torch.dtype,
    activation: str,
    threads: int,
) -> None:
    extras = {"biased": heads != 5, "normed": heads != 3, "activation": activation}
    layers = [layer(heads, kv_heads, dim, values, 20 * i, **extras) for i in range(2)]  # type: ignore[arg-type]
    norm, tokens = 1 + numbers(HIDDEN, seed=99) / 8, 7
    decoder = Decoder(layers, norm, 0.3, dtype)
    x, angle = numbers(1, 1, HIDDEN, seed=3, dtype=dtype), numbers(dim // 2, seed=4).repeat(2)
    cos, sin = (f(angle).to(dtype).view(1, 1, -1) for f in (torch.cos, torch.sin))
    cache = decoder.cache(tokens + 2)
    cache.copy_(numbers(*cache.shape, seed=5))
    before = cache.clone()
    expected, made = reference(layers, norm, 0.3, x, cos, sin, cache, tokens)
    torch.set_num_threads(threads)
    try:
        out = decoder.step(x, cos, sin, cache, tokens)
    finally:
        torch.set_num_threads(2)
    # Rounding to int8 may fall either way where the float32 input of a product differs in its last bit.
    loose = 2e-2 if activation == "int8" else 1e-5
    tolerance = {torch.float32: loose, torch.bfloat16: 4e-2, torch.float16: 4e-3}[dtype]
    assert (out.shape, out.dtype) == ((1, 1, HIDDEN), dtype)
    torch.testing.assert_close(out.double().view(-1), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(cache[:, 0, :, tokens].double(), made, rtol=tolerance, atol=tolerance)
    cache[:, :, :, tokens] = before[:, :, :, tokens]
    assert torch.equal(cache, before), "nothing but this token's place was written"


def test_not_a_number_comes_through(level: tuple[str, ...]) -> None:
    layers = [layer(6, 2, 20, torch.bfloat16, 0, biased=False, normed=False)]
    decoder = Decoder(layers, torch.ones(HIDDEN), 0.3, torch.float32)
    cos, cache = torch.ones(1, 1, 20), decoder.cache(4).zero_()
    for place in ((0, 0, 1, 2, 0), (1, 0, 0, 1, 3)):  # a key, a value
        cache.zero_()
        cache[place] = torch.nan
        assert decoder.step(numbers(1, 1, HIDDEN), cos, cos, cache, 3).isnan().all()
    assert decoder.step(torch.full((1, 1, HIDDEN), torch.inf), cos, cos, cache.zero_(), 3).isnan().all()


def test_great_scores_do_not_overflow(level: tuple[str, ...]) -> None:
    """A softmax of scores in the hundreds picks the largest, in a cache of one token as of many."""
    layers = [layer(6, 2, 20, torch.float32, 0, biased=False, normed=False)]
    norm, x, cos = torch.ones(HIDDEN), numbers(1, 1, HIDDEN), torch.ones(1, 1, 20)
    for tokens in (0, 40):
        decoder = Decoder(layers, norm, 500.0, torch.float32)
        cache = decoder.cache(64).copy_(numbers(2, 1, 2, 64, 20, seed=7))
        expected, _ = reference(layers, norm, 500.0, x, cos, cos, cache, tokens)
        torch.testing.assert_close(decoder.step(x, cos, cos, cache, tokens).double().view(-1), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("int8", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(
    ("tokens", "rows", "columns"), [(1, 1, 1), (1, 517, 70), (3, 300, 256), (2, 700, 1030), (0, 5, 8), (2, 0, 8)]
)
def test_a_head(
    level: tuple[str, ...], dtype: torch.dtype, int8: bool, biased: bool, tokens: int, rows: int, columns: int
) -> None:
    x = numbers(1, tokens, columns, seed=1, dtype=dtype)
    weight, scale = numbers(rows, columns, dtype=dtype), None
    exact = weight.double()
    if int8:
        weight, scale = to_int8(weight)
        exact = weight.double() * scale.double()[:, None]
    bias = numbers(rows, seed=2, dtype=torch.float32 if int8 else dtype) if biased else None
    exact = functional.linear(x.double(), exact, None if bias is None else bias.double())
    y = dense_tokens(x, weight, bias, scale)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-5 * columns)


def test_a_head_with_numbers_that_are_none_gives_none(level: tuple[str, ...]) -> None:
    weight, scale = to_int8(numbers(40, 70))
    for number in (torch.nan, torch.inf):
        x = numbers(1, 70)
        x[0, 69] = number
        assert not dense_tokens(x, weight, None, scale).isfinite().any()


def test_a_head_that_does_not_fit_is_refused() -> None:
    x, weight = numbers(2, 70), numbers(40, 70)
    values, scale = to_int8(weight)
    for arguments in (
        (x[:, :60], weight),
        (x.T.contiguous().T, weight),
        (x.double(), weight),
        (x, weight.double()),
        (x, weight, torch.ones(3)),
        (x, values),
        (x, weight, None, scale),
        (x, values, None, scale[:3]),
        (x, values, None, scale.double()),
        (x, weight[0]),
    ):
        with pytest.raises(ValueError, match="tokens"):
            dense_tokens(*arguments)


def test_what_does_not_fit_is_refused() -> None:
    parts = layer(6, 2, 20, torch.bfloat16, 0, biased=True, normed=True)
    norm = torch.ones(HIDDEN)
    other = layer(3, 3, 4, torch.bfloat16, 0, biased=True, normed=True)
    int8 = pack(random_24(120, HIDDEN), torch.int8)
    for layers, message in (
        ([], "there are none"),
        ([parts, other], "layer 1 is of other shapes"),
        ([replace(parts, head_dim=7)], "not groups of heads of 7"),
        ([replace(parts, matrices={**parts.matrices, "o": parts.matrices["q"]})], "do not fit each other"),
        ([replace(parts, matrices={**parts.matrices, "q": int8})], "several dtypes"),
        ([replace(parts, activation="int8")], "int8 values"),
        ([replace(parts, activation="dense")], "do not fit each other"),
        ([replace(parts, q_norm=torch.ones(3))], "its norms"),
        ([replace(parts, biases={**parts.biases, "q": torch.ones(3)})], "its biases"),
        ([replace(parts, input_norm=torch.ones(2 * HIDDEN)[::2])], "contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            Decoder(layers, norm, 1.0, torch.float32)
    with pytest.raises(ValueError, match="float64"):
        Decoder([parts], norm, 1.0, torch.float64)
    with pytest.raises(ValueError, match="the last norm"):
        Decoder([parts], norm[:4], 1.0, torch.float32)
    decoder, x, cos = Decoder([parts], norm, 1.0, torch.float32), torch.ones(1, 1, HIDDEN), torch.ones(1, 1, 20)
    with pytest.raises(ValueError, match="no room for another"):
        decoder.step(x, cos, cos, decoder.cache(4), 4)
    with pytest.raises(ValueError, match="one token is"):
        decoder.step(x.expand(2, 1, HIDDEN), cos, cos, decoder.cache(4), 0)
    with pytest.raises(ValueError, match="the cache is"):
        decoder.step(x, cos, cos, decoder.cache(4).bfloat16(), 0)


def test_packed_tuple_order() -> None:
    """struct Layer takes values, metadata and scale in this order."""
    assert Packed24._fields == ("values", "meta", "scale")

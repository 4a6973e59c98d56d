"""The 2:4 product as layers and torch see it: the choice of implementation, the operator, torch.compile, gradients, many matrices."""

from __future__ import annotations

import pytest
import torch
from sparse24_cases import need_kernel, numbers
from sparse24_matrices import random_24, random_packed
from torch.fx.experimental.proxy_tensor import make_fx

from compress_kernels import sparse24
from compress_kernels.native import Native
from compress_kernels.sparse24 import Packed24, cpu, pack, reference, unpack


def test_linear_runs_the_compiled_kernels_and_they_agree_with_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    need_kernel()
    packed, x, bias = random_packed(33, 64, torch.bfloat16), numbers(5, 64, dtype=torch.bfloat16), numbers(33)
    monkeypatch.setattr(reference, "linear", None)  # must not be called
    y = sparse24.linear(x, packed, bias)
    monkeypatch.undo()
    torch.testing.assert_close(y, reference.linear(x, packed, bias), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("activation", ["float", "int8"])
def test_without_kernels_the_reference_computes_it(monkeypatch: pytest.MonkeyPatch, activation) -> None:
    monkeypatch.setattr(cpu, "_LIBRARY", None)
    monkeypatch.setattr(sparse24, "native", lambda name: Native(name, None, "it was not built"))
    packed, x = random_packed(9, 20, torch.int8), numbers(2, 3, 20)
    assert torch.equal(sparse24.linear(x, packed, None, activation), reference.linear(x, packed, None, activation))
    assert [y.shape for y in sparse24.linear_many(x, [packed, packed])] == [(2, 3, 9)] * 2
    name, reason = sparse24.implementation()
    assert name == "torch reference"
    assert "it was not built" in reason


def test_dtypes_that_the_kernels_lack_go_to_the_reference() -> None:
    packed, x = random_packed(9, 20, torch.float32), numbers(2, 20).double()
    assert sparse24.linear(x, packed).dtype == torch.float64


def test_implementation_names_what_is_used_and_what_is_missing() -> None:
    need_kernel()
    try:
        cpu.use_features(())
        assert sparse24.implementation("cpu").name == "C++ (no vector instructions)"
        assert "avx2" in sparse24.implementation("cpu").reason
    finally:
        cpu.use_features(cpu.FEATURES)
    assert sparse24.implementation("cpu").name.startswith("C++")
    assert "no kernels for meta" in sparse24.implementation("meta").reason


def test_linear_many_is_linear_of_each() -> None:
    x = numbers(2, 3, 64, dtype=torch.bfloat16)
    matrices = [random_packed(n, 64, torch.bfloat16) for n in (16, 8)]
    mixed = [matrices[0], random_packed(8, 64, torch.int8)]
    for group, biases in ((matrices, [numbers(16), None]), (matrices, None), (mixed, None)):
        for i, y in enumerate(sparse24.linear_many(x, group, biases)):
            assert y.shape == (2, 3, group[i].shape[0])
            assert torch.equal(y, sparse24.linear(x, group[i], biases[i] if biases else None))
    assert sparse24.linear_many(x, []) == []
    with pytest.raises(ValueError, match="2 matrices and 1 biases"):
        sparse24.linear_many(x, matrices, [None])


# --- the operator


@pytest.mark.parametrize(("value_dtype", "activation"), [(torch.float32, "float"), (torch.int8, "float"), (torch.int8, "int8")])
def test_opcheck(value_dtype, activation) -> None:
    values, meta, scale = random_packed(8, 16, value_dtype)
    x, bias = numbers(3, 16).requires_grad_(), numbers(8).requires_grad_()
    torch.library.opcheck(torch.ops.compress.sparse24_linear.default, (x, values, meta, scale, bias, activation))


def test_gradients_of_x_and_bias() -> None:
    weight, x, bias = random_24(8, 16), numbers(2, 3, 16).requires_grad_(), numbers(8).requires_grad_()
    upstream = numbers(2, 3, 8, seed=1)
    got = torch.autograd.grad(sparse24.linear(x, pack(weight), bias), (x, bias), upstream)
    expected = torch.autograd.grad(torch.nn.functional.linear(x, weight, bias), (x, bias), upstream)
    for mine, exact in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, exact)
    half = numbers(2, 16, dtype=torch.bfloat16).requires_grad_()
    packed = pack(weight, torch.int8)
    (grad,) = torch.autograd.grad(sparse24.linear(half, packed, None, "int8").sum(), half)
    torch.testing.assert_close(grad, unpack(packed).sum(0).expand(2, 16).bfloat16())


def test_tracing_sees_the_operator_and_not_its_result() -> None:
    packed = random_packed(8, 16, torch.float32)
    graph = make_fx(lambda x: sparse24.linear(x, packed) + 1)(numbers(2, 16))
    assert any("sparse24_linear" in str(node.target) for node in graph.graph.nodes)
    x = numbers(5, 16)
    torch.testing.assert_close(make_fx(lambda x: sparse24.linear(x, packed))(x)(2 * x), sparse24.linear(2 * x, packed))


def test_compiled_by_torch_without_a_graph_break() -> None:
    packed, bias = random_packed(8, 16, torch.float32), numbers(8)

    def step(x: torch.Tensor, values: torch.Tensor, meta: torch.Tensor) -> torch.Tensor:
        a, b = sparse24.linear_many(x, [Packed24(values, meta), Packed24(values, meta)], [bias, None])
        return torch.relu(a) * b

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for batch in (1, 3, 4):
        x = numbers(batch, 16)
        torch.testing.assert_close(compiled(x, packed.values, packed.meta), step(x, packed.values, packed.meta))


def test_fake_tensors_and_the_meta_device_give_shapes() -> None:
    values, meta, _ = random_packed(8, 16, torch.bfloat16)
    y = sparse24.linear(torch.empty(2, 5, 16, device="meta", dtype=torch.float16), Packed24(values.to("meta"), meta.to("meta")))
    assert (y.shape, y.dtype, y.device.type) == ((2, 5, 8), torch.float16, "meta")


def test_vmap_does_not_read_what_is_not_there() -> None:
    packed = random_packed(8, 16, torch.float32)
    x = numbers(4, 2, 16)
    try:
        y = torch.func.vmap(lambda row: sparse24.linear(row, packed))(x)
    except (NotImplementedError, RuntimeError) as error:
        assert "vmap" in str(error)  # noqa: PT017  torch may or may not have a rule for custom operators
    else:
        torch.testing.assert_close(y, sparse24.linear(x, packed))

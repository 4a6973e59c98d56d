"""Every implementation of the 2:4 product on a real GPU against the reference, and the choice between them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from compress_kernels.sparse24 import backends, cuda, packing, reference
from compress_kernels.sparse24.backends import Case, candidates
from compress_kernels.sparse24.packing import Packed24, pack

BF16, FP16, FP32, INT8 = torch.bfloat16, torch.float16, torch.float32, torch.int8
UNIT = {BF16: 2.0**-8, FP16: 2.0**-11, FP32: 2.0**-23}


@pytest.fixture(autouse=True)
def _fresh():
    cuda.forget()
    torch.manual_seed(0)


def matrix(n: int, k: int, value_dtype: torch.dtype) -> Packed24:
    weight = torch.randn(n, k, device="cuda")
    pruned = torch.rand(n, k // 4, 4, device="cuda").argsort(-1)[..., :2]
    weight.view(n, k // 4, 4).scatter_(-1, pruned, 0.0)
    return pack(weight, value_dtype)


def check(found: Tensor, x: Tensor, packed: Packed24, bias: Tensor | None) -> None:
    """Within two roundings of the result and a few of random terms: partial sums, and int8 weights brought to the type of x."""
    assert found.dtype == x.dtype
    wanted = reference.linear(x.float(), packed, bias, out_dtype=FP32)
    spread = (x.float().square() @ packing.unpack(packed, FP32).square().t()).sqrt()
    assert bool(((found.float() - wanted).abs() <= UNIT[x.dtype] * (2 * wanted.abs() + 6 * spread) + 1e-5).all())


SHAPES = [(7, 8), (33, 72), (64, 128), (96, 320), (256, 4096), (1000, 1024), (4096, 512)]


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 8, 13, 32, 64, 65, 200])
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize(("value_dtype", "x_dtype"), [(BF16, BF16), (FP16, FP16), (INT8, BF16), (INT8, FP16), (FP16, BF16)])
def test_our_implementations(value_dtype, x_dtype, n, k, batch):
    packed = matrix(n, k, value_dtype)
    x, bias = torch.randn(batch, k, device="cuda").to(x_dtype), torch.randn(n, device="cuda").to(x_dtype)
    ours = [b.name for b in candidates(Case.of(x, packed)) if b.name not in ("cutlass", "cusparselt")]
    assert {"dense", "unpack"} <= set(ours)
    for name in ours:
        check(cuda.linear_by(name, x, packed, bias), x, packed, bias)
        check(cuda.linear_by(name, x, packed), x, packed, None)


@pytest.mark.parametrize("name", ["cutlass", "cusparselt"])
@pytest.mark.parametrize("batch", [1, 8, 13, 64, 300])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_torchs_implementations(name, batch, dtype):
    packed = matrix(256, 512, dtype)
    x, bias = torch.randn(batch, 512, device="cuda").to(dtype), torch.randn(256, device="cuda").to(dtype)
    if name not in [backend.name for backend in candidates(Case.of(x, packed))]:
        pytest.skip(f"this build of torch has no {name}")
    try:
        found = cuda.linear_by(name, x, packed, bias)
    except RuntimeError as error:
        pytest.skip(f"{name} refuses this GPU ({torch.cuda.get_device_name()}): {str(error).splitlines()[0]}")
    check(found, x, packed, bias)
    check(cuda.linear_by(name, x, packed), x, packed, None)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_sparse_tensor_cores_put_every_column_and_row_where_it_belongs(dtype):
    """One non-zero activation at a time: y must be a column of W, exactly."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("sparse tensor cores need compute capability 8.0")
    packed = matrix(48, 128, dtype)
    dense = packing.unpack(packed)
    for first in range(0, 128, 64):
        x = torch.zeros(64, 128, device="cuda", dtype=dtype)
        x[torch.arange(64), first + torch.arange(64)] = 1
        names = [b.name for b in candidates(Case.of(x, packed)) if b.name.startswith("mma_sp")]
        assert names
        for name in names:
            assert torch.equal(cuda.linear_by(name, x, packed), dense[:, first : first + 64].t())


@pytest.mark.parametrize(("value_dtype", "dtype"), [(BF16, BF16), (FP16, FP16), (INT8, BF16), (INT8, FP16)])
def test_unpack_kernel_gives_the_references_bits(value_dtype, dtype):
    kernels = pytest.importorskip("compress_kernels.sparse24.triton", reason="Triton is not installed", exc_type=ImportError)
    packed = matrix(513, 1032, value_dtype)
    assert torch.equal(kernels.unpack(*packed, dtype), packing.unpack(packed, dtype))


def test_the_choice_is_measured_once_and_told():
    packed = matrix(1024, 1024, BF16)
    x = torch.randn(3, 1024, device="cuda", dtype=BF16)
    check(cuda.linear(x, *packed), x, packed, None)
    (choice,) = cuda.choices()
    assert choice.case.bucket == 4
    assert choice.backend == choice.ranking[0]
    assert choice.microseconds[choice.ranking[0]] <= cuda.DENSE_MARGIN * min(choice.microseconds.values())
    assert {"dense", "unpack"} <= set(choice.microseconds)
    for name in ("gemv", "mma_sp"):  # what must run wherever it is offered
        assert not [failure for failed, failure in choice.failures.items() if failed.startswith(name)]
    check(cuda.linear(x[:, :1].expand(3, 1024).contiguous(), *packed), x[:, :1].expand(3, 1024).contiguous(), packed, None)
    assert len(cuda.choices()) == 1


def test_leading_dimensions_bias_and_no_tokens():
    packed = matrix(64, 128, BF16)
    bias = torch.randn(64, device="cuda")  # fp32, where x is bf16
    x = torch.randn(2, 3, 128, device="cuda", dtype=BF16)
    found = cuda.linear(x, *packed, bias)
    assert found.shape == (2, 3, 64)
    check(found.view(6, 64), x.view(6, 128), packed, bias.to(BF16))
    assert cuda.linear(x[:0], *packed).shape == (0, 3, 64)


def test_activations_off_their_boundary_and_with_strides():
    packed = matrix(64, 128, BF16)
    x = torch.randn(4 * 128 + 1, device="cuda", dtype=BF16)[1:].view(4, 128)
    check(cuda.linear(x, *packed), x, packed, None)
    wide = torch.randn(4, 256, device="cuda", dtype=BF16)[:, ::2]
    check(cuda.linear(wide, *packed), wide.contiguous(), packed, None)


def test_gradients_flow_to_the_activations():
    packed = matrix(64, 128, FP32)
    x = torch.randn(5, 128, device="cuda", requires_grad=True)
    cuda.linear(x, *packed).sum().backward()
    torch.testing.assert_close(x.grad, packing.unpack(packed).sum(0).expand(5, 128), rtol=1e-3, atol=1e-3)


def test_a_cuda_graph_replays_a_chosen_product():
    packed = matrix(512, 512, BF16)
    x = torch.randn(1, 512, device="cuda", dtype=BF16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            cuda.linear(x, *packed)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = cuda.linear(x, *packed)
    x.copy_(torch.randn_like(x))
    graph.replay()
    check(y, x, packed, None)


def test_a_weight_on_an_odd_boundary_avoids_the_kernels():
    packed = matrix(16, 64, BF16)
    shifted = torch.empty(packed.values.numel() + 1, device="cuda", dtype=BF16)[1:].view_as(packed.values).copy_(packed.values)
    odd = Packed24(shifted, packed.meta)
    x = torch.randn(2, 64, device="cuda", dtype=BF16)
    assert not Case.of(x, odd).aligned
    assert {backend.name for backend in backends.candidates(Case.of(x, odd))} <= {"dense", "unpack", "cutlass", "cusparselt"}
    check(cuda.linear(x, *odd), x, odd, None)

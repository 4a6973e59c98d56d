"""What the GPU dispatcher prepares and decides, on a CPU: CUTLASS metadata against torch's packer, dense copies, the ranking, the cache."""

from __future__ import annotations

import pytest
import torch
from sparse24_matrices import random_24, random_packed
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from compress_kernels.sparse24 import backends, cuda
from compress_kernels.sparse24.backends import Backend, Case, dense, unpack_linear
from compress_kernels.sparse24.packing import pack, unpack
from compress_kernels.sparse24.reference import linear
from compress_kernels.sparse24.semi_structured import cutlass_metadata, cutlass_supported, cutlass_weight, pad_tokens

BF16, FP16, FP32, INT8 = torch.bfloat16, torch.float16, torch.float32, torch.int8
CPU = torch.device("cpu")


def case_of(n: int, k: int, bucket: int = 8, x_dtype=BF16, value_dtype=BF16) -> Case:
    return Case(CPU, n, k, bucket, x_dtype, value_dtype, True)


@pytest.mark.parametrize(("n", "k"), [(32, 64), (64, 32), (96, 320), (160, 128)])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_cutlass_metadata_of_16_bit_values_is_torchs(n, k, dtype):
    weight = random_24(n, k).to(dtype)
    packed = pack(weight)
    kept, wanted = sparse_semi_structured_from_dense_cutlass(weight)
    found = cutlass_metadata(packed.meta, k, dtype)
    assert found.dtype == wanted.dtype
    assert torch.equal(found, wanted)
    assert torch.equal(packed.values, kept)


@pytest.mark.parametrize(("n", "k"), [(16, 64), (48, 192), (64, 128)])
def test_cutlass_metadata_of_int8_values_is_torchs(n, k):
    weight = (random_24(n, k) * 40).round().clamp(-127, 127)
    kept, wanted = sparse_semi_structured_from_dense_cutlass(weight.to(INT8))
    packed = pack(weight)
    found = cutlass_metadata(packed.meta, k, INT8)
    assert found.dtype == wanted.dtype
    assert torch.equal(found, wanted)
    assert torch.equal(packed.values.to(INT8), kept)


def test_groups_with_fewer_than_two_nonzeros():
    weight = random_24(64, 128)
    weight[torch.rand(64, 128) < 0.5] = 0
    _, wanted = sparse_semi_structured_from_dense_cutlass(weight.to(FP16))
    assert torch.equal(cutlass_metadata(pack(weight.to(FP16)).meta, 128, FP16), wanted)


def test_tiles_that_are_not_whole_are_refused():
    for n, k, dtype in ((16, 64, BF16), (32, 16, BF16), (8, 64, INT8), (16, 32, INT8)):
        with pytest.raises(ValueError, match="whole tiles"):
            cutlass_metadata(torch.zeros(n, k // 8, dtype=torch.uint8), k, dtype)
    assert cutlass_supported(64, 128, BF16, BF16)
    assert not cutlass_supported(64, 96, BF16, BF16)
    assert not cutlass_supported(64, 128, BF16, INT8)


def test_torch_unpacks_the_subclass_to_the_weight():
    packed = random_packed(64, 128, BF16)
    weight = cutlass_weight(packed.values, packed.meta)
    assert weight.shape == (64, 128)
    assert weight.packed.data_ptr() == packed.values.data_ptr()
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(weight.packed, weight.meta), unpack(packed))


def test_tokens_are_padded_to_eights():
    x = torch.randn(13, 4)
    padded = pad_tokens(x)
    assert padded.shape == (16, 4)
    assert torch.equal(padded[:13], x)
    assert not padded[13:].any()
    assert pad_tokens(padded) is padded


@pytest.mark.parametrize(
    ("value_dtype", "x_dtype", "wide"), [(BF16, BF16, BF16), (INT8, BF16, BF16), (FP16, BF16, FP32), (FP32, BF16, FP32)]
)
def test_dense_copies_hold_both_types(value_dtype, x_dtype, wide):
    packed = random_packed(24, 36, value_dtype)
    assert dense(packed, x_dtype).dtype == wide
    assert case_of(24, 36, 8, x_dtype, value_dtype).dense_bytes == 24 * 36 * wide.itemsize
    x, bias = torch.randn(5, 36).to(x_dtype), torch.randn(24).to(x_dtype)
    found = unpack_linear(x, packed, bias)
    assert found.dtype == x_dtype
    torch.testing.assert_close(found, linear(x, packed, bias), rtol=0.02, atol=0.05)


def test_tokens_share_a_choice_up_to_the_next_power_of_two():
    packed = random_packed(8, 16, BF16)
    buckets = [Case.of(torch.randn(batch, 16, dtype=BF16), packed).bucket for batch in (1, 2, 3, 4, 5, 64, 65, 5000, 100000)]
    assert buckets == [1, 2, 4, 4, 8, 64, 128, 4096, 4096]


def test_dense_must_be_faster_by_a_margin():
    assert cuda.rank({"gemv": 10.0, "dense": 9.8, "unpack": 30.0}) == ("gemv", "dense", "unpack")
    assert cuda.rank({"gemv": 10.0, "dense": 9.0, "unpack": 30.0}) == ("dense", "gemv", "unpack")


def test_there_is_always_a_candidate(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    for case in (case_of(7, 12), case_of(64, 128, 1), case_of(64, 128, 64), case_of(64, 128, 4096, FP32, FP32)):
        assert [backend.name for backend in backends.candidates(case)][-1] == "unpack"
    pytest.importorskip("triton", reason="Triton is not installed; it exists for Linux only")
    names = [backend.name for backend in backends.candidates(case_of(64, 128, 4))]
    assert len({name.split()[0] for name in names} & {"gemv", "mma_sp", "cutlass", "dense", "unpack"}) == 5
    assert len(set(names)) == len(names)
    assert not any(name.startswith("gemv") for name in (b.name for b in backends.candidates(case_of(64, 128, 8))))
    int8 = [backend.name for backend in backends.candidates(case_of(64, 128, 64, BF16, INT8))]
    assert int8 == ["dense", "unpack"]


class Probed:
    """Stands for a GPU: candidates that count their preparations, times that are given, and memory that is given."""

    def __init__(self, monkeypatch, times: dict[str, float], spare: int = 1 << 40) -> None:
        self.prepared: list[str] = []
        self.ran: list[str] = []
        self.spare = spare
        monkeypatch.setattr(cuda, "_choices", {})
        monkeypatch.setattr(cuda, "candidates", lambda case: [self.backend(name) for name in times])
        monkeypatch.setattr(cuda, "_fits", lambda backend, case: backend.extra_bytes(case) <= self.spare)
        monkeypatch.setattr(cuda, "measure", lambda call, device: call() is None or times[self.ran[-1]])
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        self.capturing = False

    def backend(self, name: str) -> Backend:
        def run(x, packed, bias, state):
            self.ran.append(name)
            if name == "cutlass":
                raise RuntimeError("no kernel for this GPU\nand more")
            return linear(x, packed, bias)

        def prepare(packed, case):
            self.prepared.append(name)

        return Backend(name, lambda case: True, run, prepare, lambda case: 0 if name == "unpack" else 100)


def test_a_probe_chooses_once_and_prepares_only_what_is_chosen(monkeypatch):
    gpu = Probed(monkeypatch, {"mma_sp 1x4": 7.0, "mma_sp 2x4": 5.0, "cutlass": 1.0, "dense": 6.0, "unpack": 20.0})
    packed, x = random_packed(32, 64, BF16), torch.randn(6, 64).to(BF16)
    assert torch.equal(cuda._run(x, packed, None), linear(x, packed))
    (choice,) = cuda.choices()
    assert choice.backend == "mma_sp 2x4" == gpu.ran[-1]
    assert choice.ranking == ("mma_sp 2x4", "dense", "mma_sp 1x4", "unpack")
    assert choice.failures == {"cutlass": "RuntimeError: no kernel for this GPU"}
    gpu.prepared.clear()
    gpu.ran.clear()
    for batch in (5, 6, 8):
        cuda._run(torch.randn(batch, 64).to(BF16), packed, None)
    assert gpu.ran == ["mma_sp 2x4"] * 3
    assert gpu.prepared == []  # prepared with the first product
    cuda._run(x, random_packed(32, 64, BF16), None)
    assert gpu.prepared == ["mma_sp 2x4"]  # once for another weight, without another probe
    assert len(cuda.choices()) == 1


def test_a_weight_that_was_written_to_is_prepared_again(monkeypatch):
    gpu = Probed(monkeypatch, {"dense": 1.0, "unpack": 2.0})
    packed, x = random_packed(32, 64, BF16), torch.randn(6, 64).to(BF16)
    cuda._run(x, packed, None)
    gpu.prepared.clear()
    cuda._run(x, packed, None)
    assert gpu.prepared == []
    packed.values.mul_(2)
    cuda._run(x, packed, None)
    assert gpu.prepared == ["dense"]


def test_a_copy_that_no_longer_fits_gives_way_to_the_next(monkeypatch):
    gpu = Probed(monkeypatch, {"dense": 1.0, "unpack": 2.0})
    first, second = random_packed(32, 64, BF16), random_packed(32, 64, BF16)
    x = torch.randn(6, 64).to(BF16)
    cuda._run(x, first, None)
    gpu.spare = 0
    gpu.ran.clear()
    cuda._run(x, first, None)
    cuda._run(x, second, None)
    assert gpu.ran == ["dense", "unpack"]


def test_nothing_is_timed_within_the_capture_of_a_graph(monkeypatch):
    gpu = Probed(monkeypatch, {"mma_sp 1x4": 3.0, "cusparselt": 1.0, "dense": 2.0, "unpack": 9.0})
    gpu.capturing = True
    cuda._run(torch.randn(6, 64).to(BF16), random_packed(32, 64, BF16), None)
    assert gpu.ran == ["mma_sp 1x4"]
    assert cuda.choices() == []

"""The compiled 2:4 product on every level of instructions, against float64 and the torch reference."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse24_cases import COMPILER, LEVELS, check_product, need_kernel, numbers
from sparse24_matrices import random_24, random_packed
from torch import Tensor

import compress_kernels
from compress_kernels.native import ISAS, native, use_isa
from compress_kernels.sparse24 import Packed24, cpu, pack, reference, unpack

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
KINDS = [(dtype, "float") for dtype in (*FLOATS, torch.int8)] + [(torch.int8, "int8")]


@pytest.fixture(params=LEVELS, ids=lambda level: level[-1] if level else "scalar")
def level(request: pytest.FixtureRequest) -> Iterator[tuple[str, ...]]:
    """Each set of kernels in turn."""
    need_kernel()
    if cpu.use_features(request.param) != request.param:
        cpu.use_features(cpu.FEATURES)
        pytest.skip(f"this machine has no {request.param[-1]}")
    yield request.param
    cpu.use_features(cpu.FEATURES)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# --- the product


@pytest.mark.parametrize("threads_used", [1, 2])
@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize(("value_dtype", "activation"), KINDS)
def test_product_with_every_tail(level, threads, threads_used, x_dtype, value_dtype, activation) -> None:
    """Columns, rows and tokens that leave rests of every step: vectors, spans, panels, tiles and blocks of tokens."""
    torch.set_num_threads(threads_used)
    shapes = [
        (1, 4, 1),
        (3, 12, 2),
        (5, 36, 3),
        (33, 60, 4),
        (7, 100, 5),
        (70, 132, 1),
        (40, 516, 17),
        (37, 580, 33),
        (5, 772, 70),
        (266, 64, 40),
    ]
    for n, k, batch in shapes:
        packed, x, bias = (
            random_packed(n, k, value_dtype),
            numbers(batch, k, seed=k, dtype=x_dtype),
            numbers(n, seed=n, dtype=x_dtype),
        )
        check_product(cpu.linear(x, *packed, bias, activation, torch.float32), x, packed, bias, activation)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(("value_dtype", "activation"), KINDS)
def test_columns_beyond_the_first_level_cache(level, batch, value_dtype, activation) -> None:
    """Sums over several spans of columns."""
    for k in (14336, 30004):
        packed, x = random_packed(6, k, value_dtype), numbers(batch, k, dtype=torch.bfloat16)
        check_product(cpu.linear(x, *packed, None, activation, torch.float32), x, packed, None, activation)


@settings(max_examples=25)
@given(
    st.integers(1, 80), st.integers(1, 90), st.integers(1, 70), st.sampled_from(KINDS), st.sampled_from(FLOATS), st.integers(0, 4)
)
def test_any_shape(n, groups, batch, kind, x_dtype, level_index) -> None:
    need_kernel()
    cpu.use_features(LEVELS[level_index])
    try:
        packed, x = random_packed(n, 4 * groups, kind[0]), numbers(batch, 4 * groups, seed=n, dtype=x_dtype)
        check_product(cpu.linear(x, *packed, None, kind[1], torch.float32), x, packed, None, kind[1])
    finally:
        cpu.use_features(cpu.FEATURES)


@pytest.mark.parametrize("batch", [1, 6, 40])
@pytest.mark.parametrize("dtype", FLOATS)
def test_output_has_the_dtype_of_x_rounded_to_nearest(level, dtype, batch) -> None:
    packed, x = random_packed(50, 128, torch.bfloat16), numbers(batch, 128, dtype=dtype)
    y = cpu.linear(x, *packed, None)
    assert torch.equal(y, cpu.linear(x, *packed, None, out_dtype=torch.float32).to(dtype))


def test_int8_activations_are_those_of_the_reference_bit_by_bit(level) -> None:
    """Integer sums and the same rounding of activations: nothing is left to the order of additions."""
    for x_dtype in FLOATS:
        for n, k, batch in [(33, 260, 1), (20, 1028, 5), (9, 64, 40)]:
            packed, x = random_packed(n, k, torch.int8), numbers(batch, k, seed=batch, dtype=x_dtype)
            x[-1] = 0
            y = cpu.linear(x, *packed, None, "int8", torch.float32)
            assert torch.equal(y, reference.linear(x, packed, None, "int8", torch.float32))


@pytest.mark.parametrize(("value", "x"), [(127, 127.0), (-128, 127.0), (-128, -127.0), (127, -127.0)])
def test_int8_sums_do_not_overflow(level, value, x) -> None:
    """All products at their largest, over more columns than 32 bits hold at once."""
    k = 280_000
    codes = torch.full((2, k // 8), 0x44, dtype=torch.uint8)
    packed = Packed24(torch.full((2, k // 2), value, dtype=torch.int8), codes, torch.ones(2))
    for batch in (1, 4):
        y = cpu.linear(torch.full((batch, k), x), *packed, None, "int8")
        torch.testing.assert_close(y, torch.full((batch, 2), x * value * k / 2), rtol=1e-6, atol=0)


def test_int8_stays_within_the_error_of_its_quantisation(level) -> None:
    """Half a step of every activation and weight, which is what symmetric rounding may lose."""
    weight, x = random_24(24, 512), numbers(3, 512)
    packed = pack(weight, torch.int8)
    y = cpu.linear(x, *packed, None, "int8")
    step_x = x.abs().amax(1, keepdim=True) / 127
    bound = 0.51 * (step_x * unpack(packed).abs().sum(1) + packed.scale * (x.abs() @ (weight != 0).float().T))
    assert bool(((y - x @ weight.T).abs() <= bound).all())


@pytest.mark.parametrize("batch", [1, 5, 40])
def test_views_bias_dtypes_and_leading_dimensions(level, batch) -> None:
    packed = random_packed(19, 132, torch.bfloat16)
    wide = numbers(batch, 300, dtype=torch.bfloat16)
    for x in (wide[:, 3:135], wide[:, :264:2], numbers(132, batch, dtype=torch.bfloat16).T):
        for bias in (None, numbers(19), numbers(19, dtype=torch.float16), numbers(38, dtype=torch.bfloat16)[::2]):
            check_product(cpu.linear(x, *packed, bias, out_dtype=torch.float32), x, packed, bias, "float")
    plain = cpu.linear(wide[:, :132].contiguous(), *packed, None)
    assert torch.equal(cpu.linear(wide[:, :132].reshape(batch, 1, 132), *packed, None), plain.view(batch, 1, 19))
    assert torch.equal(cpu.linear(wide[0, :132], *packed, None), cpu.linear(wide[:1, :132], *packed, None)[0])
    values, meta, _ = random_packed(19, 264, torch.bfloat16)
    halves = Packed24(values[:, :66], meta[:, :17] & torch.tensor([255] * 16 + [15], dtype=torch.uint8))
    check_product(cpu.linear(wide[:, :132], *halves, None, out_dtype=torch.float32), wide[:, :132], halves, None, "float")
    every_other = Packed24(*(part[::2] for part in random_packed(38, 132, torch.int8)))
    x = wide[:, :132].contiguous()
    check_product(cpu.linear(x, *every_other, None, "int8", torch.float32), x, every_other, None, "int8")


def test_empty_batches_rows_and_columns(level) -> None:
    packed = random_packed(5, 16, torch.bfloat16)
    assert cpu.linear(torch.empty(0, 16), *packed, None).shape == (0, 5)
    assert cpu.linear(torch.empty(2, 0, 16), *packed, None).shape == (2, 0, 5)
    assert cpu.linear(torch.ones(3, 16), *random_packed(0, 16, torch.bfloat16), None).shape == (3, 0)
    nothing = Packed24(torch.empty(2, 0), torch.empty(2, 0, dtype=torch.uint8))
    assert cpu.linear(torch.empty(3, 0), *nothing, torch.tensor([1.0, 2])).tolist() == [[1, 2]] * 3


@pytest.mark.parametrize(("value_dtype", "activation"), KINDS)
@pytest.mark.parametrize("batch", [1, 3, 20, 65])
def test_many_matrices_are_computed_as_one_by_one(level, threads, batch, value_dtype, activation) -> None:
    torch.set_num_threads(2)
    x = numbers(batch, 68, dtype=torch.bfloat16)
    matrices = [random_packed(n, 68, value_dtype) for n in (37, 1, 0, 70)]
    biases = [numbers(37), None, None, numbers(70, dtype=torch.bfloat16)]
    together = cpu.linear_many(x, matrices, biases, activation)
    for y, packed, bias in zip(together, matrices, biases, strict=True):
        assert torch.equal(y, cpu.linear(x, *packed, bias, activation))


# --- NaN and infinity


@pytest.mark.parametrize(("value_dtype", "activation"), KINDS)
@pytest.mark.parametrize("batch", [1, 4, 9, 40])
@pytest.mark.parametrize("x_dtype", FLOATS)
def test_nan_and_infinity_are_those_of_the_dense_product(level, x_dtype, batch, value_dtype, activation) -> None:
    """0 * NaN is NaN and 0 * inf is NaN: a pruned weight hides neither. Other tokens are not touched."""
    n, k = 37, 68
    packed = random_packed(n, k, value_dtype)
    x = numbers(batch, k, dtype=x_dtype)
    for token, column, value in [(0, 5, torch.nan), (batch - 1, 66, torch.inf), (batch // 2, 0, -torch.inf)]:
        x[token, column] = value
    y = cpu.linear(x, *packed, None, activation, torch.float32)
    expected = reference.linear(x, packed, None, activation, torch.float32)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert expected[0].isnan().all()
    assert batch < 4 or not expected[1].isnan().any()


@pytest.mark.parametrize("batch", [1, 4, 40])
def test_an_infinity_that_every_row_keeps_stays_one(level, batch) -> None:
    packed = Packed24(torch.ones(6, 34, dtype=torch.bfloat16), torch.tensor([[0x44] * 8 + [0x04]] * 6, dtype=torch.uint8))
    x = torch.ones(batch, 68, dtype=torch.bfloat16)
    x[0, 8] = torch.inf
    assert cpu.linear(x, *packed, None)[0].tolist() == [torch.inf] * 6


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("batch", [1, 4, 40])
def test_nan_and_infinity_in_kept_weights(level, dtype, batch) -> None:
    weight = random_24(9, 68).to(dtype)
    weight[2, 0:4] = torch.tensor([0, torch.nan, 0, 1])
    weight[4, 64:68] = torch.tensor([torch.inf, 0, 0, 0])
    x = numbers(batch, 68, dtype=dtype).abs() + 1
    y = cpu.linear(x, *pack(weight), None, out_dtype=torch.float32)
    assert y[:, 2].isnan().all()
    assert (y[:, 4] == torch.inf).all()
    assert y[:, [0, 1, 3, 5, 6, 7, 8]].isfinite().all()


# --- the rest of the interface


@pytest.mark.parametrize("batch", [1, 3, 9])
def test_dense_control(level, batch) -> None:
    for n, k in [(5, 4), (33, 100), (7, 516)]:
        weight, x = numbers(n, k, dtype=torch.bfloat16), numbers(batch, k, dtype=torch.bfloat16)
        y = cpu.dense_linear(x, weight, torch.float32)
        exact, terms = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
        assert bool(((y - exact).abs() <= 1e-5 * terms).all())


def test_read_covers_the_buffer(threads) -> None:
    need_kernel()
    torch.set_num_threads(2)
    assert cpu.read(torch.arange(128 * 2, dtype=torch.int64)) == 255 * 128  # two threads, whole shares


def test_tiles_leave_torchs_alone() -> None:
    """oneDNN remembers which tiles it configured; a product of ours in between must not disturb its own."""
    need_kernel()
    packed, x = random_packed(64, 256, torch.bfloat16), numbers(16, 256, dtype=torch.bfloat16)
    weight = numbers(48, 256, dtype=torch.bfloat16)
    before = torch.nn.functional.linear(x, weight)
    for _ in range(3):
        y = cpu.linear(x, *packed, None, out_dtype=torch.float32)
        assert torch.equal(torch.nn.functional.linear(x, weight), before)
        check_product(y, x, packed, None, "float")


def test_what_does_not_fit_is_refused() -> None:
    need_kernel()
    packed, x = random_packed(4, 16, torch.bfloat16), torch.ones(2, 16)
    int8 = random_packed(4, 16, torch.int8)
    bad = [
        (lambda: cpu.linear(torch.ones(2, 12), *packed, None), "not one 2:4 product"),
        (lambda: cpu.linear(x, packed.values, packed.meta[:3], None, None), "not one 2:4 product"),
        (lambda: cpu.linear(x.double(), *packed, None), "no kernel for these"),
        (lambda: cpu.linear(x, packed.values, packed.meta, torch.ones(4), None), "scale for every row"),
        (lambda: cpu.linear(x, int8.values, int8.meta, None, None), "scale for every row"),
        (lambda: cpu.linear(x, *packed, None, "int8"), "pack the matrix as int8"),
        (lambda: cpu.linear(x, *int8, None, "int4"), "'float' or 'int8', not 'int4'"),
        (lambda: cpu.linear(x, *packed, torch.ones(3)), r"a bias is \[4\]"),
        (lambda: cpu.linear_many(x, [packed, int8], [None, None]), "values of one dtype"),
        (lambda: cpu.linear(x.to("meta"), *packed, None), "have to be there, not on"),
        (lambda: cpu.dense_linear(x, torch.ones(4, 16)), "bf16 weight"),
    ]
    for call, message in bad:
        with pytest.raises(ValueError, match=message):
            call()


def test_isa_names_of_native_restrict_the_features() -> None:
    need_kernel()
    try:
        for isa in ISAS:
            if use_isa("sparse24", isa) == isa:
                assert native("sparse24").isa == isa
                assert len(cpu.features()) == {"scalar": 0, "avx2": 1}.get(isa, len(cpu.features()))
    finally:
        use_isa("sparse24", ISAS[-1])


@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
def test_sparse24_sanitizers(tmp_path: Path) -> None:
    """Every kernel under AddressSanitizer and UndefinedBehaviorSanitizer, on arrays that end where their memory ends."""
    assert COMPILER is not None
    source = Path(compress_kernels.__file__).parent / "sparse24" / "cpu.cpp"
    driver, program = Path(__file__).with_name("sparse24_sanitizer_driver.cpp"), tmp_path / "driver"
    flags = [
        "-std=c++17",
        "-O0",
        "-w",
        "-fopenmp",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        f'-DSOURCE="{source}"',
    ]
    built = subprocess.run([COMPILER, *flags, str(driver), "-o", str(program)], capture_output=True, text=True)
    if "cannot find" in built.stderr and "san" in built.stderr:
        pytest.skip("the compiler's sanitizer libraries are not installed")
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([str(program)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split()[:2] == ["checked", "660"]


def test_reference_is_the_dense_product() -> None:
    """The oracle itself, from the definition."""
    weight, x, bias = random_24(6, 20), numbers(3, 20), numbers(6)
    packed: Packed24 = pack(weight)
    y: Tensor = reference.linear(x, packed, bias)
    torch.testing.assert_close(y, x @ weight.T + bias)
    q, scale = reference.quantize_activations(torch.tensor([[127.0, -63.5, 0.4], [0, 0, 0], [torch.inf, 1, 2]]))
    assert q.tolist() == [[127, -64, 0], [0, 0, 0], [0, 0, 0]]
    assert scale[0].item() == 1
    assert scale[2].isnan()
    with pytest.raises(ValueError, match="pack the matrix as int8"):
        reference.linear(x, packed, bias, "int8")

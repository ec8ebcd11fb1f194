"""Compressed bf16 weights: the matrix to the bit, and products to the bit those of plain panels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fssa_kernels import StepGraph, explain, modulated_linear, pack_matrix, take_rows
from fssa_kernels.native import MISSING, NATIVE

pytestmark = pytest.mark.skipif(NATIVE is None, reason=str(MISSING))

READS = NATIVE is not None and "avx512bf16" in NATIVE.instruction_sets()
RARE = [float("nan"), float("inf"), -float("inf"), 3e38, -1e-30, 1e-40, 0.0, -0.0]


@pytest.fixture
def reads_compressed():
    if not READS:
        pytest.skip("no instruction set here reads compressed weights")
    before = NATIVE.instruction_set()
    NATIVE.set_instruction_set("avx512bf16")
    yield
    NATIVE.set_instruction_set(before)


@pytest.fixture
def reads_no_compressed():
    before = NATIVE.instruction_set()
    NATIVE.set_instruction_set("portable")
    yield
    NATIVE.set_instruction_set(before)


def weights(num_rows, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(num_rows, width, generator=generator) * width**-0.5).bfloat16()


def with_rare(matrix, count):
    matrix[0, :count] = 10.0 ** -torch.arange(20, 20 + count)
    return matrix


def bits(tensor):
    return tensor.contiguous().view(torch.int16)


def both(matrix, **layout):
    plain = pack_matrix(matrix, compress=False, **layout)
    compressed = pack_matrix(matrix, compress=True, **layout)
    assert not plain.header_bytes
    assert compressed.header_bytes
    return plain, compressed


def test_weights_take_three_quarters():
    matrix = weights(512, 576)
    plain, compressed = both(matrix)
    assert compressed.num_bytes <= 0.76 * plain.num_bytes
    assert torch.equal(bits(compressed.unpack()), bits(matrix))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    splits=st.lists(st.integers(1, 50), min_size=1, max_size=3),
    paired=st.booleans(),
    narrow=st.booleans(),
    units=st.integers(16, 40),
    rare=st.lists(
        st.tuples(st.integers(0, 10**6), st.integers(0, 10**6), st.sampled_from(RARE)), max_size=6
    ),
    seed=st.integers(0, 99),
)
def test_compression_is_undone_to_the_bit(splits, paired, narrow, units, rare, seed):
    if paired:
        splits = splits[:1] * 2
    matrix = weights(sum(splits), (8 if narrow else 4) * units, seed)
    for row, column, value in rare:
        matrix[row % matrix.shape[0], column % matrix.shape[1]] = value
    compressed = pack_matrix(matrix, splits=splits, paired=paired, narrow=narrow, compress=True)
    assert torch.equal(bits(compressed.unpack()), bits(matrix))
    if not paired and not narrow and len(splits) == 1:
        index = torch.arange(matrix.shape[0], dtype=torch.int32).flip(0)
        assert torch.equal(bits(take_rows(compressed, index)), bits(matrix.flip(0)))


@pytest.mark.parametrize(
    ("matrix", "layout"),
    [
        (weights(64, 128).float(), {}),
        (weights(64, 130), {}),
        (weights(64, 131), {}),
        (weights(64, 132), dict(narrow=True)),
        (weights(64, 60), {}),
        (weights(64, 120), dict(narrow=True)),
        (weights(0, 128), {}),
        (with_rare(weights(32, 128), 6), {}),
        (torch.randint(-(2**15), 2**15, (64, 128)).short().view(torch.bfloat16), {}),
    ],
    ids=[
        "fp32",
        "half a unit",
        "odd",
        "half a narrow unit",
        "short",
        "short and narrow",
        "empty",
        "six exceptions in 32 units",
        "any magnitude",
    ],
)
def test_what_would_gain_nothing_stays_as_it_is(matrix, layout):
    packed = pack_matrix(matrix, compress=True, **layout)
    assert not packed.header_bytes
    assert packed.num_bytes == pack_matrix(matrix, compress=False, **layout).num_bytes
    assert torch.equal(packed.unpack().view(torch.uint8), matrix.view(torch.uint8))


# Exceptions: in the first unit and the last, alone, side by side, and in every panel.
PLACES = {
    "none": [],
    "first": [(0, 0)],
    "last": [(31, 127)],
    "side by side": [(5, 3), (5, 4), (6, 4), (5, 5), (5, 7)],
    "one unit": [(row, 8 + row % 4) for row in range(0, 16, 5)],
    "every panel": [(row, 4 * row % 128) for row in range(0, 96, 16)],
}


@pytest.mark.usefixtures("reads_compressed")
@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 5, 8, 11, 12, 13, 24, 33])
@pytest.mark.parametrize("threads", [1, 3])
def test_products_are_bitwise_those_of_plain_panels(places, num_tokens, threads):
    torch.set_num_threads(threads)
    matrix = weights(96, 128)
    for row, column in places:
        matrix[row, column] = 1e-30
    x = torch.randn(num_tokens, 128).bfloat16()
    plain, compressed = both(matrix)
    expected = modulated_linear(x, plain, backend="native")
    assert expected.isfinite().all()
    assert torch.equal(modulated_linear(x, compressed, backend="native"), expected)


@pytest.mark.usefixtures("reads_compressed")
def test_an_exception_is_the_number_it_stands_for():
    """Rows of x that pick one column each: what comes out is the weight itself."""
    matrix = weights(64, 128)
    matrix[3, 5], matrix[40, 127], matrix[63, 0] = 2.0**-100, -(2.0**90), 2.0**-60
    _, compressed = both(matrix)
    x = torch.eye(128).bfloat16()
    assert torch.equal(modulated_linear(x, compressed, backend="native"), matrix.T)


@pytest.mark.usefixtures("reads_compressed")
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    family=st.sampled_from(["static", "gated", "core"]),
    num_tokens=st.integers(1, 40),
    splits=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    pair=st.booleans(),
    rank=st.sampled_from([8, 64, 100, 256]),
    parts=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 99),
)
def test_low_rank_terms_are_bitwise_those_of_plain_panels(
    family, num_tokens, splits, pair, rank, parts, seed
):
    """So is A, and B where its rank is large; projections of a stack share its panels."""
    if pair:
        splits = splits[:1] * 2
    width, num_users = parts * (128 + 8 * (seed % 20)), 3
    layout = dict(splits=splits, paired=pair)
    matrices = dict(
        weight=(weights(sum(splits), width, seed), layout),
        lora_a=(weights(len(splits) * rank, width, seed + 2), dict(narrow=True)),
        lora_b=(weights(sum(splits), rank, seed + 1), layout),
    )
    for matrix, _ in matrices.values():
        matrix[0, 0] = matrix[-1, -1] = 1e-30
    shape = (
        (num_users, len(splits), rank, rank)
        if family == "core"
        else (num_users, len(splits) * rank)
    )
    generator = torch.Generator().manual_seed(seed)
    rest = dict(
        x=torch.randn(num_tokens, width, generator=generator).bfloat16(),
        family=family,
        splits=splits,
        epilogue="silu_mul" if pair else "none",
    )
    if family != "static":
        rest["rows"] = torch.randn(shape, generator=generator)
        rest["slots"] = torch.randint(num_users, (num_tokens,), generator=generator).int()
    results = [
        modulated_linear(
            **rest,
            **{
                name: pack_matrix(matrix, compress=compress, **how)
                for name, (matrix, how) in matrices.items()
            },
            backend="native",
        )
        for compress in (False, True)
    ]
    assert pack_matrix(matrices["lora_a"][0], narrow=True, compress=True).header_bytes
    assert torch.equal(*results)


@pytest.mark.usefixtures("reads_compressed")
def test_a_recorded_step_reads_compressed_weights():
    matrix, x = weights(96, 128), torch.zeros(5, 128).bfloat16()
    plain, compressed = both(matrix)
    graph = StepGraph.record(lambda _: modulated_linear(x, compressed), {"tokens": (x,)})
    x.copy_(torch.randn(5, 128))
    graph.replay(tokens=4)
    assert torch.equal(graph.outputs[:4], modulated_linear(x[:4], plain))


def test_an_instruction_set_compresses_what_it_reads():
    before = NATIVE.instruction_set()
    try:
        for name in NATIVE.instruction_sets():
            NATIVE.set_instruction_set(name)
            assert bool(pack_matrix(weights(64, 128)).header_bytes) == (name == "avx512bf16")
    finally:
        NATIVE.set_instruction_set(before)


@pytest.mark.usefixtures("reads_no_compressed")
def test_another_instruction_set_says_what_it_does_not_read():
    matrix, x = weights(64, 128), torch.randn(3, 128).bfloat16()
    compressed = pack_matrix(matrix, compress=True)
    verdicts = {verdict.backend: verdict for verdict in explain(modulated_linear, x, compressed)}
    assert not verdicts["native"].can
    assert "weight is compressed" in verdicts["native"].reason
    expected = modulated_linear(x, matrix, backend="reference")
    assert torch.equal(modulated_linear(x, compressed), expected)
    with pytest.raises(ValueError, match="weight is compressed"):
        modulated_linear(x, compressed, backend="native")


@pytest.mark.usefixtures("reads_compressed")
def test_a_graph_of_compressed_weights_is_not_replayed_on_another_instruction_set():
    x = torch.randn(3, 128).bfloat16()
    plain, compressed = both(weights(64, 128))
    graph = StepGraph.record(
        lambda _: [modulated_linear(x, weight) for weight in (plain, compressed)], {"tokens": (x,)}
    )
    NATIVE.set_instruction_set("portable")
    before = [output.clone() for output in graph.outputs]
    with pytest.raises(ValueError, match="expected matrices that are not compressed for portable"):
        graph.replay(tokens=3)
    for output, unchanged in zip(graph.outputs, before, strict=True):
        assert torch.equal(bits(output), bits(unchanged))

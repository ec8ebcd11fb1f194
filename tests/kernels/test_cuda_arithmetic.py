"""Index arithmetic, epilogues and launch planning of the CUDA kernels, on the host."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fssa_kernels.gpu.device import NOMINAL
from tests.kernels.cuda_emulation import DEVICES, emulated  # noqa: F401

BANK = 128  # bytes that all banks together hold
FAMILIES = {"none": 0, "static": 1, "gated": 2, "core": 3, "factors": 4}
UNLIMITED = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def limits(module, facts):
    return module.DeviceLimits(facts.capability, facts.num_sms, facts.shared_bytes)


def plan(module, facts, **sizes):
    defaults = dict(num_tokens=8, in_features=4096, splits=[4096], paired=False, rank=16)
    sizes = {**defaults, **sizes}
    sizes["family"] = FAMILIES[sizes.get("family", "gated")]
    return module.modulated_linear_plan(device=limits(module, facts), **sizes)


@pytest.mark.parametrize("row_bytes", [128, 256, 384, 512])
def test_rows_do_not_overlap_and_lanes_read_from_different_banks(row_bytes, emulated):  # noqa: F811
    for rows in (1, 2, 15, 16, 144):
        offsets = [emulated.row_offset(row, row_bytes) for row in range(rows)]
        ends = [*offsets[1:], emulated.rows_bytes(rows, row_bytes)]
        assert all(b - a >= row_bytes for a, b in zip(offsets, ends, strict=True))
        assert all(offset % 16 == 0 for offset in offsets)
    # A read of 16 bytes is served eight lanes at a time: rows 2i and 2i + 1, four lanes each.
    for row in range(0, 16, 2):
        for step in range(row_bytes // 64):
            banks = {
                (emulated.row_offset(row + r, row_bytes) + 64 * step + 16 * c) % BANK
                for r in range(2)
                for c in range(4)
            }
            assert len(banks) == 8


def test_lanes_read_tiles_from_different_banks_and_every_row_once(emulated):  # noqa: F811
    rows = [emulated.row_of_lanes(g) for g in range(8)]
    assert sorted(rows) == list(range(8))
    places = {emulated.tile_offset(row, chunk) for row in range(32) for chunk in range(8)}
    assert places == set(range(0, 32 * 128, 16))
    for g in range(0, 8, 2):
        for step in range(2):
            banks = {
                emulated.tile_offset(rows[g + i], 4 * step + c) % BANK
                for i in range(2)
                for c in range(4)
            }
            assert len(banks) == 8


@UNLIMITED
@given(num_tiles=st.integers(1, 90), per_tile=st.integers(1, 90), grid=st.integers(1, 200))
def test_blocks_take_every_unit_once_and_leave_parts_apart(
    num_tiles,
    per_tile,
    grid,
    emulated,  # noqa: F811
):
    units = num_tiles * per_tile
    grid = min(grid, units)
    bounds = [emulated.first_unit(block, units, grid) for block in range(grid + 1)]
    assert bounds[0] == 0
    assert bounds[-1] == units
    assert max(b - a for a, b in itertools.pairwise(bounds)) <= -(-units // grid)
    slots = {}
    for block, (first, end) in enumerate(itertools.pairwise(bounds)):
        for unit in {first, end - 1}:
            assert emulated.owner_of(unit, units, grid) == block
        for tile in range(first // per_tile, (end - 1) // per_tile + 1):
            whole = first <= tile * per_tile and (tile + 1) * per_tile <= end
            if not whole:
                slot = emulated.partial_slot(block, tile, units, per_tile, grid)
                assert slot // 2 == block
                assert slots.setdefault(slot, (block, tile)) == (block, tile)


@UNLIMITED
@given(
    splits=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    width=st.sampled_from([16, 32, 64, 128]),
)
def test_tiles_cover_every_column_once_and_keep_to_their_projection(
    splits,
    width,
    emulated,  # noqa: F811
):
    seen = []
    for tile in range(sum(-(-size // width) for size in splits)):
        projection, first, columns = emulated.place_of(tile, splits, width)
        assert 1 <= columns <= width
        assert sum(splits[:projection]) <= first
        assert first + columns <= sum(splits[: projection + 1])
        seen += range(first, first + columns)
    assert seen == list(range(sum(splits)))


def test_epilogues_are_torch_s(emulated):  # noqa: F811
    gate = torch.cat([torch.linspace(-30, 30, 241), torch.tensor([-200.0, 0.0, 200.0])])
    up = torch.linspace(-3, 3, len(gate))
    for function, expected in (
        (emulated.silu_mul, F.silu(gate.double()) * up),
        (emulated.gelu_tanh_mul, F.gelu(gate.double(), approximate="tanh") * up),
    ):
        got = [function(g, u) for g, u in zip(gate.tolist(), up.tolist(), strict=True)]
        torch.testing.assert_close(
            torch.tensor(got, dtype=torch.float64), expected, rtol=1e-5, atol=1e-6
        )


@UNLIMITED
@given(data=st.data())
def test_plans_fit_the_device_and_hang_on_rows_for_stages_only(data, emulated):  # noqa: F811
    draw = data.draw
    facts = draw(st.sampled_from([*NOMINAL.values(), *DEVICES.values()]))
    paired = draw(st.booleans())
    sizes = draw(st.lists(st.integers(1, 30000), min_size=1, max_size=4))
    problem = dict(
        in_features=8 * draw(st.integers(1, 2000)),
        splits=sizes[:1] * 2 if paired else sizes,
        paired=paired,
        family=draw(st.sampled_from(list(FAMILIES))),
        rank=draw(st.integers(1, 64)),
    )
    shapes = set()
    for num_tokens in (1, 8, 9, 16, 17, 32):
        chosen = plan(emulated, facts, num_tokens=num_tokens, **problem)
        assert chosen.shared_bytes <= facts.shared_bytes
        assert chosen.stages >= 2
        assert chosen.threads <= 384
        assert 1 <= chosen.grid <= facts.num_sms
        assert 8 * chosen.token_tiles >= num_tokens
        assert chosen.tiles == (facts.capability >= 90)
        shapes.add((chosen.block_columns, chosen.in_loop, chosen.low_rows, chosen.grid))
    assert len(shapes) == 1
    # The product itself is the same without a term: so are its bits.
    base = plan(emulated, facts, **{**problem, "family": "none", "rank": 0})
    assert (base.block_columns, base.grid) == (chosen.block_columns, chosen.grid)


@pytest.mark.parametrize("capability", sorted(NOMINAL))
def test_a_large_weight_keeps_every_multiprocessor_loading(capability, emulated):  # noqa: F811
    facts = NOMINAL[capability]
    for splits, paired in (([4096], False), ([14336, 14336], True), ([4096, 1024, 1024], False)):
        for num_tokens in (1, 16, 32):
            chosen = plan(emulated, facts, num_tokens=num_tokens, splits=splits, paired=paired)
            assert chosen.in_loop
            assert chosen.block_columns == 128
            assert chosen.grid == facts.num_sms
            # More than bandwidth times latency of one multiprocessor, about 20 KB on an H100.
            assert (chosen.stages - 1) * 256 * chosen.block_columns >= 32 << 10


def attention(module, facts, **sizes):
    defaults = dict(num_tokens=1, num_heads=32, num_kv_heads=8, head_dim=128, max_keys=4096)
    return module.paged_attention_plan(device=limits(module, facts), **{**defaults, **sizes})


def test_attention_shares_long_contexts_of_few_rows(emulated):  # noqa: F811
    facts = NOMINAL[90]
    assert attention(emulated, facts).num_parts == 32
    assert attention(emulated, facts, num_tokens=256).num_parts == 1
    assert attention(emulated, facts, max_keys=100).num_parts == 1
    # Scratch memory of all splits would be 2 GB.
    huge = attention(emulated, facts, num_tokens=64, num_kv_heads=1, num_heads=16, max_keys=2**21)
    assert huge.num_parts == 1
    assert huge.num_partials == 0

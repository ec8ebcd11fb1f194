"""The native kernels and what they cannot serve: an error before any memory is touched."""

import importlib

import pytest
import torch

import fssa_kernels
from fssa_kernels import pack_matrix, paged_attention, take_rows
from fssa_kernels.native import MISSING, NATIVE
from fssa_kernels.testing import cases
from tests.kernels.accuracy import (
    by_name,
    run,
)

pytestmark = pytest.mark.skipif(NATIVE is None, reason=str(MISSING))


def replace(name, row, value):
    def change(inputs):
        inputs[name] = inputs[name].clone()
        inputs[name][row] = value

    return change


def bad_index(op, case, name, low, high, row=-1, shown=None):
    """Values just outside [low, high) in one row of an index."""
    for value in (low - 1, high, 2**31 - 1, -(2**31)):
        message = rf"{op}: {shown or name}: expected values in \[{low}, {high}\), got {value} at"
        yield pytest.param(
            op, case, replace(name, row, value), message, id=f"{op}-{case}-{name}-{row}-{value}"
        )


def bad_lengths(name, row, value):
    message = (
        "paged_attention: q_indptr and kv_lens: expected kv_lens of at most 16, q_indptr that "
        rf"rises from 0 to at most 3 by at most kv_lens, got .*{value}"
    )
    change = replace(name, row, value)
    return pytest.param("paged_attention", "decode", change, message, id=f"{name}-{row}-{value}")


BAD = [
    *bad_index("modulated_linear", "gated", "slots", 0, 4),
    *bad_index("modulated_linear", "gated", "slots", 0, 4, row=0),
    *bad_index("modulated_linear", "core", "slots", 0, 4),
    *bad_index("modulated_linear", "factors", "slots", 0, 4),
    *bad_index("residual_film_rms_norm", "film", "slots", 0, 3),
    *bad_index("residual_film_rms_norm", "film", "slots", 0, 3, row=0),
    *bad_index("rope_kv_write", "plain", "positions", 0, 50),
    *bad_index("rope_kv_write", "plain", "kv_slots", -1, 20),
    *bad_index("rope_kv_write", "plain", "kv_slots", -1, 20, row=0),
    *bad_index("paged_attention", "decode", "block_tables", 0, 9, row=(2, 2)),
    *bad_index("paged_attention", "window", "block_tables", 0, 11, row=(0, 3)),
    *bad_index("take_rows", "few", "index", 0, 23),
    *bad_index("sample", "drawn", "forced", -1, 131),
    *(bad_lengths("kv_lens", row, value) for row in (0, 2) for value in (17, 0, -1, 2**31 - 1)),
    bad_lengths("q_indptr", 0, -1),
    bad_lengths("q_indptr", 3, 4),
    bad_lengths("q_indptr", 1, 3),
    bad_lengths("q_indptr", 2, 0),
    bad_lengths("q_indptr", 2, 2**31 - 1),
]


@pytest.mark.parametrize(("op", "case", "change", "message"), BAD)
def test_an_index_out_of_range_is_an_error_before_anything_is_written(
    op, case, change, message, monkeypatch
):
    fresh = []
    module = importlib.import_module(f"fssa_kernels.ops.{op}.native_impl")

    def remember(allocate):
        def allocate_filled(*args, **options):
            fresh.append(allocate(*args, **options).fill_(77))
            return fresh[-1]

        return allocate_filled

    if hasattr(module, "empty"):
        monkeypatch.setattr(module, "empty", remember(module.empty))
    inputs = by_name(op, case)
    for name in ("k_cache", "v_cache"):
        if op == "rope_kv_write":
            inputs[name].fill_(77)
            fresh.append(inputs[name])
    change(inputs)
    with pytest.raises(ValueError, match=message):
        getattr(fssa_kernels, op)(**inputs, backend="native")
    assert fresh
    assert all((tensor == 77).all() for tensor in fresh)


@pytest.mark.parametrize("value", [-1, 70])
def test_an_index_outside_a_packed_table_is_an_error(value):
    table = pack_matrix(torch.zeros(70, 5))
    with pytest.raises(ValueError, match=rf"index: expected values in \[0, 70\), got {value}"):
        take_rows(table, torch.tensor([0, value], dtype=torch.int32))


@pytest.mark.parametrize("op", ["modulated_linear", "residual_film_rms_norm"])
def test_a_table_of_no_users_has_no_slot(op):
    inputs = by_name(op, "gated" if op == "modulated_linear" else "film")
    inputs["rows"] = inputs["rows"][:0].clone()
    inputs["slots"].zero_()
    with pytest.raises(ValueError, match=r"slots: expected values in \[0, 0\), got 0 at row 0"):
        getattr(fssa_kernels, op)(**inputs, backend="native")


def test_slots_past_the_last_row_of_a_request_may_hold_anything():
    """What is checked is what is read: pages beyond a length, and before a window, are not."""
    inputs = by_name("paged_attention", "window")
    expected = paged_attention(**inputs, backend="native")
    inputs["block_tables"][0, 0] = inputs["block_tables"][0, 1] = -7  # 3 queries from 14 - 3 - 3
    inputs["block_tables"][:, -1] = 2**31 - 1
    assert torch.equal(paged_attention(**inputs, backend="native"), expected)


@pytest.mark.parametrize(
    ("op", "name", "reason"),
    [
        ("rope_kv_write", "k_cache", "k_cache is not contiguous"),
        ("rope_kv_write", "cos_sin", "cos_sin is not contiguous"),
        ("paged_attention", "v_cache", "v_cache is not contiguous"),
        ("paged_attention", "kv_lens", "the last dimension of kv_lens is not contiguous"),
        ("take_rows", "table", "the last dimension of table is not contiguous"),
        ("sample", "uniform", "the last dimension of uniform is not contiguous"),
        ("residual_film_rms_norm", "x", "the last dimension of x is not contiguous"),
    ],
)
def test_what_it_cannot_serve_is_refused_when_named_and_served_otherwise(op, name, reason):
    inputs = by_name(op, cases(op)[0].name)
    expected = run(op, inputs, "reference")
    inputs[name] = torch.stack([inputs[name], inputs[name]], dim=-1)[..., 0]
    with pytest.raises(ValueError, match=rf"{op}: backend 'native' cannot serve.*{reason}"):
        run(op, inputs)
    for got, right in zip(run(op, inputs, "auto"), expected, strict=True):
        torch.testing.assert_close(got, right, equal_nan=True)

"""The lines a tile makes its core's before it stores to them: `own_stored`, compiled into a program
that says where it wrote and what it asked for."""

import subprocess

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.kernels.test_native_threads import COMPILER, compiled

LINE, HALF, KEPT_BYTES = 64, 16, 1024 * 1024
MAX_ROWS = 4  # of the portable kernels

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++ or clang++")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("claims"), "claims_probe")


def touched(program, *numbers):
    """Where zeros were written and what was asked for: bytes from the beginning of the result."""
    result = subprocess.run(
        [program], input=" ".join(map(str, numbers)), capture_output=True, text=True, check=True
    )
    return [[int(place) for place in part.split()] for part in result.stdout.split("-", 1)]


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, MAX_ROWS),
    before=st.integers(0, 5),
    after=st.integers(0, 5),
    offset=st.integers(0, 31),
    stride=st.one_of(st.integers(2 * HALF, 4 * HALF), st.just(2 * HALF)),
    size=st.sampled_from([2, 4]),
    is_pair=st.booleans(),
    valid=st.tuples(st.integers(1, HALF), st.integers(0, HALF)),
    gap=st.integers(0, HALF),
    far=st.booleans(),
)
# Both halves of bf16 in one line, and more rows than a cache keeps.
@example(4, 0, 0, 0, 32, 2, False, (HALF, HALF), 0, False)
@example(4, 3, 7, 2, 48, 4, False, (HALF, HALF), 0, True)
def test_lines_of_what_is_stored_are_claimed_once_and_nothing_else(
    program, rows, before, after, offset, stride, size, is_pair, valid, gap, far
):
    """Where rows are whole lines apart, every line that begins in what the tile stores. Of a result
    that no cache keeps, lines are asked for instead, where there are several tiles."""
    count = before + rows + after
    if far:
        stride += -(-KEPT_BYTES // (count * size * LINE)) * LINE
    columns = (gap, gap + valid[0])
    if columns[1] + valid[1] > stride:
        columns = (0, HALF)
    start = offset * size
    stored = {
        (before + row) * stride * size + column * size + byte
        for row in range(rows)
        for column, num in list(zip(columns, valid, strict=True))[: 1 if is_pair else 2]
        for byte in range(num * size)
    }
    written, asked = touched(
        program, rows, before, count, start, stride, size, int(is_pair),
        columns[0], valid[0], columns[1], valid[1],
    )  # fmt: skip
    kept = count * stride * size <= KEPT_BYTES
    places, others = (written, asked) if kept else (sorted(asked), written)
    assert others == []
    if not kept and count <= MAX_ROWS:
        assert places == []
    elif stride * size % LINE == 0:
        assert places == sorted(place for place in stored if (start + place) % LINE == 0)
    else:
        assert stored.issuperset(places)
        assert len({(start + place) // LINE for place in places}) == len(places)

"""What a thread asks for ahead while it multiplies: `panel_reads.inl`, compiled into a program that
notes every request and every line that is read."""

import subprocess

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.kernels.test_native_threads import COMPILER, compiled

LINE, BEYOND_NEXT = 64, 64 * 1024
LEADS = {32 * 1024: 4 * 1024, 48 * 1024: 10 * 1024}  # by the size of the first-level cache
SMALL_CACHE, BUSY_LEAD = 32 * 1024, 6 * 1024
# Of the portable kernels, whose tiles hold four sums.
BUSY_ROWS, ROWS_READ_ONCE = 2, 2

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++ or clang++")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("ahead"), "panel_reads_probe")


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 200).map(lambda eights: 8 * eights),
    panels=st.tuples(st.integers(4, 40), st.integers(4, 40)),
    header_lines=st.integers(0, 3),
    thread=st.sampled_from([(1, 0), (2, 0), (2, 1), (4, 3)]),
    cache=st.sampled_from(list(LEADS)),
    rank=st.integers(0, 64),
)
# What one product asked for early, the next one has to leave out.
@example(rows=1, columns=72, panels=(4, 4), header_lines=0, thread=(1, 0), cache=32 * 1024, rank=18)
# Rows that keep a core with the smaller cache busy.
@example(rows=2, columns=72, panels=(4, 9), header_lines=2, thread=(2, 1), cache=32 * 1024, rank=0)
@example(rows=2, columns=72, panels=(4, 9), header_lines=0, thread=(2, 1), cache=32 * 1024, rank=18)
def test_every_line_is_asked_for_once_before_it_is_read(
    program, rows, columns, panels, header_lines, thread, cache, rank
):
    """With a header, of compressed weights. What is asked for beside a low-rank term is left out
    later, or with every panel the requests would run further ahead."""
    arguments = " ".join(
        map(str, (rows, columns, *panels, LINE * header_lines, *thread, cache, rank))
    )
    result = subprocess.run(
        [program], input=arguments, capture_output=True, text=True, timeout=60, check=True
    )
    reads, unasked, requests, nearest, furthest, second = map(int, result.stdout.split())
    size, index = thread
    panel_lines = columns * 64 // LINE
    if header_lines:
        panel_lines = header_lines + panel_lines * 3 // 4
    own = [count * (index + 1) // size - count * index // size for count in panels]
    assert reads == panel_lines * sum(own)
    assert unasked == 0
    # A step of compressed weights reads three lines, and need not end where a piece of memory does;
    # nor does one of two lines, after a single one for a step of the low-rank term.
    early = rank // 2 if rows <= ROWS_READ_ONCE else 0
    step = 3 if header_lines else 2 if early else 1
    if early:
        assert abs(requests - reads) <= 4 * (step - 1)  # either end of the step, of two products
    elif rows <= ROWS_READ_ONCE or not header_lines:
        assert reads <= requests <= reads + 2 * (step - 1)
    else:  # half of three lines is asked for as two
        assert requests <= 3 / 2 * reads
    busy = cache == SMALL_CACHE and BUSY_ROWS <= rows <= ROWS_READ_ONCE
    # What a product reads first, the one before asks for, into the first-level cache.
    assert busy or second == 0
    assert second > 0 or not busy or max(own) == 1
    if rows <= ROWS_READ_ONCE:
        lead = BUSY_LEAD if busy else LEADS[cache]
        slack = early + step + 2 if early else step - 1
        assert furthest <= lead + slack * LINE
        if panel_lines * LINE >= lead:
            assert nearest >= lead - (step + 1) * LINE
    else:
        assert furthest <= 2 * panel_lines * LINE + BEYOND_NEXT

"""What a thread asks for ahead while it multiplies: `panel_reads.inl`, compiled into a program that
notes every request and every line that is read."""

import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.test_native_threads import COMPILER, compiled

LINE, LEAD, BEYOND_NEXT = 64, 10 * 1024, 64 * 1024
ROWS_READ_ONCE = 2  # of the portable kernels, whose tiles hold four sums

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++ or clang++")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("ahead"), "panel_reads_probe")


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 200).map(lambda eights: 8 * eights),
    panels=st.tuples(st.integers(4, 40), st.integers(4, 40)),
    thread=st.sampled_from([(1, 0), (2, 0), (2, 1), (4, 3)]),
)
def test_every_line_is_asked_for_once_before_it_is_read(program, rows, columns, panels, thread):
    arguments = " ".join(map(str, (rows, columns, *panels, *thread)))
    result = subprocess.run(
        [program], input=arguments, capture_output=True, text=True, timeout=60, check=True
    )
    reads, unasked, requests, nearest, furthest = map(int, result.stdout.split())
    size, index = thread
    panel_lines = columns * 64 // LINE
    own = [count * (index + 1) // size - count * index // size for count in panels]
    assert reads == panel_lines * sum(own)
    assert unasked == 0
    assert requests == reads
    if rows <= ROWS_READ_ONCE:
        assert furthest <= LEAD
        if panel_lines * LINE >= LEAD:
            assert nearest >= LEAD - 2 * LINE
    else:
        assert furthest <= 2 * panel_lines * LINE + BEYOND_NEXT

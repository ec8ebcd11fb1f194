"""How threads share work out: headers of csrc/cpu, compiled into programs that say so."""

import ctypes
import mmap
import shutil
import subprocess
import sys
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fssa_kernels import StepGraph, modulated_linear, pack_matrix
from fssa_kernels.native import MISSING, NATIVE

PAGE = mmap.PAGESIZE
FOLDER = Path(__file__).parent
SOURCES = FOLDER.parents[1] / "csrc" / "cpu"
COMPILER = shutil.which("g++") or shutil.which("clang++")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++ or clang++")


def compiled(folder, name, *sources, options=("-fopenmp",)):
    files = [str(FOLDER / f"{name}.cpp"), *(str(SOURCES / source) for source in sources)]
    common = ["-std=c++17", "-O1", f"-I{SOURCES}", "-o", str(folder / name)]
    subprocess.run([COMPILER, *files, *common, *options], check=True)
    return folder / name


def test_who_has_no_work_left_takes_what_another_has_not_begun(tmp_path):
    program = compiled(tmp_path, "threads_probe")
    result = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, "nobody helped"
    assert result.stdout.split() == ["1"] * 16


@pytest.mark.skipif(NATIVE is None, reason=str(MISSING))
@pytest.mark.skipif(sys.platform != "linux", reason="holds memory back by Linux's signals")
def test_a_linear_is_finished_by_who_is_not_held_up(tmp_path):
    """Who begins the second half of the panels waits for its weight until all else is done; who
    has the first half waits until then, so as not to be done before the other offers any."""
    tokens, panels, inputs = 64, 8, max(512, PAGE // 64)  # a panel holds a whole page
    torch.manual_seed(0)
    x, matrix = torch.randn(tokens, inputs), torch.randn(32 * panels, inputs)
    weight = pack_matrix(matrix)
    torch.set_num_threads(2)
    graph = StepGraph.record(lambda _: modulated_linear(x, weight), {"tokens": [x]})
    y = graph.outputs
    with torch.inference_mode():
        y.fill_(torch.nan)
    starts = [weight.data.data_ptr() + weight.num_bytes * half // 2 for half in (0, 1)]
    pages = [ctypes.c_void_p(-(-start // PAGE) * PAGE) for start in starts]
    columns = (16 * panels, 16 * panels + 32)
    probe = ctypes.CDLL(str(compiled(tmp_path, "held_page_probe", options=("-shared", "-fPIC"))))
    numbers = map(ctypes.c_int64, (*y.shape, y.stride(0), *columns))
    assert not probe.hold(*pages, ctypes.c_int64(PAGE), ctypes.c_void_p(y.data_ptr()), *numbers)
    try:
        graph.replay(tokens=tokens)
    finally:
        late = probe.release()
    assert late == 0, "nobody helped" if late > 0 else "nobody was held up"
    torch.testing.assert_close(y, x @ matrix.T, rtol=1e-4, atol=1e-3)


class Piece(NamedTuple):
    thread: int
    sequence: int
    first_token: int
    num_tokens: int
    first_head: int
    heads: int
    first_key: int
    stop_key: int
    divided: int

    @property
    def cost(self):
        return self.num_tokens * self.heads * (self.stop_key - self.first_key)


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    program = compiled(
        tmp_path_factory.mktemp("walk"), "attention_walk_probe", "paged_attention.cpp"
    )

    def pieces(threads, heads, kv_heads, window, requests):
        numbers = [threads, heads, kv_heads, window, *(n for request in requests for n in request)]
        done = subprocess.run(
            [program], input=" ".join(map(str, numbers)), capture_output=True, text=True, check=True
        )
        return [Piece(*map(int, line.split())) for line in done.stdout.splitlines()]

    return pieces


def requests_of(tokens, earlier):
    return st.tuples(tokens, earlier).map(lambda request: (request[0], sum(request)))


decodes = requests_of(st.just(1), st.integers(0, 9000))
chunks = requests_of(st.integers(0, 70), st.integers(0, 3000))


@settings(max_examples=60, deadline=None)
@given(
    threads=st.integers(1, 9),
    kv_heads=st.integers(1, 4),
    groups=st.sampled_from((1, 3, 8, 100)),
    window=st.sampled_from((0, 40, 1500)),
    requests=st.lists(decodes | chunks, min_size=1, max_size=6),
)
def test_every_key_of_every_head_is_one_threads(walk, threads, kv_heads, groups, window, requests):
    heads = groups * kv_heads
    pieces = walk(threads, heads, kv_heads, window, requests)
    starts = np.cumsum([0, *(tokens for tokens, _ in requests)])
    taken = defaultdict(list)
    splits = defaultdict(set)
    for piece in pieces:
        if piece.divided:
            splits[piece.divided].add(piece.first_token)
        for token in range(piece.first_token, piece.first_token + piece.num_tokens):
            for head in range(piece.first_head, piece.first_head + piece.heads):
                taken[token, head].append((piece.first_key, piece.stop_key))
    for (tokens, keys), start in zip(requests, starts[:-1], strict=True):
        for token in range(tokens):
            seen = keys - tokens + token + 1
            for head in range(heads):
                spans = sorted(taken.pop((start + token, head)))
                assert spans[0][0] <= (max(0, seen - window) if window else 0)
                assert all(before[1] == after[0] for before, after in pairwise(spans))
                assert spans[-1][1] >= seen
    assert not taken
    # A thread keeps the splits of one token at most.
    assert all(len(tokens) == 1 for tokens in splits.values())
    assert all(0 < thread < threads for thread in splits)
    # Nobody has more than their part and what cannot be cut in two, at either end half of it.
    costs = [sum(p.cost for p in pieces if p.thread == thread) for thread in range(threads)]
    whole = max((p.cost // p.heads for p in pieces), default=0)
    assert max(costs) <= sum(costs) / threads + whole + 1


def test_threads_part_within_the_keys_of_one_token(walk):
    """Heads alone would leave five to one thread and four to the other."""
    pieces = walk(2, 9, 3, 0, [(1, 4096)])
    assert {piece.divided for piece in pieces} == {1}
    keys = [[(p.first_key, p.stop_key) for p in pieces if p.thread == t] for t in (0, 1)]
    assert keys[0] == [(0, 512), (512, 1024), (1024, 1536), (1536, 2048)]
    assert keys[1] == [(2048, 2560), (2560, 3072), (3072, 3584), (3584, 4096)]
    assert {piece.heads for piece in pieces} == {9}


def test_keys_that_are_few_are_not_divided(walk):
    for request in ((1, 1024), (2, 8000)):
        assert not any(piece.divided for piece in walk(2, 9, 3, 0, [request]))

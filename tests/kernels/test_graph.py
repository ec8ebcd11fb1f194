"""StepGraph: a replay is the eager step, to the bit, and only what was asked for is written."""

import itertools
import sys
import threading
import time

import pytest
import torch
from torch.nn import functional as F

from fssa_kernels import (
    StepGraph,
    expand_modulation,
    graph_native,
    modulated_linear,
    pack_matrix,
    paged_attention,
    residual_film_rms_norm,
    rope_kv_write,
    sample,
    take_rows,
)
from fssa_kernels.native import CURRENT, MISSING, NATIVE, RecordingError

pytestmark = pytest.mark.skipif(NATIVE is None, reason=str(MISSING))

DTYPES = [torch.float32, torch.bfloat16]
TOKENS, SEQUENCES, USERS = 9, 5, 4
HEADS, KV_HEADS, HEAD_DIM, CHANNELS, INNER, RANK, VOCAB = 4, 2, 10, 21, 35, 3, 67
PAGE, MAX_PAGES, POSITIONS = 4, 6, 24
QKV = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM)


class Chain:
    """A decoder out of every op, its static inputs, and the step that reads them.

    `step` returns every tensor it makes, so that a recording keeps them all.
    """

    def __init__(self, dtype=torch.bfloat16, num_layers=2, seed=0):
        self.g = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        self.embedding = pack_matrix(self.normal(VOCAB, CHANNELS))
        self.layers = [
            dict(
                norms=[self.normal(CHANNELS) for _ in range(2)],
                film=[self.normal(USERS, 2, CHANNELS) for _ in range(2)],
                qkv=self.linear(CHANNELS, QKV),
                o=self.linear(QKV[0], (CHANNELS,)),
                up=self.linear(CHANNELS, (INNER, INNER), "silu_mul"),
                down=self.linear(INNER, (CHANNELS,)),
                cache=[
                    torch.zeros(SEQUENCES * MAX_PAGES, PAGE, KV_HEADS, HEAD_DIM, dtype=dtype)
                    for _ in range(2)
                ],
            )
            for _ in range(num_layers)
        ]
        self.norm = self.normal(CHANNELS)
        angles = 10 * torch.rand(POSITIONS, HEAD_DIM // 2, generator=self.g)
        self.cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1)

        def ints(*shape):
            return torch.zeros(shape, dtype=torch.int32)

        self.tokens = {name: ints(TOKENS) for name in ("ids", "slots", "positions", "kv_slots")}
        self.sequences = {
            "kv_lens": ints(SEQUENCES),
            "tables": ints(SEQUENCES, MAX_PAGES),
            "last": ints(SEQUENCES),
            "temperature": torch.zeros(SEQUENCES),
            "top_k": ints(SEQUENCES),
            "top_p": torch.ones(SEQUENCES),
            "min_p": torch.zeros(SEQUENCES),
            "uniform": torch.zeros(SEQUENCES),
            "forced": ints(SEQUENCES) - 1,
        }
        self.q_indptr = ints(SEQUENCES + 1)

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.g).to(self.dtype)

    def linear(self, width, splits, epilogue="none"):
        options = dict(splits=splits, paired=epilogue != "none")
        return dict(
            weight=pack_matrix(self.normal(sum(splits), width) * width**-0.5, **options),
            lora_a=self.normal(len(splits) * RANK, width) * width**-0.5,
            lora_b=pack_matrix(self.normal(sum(splits), RANK), **options),
            rows=self.normal(USERS, len(splits) * RANK),
            family="gated",
            splits=splits,
            epilogue=epilogue,
        )

    @property
    def inputs(self):
        return {
            "tokens": list(self.tokens.values()),
            "sequences": list(self.sequences.values()),
        }

    @property
    def caches(self):
        return [cache for layer in self.layers for cache in layer["cache"]]

    def fill(self, requests):
        """Put a step into the static inputs: (new tokens, cached length, user) of every request."""
        bounds, t = [0], 0
        for b, (count, kv_len, user) in enumerate(requests):
            pages = [b + SEQUENCES * page for page in range(MAX_PAGES)]
            self.sequences["tables"][b] = torch.tensor(pages)
            self.sequences["kv_lens"][b] = kv_len
            for position in range(kv_len - count, kv_len):
                self.tokens["ids"][t] = (7 * t + kv_len) % VOCAB
                self.tokens["slots"][t] = user
                self.tokens["positions"][t] = position
                self.tokens["kv_slots"][t] = pages[position // PAGE] * PAGE + position % PAGE
                t += 1
            bounds.append(t)
            self.sequences["last"][b] = t - 1
            self.sequences["temperature"][b] = b % 2
            self.sequences["uniform"][b] = 0.1 + 0.15 * b
        self.q_indptr[: len(bounds)] = torch.tensor(bounds, dtype=torch.int32)
        return dict(tokens=t, sequences=len(requests))

    def step(self, tokens=TOKENS, sequences=SEQUENCES):
        t = {name: tensor[:tokens] for name, tensor in self.tokens.items()}
        s = {name: tensor[:sequences] for name, tensor in self.sequences.items()}
        made = [take_rows(self.embedding, t["ids"], scale=2.0)]
        residual = None

        def norm(x, weight, film=None):
            slots = None if film is None else t["slots"]
            made.extend(residual_film_rms_norm(x, residual, weight, film, slots, eps=1e-5))
            return made[-2:]

        def linear(x, options):
            made.append(modulated_linear(x, slots=t["slots"], **options))
            return made[-1]

        hidden = made[0]
        for layer in self.layers:
            normed, residual = norm(hidden, layer["norms"][0], layer["film"][0])
            q, k, v = linear(normed, layer["qkv"]).split(QKV, dim=1)
            q, k, v = (heads.unflatten(1, (-1, HEAD_DIM)) for heads in (q, k, v))
            k_cache, v_cache = layer["cache"]
            made.append(
                rope_kv_write(
                    q, k, v, t["positions"], self.cos_sin, k_cache, v_cache, t["kv_slots"]
                )
            )
            lengths = s["tables"], s["kv_lens"], self.q_indptr[: sequences + 1]
            made.append(paged_attention(made[-1], k_cache, v_cache, *lengths, scale=0.3))
            hidden = linear(made[-1].flatten(1), layer["o"])
            normed, residual = norm(hidden, layer["norms"][1], layer["film"][1])
            hidden = linear(linear(normed, layer["up"]), layer["down"])
        normed, _ = norm(hidden, self.norm)
        made.append(take_rows(normed, s["last"]))
        made.append(modulated_linear(made[-1], self.embedding))
        draw = ("temperature", "top_k", "top_p", "min_p", "uniform", "forced")
        made.extend(sample(made[-1], *(s[name] for name in draw)))
        return made

    def record(self):
        return StepGraph.record(lambda _: self.step(), self.inputs)


class PoolWithoutReuse(graph_native._Pool):
    def empty(self, shape, dtype):
        self._free.clear()
        return super().empty(shape, dtype)


STEPS = {
    "prefill": [(4, 4, 1), (2, 2, 0), (3, 3, 3)],
    "decode": [(1, 5, 1), (1, 3, 2)],
    "all": [(1, 5, 1), (2, 3, 2), (3, 6, 0), (2, 9, 3), (1, 1, 1)],
    "one": [(1, 6, 1)],
    "chunk": [(3, 9, 2)],
    "nobody": [],
}


def poison(tensors):
    with torch.inference_mode():
        for tensor in tensors:
            tensor.fill_(float("nan") if tensor.is_floating_point() else -77)


def is_poisoned(tensor):
    return bool(tensor.isnan().all() if tensor.is_floating_point() else (tensor == -77).all())


def bits(tensor):
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def check_replay_is_eager(chain, graph, requests, own_memory=False):
    """Replay, then the same step eagerly from the same caches.

    With memory of its own for every tensor, what lies past the rows in use stays as it was.
    """
    rows = chain.fill(requests)
    before = [cache.clone() for cache in chain.caches]
    poison(graph.outputs)
    graph.replay(**rows)
    after = [cache.clone() for cache in chain.caches]
    for cache, old in zip(chain.caches, before, strict=True):
        cache.copy_(old)
    eager = chain.step(**rows)
    assert len(eager) == len(graph.outputs)
    for replayed, right in zip(graph.outputs, eager, strict=True):
        assert torch.equal(bits(replayed[: len(right)]), bits(right))
        assert not own_memory or is_poisoned(replayed[len(right) :])
    for cache, new in zip(chain.caches, after, strict=True):
        assert torch.equal(bits(cache), bits(new))


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("own_memory", [False, True])
def test_replay_is_bitwise_the_eager_step_and_writes_nothing_past_its_rows(
    dtype, num_threads, own_memory, monkeypatch
):
    """One recording serves every number of rows, user, length and page."""
    if own_memory:
        monkeypatch.setattr(graph_native, "_Pool", PoolWithoutReuse)
    torch.set_num_threads(num_threads)
    chain = Chain(dtype)
    graph = chain.record()
    assert len(graph) == len(graph.names)
    assert graph.names.count("paged_attention") == 2
    assert graph.names[-1] == "sample"
    for requests in [*STEPS.values(), STEPS["prefill"]]:
        check_replay_is_eager(chain, graph, requests, own_memory)


@pytest.mark.parametrize("name", NATIVE.instruction_sets() if NATIVE else [])
def test_replay_is_bitwise_eager_on_every_instruction_set(name):
    before = NATIVE.instruction_set()
    NATIVE.set_instruction_set(name)
    try:
        chain = Chain()
        check_replay_is_eager(chain, chain.record(), STEPS["all"])
    finally:
        NATIVE.set_instruction_set(before)


def test_recording_computes_nothing():
    chain = Chain()
    chain.fill(STEPS["all"])
    poison(chain.caches)
    chain.record()
    assert all(is_poisoned(cache) for cache in chain.caches)


def test_static_inputs_are_read_at_replay():
    chain = Chain()
    graph = chain.record()
    rows = chain.fill([(1, 5, 0), (1, 7, 2)])
    logits = []
    changes = [
        lambda: None,
        lambda: chain.tokens["slots"].fill_(1),
        lambda: chain.tokens["ids"][0].add_(1),
        lambda: chain.sequences["kv_lens"].add_(1),
        lambda: chain.sequences["tables"][:, 0].add_(1),
        lambda: chain.tokens["positions"].add_(1),
        lambda: chain.layers[0]["qkv"]["rows"][1].mul_(3),  # the user changed their mind
    ]
    for change in changes:
        change()
        for cache in chain.caches:
            cache.copy_(torch.linspace(-1, 1, cache.numel()).view(cache.shape))
        graph.replay(**rows)
        logits.append(graph.outputs[-3][:2].clone())
    for i, before in enumerate(logits[:-1]):
        for after in logits[i + 1 :]:
            assert not torch.equal(before, after)


def test_profile_times_every_op():
    chain = Chain()
    graph = chain.record()
    rows = chain.fill(STEPS["all"])
    graph.replay(**rows)
    expected = [t.clone() for t in graph.outputs]
    seconds = graph.profile(3, **rows)
    assert len(seconds) == len(graph)
    assert all(0 < s < 10 for s in seconds)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(graph.outputs, expected, strict=True))


# ---- what cannot be recorded

TORCH_OPS = {
    "add": lambda x: x + 1,
    "in place": lambda x: x.add_(1),
    "copy by contiguous": lambda x: x.t().contiguous(),
    "copy by reshape": lambda x: x.t().reshape(-1),
    "clone": lambda x: x.clone(),
    "cast": lambda x: x.double(),
    "embedding": lambda x: F.embedding(torch.zeros(3, dtype=torch.long), x),
    "index": lambda x: x[torch.zeros(3, dtype=torch.long)],
    "matmul": lambda x: x @ x.t(),
    "cat": lambda x: torch.cat([x, x]),
    "copy": lambda x: x.copy_(x),
    "read": lambda x: x[0, 0].item(),
    "new zeros": lambda x: torch.zeros(3),
    "random": lambda x: torch.randn(3),
}


@pytest.mark.parametrize("compute", TORCH_OPS.values(), ids=TORCH_OPS.keys())
@pytest.mark.parametrize("on", ["an input", "a result"])
def test_torchs_own_ops_are_refused(compute, on):
    x, weight = torch.randn(4, 6), pack_matrix(torch.randn(6, 6))
    before = x.clone()

    def step():
        return compute(x if on == "an input" else modulated_linear(x, weight))

    with pytest.raises(RecordingError, match="torch's own and would not be replayed"):
        StepGraph.record(lambda _, step=step: step(), {"tokens": [x]})
    assert torch.equal(x, before)


def test_views_are_allowed_and_replayed_in_place():
    x = torch.randn(4, 12)
    weight, last = pack_matrix(torch.randn(12, 12)), pack_matrix(torch.randn(2, 4))

    def step():
        y = modulated_linear(x, weight)
        assert y.reshape(4, 3, 4).contiguous().data_ptr() == y.data_ptr()
        part = y.view(4, 3, 4).transpose(1, 2).mT.flatten(1).split([8, 4], dim=1)[1]
        return modulated_linear(part[..., :4].unsqueeze(0)[0].detach(), last)

    graph = StepGraph.record(lambda _, step=step: step(), {"tokens": [x]})
    graph.replay(tokens=4)
    assert torch.equal(graph.outputs, step())


def test_an_op_without_a_native_kernel_is_refused_with_the_reason():
    x, weight = torch.randn(4, 6).double(), torch.randn(3, 6).double()
    with pytest.raises(RecordingError, match=r"native: x is torch\.float64.*reference: its calls"):
        StepGraph.record(lambda _: modulated_linear(x, weight), {"tokens": [x]})
    z, basis, bias = torch.randn(4, 3), torch.randn(5, 3), torch.zeros(5)
    with pytest.raises(RecordingError, match="expand_modulation: no backend supports"):
        StepGraph.record(lambda _: expand_modulation(z, basis, bias), {"users": [z]})
    x = torch.randn(4, 6)
    packed = pack_matrix(torch.randn(3, 6))
    with pytest.raises(ValueError, match="'reference' cannot serve this call: its calls cannot"):
        StepGraph.record(
            lambda _: modulated_linear(x, packed, backend="reference"), {"tokens": [x]}
        )


def on_a_stranger(op):
    """A step whose first argument of that op is no input of the graph."""
    chain = Chain(torch.float32)
    floats, ints = torch.randn(TOKENS, CHANNELS), torch.zeros(TOKENS, dtype=torch.int32)
    heads = torch.randn(TOKENS, KV_HEADS, HEAD_DIM)
    caches, s = chain.layers[0]["cache"], chain.sequences
    draw = [s[name] for name in ("temperature", "top_k", "top_p", "min_p", "uniform", "forced")]
    calls = {
        "take_rows": lambda: take_rows(chain.embedding, ints),
        "residual_film_rms_norm": lambda: residual_film_rms_norm(
            floats, None, chain.norm, eps=1e-5
        ),
        "modulated_linear": lambda: modulated_linear(floats, chain.embedding),
        "rope_kv_write": lambda: rope_kv_write(
            heads, heads, heads, ints, chain.cos_sin, *caches, ints
        ),
        "paged_attention": lambda: paged_attention(
            heads, *caches, s["tables"], s["kv_lens"], chain.q_indptr, scale=1.0
        ),
        "sample": lambda: sample(floats[:SEQUENCES], *draw),
    }
    return chain, calls[op]


@pytest.mark.parametrize(
    "op",
    [
        "take_rows",
        "residual_film_rms_norm",
        "modulated_linear",
        "rope_kv_write",
        "paged_attention",
        "sample",
    ],
)
def test_a_tensor_that_is_no_input_is_refused(op):
    chain, step = on_a_stranger(op)
    with pytest.raises(RecordingError, match="neither a static input nor the result"):
        StepGraph.record(lambda _: step(), chain.inputs)


def test_rows_must_be_those_of_the_dimension():
    x, weight = torch.randn(4, 6), pack_matrix(torch.randn(6, 6))
    for step in (
        lambda: modulated_linear(x[1:], weight),
        lambda: modulated_linear(modulated_linear(x, weight)[:3], weight),
    ):
        with pytest.raises(RecordingError, match="expected 4 rows, as the input this was computed"):
            StepGraph.record(lambda _, step=step: step(), {"tokens": [x]})


def test_inputs_must_fit_their_dimension():
    x, y = torch.randn(4, 6), torch.randn(3, 6)
    with pytest.raises(ValueError, match="tokens: expected 4 rows in every input, got 3"):
        StepGraph.record(lambda _: None, {"tokens": [x, y]})
    with pytest.raises(ValueError, match="sequences: expected at least one input, got none"):
        StepGraph.record(lambda _: None, {"sequences": [], "tokens": [x]})
    buffer = torch.randn(8, 6)
    with pytest.raises(ValueError, match=r"sequences: expected memory of its own.*of tokens"):
        StepGraph.record(lambda _: None, {"tokens": [buffer[:4]], "sequences": [buffer[4:]]})


def test_an_index_computed_in_the_step_is_refused():
    """It could only be checked after the replay has begun to write."""
    chain = Chain()
    chain.fill(STEPS["all"])

    def step():
        return take_rows(chain.embedding, chain.step()[-2])

    with pytest.raises(RecordingError, match=r"take_rows: .*index computed in the step"):
        StepGraph.record(lambda _: step(), chain.inputs)


# ---- the mode


def test_nested_recording_is_refused_and_the_mode_is_off_afterwards():
    chain = Chain()

    def nested():
        chain.step()
        chain.record()

    with pytest.raises(RecordingError, match="another graph is being recorded"):
        StepGraph.record(lambda _: nested(), chain.inputs)
    assert CURRENT.recorder is None
    check_replay_is_eager(chain, chain.record(), STEPS["all"])


def test_an_exception_in_the_step_leaves_the_mode_off():
    chain = Chain()

    def broken():
        chain.step()
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        StepGraph.record(lambda _: broken(), chain.inputs)
    assert CURRENT.recorder is None
    assert not torch.is_inference_mode_enabled()
    assert (torch.ones(2) + 1).sum() == 4  # torch's own ops compute again
    check_replay_is_eager(chain, chain.record(), STEPS["all"])


def test_other_threads_compute_while_one_records():
    chain, other = Chain(), Chain()
    rows, results = other.fill(STEPS["all"]), []
    expected = other.step(**rows)[-3]

    def step():
        thread = threading.Thread(target=lambda: results.append(other.step(**rows)[-3]))
        thread.start()
        thread.join()
        return chain.step()

    graph = StepGraph.record(lambda _: step(), chain.inputs)
    assert torch.equal(results[0], expected)
    check_replay_is_eager(chain, graph, STEPS["all"])


# ---- replay


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (dict(tokens=1), "expected rows of tokens, sequences, got tokens"),
        (dict(), "expected rows of tokens, sequences, got "),
        (dict(tokens=1, sequences=1, users=1), "expected rows of tokens, sequences, got .*users"),
        (dict(tokens=1, batch=1), "expected rows of tokens, sequences, got tokens, batch"),
        (dict(tokens=TOKENS + 1, sequences=1), "tokens: expected 0 to 9 rows, got 10"),
        (dict(tokens=1, sequences=SEQUENCES + 1), "sequences: expected 0 to 5 rows, got 6"),
        (dict(tokens=-1, sequences=1), "tokens: expected 0 to 9 rows, got -1"),
    ],
)
def test_a_replay_of_wrong_rows_is_an_error_and_writes_nothing(rows, message):
    chain = Chain()
    graph = chain.record()
    chain.fill(STEPS["one"])
    poison([*graph.outputs, *chain.caches])
    for call in (graph.replay, lambda **rows: graph.profile(1, **rows)):
        with pytest.raises(ValueError, match=f"StepGraph: {message}"):
            call(**rows)
    assert all(is_poisoned(tensor) for tensor in (*graph.outputs, *chain.caches))


BAD = {
    "ids": ("tokens", VOCAB, r"take_rows: index: expected values in \[0, 67\), got 67 at row 2"),
    "slots": ("tokens", USERS, r"slots: expected values in \[0, 4\), got 4 at row 2"),
    "positions": ("tokens", POSITIONS, r"positions: expected values in \[0, 24\), got 24"),
    "kv_slots": ("tokens", 120, r"kv_slots: expected values in \[-1, 120\), got 120"),
    "kv_lens": ("sequences", 25, "kv_lens of at most 24.*kv_lens 25 for request 2"),
    "tables": ("sequences", 30, r"block_tables: expected values in \[0, 30\), got 30"),
    "last": ("sequences", TOKENS, r"take_rows: index: expected values in \[0, 9\), got 9"),
    "forced": ("sequences", VOCAB, r"forced: expected values in \[-1, 67\), got 67"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("how", ["too large", "negative"])
def test_an_index_out_of_range_at_replay_is_an_error_before_anything_is_written(name, how):
    dimension, value, message = BAD[name]
    if how == "negative":
        value, message = -2, r"got (.*kv_lens )?-2"
    chain = Chain()
    graph = chain.record()
    rows = chain.fill(STEPS["all"])
    poison([*graph.outputs, *chain.caches])
    index = getattr(chain, dimension)[name]
    good = index.clone()
    index[2] = value
    with pytest.raises(ValueError, match=message):
        graph.replay(**rows)
    assert all(is_poisoned(tensor) for tensor in (*graph.outputs, *chain.caches))
    # The same number beyond the rows in use is not read.
    graph.replay(tokens=1, sequences=1) if name != "last" else None
    index.copy_(good)
    for cache in chain.caches:
        cache.zero_()
    check_replay_is_eager(chain, graph, STEPS["all"])


def test_every_table_an_index_goes_into_is_checked():
    """The same slots may be right for one table and wrong for a smaller one, in either order."""
    x, slots = torch.randn(3, 6), torch.zeros(3, dtype=torch.int32)
    large, small = torch.randn(5, 2, 6), torch.randn(2, 2, 6)
    weight, norm = pack_matrix(torch.randn(6, 6)), torch.ones(6)
    low_rank = dict(lora_a=torch.randn(2, 6), lora_b=torch.randn(6, 2), family="gated")
    steps = {
        5: lambda: residual_film_rms_norm(x, None, norm, large, slots, eps=0.0),
        2: lambda: residual_film_rms_norm(x, None, norm, small, slots, eps=0.0),
        0: lambda: residual_film_rms_norm(x, None, norm, small[:0], slots, eps=0.0),
        4: lambda: modulated_linear(x, weight, rows=torch_rows[4], slots=slots, **low_rank),
        3: lambda: modulated_linear(x, weight, rows=torch_rows[3], slots=slots, **low_rank),
    }
    torch_rows = {num_users: torch.randn(num_users, 2) for num_users in (3, 4)}
    plain = lambda: residual_film_rms_norm(x, None, norm, eps=0.0)  # noqa: E731
    for first, second in itertools.permutations(steps, 2):
        graph = StepGraph.record(
            lambda _, first=first, second=second: (plain(), steps[first](), steps[second]()),
            {"tokens": [x, slots]},
        )
        slots[:] = min(first, second)
        with pytest.raises(
            ValueError, match=r"slots: expected values in \[0, \d\), got \d at row 0"
        ):
            graph.replay(tokens=3)
        if min(first, second):
            slots[:] = min(first, second) - 1
            graph.replay(tokens=3)


# ---- memory


def pool_of(graph):
    return graph._keep._pool._blocks


def test_memory_is_used_again_from_layer_to_layer():
    sizes = []
    for num_layers in (2, 7):
        chain = Chain(num_layers=num_layers)
        graph = StepGraph.record(lambda _, chain=chain: chain_end(chain), chain.inputs)
        sizes.append([len(block) for block in pool_of(graph)])
        rows = chain.fill(STEPS["all"])
        graph.replay(**rows)
        for cache in chain.caches:
            cache.zero_()
        assert torch.equal(bits(graph.outputs), bits(chain.step(**rows)[-3]))
    assert sizes[0] == sizes[1]


def chain_end(chain):
    """The step of a chain that keeps only what it still needs, as a decoder does."""
    t, s = chain.tokens, chain.sequences
    hidden, residual = take_rows(chain.embedding, t["ids"], scale=2.0), None
    for layer in chain.layers:
        normed, residual = residual_film_rms_norm(
            hidden, residual, layer["norms"][0], layer["film"][0], t["slots"], eps=1e-5
        )
        qkv = modulated_linear(normed, slots=t["slots"], **layer["qkv"]).split(QKV, dim=1)
        q, k, v = (heads.unflatten(1, (-1, HEAD_DIM)) for heads in qkv)
        caches = layer["cache"]
        q = rope_kv_write(q, k, v, t["positions"], chain.cos_sin, *caches, t["kv_slots"])
        mixed = paged_attention(
            q, *caches, s["tables"], s["kv_lens"], chain.q_indptr, scale=0.3
        ).flatten(1)
        hidden = modulated_linear(mixed, slots=t["slots"], **layer["o"])
        normed, residual = residual_film_rms_norm(
            hidden, residual, layer["norms"][1], layer["film"][1], t["slots"], eps=1e-5
        )
        inner = modulated_linear(normed, slots=t["slots"], **layer["up"])
        hidden = modulated_linear(inner, slots=t["slots"], **layer["down"])
    normed, _ = residual_film_rms_norm(hidden, residual, chain.norm, eps=1e-5)
    return modulated_linear(take_rows(normed, s["last"]), chain.embedding)


def test_tensors_alive_at_once_never_share_memory():
    chain = Chain(num_layers=3)
    graph = chain.record()
    spans = sorted(
        (t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in graph.outputs
    )
    for (_, stop), (start, _) in itertools.pairwise(spans):
        assert stop <= start


def test_memory_returns_with_the_last_view_of_a_tensor_and_not_before():
    x, weight = torch.randn(4, 16), pack_matrix(torch.randn(16, 16))
    seen = {}

    def step():
        first = modulated_linear(x, weight)
        view = first[:, 3:5].unsqueeze(0)
        seen["first"] = first.data_ptr()
        del first
        seen["second"] = modulated_linear(x, weight).data_ptr()
        del view
        seen["third"] = {modulated_linear(x, weight).data_ptr() for _ in range(3)}

    StepGraph.record(lambda _, step=step: step(), {"tokens": [x]})
    assert seen["first"] != seen["second"]
    assert seen["third"] <= {seen["first"], seen["second"]}


def test_a_graph_outlives_everything_it_was_recorded_from():
    chain = Chain()
    rows = chain.fill(STEPS["all"])
    expected = [t.clone() for t in chain.step(**rows)]
    graph = chain.record()
    del chain
    graph.replay(**rows)  # weights, caches and static inputs are the graph's now
    for got, right in zip(graph.outputs, expected, strict=True):
        assert torch.equal(bits(got[: len(right)]), bits(right))


# ---- threads


@pytest.mark.parametrize("num_threads", [1, 2])
def test_two_graphs_replay_at_once(num_threads):
    torch.set_num_threads(num_threads)
    chains = [Chain(seed=seed) for seed in (1, 2)]
    graphs = [chain.record() for chain in chains]
    rows = [chain.fill(STEPS[name]) for chain, name in zip(chains, ("all", "chunk"), strict=True)]
    expected, wrong = [], []
    for graph, counts in zip(graphs, rows, strict=True):
        graph.replay(**counts)
        expected.append([t.clone() for t in graph.outputs])

    def work(graph, counts, right):
        for _ in range(30):
            poison(graph.outputs)
            graph.replay(**counts)
            for got, old in zip(graph.outputs, right, strict=True):
                if not torch.equal(bits(got), bits(old)) and not is_poisoned(old):
                    used = counts["tokens" if len(old) == TOKENS else "sequences"]
                    wrong.append(not torch.equal(bits(got[:used]), bits(old[:used])))

    parts = zip(graphs, rows, expected, strict=True)
    threads = [threading.Thread(target=work, args=part) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not any(wrong)


def test_replay_releases_the_gil():
    """Another thread goes on in the middle of one replay, which is a single call."""
    x, weight = torch.randn(512, 512), pack_matrix(torch.randn(512, 512))

    def step():
        y = x
        for _ in range(60):
            y = modulated_linear(y, weight)
        return y

    graph = StepGraph.record(lambda _, step=step: step(), {"tokens": [x]})
    ticks, done = [], threading.Event()

    def tick():
        while not done.wait(0.001):
            ticks.append(time.perf_counter())

    before = sys.getswitchinterval()
    thread = threading.Thread(target=tick)
    thread.start()
    try:
        sys.setswitchinterval(1e-4)
        # Until one replay has lasted long enough to say something, on however fast a machine.
        seconds = inside = 0
        for _ in range(100):
            start = time.perf_counter()
            graph.replay(tokens=512)
            stop = time.perf_counter()
            middle = start + 0.2 * (stop - start), stop - 0.2 * (stop - start)
            inside += sum(middle[0] < tick < middle[1] for tick in ticks)
            seconds += stop - start
            if inside >= 5:
                break
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(before)
    assert inside >= 5, f"{inside} ticks in {seconds:.2f} s of replays"

"""StepGraph: what can be recorded, what is refused with its reason, and whose memory it is."""

import gc
import itertools
import threading
import weakref

import pytest
import torch
from torch.nn import functional as F

from fssa_kernels import (
    StepGraph,
    expand_modulation,
    modulated_linear,
    pack_matrix,
    paged_attention,
    residual_film_rms_norm,
    rope_kv_write,
    sample,
    take_rows,
)
from fssa_kernels.native import CURRENT, MISSING, NATIVE, RecordingError
from tests.kernels.chain import (
    CHANNELS,
    HEAD_DIM,
    KV_HEADS,
    QKV,
    SEQUENCES,
    STEPS,
    TOKENS,
    Chain,
    bits,
    check_replay_is_eager,
)

pytestmark = pytest.mark.skipif(NATIVE is None, reason=str(MISSING))


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
        assert x.reshape(4, 3, 4).contiguous().data_ptr() == x.data_ptr()
        y = modulated_linear(x, weight)
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


def pool_of(graph):
    return graph._keep._pool._blocks.values()


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


def test_rows_of_a_threads_own_get_memory_that_only_such_rows_had():
    """A core that writes to a line which others have read waits until they have given it up."""
    x, weight = torch.zeros(6, 32), torch.zeros(32, 32)
    packed, own, others = pack_matrix(weight), set(), set()

    def step(_):
        y, h = x, None
        for _ in range(4):
            normed, h = residual_film_rms_norm(y, h, weight[0], eps=1e-5)
            y = modulated_linear(normed, packed)
            own.add(h.data_ptr())
            others.update((normed.data_ptr(), y.data_ptr()))
        return y

    StepGraph.record(step, {"tokens": (x,)})
    assert len(own) == 2
    assert not own & others


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 31, 32, 512, 2048])
def test_rows_that_a_product_takes_or_stores_lie_an_odd_number_of_cache_lines_apart(width, dtype):
    """A power of two apart, a dozen of them would take each other's place in the first cache."""
    x, weight = torch.zeros(6, width, dtype=dtype), torch.zeros(width, width, dtype=dtype)
    packed, index = pack_matrix(weight), torch.zeros(6, dtype=torch.int32)
    cache = torch.zeros(2, 8, 1, width, dtype=dtype)
    lengths = torch.zeros(6, 1, dtype=torch.int32), index + 1, torch.arange(7, dtype=torch.int32)

    def step(_):
        return (
            modulated_linear(x, packed),
            *residual_film_rms_norm(x, None, weight[0], eps=1e-5),
            take_rows(packed, index),
            paged_attention(x.unsqueeze(1), cache, cache, *lengths, scale=1.0).flatten(1),
        )

    inputs = {"tokens": (x, index), "sequences": (lengths[0], lengths[1])}
    for made in StepGraph.record(step, inputs).outputs:
        lines, rest = divmod(made.stride(0) * made.element_size(), 64)
        assert rest == 0
        assert lines % 2 == 1
        assert made.shape == (6, width)


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


def test_outputs_outlive_their_graph():
    x, weight = torch.randn(16, 64), torch.ones(64)
    graph = StepGraph.record(
        lambda _: residual_film_rms_norm(x, None, weight, eps=1e-5)[0], {"tokens": [x]}
    )
    graph.replay(tokens=16)
    outputs, expected = graph.outputs, graph.outputs.clone()
    sizes = [len(block) for block in pool_of(graph)]
    blocks = [weakref.ref(block) for block in pool_of(graph)]
    assert len(blocks) == 2  # normed, which is returned, and h, which is not
    del graph
    gc.collect()
    others = [torch.full((size,), 7, dtype=torch.uint8) for size in sizes for _ in range(50)]
    assert torch.equal(outputs, expected)
    assert sum(block() is not None for block in blocks) == 1
    del outputs, others
    assert all(block() is None for block in blocks)

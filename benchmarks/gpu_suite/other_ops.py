"""The ops around the linears, beside what torch has for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fssa_kernels
from benchmarks.gate import Judgement, judge, outputs, poisoned, widened
from benchmarks.gpu_suite.correctness import faulty_key
from benchmarks.gpu_suite.problems import (
    AttentionProblem,
    ExpandProblem,
    NormProblem,
    Problem,
    RopeProblem,
    SampleProblem,
    TakeProblem,
)
from benchmarks.gpu_suite.scale import Scale
from benchmarks.gpu_suite.shapes import MODELS, row_width
from benchmarks.gpu_suite.suite import Side, Suite
from fssa_kernels.ops.rope_kv_write.reference import apply_rope
from fssa_kernels.testing import Inputs

BASE = "torch"
CUDA_OPS = ("paged_attention", "residual_film_rms_norm")
Peer = Callable[[Inputs], Any]


def measure(suite: Suite) -> None:
    """All problems, ours and torch's in turn."""
    plan = (
        (key, lambda key=key, problem=problem, peer=peer: _contest(suite, key, problem, peer))
        for key, problem, peer in _problems(suite.scale)
    )
    suite.run("other ops", plan)


def _problems(scale: Scale) -> Iterator[tuple[dict[str, Any], Problem, Peer | None]]:
    model = MODELS[scale.decoders[0]]
    hidden = model.hidden
    heads = (model.num_heads, model.num_kv_heads, model.head_dim)
    for context in scale.contexts:
        for batch in scale.batches:
            key = {"op": "paged_attention", "B": batch, "context": context}
            yield key, AttentionProblem(batch, 1, context, *heads), sdpa
    n = scale.prefill
    key = {"op": "paged_attention", "B": 1, "prefill": n}
    yield key, AttentionProblem(1, n, n, *heads), sdpa
    for tokens in scale.norm_tokens:
        key = {"op": "residual_film_rms_norm", "M": tokens}
        width = 3 * scale.ranks[0]
        yield key, NormProblem(tokens, hidden), add_rms_norm
        yield {**key, "with": "film"}, NormProblem(tokens, hidden, film=True), add_rms_norm
        yield {**key, "with": "shrink"}, NormProblem(tokens, hidden, low_rank=width), add_rms_norm
        yield {"op": "rope_kv_write", "M": tokens}, RopeProblem(tokens, *heads), rope
    for way in ("greedy", "drawn", "filtered"):
        for batch in scale.batches:
            peer = {"greedy": greedy, "drawn": drawn}.get(way, filtered)
            yield (
                {"op": "sample", "B": batch, "way": way},
                SampleProblem(batch, model.vocab_size, way),
                peer,
            )
    for batch in scale.batches:
        problem = TakeProblem(model.vocab_size, hidden, batch)
        yield (
            {"op": "take_rows", "M": batch},
            problem,
            lambda i: F.embedding(i["index"], i["table"]),
        )
    width = row_width(model, scale.ranks[0])
    yield (
        {"op": "expand_modulation", "n": 1},
        ExpandProblem(1, 16, width),
        lambda i: F.linear(i["z"].to(i["weight"].dtype), i["weight"], i["bias"]),
    )


def _contest(suite: Suite, key: dict[str, Any], problem: Problem, peer: Peer | None) -> None:
    work = problem.work()
    copies = suite.scale.copies(work[0])
    every = [problem.inputs(suite.device, torch.bfloat16, seed) for seed in range(copies)]
    run = getattr(fssa_kernels, problem.op)

    def ours(backend: str) -> Side:
        return Side(
            lambda i: run(**every[i], backend=backend),
            work,
            lambda: _check(problem, every[0], backend),
            ops=(faulty_key(problem.op, backend),),
        )

    def torchs() -> Side:
        prepared = [_contiguous(problem, inputs) for inputs in every]
        return Side(lambda i: peer(prepared[i]), work)

    sides = {BASE: torchs} if peer is not None else {}
    sides["ours"] = lambda: ours("triton")
    if problem.op in CUDA_OPS and _rows(problem) <= suite.scale.cuda_tokens:
        sides["cuda"] = lambda: ours("cuda")
    suite.contest("other ops", key, sides, base=BASE, copies=copies)


def _rows(problem: Problem) -> int:
    if isinstance(problem, AttentionProblem):
        return problem.batch * problem.num_queries
    return getattr(problem, "num_tokens", 0)


def _check(problem: Problem, inputs: Inputs, backend: str) -> Judgement:
    few = _first_requests(inputs) if isinstance(problem, AttentionProblem) else inputs
    with poisoned():
        got = outputs(problem.op, few, backend)
    plain = outputs(problem.op, few, "reference")
    return judge(got, plain, outputs(problem.op, widened(problem.op, few), "reference"))


def _first_requests(inputs: Inputs, count: int = 4) -> Inputs:
    """Some requests: the pages of all of them in fp64 need not fit."""
    tables = inputs["block_tables"][:count]
    queries = len(inputs["q"]) // len(inputs["block_tables"])
    pages, index = tables.flatten().long(), torch.arange(tables.numel(), device=tables.device)
    return {
        **inputs,
        "q": inputs["q"][: count * queries],
        "k_cache": inputs["k_cache"][pages],
        "v_cache": inputs["v_cache"][pages],
        "block_tables": index.int().view(tables.shape),
        "kv_lens": inputs["kv_lens"][:count],
        "q_indptr": inputs["q_indptr"][: count + 1],
    }


def _contiguous(problem: Problem, inputs: Inputs) -> Inputs:
    """What torch's attention wants: keys and values [B,Hkv,S,D] without pages."""
    if not isinstance(problem, AttentionProblem):
        return inputs
    batch, queries = problem.batch, problem.num_queries
    shape = (batch, -1, problem.num_kv_heads, problem.head_dim)
    k, v = (
        inputs[name][inputs["block_tables"].flatten().long()]
        .view(shape)[:, : problem.context]
        .transpose(1, 2)
        .contiguous()
        for name in ("k_cache", "v_cache")
    )
    q = inputs["q"].view(batch, queries, problem.num_heads, problem.head_dim).transpose(1, 2)
    return {"q": q.contiguous(), "k": k, "v": v}


def sdpa(inputs: Inputs) -> Tensor:
    """torch's fused attention, without pages; a prefill is causal, a decode step sees all."""
    q = inputs["q"]
    return F.scaled_dot_product_attention(
        q, inputs["k"], inputs["v"], is_causal=q.shape[2] > 1, enable_gqa=True
    )


def add_rms_norm(inputs: Inputs) -> Tensor:
    """Sum and norm, without FiLM or the low-rank input: what nobody's step would do."""
    h = inputs["x"] + inputs["residual"]
    return F.rms_norm(h, (h.shape[1],), inputs["weight"], inputs["eps"])


def rope(inputs: Inputs) -> Tensor:
    """Rotations by torch and two scattered copies into the cache."""
    q, k, positions, table = (inputs[n] for n in ("q", "k", "positions", "cos_sin"))
    slots = inputs["kv_slots"].long()
    inputs["k_cache"].flatten(0, 1).index_copy_(0, slots, apply_rope(k, positions, table))
    inputs["v_cache"].flatten(0, 1).index_copy_(0, slots, inputs["v"])
    return apply_rope(q, positions, table)


def greedy(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The largest logit and its log-probability."""
    tokens = inputs["logits"].argmax(1, keepdim=True)
    return tokens, _logprobs(inputs, tokens)


def drawn(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Softmax and a race of exponentials, which is what `torch.multinomial` does for one draw."""
    probabilities = (inputs["logits"].float() / inputs["temperature"][:, None]).softmax(1)
    race = probabilities / torch.empty_like(probabilities).exponential_(1)
    tokens = race.argmax(1, keepdim=True)
    return tokens, _logprobs(inputs, tokens)


def filtered(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Top-k, top-p and min-p through one sort, then the race."""
    logits = inputs["logits"].float() / inputs["temperature"][:, None]
    ordered, index = logits.sort(1, descending=True)
    probabilities = ordered.softmax(1)
    rank = torch.arange(logits.shape[1], device=logits.device)
    kept = rank < inputs["top_k"][:, None]
    kept &= probabilities.cumsum(1) - probabilities < inputs["top_p"][:, None]
    kept &= probabilities >= inputs["min_p"][:, None] * probabilities[:, :1]
    race = torch.where(kept, probabilities, 0.0)
    race /= torch.empty_like(race).exponential_(1)
    tokens = index.gather(1, race.argmax(1, keepdim=True))
    return tokens, _logprobs(inputs, tokens)


def _logprobs(inputs: Inputs, tokens: Tensor) -> Tensor:
    return inputs["logits"].float().log_softmax(1).gather(1, tokens)

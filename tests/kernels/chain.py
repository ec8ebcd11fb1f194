"""A step of every op, recorded and eager: what the tests of `StepGraph` replay."""

import math

import pytest
import torch

from fssa_kernels import (
    StepGraph,
    graph_native,
    modulated_linear,
    pack_matrix,
    paged_attention,
    residual_film_rms_norm,
    rope_kv_write,
    sample,
    take_rows,
)
from fssa_kernels.native import MISSING, NATIVE

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
    def empty(self, *args):
        self._free.clear()
        return super().empty(*args)


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


def gaps(tensors):
    """What lies between the rows of those that do not follow one another."""
    for tensor in tensors:
        width = math.prod(tensor.shape[1:])
        if tensor.stride(0) > width:
            sizes = len(tensor), tensor.stride(0) - width
            yield tensor.as_strided(sizes, (tensor.stride(0), 1), tensor.storage_offset() + width)


def bits(tensor):
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def check_replay_is_eager(chain, graph, requests, own_memory=False):
    """Replay, then the same step eagerly from the same caches.

    With memory of its own for every tensor, what lies past the rows in use stays as it was.
    """
    rows = chain.fill(requests)
    before = [cache.clone() for cache in chain.caches]
    poison(graph.outputs)
    poison(gaps(graph.outputs))
    graph.replay(**rows)
    after = [cache.clone() for cache in chain.caches]
    for cache, old in zip(chain.caches, before, strict=True):
        cache.copy_(old)
    eager = chain.step(**rows)
    assert len(eager) == len(graph.outputs)
    for replayed, right in zip(graph.outputs, eager, strict=True):
        assert torch.equal(bits(replayed[: len(right)]), bits(right))
        assert not own_memory or is_poisoned(replayed[len(right) :])
    assert not own_memory or all(is_poisoned(gap) for gap in gaps(graph.outputs))
    for cache, new in zip(chain.caches, after, strict=True):
        assert torch.equal(bits(cache), bits(new))

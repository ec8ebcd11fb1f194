"""What the kernels of the small ops owe beyond accuracy: memory they leave alone, rows that do not
depend on each other, and tokens drawn as often as they should be."""

import importlib

import pytest
import torch

from fssa_kernels import expand_modulation, rope_kv_write, sample, take_rows
from fssa_kernels.gpu.launch import launch
from fssa_kernels.testing import cases, within_wider
from tests.kernels.accuracy import by_name, check_as_good_as_torch, make, run, same_bits
from tests.kernels.test_native_sample import FILTERS, STRANGE, probabilities, settings_of

OPS = ("rope_kv_write", "expand_modulation", "take_rows", "sample")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EXTREMES = [-1, -2, -(2**31), 2**31 - 1]
GUARD = 1 << 20  # as an index far outside
MARGIN = 300


def implementation(op):
    return importlib.import_module(f"fssa_kernels.ops.{op}.triton_impl")


class Guarded:
    """A tensor copied, with its strides, into the midst of memory that nobody may touch."""

    def __init__(self, tensor):
        self.tensor = tensor
        spans = [(n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
        size = 2 * MARGIN + sum(spans) + 1
        self.buffer = torch.full((size,), GUARD, dtype=tensor.dtype)
        where = (tensor.shape, tensor.stride(), MARGIN)
        self.view = self.buffer.as_strided(*where)
        self.view.copy_(tensor)
        self.outside = torch.ones(size, dtype=torch.bool)
        self.outside.as_strided(*where).fill_(False)

    def put_back(self):
        assert (self.buffer[self.outside] == GUARD).all()
        if 0 not in self.tensor.stride():
            self.tensor.copy_(self.view)


@pytest.fixture
def _guarded(monkeypatch):
    """Every tensor of every launch lies in guarded memory."""

    def guarded_launch(kernel, grid, arguments, **options):
        guarded = {
            name: Guarded(value)
            for name, value in arguments.items()
            if isinstance(value, torch.Tensor) and value.numel()
        }
        views = {name: guard.view for name, guard in guarded.items()}
        launch(kernel, grid, {**arguments, **views}, **options)
        for guard in guarded.values():
            guard.put_back()

    for op in OPS:
        monkeypatch.setattr(implementation(op), "launch", guarded_launch)


# ---- memory


@pytest.mark.usefixtures("_guarded")
@pytest.mark.parametrize("case", [c for op in OPS for c in cases(op)], ids=str)
def test_nothing_outside_of_a_tensor_is_written(case):
    check_as_good_as_torch(case.op, case.inputs(torch.float32), "triton")


@pytest.mark.usefixtures("_guarded")
def test_several_blocks_write_nothing_outside(monkeypatch):
    monkeypatch.setattr(implementation("take_rows"), "MAX_BLOCK", 16)
    monkeypatch.setattr(implementation("rope_kv_write"), "BLOCK_CHANNELS", 64)
    monkeypatch.setattr(implementation("sample"), "MAX_BLOCK", 16)
    monkeypatch.setattr(implementation("sample"), "CAPACITY", 5)
    sizes = {
        "take_rows": dict(width=43, scale=0.3, strided=True),
        "rope_kv_write": dict(num_heads=10, num_kv_heads=5, head_dim=24, rotary_dim=10, norm=True),
        "expand_modulation": dict(num_latents=21, latent_size=45, width=70),
        "sample": dict(vocab_size=41, top_k=3, top_p=0.9),
    }
    for op in OPS:
        check_as_good_as_torch(op, make(op, torch.float32, **sizes[op]), "triton")


@pytest.mark.usefixtures("_guarded")
@pytest.mark.parametrize("bad", [23, *EXTREMES])
def test_taking_a_row_that_is_not_there_gives_nan(bad):
    inputs = by_name("take_rows", "strided")
    right = take_rows(**inputs, backend="triton")
    inputs["index"][2] = bad
    rows = take_rows(**inputs, backend="triton")
    assert rows[2].isnan().all()
    rows[2] = right[2]
    assert torch.equal(rows, right)


@pytest.mark.usefixtures("_guarded")
@pytest.mark.parametrize("name", ["plain", "partial-rotation", "normalised-wide"])
@pytest.mark.parametrize("bad", [50, *EXTREMES])
def test_a_position_that_is_not_there_gives_nan(bad, name):
    inputs = by_name("rope_kv_write", name)
    right = run("rope_kv_write", inputs, "triton")
    inputs["positions"][2] = bad
    got = run("rope_kv_write", inputs, "triton")
    slot = int(inputs["kv_slots"][2])
    for before, after, place in zip(right[:2], got[:2], (2, slot), strict=True):
        before, after = (t if t.dim() == 3 else t.flatten(0, 1) for t in (before, after))
        assert after[place].isnan().all()
        after[place] = before[place]
    assert same_bits(got, right)


@pytest.mark.usefixtures("_guarded")
@pytest.mark.parametrize("bad", [20, *EXTREMES])
def test_only_the_named_slots_are_written(bad):
    inputs = by_name("rope_kv_write", "strided")
    for name in ("k_cache", "v_cache"):  # a layer's slice of one buffer for all layers
        layers = torch.full((5, 3, 4, 2, 8), 7.0)
        inputs[name] = layers[:, 1]
    inputs["kv_slots"][3] = bad
    named = inputs["kv_slots"][[0, 1, 2, 4]].long()
    q = rope_kv_write(**inputs, backend="triton")
    assert q.isfinite().all()
    for name in ("k_cache", "v_cache"):
        layers, written = inputs[name]._base, torch.zeros(20, dtype=torch.bool)
        written[named] = True
        assert ((inputs[name].flatten(2) != 7.0).any(2).flatten() == written).all()
        assert (layers[:, [0, 2]] == 7.0).all()


@pytest.mark.usefixtures("_guarded")
@pytest.mark.parametrize("bad", [131, *EXTREMES[1:]])
def test_a_forced_token_that_is_not_there_has_no_probability(bad):
    inputs = by_name("sample", "mixed")
    right = sample(**inputs, backend="triton")
    inputs["forced"][3] = bad
    tokens, logprobs = sample(**inputs, backend="triton")
    assert tokens[3] == bad
    assert logprobs[3].isnan()
    tokens[3], logprobs[3] = right[0][3], right[1][3]
    assert same_bits([tokens, logprobs], right)


# ---- rows on their own


PER_ROW = {
    "rope_kv_write": ("q", "k", "v", "positions", "kv_slots"),
    "expand_modulation": ("z",),
    "take_rows": ("index",),
    "sample": ("logits", "temperature", "top_k", "top_p", "min_p", "uniform", "forced"),
}
BATCHES = {
    "rope_kv_write": dict(num_tokens=17, num_heads=6, head_dim=20, norm=True, strided=True),
    "expand_modulation": dict(num_latents=37, latent_size=70, width=90),
    "take_rows": dict(taken=17),
    "sample": dict(batch=17, mixed=True),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_a_row_is_the_same_alone(op, dtype):
    inputs = make(op, dtype, **BATCHES[op])
    together = run(op, inputs, "triton")
    for row in (0, 5, 16):
        alone = {
            name: value[row : row + 1] if name in PER_ROW[op] else value
            for name, value in inputs.items()
        }
        got = run(op, alone, "triton")
        if op != "rope_kv_write":
            assert same_bits(got, [t[row : row + 1] for t in together])
            continue
        assert same_bits(got[:1], [together[0][row : row + 1]])
        slot = int(inputs["kv_slots"][row])
        caches = [[t.flatten(0, 1)[slot] for t in made[1:]] for made in (got, together)]
        assert same_bits(*caches)


@pytest.mark.parametrize("op", OPS)
def test_nan_in_one_row_stays_there(op):
    inputs = make(op, torch.float32, **BATCHES[op])
    if op == "take_rows":
        inputs["index"] = torch.arange(17, dtype=torch.int32)
    clean = run(op, inputs, "triton")
    first = "table" if op == "take_rows" else PER_ROW[op][0]
    inputs[first] = inputs[first].clone()
    inputs[first][5] = float("nan")
    got = run(op, inputs, "triton")
    assert got[-1 if op == "sample" else 0][5].isnan().all()
    for before, after in zip(clean, got, strict=True):
        if len(before) == len(got[0]):  # not a cache: q alone is NaN
            before[5] = after[5]
    assert same_bits(clean, got)


# ---- sample: which token

# A row is searched where it is, in a copy of what matters, or, if that is too much, where it is.
SEARCHES = {"one block": (4096, 8192), "copied": (16, 40), "too many to copy": (16, 1)}


@pytest.fixture(params=SEARCHES.values(), ids=SEARCHES.keys())
def _each_search(request, monkeypatch):
    block, capacity = request.param
    monkeypatch.setattr(implementation("sample"), "MAX_BLOCK", block)
    monkeypatch.setattr(implementation("sample"), "CAPACITY", capacity)


def check_draws(logits, draws, options):
    chosen = settings_of(draws, **options)
    tokens, _ = sample(logits.expand(draws, -1), **chosen, backend="triton")
    right = probabilities(logits, **options)
    # Evenly spread numbers: each token is met once too often or too rarely at most.
    counts = torch.bincount(tokens.long(), minlength=len(logits))
    assert (counts - draws * right).abs().max() <= 1.01
    drawn = tokens.long()
    assert (right[drawn] > 0).all()
    # And each draw lies in its token's part of the cumulated mass.
    stop, uniform = right.cumsum(0), chosen["uniform"].double()
    assert (uniform <= stop[drawn] + 1e-6).all()
    assert (uniform >= stop[drawn] - right[drawn] - 1e-6).all()


# bf16 where the dtype does not matter: a search goes over fewer bits, and the interpreter is slow.
def some_logits(vocab_size, dtype=torch.bfloat16):
    return (2 * torch.randn(vocab_size, generator=torch.Generator().manual_seed(5))).to(dtype)


@pytest.mark.parametrize("options", FILTERS.values(), ids=FILTERS.keys())
def test_frequencies_of_draws_are_the_probabilities(options):
    check_draws(some_logits(37), 60, options)


@pytest.mark.usefixtures("_each_search")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("options", FILTERS.values(), ids=FILTERS.keys())
def test_draws_wherever_the_row_is_searched(options, dtype):
    check_draws(some_logits(75, dtype), 4, options)


@pytest.mark.usefixtures("_each_search")
@pytest.mark.parametrize("tied", [(3, 4), (15, 16), (5, 69), (16, 33, 75)])
def test_of_equal_logits_the_smaller_index_wins(tied):
    logits = some_logits(76).clamp(max=3)[None]
    logits[0, list(tied)] = 5.0
    for options in (dict(temperature=0.0), dict(top_k=1), dict(top_p=1e-6)):
        chosen = settings_of(1, **options)
        chosen["uniform"].fill_(0.999)
        assert sample(logits, **chosen, backend="triton")[0].tolist() == [tied[0]], options


TIES = {
    "top-k": (dict(top_k=3), 3),
    "top-p": (dict(top_p=0.125), 5),
    "top-k, then top-p": (dict(top_k=12, top_p=0.25), 3),
    "top-p, all of top-k": (dict(top_k=4, top_p=0.99), 4),
    "min-p": (dict(min_p=1.0), 20),
}


@pytest.mark.usefixtures("_each_search")
@pytest.mark.parametrize(("options", "count"), TIES.values(), ids=TIES.keys())
def test_filters_keep_the_smaller_of_equal_indices(options, count):
    logits = torch.zeros(40, dtype=torch.bfloat16)
    logits[::2] = -0.0  # equal to zero
    if "min_p" in options:
        logits[20:] = -0.0625
    chosen = settings_of(count, **options)
    tokens, _ = sample(logits.expand(count, -1), **chosen, backend="triton")
    assert tokens.tolist() == list(range(count))


@pytest.mark.usefixtures("_each_search")
def test_ties_at_the_threshold_fill_up_to_k():
    """Three above, then of the equal ones the first two."""
    logits = torch.full((60,), -1.0, dtype=torch.bfloat16)
    logits[10:50:10] = 0.0
    logits[[5, 33, 55]] = 2.0
    probability = probabilities(logits, top_k=5)
    assert probability.nonzero().flatten().tolist() == [5, 10, 20, 33, 55]
    check_draws(logits, 12, dict(top_k=5))
    check_draws(logits, 12, dict(top_k=5, top_p=0.93))


@pytest.mark.usefixtures("_each_search")
def test_a_draw_at_a_border_takes_what_comes_after_it():
    """At 0 the first that is kept, and at a half the second of two."""
    logits = torch.zeros(4, 60, dtype=torch.bfloat16)
    logits[:, [35, 50]] = 4.0
    for options in (dict(top_k=2), dict(min_p=0.5), dict(top_p=0.6)):
        chosen = settings_of(4, **options)
        chosen["uniform"] = torch.tensor([0.0, 0.4999, 0.5, 0.9999])
        tokens, _ = sample(logits, **chosen, backend="triton")
        assert tokens.tolist() == [35, 35, 50, 50], options


def test_min_p_between_two_numbers_of_the_dtype():
    """exp(-2.305) keeps what is above, though the nearest bf16 is the one below."""
    logits = torch.tensor([0.0, -2.296875, -2.3125], dtype=torch.bfloat16)
    assert probabilities(logits, min_p=0.09976).count_nonzero() == 2
    check_draws(logits, 20, dict(min_p=0.09976))


@pytest.mark.usefixtures("_each_search")
@pytest.mark.parametrize("options", FILTERS.values(), ids=FILTERS.keys())
def test_what_is_minus_infinity_is_never_drawn(options):
    logits = some_logits(75)
    logits[::3] = float("-inf")
    logits[32:64] = float("-inf")
    check_draws(logits, 3, options)


@pytest.mark.usefixtures("_each_search")
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 0.999999), (74, 1.0), (75, 1.0), (75, 0.999999), (2000, 0.5)]
)
def test_filters_that_hardly_filter(top_k, top_p):
    check_draws(some_logits(75), 3, dict(top_k=top_k, top_p=top_p))


@pytest.mark.parametrize("change", STRANGE.values(), ids=STRANGE.keys())
def test_strange_logits_give_some_token_and_spare_the_other_rows(change):
    logits = torch.randn(3, 4500, generator=torch.Generator().manual_seed(1))
    for options in (dict(temperature=0.0), FILTERS["all"]):
        chosen = settings_of(3, **options)
        clean = sample(logits, **chosen, backend="triton")
        strange = logits.clone()
        change(strange[1])
        tokens, logprobs = sample(within_wider(strange), **chosen, backend="triton")
        assert 0 <= tokens[1] < 4500
        assert same_bits([tokens[::2], logprobs[::2]], [t[::2] for t in clean])
        usable = strange[1].isfinite() | (strange[1] == float("-inf"))
        if strange[1].isfinite().any() and usable.all():
            # What cannot be drawn is not, and the rest is as ever.
            expected = sample(strange, **chosen, backend="reference")
            assert torch.equal(tokens, expected[0])
            torch.testing.assert_close(logprobs, expected[1], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e30, 3e38, float("inf")])
def test_temperatures_at_the_end_of_the_range(temperature):
    """The coldest takes the largest logit, the hottest any of the finite ones."""
    logits = some_logits(40)
    logits[7:9] = float("-inf")
    chosen = settings_of(40, temperature=temperature)
    tokens, _ = sample(logits.expand(40, -1), **chosen, backend="triton")
    if temperature < 1:
        assert (tokens == logits.argmax()).all()
    else:
        finite = logits.isfinite().nonzero().flatten().tolist()
        assert set(tokens.tolist()) == set(finite)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 1e4])
def test_logprobs_against_fp64(scale, dtype):
    logits = (scale * torch.randn(5, 9001, generator=torch.Generator().manual_seed(1))).to(dtype)
    chosen = settings_of(5)
    chosen["forced"] = torch.arange(5, dtype=torch.int32) * 2000
    _, logprobs = sample(logits, **chosen, backend="triton")
    right = logits.double().log_softmax(1).gather(1, chosen["forced"].long()[:, None])[:, 0]
    assert ((logprobs - right).abs() <= 2e-6 + 3e-7 * right.abs()).all()


# ---- what they refuse


@pytest.mark.parametrize(
    ("op", "case", "name", "message"),
    [
        ("take_rows", "few", "table", "the last dimension of table is not contiguous"),
        ("rope_kv_write", "plain", "k_cache", "the last dimension of k_cache is not contiguous"),
        ("expand_modulation", "several", "weight", "the last dimension of weight is not"),
        ("sample", "drawn", "uniform", "the last dimension of uniform is not contiguous"),
    ],
)
def test_says_what_it_cannot_read(op, case, name, message):
    inputs = by_name(op, case)
    apart = inputs[name].new_zeros(*inputs[name].shape, 2)[..., 0]
    inputs[name] = apart.copy_(inputs[name])
    with pytest.raises(ValueError, match=f"backend 'triton' cannot serve this call: {message}"):
        run(op, inputs, "triton")


def test_fp64_latents_are_left_to_the_reference():
    inputs = by_name("expand_modulation", "several", torch.float64)
    with pytest.raises(ValueError, match=r"z is torch\.float64"):
        expand_modulation(**inputs, backend="triton")

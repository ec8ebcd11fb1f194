"""What tests of backends share: inputs of any sizes, exact answers, and the bound on errors."""

import importlib

import torch
from hypothesis import strategies as st

import fssa_kernels
from fssa_kernels.testing import cases, within_wider, written
from tests.kernels import kernel_oracles as oracles

# Errors below this are rounding luck: units in the last place of the largest value, or of one.
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 2**-9, torch.float16: 2**-12}


def sizes_of(op):
    return importlib.import_module(f"fssa_kernels.ops.{op}.cases")._Sizes


def make(op, dtype, seed=0, **sizes):
    return sizes_of(op)(**sizes).make(torch.Generator().manual_seed(seed), dtype)


def by_name(op, name, dtype=torch.float32):
    return next(case for case in cases(op) if case.name == name).inputs(dtype)


def run(op, inputs, backend="native"):
    """All that a call makes: what it returns, and what it writes, on copies of that."""
    names = written(op)
    inputs = dict(inputs)
    for name in names:
        old = inputs[name]
        inputs[name] = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype).copy_(old)
    out = getattr(fssa_kernels, op)(**inputs, backend=backend)
    if not isinstance(out, tuple):
        out = () if out is None else (out,)
    return (*out, *(inputs[name] for name in names))


def exact(op, inputs):
    """What `run` should return, in fp64; tokens of `sample` are the reference's."""
    if op == "modulated_linear":
        return (oracles.modulated_linear_oracle(**inputs),)
    if op == "residual_film_rms_norm":
        h = oracles.film_oracle(
            inputs["x"], inputs["residual"], inputs.get("rows"), inputs.get("slots")
        )
        norm = oracles.rms_norm_oracle(h, inputs["weight"], inputs["eps"], inputs["weight_offset"])
        if inputs.get("lora_a") is not None:
            u = norm @ inputs["lora_a"].double().t()
            if inputs.get("gates") is not None:
                u *= inputs["gates"].double()[inputs["slots"].long()]
            norm = torch.cat([norm, u], dim=1)
        return norm, h
    if op == "rope_kv_write":
        q, k = (
            oracles.rope_oracle(
                oracles.head_norm_oracle({**inputs, name: inputs[name].double()}, name),
                inputs["positions"],
                inputs["cos_sin"],
            )
            for name in ("q", "k")
        )
        stored = inputs["kv_slots"] >= 0
        slots = inputs["kv_slots"][stored].long()
        k_cache, v_cache = (inputs[name].double().clone() for name in ("k_cache", "v_cache"))
        k_cache.flatten(0, 1)[slots] = k[stored]
        v_cache.flatten(0, 1)[slots] = inputs["v"].double()[stored]
        return q, k_cache, v_cache
    if op == "paged_attention":
        return (oracles.paged_attention_oracle(**inputs),)
    if op == "expand_modulation":
        z, weight, bias = (inputs[name].double() for name in ("z", "weight", "bias"))
        return (z @ weight.t() + bias,)
    if op == "take_rows":
        return (inputs["table"].double()[inputs["index"].long()] * inputs["scale"],)
    tokens, _ = run(op, inputs, "reference")
    logits = inputs["logits"].double()
    shares = [torch.log_softmax(row, 0)[t] for row, t in zip(logits, tokens.tolist(), strict=True)]
    return tokens, torch.tensor(shares, dtype=torch.float64)


def check_as_good_as_torch(op, inputs, backend):
    """Errors against fp64 are at most twice those of PyTorch in the same dtype."""
    plain = run(op, inputs, "reference")
    for got, by_torch, right in zip(
        run(op, inputs, backend), plain, exact(op, inputs), strict=True
    ):
        assert got.dtype == by_torch.dtype
        assert got.shape == right.shape
        if not got.is_floating_point():
            assert torch.equal(got, right)
            continue
        assert torch.equal(got.isnan(), right.isnan())
        if got.numel():
            error, torch_error = ((t - right).nan_to_num().abs().max() for t in (got, by_torch))
            luck = FLOOR[got.dtype] * right.nan_to_num(0.0, 0.0, 0.0).abs().max().clamp(min=1)
            assert error <= 2 * torch_error + luck


def linear_gradient_inputs(inputs, needs=(True,) * 6):
    """Arguments of `modulated_linear_bwd`, but for the backend, of a call's inputs."""
    columns = inputs["weight"].shape[0]
    dy = torch.randn(inputs["x"].shape[0], columns, generator=torch.Generator().manual_seed(1))
    splits = inputs["splits"] or [columns]
    names = ("x", "weight", "lora_a", "lora_b", "rows", "slots")
    tensors = [inputs.get(name) for name in names]
    if inputs["family"] == "static":
        tensors[-1] = None
    has = (True, True, True, *(tensor is not None for tensor in tensors[2:5]))
    needs = [need and present for need, present in zip(needs, has, strict=True)]
    return [dy.to(inputs["x"].dtype), *tensors, inputs["family"], splits, needs]


def exact_gradients(op, inputs):
    """What an op of gradients should return, in fp64."""
    wide = [t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in inputs]
    return op(*wide, "reference")


def check_gradients(op, inputs, backend):
    """`check_as_good_as_torch` for an op of gradients."""
    got, plain = op(*inputs, backend), op(*inputs, "reference")
    for ours, torchs, right in zip(got, plain, exact_gradients(op, inputs), strict=True):
        assert ours.dtype == torchs.dtype
        assert ours.shape == right.shape
        if ours.numel():
            error, allowed = ((t - right).abs().max() for t in (ours, torchs))
            luck = FLOOR[ours.dtype] * right.abs().max().clamp(min=1)
            assert error <= 2 * allowed + luck


def bits(tensor):
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def same_bits(some, others):
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(some, others, strict=True))


PROJECTIONS = st.one_of(
    st.lists(st.integers(1, 40), min_size=1, max_size=4).map(lambda s: ("none", tuple(s))),
    st.tuples(
        st.sampled_from(["silu_mul", "gelu_tanh_mul"]), st.integers(1, 50).map(lambda n: (n, n))
    ),
)
LENGTHS = st.integers(0, 37).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
HEADS = st.tuples(st.integers(1, 3), st.integers(1, 4))
ANY_SIZES = {
    "modulated_linear": dict(
        family=st.sampled_from(["none", "static", "gated", "core", "factors"]),
        projections=PROJECTIONS,
        num_tokens=st.integers(0, 29),
        in_features=st.integers(1, 70),
        rank=st.integers(1, 20),
        num_users=st.integers(1, 5),
        strided=st.booleans(),
        fp32_side=st.booleans(),
        bias=st.booleans(),
    ),
    "residual_film_rms_norm": dict(
        num_tokens=st.integers(0, 9),
        num_channels=st.integers(1, 150),
        residual=st.booleans(),
        film=st.booleans(),
        weight_offset=st.sampled_from([0.0, 1.0]),
        strided=st.booleans(),
        fp32_side=st.booleans(),
    ),
    "rope_kv_write": dict(
        num_tokens=st.integers(0, 9),
        heads=HEADS,
        halves=st.tuples(st.integers(1, 40), st.integers(0, 19)),
        page_size=st.integers(1, 5),
        num_pages=st.just(9),
        num_skipped=st.integers(0, 4),
        strided=st.booleans(),
        norm=st.booleans(),
    ),
    "paged_attention": dict(
        requests=st.lists(LENGTHS, max_size=4).map(tuple),
        heads=HEADS,
        head_dim=st.integers(1, 150),
        page_size=st.integers(1, 19),
        window=st.sampled_from([0, 0, 1, 5, 16, 30]),
        strided=st.booleans(),
    ),
    "expand_modulation": dict(
        num_latents=st.integers(0, 9),
        latent_size=st.integers(1, 70),
        width=st.integers(1, 150),
    ),
    "take_rows": dict(
        num_rows=st.integers(1, 70),
        width=st.integers(1, 150),
        taken=st.integers(0, 9),
        scale=st.sampled_from([1.0, 0.3, 24.0]),
        strided=st.booleans(),
    ),
    "sample": dict(
        batch=st.integers(0, 6),
        vocab_size=st.one_of(st.integers(1, 300), st.integers(4090, 4120)),
        temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
        top_k=st.sampled_from([0, 1, 5, 400]),
        top_p=st.sampled_from([1.0, 0.9, 0.3, 0.0]),
        min_p=st.sampled_from([0.0, 0.1, 1.0]),
        forced=st.booleans(),
        strided=st.booleans(),
    ),
}


def any_inputs(data, op, dtype, seed):
    """Inputs of an op, of sizes and strides that hypothesis draws."""
    sizes = data.draw(st.fixed_dictionaries(ANY_SIZES[op]))
    if "projections" in sizes:
        sizes["epilogue"], sizes["splits"] = sizes.pop("projections")
    if "heads" in sizes:
        sizes["num_kv_heads"], groups = sizes.pop("heads")
        sizes["num_heads"] = sizes["num_kv_heads"] * groups
    if "halves" in sizes:
        half, extra = sizes.pop("halves")
        sizes |= dict(rotary_dim=2 * half, head_dim=2 * half + extra)
    widen = op in ("paged_attention", "sample") and sizes.pop("strided")
    inputs = make(op, dtype, seed, **sizes)
    if widen:
        name = "q" if op == "paged_attention" else "logits"
        inputs[name] = within_wider(inputs[name])
    return inputs

"""Choosing tokens on a GPU: one program takes one row, without sorting it.

Weights are kept as integers, so that their sums are exact whatever the order: what a token's
predecessors hold does not depend on the way it was summed. The k-th heaviest logit and the last one
of the nucleus are searched by bisection over the bits of the logits, as integers that are ordered
as they are. A lower bound known beforehand leaves few logits to search: those are first copied
together, in order of index, and the passes go over the copy; should they be more than its room, the
passes go over the row itself.

One program a row keeps it all in a single launch, with no scratch that grows with the vocabulary;
a batch then has its rows side by side, and a lone row has one multiprocessor to itself. Splitting
rows waits for a measurement that asks for it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fssa_kernels.gpu.backend import unsupported
from fssa_kernels.gpu.launch import launch

# Logits of one step of a pass: 512 threads hold 8 each. With 16 each, registers spill.
MAX_BLOCK = 4096
# Logits that are copied together to be searched.
CAPACITY = 8192
# Weights are at most 1 and counted in units of 2^-43: then a sum of 2^19 of them fits an int64, and
# what rounding takes from all of them together is no more than fp32 resolves.
MAX_VOCAB = 1 << 19

# Last bits that a dtype leaves zero when it becomes fp32: the search need not go through them.
SPARE_BITS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}

_UNIT = tl.constexpr(float(1 << 43))
_ENDLESS = tl.constexpr((1 << 63) - 1)


@triton.jit
def key_kernel_part(value, SPARE: tl.constexpr):
    """Integers in the order of the floats, next to each other if those are; both zeros have one."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True) >> SPARE
    return tl.where(bits >= 0, bits, bits ^ (0x7FFFFFFF >> SPARE))


@triton.jit
def value_kernel_part(key, SPARE: tl.constexpr):
    """The float of a key."""
    bits = tl.where(key >= 0, key, key ^ (0x7FFFFFFF >> SPARE))
    return (bits << SPARE).to(tl.float32, bitcast=True)


@triton.jit
def mass_kernel_part(value, top, inverse_temperature):
    """exp((value - top) / temperature) in units of 2^-43."""
    weight = tl.exp((value - top) * inverse_temperature)
    return (tl.where(value > float("-inf"), weight, 0.0) * _UNIT).to(tl.int64)


@triton.jit
def count_kernel_part(source, size, threshold, BLOCK: tl.constexpr, SPARE: tl.constexpr):
    """How many of the logits have a key of at least the threshold."""
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        value = tl.load(source + i, mask=i < size, other=float("-inf")).to(tl.float32)
        reached = key_kernel_part(value, SPARE) >= threshold.to(tl.int32)
        count += ((i < size) & reached).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit
def mass_above_kernel_part(
    source, size, threshold, top, inverse_temperature, BLOCK: tl.constexpr, SPARE: tl.constexpr
):
    """What the logits with a key above the threshold weigh together."""
    mass = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        value = tl.load(source + i, mask=i < size, other=float("-inf")).to(tl.float32)
        heavier = key_kernel_part(value, SPARE) > threshold.to(tl.int32)
        mass += tl.where(heavier, mass_kernel_part(value, top, inverse_temperature), 0)
    return tl.sum(mass, 0)


@triton.jit
def walk_kernel_part(
    source,
    size,
    threshold,
    ties,
    target,
    top,
    inverse_temperature,
    BLOCK: tl.constexpr,
    SPARE: tl.constexpr,
):
    """Add up the kept logits in order of index until their mass passes the target.

    Kept are those with a key above the threshold, and the first `ties` of those that have it.
    Returns where the target is passed, or the last place, and the mass up to the end of that block.
    """
    found = size - 1
    total = tl.cast(0, tl.int64)
    tied = 0
    bar = threshold.to(tl.int32)
    start = 0
    while start < size:
        i = start + tl.arange(0, BLOCK)
        value = tl.load(source + i, mask=i < size, other=float("-inf")).to(tl.float32)
        key = key_kernel_part(value, SPARE)
        tie = ((i < size) & (key == bar)).to(tl.int32)
        rank = tied + tl.cumsum(tie, 0) - tie
        kept = (key > bar) | ((tie > 0) & (rank < ties))
        mass = tl.where(kept, mass_kernel_part(value, top, inverse_temperature), 0)
        passed = total + tl.sum(mass, 0) > target
        if passed:
            before = (total + tl.cumsum(mass, 0) <= target).to(tl.int32)
            found = start + tl.sum(before, 0)
        total += tl.sum(mass, 0)
        tied += tl.sum(tie, 0)
        start = tl.where(passed, size, start + BLOCK)
    return found, total


@triton.jit
def sample_kernel(
    tokens_ptr,
    logprobs_ptr,
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    uniform_ptr,
    forced_ptr,
    values_ptr,
    indices_ptr,
    vocab_size,
    stride_logits,
    BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr,
    SPARE: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    row = logits_ptr + b * stride_logits
    dtype = logits_ptr.dtype.element_ty
    # A NaN is larger than nothing: it is not taken, but leaves the sum NaN.
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    where = tl.full((BLOCK,), vocab_size, tl.int32)
    for start in range(0, vocab_size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        value = tl.load(row + i, mask=i < vocab_size, other=float("-inf")).to(tl.float32)
        where = tl.where(value > best, i, where)
        best = tl.where(value > best, value, best)
    top = tl.max(best, 0)
    greedy = tl.min(tl.where(best == top, where, vocab_size), 0)
    exps = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        value = tl.load(row + i, mask=i < vocab_size, other=float("-inf")).to(tl.float32)
        exps += tl.exp(value - top)
    total_exp = tl.sum(exps.to(tl.float64), 0)

    token = tl.where(greedy < vocab_size, greedy, 0)
    forced = tl.load(forced_ptr + b)
    temperature = tl.load(temperature_ptr + b)
    # A sum that is a number says that the largest logit is one, too.
    drawn = (forced == -1) & (temperature > 0) & (total_exp == total_exp)
    if drawn:
        top_k = tl.load(top_k_ptr + b)
        top_p = tl.maximum(tl.load(top_p_ptr + b).to(tl.float64), 0.0)
        min_p = tl.load(min_p_ptr + b).to(tl.float64)
        uniform = tl.load(uniform_ptr + b).to(tl.float64)
        wide = temperature.to(tl.float64)
        # Bounded, because 0 * inf would be NaN for the largest logit.
        inverse_temperature = tl.minimum(1.0 / wide, 3e38).to(tl.float32)
        highest = key_kernel_part(top, SPARE).to(tl.int64)
        # Below the key of -inf, the smallest. Thresholds are 64-bit, so that their distance fits.
        lowest = tl.minimum(highest, -(0x7F800000 >> SPARE) - 2)
        use_k = (top_k > 0) & (top_k < vocab_size)
        use_p = top_p < 1.0
        mass = mass_above_kernel_part(
            row, vocab_size, lowest, top, inverse_temperature, BLOCK, SPARE
        )

        # w >= min_p, as the smallest key that fulfils it.
        exact = top + wide * tl.log(tl.where(min_p > 0, min_p, 1.0))
        rounded = exact.to(tl.float32).to(dtype).to(tl.float32)
        floor = key_kernel_part(rounded, SPARE).to(tl.int64) + (rounded.to(tl.float64) < exact)
        floor = tl.minimum(tl.where(min_p > 0, floor, lowest), highest)

        # No key below `low` matters to what is kept.
        low = floor
        if use_k:
            low = lowest
            if top_k <= BLOCK:
                # `best` has a logit from each of BLOCK parts of the row: if k of them reach a key,
                # at least k of the row do.
                keys = key_kernel_part(best, SPARE)
                above = highest + 1
                while above - low > 1:
                    middle = low + (above - low) // 2
                    enough = tl.sum((keys >= middle.to(tl.int32)).to(tl.int32), 0) >= top_k
                    low = tl.where(enough, middle, low)
                    above = tl.where(enough, above, middle)
        elif use_p:
            # All that are lighter than this weigh less together than what top_p leaves out. Half
            # of it, and a key less, are for rounding.
            share = (1.0 - top_p) * mass.to(tl.float64) / (2.0 * _UNIT * vocab_size)
            exact = top + wide * tl.log(share)
            rounded = exact.to(tl.float32).to(dtype).to(tl.float32)
            low = tl.maximum(low, key_kernel_part(rounded, SPARE).to(tl.int64) - 1)

        source = row
        size = vocab_size
        copied = False
        values = values_ptr + b * CAPACITY
        indices = indices_ptr + b * CAPACITY
        if (low > lowest) & (vocab_size > BLOCK):
            count = 0
            for start in range(0, vocab_size, BLOCK):
                i = start + tl.arange(0, BLOCK)
                raw = tl.load(row + i, mask=i < vocab_size, other=float("-inf"))
                candidate = (i < vocab_size) & (
                    key_kernel_part(raw.to(tl.float32), SPARE) >= low.to(tl.int32)
                )
                one = candidate.to(tl.int32)
                place = count + tl.cumsum(one, 0) - one
                fits = candidate & (place < CAPACITY)
                tl.store(values + place, raw, mask=fits)
                tl.store(indices + place, i, mask=fits)
                count += tl.sum(one, 0)
            # Threads read below what other threads of this program wrote.
            tl.debug_barrier()
            copied = count <= CAPACITY
            if copied:
                source = values
                size = count

        # Kept are all keys above the threshold and the first `ties` of those equal to it.
        threshold = lowest
        ties = vocab_size
        if use_k:
            threshold = low
            above = highest + 1
            while above - threshold > 1:
                middle = threshold + (above - threshold) // 2
                enough = count_kernel_part(source, size, middle, BLOCK, SPARE) >= top_k
                threshold = tl.where(enough, middle, threshold)
                above = tl.where(enough, above, middle)
            ties = top_k - count_kernel_part(source, size, threshold + 1, BLOCK, SPARE)
            heavier = mass_above_kernel_part(
                source, size, threshold, top, inverse_temperature, BLOCK, SPARE
            )
            each = mass_kernel_part(
                value_kernel_part(threshold.to(tl.int32), SPARE), top, inverse_temperature
            )
            mass = heavier + ties * each
        if use_p:
            # The smallest key of which the heavier ones do not yet make up the nucleus.
            wanted = tl.maximum(tl.ceil(top_p * mass.to(tl.float64)).to(tl.int64), 1)
            below = tl.maximum(threshold, low) - 1
            nucleus = highest
            while nucleus - below > 1:
                middle = below + (nucleus - below) // 2
                heavier = mass_above_kernel_part(
                    source, size, middle, top, inverse_temperature, BLOCK, SPARE
                )
                short = heavier < wanted
                nucleus = tl.where(short, middle, nucleus)
                below = tl.where(short, below, middle)
            heavier = mass_above_kernel_part(
                source, size, nucleus, top, inverse_temperature, BLOCK, SPARE
            )
            each = mass_kernel_part(
                value_kernel_part(nucleus.to(tl.int32), SPARE), top, inverse_temperature
            )
            missing = (wanted - heavier + each - 1) // tl.maximum(each, 1)
            # At the threshold of top_k these are no more than before: they are a share of them.
            ties = tl.where(each > 0, tl.minimum(missing, vocab_size), vocab_size).to(tl.int32)
            threshold = nucleus
        if floor > threshold:
            threshold = floor - 1
            ties = 0
        if threshold > lowest:
            _, mass = walk_kernel_part(
                source, size, threshold, ties, _ENDLESS, top, inverse_temperature, BLOCK, SPARE
            )
        target = (uniform * mass.to(tl.float64)).to(tl.int64)
        token, _ = walk_kernel_part(
            source, size, threshold, ties, target, top, inverse_temperature, BLOCK, SPARE
        )
        if copied:
            token = tl.load(indices + token)

    token = tl.where(forced != -1, forced, token)
    known = (token >= 0) & (token < vocab_size)
    value = tl.load(row + token, mask=known, other=float("nan")).to(tl.float64)
    tl.store(tokens_ptr + b, token)
    tl.store(logprobs_ptr + b, (value - top - tl.log(total_exp)).to(tl.float32))


def cannot_triton(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
    forced: Tensor,
) -> str | None:
    """Why the kernel is unable to serve these inputs, or None."""
    if logits.shape[1] > MAX_VOCAB:
        return f"logits has {logits.shape[1]} columns, the kernel takes at most {MAX_VOCAB}"
    return unsupported(
        logits=logits,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        uniform=uniform,
        forced=forced,
    )


def sample_triton(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
    forced: Tensor,
) -> tuple[Tensor, Tensor]:
    """The public function on inputs that `cannot_triton` accepts.

    A forced token out of range is returned as it is, with a log-probability of NaN.
    """
    batch, vocab_size = logits.shape
    tokens = logits.new_empty(batch, dtype=torch.int32)
    logprobs = logits.new_empty(batch, dtype=torch.float32)
    block = min(MAX_BLOCK, max(16, triton.next_power_of_2(vocab_size)))
    # A row of one block is searched where it is.
    scratch = (batch, CAPACITY if vocab_size > block else 0)
    launch(
        sample_kernel,
        (batch,),
        {
            "tokens_ptr": tokens,
            "logprobs_ptr": logprobs,
            "logits_ptr": logits,
            "temperature_ptr": temperature,
            "top_k_ptr": top_k,
            "top_p_ptr": top_p,
            "min_p_ptr": min_p,
            "uniform_ptr": uniform,
            "forced_ptr": forced,
            "values_ptr": logits.new_empty(scratch),
            "indices_ptr": tokens.new_empty(scratch),
            "vocab_size": vocab_size,
            "stride_logits": logits.stride(0),
            "BLOCK": block,
            "CAPACITY": CAPACITY,
            "SPARE": SPARE_BITS[logits.dtype],
        },
        num_warps=min(16, max(1, block // 256)),
    )
    return tokens, logprobs

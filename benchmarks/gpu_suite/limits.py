"""What this GPU can do: a large copy and a large matrix product, on random data."""

from __future__ import annotations

import torch

from benchmarks.gpu_suite.problems import Random
from benchmarks.gpu_suite.suite import Side, Suite


def measure(suite: Suite) -> None:
    """Fill `suite.limits`: copy in bytes a second, read and written; product in FLOP a second."""
    scale = suite.scale
    random = Random(suite.device, 0)

    def copy() -> Side:
        source = random.normal(scale.copy_bytes // 2, dtype=torch.bfloat16)
        target = torch.empty_like(source)
        return Side(lambda _: target.copy_(source), (2 * scale.copy_bytes, 0), calls=4)

    def product() -> Side:
        size = scale.product_size
        a, b = (random.normal(size, size, dtype=torch.bfloat16) for _ in range(2))
        out = torch.empty_like(a)
        work = (6 * size * size, 2 * size**3)
        return Side(lambda _: torch.mm(a, b.t(), out=out), work, calls=4)

    for name, make, rate in (("copy", copy, "gb_s"), ("product", product, "tflop_s")):
        record = suite.contest("limits", {"limit": name}, {name: make}, base=name)
        unit = 1e9 if rate == "gb_s" else 1e12
        if rate in record["sides"][name]:
            suite.limits[name] = unit * record["sides"][name][rate]

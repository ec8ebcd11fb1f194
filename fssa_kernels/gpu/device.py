"""What launch configurations are chosen from: the facts of a GPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """A GPU as far as launch configurations depend on it.

    `name` is the device class, a key of the tuned tables. `capability` is 80 for sm_80.
    `shared_bytes` is what one program may take of a multiprocessor's shared memory.
    """

    name: str
    capability: int
    num_sms: int
    shared_bytes: int


# Shared memory of one block at most: CUDA C++ Programming Guide, table "Technical Specifications
# per Compute Capability".
_SHARED_BYTES = {
    75: 64 << 10,
    80: 163 << 10,
    86: 99 << 10,
    87: 163 << 10,
    89: 99 << 10,
    90: 227 << 10,
    100: 227 << 10,
    103: 227 << 10,
    110: 227 << 10,
    120: 99 << 10,
    121: 99 << 10,
}

# What kernels are compiled for where there is no GPU, one of each generation.
NOMINAL = {
    80: Device("a100", 80, 108, _SHARED_BYTES[80]),
    90: Device("h100", 90, 132, _SHARED_BYTES[90]),
    100: Device("b200", 100, 148, _SHARED_BYTES[100]),
}
# And those whose programs have less shared memory.
KNOWN = {
    **NOMINAL,
    89: Device("l40s", 89, 142, _SHARED_BYTES[89]),
    120: Device("nvidia_geforce_rtx_5090", 120, 170, _SHARED_BYTES[120]),
}


@functools.cache
def device_facts(index: int) -> Device:
    """The facts of CUDA device `index`."""
    properties = torch.cuda.get_device_properties(index)
    capability = 10 * properties.major + properties.minor
    return Device(
        _class_of(properties.name),
        capability,
        properties.multi_processor_count,
        _SHARED_BYTES.get(capability, 48 << 10),
    )


def _class_of(name: str) -> str:
    """ "NVIDIA H100 80GB HBM3" -> "h100": the model's word, which memory sizes and forms share."""
    words = name.lower().replace("-", " ").split()
    models = [word for word in words if word[0] in "abhlv" and word[1:].rstrip("s").isdigit()]
    return models[0] if models else "_".join(words)

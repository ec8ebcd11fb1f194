"""PyTorch maths of the modulation's last layer: latents to table rows."""

import torch.nn.functional as F
from torch import Tensor


def expand_modulation_ref(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """rows = z W^T + b in z.dtype."""
    return F.linear(z, weight.to(z.dtype), bias.to(z.dtype))

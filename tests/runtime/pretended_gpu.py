"""A GPU where there is none: tensors that say they are elsewhere, and refuse to meet those that are
not.

They compute on the CPU. As on a GPU, an operation whose operands are in both places raises, unless
it copies between them or the one on the CPU is a single number. "meta" is the one device that any
build of torch lets a tensor claim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("meta")
_COPY = torch.ops.aten.copy_.default
_COPIES = (_COPY, torch.ops.aten._to_copy.default)


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Within it, tensors can be made on and brought to the device ``GPU``."""
    with _Dispatch(), _Functions():
        yield


class _Functions(TorchFunctionMode):
    """`torch.tensor` fills no tensor on "meta": it does so on the CPU first."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is not torch.tensor:
            return func(*args, **(kwargs or {}))
        settings = dict(kwargs or {})
        device = settings.pop("device", None)
        return func(*args, **settings).to(device or "cpu")


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return _run(func, args, kwargs or {})


class _OnGpu(torch.Tensor):
    """What lies on the GPU; ``inner`` is where its numbers really are."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> _OnGpu:
        made: _OnGpu = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=GPU,
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    on_gpu = any(isinstance(tensor, _OnGpu) for tensor in tensors)
    if on_gpu and func not in _COPIES:
        for tensor in tensors:
            if tensor.ndim and not isinstance(tensor, _OnGpu):
                raise RuntimeError(f"{func}: expected tensors on one device, got CPU and GPU")
    if kwargs.get("device") is not None:
        on_gpu = torch.device(kwargs["device"]) == GPU
        kwargs = {**kwargs, "device": torch.device("cpu")}
    elif func is _COPY:
        on_gpu = isinstance(tensors[0], _OnGpu)
    result = func(*tree_map(_inner, tuple(args)), **tree_map(_inner, dict(kwargs)))
    written = {id(_inner(tensor)): tensor for tensor in tensors}

    def placed(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return written[id(leaf)] if id(leaf) in written else _OnGpu(leaf)

    return tree_map(placed, result) if on_gpu else result


def _inner(leaf: Any) -> Any:
    return leaf.inner if isinstance(leaf, _OnGpu) else leaf

"""Counts the bytes of all tensors, real or fake, operation by operation."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, each counted once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that operations return, until their memory is freed.

    Real and fake tensors are counted alike. Earlier tensors are counted after `add`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._serials: dict[int, tuple[int, Any]] = {}
        """Storage address -> (number, weak reference that reports its release). Only addresses are reused."""
        self._history: list[tuple[int, int]] = []
        """(number of the storage, change in bytes) of each allocation and release."""
        self._num_storages = 0

    def add(self, tensors: Iterable[Tensor]) -> int:
        """Count these tensors from now on; returns the live bytes."""
        for tensor in tensors:
            self._add(tensor)
        return self.live

    def peak_without(self, tensors: Sequence[Tensor]) -> int:
        """The peak without the memory of these tensors, which must still be alive."""
        excluded = {self._serials[tensor.untyped_storage()._cdata][0] for tensor in tensors}
        live = peak = 0
        for serial, change in self._history:
            if serial not in excluded:
                live += change
                peak = max(peak, live)
        return peak

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address in self._serials:
            return
        serial = self._num_storages
        self._num_storages += 1

        def release(_: object) -> None:
            del self._serials[address]
            self._change(serial, -size)

        self._serials[address] = serial, weakref.ref(storage, release)
        self._change(serial, size)

    def _change(self, serial: int, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)
        self._history.append((serial, size))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return result


class CudaOperations(TorchFunctionMode):
    """CUDA's attention and dropout: no attention matrix, and a mask of bytes. The CPU's keep both in full size.

    Args:
        attention: False keeps the attention matrix, as CUDA's math kernel does.
    """

    def __init__(self, *, attention: bool = True) -> None:
        super().__init__()
        self.attention = attention

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self.attention:
            return _flash_attention(*args, **kwargs)
        if func is F.dropout or func is torch.dropout:
            return _dropout(*args, **{"training" if key == "train" else key: value for key, value in kwargs.items()})
        return func(*args, **kwargs)


def _flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is not None or enable_gqa or query.dim() != 4:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    attention = torch.ops.aten._scaled_dot_product_flash_attention
    output: Tensor = attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    return output


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, training)[0] if training and p else input

"""Activations kept for the backward pass as their 8-bit codes: a quarter of what float32 takes, and the same gradients."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lowprec.layers.activations import ActivationQuantizer
from lowprec.layers.attention import QuantizedFloatOperator, QuantizedMatmul
from lowprec.layers.elementwise import QuantizedReLU
from lowprec.layers.grids import keep_codes_in_attention
from lowprec.layers.lookup import QuantizedLookup
from lowprec.numerics.fixed_point import EXACT_DTYPES
from lowprec.numerics.straight_through import codes_of_multiples, multiples_of_codes


class _Codes:
    """The codes of all that a tensor's memory holds, int8 [elements], less ``offset``; one is worth 2^exponent."""

    def __init__(self, values: Tensor, exponent: Tensor, offset: int) -> None:
        self.codes = codes_of_multiples(values, exponent, offset)
        # A copy: the quantizer's own may be another one when the values are asked for.
        self.exponent, self.offset = exponent.clone(), offset


class _Saved(NamedTuple):
    """A tensor that lies in coded memory."""

    codes: _Codes
    shape: torch.Size
    strides: tuple[int, ...]
    start: int
    dtype: torch.dtype

    def values(self) -> Tensor:
        """The tensor as it was."""
        codes = self.codes.codes.as_strided(self.shape, self.strides, self.start)
        return multiples_of_codes(codes, self.codes.exponent, self.codes.offset, self.dtype)


class _Grid:
    """Memory that a quantizer has filled: the version it had then, and its codes once somebody keeps it."""

    def __init__(self, values: Tensor, quantizer: ActivationQuantizer) -> None:
        self.version = values._version
        self.exponent = quantizer.exponent
        self.offset = quantizer.int8_offset
        self._codes: weakref.ref[_Codes] | None = None

    def codes(self, storage: torch.UntypedStorage, like: Tensor) -> _Codes:
        known = self._codes() if self._codes is not None else None
        if known is None:
            whole = torch.empty(0, dtype=like.dtype, device=like.device).set_(storage)
            known = _Codes(whole, self.exponent, self.offset)
            self._codes = weakref.ref(known)
        return known


@contextmanager
def saved_as_codes(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Within it, whatever ``model``'s forward pass keeps of quantized activations for the backward pass is kept as 8-bit codes.

    The gradients are the same, bit by bit: a quantized activation is code · 2^e, which its code gives back exactly. A tensor
    that several operators keep is coded once; attention's operators see to theirs (:func:`keep_codes_in_attention`). What is not
    on a quantizer's grid (a batch norm's input) is kept as it is, as is what was changed in place after its quantizer. Not for
    compiled models, nor around torch.utils.checkpoint, which computes again when this is over.

    model: a prepared one (:func:`lowprec.prepare`), calibrated. enabled: False does nothing.
    """
    if not enabled:
        yield
        return
    grids: dict[StorageWeakRef, _Grid] = {}

    def note(module: nn.Module, arguments: Any, values: Tensor) -> None:
        quantizer = module.source if isinstance(module, QuantizedReLU) else getattr(module, "quantizer", module)
        if isinstance(quantizer, ActivationQuantizer) and quantizer.quantizing and values.dtype in EXACT_DTYPES:
            # The weak reference keeps the storage's identity from being given to another one.
            grids[StorageWeakRef(values.untyped_storage())] = _Grid(values, quantizer)

    def pack(values: Tensor) -> Tensor | _Saved:
        storage = values.untyped_storage()
        grid = grids.get(StorageWeakRef(storage))
        if grid is None or grid.version != values._version or values.dtype not in EXACT_DTYPES:
            return values
        codes = grid.codes(storage, values.detach())
        return _Saved(codes, values.shape, values.stride(), int(values.storage_offset()), values.dtype)

    def unpack(saved: Tensor | _Saved) -> Tensor:
        return saved.values() if isinstance(saved, _Saved) else saved

    # A lookup's result may come from a table.
    kinds = ActivationQuantizer | QuantizedReLU | QuantizedLookup
    quantizers = [module for module in model.modules() if isinstance(module, kinds)]
    handles = [module.register_forward_hook(note) for module in quantizers]
    operators = [module for module in model.modules() if isinstance(module, QuantizedMatmul | QuantizedFloatOperator)]
    before = [module.keeps_codes_on for module in operators]
    if isinstance(model, fx.GraphModule):
        keep_codes_in_attention(model, {parameter.device.type for parameter in model.parameters()})
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        for module, devices in zip(operators, before, strict=True):
            module.keeps_codes_on = devices
        for handle in handles:
            handle.remove()

"""What autocast does to an operator's inputs, where there is any for their device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Autocast(NamedTuple):
    """The state of autocast for a kind of device; arguments of ``torch.autocast``."""

    device_type: str
    dtype: torch.dtype
    enabled: bool

    @classmethod
    def now(cls, device_type: str) -> Autocast:
        if not torch.amp.is_autocast_available(device_type):
            return cls("cpu", torch.bfloat16, False)
        return cls(device_type, torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type))


def dtype_of_products(values: Tensor) -> torch.dtype:
    """That in which a product of ``values`` is computed: autocast's, or their own."""
    state = Autocast.now(values.device.type)
    return state.dtype if state.enabled else values.dtype

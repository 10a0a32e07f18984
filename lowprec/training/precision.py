"""Which precision training runs in: bfloat16 autocast where the processor multiplies it fast, else float32."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal

import torch

Precision = Literal["bf16-mixed", "32-true"]


def choose_precision(setting: str, accelerator: str) -> Precision:
    """Lightning's precision for ``trainer.precision`` (auto, 32, bf16) on ``trainer.accelerator`` (auto, cpu, gpu)."""
    if setting == "32":
        return "32-true"
    if setting == "bf16":
        return "bf16-mixed"
    on_gpu = accelerator != "cpu" and torch.cuda.is_available()
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else _cpu_is_fast_at_bfloat16()
    return "bf16-mixed" if fast else "32-true"


def float32_evaluation(device: torch.device) -> AbstractContextManager[None]:
    """Evaluation leaves autocast: what is validated is what is shipped, and that is computed in float32."""
    return torch.autocast(device.type, enabled=False)


def _cpu_is_fast_at_bfloat16() -> bool:
    # Private, and named differently between versions of torch: a missing one counts as "not supported".
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)

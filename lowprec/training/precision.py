"""Where training runs and in which precision: bfloat16 autocast where the processor multiplies it fast, else float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from lowprec.config import ConfigError

Precision = Literal["bf16-mixed", "32-true"]


def choose_accelerator(setting: str) -> Literal["cpu", "gpu"]:
    """Lightning's accelerator for ``trainer.accelerator`` (auto, cpu, gpu); auto takes a CUDA GPU where there is one.

    Raises:
        ConfigError: a GPU is asked for, and there is none.
    """
    available = torch.cuda.is_available()
    if setting == "gpu" and not available:
        raise ConfigError("trainer.accelerator=gpu: torch finds no CUDA GPU here; auto or cpu work without one")
    return "gpu" if available and setting != "cpu" else "cpu"


def choose_device(setting: str) -> torch.device:
    """The device of ``trainer.accelerator``."""
    return torch.device("cuda" if choose_accelerator(setting) == "gpu" else "cpu")


def choose_precision(setting: str, accelerator: str) -> Precision:
    """Lightning's precision for ``trainer.precision`` (auto, 32, bf16) on an accelerator (cpu, gpu)."""
    if setting == "32":
        return "32-true"
    if setting == "bf16":
        return "bf16-mixed"
    gpu = accelerator == "gpu"
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if gpu else _cpu_is_fast_at_bfloat16()
    return "bf16-mixed" if fast else "32-true"


@contextmanager
def float32_evaluation(device: torch.device) -> Iterator[None]:
    """Evaluation is in float32, without autocast and TF32: what is validated is what is shipped."""
    exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    with torch.autocast(device.type, enabled=False), exact:
        yield


def _cpu_is_fast_at_bfloat16() -> bool:
    # Private, and named differently between versions of torch: a missing one counts as "not supported".
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)

"""Which precision is chosen where."""

from __future__ import annotations

import pytest
import torch

from lowprec.config import ConfigError
from lowprec.training.precision import choose_accelerator, choose_device, choose_precision, float32_evaluation


@pytest.mark.parametrize(("setting", "expected"), [("32", "32-true"), ("bf16", "bf16-mixed")])
def test_an_explicit_choice_is_taken(setting: str, expected: str) -> None:
    assert choose_precision(setting, "cpu") == expected


@pytest.mark.parametrize(
    ("amx", "avx512", "expected"),
    [(False, False, "32-true"), (True, False, "bf16-mixed"), (False, True, "bf16-mixed")],
)
def test_auto_asks_the_processor(monkeypatch: pytest.MonkeyPatch, amx: bool, avx512: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    assert choose_precision("auto", "cpu") == expected


def test_auto_does_without_checks_that_torch_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert choose_precision("auto", "cpu") == "32-true"


def test_a_gpu_that_is_not_there_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="accelerator=gpu"):
        choose_accelerator("gpu")
    assert choose_accelerator("auto") == choose_accelerator("cpu") == "cpu"
    assert choose_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_accelerator("auto") == choose_accelerator("gpu") == "gpu"
    assert choose_device("cpu") == torch.device("cpu")


def test_evaluation_is_in_float32_within_autocast() -> None:
    layer, values = torch.nn.Linear(2, 2), torch.randn(1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(values).dtype == torch.bfloat16
        with float32_evaluation(torch.device("cpu")):
            assert layer(values).dtype == torch.float32

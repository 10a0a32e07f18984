"""Kernels are used where they were seen to be right, and a GPU on which they are not is said."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from triton_interpreter import PLACES, operators_only, running

from lowprec.numerics import triton_activations, triton_kernels, triton_weights
from lowprec.numerics.triton_kernels import KernelWarning, agrees, runs_triton


@pytest.fixture(params=PLACES)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where the kernels run; what was found out there before is forgotten."""
    agrees.cache_clear()
    # What they are compared with is computed on the CPU, in the interpreter too.
    with running(request.param) as device, operators_only():
        yield torch.device(device)
    agrees.cache_clear()


def test_they_agree(device: torch.device) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert agrees(device)


@pytest.mark.parametrize("kernel", ["quantize_activation", "gradient_within"])
def test_an_activation_that_differs_is_found(
    kernel: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(triton_activations, kernel)

    def wrong(*arguments: object, **keywords: object) -> object:
        result = right(*arguments, **keywords)
        # The last result of each: out.
        out = arguments[5] if kernel == "quantize_activation" else arguments[2]
        assert isinstance(out, torch.Tensor)
        out[7] += 0.125
        return result

    monkeypatch.setattr(triton_activations, kernel, wrong)
    with pytest.warns(KernelWarning, match="cannot be used on .*their results differ"):
        assert not agrees(device)


def test_a_weight_that_differs_is_found(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_weights, "descend", lambda *arguments: None)
    with pytest.warns(KernelWarning, match="their results differ"):
        assert not agrees(device)


def test_kernels_that_cannot_be_built_are_done_without(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **keywords: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify one")

    monkeypatch.setattr(triton_activations, "quantize_activation", fail)
    with pytest.warns(KernelWarning, match=r"\(RuntimeError: Failed to find C compiler\.\).*gcc, python3-dev"):
        assert not agrees(device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not agrees(device)  # said once


def test_without_triton_there_is_nothing_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    agrees.cache_clear()
    monkeypatch.setattr(triton_kernels, "find_spec", lambda name: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not agrees(torch.device("cpu"))
    agrees.cache_clear()


def test_a_cpu_has_its_own_operators() -> None:
    assert not runs_triton(torch.zeros(1))

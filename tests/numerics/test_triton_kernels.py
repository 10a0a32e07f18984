"""Kernels are used where they were seen to be right, and a GPU on which they are not is said."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from triton_interpreter import PLACES, operators_only, running

from lowprec.numerics import triton_activations, triton_kernels, triton_products, triton_weights
from lowprec.numerics.triton_kernels import KernelWarning, multiplies, quantizes, runs_triton


@pytest.fixture(params=PLACES)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where the kernels run; what was found out there before is forgotten."""
    forget()
    # What they are compared with is computed on the CPU, in the interpreter too.
    with running(request.param) as device, operators_only():
        yield torch.device(device)
    forget()


def forget() -> None:
    for asked in (quantizes, multiplies):
        asked.cache_clear()


class Asking(torch.autograd.Function):
    """Asks in the middle of a step, as a quantizer does."""

    answers: ClassVar[list[bool]] = []

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        Asking.answers = [quantizes(values.device), multiplies(values.device)]
        return values.clone()


MODES = {
    "gradients wanted": nullcontext,
    "none wanted": torch.no_grad,
    "inference": torch.inference_mode,
    "another default device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("mode", MODES)
def test_they_agree_whoever_asks(mode: str, device: torch.device) -> None:
    values = torch.zeros(1, device=device, requires_grad=True)
    with warnings.catch_warnings(), MODES[mode]():
        warnings.simplefilter("error")
        assert quantizes(device)
        assert multiplies(device)
        forget()
        Asking.apply(values)
    assert Asking.answers == [True, True]


@pytest.mark.parametrize(
    ("module", "kernel", "out"),
    [
        (triton_activations, "quantize_activation", 5),
        (triton_activations, "gradient_within", 2),
        (triton_activations, "write_codes", 3),
        (triton_activations, "write_values", 3),
        (triton_products, "multiply_codes", 6),
    ],
)
def test_what_is_written_wrongly_is_found(
    module: ModuleType, kernel: str, out: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(module, kernel)

    def wrong(*arguments: Any, **keywords: Any) -> Any:
        result = right(*arguments, **keywords)
        written = arguments[out]
        written.view(-1)[7] += 0.125 if written.is_floating_point() else 1
        return result

    monkeypatch.setattr(module, kernel, wrong)
    with pytest.warns(KernelWarning, match="cannot be used on .*their results differ"):
        assert not (multiplies if module is triton_products else quantizes)(device)
    # One does not stand for the other.
    assert (quantizes if module is triton_products else multiplies)(device)


@pytest.mark.parametrize("kernel", ["quantize_weight", "quantize_eight_bit"])
def test_weights_that_differ_are_found(kernel: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(triton_weights, kernel)

    def wrong(*arguments: Any) -> tuple[Tensor, Tensor]:
        values, exponents = right(*arguments)
        return values, exponents + 1

    monkeypatch.setattr(triton_weights, kernel, wrong)
    with pytest.warns(KernelWarning, match="their results differ"):
        assert not quantizes(device)


def test_scales_that_do_not_follow_are_found(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_weights, "descend", lambda *arguments: None)
    with pytest.warns(KernelWarning, match="their results differ"):
        assert not quantizes(device)


def test_kernels_that_cannot_be_built_are_done_without(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **keywords: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify one")

    monkeypatch.setattr(triton_activations, "quantize_activation", fail)
    with pytest.warns(
        KernelWarning, match=r"\(RuntimeError: Failed to find C compiler\.\).*gcc, libc6-dev, python3-dev"
    ):
        assert not quantizes(device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not quantizes(device)  # said once


def test_without_triton_there_is_nothing_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    forget()
    monkeypatch.setattr(triton_kernels, "find_spec", lambda name: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not quantizes(torch.device("cpu"))
    forget()


def test_a_cpu_has_its_own_operators() -> None:
    assert not runs_triton(torch.zeros(1))

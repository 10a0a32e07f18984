"""Whether the package's Triton kernels are used: on a GPU on which they were seen to be right.

What they are compared with is computed on the CPU, without autograd: the question comes up in the middle of a step, in an
autograd function, or where no gradient is wanted.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from lowprec.numerics.clusters import ClusterLayout
from lowprec.numerics.effective_codes import channel_exponents, effective_codes, mantissas
from lowprec.numerics.fixed_point import EXACT_DTYPES, SIGNED_8_BIT, dequantize, power_of_two, quantize
from lowprec.numerics.solvers import (
    ClusterScales,
    descend_four_bit,
    descend_ternary,
    eight_bit_codes,
    four_bit_codes,
    solve_eight_bit,
    ternary_codes,
)

CPU = torch.device("cpu")


class KernelWarning(UserWarning):
    """A GPU is used without the kernels that are for it."""


def runs_triton(tensor: Tensor) -> bool:
    """Whether our own kernels quantize ``tensor``: on a GPU, where nothing is being compiled, which fuses by itself."""
    return tensor.is_cuda and not torch.compiler.is_compiling() and quantizes(tensor.device)


@cache
def quantizes(device: torch.device) -> bool:
    """Whether kernels of activations, codes and weights give there what PyTorch's operators give on a CPU: they are run.

    Warns KernelWarning where they cannot be built (Triton needs a C compiler and Python's headers) or differ.
    """
    checks = (_activations_agree, _codes_agree, _ternary_agrees, _four_bits_agree, _eight_bits_agree)
    return _agrees(
        device, checks, "PyTorch's operators quantize activations and weights", "at several times the traffic"
    )


@cache
def multiplies(device: torch.device) -> bool:
    """Whether the kernel of products on tensor cores is exact there; warns KernelWarning where it is not."""
    return _agrees(device, (_products_agree,), "trainer.tensor_cores has no effect: products are float ones", "")


def _agrees(device: torch.device, checks: tuple[Callable[[torch.device], bool], ...], instead: str, cost: str) -> bool:
    if find_spec("triton") is None:
        return False  # there is none for this system
    try:
        reason = "" if all(check(device) for check in checks) else "their results differ"
    # Whatever goes wrong while kernels are built: there are operators that do the same.
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    if reason:
        text = (
            f"Triton kernels of lowprec's cannot be used on {device} ({reason}): {instead} there, with the same results"
            f"{' ' if cost else ''}{cost}. Triton needs a C compiler and Python's headers (Debian: gcc, libc6-dev, python3-dev)"
        )
        warnings.warn(text, KernelWarning, stacklevel=2)
    return not reason


def _activations_agree(device: torch.device) -> bool:
    from lowprec.numerics.straight_through import Ends
    from lowprec.numerics.triton_activations import gradient_within, quantize_activation

    exponent = torch.tensor(-3, dtype=torch.int32, device=CPU)
    agree = []
    for dtype in EXACT_DTYPES:
        # Quarters of a code: ties, and both sides of the range.
        values = (torch.arange(-600, 600, device=CPU) / 32).to(dtype)
        addend = values.flip(0) / 16
        summed = values + addend
        wanted = dequantize(quantize(summed.clamp(min=0), exponent, SIGNED_8_BIT), exponent).to(dtype)
        # 127.5 codes are a tie that would round to 128.
        passed = ((summed > 0) & (summed.float() < 127.5 / 8)).to(dtype)
        on_device = values.to(device)
        found, gradient = torch.empty_like(on_device), torch.ones_like(on_device)
        ends = Ends.of(SIGNED_8_BIT.low, SIGNED_8_BIT.high, dtype)
        mask = quantize_activation(on_device, addend.to(device), exponent.to(device), ends, "relu", found, True)
        assert mask is not None
        gradient_within(gradient, mask, gradient)
        agree += [torch.equal(found.cpu(), wanted), torch.equal(gradient.cpu(), passed)]
    return all(agree)


def _codes_agree(device: torch.device) -> bool:
    from lowprec.numerics.triton_activations import write_codes, write_values

    integers = torch.arange(256, device=CPU)
    exponent = torch.tensor(-3, dtype=torch.int32, device=device)
    agree = []
    for dtype in EXACT_DTYPES:
        values = (integers / 8).to(dtype)
        codes = torch.empty(256, dtype=torch.int8, device=device)
        write_codes(values.to(device), exponent, 128, codes)
        back = torch.empty(256, dtype=dtype, device=device)
        write_values(codes, exponent, 128, back)
        agree += [torch.equal(codes.cpu().long() + 128, integers), torch.equal(back.cpu(), values)]
    return all(agree)


def _weights() -> tuple[Tensor, ClusterLayout]:
    """Halves, whose sums are exact in whatever order; a channel of zeros."""
    weight = (torch.arange(72, device=CPU).mul_(7).remainder_(23) - 11).view(3, 8, 3, 1) / 2
    weight[1] = 0
    return weight, ClusterLayout((3, 8, 3, 1), 4)


def _clusters_agree(device: torch.device, bits: int) -> bool:
    from lowprec.numerics.triton_weights import descend, quantize_weight

    weight, layout = _weights()
    w_OGNP = layout.split(weight)
    scale = torch.full(layout.scale_shape, 1.5, device=CPU)
    threshold = scale / 2 if bits == 2 else None
    on_device, found_scale = weight.to(device), scale.to(device, copy=True)
    found_threshold = None if threshold is None else threshold.to(device, copy=True)
    descend(on_device, found_scale, found_threshold, layout)
    if threshold is None:
        scale = descend_four_bit(w_OGNP, scale, layout)
        codes = four_bit_codes(w_OGNP, scale)
    else:
        scale, threshold = descend_ternary(w_OGNP, ClusterScales(scale, threshold), layout)
        codes = ternary_codes(w_OGNP, threshold)
    exponent = channel_exponents(scale, bits)
    effective = effective_codes(codes, mantissas(scale, exponent, bits), bits)
    wanted = layout.merge(dequantize(effective, exponent.view(-1, 1, 1, 1)))
    found = [quantize_weight(on_device, found_scale, found_threshold, layout, dtype) for dtype in EXACT_DTYPES]
    return _give(found, wanted, exponent)


def _ternary_agrees(device: torch.device) -> bool:
    return _clusters_agree(device, 2)


def _four_bits_agree(device: torch.device) -> bool:
    return _clusters_agree(device, 4)


def _eight_bits_agree(device: torch.device) -> bool:
    from lowprec.numerics.triton_weights import quantize_eight_bit

    weight, _ = _weights()
    found = [quantize_eight_bit(weight.to(device), dtype) for dtype in EXACT_DTYPES]
    exponent = solve_eight_bit(weight)
    return _give(found, dequantize(eight_bit_codes(weight, exponent), exponent.view(-1, 1, 1, 1)), exponent)


def _give(found: Sequence[tuple[Tensor, Tensor]], wanted: Tensor, exponent: Tensor) -> bool:
    """Whether values and exponents that a device gave are these."""
    return all(
        torch.equal(values.cpu().float(), wanted) and torch.equal(exponents.cpu(), exponent)
        for values, exponents in found
    )


def _products_agree(device: torch.device) -> bool:
    from lowprec.numerics.triton_products import multiply_codes

    agree = []
    for dtype in EXACT_DTYPES:
        values = torch.arange(200 * 70, device=CPU).mul_(37).remainder_(256).view(200, 70).to(dtype)
        exponents = torch.arange(-70, 70, device=CPU).int().div_(10, rounding_mode="floor")
        weight = (torch.arange(140 * 70, device=CPU).mul_(29).remainder_(129).sub_(64)).view(140, 70)
        weight = (weight * power_of_two(exponents)[:, None]).to(dtype)
        zero = torch.zeros((), dtype=torch.int32, device=CPU)
        out = torch.empty(200, 140, dtype=dtype, device=device)
        given = [tensor.to(device) for tensor in (values, weight, zero, exponents)]
        multiply_codes(given[0], given[1], None, given[2], given[3], 128, out)
        agree.append(torch.equal(out.cpu(), (values.double() @ weight.double().T).float().to(dtype)))
    return all(agree)

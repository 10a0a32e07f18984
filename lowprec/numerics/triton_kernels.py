"""Whether the Triton kernels of activations and weights are used: on a GPU on which they were seen to be right."""

from __future__ import annotations

import warnings
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from lowprec.numerics.clusters import ClusterLayout


class KernelWarning(UserWarning):
    """A GPU is used without the kernels that are for it."""


def runs_triton(tensor: Tensor) -> bool:
    """Whether our own kernels take ``tensor``: on a GPU, where nothing is being compiled, which fuses by itself."""
    return tensor.is_cuda and not torch.compiler.is_compiling() and agrees(tensor.device)


@cache
def agrees(device: torch.device) -> bool:
    """Whether the kernels give there what PyTorch's operators give on a CPU, found out by running them.

    Warns KernelWarning where they cannot be built (Triton needs a C compiler and Python's headers) or differ.
    """
    if find_spec("triton") is None:
        return False  # there is none for this system
    try:
        reason = "" if _activations_agree(device) and _weights_agree(device) else "their results differ"
    # Whatever goes wrong while kernels are built: there are operators that do the same.
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    if reason:
        text = (
            f"lowprec's Triton kernels cannot be used on {device} ({reason}): PyTorch's operators quantize activations and "
            "weights there, with the same results, but several times the traffic. Triton needs a C compiler and Python's headers "
            "(Debian: gcc, python3-dev)"
        )
        warnings.warn(text, KernelWarning, stacklevel=2)
    return not reason


def _activations_agree(device: torch.device) -> bool:
    from lowprec.numerics.fixed_point import SIGNED_8_BIT
    from lowprec.numerics.straight_through import Ends, straight_through_activation
    from lowprec.numerics.triton_activations import gradient_within, quantize_activation

    # Quarters of a code: ties, and both sides of the range.
    values = (torch.arange(-600, 600) / 32).requires_grad_()
    exponent = torch.tensor(-3, dtype=torch.int32)
    result = straight_through_activation(values, exponent, SIGNED_8_BIT, "relu")
    result.backward(torch.ones_like(result))
    on_device = values.detach().to(device)
    found, gradient = torch.empty_like(on_device), torch.empty_like(on_device)
    ends = Ends.of(SIGNED_8_BIT.low, SIGNED_8_BIT.high, values.dtype)
    mask = quantize_activation(on_device, None, exponent.to(device), ends, "relu", found, masked=True)
    assert mask is not None
    gradient_within(torch.ones_like(on_device), mask, gradient)
    return torch.equal(found.cpu(), result.detach()) and torch.equal(gradient.cpu(), values.grad)  # type: ignore[arg-type]


def _weights_agree(device: torch.device) -> bool:
    from lowprec.numerics.fixed_point import power_of_two
    from lowprec.numerics.triton_weights import descend, quantize_weight

    layout = ClusterLayout((2, 4), 4)
    weight = torch.tensor([[3.0, -1.0, 0.25, -2.0], [0.5, 0.0, 0.0, 0.0]], device=device)
    scale, threshold = (torch.full(layout.scale_shape, start, device=device) for start in (1.5, 0.75))
    descend(weight, scale, threshold, layout)
    values, exponents = quantize_weight(weight, scale, threshold, layout)
    # Means over what reaches half the scale: (3 + 1 + 2) / 3, and of nothing, the mean of all, 0.5 / 4. Mantissas are 64.
    expected = torch.tensor([[2.0, -2.0, 0.0, -2.0], [0.125, 0.0, 0.0, 0.0]])
    return torch.equal(values.cpu(), expected) and torch.equal(64 * power_of_two(exponents.cpu()), expected[:, 0])

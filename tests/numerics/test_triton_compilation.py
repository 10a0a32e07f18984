"""The Triton kernels compile for NVIDIA's GPUs where there is none: no fused multiply-adds, wide loads and stores."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lowprec.numerics import triton_activations, triton_products, triton_weights
from lowprec.numerics.clusters import ClusterLayout

ARCHITECTURES = [80, 90]
WARP = 32
SIZES = ("size", "rows", "outputs", "inputs", "values_m")
# What the least of today's GPUs have for a program.
SHARED_MEMORY = 99 * 1024
CONSTANTS = {
    "LOW": 0.0,
    "HIGH": 255.0,
    "LEAST": -0.5,
    "MOST": 255.5 - 2.0**-16,
    "BELOW_SIX": 6.0 - 2.0**-21,
    "TINY": torch.finfo(torch.float32).smallest_normal,
    "BLOCK": triton_activations.BLOCK,
    "MASKED": True,
    "ADDS": False,
}


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], architecture: int, **options: Any) -> str:
    """PTX, as assembled, of what fits any GPU; sizes and addresses are multiples of 16, as they are at run time."""
    arguments = {name: types.get(name, "constexpr" if name in constants else "i32") for name in kernel.arg_names}
    aligned = [place for place, (name, kind) in enumerate(arguments.items()) if kind[0] == "*" or name in SIZES]
    source = ASTSource(
        kernel,
        signature=arguments,
        constexprs={name: value for name, value in constants.items() if arguments[name] == "constexpr"},
        attrs={(place,): [["tt.divisibility", 16]] for place in aligned},
    )
    target = GPUTarget("cuda", architecture, WARP)
    result = triton.compile(source, target=target, options={"enable_fp_fusion": False, **options})
    assert result.asm["cubin"]
    assert result.metadata.shared <= SHARED_MEMORY
    return str(result.asm["ptx"])


def instructions(ptx: str, pattern: str) -> int:
    return len(re.findall(pattern, ptx))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("activation", triton_activations.ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "loads"), [("bf16", 2), ("fp32", 4)])
def test_an_activation_is_read_and_written_in_whole_vectors(
    dtype: str, loads: int, activation: str, architecture: int
) -> None:
    """16 elements a thread: 16 bytes at once."""
    types = {"values": f"*{dtype}", "addend": f"*{dtype}", "out": f"*{dtype}", "mask": "*u8", "exponent": "*i32"}
    constants = {**CONSTANTS, "ACTIVATION": triton_activations.ACTIVATIONS[activation]}
    ptx = compiled(triton_activations.quantize_kernel, types, constants, architecture)
    assert instructions(ptx, r"ld\.global\.v4\.b32") == loads
    assert instructions(ptx, r"st\.global\.v4\.b32") == loads
    assert instructions(ptx, r"fma\.") == 0
    assert instructions(ptx, r"add(\.rn)?\.f32") > 0
    ptx = compiled(triton_activations.quantize_kernel, types, {**constants, "ADDS": True}, architecture)
    assert instructions(ptx, r"ld\.global\.v4\.b32") == 2 * loads

    types = {"gradient": f"*{dtype}", "out": f"*{dtype}", "mask": "*u8"}
    ptx = compiled(triton_activations.gradient_kernel, types, {"BLOCK": triton_activations.BLOCK}, architecture)
    assert instructions(ptx, r"ld\.global\.v4\.b32") == loads
    assert instructions(ptx, r"st\.global\.v4\.b32") == loads


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "vectors"), [("bf16", 2), ("fp32", 4)])
def test_codes_are_read_and_written_in_whole_vectors(dtype: str, vectors: int, architecture: int) -> None:
    """16 elements a thread: the values' 16 bytes at once, the codes' too."""
    constants = {"OFFSET": 128, "BLOCK": triton_activations.BLOCK}
    types = {"values": f"*{dtype}", "out": "*i8", "exponent": "*i32"}
    ptx = compiled(triton_activations.codes_kernel, types, constants, architecture)
    assert instructions(ptx, r"ld\.global\.v4\.b32") == vectors
    assert instructions(ptx, r"fma\.") == 0
    types = {"codes": "*i8", "out": f"*{dtype}", "exponent": "*i32"}
    ptx = compiled(triton_activations.values_kernel, types, constants, architecture)
    assert instructions(ptx, r"st\.global\.v4\.b32") == vectors
    assert instructions(ptx, r"fma\.") == 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("kind", ["kernel", "element"])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("shape", "cluster_size"), [((64, 64, 3, 3), 4), ((512, 2048, 1, 1), 64), ((8, 4608), 4608)])
def test_kernels_of_weights_divide_and_add_exactly(
    shape: tuple[int, ...], cluster_size: int, bits: int, kind: str, dtype: str, architecture: int
) -> None:
    layout = ClusterLayout(shape, cluster_size, kind)
    threshold = torch.zeros(layout.scale_shape) if bits == 2 else None
    constants = triton_weights.constants_of(layout, threshold)
    types = dict.fromkeys(("weight", "scale", "threshold"), "*fp32")
    ptx = compiled(triton_weights.descend_kernel, types, constants, architecture)
    assert instructions(ptx, r"div\.rn\.f32") > 0
    assert instructions(ptx, r"div\.(full|approx)\.") + instructions(ptx, r"fma\.") == 0

    types |= {"quantized": f"*{dtype}", "exponents": "*i32"}
    constants |= triton_weights.constants_of_format(threshold)
    ptx = compiled(triton_weights.quantize_kernel, types, constants, architecture)
    assert instructions(ptx, r"div\.(full|approx)\.") + instructions(ptx, r"fma\.") == 0
    assert instructions(ptx, r"div\.rn\.f64") == 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("size", [9, 4608])
def test_8_bit_weights(size: int, dtype: str, architecture: int) -> None:
    types = {"weight": "*fp32", "quantized": f"*{dtype}", "exponents": "*i32"}
    constants = triton_weights.constants_of_eight_bits(torch.zeros(2, size))
    ptx = compiled(triton_weights.eight_bit_kernel, types, constants, architecture, **triton_weights.OPTIONS)
    assert instructions(ptx, r"fma\.") == 0
    assert instructions(ptx, r"div\.rn\.f64") == 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_products_are_those_of_tensor_cores(dtype: str, biased: bool, architecture: int) -> None:
    types = {"values": f"*{dtype}", "weight": f"*{dtype}", "out": f"*{dtype}"}
    types |= {"weight_sums": "*fp32", "bias": "*fp32", "exponent": "*i32", "weight_exponent": "*i32"}
    constants = triton_products.constants_of(torch.bfloat16 if dtype == "bf16" else torch.float32, 128, biased)
    ptx = compiled(triton_products.product_kernel, types, constants, architecture, **triton_products.OPTIONS)
    assert instructions(ptx, r"mma[.\w]*\.s32\.s8\.s8") > 0
    assert instructions(ptx, r"fma\.") == 0
    # Values and weights arrive 16 bytes at once.
    assert instructions(ptx, r"cp\.async\.cg\.shared\.global [^;]*, 0x10") > 8

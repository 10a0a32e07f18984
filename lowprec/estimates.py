"""What hardware made for it could save: time and energy, estimated from counts of operations. No measurements.

Time: the bound of arXiv 1701.08978, 16 accumulations of 8 bits in the time of one float32 multiply-accumulate; 8-bit
multiplications at 4, as a register holds four times as many values. Energy: of the arithmetic alone, without memory, in 45 nm
at 0.9 V; M. Horowitz, "Computing's energy problem", ISSCC 2014, figure 1.1.9.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowprec.cost import Costs, LayerCost

# Of one float32 multiply-accumulate's time.
ACCUMULATION_TIME, MULTIPLICATION_TIME = 1 / 16, 1 / 4
# Picojoules. Sums are 32-bit integers, whatever they add.
FLOAT32_MULTIPLY, FLOAT32_ADD = 3.7, 0.9
INT8_MULTIPLY, INT32_ADD = 0.2, 0.1


@dataclass(frozen=True)
class Estimates:
    """For one image. speed_up: over float32. The energies are in picojoules."""

    speed_up: float
    float32_energy: float
    energy: float


def estimates(costs: Costs) -> Estimates:
    """Time and energy of a model with these costs, against the same in float32."""
    return Estimates(
        speed_up=costs.macs / sum(map(_time, costs.layers)),
        float32_energy=costs.macs * (FLOAT32_MULTIPLY + FLOAT32_ADD),
        energy=sum(map(_energy, costs.layers)),
    )


def _time(layer: LayerCost) -> float:
    if layer.bits == 32:
        return float(layer.macs)
    accumulated = layer.macs * layer.planes if layer.bits == 2 else 0
    return accumulated * ACCUMULATION_TIME + layer.multiplications * MULTIPLICATION_TIME


def _energy(layer: LayerCost) -> float:
    if layer.bits == 32:
        return layer.macs * (FLOAT32_MULTIPLY + FLOAT32_ADD)
    return layer.macs * layer.planes * INT32_ADD + layer.multiplications * INT8_MULTIPLY

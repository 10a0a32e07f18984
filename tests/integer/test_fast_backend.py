"""The fast backend gives the integer executor's codes, every one of them, and its logits to the bit."""

from __future__ import annotations

import random
from typing import Any

import pytest
import timm
import torch
from avx2_kernels import assert_passes_with_avx2
from networks import awkward, images, quantize, random_network, random_recipe
from torch import Tensor

from lowprec.integer.fast.model import FastModel
from lowprec.integer.model import IntegerModel, Step
from lowprec.integer.operators import (
    Grid,
    IntegerAdd,
    IntegerAveragePool,
    IntegerConcatenation,
    IntegerConv2d,
    IntegerInput,
    IntegerLinear,
    IntegerLookup,
    IntegerMultiply,
    IntegerMultiplyAdd,
    IntegerOperator,
    IntegerPad,
    IntegerPermute,
    IntegerReLU,
    IntegerReshape,
    IntegerSlice,
    IntegerUpsample,
)
from lowprec.numerics import kernels

RECIPES = ("w2a8_n4", "w2a8_n64", "w4a8_n4", "w8a8")
UNSIGNED, SIGNED = (0, 255), (-128, 127)
OF_THE_IMAGES = (-1, -1, -1)  # a model made by hand takes whatever is given to it first
UNIT: dict[str, Any] = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}


def assert_equal(imodel: IntegerModel, *batches: Tensor) -> FastModel:
    """Every step's codes and the logits, on each batch, by ``==``."""
    if imodel.image_shape == OF_THE_IMAGES:
        imodel.image_shape = tuple(batches[0].shape[1:])  # type: ignore[assignment]
    fast = FastModel(imodel)
    for x in batches:
        expected, found = imodel.codes(x), fast.codes(x)
        assert list(found) == list(expected)
        for name, codes in expected.items():
            assert found[name].dtype == torch.int32
            assert torch.equal(found[name], codes), (name, fast.paths[name])
        logits = fast(x)
        assert logits.dtype == torch.float32
        assert torch.equal(logits, imodel(x))
    return fast


@pytest.mark.parametrize("seed", range(16))
def test_random_networks_give_equal_codes(seed: int) -> None:
    _, imodel = quantize(random_network(seed), random_recipe(seed), images(seed))
    assert_equal(imodel, images(seed + 1), 100 * images(seed + 2, 3))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("seed", [101, 102, 103])
def test_shipped_recipes_give_equal_codes(recipe: str, seed: int) -> None:
    _, imodel = quantize(random_network(seed), recipe, images(seed))
    assert_equal(imodel, images(seed + 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "recipe", "side"),
    [
        ("resnet18", "w2a8_n4", 48),
        ("resnet18", "w8a8", 40),
        ("efficientnet_lite0", "w4a8_n4", 48),
        ("efficientnet_lite0", "w8a8", 40),
    ],
)
def test_timm_models_give_equal_codes(name: str, recipe: str, side: int) -> None:
    model = awkward(timm.create_model(name, num_classes=7), seed=4, dead_channels=name == "efficientnet_lite0")
    _, imodel = quantize(model, recipe, images(1, 8, (3, side, side)))
    fast = assert_equal(imodel, images(2, 5, (3, side, side)), images(3, 2, (3, side + 8, side)))
    # Nothing runs on the reference operators, nor on float64 sums.
    assert not {"reference", "float64"} & set(fast.paths.values()), fast.paths


def model_around(operator: IntegerOperator, *sources: Grid) -> IntegerModel:
    """The operator after one input a source; all of them take the same images."""
    inputs = [Step(f"input_{index}", (), IntegerInput(grid)) for index, grid in enumerate(sources)]
    return IntegerModel([*inputs, Step("operator", tuple(step.name for step in inputs), operator)], OF_THE_IMAGES)


def whole_images(seed: int, *shape: int) -> Tensor:
    """Whole numbers that leave the range of 8 bits on both sides, channels of extremes among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-150, 300, shape, generator=generator).float()
    x[:, : shape[1] // 3] = torch.where(x[:, : shape[1] // 3] < 0, -300.0, 300.0)
    return x


def drawn_layer(draw: random.Random, kind: str, shortcut: Grid | None = None) -> IntegerConv2d | IntegerLinear:
    """A layer whose sums lie around float32's exact integers: small and large weights, biases, shifts and dead channels."""
    generator = torch.Generator().manual_seed(draw.getrandbits(30))
    inputs, outputs = {"linear": (draw.choice([20, 700]), 9), "dense": (20, 12), "grouped": (24, 12)}.get(
        kind, (24, 24)
    )
    groups = {"grouped": 2, "depthwise": inputs, "multiply_add": inputs}.get(kind, 1)
    kernel = 1 if kind == "multiply_add" else draw.choice([1, 3])
    shape = (outputs, inputs) if kind == "linear" else (outputs, inputs // groups, kernel, kernel)
    limit = draw.choice([1, 64, 128])
    codes = torch.randint(-limit, limit + 1, shape, generator=generator).clamp(-128, 127)
    codes[0], codes[1], codes[2] = 0, limit - 1, -limit
    largest_bias = 1 << draw.choice([4, 14, 23, 25, 30])
    bias = torch.randint(-largest_bias, largest_bias, (outputs,), generator=generator, dtype=torch.int32)
    source = Grid(0, *draw.choice([UNSIGNED, SIGNED]))
    last = draw.random() < 0.2 and shortcut is None and kind != "multiply_add"
    output = None if last else Grid(0, *draw.choice([UNSIGNED, SIGNED, (0, 200), (-100, 90)]))
    spread = draw.choice([0, 3]) if shortcut is not None else draw.choice([0, 2, 40])
    exponents = draw.choice([0, -7, -10, -15]) - torch.randint(0, spread + 1, (outputs,), generator=generator)
    if spread == 40:
        exponents[3:] = exponents[0]
    arguments = (codes.char(), None, exponents.clamp(-60, 60).char(), bias, 8, 1, "kernel", source, output)
    six = None if output is None or draw.random() < 0.7 else 60
    if kind == "linear":
        return IntegerLinear(*arguments, six)
    padding = draw.choice([0, kernel // 2])
    return {"multiply_add": IntegerMultiplyAdd}.get(kind, IntegerConv2d)(
        *arguments,
        six,
        shortcut=shortcut,
        stride=(1, 1) if shortcut is not None or kind == "multiply_add" else (draw.choice([1, 2]), 1),
        padding=(kernel // 2, kernel // 2) if shortcut is not None else (padding, padding),
        dilation=(1, 1),
        groups=groups,
    )


@pytest.mark.parametrize("kind", ["dense", "depthwise", "grouped", "multiply_add"])
def test_sums_around_the_bounds_of_float32(kind: str) -> None:
    paths = set()
    for seed in range(40):
        draw = random.Random(seed)
        layer = drawn_layer(draw, kind)
        fast = assert_equal(
            model_around(layer, layer.input), whole_images(seed, 2, layer.codes.shape[1] * layer.groups, 7, 6)
        )
        paths.add(fast.paths["operator"])
    assert "float64" in paths
    assert any(path.startswith("integer") for path in paths)


def test_matrix_sums_around_the_bounds_of_float32() -> None:
    paths = set()
    for seed in range(60):
        layer = drawn_layer(random.Random(seed), "linear")
        fast = assert_equal(model_around(layer, layer.input), whole_images(seed, 5, layer.codes.shape[1]))
        paths.add(fast.paths["operator"])
        if seed < 3:  # more than two axes
            assert_equal(model_around(layer, layer.input), whole_images(seed, 3, 4, layer.codes.shape[1]))
    assert "integer in parts" in paths
    assert len(paths) > 1


def one_weight_layers(bias: Tensor, shift: int, output: Grid) -> list[IntegerConv2d | IntegerLinear]:
    """Layers whose sums are code + bias, as a convolution and as a matrix product."""
    exponents = torch.full((len(bias),), -shift, dtype=torch.int8)
    ones = torch.ones(len(bias), 1, dtype=torch.int8)
    rest = (None, exponents, bias.int(), 8, 1, "kernel", Grid(0, 0, 255), output)
    return [IntegerConv2d(ones.view(-1, 1, 1, 1), *rest, **UNIT), IntegerLinear(ones, *rest)]


@pytest.mark.parametrize("low_high", [UNSIGNED, SIGNED])
@pytest.mark.parametrize("shift", range(24))
def test_sums_on_both_sides_of_ties(shift: int, low_high: tuple[int, int]) -> None:
    # Codes 0 to 255 take the sum through the tie above each k; with shifts over 16 it has more bits than a float32.
    for ties in ((0, 1, -2), (98, 99, 126, 253)):
        bias = torch.tensor([(2 * k + 1) << shift >> 1 for k in ties]) - 128
        for layer in one_weight_layers(bias, shift, Grid(0, *low_high)):
            shape = (1, 1, 16, 16) if layer.codes.dim() == 4 else (256, 1)
            assert_equal(model_around(layer, layer.input), torch.arange(256.0).view(shape))


def test_negative_shifts_multiply() -> None:
    for shift in (-1, -3, -9, -20):
        for layer in one_weight_layers(torch.tensor([-7, -6, -5, 0]), shift, Grid(0, *SIGNED)):
            shape = (1, 1, 16, 16) if layer.codes.dim() == 4 else (256, 1)
            assert_equal(model_around(layer, layer.input), torch.arange(256.0).view(shape))


@pytest.mark.parametrize("shift", [0, 2, 7, 15])
def test_large_products_that_a_bias_cancels(shift: int) -> None:
    inputs = 700  # 127 · 255 · 699 > 2^24
    codes = torch.full((4, inputs), 127, dtype=torch.int8)
    codes[:, 0] = 1
    total = 127 * 255 * (inputs - 1)
    bias = torch.tensor([(2 * k + 1) << shift >> 1 for k in (0, 3, 98, 127)], dtype=torch.int32) - 128 - total
    exponents = torch.full((4,), -shift, dtype=torch.int8)
    x = torch.full((256, inputs), 255.0)
    x[:, 0] = torch.arange(256)
    rest = (None, exponents, bias, 8, 1, "kernel", Grid(0, 0, 255), Grid(0, -128, 127))
    linear = IntegerLinear(codes, *rest)
    assert_equal(model_around(linear, linear.input), x)
    convolution = IntegerConv2d(codes.view(4, inputs, 1, 1), *rest, **UNIT)
    assert_equal(model_around(convolution, convolution.input), x.t().reshape(1, inputs, 16, 16))


@pytest.mark.parametrize("kind", ["dense", "depthwise"])
def test_a_shortcut_is_added_before_the_only_rounding(kind: str) -> None:
    paths = set()
    for seed in range(40):
        draw = random.Random(seed)
        shortcut = Grid(draw.choice([-8, -6, -1, 0]), *draw.choice([UNSIGNED, SIGNED]))
        try:
            layer = drawn_layer(draw, kind, shortcut)
        except ValueError:  # exponents too far apart
            continue
        inputs, outputs = layer.codes.shape[1] * layer.groups, len(layer.codes)
        if inputs == outputs:
            imodel = model_around(layer, layer.input, shortcut)
        else:
            cut = IntegerSlice(shortcut, [(1, 0, outputs, 1)])
            steps = [
                Step("x", (), IntegerInput(layer.input)),
                Step("y", (), IntegerInput(shortcut)),
                Step("z", ("y",), cut),
            ]
            imodel = IntegerModel([*steps, Step("operator", ("x", "z"), layer)], OF_THE_IMAGES)
        paths.add(assert_equal(imodel, whole_images(seed, 2, inputs, 5, 6)).paths["operator"])
    assert any(path.startswith("integer") for path in paths)


@pytest.mark.parametrize("low_high", [UNSIGNED, SIGNED])
@pytest.mark.parametrize(("shift", "distance"), [(s, d) for s in (3, 12, 15, 16, 18, 22) for d in (-15, -6, 0, 9, 15)])
def test_sums_with_a_shortcut_on_both_sides_of_ties(shift: int, distance: int, low_high: tuple[int, int]) -> None:
    bias = torch.tensor([(2 * k + 1) << shift >> 1 for k in (0, 1, -2)]) - 128
    convolution = one_weight_layers(bias, shift, Grid(0, *low_high))[0]
    code = Grid(0, 0, 255)
    shortcut = Grid(distance - shift, *low_high)
    layer = IntegerConv2d(
        convolution.codes, None, convolution.exponents, convolution.bias, 8, 1, "kernel", code, Grid(0, *low_high),
        shortcut=shortcut, **UNIT,
    )  # fmt: skip
    x = torch.cat((torch.arange(256.0).view(1, 1, 16, 16), torch.full((1, 3, 16, 16), 4 * 2.0**shortcut.exponent)), 1)
    steps = [
        Step("x", (), IntegerInput(code)),
        Step("y", (), IntegerInput(shortcut)),
        Step("codes", ("x",), IntegerSlice(code, [(1, 0, 1, 1)])),
        Step("shortcut", ("y",), IntegerSlice(shortcut, [(1, 1, 4, 1)])),
        Step("sum", ("codes", "shortcut"), layer),
    ]
    assert_equal(IntegerModel(steps, (4, 16, 16)), x)


def test_a_shortcut_that_is_used_later_survives() -> None:
    grid = Grid(0, *UNSIGNED)
    codes = torch.randint(-64, 65, (64, 64, 1, 1), generator=torch.Generator().manual_seed(0)).char()
    rest = (torch.full((64,), -8, dtype=torch.int8), torch.zeros(64, dtype=torch.int32), 8, 1, "kernel", grid, grid)
    steps = [
        Step("x", (), IntegerInput(grid)),
        Step("y", (), IntegerInput(grid)),
        Step("sum", ("x", "y"), IntegerConv2d(codes, None, *rest, None, grid, **UNIT)),
        Step("relu", ("y",), IntegerReLU(grid)),
        Step("own", ("relu", "relu"), IntegerConv2d(codes, None, *rest, None, grid, **UNIT)),
    ]
    assert_equal(IntegerModel(steps, (64, 4, 4)), whole_images(0, 2, 64, 4, 4))


@pytest.mark.parametrize("side", [7, 127, 130])
@pytest.mark.parametrize("shift", [-2, 0, 3])
def test_averages_on_both_sides_of_ties(side: int, shift: int) -> None:
    source, output, x = Grid(0, *SIGNED), Grid(-shift, *SIGNED), torch.zeros(1, 9, side, side)
    for channel in range(9):
        # Half of the output's unit in all, and a few units of the input more or less, on top of a large average.
        total = 20 * side * side + (side * side * 2.0**-shift) // 2 + channel - 4
        x[0, channel] = total // (side * side)
        x[0, channel].view(-1)[: int(total % (side * side))] += 1
    for kernel in (None, (side, side)):
        pooling = IntegerAveragePool(source, output, kernel, kernel, (0, 0), False, True, True)
        assert_equal(model_around(pooling, source), x, -x)


@pytest.mark.parametrize("seed", range(60))
def test_adds_of_all_exponents(seed: int) -> None:
    draw = random.Random(seed)
    left, right = (Grid(draw.randint(-9, 6), *draw.choice([UNSIGNED, SIGNED])) for _ in range(2))
    output = Grid(min(left.exponent, right.exponent) + draw.randint(-3, 16), *draw.choice([UNSIGNED, SIGNED]))
    add = IntegerAdd(left, right, output, draw.choice([None, None, 5, 90]))
    # Sizes that 64 divides, and none of it; all pairs of codes among them.
    pairs = torch.arange(256.0).view(1, 1, 256, 1).expand(1, 1, 256, 256)
    both = torch.cat((pairs - 128, pairs.transpose(2, 3)), 1)
    cut = [IntegerSlice(grid, [(1, side, side + 1, 1)]) for side, grid in enumerate((left, right))]
    for x in (both, both[:, :, :9, :7]):
        scaled = torch.cat((x[:, :1] * 2.0**left.exponent, x[:, 1:] * 2.0**right.exponent), 1)
        steps = [
            Step("x", (), IntegerInput(left)),
            Step("y", (), IntegerInput(right)),
            Step("left", ("x",), cut[0]),
            Step("right", ("y",), cut[1]),
            Step("sum", ("left", "right"), add),
        ]
        assert_equal(IntegerModel(steps, (2, 1, 1)), scaled)


@pytest.mark.parametrize("later", [(), ("left",), ("right",), ("left", "right")])
def test_operands_that_are_used_later_survive_an_add(later: tuple[str, ...]) -> None:
    grid, wide = Grid(0, *UNSIGNED), Grid(1, *SIGNED)
    steps = [
        Step("left", (), IntegerInput(grid)),
        Step("right", (), IntegerInput(grid)),
        Step("sum", ("left", "right"), IntegerAdd(grid, grid, wide)),
        *[Step(f"{name} once more", (name,), IntegerReLU(grid)) for name in later],
        Step("twice", ("sum", "sum"), IntegerAdd(wide, wide, wide)),
    ]
    assert_equal(IntegerModel(steps, (64, 2, 2)), whole_images(0, 2, 64, 2, 2))


def test_a_view_of_an_operand_survives_an_add() -> None:
    grid = Grid(0, *UNSIGNED)
    steps = [
        Step("x", (), IntegerInput(grid)),
        Step("y", (), IntegerInput(grid)),
        Step("view", ("y",), IntegerSlice(grid, [(0, 0, 1, 1)])),
        Step("sum", ("x", "y"), IntegerAdd(grid, grid, grid)),
        Step("relu", ("view",), IntegerReLU(grid)),
    ]
    assert_equal(IntegerModel(steps, (64, 2, 2)), whole_images(0, 2, 64, 2, 2))


@pytest.mark.parametrize("low_high", [UNSIGNED, SIGNED])
def test_products_concatenations_tables_and_movements(low_high: tuple[int, int]) -> None:
    one, other, output = Grid(0, *low_high), Grid(2, *SIGNED), Grid(1, *low_high)
    x = whole_images(5, 2, 6, 4, 5)
    for shift in range(-2, 12):
        multiply = IntegerMultiply(one, other, Grid(one.exponent + other.exponent + shift, *low_high))
        assert_equal(model_around(multiply, one, other), x)
    assert_equal(model_around(IntegerConcatenation([one, other, output], output, 1), one, other, output), x)
    generator = torch.Generator().manual_seed(0)
    for channels in ((), (6,)):
        table = torch.randint(low_high[0], low_high[1] + 1, (*channels, 256), generator=generator, dtype=torch.int16)
        assert_equal(model_around(IntegerLookup(table, one, output), one), x)
    for operator in (
        IntegerReshape(one, (2, 3, 40)),
        IntegerPermute(one, (0, 3, 1, 2)),
        IntegerSlice(one, [(1, 1, 5, 2), (3, 0, 4, 1)]),
        IntegerPad(one, [(0, 0), (0, 0), (1, 2), (0, 1)]),
        IntegerUpsample(one, (2, 3)),
    ):
        assert_equal(model_around(operator, one), x)


class Unknown(IntegerOperator):
    """An operator that the backend has never heard of."""

    def forward(self, codes: Tensor) -> Tensor:
        return (codes // 2).clamp(self.output.low, self.output.high)  # type: ignore[union-attr]


@pytest.mark.parametrize("output", [Grid(0, *SIGNED), Grid(0, *UNSIGNED), Grid(0, -1000, 1000)])
def test_unknown_operators_and_wide_codes_run_on_the_reference(output: Grid) -> None:
    source = Grid(0, *SIGNED)
    steps = [
        Step("input", (), IntegerInput(source)),
        Step("unknown", ("input",), Unknown(output)),
        Step("relu", ("unknown",), IntegerReLU(output)),
    ]
    fast = assert_equal(IntegerModel(steps, (3, 4, 4)), whole_images(0, 2, 3, 4, 4))
    assert fast.paths["unknown"] == "reference"


def test_integer_kernels_are_used_where_they_are_exact() -> None:
    assert all(kernels.convolves_exactly(kind, kernels.SAFE_MAGNITUDE) for kind in kernels.SHAPES)
    assert kernels.multiplies_exactly(kernels.SAFE_MAGNITUDE)


@pytest.mark.slow
def test_all_of_this_with_avx2_kernels() -> None:
    assert_passes_with_avx2(__file__)

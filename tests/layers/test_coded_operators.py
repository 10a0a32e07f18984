"""Attention's operators keep codes for the backward pass: values and gradients of the operators that they stand in for."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from networks import TinyTransformer, awkward, images
from torch import Tensor, fx, nn

import lowprec
from lowprec.layers import ActivationQuantizer, QuantizedFloatOperator, QuantizedMatmul
from lowprec.layers.grids import keep_codes_in_attention
from lowprec.layers.integer_product import use_integer_kernels
from lowprec.layers.saved_codes import saved_as_codes

BATCH = images(1, 8, (3, 8, 8))
KINDS = (QuantizedFloatOperator, QuantizedMatmul)
CPU, NOWHERE = frozenset({"cpu"}), frozenset[str]()


def quantizer(exponent: int, signed: bool = True) -> ActivationQuantizer:
    made = ActivationQuantizer(signed)
    made.set_exponent(exponent)
    return made


def on_grid(source: ActivationQuantizer, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    codes = torch.randint(source.codes.low, source.codes.high + 1, shape, generator=generator)
    return (codes * 2.0 ** int(source.exponent)).to(dtype)


def of_attention(width: int = 12, dropout: float = 0.0) -> fx.GraphModule:
    torch.manual_seed(0)
    model = awkward(TinyTransformer(width), seed=3, dead_channels=False)
    if dropout:
        model.last = nn.Sequential(nn.Dropout(dropout), model.last)
    qmodel = lowprec.prepare(model, "w2a8_n4", BATCH[:2])
    lowprec.calibrate(qmodel, [BATCH])
    return qmodel.train()


def trained(qmodel: nn.Module, dtype: torch.dtype) -> list[Tensor]:
    inputs = BATCH.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        result = qmodel(inputs)
    result.float().square().sum().backward()
    assert inputs.grad is not None
    return [result.detach(), inputs.grad, *(parameter.grad for parameter in qmodel.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [12, 96])
def test_a_network_is_equal(width: int, dtype: torch.dtype) -> None:
    plain = of_attention(width)
    coded = copy.deepcopy(plain)
    keep_codes_in_attention(coded, ["cpu"])
    assert [module.keeps_codes_on for module in coded.modules() if isinstance(module, KINDS)] == 5 * [CPU]
    expected, found = trained(plain, dtype), trained(coded, dtype)
    assert len(found) > 20
    for one, other in zip(expected, found, strict=True):
        assert one.abs().sum() > 0
        assert torch.equal(one, other)


def test_integer_kernels_keep_codes_on_a_cpu_alone_and_the_option_wherever_the_model_is() -> None:
    qmodel = of_attention()
    operators = [module for module in qmodel.modules() if isinstance(module, KINDS)]
    use_integer_kernels(qmodel)
    assert {module.keeps_codes_on for module in operators} == {CPU}
    with saved_as_codes(qmodel.to("meta")):
        assert {module.keeps_codes_on for module in operators} == {frozenset({"meta"})}
    use_integer_kernels(qmodel, False)
    assert {module.keeps_codes_on for module in operators} == {NOWHERE}


def test_behind_a_dropout_values_are_kept() -> None:
    qmodel = of_attention(dropout=0.5)
    keep_codes_in_attention(qmodel, ["cpu"])
    kept = {
        module.keeps_codes_on for name, module in qmodel.named_modules() if isinstance(module, KINDS) and "last" in name
    }
    assert kept == {NOWHERE}
    keep_codes_in_attention(qmodel, [])
    assert not any(module.keeps_codes_on for module in qmodel.modules() if isinstance(module, KINDS))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda values: values,
    "transposed": lambda values: values.mT.contiguous().mT,
    "heads inside": lambda values: values.transpose(1, 2).contiguous().transpose(1, 2),
    "a part": lambda values: torch.stack([values, values], -1)[..., 0],
}


def kept_by(make: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        result = make()
    return result, kept


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_in_every_layout(left: str, right: str, signed: bool, dtype: torch.dtype) -> None:
    sources = quantizer(-5, signed), quantizer(-4)
    module = QuantizedMatmul(quantizer(-3), sources)
    results = []
    for keeps_codes in (False, True):
        module.keeps_codes_on = CPU if keeps_codes else NOWHERE
        given = [
            on_grid(sources[0], 2, 3, 21, 16, dtype=dtype).requires_grad_(),
            on_grid(sources[1], 2, 3, 16, 19, dtype=dtype).requires_grad_(),
        ]
        result, kept = kept_by(
            lambda given=given: module.unquantized(LAYOUTS[left](given[0]), LAYOUTS[right](given[1]))
        )
        large = {tensor.dtype for tensor in kept if tensor.numel() > 1}
        assert large == ({torch.int8} if keeps_codes else {dtype})
        upstream = torch.randn(result.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        results.append([result, *torch.autograd.grad(result, given, upstream)])
    assert all(map(torch.equal, *results))


def test_operands_of_several_shapes_are_left_to_the_operator() -> None:
    sources = quantizer(-5), quantizer(-4)
    module = QuantizedMatmul(quantizer(-3), sources)
    module.keeps_codes_on = CPU
    for left, right in (((3, 4, 5), (5, 6)), ((4, 5), (5, 6)), ((1, 4, 5), (3, 5, 6))):
        given = on_grid(sources[0], *left).requires_grad_(), on_grid(sources[1], *right).requires_grad_()
        result, kept = kept_by(lambda given=given: module.unquantized(*given))
        assert {tensor.dtype for tensor in kept} == {torch.float32}
        assert torch.equal(result, given[0] @ given[1])


@pytest.mark.parametrize("function", [nn.Softmax(-1), nn.Softmax(1), nn.LayerNorm(24), nn.LayerNorm(24, bias=False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_float_operator_keeps_codes_alone(function: nn.Module, dtype: torch.dtype) -> None:
    source = quantizer(-4)
    module = QuantizedFloatOperator(function, source, quantizer(-6, isinstance(function, nn.LayerNorm)))
    results = []
    for keeps_codes in (False, True):
        module.keeps_codes_on = CPU if keeps_codes else NOWHERE
        values = on_grid(source, 4, 10, 24, dtype=dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            result, kept = kept_by(lambda values=values: module(values))
        if keeps_codes:
            large = {tensor.dtype for tensor in kept if tensor.numel() >= values.numel()}
            assert large == {torch.int8}
        upstream = torch.randn(result.shape, generator=torch.Generator().manual_seed(0)).to(result.dtype)
        wanted = [values, *function.parameters()]
        results.append([result, *torch.autograd.grad(result, wanted, upstream)])
    assert all(map(torch.equal, *results))


def test_weights_that_changed_before_the_backward_pass_are_an_error_as_ever() -> None:
    source = quantizer(-4)
    module = QuantizedFloatOperator(nn.LayerNorm(24), source, quantizer(-6))
    module.keeps_codes_on = CPU
    result = module(on_grid(source, 4, 24).requires_grad_())
    with torch.no_grad():
        module.function.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


def test_the_exponent_may_change_before_the_backward_pass() -> None:
    source = quantizer(-4)
    module = QuantizedFloatOperator(nn.Softmax(-1), source, quantizer(-8, signed=False))
    gradients = []
    for exponent in (-4, -2):
        source.set_exponent(-4)
        module.keeps_codes_on = CPU
        values = on_grid(source, 4, 24).requires_grad_()
        result = module(values)
        source.set_exponent(exponent)
        (result * torch.arange(24.0)).sum().backward()
        gradients.append(values.grad)
    assert torch.equal(*gradients)


def test_without_a_gradient_nothing_is_coded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise AssertionError("coded")

    monkeypatch.setattr("lowprec.layers.coded_operators.codes_of_multiples", fail)
    source = quantizer(-4)
    softmax, product = QuantizedFloatOperator(nn.Softmax(-1), source, source), QuantizedMatmul(source, (source, source))
    softmax.keeps_codes_on = product.keeps_codes_on = CPU
    values = on_grid(source, 2, 8, 8)
    assert torch.equal(softmax(values), source(torch.softmax(values, -1)))
    with torch.no_grad():
        assert torch.equal(product(values.requires_grad_(), values), source(values @ values))
    with pytest.raises(AssertionError, match="coded"):
        softmax(values)

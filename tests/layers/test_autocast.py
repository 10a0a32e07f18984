"""Under bf16 autocast, codes, scales and exponents are those of float32: only convolutions and products are in bf16.

Weights are given to these as bfloat16, which holds every one of them.
"""

from __future__ import annotations

import pytest
import torch
from networks import images, quantize, random_network

from lowprec.layers import quantized_layers, weights
from lowprec.recipe import WeightScheme


@pytest.mark.parametrize("recipe", ["w2a8_n4", "w4a8_n4", "w8a8"])
def test_weights_are_quantized_in_float32_under_autocast(recipe: str) -> None:
    qmodel, _ = quantize(random_network(3), recipe, images(3))
    qmodel.train()
    seen: dict[str, list[torch.Tensor]] = {name: [] for name, _ in quantized_layers(qmodel)}
    outputs = []
    for _, layer in quantized_layers(qmodel):
        # None: the float product follows.
        layer.product = lambda layer, values, weight, *rest: seen[layer.name].append(weight.detach().clone())
    state = {name: tensor.clone() for name, tensor in qmodel.state_dict().items()}
    for enabled in (False, True):
        qmodel.load_state_dict(state)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs.append(qmodel(images(4)))
    for name, (plain, autocast) in seen.items():
        assert (plain.dtype, autocast.dtype) == (torch.float32, torch.bfloat16), name
        assert torch.equal(plain, autocast.float()), name
    # Something was computed in bf16, or there would be nothing to see.
    assert not torch.equal(outputs[0], outputs[1].float())


@pytest.mark.parametrize("recipe", ["w2a8_n4", "w4a8_n4", "w8a8"])
def test_a_step_is_that_of_weights_that_autocast_rounds(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float products, with weights in float32 that each of them turns into bfloat16: the same logits and gradients."""
    qmodel, _ = quantize(random_network(3), recipe, images(3))
    state = {name: tensor.clone() for name, tensor in qmodel.train().state_dict().items()}
    steps = []
    for dtype in (torch.float32, None):
        with monkeypatch.context() as patch:
            if dtype is not None:
                patch.setattr(weights, "_dtype_of_products", lambda weight: weight.dtype)
            qmodel.load_state_dict(state)
            qmodel.zero_grad()
            torch.manual_seed(0)  # of dropout
            with torch.autocast("cpu", torch.bfloat16):
                logits = qmodel(images(4))
            logits.float().square().sum().backward()
            steps.append((logits, {name: parameter.grad for name, parameter in qmodel.named_parameters()}))
    (logits, gradients), (found_logits, found_gradients) = steps
    assert torch.equal(logits, found_logits)
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert found_gradients[name].dtype == torch.float32
        assert torch.equal(gradient, found_gradients[name]), name


def test_compiled_weights_are_those_of_operators() -> None:
    """One graph, in which autocast is known."""
    quantizer = weights.WeightQuantizer((4, 8, 3, 3), WeightScheme(bits=2, cluster_size=4))
    weight = torch.randn(4, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    quantizer.solve(weight, "layer")
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.compile(quantizer, backend="aot_eager", fullgraph=True)(weight)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.float(), quantizer(weight))

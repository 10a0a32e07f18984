"""Under bf16 autocast, codes, scales and exponents are those of float32: only convolutions and products are in bf16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from networks import images, quantize, random_network

from lowprec.layers import quantized_layers


@pytest.mark.parametrize("recipe", ["w2a8_n4", "w4a8_n4", "w8a8"])
def test_weights_are_quantized_in_float32_under_autocast(recipe: str, tmp_path: Path) -> None:
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
        assert plain.dtype == autocast.dtype == torch.float32, name
        assert torch.equal(plain, autocast), name
    # Something was computed in bf16, or there would be nothing to see.
    assert not torch.equal(outputs[0], outputs[1].float())

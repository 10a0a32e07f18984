"""The ablation of fine-tuning: its table on digits, and what its methods do."""

from __future__ import annotations

import copy
from pathlib import Path

import fine_tuning
import lightning.pytorch as lightning
import pytest
import torch
from fine_tuning_losses import feature_distillation
from fine_tuning_methods import (
    Setting,
    averaging,
    frozen_norms,
    layer_by_layer,
    learned_exponents,
    learned_scales,
    reestimated_norms,
    together,
    unrounded_scales,
)
from networks import awkward, images
from torch import Tensor
from torch.utils.data import DataLoader

import lowprec
from lowprec.config import OptimConfig
from lowprec.layers import ActivationQuantizer, quantized_layers
from lowprec.layers.weights import WeightQuantizer
from lowprec.models.cifar_resnet import CifarResNet
from lowprec.training.module import Classification

SMALL = [
    "data=digits",
    "model=cifar_resnet8_tiny",
    "model.arguments={width: 8, stem_stride: 1}",
    "baseline.max_epochs=2",
]


def test_the_table_compares_each_line_with_the_defaults(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = ["rate 0.01", "dampening 0.1", "freezing at 1% flips", "batch norm re-estimated"]
    options = ["--recipes", "w2a8_n4", "--seeds", "0", "--limit-train", "256", "--only", *lines]
    fine_tuning.main([*SMALL, "calibration.images=32", *options])
    rows = [row for row in capsys.readouterr().out.splitlines() if row.endswith("x")]
    assert [row[:40].strip() for row in rows] == ["defaults", *lines]
    # The defaults of the experiment have that rate: the same training gives the same weights.
    assert "+0.00" in rows[1]


def test_unknown_lines_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fine_tuning.main(["--only", "annealing"])
    assert "--only annealing: no such line; there are defaults; " in capsys.readouterr().err


@pytest.fixture
def setting() -> Setting:
    batches = [images(seed, 16) for seed in range(2)]
    original = lowprec.prepare(
        awkward(CifarResNet(8, num_classes=10, in_channels=3, width=8), seed=3, dead_channels=False),
        "w2a8_n4",
        batches[0],
    )
    qmodel = copy.deepcopy(original)
    lowprec.calibrate(qmodel, batches)
    return Setting(qmodel, original, batches)


def trained(setting: Setting, callbacks: list[lightning.Callback], epochs: int = 1) -> None:
    batches = [(batch, torch.arange(16) % 10) for batch in setting.images]
    trainer = lightning.Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    loader = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    trainer.fit(Classification(setting.qmodel, OptimConfig(learning_rate=0.05)).train(), loader, loader)


def test_learned_scales_have_lsq_gradients(setting: Setting) -> None:
    _, layer = next(item for item in quantized_layers(setting.qmodel) if item[1].scheme.bits == 2)
    with learned_scales(setting):
        quantizer, weight = layer.weight_quantizer, layer.weight
        quantizer.descend(weight)
        upstream = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        (quantizer(weight) * upstream).sum().backward()
        split = quantizer.layout.split
        scale = quantizer.scale.detach()
        w, g = split(weight.detach()), split(upstream)
        codes = torch.sign(w) * (w.abs() >= scale / 2)
        slope = torch.where(w.abs() <= scale, codes - w / scale, codes) / quantizer.layout.weights_per_cluster**0.5
        expected = (g * slope).sum(quantizer.layout.shared_axes, keepdim=True)
        torch.testing.assert_close(quantizer.scale.grad, expected)
        assert torch.equal(weight.grad, upstream)


def test_scales_that_are_not_rounded_are_those_of_the_solver(setting: Setting) -> None:
    _, layer = next(item for item in quantized_layers(setting.qmodel) if item[1].scheme.bits == 2)
    with unrounded_scales(setting):
        quantizer = layer.weight_quantizer
        w_OGNP = quantizer.layout.split(quantizer(layer.weight).detach())
        assert torch.equal(w_OGNP, torch.sign(w_OGNP) * quantizer.scale * (w_OGNP != 0))


def test_features_are_those_of_the_full_precision_model(setting: Setting) -> None:
    with feature_distillation(1.0)(setting) as callbacks:
        penalty = callbacks[0]
        module = Classification(setting.qmodel, OptimConfig())
        setting.qmodel.train()(setting.images[0])
        term = penalty.term(module, setting.images[0])  # type: ignore[attr-defined]
        assert float(term) > 0
        term.backward()
        assert all(float(layer.weight.grad.abs().sum()) > 0 for _, layer in list(quantized_layers(setting.qmodel))[:2])


def test_an_average_of_no_decay_is_what_was_trained(setting: Setting) -> None:
    plain, averaged = copy.deepcopy(setting), copy.deepcopy(setting)
    trained(plain, [])
    with averaging(0.0)(averaged) as callbacks:
        trained(averaged, callbacks)
    pairs = zip(plain.qmodel.state_dict().items(), averaged.qmodel.state_dict().items(), strict=True)
    assert all(torch.allclose(mine.nan_to_num(), other.nan_to_num()) for (_, mine), (_, other) in pairs)


def norm_statistics(setting: Setting) -> list[Tensor]:
    return [value.clone() for name, value in setting.qmodel.state_dict().items() if name.endswith("running_mean")]


def test_frozen_norms_keep_their_statistics(setting: Setting) -> None:
    before = norm_statistics(setting)
    with frozen_norms(0.0)(setting) as callbacks:
        trained(setting, callbacks)
    assert all(map(torch.equal, before, norm_statistics(setting)))


def test_reestimated_norms_are_the_means_of_batches(setting: Setting) -> None:
    with reestimated_norms(setting) as callbacks:
        trained(setting, callbacks)
    name, layer = next(quantized_layers(setting.qmodel))
    seen: list[Tensor] = []
    layer.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad(), pytest.MonkeyPatch.context() as patched:
        patched.setattr(WeightQuantizer, "descend", lambda quantizer, weight: None)
        twin = copy.deepcopy(setting.qmodel).train()
        for batch in setting.images:
            twin(batch)
    means = torch.stack([batch.mean((0, 2, 3)) for batch in seen]).mean(0)
    torch.testing.assert_close(setting.qmodel.get_submodule(name).norm.running_mean, means)


def test_all_layers_are_quantized_in_the_end(setting: Setting) -> None:
    with layer_by_layer(0.5)(setting) as callbacks:
        trained(setting, callbacks, epochs=2)
    assert all(layer.quantizing for _, layer in quantized_layers(setting.qmodel))


def test_exponents_are_learned_together_with_frozen_norms(setting: Setting) -> None:
    quantizers = [module for module in setting.qmodel.modules() if isinstance(module, ActivationQuantizer)]
    before = [int(quantizer.exponent) for quantizer in quantizers]
    with together(learned_exponents(2.0), frozen_norms(0.0))(setting) as callbacks:
        assert len(callbacks) == 2
        trained(setting, callbacks)
    assert [int(quantizer.exponent) for quantizer in quantizers] != before

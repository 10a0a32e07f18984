"""Each layer quantized alone: against the whole network run with that one layer quantized, and what it ranks."""

from __future__ import annotations

import copy
import csv
import io
import json
import math

import pytest
import torch
from networks import TinyTransformer, awkward, images, random_network
from torch import Tensor, nn

import lowprec
from lowprec.calibrate import calibrate
from lowprec.calibration.statistics import statistics_of
from lowprec.candidates import CANDIDATES, scheme_choices
from lowprec.layers import QuantizedLayer
from lowprec.models.cifar_resnet import CifarResNet
from lowprec.prepare import full_precision, prepare
from lowprec.recipe import Recipe, RecipeError, Rule, WeightScheme
from lowprec.sensitivity import Suffixes, quantized_alone, sensitivity

SHAPE = (1, 12, 12)
BATCHES = [images(seed, 6, SHAPE) for seed in (1, 2)]


def small_resnet() -> nn.Module:
    return awkward(CifarResNet(8, num_classes=10, in_channels=1, width=6), seed=3, dead_channels=False)


@torch.no_grad()
@pytest.mark.parametrize("residual", ["requantized", "accumulator"])
@pytest.mark.parametrize("seed", range(3))
def test_a_suffix_gives_what_the_whole_network_gives(seed: int, residual: str) -> None:
    recipe = Recipe()
    recipe.activations.residual = residual
    batch = images(seed)
    compare_suffixes(random_network(seed), recipe, batch)


@torch.no_grad()
def test_a_suffix_of_attention_gives_what_the_whole_network_gives() -> None:
    torch.manual_seed(0)
    compare_suffixes(TinyTransformer().eval(), Recipe(), torch.randn(2, 3, 8, 8))


def compare_suffixes(model: nn.Module, recipe: Recipe, batch: Tensor) -> None:
    """Of every layer and scheme, bit for bit; and afterwards the model is as it was."""
    qmodel = prepare(model, recipe, batch[:2]).eval()
    calibrate(qmodel, [batch], batch_norm_correction=False)
    before = copy.deepcopy(qmodel.state_dict())
    choices, suffixes, compared = scheme_choices(qmodel), Suffixes(qmodel), 0
    with full_precision(qmodel):
        values = {suffixes.nodes[0]: batch}
        for node in suffixes.nodes:
            layer = qmodel.get_submodule(str(node.target)) if node.op == "call_module" else None
            if isinstance(layer, QuantizedLayer) and str(node.target) in choices.options:
                inputs = [values[node.args[0]]]
                reference = statistics_of(layer, map(layer.before_norm, inputs))
                for option in choices.options[str(node.target)]:
                    with quantized_alone(layer, option, reference, inputs):
                        assert torch.equal(suffixes.output(node, values), qmodel(batch))
                        compared += 1
            suffixes.step(node, values)
        assert torch.equal(values[suffixes.nodes[-1]], qmodel(batch))
    assert compared == len(CANDIDATES) * len(choices.options)
    after = qmodel.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.fixture(scope="module")
def found() -> lowprec.Sensitivity:
    labels = torch.arange(6) % 10
    return sensitivity(small_resnet(), "w2a8_n4", BATCHES, [(BATCHES[0], labels)])


def test_the_figures_are_those_of_an_independent_computation(found: lowprec.Sensitivity) -> None:
    """A layer of 8 bits, computed by hand: the corrected batch norm folded, one exponent for each output channel."""
    model = small_resnet()
    with torch.no_grad():
        conv, norm = model.stage2[0].conv2, model.stage2[0].bn2
        expected = torch.cat([model(batch) for batch in BATCHES]).double()
        inputs: list[Tensor] = []
        hook = conv.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
        for batch in BATCHES:
            model(batch)
        hook.remove()
        twin = small_resnet()
        qmodel = prepare(twin, Recipe(rules=[Rule("*", bits=8)]), BATCHES[0])
        layer = qmodel.get_submodule("stage2.0.conv2")
        outputs = [nn.functional.conv2d(values, layer.weight_quantizer(conv.weight), padding=1) for values in inputs]
        found_q, reference = (
            torch.cat(part).double().transpose(0, 1).flatten(1) for part in (outputs, list(map(conv, inputs)))
        )
        variance = norm.running_var * (found_q.var(1, unbiased=False) / reference.var(1, unbiased=False)).float()
        gain = norm.weight.double() / (variance.double() + norm.eps).sqrt()
        folded = layer.weight_quantizer.fold(conv.weight, gain, None)
        weight = folded.effective * torch.exp2(folded.exponent.double()).view(-1, 1, 1, 1)
        # Means behind the batch norm are those of full precision, with the weights as they are rounded.
        wanted = (reference.mean(1) - norm.running_mean) * norm.weight / (
            norm.running_var + norm.eps
        ).sqrt() + norm.bias
        given = torch.cat([nn.functional.conv2d(values.double(), weight, padding=1) for values in inputs])
        bias = wanted - given.mean((0, 2, 3))
        other = twin.stage2[0]
        other.conv2 = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
        other.conv2.weight, other.conv2.bias = nn.Parameter(weight.float()), nn.Parameter(bias.float())
        other.bn2 = nn.Identity()
        noise = torch.cat([twin(batch) for batch in BATCHES]).double() - expected
    row = next(row for row in found.rows if (row.option.layer, row.option.label) == ("stage2.0.conv2", "8-bit"))
    assert row.error.mean_squared_error == pytest.approx(float(noise.square().mean()), rel=0.05)
    ratio = 10 * math.log10(float(expected.square().sum() / noise.square().sum()))
    assert row.error.signal_to_noise == pytest.approx(ratio, abs=0.2)
    assert found.signal_power == pytest.approx(float(expected.square().mean()), rel=1e-9)


def test_more_bits_hurt_less_and_the_ranking_is_sorted(found: lowprec.Sensitivity) -> None:
    ranking = [row.error.mean_squared_error for row in found.ranking()]
    assert ranking == sorted(ranking, reverse=True)
    noise = {(row.option.layer, row.option.label): row.error.mean_squared_error for row in found.rows}
    layers = list(found.choices.options)
    assert len(found.rows) == len(noise) == len(CANDIDATES) * len(layers)
    for layer in layers:
        assert noise[layer, "8-bit"] < noise[layer, "4-bit"] < noise[layer, "2-bit"]
        assert noise[layer, "2-bit planes=2"] < noise[layer, "2-bit"]
    assert all(row.error.kl_divergence > 0 for row in found.rows)
    assert found.activations.signal_to_noise > 15


def test_a_damaged_layer_ranks_worst() -> None:
    """The same function, but with weights of very different sizes in one cluster: ternary codes lose the small ones."""
    model, name = small_resnet(), "stage2.0.conv2"
    block, factors = model.stage2[0], 4.0 ** torch.arange(-6, 6)
    with torch.no_grad():
        expected = model(BATCHES[0])
        block.bn1.weight.mul_(factors)
        block.bn1.bias.mul_(factors)
        block.conv2.weight.div_(factors.view(1, -1, 1, 1))
        assert torch.equal(model(BATCHES[0]), expected)
    recipe = Recipe(rules=[Rule(name, cluster_size=64)])
    damaged = sensitivity(model, recipe, BATCHES, candidates=[{"bits": 2}]).ranking()[0]
    assert (damaged.option.layer, damaged.option.scheme) == (name, WeightScheme(cluster_size=64))
    whole = sensitivity(small_resnet(), recipe, BATCHES, candidates=[{"bits": 2}])
    before = next(row for row in whole.rows if row.option.layer == name)
    assert damaged.error.mean_squared_error > 4 * before.error.mean_squared_error


def test_top1_is_measured_on_the_labelled_images(found: lowprec.Sensitivity) -> None:
    model = small_resnet()
    with torch.no_grad():
        classes = model(BATCHES[0]).argmax(1)
    right = sensitivity(model, "w2a8_n4", BATCHES[1:], [(BATCHES[0], classes)])
    assert (right.top1, right.images, right.labelled_images) == (1.0, 6, 6)
    assert all(row.error.top1_difference is not None and row.error.top1_difference <= 0 for row in right.rows)
    assert "top-1 points" in str(right)
    without = sensitivity(model, "w2a8_n4", BATCHES[1:])
    assert (without.top1, without.rows[0].error.top1_difference) == (None, None)
    assert "top-1" not in str(without)
    # Labelled images change no other figure.
    for left, other in zip(right.rows, without.rows, strict=True):
        assert left.error.mean_squared_error == other.error.mean_squared_error


def test_the_table_and_the_files(found: lowprec.Sensitivity) -> None:
    lines = str(found).splitlines()
    layers = [line.split()[0] for line in lines[2 : 2 + len(found.choices.options)]]
    assert layers == list(dict.fromkeys(row.option.layer for row in found.ranking()))
    assert next(line for line in lines if line.startswith("conv1")).split()[1] == "*"
    assert any(line.startswith("activations alone: ") for line in lines)
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    rows = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert len(rows) == len(content["rows"]) == len(found.rows)
    assert content["fixed"] == ["conv1"]
    for row, record, written in zip(found.rows, content["rows"], rows, strict=True):
        assert record["mean_squared_error"] == row.error.mean_squared_error == float(written["mean_squared_error"])
        assert (record["layer"], record["bits"]) == (row.option.layer, row.option.scheme.bits)
        assert record["weight_bits"] == row.option.cost.weight_bits


def test_a_layer_without_any_error() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 2, 1, bias=False), nn.Flatten(), nn.Linear(288, 3)
    )
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(2)[..., None, None])
    found = sensitivity(model.eval(), Recipe(), BATCHES)
    row = next(row for row in found.rows if (row.option.layer, row.option.label) == ("1", "2-bit"))
    assert (row.error.mean_squared_error, row.error.signal_to_noise) == (0.0, math.inf)
    assert row.record()["signal_to_noise"] is None


def test_the_model_is_not_changed() -> None:
    model = small_resnet()
    before = copy.deepcopy(model.state_dict())
    sensitivity(model, "w2a8_n4", BATCHES[:1], candidates=[{"bits": 4}])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_what_is_refused() -> None:
    model = small_resnet()
    with pytest.raises(ValueError, match="sensitivity got no images"):
        sensitivity(model, "w2a8_n4", [])
    with pytest.raises(TypeError, match=r"give \[images\]"):
        sensitivity(model, "w2a8_n4", BATCHES[0])
    with pytest.raises(TypeError, match=r"labelled: batch 0 .* pairs"):
        sensitivity(model, "w2a8_n4", BATCHES, BATCHES)
    with pytest.raises(ValueError, match="batch 0 has 6 images and labels of"):
        sensitivity(model, "w2a8_n4", BATCHES, [(BATCHES[0], torch.zeros(5))])
    with pytest.raises(RecipeError, match=r"candidates\[1\]\.bits=3"):
        sensitivity(model, "w2a8_n4", BATCHES, candidates=[{"bits": 4}, {"bits": 3}])
    with pytest.raises(RecipeError, match=r"unknown key candidates\[0\]\.bit: the keys are bits, "):
        sensitivity(model, "w2a8_n4", BATCHES, candidates=[{"bit": 4}])
    with pytest.raises(RecipeError, match="at least one scheme"):
        sensitivity(model, "w2a8_n4", BATCHES, candidates=[])

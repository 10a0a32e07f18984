"""The accuracy benchmark: every installed candidate trains for an epoch of a few steps; paired differences; LSQ's formulas."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import accuracy
import pytest
import torch
from accuracy_lsq import LearnedStep, LearnedStepQuantization
from accuracy_peer import Candidate, Quantized, Start, bits_per_weight, rounded, weighted_layers
from torch import Tensor, nn

from lowprec.models import create_model
from lowprec.training.checkpoints import TrainingDiverged

# Two steps of fine-tuning, from a checkpoint that is not worth more.
QUICK = [
    *("experiment=digits_smoke", "baseline.max_epochs=2", "trainer.max_epochs=1"),
    *("calibration.images=64", "data.limit_test=100", "--limit-train", "140"),
]
PACKAGES = {"Brevitas": "brevitas", "NNCF": "nncf", "torchao": "torchao"}


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> accuracy.Seed:
    """Digits, and a baseline of one epoch."""
    runs = tmp_path_factory.mktemp("runs")
    return accuracy.Seed([*QUICK[:5], f"runs_dir={runs}"], seed=0, limit_train=140)


@pytest.mark.slow
@pytest.mark.parametrize("candidate", [accuracy.CONTROL, *accuracy.CANDIDATES], ids=lambda candidate: candidate.name)
def test_every_candidate_trains(candidate: Candidate, seed: accuracy.Seed) -> None:
    package = PACKAGES.get(candidate.name.partition(",")[0])
    if package is not None:
        pytest.importorskip(package, reason=f'{package} is not installed: pip install "lowprec[peers]"')
    before = {name: tensor.clone() for name, tensor in seed.start.model.state_dict().items()}
    line = accuracy.study(candidate, [seed], [0.01], distillation=0.5)
    assert len(line.top1) == 1
    assert line.weight_bits <= 32
    # The checkpoint is the next candidate's, too.
    assert all(torch.equal(tensor, before[name]) for name, tensor in seed.start.model.state_dict().items())


def test_a_training_is_repeated_exactly(seed: accuracy.Seed) -> None:
    first, second = (seed.fine_tune(accuracy.CONTROL, 0.01, 0.5).model.state_dict() for _ in range(2))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_quantizer_that_is_missing_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    arguments = [*QUICK, f"runs_dir={tmp_path}", "--only", "NNCF*", "--seeds", "0", "--rates", "0.01"]
    accuracy.main([*arguments, "--distillation", "0"])
    found = capsys.readouterr().out
    assert 'NNCF, 8-bit                failed: pip install "lowprec[peers]"' in found
    assert "full precision, fine-tuned  32.00" in found


class FakeSeed:
    """Trains nothing: validation and test top-1 are those of a table by rate; a rate that is not there diverges."""

    def __init__(self, validation: dict[float, float], test: float) -> None:
        self.validation, self.test = validation, test
        self.trained: list[float] = []

    def fine_tune(self, candidate: Candidate, rate: float, distillation: float) -> accuracy.Trained:
        self.trained.append(rate)
        if rate not in self.validation:
            raise TrainingDiverged("the loss is NaN")
        return accuracy.Trained(nn.Identity(), 2.0, self.validation[rate], 1.0)

    def judge(self, candidate: Candidate, trained: accuracy.Trained) -> float:
        return self.test


def test_the_rate_is_chosen_in_validation_with_the_first_seed_alone() -> None:
    seeds = [FakeSeed({0.01: 0.7, 0.03: 0.9, 0.1: 0.8}, 0.5), FakeSeed({0.03: 0.1}, 0.6)]
    line = accuracy.study(accuracy.CONTROL, seeds, [0.01, 0.03, 0.1, 1.0], 0.5)  # type: ignore[arg-type]
    assert (line.rate, line.at_end, line.top1) == (0.03, False, [0.5, 0.6])
    # The first seed's best is not trained a second time.
    assert [one.trained for one in seeds] == [[0.01, 0.03, 0.1, 1.0], [0.03]]


def test_a_rate_at_the_end_of_the_list_is_told_and_one_that_diverges_is_passed_over() -> None:
    line = accuracy.study(accuracy.CONTROL, [FakeSeed({0.01: 0.7}, 0.5)], [0.01, 0.03], 0.5)  # type: ignore[list-item]
    assert line.at_end
    text = accuracy.table({accuracy.CONTROL.name: line}, {})
    assert "0.01*" in text
    assert "a better one may lie beyond" in text
    with pytest.raises(TrainingDiverged):
        accuracy.study(accuracy.CONTROL, [FakeSeed({}, 0.5)], [0.01], 0.5)  # type: ignore[list-item]


def test_differences_are_paired_by_seed() -> None:
    control = accuracy.Line(32.0, 0.01, False, [0.90, 0.80, 0.85], [1.0, 2.0, 4.0])
    mine = accuracy.Line(2.5, 0.03, False, [0.89, 0.79, 0.83], [2.0, 6.0, 12.0])
    text = accuracy.table({accuracy.CONTROL.name: control, "mine": mine}, {"other": "ValueError: no"})
    rows = text.splitlines()
    # Differences -1, -1 and -2 points: mean -4/3, deviation sqrt(1/3); the accuracies themselves spread by 5 points.
    assert rows[2].split() == ["mine", "2.50", "0.03", "83.67", "±", "5.03", "-1.33", "±", "0.58", "3.00x"]
    assert rows[1].split()[-2:] == ["—", "1.00x"]
    assert rows[3].split() == ["other", "failed:", "ValueError:", "no"]


def test_a_single_seed_has_no_spread() -> None:
    assert accuracy.spread([1.0], ".2f") == "1.00 ± ?"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "tensorrt*"], "--only tensorrt*: no such candidate; there are lowprec w2a8_n4;"),
        (["quant=w8a8"], "quant=w8a8: quant is not the run's here"),
        (["optim.learning_rate=1"], "optim.learning_rate is not the run's here"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        accuracy.main(arguments)
    assert message in capsys.readouterr().err


# Codes -2 … 1 and a step of 0.5: ratios -3, -2, -1.2, 0.3, 0.75, 1 and 5.
VALUES = [-1.5, -1.0, -0.6, 0.15, 0.375, 0.5, 2.5]


def test_learned_steps_round_and_learn_as_their_paper_says() -> None:
    values = torch.tensor(VALUES, dtype=torch.float64, requires_grad=True)
    step = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    incoming = torch.tensor([1.0, 2.0, 3.0, 5.0, 7.0, 11.0, 13.0], dtype=torch.float64)
    rounded_values = LearnedStepQuantization.apply(values, step, -2, 1, 0.25)
    assert rounded_values.tolist() == [-1.0, -1.0, -0.5, 0.0, 0.5, 0.5, 0.5]
    rounded_values.backward(incoming)
    # Equation 5: only what lies strictly between the least and the largest code passes its gradient on.
    assert values.grad.tolist() == [0.0, 0.0, 3.0, 5.0, 7.0, 0.0, 0.0]
    # Equation 3, by hand: -Qn, -Qn, round(r) - r three times, Qp, Qp.
    of_step = [-2.0, -2.0, -1 + 1.2, 0 - 0.3, 1 - 0.75, 1.0, 1.0]
    expected = 0.25 * sum(one * factor for one, factor in zip(incoming.tolist(), of_step, strict=True))
    assert step.grad.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("quantizer", "elements", "largest", "low"),
    [
        (lambda: LearnedStep(2), 24, 1, -2),
        (lambda: LearnedStep(8, signed=False, activation=True), 12, 255, 0),
        (lambda: LearnedStep(8, activation=True), 12, 127, -128),
    ],
)
def test_learned_steps_start_and_scale_their_gradient(
    quantizer: Callable[[], LearnedStep], elements: int, largest: int, low: int
) -> None:
    learned, values = quantizer(), torch.arange(24.0).view(2, 3, 4) - 5
    assert (learned.low, learned.high) == (low, largest)
    learned(values).sum().backward()
    step = learned.step.detach()
    assert step.item() == pytest.approx(2 * values.abs().mean().item() / math.sqrt(largest))
    ratio = values / step
    inside = (ratio > low) & (ratio < largest)
    of_step = torch.where(inside, ratio.round() - ratio, ratio.clamp(low, largest)).sum()
    assert learned.step.grad.item() == pytest.approx(of_step.item() / math.sqrt(elements * largest), rel=1e-5)


def test_others_layers_are_rounded_where_ours_are() -> None:
    model = create_model("cifar_resnet8", in_channels=1, width=8).eval()
    signs: list[bool] = []

    def activation(signed: bool) -> nn.Module:
        signs.append(signed)
        return nn.Identity()

    ends: list[bool] = []

    def layer(operator: nn.Module, is_end: bool) -> nn.Module:
        ends.append(is_end)
        return operator

    images = torch.randn(2, 1, 8, 8)
    copied = rounded(model, layer, activation)
    assert torch.equal(copied.eval()(images), model(images))
    assert ends == [True, *[False] * (len(weighted_layers(model)) - 2), True]
    # Images; the stem, three blocks' inner and outer ReLUs, and the pool; three second convolutions and two projections.
    assert (signs.count(False), signs.count(True)) == (1 + 3 + 3 + 1, 1 + 3 + 2)


def test_bits_count_scales() -> None:
    assert bits_per_weight([(2, 30, 1), (8, 10, 2)]) == (60 + 32 + 80 + 64) / 40


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Sequential has no nn\.Conv2d or nn\.Linear"):
        rounded(nn.Sequential(nn.ReLU()), lambda operator, _: operator, lambda _: nn.Identity())


def test_failures_are_shown(seed: accuracy.Seed) -> None:
    def quantize(start: Start) -> Quantized:
        raise RuntimeError("no\nkernel")

    def shipped(model: nn.Module) -> Callable[[Tensor], Tensor]:
        return model

    lines, failed = accuracy.compare([Candidate("broken", quantize, shipped)], [seed], [0.01], 0.0)
    assert list(lines) == [accuracy.CONTROL.name]
    assert failed == {"broken": "RuntimeError: no kernel"}

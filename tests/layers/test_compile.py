"""torch.compile takes the prepared model as one graph, and gives the codes that it has without."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import images
from torch import nn

import lowprec

BATCH = images(1, 8, (1, 12, 12))
LABELS = torch.arange(8) % 10


def prepared(recipe: str) -> nn.Module:
    torch.manual_seed(0)
    qmodel = lowprec.prepare(Network(), recipe, BATCH[:2])
    lowprec.calibrate(qmodel, [BATCH])
    return qmodel


class Network(nn.Module):
    """A layer of each kind: full and depthwise convolution, residual add, pooling, linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8))
        self.classifier = nn.Linear(8, 10)

    def forward(self, x_bchw: torch.Tensor) -> torch.Tensor:
        x_bchw = self.first(x_bchw)
        x_bchw = nn.functional.relu(self.depthwise(x_bchw) + x_bchw)
        logits: torch.Tensor = self.classifier(x_bchw.mean((2, 3)))
        return logits


def steps(qmodel: nn.Module, forward: nn.Module) -> list[torch.Tensor]:
    """Logits of two training steps and of an evaluation, then all parameters and buffers."""
    logits = []
    qmodel.train()
    for _ in range(2):
        logits.append(forward(BATCH))
        nn.functional.cross_entropy(logits[-1], LABELS).backward()
        with torch.no_grad():
            for parameter in qmodel.parameters():
                parameter -= 0.05 * parameter.grad
                parameter.grad = None
    qmodel.eval()
    with torch.no_grad():
        logits.append(forward(BATCH))
    return [*logits, *qmodel.parameters(), *qmodel.buffers()]


@pytest.mark.parametrize("recipe", ["w2a8_n4", "w4a8_n4"])
def test_the_whole_model_is_one_graph_with_the_same_values(recipe: str) -> None:
    qmodel = prepared(recipe)
    twin = copy.deepcopy(qmodel)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for plain, traced in zip(steps(qmodel, qmodel), steps(twin, compiled), strict=True):
        assert torch.equal(plain, traced)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["w2a8_n4"])
def test_compiled_kernels_give_the_same_codes(recipe: str) -> None:
    """Sums are taken in another order, so weights may differ in their last place; what is rounded must not."""
    qmodel = prepared(recipe)
    twin = copy.deepcopy(qmodel)
    compiled = torch.compile(twin, fullgraph=True)
    qmodel.train()
    twin.train()
    torch.testing.assert_close(compiled(BATCH), qmodel(BATCH), rtol=1e-5, atol=1e-5)
    qmodel.eval()
    twin.load_state_dict(qmodel.state_dict())
    twin.eval()
    with torch.no_grad():
        assert torch.equal(compiled(BATCH), qmodel(BATCH))

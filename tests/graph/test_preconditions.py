"""What prepare asks of models and example images: one clear error for each that it cannot take."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lowprec
from lowprec.graph.planning import UnsupportedModelError
from lowprec.graph.tracing import TracingError

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()


def script(model: nn.Module) -> nn.Module:
    return torch.jit.trace(model, IMAGES)


MODELS: dict[str, tuple[Callable[[nn.Sequential], object], type[Exception], str]] = {
    "float64": (lambda m: m.double(), UnsupportedModelError, r"0\.weight is float64, .*call model\.float\(\)"),
    "half": (lambda m: m.half(), UnsupportedModelError, r"is float16, not float32"),
    "bfloat16": (lambda m: m.bfloat16(), UnsupportedModelError, r"is bfloat16, not float32"),
    "compiled": (torch.compile, UnsupportedModelError, r"the model is compiled .* model\._orig_mod"),
    "a compiled part": (
        lambda m: nn.Sequential(torch.compile(m)),
        UnsupportedModelError,
        "its module 0 is compiled",
    ),
    "data parallel": (nn.DataParallel, UnsupportedModelError, r"wrapped in DataParallel: .* model\.module"),
    "TorchScript": (script, UnsupportedModelError, "is TorchScript"),
    "lazy": (lambda m: nn.Sequential(nn.LazyConv2d(4, 1)), UnsupportedModelError, r"0\.weight has no shape yet"),
    "a state": (lambda m: m.state_dict(), TypeError, r"expects a full-precision torch\.nn\.Module, not OrderedDict"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", MODELS)
def test_models_that_are_refused(name: str) -> None:
    change, kind, message = MODELS[name]
    with pytest.raises(kind, match=message):
        lowprec.prepare(change(network()), "w8a8", IMAGES)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("images", "kind", "message"),
    [
        (IMAGES[0], ValueError, r"\[B, C, H, W\] with B at least 1, not \[3, 8, 8\]"),
        (IMAGES[:0], ValueError, r"not \[0, 3, 8, 8\]"),
        (IMAGES.double(), TypeError, r"must be float32, not float64: call \.float\(\)"),
        (IMAGES.half(), TypeError, r"must be float32, not float16"),
        (IMAGES.to(torch.uint8), TypeError, r"not uint8: give normalised images, not pixels"),
        (IMAGES * float("nan"), ValueError, "infinite or NaN"),
        (IMAGES.to("meta"), ValueError, "are on meta, the model on cpu"),
        (IMAGES[:, :1], TracingError, r"itself fails in eval mode on .*\[2, 1, 8, 8\]"),
    ],
)
def test_example_inputs_that_are_refused(images: Tensor, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        lowprec.prepare(network(), "w8a8", images)


def test_outputs_that_are_not_finite_are_told() -> None:
    model = network()
    with torch.no_grad():
        model[4].weight.fill_(3e38)
    with pytest.raises(TracingError, match="Sequential itself gives infinite or NaN outputs in eval mode"):
        lowprec.prepare(model, "w8a8", IMAGES)


class OneSize(nn.Module):
    """Asserts the size of its images, as timm's patches do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        torch._assert(images.shape[2] == 10, f"Input height ({images.shape[2]}) doesn't match model (10)")
        return self.conv(images).mean((2, 3))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_model_of_another_image_size_is_refused_also_from_shapes_alone(device: str) -> None:
    with pytest.raises(
        TracingError, match=r"OneSize itself fails .*\[2, 3, 8, 8\]: Input height \(8\) .* model \(10\)"
    ):
        lowprec.prepare(OneSize().eval().to(device), "w8a8", IMAGES.to(device))

"""Recognising operators: each form of each, and a name for everything that has no integer form."""

import operator
import warnings
from collections.abc import Callable

import pytest
import torch
from timm.layers.pool2d_same import MaxPool2dSame
from torch import Tensor, nn
from torch.nn import functional

from lowprec.graph.planning import UnsupportedModelError, plan
from lowprec.graph.tracing import trace

Body = Callable[[nn.Module, Tensor], Tensor]


class Net(nn.Module):
    """A body between two convolutions and a classifier."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.other = nn.Conv2d(4, 4, 1)
        self.relu = nn.ReLU()
        self.offset = nn.Parameter(torch.zeros(1))
        self.body = body

    def forward(self, images: Tensor) -> Tensor:
        return self.body(self, images)


def kinds(body: Body) -> list[str]:
    return [operation.kind + operation.activation for operation in plan(trace(Net(body)))]


def faults(body: Body) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        plan(trace(Net(body)))
    return str(caught.value)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (lambda m, x: m.relu(m.norm(m.conv(x))), ["input", "convolutionrelu"]),
        (lambda m, x: functional.relu(m.norm(m.conv(x))), ["input", "convolutionrelu"]),
        (lambda m, x: functional.relu(input=m.conv(input=x)), ["input", "convolutionrelu"]),
        (lambda m, x: torch.relu(m.conv(x)), ["input", "convolutionrelu"]),
        (lambda m, x: m.conv(x).relu(), ["input", "convolutionrelu"]),
        (lambda m, x: functional.relu6(m.conv(x)), ["input", "convolutionrelu6"]),
        (lambda m, x: functional.hardtanh(m.conv(x), 0.0, 6.0), ["input", "convolutionrelu6"]),
        (lambda m, x: m.relu(x), ["input", "relurelu"]),
        (lambda m, x: functional.relu(input=x), ["input", "relurelu"]),
    ],
)
def test_activations(body: Body, expected: list[str]) -> None:
    assert kinds(body) == expected


@pytest.mark.parametrize(
    "add",
    [
        lambda a, b: a + b,
        lambda a, b: torch.add(a, b),
        lambda a, b: a.add(b),
        lambda a, b: a.add_(b),
        operator.iadd,
    ],
)
def test_adds(add: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert kinds(lambda m, x: torch.relu(add(m.conv(x), m.other(m.relu(x))))) == [
        "input",
        "convolution",
        "relurelu",
        "convolution",
        "addrelu",
    ]


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        (lambda x: torch.flatten(x, 1), "flatten"),
        (lambda x: torch.flatten(input=x, start_dim=1), "flatten"),
        (lambda x: x.flatten(1), "flatten"),
        (lambda x: x.view(x.size(0), -1), "flatten"),
        (lambda x: x.view((x.shape[0], -1)), "flatten"),
        (lambda x: x.reshape(x.size()[0], -1), "flatten"),
        (lambda x: x.mean([2, 3]), "average_pool"),
        (lambda x: x.mean(dim=(-1, -2), keepdim=True), "average_pool"),
        (lambda x: torch.mean(x, (2, 3)), "average_pool"),
        (lambda x: functional.adaptive_avg_pool2d(x, 1), "average_pool"),
        (lambda x: functional.adaptive_avg_pool2d(x, output_size=(1, 1)), "average_pool"),
        (lambda x: functional.avg_pool2d(x, 2), "average_pool"),
        (lambda x: functional.avg_pool2d(input=x, kernel_size=2, stride=1), "average_pool"),
        (lambda x: functional.max_pool2d(x, 2), "max_pool"),
        (lambda x: functional.max_pool2d(x, kernel_size=3, stride=2, padding=1), "max_pool"),
        (lambda x: functional.dropout(x, 0.5, False), "nothing"),
        (lambda x: functional.dropout(x, p=0.0), "nothing"),
        (lambda x: torch.cat([x, x], 1), "concatenation"),
        (lambda x: torch.cat((x, x, x), dim=2), "concatenation"),
        (lambda x: torch.cat([x], 1), "nothing"),
        (lambda x: x * x, "multiply"),
        (lambda x: torch.mul(x, x), "multiply"),
        (lambda x: x.mul_(x), "multiply"),
        (lambda x: x.softmax(1), "float"),
        (lambda x: x.mean(1), "average_pool"),
        (lambda x: functional.interpolate(x, scale_factor=2, mode="bilinear"), "upsample"),
        (torch.sigmoid, "lookup"),
        (lambda x: x.sigmoid_(), "lookup"),
        (functional.silu, "lookup"),
        (lambda x: functional.gelu(x, approximate="tanh"), "lookup"),
        (lambda x: functional.hardswish(x, inplace=True), "lookup"),
        (lambda x: functional.leaky_relu(x, 0.1), "lookup"),
        (lambda x: functional.hardtanh(x, -1.0, 6.0), "lookup"),
        (lambda x: x + 1, "lookup"),
        (lambda x: 2.0 * x, "lookup"),
        (lambda x: x.clamp(-1, 1), "lookup"),
        (lambda x: x.view(-1, 64), "movement"),
        (lambda x: x.transpose(1, 2), "movement"),
        (lambda x: x.permute(0, 2, 3, 1), "movement"),
        (lambda x: x[:, 1:, ::2], "movement"),
        (lambda x: functional.pad(x, (1, 1)), "movement"),
        (lambda x: functional.interpolate(x, scale_factor=2), "movement"),
    ],
)
def test_functions(operation: Callable[[Tensor], Tensor], kind: str) -> None:
    assert kinds(lambda m, x: operation(functional.relu(m.conv(x)))) == ["input", "convolutionrelu", kind]


@pytest.mark.parametrize(
    ("operation", "word"),
    [
        (lambda x: torch.add(x, x, alpha=2), "add()"),
        (lambda x: torch.cat([x, x], x.size(1)), "cat()"),
        (lambda x: x.pow(x), "pow()"),
        (lambda x: functional.pad(x, (1, 1), mode="reflect"), "pad()"),
        (lambda x: functional.pad(x, (1, 1), value=2.0), "pad()"),
        (lambda x: functional.interpolate(x, scale_factor=1.5), "interpolate()"),
        (lambda x: functional.interpolate(x, scale_factor=3, mode="bilinear"), "interpolate()"),
        (lambda x: x + x.size(0), "add()"),
        (lambda x: x.mean(), "mean()"),
        (lambda x: x.mean(0), "mean()"),
        (lambda x: functional.avg_pool2d(x, x.shape[2]), "avg_pool2d()"),
        (lambda x: functional.avg_pool2d(x, 2, divisor_override=3), "avg_pool2d()"),
        (lambda x: functional.dropout(x, 0.5, True), "dropout()"),
        (lambda x: functional.adaptive_avg_pool2d(x, 2), "adaptive_avg_pool2d()"),
    ],
)
def test_what_has_no_integer_form_is_named(operation: Callable[[Tensor], Tensor], word: str) -> None:
    assert f"{word} in the model itself" in faults(lambda m, x: operation(m.conv(x)))


def test_every_unsupported_operation_is_named_at_once() -> None:
    message = faults(lambda m, x: torch.erf(m.norm(torch.cumsum(m.conv(x), 1))))
    assert "erf() in the model itself" in message
    assert "cumsum() in the model itself" in message


def test_parameters_become_constants() -> None:
    assert kinds(lambda m, x: m.conv(x) + (m.offset * 2)) == ["input", "convolution", "constant", "add"]


def test_layers_and_norms_that_are_called_twice() -> None:
    assert "other, called 2 times" in faults(lambda m, x: m.other(m.other(m.conv(x))))
    assert "norm, called 2 times" in faults(lambda m, x: m.norm(m.other(m.norm(m.conv(x)))))


def test_a_convolution_of_two_users_keeps_its_norm_apart() -> None:
    def body(m: nn.Module, x: Tensor) -> Tensor:
        convolved = m.conv(x)
        return m.norm(convolved) + convolved

    assert kinds(body) == ["input", "convolution", "batch_norm", "add"]


def test_products_of_two_tensors() -> None:
    def body(m: nn.Module, x: Tensor) -> Tensor:
        x = m.relu(m.conv(x))
        return x @ x.transpose(2, 3)

    assert kinds(body) == ["input", "convolutionrelu", "movement", "matmul"]


def test_a_norm_before_a_relu_takes_it_in() -> None:
    assert kinds(lambda m, x: m.other(m.relu(m.norm(functional.relu(m.conv(x)))))) == [
        "input",
        "convolutionrelu",
        "batch_normrelu",
        "convolution",
    ]


def test_a_convolution_that_gives_logits_takes_the_flattening_in() -> None:
    (_, layer) = plan(trace(Net(lambda m, x: torch.flatten(m.conv(x), 1))))
    assert layer.options == {"flatten": True}


def test_with_accumulator_residuals_a_convolution_takes_in_add_and_activation() -> None:
    def body(m: nn.Module, x: Tensor) -> Tensor:
        x = m.relu(m.conv(x))
        return m.other(m.relu(m.norm(x) + x)) if m.training else functional.relu(m.other(x) + x)

    operations = plan(trace(Net(body).eval()), residual="accumulator")
    assert [operation.kind + operation.activation for operation in operations][-1] == "convolutionrelu"
    assert [operation.shortcut is not None for operation in operations] == [False, False, True]


def test_outputs_that_are_not_one_tensor() -> None:
    assert "an output that is not one tensor" in faults(lambda m, x: (m.conv(x), x))  # type: ignore[arg-type, return-value]


class Given(nn.Module):
    """A module or a function behind a convolution of 4 channels."""

    def __init__(self, after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.after = nn.Conv2d(3, 4, 3, padding=1), after
        self.order = nn.Buffer(torch.tensor([1, 0, 3, 2]))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.conv(x))


def hooked() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Conv2d(4, 4, 1))


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (nn.Conv2d(4, 4, 3, padding="same"), "Conv2d at after .*: padding='same'; give numbers"),
        (nn.Conv2d(4, 4, 3, padding_mode="reflect"), "Conv2d at after .*: padding_mode='reflect'"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), "ParametrizedConv2d at after .*remove_param"),
        (hooked(), "Conv2d at after .*: its weight is computed by a hook"),
        (nn.BatchNorm2d(4, track_running_stats=False), "BatchNorm2d at after .*: track_running_stats=False"),
        (nn.AvgPool2d(2, divisor_override=3), "AvgPool2d at after .*: divisor_override=3"),
        (nn.AvgPool2d(3, 2, 1, ceil_mode=True), "AvgPool2d at after .*: ceil_mode=True"),
        (nn.AdaptiveAvgPool2d(2), "AdaptiveAvgPool2d at after .*: output_size=2; only 1"),
        (MaxPool2dSame(2), "MaxPool2dSame at after .*: a kind of MaxPool2d that computes something of its own"),
        (nn.MaxPool2d(2, return_indices=True), "MaxPool2d at after .*: return_indices=True"),
        (nn.Upsample(scale_factor=2, mode="bicubic"), "Upsample at after .*: mode='bicubic'"),
        (nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), "Upsample at after .*: align_corners=True"),
        (nn.Upsample(size=8), "Upsample at after .*: size; give scale_factor"),
        (nn.LayerNorm((4, 8, 8)), r"LayerNorm at after .*: normalized_shape=\[4, 8, 8\]"),
        (lambda x: torch.add(x, x, alpha=2), r"add\(\) .*: alpha=2; multiply first"),
        (lambda x: x - x.relu(), r"sub\(\) .*: of a tensor and a number only"),
        (lambda x: x + x.size(1), r"add\(\) .*: a number that is taken from the image's shape"),
        (lambda x: functional.pad(x, (1, 1), value=2.0), r"pad\(\) .*: value=2\.0; only 0"),
        (lambda x: functional.pad(x, (1, 1), mode="reflect"), r"pad\(\) .*: mode='reflect'"),
        (lambda x: functional.interpolate(x, scale_factor=1.5), r"interpolate\(\) .*: scale_factor=1\.5"),
        (lambda x: functional.avg_pool2d(x, x.shape[2]), r"avg_pool2d\(\) .*: kernel_size is taken from"),
        (lambda x: functional.avg_pool2d(x, 2, divisor_override=3), r"avg_pool2d\(\) .*: divisor_override=3"),
    ],
)
def test_the_argument_at_fault_is_named(after: Callable[[Tensor], Tensor], expected: str) -> None:
    with pytest.raises(UnsupportedModelError, match=expected) as caught:
        plan(trace(Given(after)))
    # And the line of the call.
    assert "test_planning.py, line" in str(caught.value)


def test_indices_that_are_a_buffer_are_named() -> None:
    class Ordered(Given):
        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)[:, self.order]

    with pytest.raises(UnsupportedModelError, match=r"getitem\(\) .*: indices that are a tensor; write them as a list"):
        plan(trace(Ordered(nn.ReLU())))

"""Calls that move values: converted they give equal codes for every size of the batch, or an error that names the layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from networks import images, quantize
from torch import Tensor, nn
from torch.nn import functional

import lowprec
from lowprec.graph.planning import UnsupportedModelError

SHAPE = (3, 8, 6)
RUNTIMES = ("onnxruntime", "openvino")
Body = Callable[[nn.Module, Tensor], Tensor]


class Net(nn.Module):
    """A movement between a convolution of 8 channels and a linear layer."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 1)
        self.shuffle, self.pixels = nn.ChannelShuffle(4), nn.PixelShuffle(2)
        self.wider, self.padded = nn.Upsample(scale_factor=(2.0, 3.0)), nn.ZeroPad2d((1, 2, 0, 3))
        self.pad = nn.ZeroPad2d(1)
        self.unflatten = nn.Unflatten(1, (2, 4))
        self.token = nn.Parameter(torch.randn(1, 8, 1, 1))
        self.body = body
        with torch.no_grad():
            features = body(self, torch.zeros(2, 8, *SHAPE[1:])).flatten(1).shape[1]
        self.head = nn.Linear(features, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(self.body(self, self.conv(x)), 1))


def unpacked_sizes(m: nn.Module, x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    return x.view(batch, 2, channels // 2, height * width).transpose(1, 2).reshape(batch, channels, height, width)


def windows(m: nn.Module, x: Tensor) -> Tensor:
    """As Swin has them: [B, H, W, C] -> windows as a batch of their own, and back."""
    batch, channels, height, width = x.shape
    x = x.view(batch, channels, height // 4, 4, width // 3, 3).permute(0, 2, 4, 3, 5, 1).contiguous()
    x = x.view(-1, 12, channels)[:, 1:]
    return x.reshape(batch, -1, channels)


BODIES: dict[str, Body] = {
    "view": lambda m, x: x.view(x.size(0), 4, -1),
    "view of minus one": lambda m, x: x.view(-1, 4, 96),
    "view of all sizes": unpacked_sizes,
    "reshape": lambda m, x: x.reshape(x.shape[0], 48, 8),
    "torch.reshape": lambda m, x: torch.reshape(x, (-1, 2, 192)),
    "flatten two": lambda m, x: x.flatten(2),
    "flatten the batch in": lambda m, x: x.flatten(0, 1).unflatten(0, (-1, 8)),
    "permute": lambda m, x: x.permute(0, 2, 3, 1),
    "permute negative": lambda m, x: x.permute((0, -1, -3, -2)),
    "torch.permute": lambda m, x: torch.permute(x, dims=(0, 3, 1, 2)),
    "permute the batch away and back": lambda m, x: x.permute(1, 2, 0, 3).permute(2, 0, 1, 3),
    "transpose": lambda m, x: x.transpose(1, -1),
    "torch.transpose": lambda m, x: torch.transpose(x, dim0=2, dim1=1),
    "swapaxes": lambda m, x: x.swapaxes(1, 3),
    "swapaxes by name": lambda m, x: torch.swapaxes(x, axis0=-1, axis1=2),
    "chunk": lambda m, x: x.chunk(2, dim=1)[1],
    "chunk into uneven parts": lambda m, x: torch.cat([torch.chunk(x, 3, 3)[index] for index in (1, 0)], 3),
    "chunk into fewer parts": lambda m, x: torch.chunk(input=x, chunks=5, dim=2)[-1],
    "split": lambda m, x: x.split(3, dim=1)[2],
    "split by sizes": lambda m, x: torch.split(x, [1, 5, 2], dim=1)[1],
    "split by name": lambda m, x: torch.split(x, split_size_or_sections=[1, 5, 2], dim=-3)[-1],
    "split by size by name": lambda m, x: x.split(split_size=5, dim=2)[1],
    "unbind": lambda m, x: x.unbind(1)[3],
    "unbind negative": lambda m, x: torch.unbind(x, dim=-1)[-2],
    "slices": lambda m, x: x[:, 1:7:3, :, 2:],
    "negative slices": lambda m, x: x[:, -3:, :-1],
    "ellipsis": lambda m, x: x[..., 1:4],
    "ellipsis in the middle": lambda m, x: x[:, ..., ::2],
    "integer": lambda m, x: x[:, 5],
    "negative integers": lambda m, x: x[:, -2, :, -1],
    "integers and slices": lambda m, x: x[:, 1, ::3, 2:3],
    "none": lambda m, x: x[:, None].squeeze(1),
    "none in front": lambda m, x: x[None, :, 1:].squeeze(0),
    "none behind an integer": lambda m, x: x[:, 3, None, ..., None],
    "list": lambda m, x: x[:, [1, 0, 3, 2, 5, 4, 7, 6]],
    "list with slices": lambda m, x: x[:, 1:7, [-1, 2, 2], None, ::2],
    "list in another axis": lambda m, x: x[..., (5, 0, 3)],
    "everything": lambda m, x: x[:, :],
    "squeeze": lambda m, x: x[:, 2:3].squeeze(1).unsqueeze(-1),
    "pad": lambda m, x: functional.pad(x, (1, 2, 0, 1)),
    "pad channels": lambda m, x: functional.pad(x, (0, 0, 1, 0, 2, 3), value=0.0),
    "pad that cuts": lambda m, x: functional.pad(x, (-1, 1, 0, -2)),
    "pad nothing": lambda m, x: functional.pad(x, (0, 0, 0, 0)),
    "zero pad": lambda m, x: m.padded(x),
    "roll": lambda m, x: torch.roll(x, shifts=(-3, 2), dims=(2, 3)),
    "roll one axis": lambda m, x: torch.roll(x, 5, -2),
    "roll as a method": lambda m, x: x.roll((1, -2), (1, 3)).roll(shifts=[2], dims=2),
    "channel shuffle": lambda m, x: m.shuffle(x),
    "pixel shuffle": lambda m, x: m.pixels(x),
    "unflatten": lambda m, x: m.unflatten(x),
    "upsample": lambda m, x: m.wider(x),
    "interpolate": lambda m, x: functional.interpolate(x, scale_factor=2),
    "expand": lambda m, x: x.mean((2, 3), keepdim=True).expand(-1, -1, 8, 6) + x,
    "expand by shape": lambda m, x: x[:, :, :1].expand(x.shape[0], 8, 3, 6),
    "expand a parameter": lambda m, x: torch.cat((m.token.expand(x.shape[0], -1, -1, 6), x), dim=2),
    "expand a parameter for every image": lambda m, x: torch.cat((m.token.expand(x.size(0), 8, 8, 1), x), dim=3),
    "one module twice": lambda m, x: torch.cat((m.shuffle(m.shuffle(x)), m.shuffle(x)), 1),
    "a call of a module's name": lambda m, x: functional.pad(m.pad(x), (0, 1))[:, :, :8, :6] + m.pad(x)[:, :, :8, :6],
    "expand windows": lambda m, x: (
        x.reshape(x.shape[0] * 2, 4, 8, 6).mean((2, 3), keepdim=True).expand(-1, -1, 2, 3).reshape(x.shape[0], 8, 2, 3)
    ),
    "windows": windows,
    "mean of the last axes of five": lambda m, x: x.reshape(x.shape[0], 8, 2, 4, 6).mean((-2, -1)),
    "mean of the middle axes of five": lambda m, x: x.reshape(x.shape[0], 8, 2, 4, 6).mean((2, 3)),
    "mean of the last axes of three": lambda m, x: x.flatten(2).mean((-2, -1)).unsqueeze(1),
    "mean over channels": lambda m, x: x.mean(1),
    "contiguous and clone": lambda m, x: x.transpose(1, 2).contiguous().clone(),
}


@pytest.mark.parametrize("name", BODIES)
def test_equal_codes_for_any_batch_in_every_runtime(name: str, tmp_path: Path) -> None:
    model = Net(BODIES[name]).eval()
    qmodel, imodel = quantize(model, "w8a8", images(0, 4, SHAPE))
    batches = [images(1, 5, SHAPE), images(2, 1, SHAPE)]
    for runtime in RUNTIMES if "parameter" not in name else RUNTIMES[:1]:
        lowprec.export_onnx(imodel, tmp_path / "model.onnx", lowprec.ExportOptions(runtime=runtime))
        report = lowprec.verify(qmodel, imodel, batches, onnx=tmp_path / "model.onnx")
        assert report.equal, report
    lowprec.save(imodel, tmp_path / "model.safetensors")
    loaded = lowprec.load(tmp_path / "model.safetensors")
    assert torch.equal(loaded(batches[0]), imodel(batches[0]))


@pytest.mark.parametrize("name", ["windows", "expand windows", "expand a parameter", "list"])
@pytest.mark.parametrize("size", [1, 4])
def test_equal_codes_where_a_fixed_batch_is_filled_up(name: str, size: int, tmp_path: Path) -> None:
    qmodel, imodel = quantize(Net(BODIES[name]).eval(), "w8a8", images(0, 4, SHAPE))
    lowprec.export_onnx(imodel, tmp_path / "model.onnx", lowprec.ExportOptions(batch_size=size))
    report = lowprec.verify(qmodel, imodel, [images(1, 6, SHAPE), images(2, 3, SHAPE)], onnx=tmp_path / "model.onnx")
    assert report.equal, report


# They add, average or join.
COMPUTES = ("expand", "mean", "a call of", "one module", "chunk into uneven")


@pytest.mark.parametrize("name", [name for name in BODIES if not name.startswith(COMPUTES)])
def test_codes_are_those_of_the_convolution_moved(name: str) -> None:
    """Not only equal everywhere: what the head gets is the call itself on the convolution's codes."""
    _, imodel = quantize(Net(BODIES[name]).eval(), "w8a8", images(0, 4, SHAPE))
    codes = imodel.codes(images(3, 3, SHAPE))
    (source,) = next(step.inputs for step in imodel.steps if step.name == "head")
    expected = BODIES[name](Net(BODIES[name]), codes["conv"].float()).flatten(1)
    assert torch.equal(codes[source].flatten(1).float(), expected)


def test_each_step_has_a_name_of_its_own() -> None:
    """A module that is called twice, and a call that fx names as a module is called."""
    for name, expected in (
        ("one module twice", ["shuffle", "shuffle_1", "shuffle_2"]),
        ("a call of a module's name", ["pad", "pad_1", "pad_2"]),
    ):
        _, imodel = quantize(Net(BODIES[name]).eval(), "w8a8", images(0, 4, SHAPE))
        names = [step.name for step in imodel.steps]
        assert len(set(names)) == len(names)
        assert set(expected) <= set(names)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (lambda m, x: x[:1] + x, r"getitem\(\) in .*: the index slice\(None, 1, None\) picks images of the batch"),
        (lambda m, x: torch.cat([x, x], 0)[:2], r"cat\(\) in .*: images of the batch are joined"),
        (lambda m, x: torch.cat([x, x], -4), r"cat\(\) in .*: images of the batch are joined"),
        (lambda m, x: x[0] + x, r"getitem\(\) .*: the index 0 picks images"),
        (lambda m, x: x[[1, 0]], r"getitem\(\) .*: the index \[1, 0\] picks images"),
        (lambda m, x: x[:, [1, 0], [2, 3]], r"getitem\(\) .*: a list of indices .* in several steps"),
        (lambda m, x: x[:, [1, 0], 2], r"getitem\(\) .*: a list of indices .* in several steps"),
        (lambda m, x: x[:, [[1], [0]]], r"getitem\(\) .*: the index \[\[1\], \[0\]\] is no list of whole numbers"),
        (lambda m, x: torch.cat((x, x.chunk(2, dim=0)[0])), r"getitem\(\) .*: .*none along the batch"),
        (lambda m, x: x.split(1, 0)[0] + x, r"getitem\(\) .*: .*none along the batch"),
        (lambda m, x: x.split([1, 1], 0)[0] + x, r"split does not take any size of the batch"),
        (lambda m, x: x.unbind(0)[0].unsqueeze(0) + x, r"getitem\(\) .*: .*none along the batch"),
        (lambda m, x: x.chunk(4, 1)[2:][0], r"getitem\(\) .*: only single parts"),
        (lambda m, x: torch.roll(x, 1, 0), r"roll\(\) .*: .*without that of the batch"),
        (lambda m, x: x.roll(1), r"roll\(\) .*: .*give dims"),
        (lambda m, x: x.mean(-4, keepdim=True) + x, r"mean\(\) .*test_convert_movement.*: an average over the images"),
        (lambda m, x: x.softmax(0), r"softmax\(\) .*: a softmax over the images"),
        (lambda m, x: x.reshape(2, -1), r"an output of the shape|reshape does not take any size of the batch"),
        (lambda m, x: x.view(2, 8, 48), "view does not take any size of the batch.* give -1"),
        (lambda m, x: x.reshape(4, 4, 8, 6).reshape(2, 8, 48), "reshape does not take any size of the batch"),
        (lambda m, x: x.flatten(0, 1), r"an output of the shape \[16, 8, 6\] for 2 images"),
        (lambda m, x: x.flatten(1).transpose(0, 1), r"an output of the shape \[384, 2\] for 2 images"),
        (
            lambda m, x: (x.flatten(1) @ x.flatten(1).transpose(0, 1)).unsqueeze(2).expand(-1, -1, 3)[..., :2] + 1.0,
            r"unsqueeze\(\) .*: the shape \(-1, -1, 1\) does not grow with the batch along one axis",
        ),
        (
            lambda m, x: torch.cat((m.token.flatten(2).expand(2 * x.shape[0], -1, 1), x.reshape(-1, 8, 24)[..., :1])),
            r"expand\(\) .*: expanding \(1, 8, 1\) to \(-1, 8, 1\) has no integer form",
        ),
        (
            lambda m, x: x.permute(1, 0, 2, 3)[:, :, :1].expand(8, x.shape[0], 8, 6).permute(1, 0, 2, 3),
            r"expand\(\) .*: expanding \(8, -1, 1, 6\) to \(8, -1, 8, 6\) has no integer form",
        ),
    ],
)
def test_what_has_no_integer_form_is_named_before_any_training(body: Body, message: str) -> None:
    class Headless(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.body(self, self.conv(x))

    with pytest.raises(UnsupportedModelError, match=message):
        lowprec.prepare(Headless(body).eval(), "w8a8", images(0, 2, SHAPE))


def test_openvino_is_refused_where_a_parameter_is_repeated_for_each_image(tmp_path: Path) -> None:
    _, imodel = quantize(Net(BODIES["expand a parameter"]).eval(), "w8a8", images(0, 4, SHAPE))
    with pytest.raises(ValueError, match=r"runtime=openvino: expand repeats a parameter for each image"):
        lowprec.export_onnx(imodel, tmp_path / "model.onnx", lowprec.ExportOptions(runtime="openvino"))
    assert not list(tmp_path.iterdir())


def test_parameters_are_repeated_in_the_oldest_operator_set_too(tmp_path: Path) -> None:
    qmodel, imodel = quantize(Net(BODIES["expand a parameter"]).eval(), "w8a8", images(0, 4, SHAPE))
    lowprec.export_onnx(imodel, tmp_path / "model.onnx", lowprec.ExportOptions(opset=13))
    assert lowprec.verify(qmodel, imodel, [images(1, 5, SHAPE)], onnx=tmp_path / "model.onnx").equal

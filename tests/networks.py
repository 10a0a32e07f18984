"""Small networks for tests: every supported operator, in structures drawn from a seed, with awkward parameters."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import lowprec
from lowprec.integer.model import IntegerModel
from lowprec.recipe import RESIDUALS, ActivationScheme, Recipe, Rule, WeightScheme

IMAGE = (3, 17, 14)  # sides that no power of two divides


class ConvNormAct(nn.Sequential):
    """Convolution, then perhaps a batch norm (else a bias), then perhaps an activation."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 3,
        norm: bool = True,
        act: nn.Module | None = None,
        **geometry: int,
    ) -> None:
        padding = geometry.pop("padding", geometry.get("dilation", 1) * (kernel // 2))
        layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, kernel, padding=padding, bias=not norm, **geometry)]
        layers += [nn.BatchNorm2d(outputs)] if norm else []
        layers += [act] if act is not None else []
        super().__init__(*layers)


class Residual(nn.Module):
    """Two convolutions and a shortcut; ``projection`` of None is the identity."""

    def __init__(self, body: nn.Module, projection: nn.Module | None, act: nn.Module | None) -> None:
        super().__init__()
        self.body, self.projection, self.act = body, projection, act

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.projection is None else self.projection(x)
        total = self.body(x) + shortcut
        return total if self.act is None else self.act(total)


class PreActivation(nn.Module):
    """A ReLU on a tensor that the shortcut uses as well, so that no operator can take it in."""

    def __init__(self, body: nn.Module, six: bool) -> None:
        super().__init__()
        self.body, self.six = body, six

    def forward(self, x: Tensor) -> Tensor:
        activated = functional.relu6(x) if self.six else functional.relu(x)
        return x + self.body(activated)


class Doubled(nn.Module):
    """A convolution's result added to itself."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x + x


class SqueezeExcite(nn.Module):
    """A gate for each channel, from the image's average, with an activation that is a lookup table."""

    def __init__(self, channels: int, gate: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.reduce, self.act = nn.Conv2d(channels, 4, 1), act
        self.expand, self.gate = nn.Conv2d(4, channels, 1), gate

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.expand(self.act(self.reduce(x.mean((2, 3), keepdim=True)))))


class Dense(nn.Module):
    """A batch norm that no convolution can take in, and a concatenation, as DenseNet has them."""

    def __init__(self, channels: int, body: nn.Module) -> None:
        super().__init__()
        self.norm, self.body = nn.BatchNorm2d(channels), body

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(functional.relu(self.norm(x))), x], 1)


class Shuffle(nn.Module):
    """Half of the channels pass, the others are convolved; then both are shuffled, as ShuffleNet does."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        passed, convolved = x.chunk(2, dim=1)
        x = torch.cat((passed, self.body(convolved)), dim=1)
        batch, channels, height, width = x.size()
        return (
            x.view(batch, 2, channels // 2, height, width).transpose(1, 2).contiguous().view(batch, -1, height, width)
        )


class Moved(nn.Module):
    """Padding, upsampling and slices, each of them on codes."""

    def forward(self, x: Tensor) -> Tensor:
        x = functional.pad(x, (1, 0, 2, 1))
        x = functional.interpolate(x, scale_factor=2)
        return x[:, :, 1:-1:2, 1:]


class TinyTransformer(nn.Module):
    """Attention as timm writes it, step by step: token and position parameters, products of tensors, softmax, layer norm.

    Then a cyclic shift of windows, as Swin has it, rows in another order, and bilinear upsampling. For images of 3×8×8.
    """

    def __init__(self, width: int = 12, heads: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 2, stride=2)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 17, width))
        self.norm = nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.act, self.fc2 = nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        self.last = nn.LayerNorm(width)
        self.upsample = nn.Upsample(scale_factor=2, mode="bilinear")
        self.conv, self.classifier = nn.Conv2d(width, 8, 3), nn.Linear(8, 5)
        self.heads, self.scale = heads, (width // heads) ** -0.5

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), dim=1) + self.position
        x = x + self.attention(self.norm(x))
        x = x + self.fc2(self.act(self.fc1(x)))
        x = self.last(x)[:, 1:].transpose(1, 2)
        x = x.reshape(x.shape[0], x.shape[1], 4, 4)
        x = torch.roll(x, shifts=(-1, 2), dims=(2, 3))[:, :, [0, 2, 1, 3]]
        return self.classifier(self.conv(self.upsample(x)).mean((2, 3)))

    def attention(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        scores = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((scores @ v).transpose(1, 2).reshape(batch, tokens, width))


class Head(nn.Module):
    """Global average, or all positions, then one or two linear layers."""

    def __init__(self, features: int, pool: str, hidden: int | None, bias: bool) -> None:
        super().__init__()
        self.pool = pool
        self.dropout = nn.Dropout(0.2)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.hidden = None if hidden is None else nn.Linear(features, hidden)
        self.classifier = nn.Linear(features if hidden is None else hidden, 5, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.pool == "mean":
            x = x.mean((2, 3))
        elif self.pool == "average":
            x = self.average(x)
        x = torch.flatten(x, 1)
        if self.hidden is not None:
            x = functional.relu(self.hidden(x))
        return self.classifier(self.dropout(x))


def random_network(seed: int) -> nn.Sequential:
    """A network of a stem, four blocks and a head, in eval mode, for images of the shape ``IMAGE``."""
    draw = random.Random(seed)

    def act() -> nn.Module | None:
        return draw.choice([nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), None])

    def conv(inputs: int, outputs: int, kernel: int = 3, **geometry: int) -> ConvNormAct:
        return ConvNormAct(inputs, outputs, kernel, draw.random() < 0.75, act(), **geometry)

    width = draw.choice([6, 10, 12])

    def residual() -> nn.Module:
        nonlocal width
        inputs, stride, width = width, draw.choice([1, 2]), draw.choice([6, 12, 18])
        body = nn.Sequential(conv(inputs, width, stride=stride), conv(width, width))
        same = inputs == width and stride == 1
        return Residual(body, None if same else conv(inputs, width, 1, stride=stride), act())

    def depthwise() -> nn.Module:
        wide = 2 * width
        kernel = draw.choice([3, 5])
        return Residual(
            nn.Sequential(conv(width, wide, 1), conv(wide, wide, kernel, groups=wide), conv(wide, width, 1)),
            None,
            act(),
        )

    def grouped() -> nn.Module:
        return conv(width, width, groups=2, dilation=2)

    def pre_activation() -> nn.Module:
        return PreActivation(conv(width, width), draw.random() < 0.5)

    def pooling() -> nn.Module:
        ceil_mode, stride = draw.random() < 0.5, draw.choice([1, 2, 3])
        if draw.random() < 0.4:
            return nn.MaxPool2d(3, stride, padding=draw.choice([0, 1]), ceil_mode=ceil_mode)
        padding = draw.choice([0, 1])
        counted = draw.random() < 0.5 and not (ceil_mode and padding)
        return nn.AvgPool2d(draw.choice([2, 3]), stride, padding, ceil_mode, count_include_pad=counted)

    def doubled() -> nn.Module:
        return Doubled(conv(width, width, 1))

    def smooth() -> nn.Module:
        kinds = [
            nn.SiLU(),
            nn.GELU(),
            nn.Hardswish(),
            nn.LeakyReLU(0.1),
            nn.PReLU(width),
            nn.Hardtanh(-1, 2),
            nn.Tanh(),
        ]
        return nn.Sequential(conv(width, width), draw.choice(kinds))

    def squeeze_excite() -> nn.Module:
        gate = draw.choice([nn.Sigmoid(), nn.Hardsigmoid()])
        return SqueezeExcite(width, gate, draw.choice([nn.ReLU(), nn.Hardswish(inplace=True)]))

    def dense() -> nn.Module:
        nonlocal width
        inputs, width = width, 2 * width + 6
        return Dense(inputs, conv(inputs, 6))

    def shuffle() -> nn.Module:
        return Shuffle(conv(width // 2, width // 2))

    blocks: list[Callable[[], nn.Module]] = [residual, residual, depthwise, grouped, pre_activation, pooling, doubled]
    blocks += [smooth, squeeze_excite, dense, shuffle, Moved]
    layers: list[nn.Module] = [conv(3, width, draw.choice([3, 5]), stride=draw.choice([1, 2]))]
    layers += [draw.choice(blocks)() for _ in range(4)]
    features = width
    pool = draw.choice(["mean", "average", "none"])
    if pool == "none":
        with torch.no_grad():
            features = nn.Sequential(*layers).eval()(torch.zeros(1, *IMAGE)).flatten(1).shape[1]
    layers.append(Head(features, pool, draw.choice([None, 9]), draw.random() < 0.7))
    return awkward(nn.Sequential(*layers), seed)


def awkward(model: nn.Module, seed: int, dead_channels: bool = True) -> nn.Module:
    """Gives batch norms statistics, negative gains and dead channels; zero clusters and large biases to layers."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, size: int) -> Tensor:
        return low + (high - low) * torch.rand(size, generator=generator)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                channels = module.num_features
                module.running_mean.copy_(uniform(-0.5, 0.5, channels))
                module.running_var.copy_(uniform(0.2, 3.0, channels))
                signs = 1 - 2 * (uniform(0, 1, channels) < 0.2).float()
                module.weight.copy_(uniform(0.5, 1.5, channels) * signs)
                module.bias.copy_(uniform(-1, 1, channels))
                if dead_channels:
                    module.weight[0] = 0.0
            elif isinstance(module, nn.Conv2d | nn.Linear):
                fan_in = module.weight[0].numel()
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * (2 / fan_in) ** 0.5)
                if dead_channels:
                    module.weight[-1] = 0.0
                    module.weight[0, : module.weight.shape[1] // 2] = 0.0
                if module.bias is not None:
                    module.bias.copy_(uniform(-1, 1, len(module.bias)))
                    module.bias[0] = 30.0
    return model.eval()


def random_recipe(seed: int) -> Recipe:
    """A shipped recipe or a drawn one: both layouts, cluster sizes that divide nothing, layers of mixed bits."""
    draw = random.Random(seed)
    if draw.random() < 0.4:
        return Recipe.load(draw.choice(Recipe.names()))
    scheme = WeightScheme(
        bits=draw.choice([2, 4]),
        cluster_size=draw.choice([1, 3, 5, 7, 64]),
        layout=draw.choice(["kernel", "element"]),
        solver=draw.choice(["exact", "rms", "paper", "twn"]),
    )
    rules = [Rule(pattern="@classifier", bits=draw.choice([2, 4, 8]))] if draw.random() < 0.5 else []
    activations = ActivationScheme(residual=draw.choice(RESIDUALS))
    return Recipe(weights=scheme, activations=activations, rules=rules)


def images(seed: int, count: int = 4, shape: tuple[int, int, int] = IMAGE) -> Tensor:
    """Images of normal noise, over a slope from corner to corner."""
    generator = torch.Generator().manual_seed(seed)
    slope = torch.linspace(-1, 1, shape[1]).view(-1, 1) + torch.linspace(-1, 1, shape[2])
    return torch.randn(count, *shape, generator=generator) + slope


def quantize(model: nn.Module, recipe: Recipe | str, batch: Tensor) -> tuple[fx.GraphModule, IntegerModel]:
    """The model prepared, calibrated on ``batch`` and converted."""
    qmodel = lowprec.prepare(model, recipe, batch[:2])
    lowprec.calibrate(qmodel, [batch])
    return qmodel, lowprec.convert(qmodel)

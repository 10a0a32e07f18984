"""MobileNetV2 for small images: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (arXiv 1801.04381).

The blocks are the paper's (section 3): a 1×1 convolution that widens, a depthwise 3×3 convolution, a 1×1 convolution that
narrows and has no activation, ReLU6 in between, and a shortcut where the shape stays. The table of blocks is for images of
28×28 or 32×32: the paper's first four stages with fewer blocks and strides, then a 1×1 convolution, global average pooling
and a linear classifier. So a network consists of convolutions, batch norms, ReLU6s, additions, one pooling and one linear
layer, and nothing else.
"""

from collections import OrderedDict

from torch import Tensor, nn

from lowprec.models.initialization import initialize

__all__ = ["CifarMobileNetV2"]

# Expansion, channels at width 1, blocks and stride of the first block; an image of 32×32 ends at 8×8, or at 4×4 with a stem of
# stride 2.
STAGES = ((1, 16, 1, 1), (6, 24, 1, 2), (6, 32, 2, 1), (6, 64, 2, 2))
STEM_CHANNELS = 32
LAST_CHANNELS = 256
CHANNEL_MULTIPLE = 8


class InvertedResidual(nn.Module):
    """Widen, filter each channel, narrow: [B, in_channels, H, W] -> [B, out_channels, H / stride, W / stride]."""

    def __init__(self, in_channels: int, out_channels: int, expansion: int, stride: int) -> None:
        super().__init__()
        wide = expansion * in_channels
        # None, not nn.Identity: the traced graph then has no node that computes nothing.
        self.expand = None if expansion == 1 else _conv_norm(in_channels, wide, 1, activation=True)
        self.depthwise = _conv_norm(wide, wide, 3, stride=stride, groups=wide, activation=True)
        self.project = _conv_norm(wide, out_channels, 1, activation=False)
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = x_BCHW if self.expand is None else self.expand(x_BCHW)
        y_BCHW = self.project(self.depthwise(y_BCHW))
        return x_BCHW + y_BCHW if self.has_shortcut else y_BCHW


class CifarMobileNetV2(nn.Module):
    """A MobileNetV2 of 6 blocks: images [B, in_channels, H, W] -> logits [B, num_classes]; 0.13 M parameters at width 1.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images: 1 (grey) or 3 (colour).
        width: multiplies all channels, which are rounded to multiples of 8. The last 1×1 convolution is not made
            narrower than at width 1 (the paper, section 6.1).
        stem_stride: stride of the first convolution; 2 makes the network four times cheaper.

    Raises:
        ValueError: if an argument is impossible.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: float = 1.0, stem_stride: int = 1) -> None:
        super().__init__()
        if in_channels not in (1, 3):
            raise ValueError(f"in_channels must be 1 or 3, not {in_channels}")
        if not width > 0:
            raise ValueError(f"width must be above 0, not {width}")
        for argument, value in (("num_classes", num_classes), ("stem_stride", stem_stride)):
            if value < 1:
                raise ValueError(f"{argument} must be at least 1, not {value}")
        self.num_classes = num_classes
        channels = _channels(STEM_CHANNELS, width)
        self.stem = _conv_norm(in_channels, channels, 3, stride=stem_stride, activation=True)
        stages: OrderedDict[str, nn.Module] = OrderedDict()
        for number, (expansion, base_channels, blocks, stride) in enumerate(STAGES, start=1):
            out_channels = _channels(base_channels, width)
            stages[f"stage{number}"] = _stage(channels, out_channels, expansion, blocks, stride)
            channels = out_channels
        self.stages = nn.Sequential(stages)
        last = _channels(LAST_CHANNELS, max(width, 1.0))
        self.last = _conv_norm(channels, last, 1, activation=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(last, num_classes)
        initialize(self, self.classifier)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.last(self.stages(self.stem(x_BCHW)))
        return self.classifier(self.pool(x_BCHW).flatten(1))


def _channels(base: int, width: float) -> int:
    """``base`` channels times ``width``, to the nearest multiple of 8, which is at least 8."""
    return max(CHANNEL_MULTIPLE, int(base * width / CHANNEL_MULTIPLE + 0.5) * CHANNEL_MULTIPLE)


def _conv_norm(
    in_channels: int, out_channels: int, kernel: int, *, activation: bool, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv"] = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    layers["bn"] = nn.BatchNorm2d(out_channels)
    if activation:
        layers["relu6"] = nn.ReLU6()
    return nn.Sequential(layers)


def _stage(in_channels: int, out_channels: int, expansion: int, blocks: int, stride: int) -> nn.Sequential:
    first = InvertedResidual(in_channels, out_channels, expansion, stride)
    rest = (InvertedResidual(out_channels, out_channels, expansion, stride=1) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)

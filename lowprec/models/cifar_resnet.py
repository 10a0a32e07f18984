"""The CIFAR ResNets of He et al., "Deep Residual Learning for Image Recognition" (arXiv 1512.03385), section 4.2.

6n + 2 layers: a 3×3 stem, three stages of n basic blocks with 16, 32 and 64 channels, global average pooling and a
linear classifier. Where a block changes the shape, its shortcut is a 1×1 convolution with batch norm (option B), so a
network consists of convolutions, batch norms, ReLUs, additions, one pooling and one linear layer, and nothing else.
"""

from torch import Tensor, nn

from lowprec.models.initialization import initialize

__all__ = ["CifarResNet", "resnet8", "resnet20", "resnet32", "resnet56"]


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut: [B, in_channels, H, W] -> [B, out_channels, H / stride, W / stride]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        # None, not nn.Identity: the traced graph then has no node that computes nothing.
        self.shortcut: nn.Sequential | None = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        shortcut = x_BCHW if self.shortcut is None else self.shortcut(x_BCHW)
        y_BCHW = self.relu1(self.bn1(self.conv1(x_BCHW)))
        y_BCHW = self.bn2(self.conv2(y_BCHW))
        return self.relu2(y_BCHW + shortcut)


class CifarResNet(nn.Module):
    """A CIFAR ResNet of ``depth`` = 6n + 2 layers: images [B, in_channels, H, W] -> logits [B, num_classes].

    Args:
        depth: number of layers, shortcuts not counted: 8, 14, 20, …
        num_classes: number of logits.
        in_channels: channels of the images: 1 (grey) or 3 (colour).
        width: channels of the first stage; the second has twice, the third four times as many.
        stem_stride: stride of the first convolution; 2 makes the network four times cheaper.

    Raises:
        ValueError: if an argument is impossible.
    """

    def __init__(
        self, depth: int, num_classes: int = 10, in_channels: int = 3, width: int = 16, stem_stride: int = 1
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"a CIFAR ResNet has 6n + 2 layers (8, 14, 20, …), not {depth}")
        if in_channels not in (1, 3):
            raise ValueError(f"in_channels must be 1 or 3, not {in_channels}")
        for argument, value in (("num_classes", num_classes), ("width", width), ("stem_stride", stem_stride)):
            if value < 1:
                raise ValueError(f"{argument} must be at least 1, not {value}")
        blocks = (depth - 2) // 6
        self.num_classes = num_classes
        self.conv1 = nn.Conv2d(in_channels, width, 3, stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.stage1 = _stage(width, width, blocks, stride=1)
        self.stage2 = _stage(width, 2 * width, blocks, stride=2)
        self.stage3 = _stage(2 * width, 4 * width, blocks, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(4 * width, num_classes)
        initialize(self, self.classifier)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.relu(self.bn1(self.conv1(x_BCHW)))
        x_BCHW = self.stage3(self.stage2(self.stage1(x_BCHW)))
        return self.classifier(self.pool(x_BCHW).flatten(1))


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, stride=1) for _ in range(blocks - 1)))


def resnet8(num_classes: int = 10, in_channels: int = 3, width: int = 16, stem_stride: int = 1) -> CifarResNet:
    """8 layers, 0.08 M parameters at width 16."""
    return CifarResNet(8, num_classes, in_channels, width, stem_stride)


def resnet20(num_classes: int = 10, in_channels: int = 3, width: int = 16, stem_stride: int = 1) -> CifarResNet:
    """20 layers, 0.27 M parameters at width 16."""
    return CifarResNet(20, num_classes, in_channels, width, stem_stride)


def resnet32(num_classes: int = 10, in_channels: int = 3, width: int = 16, stem_stride: int = 1) -> CifarResNet:
    """32 layers, 0.47 M parameters at width 16."""
    return CifarResNet(32, num_classes, in_channels, width, stem_stride)


def resnet56(num_classes: int = 10, in_channels: int = 3, width: int = 16, stem_stride: int = 1) -> CifarResNet:
    """56 layers, 0.86 M parameters at width 16."""
    return CifarResNet(56, num_classes, in_channels, width, stem_stride)

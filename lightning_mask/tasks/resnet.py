"""A small residual network for small images, in the manner of He et al. 2016, section 4.2 (arXiv:1512.03385)."""

from torch import Tensor, nn
from torch.nn.functional import relu


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions around a shortcut.

    Args:
        channels_in: Channels that come in.
        channels_out: Channels that go out.
        stride: Stride of the first convolution; where it is not 1, or the channels change, the shortcut is a 1 x 1 convolution.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, channels_in, height, width] to [batch, channels_out, height / stride, width / stride]."""
        y = relu(self.bn1(self.conv1(x)))
        return relu(self.bn2(self.conv2(y)) + self.downsample(x))


class ResNet(nn.Module):
    """A convolution, three stages of blocks, a linear classifier.

    Each stage after the first halves the sides and doubles the channels.

    Args:
        num_classes: Number of classes.
        channels: Channels of the images: 1 or 3.
        width: Channels of the first stage.
        depth: Blocks in each stage.

    Raises:
        ValueError: If a size is below 1.
    """

    def __init__(self, num_classes: int, channels: int = 1, width: int = 16, depth: int = 2) -> None:
        super().__init__()
        if min(num_classes, channels, width, depth) < 1:
            raise ValueError(
                f"Sizes must be at least 1, got num_classes={num_classes}, {channels=}, {width=}, {depth=}."
            )
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        stages = []
        for stage in range(3):
            out = width * 2**stage
            first = BasicBlock(width if stage == 0 else out // 2, out, stride=1 if stage == 0 else 2)
            stages.append(nn.Sequential(first, *(BasicBlock(out, out) for _ in range(depth - 1))))
        self.layers = nn.ModuleList(stages)
        self.classifier = nn.Linear(width * 4, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Map [batch, channels, height, width] to logits, [batch, classes]."""
        x = self.stem(pixel_values)
        for stage in self.layers:
            x = stage(x)
        logits: Tensor = self.classifier(x.mean(dim=(2, 3)))
        return logits

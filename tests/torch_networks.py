"""Torch modules with the parameter names of torchvision, for tests that compare with them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def round_channels(channels: float) -> int:
    """`_make_divisible` of the TensorFlow models, by 8."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def conv_norm_relu6(channels: int, features: int, window: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, features, window, stride, (window - 1) // 2, groups=groups, bias=False),
        nn.BatchNorm2d(features),
        nn.ReLU6(),
    )


class InvertedResidual(nn.Module):
    def __init__(self, channels: int, features: int, stride: int, expansion: int):
        super().__init__()
        wide = channels * expansion
        self.residual = stride == 1 and channels == features
        expand = [conv_norm_relu6(channels, wide, 1)] if expansion > 1 else []
        self.conv = nn.Sequential(
            *expand,
            conv_norm_relu6(wide, wide, 3, stride, groups=wide),
            nn.Conv2d(wide, features, 1, bias=False),
            nn.BatchNorm2d(features),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class TorchMobileNetV2(nn.Module):
    """`rows`: expansion, channels, repeats and stride of each stage, as in the paper's table 2."""

    def __init__(
        self, rows: Sequence[Sequence[int]], stem: int, head: int, width: float, classes: int, in_channels: int = 3
    ):
        super().__init__()
        channels = round_channels(stem * width)
        features: list[nn.Module] = [conv_norm_relu6(in_channels, channels, 3, 2)]
        for expansion, out, repeats, stride in rows:
            for repeat in range(repeats):
                wanted = round_channels(out * width)
                features.append(InvertedResidual(channels, wanted, stride if repeat == 0 else 1, expansion))
                channels = wanted
        last = round_channels(head * max(1.0, width))
        features.append(conv_norm_relu6(channels, last, 1))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


ORIGINAL_ROWS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def small_mobilenetv2(classes: int = 10, in_channels: int = 1, width: float = 0.35) -> TorchMobileNetV2:
    """The network that fdjax calls mobilenetv2_small."""
    return TorchMobileNetV2(((4, 24, 2, 1), (4, 64, 2, 2)), 16, 256, width, classes, in_channels)


def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Random statistics and scales of batch norm too, of which new modules have zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        if tensor.ndim > 1:
            spread = 1.5 / tensor[0].numel() ** 0.5
            tensor.copy_(spread * torch.randn(tensor.shape, generator=generator))
        elif name.endswith("running_var") or name.endswith("weight"):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
        else:
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return module.eval()

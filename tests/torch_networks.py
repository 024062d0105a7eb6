"""Torch modules with the parameter names of torchvision, for tests that compare with them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch import nn  # noqa: E402


def round_channels(channels: float) -> int:
    """`_make_divisible` of the TensorFlow models, by 8."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


class SameConv2d(nn.Conv2d):
    """With TensorFlow's SAME padding: the surplus zero comes last."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        pads = []
        for size, window, stride in zip(input.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-size // stride) - 1) * stride + window - size, 0)
            pads += [total // 2, total - total // 2]
        return self._conv_forward(nn.functional.pad(input, pads), self.weight, self.bias)


def conv(channels: int, features: int, window: int, stride: int = 1, groups: int = 1, same: bool = False) -> nn.Conv2d:
    if same:
        return SameConv2d(channels, features, window, stride, groups=groups, bias=False)
    return nn.Conv2d(channels, features, window, stride, window // 2, groups=groups, bias=False)


def conv_norm_relu6(channels: int, features: int, window: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(conv(channels, features, window, stride, groups), nn.BatchNorm2d(features), nn.ReLU6())


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


class ResidualBlock(nn.Module):
    """torchvision's BasicBlock, or its Bottleneck where `expansion` is above 0."""

    def __init__(self, channels: int, inner: int, stride: int, expansion: int, groups: int):
        super().__init__()
        features = inner * (expansion or 1)
        self.stride, self.new_channels = stride, features - channels
        if expansion:
            convs = [
                nn.Conv2d(channels, inner, 1, bias=False),
                nn.Conv2d(inner, inner, 3, stride, 1, groups=groups, bias=False),
                nn.Conv2d(inner, features, 1, bias=False),
            ]
        else:
            convs = [
                nn.Conv2d(channels, inner, 3, stride, 1, bias=False),
                nn.Conv2d(inner, features, 3, 1, 1, bias=False),
            ]
        self.depth = len(convs)
        for number, conv in enumerate(convs, start=1):
            self.add_module(f"conv{number}", conv)
            self.add_module(f"bn{number}", nn.BatchNorm2d(conv.out_channels))
        self.downsample = None
        if expansion and (stride > 1 or self.new_channels):
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, features, 1, stride, bias=False), nn.BatchNorm2d(features)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for number in range(1, self.depth + 1):
            y = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(y))
            y = torch.relu(y) if number < self.depth else y
        if self.downsample is not None:
            x = self.downsample(x)
        elif self.stride > 1 or self.new_channels:
            half = self.new_channels // 2
            x = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        return torch.relu(x + y)


class TorchResNet(nn.Module):
    """`inner`: channels of the blocks' first convolutions in the first stage; they double from stage to stage."""

    def __init__(
        self,
        repeats: Sequence[int],
        stem: int,
        inner: int,
        expansion: int,
        *,
        window: int,
        stride: int,
        pool: bool,
        groups: int = 1,
        classes: int = 10,
        classifier: str = "fc",
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(3, stem, window, stride, window // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if pool else nn.Identity()
        channels, self.stages, self.classifier = stem, len(repeats), classifier
        for stage, blocks in enumerate(repeats):
            layers = []
            for block in range(blocks):
                step = 2 if stage and block == 0 else 1
                layers.append(ResidualBlock(channels, inner * 2**stage, step, expansion, groups))
                channels = inner * 2**stage * (expansion or 1)
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.add_module(classifier, nn.Linear(channels, classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        return getattr(self, self.classifier)(x.mean((2, 3)))


class TimmBlock(nn.Module):
    """timm's InvertedResidual, or its DepthwiseSeparableConv where nothing is expanded."""

    def __init__(self, channels: int, features: int, stride: int, expansion: int, window: int, same: bool, eps: float):
        super().__init__()
        wide = channels * expansion
        self.residual = stride == 1 and channels == features
        convs = [] if expansion == 1 else [("conv_pw", conv(channels, wide, 1))]
        convs.append(("conv_dw", conv(wide, wide, window, stride, wide, same)))
        convs.append(("conv_pw" if expansion == 1 else "conv_pwl", conv(wide, features, 1)))
        self.order = [name for name, _ in convs]
        for number, (name, layer) in enumerate(convs, start=1):
            self.add_module(name, layer)
            self.add_module(f"bn{number}", nn.BatchNorm2d(layer.out_channels, eps))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for number, name in enumerate(self.order, start=1):
            y = getattr(self, f"bn{number}")(getattr(self, name)(y))
            y = y if number == len(self.order) else nn.functional.relu6(y)
        return x + y if self.residual else y


class TimmMobileNet(nn.Module):
    """Names as in timm. `rows`: expansion, channels (as they are), repeats, stride and window of each stage."""

    def __init__(
        self,
        rows: Sequence[Sequence[int]],
        stem: int,
        head: int,
        *,
        same: bool,
        eps: float,
        in_channels: int = 3,
        classes: int = 10,
    ):
        super().__init__()
        self.conv_stem, self.bn1 = conv(in_channels, stem, 3, 2, same=same), nn.BatchNorm2d(stem, eps)
        channels, stages = stem, []
        for expansion, features, repeats, stride, window in rows:
            blocks = []
            for repeat in range(repeats):
                step = stride if repeat == 0 else 1
                blocks.append(TimmBlock(channels, features, step, expansion, window, same, eps))
                channels = features
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages)
        self.conv_head, self.bn2 = conv(channels, head, 1), nn.BatchNorm2d(head, eps)
        self.classifier = nn.Linear(head, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(nn.functional.relu6(self.bn1(self.conv_stem(x))))
        return self.classifier(nn.functional.relu6(self.bn2(self.conv_head(x))).mean((2, 3)))


def lite0_rows(channels: Sequence[int]) -> list[tuple[int, int, int, int, int]]:
    """EfficientNet-Lite0's stages with other numbers of channels."""
    shapes = ((1, 1, 1, 3), (6, 2, 2, 3), (6, 2, 2, 5), (6, 3, 2, 3), (6, 3, 1, 5), (6, 4, 2, 5), (6, 1, 1, 3))
    return [(t, c, n, s, window) for (t, n, s, window), c in zip(shapes, channels, strict=True)]

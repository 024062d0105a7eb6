"""The weight step of the same network in PyTorch: eager on the CPU, compiled and with autocast on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from _worker import Case, Facts, Run
from torch import nn

NUM_CLASSES = 10
# t, c, n, s of the CIFAR-10 variant.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def round_channels(channels: float) -> int:
    """Rounds channels as `fdjax.zoo.network` does, which cannot be imported without jax."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def conv_norm(
    channels: int, features: int, window: int, stride: int = 1, groups: int = 1, relu6: bool = True
) -> nn.Sequential:
    """Makes a convolution, batch norm, and (with `relu6`) ReLU6."""
    layers = [
        nn.Conv2d(channels, features, window, stride, window // 2, groups=groups, bias=False),
        nn.BatchNorm2d(features),
    ]
    return nn.Sequential(*layers, *([nn.ReLU6(inplace=True)] if relu6 else []))


class InvertedResidual(nn.Module):
    """Expand, depthwise, project, and the residual where shapes allow it."""

    def __init__(self, channels: int, features: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.layers = nn.Sequential(
            conv_norm(channels, wide, 1),
            conv_norm(wide, wide, 3, stride, wide),
            conv_norm(wide, features, 1, relu6=False),
        )
        self.residual = stride == 1 and channels == features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


def mobilenetv2_cifar10(width: float) -> nn.Sequential:
    """Makes the network that has this name in fdjax."""
    channels = round_channels(32 * width)
    layers: list[nn.Module] = [conv_norm(3, channels, 3)]
    for expansion, stage_channels, repeats, stride in STAGES:
        features = round_channels(stage_channels * width)
        for repeat in range(repeats):
            layers.append(InvertedResidual(channels, features, stride if repeat == 0 else 1, expansion))
            channels = features
    head = round_channels(1280 * max(1.0, width))
    layers += [conv_norm(channels, head, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(head, NUM_CLASSES)]
    return nn.Sequential(*layers)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, and a shortcut that pads new channels with zeros."""

    def __init__(self, channels: int, features: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, features, 3, stride, 1, bias=False),
            nn.BatchNorm2d(features),
            nn.ReLU(inplace=True),
            nn.Conv2d(features, features, 3, 1, 1, bias=False),
            nn.BatchNorm2d(features),
        )
        self.stride, self.missing = stride, features - channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layers(x)
        if self.missing:
            edges = (0, 0, 0, 0, self.missing // 2, self.missing - self.missing // 2)
            x = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], edges)
        return nn.functional.relu(x + y)


def resnet(repeats: int, width: float) -> nn.Sequential:
    """Makes the ResNet for CIFAR-10 with `repeats` blocks a stage."""
    first = round_channels(16 * width)
    channels, layers = first, [nn.Conv2d(3, first, 3, 1, 1, bias=False), nn.BatchNorm2d(first), nn.ReLU(inplace=True)]
    for stage in range(3):
        for repeat in range(repeats):
            features = first * 2**stage
            layers.append(BasicBlock(channels, features, 2 if stage and not repeat else 1))
            channels = features
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, NUM_CLASSES))


# By the names that the networks have in fdjax.
NETWORKS: dict[str, Callable[[float], nn.Sequential]] = {
    "mobilenetv2_cifar10": mobilenetv2_cifar10,
    "resnet20": lambda width: resnet(3, width),
    "resnet56": lambda width: resnet(9, width),
}


def weight_optimizer(network: nn.Module) -> torch.optim.Optimizer:
    """Makes Nesterov SGD with weight decay on kernels only, as in fdjax."""
    groups = [
        {"params": [p for p in network.parameters() if p.ndim > 1], "weight_decay": 4e-5},
        {"params": [p for p in network.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)


def prepare(case: Case) -> tuple[Run, Facts]:
    """Makes the network, one normalised batch in NHWC order, and the step."""
    torch.manual_seed(case.seed)
    torch.set_num_threads(case.threads)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    network = NETWORKS[case.network](case.width).to(device)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # Torch's stubs leave it out.
    optimizer = weight_optimizer(network)
    images = torch.randn(case.batch, 3, case.resolution, case.resolution, device=device)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(0, NUM_CLASSES, (case.batch,), device=device)
    # XLA, too, tries cuDNN's algorithms before it chooses one.
    torch.backends.cudnn.benchmark = on_gpu
    forward = torch.compile(network) if on_gpu else network

    def run(steps: int) -> float:
        loss = torch.zeros(())
        for _ in range(steps):
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=case.dtype == "bfloat16"):
                loss = nn.functional.cross_entropy(forward(images), labels)
            loss.backward()
            optimizer.step()
        if on_gpu:
            torch.cuda.synchronize()
        return loss.item()

    facts = {
        "compile_s": None,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
    }
    return run, facts

"""Writes networks of torchvision and timm with random weights as ONNX files.

    python results/own/export_networks.py --out FOLDER mobilenet_v2 mobilenetv4_conv_small ...

It needs torch, torchvision, timm and onnx. Batch norms get statistics as of a trained network, so that differences can
be seen, and are kept as nodes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
import torchvision

SIDE = 224


def network(name: str, seed: int) -> torch.nn.Module:
    """Makes a network of torchvision, or else of timm."""
    torch.manual_seed(seed)
    ours = name in torchvision.models.list_models()
    made = torchvision.models.get_model(name) if ours else timm.create_model(name, pretrained=False)
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.7, 1.3)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    return made.eval()


def main() -> None:
    """Writes NAME.onnx for each name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    flags.out.mkdir(parents=True, exist_ok=True)
    for name in flags.names:
        torch.onnx.export(
            network(name, flags.seed),
            (torch.zeros(1, 3, SIDE, SIDE),),
            str(flags.out / f"{name}.onnx"),
            dynamo=False,
            opset_version=17,
            input_names=["images"],
            dynamic_axes={"images": {0: "batch"}},
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
        )


if __name__ == "__main__":
    main()

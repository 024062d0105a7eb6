"""The quick start with the paper's own masks: both sides of every layer, all kept counts, and the paper's penalty.

    python train.py --config configs/quickstart_paper.py --workdir runs/quickstart_paper

The target is half of the MACs, transforms included, with 2x2 blocks on the 14x14 maps and one 7x7 block on the 7x7
maps, as in the last stage of the paper's ImageNet network. In XLA and ONNX Runtime the result is slower than the dense
network, in native code faster.

Expected: results/quickstart/README.md has measured accuracy and times.
"""

import dataclasses
from pathlib import Path

from fdjax.config import Config, LearnConfig, load_config


def get_config() -> Config:
    base = load_config(str(Path(__file__).with_name("quickstart.py")))
    return dataclasses.replace(
        base,
        learn=LearnConfig(epochs=4, block=2, block_by_map=((7, 7),), target_macs=0.5, engine_batch=8),
        refine=dataclasses.replace(base.refine, epochs=6),
    )

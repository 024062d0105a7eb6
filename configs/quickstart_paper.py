"""The quick start with the paper's own masks: both sides of every layer, all kept counts, its penalty.

    python train.py --config configs/quickstart_paper.py --workdir runs/quickstart_paper

Half of the MACs, transforms included, in 2x2 blocks on the 14x14 maps and one 7x7 block on the 7x7 maps, as the paper
does it on ImageNet's last stage. On a processor the result takes longer than the dense network.

Expected: measured figures and time in results/quickstart/README.md.
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

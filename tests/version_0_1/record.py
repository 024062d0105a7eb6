"""Writes expected.json beside itself: what fdjax 0.1 (commit 188c0ba) says of the checkpoints that lie here.

PYTHONPATH=CHECKOUT_OF_0.1 python tests/version_0_1/record.py
"""

import json
from pathlib import Path

import numpy as np

from fdjax.checkpoint import Checkpoints
from fdjax.data import normalize, open_dataset
from fdjax.training.restore import restore


def main() -> None:
    here, expected = Path(__file__).parent, {}
    for folder in sorted(here.glob("*/checkpoints")):
        (step,) = (int(path.name) for path in folder.iterdir() if path.name.isdigit())
        restored = restore(Checkpoints(folder), step)
        images = open_dataset(restored.config.data.name).test_images[:3]
        network, variables = restored.evaluation()
        logits = network.apply(
            variables, normalize(images, restored.spec.input_mean, restored.spec.input_std, np.float32), train=False
        )
        expected[folder.parent.name] = {
            "step": step,
            "macs": restored.macs().to_dict(),
            "released": restored.done.released,
            "logits": np.asarray(logits, np.float64).round(6).tolist(),
        }
    (here / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()

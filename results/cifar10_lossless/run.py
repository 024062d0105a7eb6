"""Makes all runs of this study in the order of their importance, one after the other; given again, it goes on.

    python results/cifar10_lossless/run.py --data DIR --workdir runs/cifar10_lossless [--seeds 0 1] [--jobs 1]

DIR is CIFAR-10 as a folder of pictures. For each seed it does sweep.py and then the rows with random channels, which
`fdjax prune` draws. Logs are beside the runs. A dense network that is there already may be copied to
runs/cifar10_lossless/dense_seed0 before. To end it, interrupt it (Ctrl-C) or end this process.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[1:1] = [str(HERE.parent), str(HERE.parents[1])]

import sweep  # noqa: E402
from studies import ROOT, call, prune_then_refine  # noqa: E402

from fdjax.experiments.settings import as_flags  # noqa: E402

CONFIG = str(ROOT / "configs" / "cifar10_mobilenetv2.py")


def main() -> int:
    """Makes the runs; returns 1 if some have failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as a folder of pictures")
    parser.add_argument("--workdir", type=Path, required=True, help="where the runs lie")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--jobs", type=int, default=1, help="runs of the sweep at a time")
    flags = parser.parse_args()
    data, runs, done = str(flags.data.resolve()), flags.workdir.resolve(), True
    for seed in flags.seeds:
        os.environ.update(CIFAR10=data, SEEDS=str(seed))
        command = ["-m", "fdjax", "sweep", "--config", str(HERE / "sweep.py"), "--workdir", str(runs)]
        done &= call([*command, "--jobs", str(flags.jobs)], runs / "sweep.log") == 0
        dense = str(runs / f"dense_seed{sweep.DENSE_OF[seed]}")
        # As many epochs as masks and refinement have together.
        epochs = {"refine.epochs": sweep.LEARN_EPOCHS + sweep.REFINE_EPOCHS, "seed": seed, "data.path": data}
        refine = as_flags({**sweep.ALL, **sweep.REFINE, "phases": ("refine",), **epochs})
        for target in sweep.MAC_TARGETS:
            prune = ["--checkpoint", dense, "--method", "random_channel", "--tied", "--block", "2", "--data-path", data]
            done &= prune_then_refine(
                runs / f"random_{target}_seed{seed}",
                [*prune, "--target-macs", str(target)],
                ["--config", CONFIG, *refine],
            )
    return int(not done)


if __name__ == "__main__":
    sys.exit(main())

"""Makes all runs of this study in the order of their importance, one after the other; given again, it goes on.

    python results/filters_lossless/run.py --weights resnet56-4bfd9763.th --data DIR --workdir runs/filters [--seeds 0]
    python results/filters_lossless/run.py --network resnet20 --weights resnet20-12fca82f.th --epochs 4 --targets 0.5 \
        --data DIR --workdir runs/filters20

DIR is CIFAR-10 as a folder of pictures. Filters of the public network are removed by each score at each target, and the
network is refined; the control is refined as long without it. Logs are beside the runs. To end it, interrupt it
(Ctrl-C) or end this process.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[1:1] = [str(HERE.parent), str(HERE.parents[1])]

from studies import ROOT, call, is_finished, prune_then_refine  # noqa: E402

LEARNING_RATE = 0.02
METHODS = ("fpwt", "l1", "random", "thinet", "dct")
CONFIG = ["--config", str(ROOT / "configs" / "cifar10_resnet110.py")]
REFINE = [
    *("--phases", "refine", "--refine.learning-rate", str(LEARNING_RATE)),
    *("--refine.schedule", "cosine", "--refine.weight-decay", "1e-4", "--model.padding", "torch"),
    *("--checkpoint.evaluate-every-epochs", "5", "--checkpoint.no-time"),
]


def main() -> int:
    """Makes the runs; returns 1 if some have failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="the public weights, a state dict")
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as a folder of pictures")
    parser.add_argument("--workdir", type=Path, required=True, help="where the runs lie")
    parser.add_argument(
        "--network", choices=("resnet20", "resnet56"), default="resnet56", help="whose weights they are"
    )
    parser.add_argument("--epochs", type=int, default=10, help="epochs of refinement, of the control too")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.5, 0.4], help="MACs over the whole network's")
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS), help="scores of filters")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    flags = parser.parse_args()
    runs, weights = flags.workdir.resolve(), str(Path(flags.weights).resolve())
    config = [*CONFIG, "--model.name", flags.network, "--data.name", "folder", "--data.path", str(flags.data.resolve())]
    dense = runs / "imported"
    # Written in one move, the last of the import.
    if not (dense / "import.json").is_file():
        shutil.rmtree(dense, ignore_errors=True)
        given = ["--format", "torchvision", "--weights", weights, "--out", str(dense)]
        if call(["-m", "fdjax", "import", *config, *given], runs / "imported.txt"):
            return 1
    done = True
    for seed in flags.seeds:
        refine = [*config, *REFINE, "--refine.epochs", str(flags.epochs), "--seed", str(seed)]
        control = runs / f"control_seed{seed}"
        if not is_finished(control):
            call(["train.py", *refine, "--workdir", str(control), "--init", str(dense)], runs / f"{control.name}.txt")
        done &= is_finished(control)
        for target in flags.targets:
            for method in flags.methods:
                prune = ["--checkpoint", str(dense), "--method", method, "--target-macs", str(target)]
                done &= prune_then_refine(runs / f"{method}_{target}_seed{seed}", prune, refine)
    return int(not done)


if __name__ == "__main__":
    sys.exit(main())

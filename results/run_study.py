"""Makes all runs of a study in the order of their importance, one after the other; given again, it goes on.

    python results/run_study.py cifar10_lossless --data DIR --workdir runs/cifar10_lossless [--seeds 0 1] [--jobs 1]

A study is a folder cifar10_... here with a sweep.py. DIR is CIFAR-10 as a folder of pictures. For each seed it does the
sweep and then the rows with random channels, which `fdjax prune` draws. Logs are beside the runs. A dense network that
is there already may be copied to WORKDIR/dense_seed0 before. To end it, interrupt it (Ctrl-C) or end this process.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

from studies import ROOT, call, is_finished, prune_then_refine

from fdjax.config.settings import as_flags

HERE = Path(__file__).resolve().parent
STUDIES = sorted(file.parent.name for file in HERE.glob("cifar10_*/sweep.py"))


def load_study(name: str) -> ModuleType:
    """Loads a study's sweep.py, by which all that differs between studies is told."""
    specification = importlib.util.spec_from_file_location(f"{name}_sweep", HERE / name / "sweep.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def main() -> int:
    """Makes the runs; returns 1 if some have failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as a folder of pictures")
    parser.add_argument("--workdir", type=Path, required=True, help="where the runs lie")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--jobs", type=int, default=1, help="runs of the sweep at a time")
    flags = parser.parse_args()
    data, runs, done = str(flags.data.resolve()), flags.workdir.resolve(), True
    os.environ["CIFAR10"] = data
    sweep = load_study(flags.study)
    for seed in flags.seeds:
        os.environ["SEEDS"] = str(seed)
        command = ["-m", "fdjax", "sweep", "--config", str(HERE / flags.study / "sweep.py"), "--workdir", str(runs)]
        done &= call([*command, "--jobs", str(flags.jobs)], runs / "sweep.log") == 0
        dense = str(runs / f"dense_seed{sweep.DENSE_OF[seed]}")
        if not is_finished(Path(dense)):
            print(f"{dense} is not finished, and no row can start from it: see {runs / 'sweep.log'}", flush=True)
            return 1
        # As many epochs as masks and refinement have together.
        epochs = {"refine.epochs": sweep.LEARN_EPOCHS + sweep.REFINE_EPOCHS, "seed": seed}
        refine = as_flags({**sweep.ALL, **sweep.REFINE, "phases": ("refine",), **epochs})
        for target in sweep.MAC_TARGETS:
            prune = ["--checkpoint", dense, "--method", "random_channel", "--tied", "--block", "2", "--data-path", data]
            done &= prune_then_refine(
                runs / f"random_{target}_seed{seed}",
                [*prune, "--target-macs", str(target)],
                ["--config", str(ROOT / sweep.CONFIG), *refine],
            )
    return int(not done)


if __name__ == "__main__":
    sys.exit(main())

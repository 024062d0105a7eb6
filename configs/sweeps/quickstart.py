"""The quick start at several targets: one dense network, pruned to 0.75, 0.5 and 0.35 of its MACs.

    fdjax sweep --config configs/sweeps/quickstart.py --workdir runs/quickstart_sweep

The dense network is trained once; the others start from it and learn masks and refine as configs/quickstart.py does.
`--jobs 2` does two of them at a time.
"""

from fdjax.experiments.sweep import Sweep, SweepRun


def get_sweep() -> Sweep:
    return Sweep(
        config="../quickstart.py",
        runs=(SweepRun(name="dense", settings={"phases": ("pretrain",)}),),
        grid={"learn.target_macs": (0.75, 0.5, 0.35)},
        init="dense",
    )

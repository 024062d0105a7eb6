"""The quick start at several targets: one dense network, pruned to 0.75, 0.5 and 0.35 of its MACs.

    fdjax sweep --config configs/sweeps/quickstart.py --workdir runs/quickstart_sweep

The dense network is trained once. The other runs start from it, and learn masks and refine as in configs/quickstart.py.
`--jobs 2` runs two of them at a time.
"""

from fdjax.experiments.sweep import Sweep, SweepRun


def get_sweep() -> Sweep:
    return Sweep(
        config="../quickstart.py",
        runs=(SweepRun(name="dense", settings={"phases": ("pretrain",)}),),
        grid={"learn.target_macs": (0.75, 0.5, 0.35)},
        init="dense",
    )

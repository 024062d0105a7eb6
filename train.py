"""Trains and prunes a network: python train.py --config configs/NAME.py --workdir DIR [--learn.target-macs 0.5 ...]"""

from fdjax import runtime
from fdjax.commands.train import train_command

if __name__ == "__main__":
    runtime.setup()
    raise SystemExit(train_command())

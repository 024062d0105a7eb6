"""Trains and prunes a network: python train.py --config configs/NAME.py --workdir DIR [--learn.target-macs 0.5 ...]"""

from fdjax import runtime

if __name__ == "__main__":
    runtime.setup()

    from fdjax.commands import train_command

    raise SystemExit(train_command())

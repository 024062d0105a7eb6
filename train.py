"""Trains and prunes a network: python train.py --config configs/NAME.py --workdir DIR [--learn.target-macs 0.5 ...]"""

from fdjax import runtime
from fdjax.commands.train import carry_out, read_flags
from fdjax.errors import reports_user_errors


@reports_user_errors
def main() -> int:
    """Trains as the flags ask for, and returns the exit status."""
    asked = read_flags()
    # This loads jax, for which the message about a wrong flag does not wait.
    from fdjax.training.run import train

    return carry_out(asked, train)


if __name__ == "__main__":
    runtime.setup()
    raise SystemExit(main())

"""The `fdjax` command: sets up the process, then hands over to `fdjax.commands`."""

from __future__ import annotations

from fdjax import runtime


def main() -> int:
    """Entry point of the installed `fdjax` command."""
    runtime.setup()
    from fdjax.commands import main as command

    return command()

"""Runs the `fdjax` command as `python -m fdjax`."""

from fdjax.commands.main import main

if __name__ == "__main__":
    raise SystemExit(main())

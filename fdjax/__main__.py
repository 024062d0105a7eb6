"""`python -m fdjax` is the `fdjax` command."""

from fdjax.commands.main import main

if __name__ == "__main__":
    raise SystemExit(main())

"""`python -m fdjax` is the `fdjax` command."""

from fdjax.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

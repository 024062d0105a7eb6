"""Evaluates a saved checkpoint: python eval.py --checkpoint DIR [--json FILE]"""

from fdjax import runtime
from fdjax.commands.evaluate import eval_command

if __name__ == "__main__":
    runtime.setup()
    raise SystemExit(eval_command())

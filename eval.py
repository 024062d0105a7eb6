"""Evaluates a saved checkpoint: python eval.py --checkpoint DIR [--json FILE]"""

from fdjax import runtime

if __name__ == "__main__":
    runtime.setup()

    from fdjax.commands import eval_command

    raise SystemExit(eval_command())

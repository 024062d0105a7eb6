"""`eval.py` and `fdjax eval`: evaluate a checkpoint or a frozen network."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from fdjax.commands.arguments import parse_arguments
from fdjax.commands.output_files import check_json_target, write_report
from fdjax.errors import UserError, reports_user_errors


@dataclasses.dataclass(kw_only=True)
class EvalArguments:
    """Evaluates a checkpoint, or a frozen network, on the test set of its run."""

    checkpoint: str | None = None
    """Workdir of a run, its checkpoints folder, or the folder of one step."""
    frozen: str | None = None
    """Directory of a frozen network, as fdjax freeze writes it, in place of a checkpoint."""
    which: str = "latest"
    """Checkpoint step: latest, best (on the validation share) or a number."""
    split: Literal["test", "validation"] = "test"
    """Images to evaluate on: the test set, or the validation share that the run held out."""
    data_path: str | None = None
    """Directory of the run's data set, if it has moved."""
    by_class: bool = False
    """Also print the accuracy of each class, and what its images are most often taken for (up to 50 classes)."""
    json: str | None = None
    """File to write the results to as JSON; up to 50 classes it holds the confusion matrix."""


@reports_user_errors
def eval_command(arguments: Sequence[str] | None = None, program: str = "eval.py") -> int:
    """Runs `eval.py` or `fdjax eval` and returns its exit status."""
    parsed = parse_arguments(EvalArguments, program, arguments)
    check_json_target(parsed.json)
    if (parsed.checkpoint is None) == (parsed.frozen is None):
        raise UserError("give either --checkpoint DIR or --frozen DIR")
    if parsed.frozen is not None:
        if parsed.which != "latest" or parsed.split != "test":
            raise UserError("a frozen network is evaluated on the test set: give no --which or --split beside --frozen")
        from fdjax.checkpoints.freeze import evaluate_frozen
        from fdjax.frozen import load

        summary = evaluate_frozen(load(parsed.frozen), parsed.data_path)
        _print(summary, parsed.by_class)
        write_report(parsed.json, summary)
        return 0
    assert parsed.checkpoint is not None
    from fdjax.training.restore import evaluate_restored, open_checkpoint

    checkpoints, step, restored = open_checkpoint(parsed.checkpoint, parsed.which)
    print(f"step {step:,} of {checkpoints.folder.parent}: {restored.phase.name}, step {restored.phase_step:,}")
    summary = evaluate_restored(restored, parsed.split, parsed.data_path)
    _print(summary, parsed.by_class)
    write_report(parsed.json, summary)
    return 0


def _print(summary: dict[str, Any], by_class: bool) -> None:
    from fdjax.reports.classes import class_lines
    from fdjax.training.summary import describe

    print(describe(summary))
    for line in class_lines(summary) if by_class else ():
        print(line)

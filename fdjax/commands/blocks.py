"""`fdjax blocks`: chooses the block size of each layer."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from typing import Any, Literal

import tyro

from fdjax.commands.arguments import flag_value, parse_arguments, restored_run
from fdjax.commands.output_files import check_json_target, write_report


@dataclasses.dataclass(kw_only=True)
class BlocksArguments:
    """Chooses the block size of each layer of a pretrained network: the one that loses least energy for its MACs."""

    checkpoint: str
    """Workdir, checkpoints folder, or folder of one step, of a run that has not trained weights under masks."""
    candidates: tuple[int, ...] = (1, 2, 4)
    """Block sizes to choose from, 1 to 16 pixels; a layer skips those that are larger than its map."""
    target_macs: float | None = None
    """MAC ratio (macs.ratio) at which block sizes are compared, above 0 to 1 (None: the run's)."""
    tied: bool = False
    """Tie masks, as learn.tied does (default: as in the run's config); the two layers of a residual block then have one
    block size."""
    levels: str = "all"
    """Levels of the masks, as in learn.levels (default: as in the run's config)."""
    sides: Literal["both", "input", "output"] = "both"
    """Sides that have masks, as in learn.sides (default: as in the run's config)."""
    images: int = 512
    """Number of training images to measure energies on (drawn with the run's seed)."""
    data_path: str | None = None
    """Directory of the run's data set, if it has moved."""
    json: str | None = None
    """File to write the choice to as JSON."""


def blocks_command(arguments: Sequence[str]) -> int:
    """Runs `fdjax blocks` and returns its exit status."""
    path = flag_value(arguments, "fdjax blocks", "--checkpoint")
    required: Any = tyro.MISSING
    restored, defaults = None, BlocksArguments(checkpoint=required)
    if path is not None:
        restored = restored_run(path)
        own = restored.config.learn
        defaults = BlocksArguments(checkpoint=path, tied=own.tied, levels=own.levels, sides=own.sides)
    parsed = parse_arguments(BlocksArguments, "fdjax blocks", arguments, defaults)
    assert restored is not None  # parsing fails without --checkpoint
    check_json_target(parsed.json)
    learn = dataclasses.replace(restored.config.learn, tied=parsed.tied, levels=parsed.levels, sides=parsed.sides)
    if parsed.target_macs is not None:
        learn = dataclasses.replace(learn, target_macs=parsed.target_macs, lambda_=None)
    from fdjax.checkpoints.calibrate import choose_blocks_of
    from fdjax.reports import blocks_table

    report = choose_blocks_of(restored, learn, parsed.candidates, parsed.images, parsed.data_path)
    print(blocks_table(report))
    print(f"{report['macs']['ratio']:.3f}x MACs, measured on {report['num_images']:,} training images; for train.py:")
    print(shlex.join(report["flags"]))
    write_report(parsed.json, report)
    return 0

"""`fdjax blocks`: the block of each layer."""

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
    """Chooses the block of each layer of a pretrained network: the one that loses the least energy for its MACs."""

    checkpoint: str
    """A workdir, its checkpoints folder, or one step's folder, of a run that has not trained weights under masks."""
    candidates: tuple[int, ...] = (1, 2, 4)
    """Blocks to choose from, 1 to 16; those larger than a layer's map are passed over there."""
    target_macs: float | None = None
    """The MAC ratio (macs.ratio) at which blocks are compared, above 0 to 1 (None: the run's)."""
    tied: bool = False
    """As learn.tied, and by default as in the run's config: a residual block's two layers then get one block."""
    levels: str = "all"
    """As learn.levels, likewise."""
    sides: Literal["both", "input", "output"] = "both"
    """As learn.sides, likewise."""
    images: int = 512
    """How many training images to look at (seeded)."""
    data_path: str | None = None
    """Where the run's data set lies now, if it has moved."""
    json: str | None = None
    """Write the choice to this file too."""


def blocks_command(arguments: Sequence[str]) -> int:
    """`fdjax blocks`."""
    path = flag_value(arguments, "fdjax blocks", "--checkpoint")
    required: Any = tyro.MISSING
    restored, defaults = None, BlocksArguments(checkpoint=required)
    if path is not None:
        restored = restored_run(path)
        own = restored.config.learn
        defaults = BlocksArguments(checkpoint=path, tied=own.tied, levels=own.levels, sides=own.sides)
    parsed = parse_arguments(BlocksArguments, "fdjax blocks", arguments, defaults)
    assert restored is not None  # without --checkpoint parsing has failed
    check_json_target(parsed.json)
    learn = dataclasses.replace(restored.config.learn, tied=parsed.tied, levels=parsed.levels, sides=parsed.sides)
    if parsed.target_macs is not None:
        learn = dataclasses.replace(learn, target_macs=parsed.target_macs, lambda_=None)
    from fdjax.checkpoints.calibrate import choose_blocks_of
    from fdjax.reports import blocks_table

    report = choose_blocks_of(restored, learn, parsed.candidates, parsed.images, parsed.data_path)
    print(blocks_table(report))
    print(f"{report['macs']['ratio']:.3f}x MACs, by {report['num_images']:,} training images; for train.py:")
    print(shlex.join(report["flags"]))
    write_report(parsed.json, report)
    return 0

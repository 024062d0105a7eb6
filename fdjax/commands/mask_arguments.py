"""The arguments of commands that prune a trained network by what is measured of it."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import tyro

from fdjax.commands.arguments import restored_run

if TYPE_CHECKING:
    from fdjax.checkpoints.given_masks import MeasuredOn
    from fdjax.config import LearnConfig
    from fdjax.training.restore import Restored


@dataclasses.dataclass(kw_only=True)
class MaskArguments:
    """A checkpoint, the masks to give it, and what to measure them on."""

    checkpoint: str
    """A workdir, its checkpoints folder, or one step's folder, of a run that has not trained weights under masks."""
    which: str = "latest"
    """latest, best (on the validation share) or a step number."""
    scope: Literal["layer", "global"] = "layer"
    """layer: the same share of every masked side goes. global: one threshold for all of them."""
    block: int | None = None
    """Side of the block in all layers, 1 to 16 (None: as in the run's config)."""
    tied: bool = False
    """As learn.tied, and by default as in the run's config: one mask for a wide channel of a residual block."""
    sides: Literal["both", "input", "output"] = "both"
    """As learn.sides, likewise."""
    images: int = 512
    """How many training images to measure coefficients on (seeded)."""
    eval_limit: int | None = None
    """How many test images to take the accuracy on (seeded; None: all)."""
    data_path: str | None = None
    """Where the run's data set lies now, if it has moved."""
    calibration: str | None = None
    """A folder of pictures (no labels needed) to measure coefficients on, in place of the run's training images."""
    agreement: str | None = None
    """A folder of pictures on which the pruned network is compared with the unpruned one, in place of the accuracy on
    the test set: the share of them that it gives the same class."""
    json: str | None = None
    """Write the report to this file too."""

    def measured_on(self) -> MeasuredOn:
        """The images that the flags ask for."""
        from fdjax.checkpoints.given_masks import MeasuredOn

        return MeasuredOn(
            num_images=self.images,
            eval_limit=self.eval_limit,
            data_path=self.data_path,
            calibration=self.calibration,
            agreement=self.agreement,
        )

    def mask_settings(self, restored: Restored) -> LearnConfig:
        """The run's, with these in their place."""
        learn = dataclasses.replace(restored.config.learn, tied=self.tied, sides=self.sides)
        if not self.tied:
            learn = dataclasses.replace(learn, group_multiple=1)
        if self.block is not None:
            learn = dataclasses.replace(learn, block=self.block, block_by_map=(), block_by_layer=())
        return learn


def restored_checkpoint(arguments: Sequence[str]) -> Restored | None:
    """The checkpoint that --checkpoint and --which name, found before the flags whose defaults it gives."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--checkpoint")
    parser.add_argument("--which", default="latest")
    found = parser.parse_known_args(list(arguments))[0]
    return None if found.checkpoint is None else restored_run(found.checkpoint, found.which)


def mask_defaults(restored: Restored | None) -> dict[str, Any]:
    """Defaults of `MaskArguments`, those of the run in which `restored` was trained."""
    if restored is None:
        return {"checkpoint": tyro.MISSING}
    learn = restored.config.learn
    return {"checkpoint": tyro.MISSING, "tied": learn.tied, "sides": learn.sides}

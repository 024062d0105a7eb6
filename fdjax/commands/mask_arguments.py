"""Arguments that `fdjax profile` and `fdjax prune` share: both prune a trained network by its measured energies."""

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
    """A checkpoint, the masks to give it, and the images to measure on."""

    checkpoint: str
    """Workdir, checkpoints folder, or folder of one step, of a run that has not trained weights under masks."""
    which: str = "latest"
    """Checkpoint step: latest, best (on the validation share) or a number."""
    scope: Literal["layer", "global"] = "layer"
    """Scope of the threshold. layer: every masked side loses the same share. global: one threshold for all sides."""
    block: int | None = None
    """Side of the DCT block in all layers, 1 to 16 pixels (None: as in the run's config)."""
    tied: bool = False
    """Tie masks, as learn.tied does: one mask for a wide channel of a residual block (default: as in the run's
    config)."""
    sides: Literal["both", "input", "output"] = "both"
    """Sides that have masks, as in learn.sides (default: as in the run's config)."""
    images: int = 512
    """Number of training images to measure coefficients on (drawn with the run's seed)."""
    recalibrate: bool = True
    """Correct the statistics of batch norm for what is pruned, on the same images."""
    eval_limit: int | None = None
    """Number of test images to measure the accuracy on, drawn with the run's seed (None: all)."""
    data_path: str | None = None
    """Directory of the run's data set, if it has moved."""
    calibration: str | None = None
    """Folder of pictures, without labels, to measure coefficients on in place of the run's training images."""
    agreement: str | None = None
    """Folder of pictures, without labels, on which the pruned network is compared with the unpruned one: the share
    whose predicted class is the same is reported in place of the accuracy on the test set."""
    json: str | None = None
    """File to write the report to as JSON."""

    def measured_on(self) -> MeasuredOn:
        """Returns the images that the flags ask for."""
        from fdjax.checkpoints.given_masks import MeasuredOn

        return MeasuredOn(
            num_images=self.images,
            eval_limit=self.eval_limit,
            data_path=self.data_path,
            calibration=self.calibration,
            agreement=self.agreement,
            recalibrate=self.recalibrate,
        )

    def mask_settings(self, restored: Restored) -> LearnConfig:
        """Returns the run's settings for masks, with the values of these flags."""
        learn = dataclasses.replace(restored.config.learn, tied=self.tied, sides=self.sides)
        if self.block is not None:
            learn = dataclasses.replace(learn, block=self.block, block_by_map=(), block_by_layer=())
        return learn


def restored_checkpoint(arguments: Sequence[str]) -> Restored | None:
    """Restores the checkpoint of --checkpoint and --which; flags that are parsed later have their defaults from it.

    Returns:
      The checkpoint; None without --checkpoint.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--checkpoint")
    parser.add_argument("--which", default="latest")
    found = parser.parse_known_args(list(arguments))[0]
    return None if found.checkpoint is None else restored_run(found.checkpoint, found.which)


def mask_defaults(restored: Restored | None) -> dict[str, Any]:
    """Returns the defaults of `MaskArguments`: those of the run in which `restored` was trained."""
    if restored is None:
        return {"checkpoint": tyro.MISSING}
    learn = restored.config.learn
    return {"checkpoint": tyro.MISSING, "tied": learn.tied, "sides": learn.sides}

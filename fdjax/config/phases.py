"""The phases of a run: what each trains, how, and for how long."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import tyro

from fdjax.config.checked import Checked

PHASES = ("pretrain", "learn", "alternate", "refine", "scratch")
MASK_PHASES = ("learn", "alternate")
HARD_PHASES = ("refine", "scratch")
# Numbers of channels that an engine takes at once.
_WIDTHS = {"xla": 8, "native": 8, "onnxruntime": 16, "openvino": 16}
# Steps of a phase, and epochs: a step's number is a 32-bit integer.
MOST_STEPS, LONGEST_PHASE = 1_000_000_000, 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightPhaseConfig(Checked):
    """A phase that trains weights."""

    epochs: float = 10.0
    """Length in epochs (fractions allowed)."""
    steps: int | None = None
    """Length in steps; overrides epochs."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd (Nesterov momentum) or adamw."""
    learning_rate: float = 0.1
    """Peak learning rate."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """After warm-up: cosine to zero, step (times step_factor at each of step_at), or constant."""
    step_at: tuple[float, ...] = (0.3, 0.6, 0.8)
    """For schedule=step: shares of the phase, 0 to 1, at which the rate falls."""
    step_factor: float = 0.2
    """For schedule=step: what the rate is multiplied by."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up from zero."""
    body_rate: float = 1.0
    """The learning rate of all but the classifier, as a share of it, 0 to 1: below 1 for pretrained weights."""
    momentum: float = 0.9
    """Of sgd."""
    weight_decay: float = 4e-5
    """On kernels only (not on batch norm or biases)."""
    label_smoothing: float = 0.0
    """0 to below 1."""

    def _check(self) -> None:
        self._require(0 < self.epochs <= LONGEST_PHASE, "epochs", f"above 0 and at most {LONGEST_PHASE:,}")
        self._require(
            self.steps is None or 1 <= self.steps <= MOST_STEPS, "steps", f"from 1 to {MOST_STEPS:,}, or None"
        )
        self._require(self.learning_rate > 0, "learning_rate", "above 0")
        self._require(0 <= self.body_rate <= 1, "body_rate", "a share from 0 to 1")
        self._require(0 <= self.momentum < 1, "momentum", "0 to below 1")
        self._require(self.weight_decay >= 0, "weight_decay", "0 or more")
        self._require(0 <= self.label_smoothing < 1, "label_smoothing", "0 to below 1")
        self._require(0 <= self.warmup_epochs <= LONGEST_PHASE, "warmup_epochs", f"from 0 to {LONGEST_PHASE:,}")
        self._require(self.step_factor > 0, "step_factor", "above 0")
        self._require(all(0 <= share <= 1 for share in self.step_at), "step_at", "shares from 0 to 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnConfig(Checked):
    """The phase that learns masks only. All but its length also holds for `alternate`."""

    epochs: float = 5.0
    """Length in epochs (fractions allowed)."""
    steps: int | None = None
    """Length in steps; overrides epochs."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """Of the masks. With adam a mask moves by about the learning rate a step, however large lambda is."""
    learning_rate: float = 0.1
    """Of the masks (with adam, begin with 0.002)."""
    momentum: float = 0.9
    """Of sgd."""
    sides: Literal["both", "input", "output"] = "both"
    """Which sides of a pointwise layer have masks."""
    include: tuple[str, ...] = ("*",)
    """Rules for layer names (* and ? as in file names): only layers that fit one of them can have masks."""
    exclude: tuple[str, ...] = ()
    """Likewise: layers that fit one of these have none and stay whole, as in --learn.exclude head 'block0[0-3]/*'."""
    tied: bool = False
    """One FCMask for a wide channel of a residual block (expand output, project input), none on its narrow sides."""
    levels: str = "all"
    """Kept counts that masks fade between and are rounded to: all, or a list such as 0,1,N."""
    group_multiple: int = 1
    """Round tied masks so that the channels of a block that keep a count are a multiple of this many. With target_time
    1 stands for what the engine likes: 8 (xla, native) or 16 (onnxruntime, openvino)."""
    block: int = 4
    """Side of the square DCT block in pixels, 1 to 16."""
    block_by_map: tuple[tuple[int, int], ...] = ()
    """Pairs of map side and block, where it differs: 14 2 7 7 gives 14x14 maps 2x2 blocks, 7x7 maps one 7x7 block."""
    block_by_layer: tuple[tuple[str, int], ...] = ()
    """Pairs of layer name and block, where it differs (names as `fdjax macs` prints them)."""
    penalty: Literal["fcmask", "macs"] = "fcmask"
    """fcmask: the paper's (sum over layers of mean |m|). macs: expected MACs by target_convention, over dense MACs;
    with a target_time, expected time over the dense network's."""
    target_macs: float | None = 0.5
    """The MAC ratio to reach (hard counts, after the gate, transforms in it), above 0 to 1; None: lambda as it is."""
    target_time: float | None = None
    """In place of target_macs: the share of the dense network's time to reach, on learn.engine, learn.engine_batch
    images at once, one thread; above 0 to 1. Needs tied masks with levels such as 0,1,N, or levels 0,N."""
    target_convention: Literal["total", "paper"] = "total"
    """What the target, the gate and expected MACs speak of: macs.ratio, or macs.paper_ratio."""
    ramp: float = 0.75
    """Share of the phase, above 0 to 1, by which the controller means to have reached the target."""
    lambda_: Annotated[float | None, tyro.conf.arg(name="lambda")] = None
    """Weight of the penalty. With a target it is only the start (None: chosen); without one it is needed."""
    gate: Literal["macs", "time", "none"] = "macs"
    """Before refinement, layers that are no cheaper pruned than whole are released. time: also those that are slower
    pruned, frozen and timed on this machine. none: keep all pruned."""
    engine: Literal["xla", "native", "onnxruntime", "openvino"] = "xla"
    """What the network is to run on: its clock decides where gate=time, and times the network at the end of the run."""
    engine_batch: int = 1
    """Images at once when it is timed."""

    def _check(self) -> None:
        self._require(0 < self.epochs <= LONGEST_PHASE, "epochs", f"above 0 and at most {LONGEST_PHASE:,}")
        self._require(
            self.steps is None or 1 <= self.steps <= MOST_STEPS, "steps", f"from 1 to {MOST_STEPS:,}, or None"
        )
        self._require(self.learning_rate > 0, "learning_rate", "above 0")
        self._require(0 <= self.momentum < 1, "momentum", "0 to below 1")
        self._require(
            self.target_macs is None or 0 < self.target_macs <= 1, "target_macs", "above 0 and at most 1, or None"
        )
        self._require(
            self.target_time is None or 0 < self.target_time <= 1, "target_time", "above 0 and at most 1, or None"
        )
        self._require(
            self.target_time is None or self.target_convention == "total",
            "target_convention",
            "'total' where there is a target_time",
        )
        self._require(
            self.lambda_ is None or self.lambda_ > 0 or (self.lambda_ == 0 and self.target_macs is None),
            "lambda_",
            "above 0 (0 only without a target), or None",
        )
        self._require(1 <= self.engine_batch <= 65_536, "engine_batch", "from 1 to 65,536")
        self._require(bool(self.include), "include", "at least one rule ('*' for all layers)")
        self._require(self.group_multiple >= 1, "group_multiple", "at least 1")
        self._require(
            self.group_multiple == 1 or self.tied, "group_multiple", "1 where masks are not tied (--learn.tied)"
        )
        self._require(0 < self.ramp <= 1, "ramp", "above 0 and at most 1")
        self._require(
            self.target_macs is not None or self.lambda_ is not None, "lambda_", "a number when target_macs is None"
        )
        for field, blocks in (
            ("block", [self.block]),
            ("block_by_map", [block for _, block in self.block_by_map]),
            ("block_by_layer", [block for _, block in self.block_by_layer]),
        ):
            self._require(all(1 <= block <= 16 for block in blocks), field, "blocks from 1 to 16")
        parts = [part.strip() for part in self.levels.split(",")]
        numbers = all(part == "N" or part.isdecimal() for part in parts)
        self._require(
            self.levels == "all" or (numbers and {"0", "N"} <= set(parts)),
            "levels",
            "'all', or kept counts separated by commas with 0 and N among them, such as '0,1,N'",
        )

    @property
    def multiple(self) -> int:
        """`group_multiple`, or what stands for 1."""
        if self.group_multiple == 1 and self.target_time is not None:
            return _WIDTHS[self.engine]
        return self.group_multiple

    @property
    def target(self) -> float | None:
        """Of time where there is one, else of MACs."""
        return self.target_macs if self.target_time is None else self.target_time

    @property
    def counts_below_whole(self) -> tuple[int, ...] | None:
        """`levels` without N, ascending; None when all kept counts are accepted."""
        if self.levels == "all":
            return None
        parts = (part.strip() for part in self.levels.split(","))
        return tuple(sorted({int(part) for part in parts if part != "N"}))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlternateConfig(WeightPhaseConfig):
    """The phase that learns masks and weights in turn (appendix A.1); mask settings are those of `learn`."""

    learning_rate: float = 0.01
    """Of the weights; lower than elsewhere: with batch norm frozen, 0.05 can undo a trained network in a few steps."""
    unit: Literal["epochs", "steps"] = "epochs"
    """What the two turns below are counted in."""
    mask_turn: int = 1
    """Length of a turn of mask learning."""
    weight_turn: int = 1
    """Length of a turn of weight learning."""
    free_batchnorm_fraction: float = 0.2
    """Last share of the phase, 0 to 1, in which batch norm uses and updates batch statistics; before, it is frozen."""

    def _check(self) -> None:
        super()._check()
        self._require(self.mask_turn >= 1, "mask_turn", "at least 1")
        self._require(self.weight_turn >= 1, "weight_turn", "at least 1")
        self._require(0 <= self.free_batchnorm_fraction <= 1, "free_batchnorm_fraction", "a share from 0 to 1")

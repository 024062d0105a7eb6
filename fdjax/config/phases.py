"""The phases of a run: what each of them trains, how, and for how long."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import tyro

from fdjax.config.checked import Checked

PHASES = ("pretrain", "learn", "alternate", "refine", "scratch")
MASK_PHASES = ("learn", "alternate")
HARD_PHASES = ("refine", "scratch")
# The number of channels that an engine processes at once.
_WIDTHS = {"xla": 8, "native": 8, "onnxruntime": 16, "openvino": 16}
# Limits on the steps and epochs of a phase; the number of a step is a 32-bit integer.
MOST_STEPS, LONGEST_PHASE = 1_000_000_000, 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightPhaseConfig(Checked):
    """A phase that trains weights."""

    epochs: float = 10.0
    """Length in epochs (fractions allowed)."""
    steps: int | None = None
    """Length in steps; overrides epochs."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """Optimizer: sgd (with Nesterov momentum) or adamw."""
    learning_rate: float = 0.1
    """Peak learning rate."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """Schedule of the learning rate after warm-up: cosine to zero, step (times step_factor at each of step_at), or
    constant."""
    step_at: tuple[float, ...] = (0.3, 0.6, 0.8)
    """Shares of the phase, 0 to 1, at which the learning rate falls, with schedule=step."""
    step_factor: float = 0.2
    """Factor by which the learning rate is multiplied each time, with schedule=step."""
    warmup_epochs: float = 0.0
    """Length of the linear warm-up from zero, in epochs."""
    body_rate: float = 1.0
    """Learning rate of all layers but the classifier, as a share of the learning rate, 0 to 1; below 1 for pretrained
    weights."""
    momentum: float = 0.9
    """Momentum of sgd, 0 to below 1."""
    weight_decay: float = 4e-5
    """Weight decay of kernels, 0 or more; batch norm and biases have none."""
    label_smoothing: float = 0.0
    """Label smoothing, 0 to below 1."""
    patience: int | None = None
    """Number of consecutive evaluations (checkpoint.evaluate_every_epochs) without a better validation accuracy after
    which the phase stops early, with its best weights (None: it does all its steps)."""

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
        self._require(self.patience is None or self.patience >= 1, "patience", "at least 1, or None")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnConfig(Checked):
    """The phase that learns masks only. All settings but its length also apply to `alternate`."""

    epochs: float = 5.0
    """Length in epochs (fractions allowed)."""
    steps: int | None = None
    """Length in steps; overrides epochs."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """Optimizer of the masks. With adam, a mask moves by about the learning rate per step, however large lambda is."""
    learning_rate: float = 0.1
    """Learning rate of the masks (with adam, start with 0.002)."""
    momentum: float = 0.9
    """Momentum of sgd, 0 to below 1."""
    sides: Literal["both", "input", "output"] = "both"
    """Sides of a pointwise layer that have masks."""
    include: tuple[str, ...] = ("*",)
    """Rules on layer names (* and ? as in file names); only layers that fit one of them can have masks."""
    exclude: tuple[str, ...] = ()
    """Rules on layer names; layers that fit one of them have no masks and stay whole, as in --learn.exclude head
    'block0[0-3]/*'."""
    tied: bool = False
    """Tie the masks of a residual block: one FCMask per wide channel (expand output, project input), none on the narrow
    sides."""
    levels: str = "all"
    """Kept counts that masks fade between and are rounded to: all, or a list such as 0,1,N."""
    group_multiple: int = 1
    """Multiple to which the number of channels with each kept count or more is rounded, for every mask. With
    target_time, 1 means the engine's preferred multiple: 8 (xla, native) or 16 (onnxruntime, openvino)."""
    block: int = 4
    """Side of the square DCT block in pixels, 1 to 16."""
    block_by_map: tuple[tuple[int, int], ...] = ()
    """Pairs of map side and block, where the block differs: 14 2 7 7 gives 14x14 maps 2x2 blocks, and 7x7 maps one 7x7
    block."""
    block_by_layer: tuple[tuple[str, int], ...] = ()
    """Pairs of layer name and block, where the block differs (names as `fdjax macs` prints them)."""
    penalty: Literal["fcmask", "macs"] = "fcmask"
    """Penalty on the masks. fcmask: the paper's, the sum over layers of mean |m|. macs: expected MACs over dense MACs,
    counted by target_convention; with a target_time, expected time over the dense network's."""
    target_macs: float | None = 0.5
    """MAC ratio to reach, of hard masks after the gate, transforms included, above 0 to 1; None: lambda stays
    constant."""
    target_time: float | None = None
    """Share of the dense network's time to reach, above 0 to 1, in place of target_macs; timed on learn.engine with
    learn.engine_batch images and one thread. Needs levels 0,N, or tied masks with levels such as 0,1,N."""
    target_convention: Literal["total", "paper"] = "total"
    """Convention of the target, the gate and expected MACs. total: macs.ratio. paper: macs.paper_ratio."""
    approach: Literal["lambda", "aim"] = "lambda"
    """How a target is approached. lambda: a controller changes the weight of the penalty. aim: the penalty is lambda
    times the squared excess of the expected cost over an aim, which falls linearly to the target by the end of ramp.
    In short phases it works with optimizer=adam only."""
    ramp: float = 0.75
    """Share of the phase, above 0 to 1, by the end of which the controller or the aim reaches the target."""
    sharpen: float = 0.0
    """Share of its way to the nearest level, 0 to 1, that a step moves each mask at the end of the phase, so that
    rounding changes little. It rises from 0 at the end of ramp, and with approach=aim waits until the aim is met."""
    lambda_: Annotated[float | None, tyro.conf.arg(name="lambda")] = None
    """Weight of the penalty. With a target, it is only the initial value, or with approach=aim the constant value
    (None: chosen automatically). Without a target, it is required."""
    gate: Literal["macs", "time", "none"] = "macs"
    """Gate before refinement, which releases layers. macs: those that are no cheaper pruned than whole. time: also
    those that are slower pruned, when frozen and timed on this machine. none: releases no layer."""
    engine: Literal["xla", "native", "onnxruntime", "openvino"] = "xla"
    """Engine that the network is to run on. It is timed on this engine at the end of the run, and by gate=time."""
    engine_batch: int = 1
    """Images per call when the network is timed."""

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
            self.lambda_ is None or self.lambda_ > 0 or (self.lambda_ == 0 and self.target is None),
            "lambda_",
            "above 0 (0 only without a target), or None",
        )
        self._require(1 <= self.engine_batch <= 65_536, "engine_batch", "from 1 to 65,536")
        self._require(bool(self.include), "include", "at least one rule ('*' for all layers)")
        self._require(self.group_multiple >= 1, "group_multiple", "at least 1")
        self._require(
            self.approach == "lambda" or self.target is not None, "approach", "'lambda' where there is no target"
        )
        self._require(0 < self.ramp <= 1, "ramp", "above 0 and at most 1")
        self._require(0 <= self.sharpen <= 1, "sharpen", "0 to 1")
        self._require(
            self.target is not None or self.lambda_ is not None, "lambda_", "a number when target_macs is None"
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
        """`group_multiple`, or the engine's preferred multiple where 1 means that."""
        if self.group_multiple == 1 and self.target_time is not None:
            return _WIDTHS[self.engine]
        return self.group_multiple

    @property
    def target(self) -> float | None:
        """The target: of time if there is one, or else of MACs."""
        return self.target_macs if self.target_time is None else self.target_time

    @property
    def counts_below_whole(self) -> tuple[int, ...] | None:
        """`levels` without N, in ascending order; None if all kept counts are allowed."""
        if self.levels == "all":
            return None
        parts = (part.strip() for part in self.levels.split(","))
        return tuple(sorted({int(part) for part in parts if part != "N"}))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlternateConfig(WeightPhaseConfig):
    """The phase that learns masks and weights in turn (appendix A.1), with the mask settings of `learn`."""

    learning_rate: float = 0.01
    """Peak learning rate of the weights. It is lower than in other phases, because with frozen batch norm 0.05 can
    ruin a trained network in a few steps."""
    unit: Literal["epochs", "steps"] = "epochs"
    """Unit of mask_turn and weight_turn."""
    mask_turn: int = 1
    """Length of a turn of mask learning, in `unit`."""
    weight_turn: int = 1
    """Length of a turn of weight learning, in `unit`."""
    free_batchnorm_fraction: float = 0.2
    """Last share of the phase, 0 to 1, in which batch norm uses and updates batch statistics; it is frozen before."""

    def _check(self) -> None:
        super()._check()
        self._require(self.patience is None, "patience", "None, because its masks change while it trains")
        self._require(self.mask_turn >= 1, "mask_turn", "at least 1")
        self._require(self.weight_turn >= 1, "weight_turn", "at least 1")
        self._require(0 <= self.free_batchnorm_fraction <= 1, "free_batchnorm_fraction", "a share from 0 to 1")

"""What a run is asked to do: frozen dataclasses, validated when they are made.

A config file is Python with `get_config() -> Config`. Every field can be overridden by a flag of `train.py`
(`--learn.target-macs 0.5`). Field docstrings are the flags' help texts.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import typeguard
import tyro

from fdjax.errors import UserError, suggestion
from fdjax.python_file import load_made

PHASES = ("pretrain", "learn", "alternate", "refine", "scratch")
MASK_PHASES = ("learn", "alternate")
HARD_PHASES = ("refine", "scratch")


class _Checked:
    """Checks every field's type when an instance is made; subclasses add `_check` for values."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            hint = hints[field.name]
            boolean_number = isinstance(value, bool) and hint is not bool
            try:
                typeguard.check_type(value, hint)
            except typeguard.TypeCheckError:
                boolean_number = True
            if boolean_number:
                wanted = getattr(hint, "__name__", None) if isinstance(hint, type) else str(hint)
                wanted = (wanted or str(hint)).replace("typing.", "")
                raise UserError(f"{type(self).__name__}.{field.name} must be {wanted}, got {value!r}")
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{type(self).__name__}.{field.name} must be a finite number, got {value!r}")
        self._check()

    def _check(self) -> None:
        pass

    def _require(self, condition: bool, field: str, accepted: str) -> None:
        if not condition:
            raise UserError(f"{type(self).__name__}.{field} must be {accepted}, got {getattr(self, field)!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(_Checked):
    """Which images, and how they are batched and augmented."""

    name: str = "fashion_mnist_subset"
    """fashion_mnist_subset (embedded), folder or prepared (need path), or the name of a TFDS set (cifar10, ...)."""
    path: str | None = None
    """folder: the directory with train/<class>/* and test/<class>/*. prepared: the directory of one TFDS set. A TFDS
    name: TFDS's data directory (default: TFDS's own)."""
    image_size: int | None = None
    """Pixels: images are resized and cropped to this square (folder and TFDS; default: as they are)."""
    validation: float = 0.0
    """Share of the training set, 0 to below 1, held out (seeded, class by class) to choose the best checkpoint."""
    train_limit: int | None = None
    """Use only this many training images (seeded, the same share of each class); None: all."""
    loading: Literal["memory", "stream"] = "memory"
    """memory: all images are decoded once and held in memory. stream: they stay on disk and are decoded as needed, for
    sets that are larger (folder, prepared, TFDS; needs image_size)."""
    workers: int | None = None
    """Threads that decode a streamed set (None: one a processor); figures do not depend on it."""
    random_resized_crop: bool = False
    """Train on a random part of each image, 8 to 100% of its area, resized, as is the custom for ImageNet (stream)."""
    eval_crop: float = 1.0
    """Side of the square cut from the middle of a test image, as a share of its shorter side; 0.875 is the custom for
    ImageNet (stream)."""
    unlabelled: str | None = None
    """A folder of pictures, at any depth, to train on in place of the set's own training images: they need no labels if
    distill.weight is 1, and the network comes from --init."""
    grayscale: bool = False
    """Make the images of a folder or TFDS set grey (one channel)."""
    batch_size: int = 128
    """Images a step."""
    crop_padding: int = 4
    """Pixels of zero padding before the random crop back to size (0: no random crop)."""
    flip: bool = True
    """Random horizontal flips."""
    jitter: float = 0.0
    """Colour jitter: brightness, contrast and saturation times factors in 1 - jitter to 1 + jitter, 0 to 1."""
    cutout: int = 0
    """Side in pixels of a square that is cut out of each image at random (0: none)."""
    erase: float = 0.0
    """Probability, 0 to 1, that a random rectangle of 2 to 33% of an image is erased."""
    mixup: float = 0.0
    """Mix pairs of images and labels by a share from Beta(mixup, mixup); 0: off, 0.2 is common."""

    def _check(self) -> None:
        self._require(0 <= self.validation < 1, "validation", "a share from 0 to below 1")
        self._require(
            self.unlabelled is None or not self.validation,
            "validation",
            "0 with data.unlabelled, which has no labels to validate by",
        )
        self._require(self.train_limit is None or self.train_limit >= 1, "train_limit", "at least 1, or None")
        self._require(self.batch_size >= 1, "batch_size", "at least 1")
        self._require(self.crop_padding >= 0, "crop_padding", "0 or more pixels")
        streamed = self.loading == "stream"
        self._require(
            not streamed or self.image_size is not None, "image_size", "a number of pixels when loading is 'stream'"
        )
        self._require(
            not streamed or self.name != "fashion_mnist_subset", "loading", "'memory' for the embedded subset"
        )
        self._require(self.workers is None or self.workers >= 1, "workers", "at least 1, or None")
        self._require(streamed or not self.random_resized_crop, "random_resized_crop", "off unless loading is 'stream'")
        self._require(
            not (self.random_resized_crop and self.crop_padding),
            "crop_padding",
            "0 with random_resized_crop, which is the random crop then",
        )
        self._require(0 < self.eval_crop <= 1, "eval_crop", "a share above 0 and at most 1")
        self._require(streamed or self.eval_crop == 1, "eval_crop", "1 unless loading is 'stream'")
        self._require(0 <= self.jitter <= 1, "jitter", "from 0 to 1")
        self._require(self.cutout >= 0, "cutout", "0 or more pixels")
        self._require(0 <= self.erase <= 1, "erase", "a probability from 0 to 1")
        self._require(self.mixup >= 0, "mixup", "0 or more")
        self._require(self.image_size is None or self.image_size >= 1, "image_size", "at least 1 pixel, or None")
        self._require(
            self.name not in ("folder", "prepared") or self.path is not None,
            "path",
            f"a directory when name is {self.name!r}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(_Checked):
    """Which network."""

    name: Literal[
        "mobilenetv2",
        "mobilenetv2_cifar10",
        "mobilenetv2_cifar100",
        "mobilenetv2_small",
        "mobilenetv1",
        "efficientnet_lite0",
        "resnet20",
        "resnet32",
        "resnet44",
        "resnet56",
        "resnet110",
        "resnet50",
        "resnext50_32x4d",
        "resnext29",
    ] = "mobilenetv2"
    """mobilenetv2 (the original), its two CIFAR variants, a small one for 28x28 images; mobilenetv1;
    efficientnet_lite0; CIFAR's ResNets of 20 to 110 layers (no pointwise layers: nothing to wrap) and ResNeXt-29;
    ImageNet's ResNet-50 and ResNeXt-50."""
    width: float = 1.0
    """Width multiplier; channels are rounded to multiples of 8."""
    cardinality: int | None = None
    """ResNeXt: groups of the 3x3 convolutions (None: the network's own, 32)."""
    group_width: int | None = None
    """ResNeXt: channels of each group in the first stage (None: the network's own, 4)."""
    inner_channels: tuple[int, ...] = ()
    """ResNet, ResNeXt: channels of each block's first convolution, in order, where filters have been removed (none: the
    network's own)."""
    octave: float = 0.0
    """MobileNetV2, EfficientNet-Lite0: share, 0 to below 1, of each map's channels that run at half resolution (octave
    convolution: a baseline, of which nothing has masks); 0: off."""
    octave_maps: Literal["wide", "all"] = "wide"
    """With octave: only the wide maps inside of blocks have such channels, as Oct-MobileNetV2 is published, or all."""
    batch_norm_epsilon: float = 1e-5
    """Added to the variance in every batch norm (PyTorch's custom; TensorFlow's is 1e-3)."""
    padding: Literal["same", "torch"] = "same"
    """Convolution padding: TensorFlow's SAME, or one zero on each side."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the network computes in while it trains; weights, statistics and losses are float32. bfloat16: GPU, TPU."""
    count_classifier: bool = False
    """Count the classifier's MACs in every total (the custom: true for ImageNet, false for CIFAR)."""

    def _check(self) -> None:
        self._require(0 < self.width <= 10, "width", "a multiplier above 0 and at most 10")
        grouped = self.name.startswith("resnext")
        for field in ("cardinality", "group_width"):
            value = getattr(self, field)
            self._require(
                value is None or (grouped and value >= 1), field, "at least 1, and only for a resnext, or None"
            )
        residual = self.name.startswith("resne")
        self._require(
            not self.inner_channels or (residual and min(self.inner_channels) >= 1),
            "inner_channels",
            "numbers of at least 1, and only for a resnet or resnext",
        )
        bottlenecks = self.name.startswith("mobilenetv2") or self.name == "efficientnet_lite0"
        self._require(
            not self.octave or (0 < self.octave < 1 and bottlenecks),
            "octave",
            "a share from 0 to below 1, and above 0 only for a mobilenetv2 or efficientnet_lite0",
        )
        self._require(self.batch_norm_epsilon > 0, "batch_norm_epsilon", "above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightPhaseConfig(_Checked):
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
    momentum: float = 0.9
    """Of sgd."""
    weight_decay: float = 4e-5
    """On kernels only (not on batch norm or biases)."""
    label_smoothing: float = 0.0
    """0 to below 1."""

    def _check(self) -> None:
        self._require(self.epochs > 0, "epochs", "above 0")
        self._require(self.steps is None or self.steps >= 1, "steps", "at least 1, or None")
        self._require(self.learning_rate > 0, "learning_rate", "above 0")
        self._require(0 <= self.momentum < 1, "momentum", "0 to below 1")
        self._require(self.weight_decay >= 0, "weight_decay", "0 or more")
        self._require(0 <= self.label_smoothing < 1, "label_smoothing", "0 to below 1")
        self._require(self.warmup_epochs >= 0, "warmup_epochs", "0 or more")
        self._require(self.step_factor > 0, "step_factor", "above 0")
        self._require(all(0 <= share <= 1 for share in self.step_at), "step_at", "shares from 0 to 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnConfig(_Checked):
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
    tied: bool = False
    """One FCMask for a wide channel of a residual block (expand output, project input), none on its narrow sides."""
    levels: str = "all"
    """Kept counts that masks fade between and are rounded to: all, or a list such as 0,1,N."""
    group_multiple: int = 1
    """Round tied masks so that the channels of a block that keep a count are a multiple of this many."""
    block: int = 4
    """Side of the square DCT block in pixels, 1 to 16."""
    block_by_map: tuple[tuple[int, int], ...] = ()
    """Pairs of map side and block, where it differs: 14 2 7 7 gives 14x14 maps 2x2 blocks, 7x7 maps one 7x7 block."""
    block_by_layer: tuple[tuple[str, int], ...] = ()
    """Pairs of layer name and block, where it differs (names as `fdjax macs` prints them)."""
    penalty: Literal["fcmask", "macs"] = "fcmask"
    """fcmask: the paper's (sum over layers of mean |m|). macs: expected MACs by target_convention, over dense MACs."""
    target_macs: float | None = 0.5
    """The MAC ratio to reach (hard counts, after the gate, transforms in it), above 0 to 1; None: lambda as it is."""
    target_convention: Literal["total", "paper"] = "total"
    """What the target, the gate and expected MACs speak of: macs.ratio, or macs.paper_ratio."""
    ramp: float = 0.75
    """Share of the phase, above 0 to 1, by which the controller means to have reached the target."""
    lambda_: Annotated[float | None, tyro.conf.arg(name="lambda")] = None
    """Weight of the penalty. With a target it is only the start (None: chosen); without one it is needed."""
    gate: Literal["macs", "time", "none"] = "macs"
    """Before refinement, layers that are no cheaper pruned than whole are released. time: also those that are slower
    pruned, frozen and timed on this machine. none: keep all pruned."""
    gate_batch: int = 1
    """Images at once when gate=time measures."""

    def _check(self) -> None:
        self._require(self.epochs > 0, "epochs", "above 0")
        self._require(self.steps is None or self.steps >= 1, "steps", "at least 1, or None")
        self._require(self.learning_rate > 0, "learning_rate", "above 0")
        self._require(0 <= self.momentum < 1, "momentum", "0 to below 1")
        self._require(
            self.target_macs is None or 0 < self.target_macs <= 1, "target_macs", "above 0 and at most 1, or None"
        )
        self._require(
            self.lambda_ is None or self.lambda_ > 0 or (self.lambda_ == 0 and self.target_macs is None),
            "lambda_",
            "above 0 (0 only without a target), or None",
        )
        self._require(self.gate_batch >= 1, "gate_batch", "at least 1")
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig(_Checked):
    """Self-distillation: after pretraining, the unpruned network teaches the pruned one."""

    weight: float = 0.0
    """Share of the loss, 0 to 1, that compares logits with the unpruned network's; 0: off, 1: labels are not used."""
    temperature: float = 2.0
    """That both networks' logits are divided by."""

    def _check(self) -> None:
        self._require(0 <= self.weight <= 1, "weight", "a share from 0 to 1")
        self._require(self.temperature > 0, "temperature", "above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig(_Checked):
    """How often a run saves and measures itself."""

    every_epochs: float = 1.0
    """Epochs between checkpoints; one more is written at the end of each phase."""
    keep: int = 2
    """Latest checkpoints that are kept, at least 2, beside the best on the validation share."""
    evaluate_every_epochs: float = 1.0
    """Epochs between evaluations (validation share if there is one, else the test set, for the curves only)."""
    time: bool = True
    """At the end of a run that has pruned, time its network, frozen, beside the dense one on this machine
    (learn.gate_batch images at once)."""

    def _check(self) -> None:
        self._require(self.every_epochs > 0, "every_epochs", "above 0")
        self._require(self.keep >= 2, "keep", "at least 2 (one is whole while another is written)")
        self._require(self.evaluate_every_epochs > 0, "evaluate_every_epochs", "above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeConfig(_Checked):
    """How steps are fed; figures do not depend on it but by rounding."""

    data_on_device: Literal["auto", "yes", "no"] = "auto"
    """yes: the data set lies on the devices. no: batches come from the host, overlapped. auto: yes up to 2 GiB."""
    steps_per_dispatch: int | None = None
    """Steps that one call does if the data lie on the devices (None: 1 on the CPU, 20 elsewhere)."""

    def _check(self) -> None:
        self._require(
            self.steps_per_dispatch is None or self.steps_per_dispatch >= 1, "steps_per_dispatch", "at least 1, or None"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_Checked):
    """A whole run."""

    seed: int = 0
    """Of everything random: initial weights, order of images, augmentation, the parts of the training set."""
    phases: tuple[Literal["pretrain", "learn", "alternate", "refine", "scratch"], ...] = ("pretrain", "learn", "refine")
    """In order: pretrain (weights), learn (masks), alternate (masks and weights in turn), refine (masks rounded,
    weights), scratch (masks rounded, new weights)."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    pretrain: WeightPhaseConfig = WeightPhaseConfig()
    learn: LearnConfig = LearnConfig()
    alternate: AlternateConfig = AlternateConfig()
    refine: WeightPhaseConfig = WeightPhaseConfig()
    scratch: WeightPhaseConfig = WeightPhaseConfig()
    distill: DistillConfig = DistillConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    compute: ComputeConfig = ComputeConfig()

    def _check(self) -> None:
        self._require(0 <= self.seed < 2**31, "seed", "from 0 to 2**31 - 1")
        self._require(len(self.phases) > 0, "phases", f"at least one of {', '.join(PHASES)}")
        self._require(
            all(phase not in self.phases[:at] for at, phase in enumerate(self.phases)), "phases", "different phases"
        )
        if self.data.unlabelled is not None and self.distill.weight < 1:
            raise UserError(
                f"data.unlabelled has no labels to learn from, and distill.weight is {self.distill.weight:g}; give "
                "--distill.weight 1, so that the unpruned network teaches alone"
            )
        self._require("pretrain" not in self.phases[1:], "phases", "phases with pretrain first, if it is among them")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Config:
        """The config that `to_dict` wrote.

        Raises:
          UserError: fields or values that are no config's, or an option that there is no longer.
        """
        learn = fields.get("learn") if isinstance(fields, Mapping) else None
        if isinstance(learn, Mapping):
            for name, idle in _REMOVED_FROM_LEARN.items():
                if learn.get(name, idle) != idle:
                    raise UserError(
                        f"config.learn.{name} is {learn[name]!r}, an option that has been removed because it did not "
                        "help (docs/train.md); the commit in the run's summary.json has it"
                    )
            fields = {**fields, "learn": {k: v for k, v in learn.items() if k not in _REMOVED_FROM_LEARN}}
        return _from_dict(cls, fields, "config")


# Options that were tried and did not help (docs/train.md), which saved configs may have, with what turned them off.
_REMOVED_FROM_LEARN = {
    "schedule": "constant",
    "warmup_epochs": 0.0,
    "noise": 0.0,
    "precondition": 0.0,
    "rounding": "nearest",
    "stage_masks": False,
    "straight_through": 0.0,
}


def _from_dict(cls: Any, fields: Mapping[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(cls)
    if not isinstance(fields, Mapping):
        raise UserError(f"{where} must be an object with fields, got {fields!r}")
    for name in fields:
        if name not in hints:
            raise UserError(f"{where} has no field {name!r}{suggestion(name, hints)}; it has {', '.join(hints)}")
    values = {}
    for name, value in fields.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            value = _from_dict(hint, value, f"{where}.{name}")
        elif isinstance(value, list):
            value = tuple(tuple(item) if isinstance(item, list) else item for item in value)
        values[name] = value
    return cls(**values)


def load_config(path: str) -> Config:
    """Runs a config file and returns what its `get_config()` makes.

    Raises:
      UserError: no such file, an error in it, or no `get_config` that returns a `Config`.
    """
    return load_made(path, "config", "get_config", Config)


_FREE_TO_CHANGE = ("checkpoint", "compute")


def continuation_problem(saved: Config, asked: Config, current_phase: str | None) -> str | None:
    """Says why a run of `saved` cannot go on as `asked`, or returns None when it can.

    It can when `asked` differs only in more phases at the end, in settings of phases that have not begun, in a longer
    current phase (`current_phase`: the one the run is in or ended with), in where the data lie, in how steps are fed,
    or in how often it saves. A run without a checkpoint yet (`current_phase` None) is held to all its phases.
    """
    begun = len(saved.phases) if current_phase is None else saved.phases.index(current_phase) + 1
    done = saved.phases[:begun]
    if asked.phases[: len(done)] != done:
        return f"its phases so far are {', '.join(done)}, and those asked for are {', '.join(asked.phases)}"
    old, new = saved.to_dict(), asked.to_dict()
    differences = []
    for field, before in old.items():
        after = new[field]
        not_begun = field in PHASES and field not in done and not (field == "learn" and "alternate" in done)
        not_begun |= field == "distill" and done == ("pretrain",)  # it has no part in pretraining
        if field in ("phases", *_FREE_TO_CHANGE) or not_begun or before == after:
            continue
        if not isinstance(before, dict):
            differences.append(f"{field} is {before!r} there and {after!r} here")
            continue
        for name, value in before.items():
            longer = field == current_phase and name in ("epochs", "steps")
            if value == after[name] or longer or (field, name) in (("data", "path"), ("data", "workers")):
                continue
            differences.append(f"{field}.{name} is {value!r} there and {after[name]!r} here")
    return "; ".join(differences) or None

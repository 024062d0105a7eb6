"""`fdjax import`: weights trained elsewhere become a checkpoint."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from fdjax.commands.arguments import config_given
from fdjax.commands.output_files import check_json_target, write_report
from fdjax.config import Config
from fdjax.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from fdjax.importers import Conventions


@dataclasses.dataclass(kw_only=True)
class ImportArguments:
    """Makes a checkpoint of weights that were trained elsewhere; train.py --init, eval.py and fdjax freeze take it."""

    config: str
    """Config file: the network and the data; every field of it can be set by a flag."""
    format: Literal["torchvision", "timm", "timm_tf", "efficientnet_lite", "keras"]
    """Whose names the weights have, and conventions: padding, batch norm's epsilon, input scaling (docs/import.md)."""
    weights: str
    """The file: .pth, .pt, .bin (a state dict of torch.save), .safetensors, .h5 or .keras."""
    out: str
    """Directory to write the checkpoint into: new or empty."""
    classes: str | None = None
    """Class names, one a line, in the order of the outputs; for when the data set is not there to name them."""
    padding: Literal["same", "torch"] | None = None
    """Convolution padding that the weights were trained with (default: the format's); model.padding is set to it."""
    epsilon: float | None = None
    """Epsilon of batch norm, likewise; model.batch_norm_epsilon is set to it."""
    input_mean: tuple[float, ...] | None = None
    """Mean that was subtracted from images, for each channel, in 0..255 (default: the format's)."""
    input_std: tuple[float, ...] | None = None
    """What they were divided by then, likewise."""
    json: str | None = None
    """Write what was done to this file too."""
    settings: Annotated[Config, tyro.conf.arg(name="")]


def import_command(arguments: Sequence[str]) -> int:
    """`fdjax import`."""
    required: Any = tyro.MISSING
    parsed = tyro.cli(
        ImportArguments,
        prog="fdjax import",
        args=arguments,
        default=ImportArguments(
            config=required,
            format=required,
            weights=required,
            out=required,
            settings=config_given(arguments, "fdjax import"),
        ),
    )
    check_json_target(parsed.json)
    from fdjax.checkpoints.imported import check_import_target, save_imported
    from fdjax.importers import convert, read_weights
    from fdjax.training.build import build_network

    out = Path(parsed.out).expanduser().resolve()
    check_import_target(out)
    conventions = _conventions(parsed)
    config = _with_conventions(parsed.settings, conventions)
    tensors = read_weights(parsed.weights)
    shape, names, num_classes = _inputs_and_outputs(config, parsed, tensors)
    _check_channels(conventions, shape[2])
    network, spec = build_network(config, shape, num_classes)
    spec = dataclasses.replace(
        spec, input_mean=conventions.input_mean, input_std=conventions.input_std, class_names=names
    )
    variables = convert(tensors, parsed.format, network, spec, config.model.width)
    origin = {
        "format": parsed.format,
        "weights": Path(parsed.weights).name,
        "sha256": _sha256(parsed.weights),
        **dataclasses.asdict(conventions),
    }
    save_imported(out, config, spec, variables, origin)
    report = {
        **origin,
        "checkpoint": str(out),
        "network": spec.name,
        "width": config.model.width,
        "input_shape": list(shape),
        "num_classes": num_classes,
        "class_names": list(names) or None,
        "num_parameters": _size(variables["params"]),
    }
    print(_describe(report, parsed, config))
    write_report(parsed.json, report)
    return 0


def _conventions(parsed: ImportArguments) -> Conventions:
    """The format's, but for what flags say otherwise."""
    from fdjax.importers import FORMATS

    given = {
        "padding": parsed.padding,
        "batch_norm_epsilon": parsed.epsilon,
        "input_mean": parsed.input_mean,
        "input_std": parsed.input_std,
    }
    for flag, values, lowest in (("mean", parsed.input_mean, -math.inf), ("std", parsed.input_std, 0.0)):
        if values is not None and not all(lowest < value < math.inf for value in values):
            accepted = "numbers above 0" if flag == "std" else "finite numbers"
            raise UserError(f"--input-{flag} must be {accepted}, got {' '.join(map(str, values))}")
    return dataclasses.replace(
        FORMATS[parsed.format].conventions, **{name: value for name, value in given.items() if value is not None}
    )


def _with_conventions(config: Config, conventions: Conventions) -> Config:
    model = dataclasses.replace(
        config.model, padding=conventions.padding, batch_norm_epsilon=conventions.batch_norm_epsilon
    )
    # So that the checkpoint can be evaluated from anywhere.
    absolute = {
        field: str(Path(path).expanduser().resolve())
        for field in ("path", "unlabelled")
        if (path := getattr(config.data, field)) is not None
    }
    return dataclasses.replace(config, model=model, data=dataclasses.replace(config.data, **absolute))


def _check_channels(conventions: Conventions, channels: int) -> None:
    for flag, values in (("--input-mean", conventions.input_mean), ("--input-std", conventions.input_std)):
        if len(values) != channels:
            raise UserError(
                f"{flag} has {len(values)} numbers, and the config's images have {channels} "
                f"channel{'s' if channels > 1 else ''}: give {flag} with one number (0..255) for each channel"
            )


def _inputs_and_outputs(
    config: Config, parsed: ImportArguments, tensors: dict[str, np.ndarray]
) -> tuple[tuple[int, int, int], tuple[str, ...], int]:
    """(H, W, C) of an image; the class names, none where they are not known; the number of classes."""
    from fdjax.data import FOLDER, PREPARED, describe_source
    from fdjax.importers import count_classes
    from fdjax.training.build import build_network

    data = config.data
    named = None if parsed.classes is None else _read_classes(parsed.classes)
    if data.name not in (FOLDER, PREPARED) or Path(data.path or "").exists():
        shape, names = describe_source(data.name, data.path, data.image_size, data.grayscale)
        if named is not None and named != names:
            raise UserError(
                f"--classes {parsed.classes} names {len(named)} classes ({named[0]}, ...), and the config's data set "
                f"has {len(names)} names of its own ({names[0]}, ...): leave --classes out"
            )
        return shape, names, len(names)
    if data.image_size is None:
        raise UserError(
            f"the config's data set is not there ({data.path}), so the size of its images is not known: give "
            "--data.image-size, or --data.path"
        )
    shape = (data.image_size, data.image_size, 1 if data.grayscale else 3)
    if named is not None:
        return shape, named, len(named)
    network, _ = build_network(config, shape, 1)
    return shape, (), count_classes(tensors, parsed.format, network)


def _read_classes(path: str) -> tuple[str, ...]:
    try:
        names = tuple(line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--classes {path} cannot be read as text: {error}") from error
    if len(names) < 2 or len(set(names)) < len(names):
        raise UserError(f"--classes {path} must hold two or more different names, one a line")
    return names


def _sha256(path: str) -> str:
    with Path(path).expanduser().open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size(params: Any) -> int:
    import jax

    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _describe(report: dict[str, Any], parsed: ImportArguments, config: Config) -> str:
    mean, std = (" ".join(f"{value:g}" for value in report[name]) for name in ("input_mean", "input_std"))
    padding, epsilon = report["padding"], report["batch_norm_epsilon"]
    command = [
        "python", "train.py", "--config", parsed.config, "--workdir", "RUN", "--init", str(report["checkpoint"]),
        "--phases", "learn", "refine", "--model.padding", padding, "--model.batch-norm-epsilon", str(epsilon),
    ]  # fmt: skip
    names = "names not known (0, 1, ...)" if report["class_names"] is None else f"named {report['class_names'][0]}, ..."
    return "\n".join(
        [
            f"{report['network']}, width {report['width']:g}: {report['num_parameters']:,} parameters from "
            f"{report['weights']}, by the names of {report['format']}; {report['num_classes']} classes, {names}",
            f"conventions: padding {padding}, batch norm epsilon {epsilon}, input mean {mean}, std {std} (of 0..255)",
            f"its test images: the middle {report['eval_crop']:g} of the shorter side, {report['interpolation']}; "
            f"here: {config.data.eval_crop:g} (data.eval_crop), bilinear",
            f"checkpoint: {report['checkpoint']}; to prune it, with any other flags that were given here:",
            f"  {shlex.join(command)}",
        ]
    )

"""`fdjax import --format onnx`: makes a checkpoint from the network of an ONNX file."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdjax.commands.arguments import training_program
from fdjax.commands.import_data import check_channels, inputs_and_outputs, reorder_classifier
from fdjax.config import ONNX_FACTORY, Config
from fdjax.errors import UserError
from fdjax.provenance import file_sha256

if TYPE_CHECKING:
    from fdjax.commands.import_weights import ImportArguments
    from fdjax.onnx.graph import OnnxGraph

# Conventions that the file itself has.
_NOT_FOR_ONNX = ("ema", "by_order", "padding", "epsilon")


def import_onnx(parsed: ImportArguments, config: Config, out: Path) -> dict[str, Any]:
    """Imports the network and the weights of an ONNX file.

    Args:
      parsed: the command's arguments.
      config: the run's config, with absolute paths; its network becomes the file's.
      out: a new or empty folder.

    Returns:
      The report.

    Raises:
      UserError: a flag is not for such files, or is missing; or the file cannot be read, or does not fit the data.
    """
    import jax
    import numpy as np
    import optax

    from fdjax.checkpoint import CHECKPOINT_FOLDER
    from fdjax.checkpoints.imported import save_imported
    from fdjax.onnx.graph import CLASSIFIER, read_onnx_graph
    from fdjax.onnx.kept_file import keep_file
    from fdjax.onnx.module import new_classifier
    from fdjax.onnx.network import initial_variables
    from fdjax.training.build import build_network

    _check_flags(parsed)
    assert parsed.input_mean is not None and parsed.input_std is not None
    file = Path(parsed.weights).expanduser().resolve()
    theirs = read_onnx_graph(file)
    if theirs.classifier is None:
        raise UserError(
            f"{file}: the layer that makes the logits was not found: the file has to have one result, which a dense "
            "layer or a 1x1 convolution makes last, but for a softmax; export the network so"
        )
    *inputs, outputs = theirs.params[CLASSIFIER]["kernel"].shape
    shape, names, num_classes, order = inputs_and_outputs(config, parsed, lambda: outputs)
    _check_images(theirs, shape)
    check_channels(parsed.input_mean, parsed.input_std, shape[2])
    if num_classes != outputs and not parsed.new_classifier:
        raise UserError(
            f"{file} has {outputs} outputs, and the data set has {num_classes} classes: give --new-classifier to train "
            "a new last layer for them, or the data set that the network was trained on"
        )
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, arguments=()).with_onnx_file(file))
    _, graph = build_network(config, shape, num_classes)
    graph = dataclasses.replace(
        graph, input_mean=parsed.input_mean, input_std=parsed.input_std, class_names=tuple(names)
    )
    variables = jax.tree.map(np.asarray, initial_variables(theirs))
    notes = list(theirs.notes)
    if parsed.new_classifier:
        notes.append("the classifier is new")
        bias = "bias" in theirs.params[CLASSIFIER]
        variables["params"][CLASSIFIER] = jax.tree.map(
            np.asarray, new_classifier(jax.random.key(config.seed % 2**32), (*inputs, num_classes), bias)
        )
    elif order is not None:
        reorder_classifier(variables, order)
        notes.append("the classifier's outputs were brought from the order of --classes to that of the data set")
    if None not in theirs.size and theirs.size != shape[:2]:
        size = "x".join(map(str, theirs.size))
        notes.append(f"the file says images of {size}, and the config {shape[0]}x{shape[1]}")
    origin = {
        "format": parsed.format,
        "weights": file.name,
        "sha256": file_sha256(file),
        "input_mean": parsed.input_mean,
        "input_std": parsed.input_std,
        "new_classifier": parsed.new_classifier,
        "averaged": False,
        "by_order": False,
    }
    save_imported(out, config, graph, variables, origin)
    kept = keep_file(file, out / CHECKPOINT_FOLDER)
    return {
        **origin,
        "checkpoint": str(out),
        "network": file.name,
        "input_shape": list(shape),
        "num_classes": num_classes,
        "class_names": list(names) or None,
        "num_parameters": optax.tree.size(variables["params"]),
        "notes": notes,
        "file": str(file),
        "copy": None if kept is None else str(kept),
    }


def _check_flags(parsed: ImportArguments) -> None:
    given = [f"--{name.replace('_', '-')}" for name in _NOT_FOR_ONNX if getattr(parsed, name) not in (None, False)]
    if given:
        raise UserError(f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'} not for ONNX files, which say it "
                        "themselves: leave them out")  # fmt: skip
    if parsed.input_mean is None or parsed.input_std is None:
        raise UserError(
            "an ONNX file does not say how images were scaled for it: give --input-mean and --input-std in 0..255, one "
            "number for each channel. With torchvision's transforms they are 123.675 116.28 103.53 and 58.395 57.12 "
            "57.375; for images in 0..1, 0 0 0 and 255 255 255; for -1..1, 127.5 127.5 127.5 twice; for a file that "
            "scales images itself, 0 0 0 and 1 1 1"
        )


def _check_images(theirs: OnnxGraph, shape: tuple[int, int, int]) -> None:
    if theirs.channels not in (None, shape[2]):
        hint = "--data.grayscale yes" if theirs.channels == 1 else "--data.grayscale no"
        raise UserError(
            f"{theirs.file} is for images of {theirs.channels} channels, and the config's have {shape[2]}: give {hint} "
            "or another file"
        )


def describe_onnx(report: dict[str, Any], config: str) -> str:
    """Returns what the command prints.

    Args:
      report: of `import_onnx`.
      config: the config file, as it was given.
    """
    names = "names not known (0, 1, ...)" if report["class_names"] is None else f"named {report['class_names'][0]}, ..."
    mean, std = (" ".join(f"{value:g}" for value in report[name]) for name in ("input_mean", "input_std"))
    new = report["new_classifier"]
    reads = f"which reads the network from {report['file']}: leave it there"
    if report["copy"] is not None:
        reads = "which holds the network, too"
    command = [
        *training_program(), "--config", config, "--workdir", "RUN", "--init", report["checkpoint"],
        "--phases", *(["pretrain"] if new else []), "learn", "refine",
        "--model.factory", ONNX_FACTORY, "--model.arguments", "file", report["file"],
    ]  # fmt: skip
    return "\n".join(
        [
            f"{report['network']}: {report['num_parameters']:,} parameters; {report['num_classes']} classes, {names}",
            *(f"note: {note}" for note in report["notes"]),
            f"input mean {mean}, std {std} (of 0..255)",
            f"checkpoint: {report['checkpoint']}, {reads}",
            f"to {'train' if new else 'prune'} it, with any other flags that were given here:",
            f"  {shlex.join(command)}",
        ]
    )

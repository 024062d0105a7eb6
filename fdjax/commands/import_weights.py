"""`fdjax import`: makes a checkpoint from weights that were trained elsewhere."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from fdjax.commands.arguments import parse_with_config, training_program
from fdjax.commands.import_data import (
    check_channels,
    check_scaling,
    input_size,
    inputs_and_outputs,
    reorder_classifier,
)
from fdjax.commands.import_onnx import describe_onnx, import_onnx
from fdjax.commands.output_files import check_json_target, write_report
from fdjax.config import Config
from fdjax.errors import UserError
from fdjax.provenance import file_sha256

if TYPE_CHECKING:
    from fdjax.graph.masks import MaskedGraph
    from fdjax.importers import Conventions


@dataclasses.dataclass(kw_only=True)
class ImportArguments:
    """Makes a checkpoint from weights that were trained elsewhere, for train.py --init, eval.py and fdjax freeze."""

    config: str
    """Config file, which describes the network and the data; flags can set every field."""
    format: Literal["torchvision", "timm", "timm_tf", "efficientnet_lite", "keras", "onnx"]
    """Library that the weights come from. It sets their names and conventions: padding, epsilon of batch norm, input
    scaling (docs/import.md). onnx: a file that holds any network with its weights, in place of the config's."""
    weights: str
    """File of weights: .pth, .pt, .bin (a state dict of torch.save), .safetensors, .h5, .keras or .onnx."""
    out: str
    """Directory to write the checkpoint into: new or empty."""
    classes: str | None = None
    """Text file of class names, one a line, in the order of the weights' outputs. If the data set has another order,
    the classifier's outputs are brought to it; if the data set is not there, the file names the classes."""
    new_classifier: bool = False
    """Start with a new classifier for the config's classes, if the weights are for other classes or have no classifier.
    It has to be trained: train.py --phases pretrain ... --init OUT."""
    ema: bool = False
    """Take the averaged weights (EMA) of a file that has both."""
    by_order: bool = False
    """Match tensors by their order and shapes and ignore their names; the mapping is printed."""
    padding: Literal["same", "torch"] | None = None
    """Convolution padding that the weights were trained with (None: the format's); sets model.padding."""
    epsilon: float | None = None
    """Epsilon of batch norm that the weights were trained with (None: the format's); sets model.batch_norm_epsilon."""
    input_mean: tuple[float, ...] | None = None
    """Mean of each channel, in 0..255, that was subtracted from images in training (None: the format's)."""
    input_std: tuple[float, ...] | None = None
    """Divisor of each channel, in 0..255, that images were divided by after that (None: the format's)."""
    json: str | None = None
    """File to write the report (conventions, mapping, notes) to as JSON."""
    settings: Annotated[Config, tyro.conf.arg(name="")]


def import_command(arguments: Sequence[str]) -> int:
    """Runs `fdjax import` and returns its exit status."""
    parsed = parse_with_config(ImportArguments, "fdjax import", arguments)
    check_json_target(parsed.json)
    import optax

    from fdjax.checkpoints.imported import save_imported
    from fdjax.importers import count_classes, fit, open_weights
    from fdjax.training.build import build_network
    from fdjax.training.own_network import zoo_network
    from fdjax.training.workdir import check_new_folder

    out = Path(parsed.out).expanduser().resolve()
    check_new_folder(out)
    check_scaling(parsed)
    if parsed.format == "onnx":
        found = import_onnx(parsed, _with_absolute_paths(parsed.settings), out)
        print(describe_onnx(found, parsed.config))
        write_report(parsed.json, found)
        return 0
    conventions = _conventions(parsed)
    config = _with_conventions(_with_absolute_paths(parsed.settings), conventions)
    found = open_weights(parsed.weights, parsed.ema)

    def count_outputs() -> int:
        network = zoo_network(build_network(config, input_size(config), 1)[0], "fdjax import")
        return count_classes(found.tensors, parsed.format, network)

    shape, names, num_classes, order = inputs_and_outputs(config, parsed, count_outputs)
    check_channels(conventions.input_mean, conventions.input_std, shape[2])
    made, graph = build_network(config, shape, num_classes)
    network = zoo_network(made, "fdjax import")
    if parsed.format == "keras" and config.model.name == "mobilenetv1":
        check_even_maps(graph)
    graph = dataclasses.replace(
        graph, input_mean=conventions.input_mean, input_std=conventions.input_std, class_names=names
    )
    fitted = fit(
        found.tensors,
        parsed.format,
        network,
        graph,
        config.model.width,
        by_order=parsed.by_order,
        new_classifier=config.seed if parsed.new_classifier else None,
        averaged=parsed.ema,
    )
    notes = [*found.notes, *fitted.notes]
    if order is not None and not parsed.new_classifier:
        reorder_classifier(fitted.variables, order)
        notes.append("the classifier's outputs were brought from the order of --classes to that of the data set")
    origin = {
        "format": parsed.format,
        "weights": Path(parsed.weights).name,
        "sha256": file_sha256(Path(parsed.weights).expanduser()),
        **dataclasses.asdict(conventions),
        "new_classifier": parsed.new_classifier,
        "averaged": found.averaged,
        "by_order": parsed.by_order,
    }
    save_imported(out, config, graph, fitted.variables, origin)
    report = {
        **origin,
        "checkpoint": str(out),
        "network": graph.name,
        "width": config.model.width,
        "input_shape": list(shape),
        "num_classes": num_classes,
        "class_names": list(names) or None,
        "num_parameters": optax.tree.size(fitted.variables["params"]),
        "notes": notes,
        "mapping": [list(pair) for pair in fitted.mapping],
    }
    print(_describe(report, parsed, config, masked=bool(graph.masks)))
    write_report(parsed.json, report)
    return 0


def _conventions(parsed: ImportArguments) -> Conventions:
    """Returns the format's conventions, with those that flags set in their place."""
    from fdjax.importers import FORMATS

    given = {
        "padding": parsed.padding,
        "batch_norm_epsilon": parsed.epsilon,
        "input_mean": parsed.input_mean,
        "input_std": parsed.input_std,
    }
    return dataclasses.replace(
        FORMATS[parsed.format].conventions, **{name: value for name, value in given.items() if value is not None}
    )


def _with_conventions(config: Config, conventions: Conventions) -> Config:
    model = dataclasses.replace(
        config.model, padding=conventions.padding, batch_norm_epsilon=conventions.batch_norm_epsilon
    )
    return dataclasses.replace(config, model=model)


def _with_absolute_paths(config: Config) -> Config:
    """Returns the config with paths of data that let the checkpoint be evaluated from any directory."""
    absolute = {
        field: str(Path(path).expanduser().resolve())
        for field in ("path", "unlabelled")
        if (path := getattr(config.data, field)) is not None
    }
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **absolute))


def check_even_maps(graph: MaskedGraph) -> None:
    """Raises `UserError` if a layer with a stride reads a map of odd sides, which Keras' MobileNet pads otherwise."""
    for layer in graph.layers.values():
        if max(layer.stride, default=1) > 1 and any(side % 2 for side in layer.in_size):
            size = "x".join(map(str, layer.in_size))
            raise UserError(
                f"Keras' MobileNet pads maps of odd sides otherwise than this network does, and {layer.name} reads one "
                f"of {size} at {graph.input_shape[0]} pixels: give --data.image-size a multiple of 32"
            )


def _describe(report: dict[str, Any], parsed: ImportArguments, config: Config, *, masked: bool) -> str:
    mean, std = (" ".join(f"{value:g}" for value in report[name]) for name in ("input_mean", "input_std"))
    padding, epsilon = report["padding"], report["batch_norm_epsilon"]
    command = [
        *training_program(), "--config", parsed.config, "--workdir", "RUN", "--init", str(report["checkpoint"]),
        "--phases", *(["pretrain"] if parsed.new_classifier else []), "learn", "refine",
        "--model.padding", padding, "--model.batch-norm-epsilon", str(epsilon),
    ]  # fmt: skip
    others = ", with any other flags that were given here"
    if not (masked or parsed.new_classifier):
        # A network without pointwise layers in blocks has no masks to learn; its filters can be removed.
        fdjax = ["python", "-m", "fdjax"] if training_program()[0] == "python" else ["fdjax"]
        command = [*fdjax, "prune", "--checkpoint", str(report["checkpoint"]), "--method", "l1",
                   "--target-macs", "0.5", "--out", "PRUNED"]  # fmt: skip
        others = ""
    how = "by order and shape" if parsed.by_order else f"by the names of {report['format']}"
    names = "names not known (0, 1, ...)" if report["class_names"] is None else f"named {report['class_names'][0]}, ..."
    return "\n".join(
        [
            f"{report['network']}, width {report['width']:g}: {report['num_parameters']:,} parameters from "
            f"{report['weights']}, {how}; {report['num_classes']} classes, {names}",
            *(f"{theirs} -> {ours}" for theirs, ours in report["mapping"]),
            *(f"note: {note}" for note in report["notes"]),
            f"conventions: padding {padding}, batch norm epsilon {epsilon}, input mean {mean}, std {std} (of 0..255)",
            f"its test images: the middle {report['eval_crop']:g} of the shorter side, {report['interpolation']}; "
            f"here: {config.data.eval_crop:g} (data.eval_crop), bilinear",
            f"checkpoint: {report['checkpoint']}; to {'train' if parsed.new_classifier else 'prune'} it{others}:",
            f"  {shlex.join(command)}",
        ]
    )

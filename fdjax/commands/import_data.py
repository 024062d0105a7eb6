"""What `fdjax import` asks of the data: size, scaling and classes of the images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdjax.config import Config
from fdjax.errors import UserError

if TYPE_CHECKING:
    from fdjax.commands.import_weights import ImportArguments


def input_size(config: Config) -> tuple[int, int, int]:
    """Returns (H, W, C) of an image, of a config that says it."""
    assert config.data.size is not None
    return (*config.data.size, 1 if config.data.grayscale else 3)


def inputs_and_outputs(
    config: Config, parsed: ImportArguments, count_outputs: Callable[[], int]
) -> tuple[tuple[int, int, int], tuple[str, ...], int, list[int] | None]:
    """Finds the images and classes that the network is for.

    Args:
      config: the run's config.
      parsed: the command's arguments.
      count_outputs: returns the number of outputs that the file has.

    Returns:
      (H, W, C) of an image; the class names, empty if they are not known; the number of classes; and for each class its
      place in the file's classifier, or None if the order is the same.
    """
    from fdjax.data import FOLDER, PREPARED, describe_source
    from fdjax.data.class_list import read_class_list

    data = config.data
    named = None if parsed.classes is None else read_class_list(parsed.classes)
    if data.name not in (FOLDER, PREPARED) or Path(data.path or "").exists():
        shape, names = describe_source(data.name, data.path, data.image_size, data.grayscale)
        if named is None or named == names:
            return shape, names, len(names), None
        if sorted(named) != sorted(names):
            raise UserError(_other_classes(parsed.classes, named, names))
        return shape, names, len(names), [named.index(name) for name in names]
    if data.size is None:
        raise UserError(
            f"the config's data set is not there ({data.path}), so the size of its images is not known: give "
            "--data.image-size, or --data.path"
        )
    shape = input_size(config)
    if named is not None:
        return shape, named, len(named), None
    if parsed.new_classifier:
        raise UserError(
            f"the config's data set is not there ({data.path}), so the classes of the new classifier are not known: "
            "give --classes FILE, or --data.path"
        )
    return shape, (), count_outputs(), None


def _other_classes(file: str | None, named: tuple[str, ...], names: tuple[str, ...]) -> str:
    own, foreign = sorted(set(names) - set(named)), sorted(set(named) - set(names))
    parts = [f"{what} {', '.join(some[:5])}" + (f" and {len(some) - 5} more" if len(some) > 5 else "")
             for what, some in (("the data set alone has", own), ("the file alone has", foreign)) if some]  # fmt: skip
    return (
        f"--classes {file} names {len(named)} classes, and the config's data set has {len(names)} of its own: "
        f"{'; '.join(parts)}. Correct the file, or leave --classes out if the outputs have the data set's order"
    )


def check_channels(mean: Sequence[float], std: Sequence[float], channels: int) -> None:
    """Raises `UserError` if the scaling of images has not one number for each of their channels."""
    for flag, values in (("--input-mean", mean), ("--input-std", std)):
        if len(values) != channels:
            raise UserError(
                f"{flag} has {len(values)} numbers, and the config's images have {channels} "
                f"channel{'s' if channels > 1 else ''}: give {flag} with one number (0..255) for each channel"
            )


def reorder_classifier(variables: dict[str, Any], order: list[int]) -> None:
    """Sorts the classifier's outputs by the data set's classes, in place.

    Args:
      variables: the collections params and batch_stats, with a layer "classifier".
      order: for each class of the data set its place in the file.
    """
    classifier = variables["params"]["classifier"]
    for name in classifier:
        classifier[name] = classifier[name][..., order].copy()


def check_scaling(parsed: ImportArguments) -> None:
    """Raises `UserError` if a mean or standard deviation that a flag gives is none."""
    for flag, values, lowest in (("mean", parsed.input_mean, -math.inf), ("std", parsed.input_std, 0.0)):
        if values is not None and not all(lowest < value < math.inf for value in values):
            accepted = "numbers above 0" if flag == "std" else "finite numbers"
            raise UserError(f"--input-{flag} must be {accepted}, got {' '.join(map(str, values))}")

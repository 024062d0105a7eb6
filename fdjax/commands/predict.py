"""`fdjax predict`: classifies pictures."""

from __future__ import annotations

import csv
import dataclasses
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

from fdjax.commands.arguments import check_at_least_one, parse_arguments
from fdjax.commands.output_files import check_file_target, check_json_target, write_report
from fdjax.errors import UserError

# The batch size. It is fixed because a program is compiled for one batch size.
_BATCH = 16


@dataclasses.dataclass(kw_only=True)
class PredictArguments:
    """Classifies pictures with a frozen network. Pictures that cannot be read are reported and skipped."""

    images: tyro.conf.Positional[tuple[str, ...]]
    """Picture files, in any format that Pillow opens, and folders, which are searched at any depth."""
    frozen: str
    """Directory of a frozen network, as fdjax freeze writes it, or an ONNX file, as fdjax export writes it."""
    top: int = 1
    """Number of classes to print for each picture, the most probable first."""
    engine: Literal["xla", "native"] | None = None
    """Engine that executes the network: XLA, or C++ that is compiled for this processor (None: XLA). An ONNX file is
    run by ONNX Runtime."""
    any_engine: bool = False
    """Also run a network that was made for another engine than --engine (freeze --choose time)."""
    json: str | None = None
    """File to write the classes and their probabilities to as JSON."""
    csv: str | None = None
    """File to write a table to, with a row for each picture; its column `error` says why one could not be read."""


def predict_command(arguments: Sequence[str]) -> int:
    """Runs `fdjax predict` and returns its exit status."""
    parsed = parse_arguments(PredictArguments, "fdjax predict", arguments)
    check_json_target(parsed.json)
    check_file_target("--csv", parsed.csv, (".csv",))
    if not parsed.images:
        raise UserError("no picture given: fdjax predict --frozen DIR IMAGE...")
    check_at_least_one(top=parsed.top)
    from fdjax.data.folder import counted_kinds
    from fdjax.data.unlabelled import list_pictures

    network, found = _network(parsed), []
    skipped: Counter[str] = Counter()
    files = [
        file
        for given in parsed.images
        for file in (list_pictures(Path(given), skipped) if os.path.isdir(given) else [given])
    ]
    if skipped:
        print(f"passed over: {counted_kinds(skipped)}", file=sys.stderr)
    for entry in _predictions(network, files, parsed.top):
        if not all(math.isfinite(one["probability"]) for one in entry.get("classes", ())):
            raise UserError(
                f"the frozen network in {parsed.frozen} gives logits that are not finite for {entry['image']}: its "
                "training has diverged; freeze an earlier checkpoint (--which)"
            )
        if "error" in entry and len(files) == 1:
            raise UserError(entry["error"])
        if "error" in entry:
            print(f"warning: {entry['error']}", file=sys.stderr)
        else:
            said = ", ".join(f"{one['name']} {100 * one['probability']:.1f}%" for one in entry["classes"])
            print(f"{entry['image']}: {said}")
        found.append(entry)
    failed = [entry for entry in found if "error" in entry]
    if len(failed) == len(found):
        raise UserError(f"none of the {len(found):,} pictures could be read; see the warnings")
    if failed:
        print(f"{len(failed):,} of {len(found):,} pictures could not be read", file=sys.stderr)
    write_report(parsed.json, found)
    if parsed.csv is not None:
        _write_csv(parsed.csv, found, max(len(entry.get("classes", ())) for entry in found))
    return 0


def _network(parsed: PredictArguments) -> Any:
    """Loads the network of --frozen, which is a folder or an ONNX file."""
    if parsed.frozen.endswith(".onnx"):
        from fdjax.frozen.onnx_file import load_onnx

        if parsed.engine is not None:
            raise UserError(
                f"{parsed.frozen} is an ONNX file, which ONNX Runtime runs: leave out --engine {parsed.engine}, or "
                "give the folder that fdjax freeze wrote"
            )
        return load_onnx(parsed.frozen)
    from fdjax.frozen import load
    from fdjax.frozen.artifact import read_manifest
    from fdjax.frozen.speed import check_made_for

    if parsed.engine is not None:
        check_made_for(read_manifest(Path(parsed.frozen)), [parsed.engine], anyway=parsed.any_engine)
    return load(parsed.frozen, parsed.engine or "xla")


def _predictions(network: Any, files: Sequence[str], top: int) -> Iterator[dict[str, Any]]:
    """Yields for each file, in order, its `image` with either `classes` (name, probability) or `error`."""
    import numpy as np

    from fdjax.data import load_image
    from fdjax.data.folder import readable

    data = network.manifest.get("data", {})
    share, background = data.get("eval_crop", 1.0), data.get("background", "white")
    for start in range(0, len(files), _BATCH):
        chunk = files[start : start + _BATCH]
        pictures, errors = {}, {}
        for file in chunk:
            try:
                pictures[file] = load_image(file, network.input_shape, share, background)
            except UserError as error:
                errors[file] = str(error)
        likeliest = {}
        if pictures:
            # A full batch would take longer than compiling for one or two pictures.
            missing = _BATCH - len(pictures) if len(files) > 2 else 0
            batch = np.stack([*pictures.values(), *[next(iter(pictures.values()))] * missing])
            likeliest = dict(zip(pictures, _likeliest(network, batch, top), strict=False))
        for file in chunk:
            if file in errors:
                yield {"image": readable(file), "error": readable(errors[file])}
            else:
                classes = [{"name": name, "probability": p} for name, p in likeliest[file]]
                yield {"image": readable(file), "classes": classes}


def _likeliest(network: Any, batch: Any, top: int) -> list[list[tuple[str, float]]]:
    import numpy as np

    logits = np.asarray(network.predict(batch), np.float64)
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    orders = np.argsort(-shares, axis=1, kind="stable")[:, :top]
    names = network.class_names or tuple(map(str, range(shares.shape[1])))
    return [[(names[at], float(own[at])) for at in order] for own, order in zip(shares, orders, strict=True)]


def _write_csv(path: str, found: Sequence[dict[str, Any]], top: int) -> None:
    headings = ["image", *(f"{what}{at}" for at in range(1, top + 1) for what in ("class_", "probability_")), "error"]
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(headings)
        for entry in found:
            cells = [cell for one in entry.get("classes", ()) for cell in (one["name"], f"{one['probability']:.6f}")]
            writer.writerow([entry["image"], *(cells or [""] * (2 * top)), entry.get("error", "")])

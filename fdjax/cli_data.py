"""`fdjax data`: preparing and inspecting data sets."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import tyro

from fdjax.errors import UserError, suggestion
from fdjax.json_reports import check_json_target, write_report


@dataclasses.dataclass(kw_only=True)
class PrepareArguments:
    """Writes a TFDS set (array_record, no TensorFlow needed) from what lies on disk; then --data.name NAME finds it.

    An interrupted call goes on where it stopped when it is given again.
    """

    name: tyro.conf.Positional[str]
    """cifar10, cifar100, mnist, fashion_mnist, kmnist, imagenet2012, or a new name for a folder of class folders."""
    source: str
    """CIFAR: the .tar.gz or what it unpacks to, binary or python version. MNIST and its like: the folder of the four
    idx files. ImageNet: the folder of ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar. Else: a folder with
    train/<class>/* and test/<class>/* (or validation, val)."""
    out: str | None = None
    """TFDS's data directory to write into (default: TFDS's own)."""
    labels: str | None = None
    """ImageNet: the validation labels, a text file (NAME SYNSET, or SYNSET in the order of names) or the devkit's
    archive (default: the devkit beside the tar files, else the list that comes with TFDS)."""
    damaged: Literal["stop", "skip"] = "stop"
    """What to do with examples that are truncated, unreadable or have an impossible label; skip counts them."""
    unpublished: bool = False
    """Accept files and numbers of examples other than the published set's."""
    json: str | None = None
    """Write the manifest (counts, checksums, what was skipped) to this file too."""


def prepare_command(arguments: Sequence[str]) -> int:
    """`fdjax data prepare`."""
    parsed = tyro.cli(PrepareArguments, prog="fdjax data prepare", args=arguments)
    check_json_target(parsed.json)
    from fdjax.data.prepare import prepare

    folder, manifest = prepare(
        parsed.name,
        parsed.source,
        parsed.out,
        labels=parsed.labels,
        skip_damaged=parsed.damaged == "skip",
        unpublished=parsed.unpublished,
    )
    for name, split in manifest["splits"].items():
        skipped = f", {split['num_skipped']:,} damaged ones left out" if split["num_skipped"] else ""
        print(f"{name}: {split['examples']:,} images in {len(split['shards'])} shards{skipped}")
        for text in split["skipped"][:5]:
            print(f"  left out: {text}")
    print(f"{folder}: {len(manifest['class_names'])} classes; train with --data.name {manifest['name']}"
          f"{'' if parsed.out is None else f' --data.path {parsed.out}'}")  # fmt: skip
    write_report(parsed.json, manifest)
    return 0


COMMANDS = {"prepare": (prepare_command, "write a TFDS set from archives, idx files, ImageNet's tars or a folder")}


def data_command(arguments: Sequence[str]) -> int:
    """`fdjax data COMMAND ...`."""
    listing = "\n".join(f"  {name:10} {text}" for name, (_, text) in COMMANDS.items())
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: fdjax data COMMAND [OPTIONS]; fdjax data COMMAND --help tells more\n\n{listing}")
        return 0 if arguments else 2
    if arguments[0] not in COMMANDS:
        hint = suggestion(arguments[0], COMMANDS)
        raise UserError(f"no command 'data {arguments[0]}'{hint}; accepted are {', '.join(COMMANDS)}")
    return COMMANDS[arguments[0]][0](arguments[1:])

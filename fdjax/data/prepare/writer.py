"""Writes a set as array_record shards: shuffled, resumable, and under its final name only when complete."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from fdjax.data.batches import seeded_permutation
from fdjax.data.prepare.source import DamagedExample, Source, SourceSplit, file_digest
from fdjax.data.tfds_sets import INFO_FILE, LABELS_FILE, MANIFEST_FILE
from fdjax.errors import UserError

_JOURNAL_FILE = "fdjax_journal.json"
_SHARD_BYTES = 1 << 27
_ORDER_STREAM = 4
_SKIPPED_LISTED = 1000
_FORMAT_VERSION = 1


def write_set(source: Source, data_dir: Path, *, skip_damaged: bool) -> tuple[Path, dict[str, Any]]:
    """Writes a set into a TFDS data directory, or continues where an interrupted call stopped.

    The examples are shuffled over shards of about 128 MB, always in the same way. Shards are written into a hidden
    folder, which becomes `data_dir/NAME/VERSION` when everything has been written and read back. An error removes the
    folder; an interruption leaves it for the next call.

    Args:
      source: the set.
      data_dir: TFDS's data directory.
      skip_damaged: whether to leave damaged examples out and count them, rather than stop.

    Returns:
      The set's folder and its manifest: counts, skipped examples, and checksums of the shards.

    Raises:
      UserError: a set of this name and version exists already, an example is damaged, the directory cannot be written,
        or no space is left.
    """
    folder = data_dir / source.name / source.version
    if folder.exists():
        raise UserError(f"{folder} already exists; remove it, or give another --out")
    draft = folder.with_name(f".{source.version}.draft")
    try:
        draft.mkdir(parents=True, exist_ok=True)
        manifest = _fill(draft, source, skip_damaged)
        draft.rename(folder)
    except UserError:
        _discard(draft)
        raise
    except OSError as error:
        _discard(draft)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"no space is left in {data_dir} for {source.name}; nothing was kept") from error
        raise UserError(f"{error.filename or data_dir} cannot be written: {error.strerror or error}") from error
    return folder, manifest


def _discard(draft: Path) -> None:
    shutil.rmtree(draft, ignore_errors=True)
    with contextlib.suppress(OSError):  # The folder may hold other versions.
        draft.parent.rmdir()


def _fill(draft: Path, source: Source, skip_damaged: bool) -> dict[str, Any]:
    fingerprint = _fingerprint(source, skip_damaged)
    journal = _read_journal(draft, fingerprint)
    total = sum(split.count for split in source.splits.values())
    with tqdm(total=total, desc=f"writing {source.name}", unit=" images", disable=None) as bar:
        for name, split in source.splits.items():
            order = seeded_permutation(split.count, 0, _ORDER_STREAM)
            shards = np.array_split(order, max(1, math.ceil(split.num_bytes / _SHARD_BYTES)))
            for number, indices in enumerate(shards):
                file = f"{source.name}-{name}.array_record-{number:05d}-of-{len(shards):05d}"
                if file not in journal["shards"]:
                    entry = _write_shard(draft / file, source, split, indices, skip_damaged)
                    journal["shards"][file] = {"split": name, **entry}
                    _write_json(draft / _JOURNAL_FILE, journal)
                bar.update(len(indices))
    # Readers go through shards by their numbers, and the journal has one that was damaged and written again at its end.
    journal["shards"] = dict(sorted(journal["shards"].items()))
    splits = {}
    for name in source.splits:
        shards = {file: entry for file, entry in journal["shards"].items() if entry["split"] == name}
        splits[name] = {
            "examples": sum(len(entry["labels"]) for entry in shards.values()),
            "skipped": [text for entry in shards.values() for text in entry["skipped"]],
            "shards": {file: {"examples": len(e["labels"]), "sha256": e["sha256"]} for file, e in shards.items()},
        }
        if not splits[name]["examples"]:
            raise UserError(f"the {name} split of {source.name} has no usable image; nothing was kept")
    _write_metadata(draft, source, splits)
    labels = {
        name: np.concatenate(
            [np.array(e["labels"], np.int32) for e in journal["shards"].values() if e["split"] == name]
        )
        for name in splits
    }
    np.savez(draft / LABELS_FILE, **labels)  # type: ignore[arg-type]
    manifest = {
        "format_version": _FORMAT_VERSION,
        "name": source.name,
        "version": source.version,
        "class_names": list(source.class_names),
        "files": [file.name for file in source.files],
        "splits": {
            name: {**split, "skipped": split["skipped"][:_SKIPPED_LISTED], "num_skipped": len(split["skipped"])}
            for name, split in splits.items()
        },
    }
    _write_json(draft / MANIFEST_FILE, manifest)
    (draft / _JOURNAL_FILE).unlink(missing_ok=True)
    return manifest


def _fingerprint(source: Source, skip_damaged: bool) -> dict[str, Any]:
    """Returns what must be unchanged for the shards of an interrupted call to be used."""
    stats = [file.stat() for file in source.files]
    return {
        "format_version": _FORMAT_VERSION,
        "skip_damaged": skip_damaged,
        "counts": {name: [split.count, split.num_bytes] for name, split in source.splits.items()},
        "class_names": list(source.class_names),
        "files": [[str(f), s.st_size, s.st_mtime_ns] for f, s in zip(source.files, stats, strict=True)],
        "examples": {name: _digest(split) for name, split in source.splits.items()},
    }


def _digest(split: SourceSplit) -> str:
    """Returns a hash of the examples' names and labels, and of the times of those that are files of their own."""
    digest = hashlib.sha256()
    for index in range(split.count):
        name, label, written = split.name_of(index), None, None
        with contextlib.suppress(DamagedExample):
            label = split.label(index)
        with contextlib.suppress(OSError):
            written = os.stat(name).st_mtime_ns
        digest.update(repr((name, label, written)).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _read_journal(draft: Path, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Returns the shards that an interrupted call has finished; removes those that it had only begun."""
    try:
        journal = json.loads((draft / _JOURNAL_FILE).read_text())
        usable = journal["fingerprint"] == json.loads(json.dumps(fingerprint))
    except (OSError, ValueError, KeyError, TypeError):
        usable, journal = False, {}
    if not usable:
        journal = {"fingerprint": fingerprint, "shards": {}}
    sound = {
        file: entry
        for file, entry in journal["shards"].items()
        if (draft / file).is_file() and file_digest(draft / file) == entry["sha256"]
    }
    for entry in draft.iterdir():
        if entry.name not in sound:
            entry.unlink()
    return {**journal, "shards": sound}


def _write_shard(
    file: Path, source: Source, split: SourceSplit, indices: np.ndarray, skip_damaged: bool
) -> dict[str, Any]:
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    partial = file.with_name(f"{file.name}.partial")
    labels, skipped = [], []
    records: dict[int, tuple[bytes, int]] = {}
    # Read in the order of the source, which avoids seeks; each record is then stored at its shuffled place.
    for index, made in _in_threads(source, split, np.sort(indices)):
        if isinstance(made, DamagedExample):
            if not skip_damaged:
                raise UserError(f"{made}; repair it, or give --damaged skip to leave such examples out")
            skipped.append(str(made))
        else:
            records[index] = made
    writer = ArrayRecordWriter(str(partial), "group_size:1")
    try:
        for index in indices.tolist():
            if index in records:
                record, label = records.pop(index)
                _record_error(partial, writer.write, record)
                labels.append(label)
    finally:
        _record_error(partial, writer.close)
    reader = ArrayRecordReader(str(partial))
    found = reader.num_records()
    reader.close()
    if found != len(labels):
        raise OSError(errno.EIO, f"{found} of {len(labels)} records came back", str(partial))
    partial.rename(file)
    return {"labels": labels, "skipped": skipped, "sha256": file_digest(file)}


def _record_error(file: Path, call: Any, *arguments: Any) -> None:
    """Turns an error of array_record, which has only a text, into an `OSError`."""
    try:
        call(*arguments)
    except RuntimeError as error:
        full = "No space left" in str(error) or "RESOURCE_EXHAUSTED" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error), str(file)) from error


def _in_threads(source: Source, split: SourceSplit, indices: np.ndarray) -> Iterator[tuple[int, Any]]:
    """Yields (index, (record, label)) or (index, DamagedExample), in order."""
    features, classes = source.features, len(source.class_names)

    def make(index: int) -> tuple[int, Any]:
        try:
            label = split.label(index)
            if not 0 <= label < classes:
                raise DamagedExample(
                    f"{split.name_of(index)} has the label {label}; with {classes} classes it must be 0..{classes - 1}"
                )
            fields = split.read(index)
            fields["image"] = _Encoded(fields["image"])
            example = features.encode_example({**fields, "label": label})
            return index, (features.serialize_example(example), label)
        except DamagedExample as error:
            return index, error

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        yield from pool.map(make, indices.tolist())


class _Encoded:
    """An encoded image in the form that TFDS accepts: an object with a method `read`."""

    def __init__(self, content: bytes):
        self._content = content

    def read(self) -> bytes:
        return self._content


def _write_metadata(draft: Path, source: Source, splits: dict[str, Any]) -> None:
    import tensorflow_datasets as tfds

    infos = []
    for name, split in splits.items():
        lengths = [shard["examples"] for shard in split["shards"].values()]
        size = sum((draft / file).stat().st_size for file in split["shards"])
        infos.append(tfds.core.SplitInfo(name=name, shard_lengths=lengths, num_bytes=size))
    tfds.folder_dataset.write_metadata(
        data_dir=str(draft),
        features=source.features,
        split_infos=infos,
        version=source.version,
        check_data=False,
        supervised_keys=("image", "label"),
        **source.info,
    )
    if not (draft / INFO_FILE).is_file():
        raise UserError(f"TFDS has written no {INFO_FILE} into {draft}")


def _write_json(file: Path, value: Any) -> None:
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(partial, file)

"""`fdjax data prepare`: original layouts in, TFDS sets out that the stock names find, without TensorFlow or network."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import socket
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fdjax.commands.main import fdjax_command
from fdjax.data import load_dataset
from fdjax.data.prepare import prepare, writer
from fdjax.data.prepare.pictures import checked_picture
from fdjax.errors import UserError
from tests.original_layouts import (
    CIFAR10_CLASSES,
    SYNSETS,
    add_member,
    cifar10_examples,
    jpeg,
    random_pixels,
    write_cifar10_binary,
    write_cifar10_python,
    write_cifar100,
    write_folder,
    write_idx,
    write_idx_folder,
    write_imagenet,
)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"something asked the network: {args}")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)


def by_content(images: np.ndarray, labels: np.ndarray) -> list[tuple[bytes, int]]:
    return sorted((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))


def leftovers(data_dir: Path) -> list[str]:
    return sorted(str(path.relative_to(data_dir)) for path in data_dir.rglob("*")) if data_dir.exists() else []


# Layouts


@pytest.mark.parametrize("layout", ["binary folder", "folder above it", "python archive"])
def test_cifar10_is_found_by_the_stock_builder_pixel_for_pixel(tmp_path: Path, layout: str) -> None:
    had_tensorflow = "tensorflow" in sys.modules
    if layout == "python archive":
        source = write_cifar10_python(tmp_path / "cifar-10-python.tar.gz")
    else:
        source = write_cifar10_binary(tmp_path / "from" / "cifar-10-batches-bin")
        source = source.parent if layout == "folder above it" else source
    out = tmp_path / "out"
    folder, manifest = prepare("cifar10", str(source), str(out), unpublished=True)
    assert folder == out / "cifar10" / "3.0.2" and manifest["class_names"] == list(CIFAR10_CLASSES)
    examples = cifar10_examples()
    train = [np.concatenate(arrays) for arrays in zip(*(examples[f"data_batch_{n}"] for n in range(1, 6)), strict=True)]
    dataset = load_dataset("cifar10", str(out))
    assert dataset.class_names == CIFAR10_CLASSES
    assert by_content(dataset.train_images, dataset.train_labels) == by_content(*train)
    assert by_content(dataset.test_images, dataset.test_labels) == by_content(*examples["test_batch"])
    assert not np.array_equal(dataset.train_images, train[0]), "the stored order must be shuffled"

    import tensorflow_datasets as tfds

    builder: Any = tfds.builder("cifar10", data_dir=str(out), try_gcs=False)
    stored = list(builder.as_data_source("train"))
    assert by_content(np.stack([e["image"] for e in stored]), np.array([e["label"] for e in stored])) == by_content(
        *train
    )
    assert {e["id"] for e in stored} == {f"train_{n:05}".encode() for n in range(50)}
    assert builder.info.splits["train"].num_examples == 50
    assert builder.info.features["label"].names == list(CIFAR10_CLASSES)
    assert ("tensorflow" in sys.modules) == had_tensorflow


@pytest.mark.parametrize("binary", [True, False])
def test_cifar100_has_both_kinds_of_labels(tmp_path: Path, binary: bool) -> None:
    source = write_cifar100(tmp_path / "from", binary=binary)
    folder, _ = prepare("cifar100", str(source), str(tmp_path / "out"), unpublished=True)
    dataset = load_dataset("cifar100", str(tmp_path / "out"))
    assert dataset.class_names == tuple(f"fine{n}" for n in range(100))
    assert by_content(dataset.train_images, dataset.train_labels) == by_content(
        random_pixels(0, 100, 32, 32, 3), np.arange(100)
    )
    import tensorflow_datasets as tfds

    first = tfds.builder_from_directory(str(folder)).as_data_source("test")[0]  # type: ignore[index]
    assert first["coarse_label"] == first["label"] // 5


@pytest.mark.parametrize(("name", "end"), [("mnist", ".gz"), ("fashion_mnist", "")])
def test_idx_files(tmp_path: Path, name: str, end: str) -> None:
    source = write_idx_folder(tmp_path / "from", 40, end)
    prepare(name, str(source), str(tmp_path / "out"), unpublished=True)
    dataset = load_dataset(name, str(tmp_path / "out"))
    assert dataset.image_shape == (28, 28, 1)
    assert by_content(dataset.test_images, dataset.test_labels) == by_content(
        random_pixels(1, 40, 28, 28), np.arange(40) * 7 % 10
    )
    assert dataset.class_names[1] == ("Trouser" if name == "fashion_mnist" else "1")


@pytest.mark.parametrize("labels", ["devkit", "names", "order"])
def test_imagenet_from_its_tar_files(tmp_path: Path, labels: str) -> None:
    source, out = write_imagenet(tmp_path / "from"), tmp_path / "out"
    given = None
    if labels == "devkit":
        from scipy.io import savemat

        kind = [("ILSVRC2012_ID", "O"), ("WNID", "O")]
        synsets = np.array([(7, SYNSETS[0]), (5, SYNSETS[1]), (6, SYNSETS[2])], dtype=kind)
        savemat(tmp_path / "meta.mat", {"synsets": synsets})
        with tarfile.open(source / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
            add_member(tar, "devkit/data/meta.mat", (tmp_path / "meta.mat").read_bytes())
            add_member(tar, "devkit/data/ILSVRC2012_validation_ground_truth.txt", b"6\n7\n5\n")
    else:
        rows = zip((1, 2, 3), (SYNSETS[2], SYNSETS[0], SYNSETS[1]), strict=True)
        name = "ILSVRC2012_val_{:08}.JPEG " if labels == "names" else ""
        given = str(tmp_path / "labels.txt")
        Path(given).write_text("".join(f"{name.format(number)}{synset}\n" for number, synset in rows))
    with pytest.raises(UserError, match=r"missing\.txt cannot be read: .*No such file"):
        prepare("imagenet2012", str(source), str(out), labels=str(tmp_path / "missing.txt"), unpublished=True)
    folder, manifest = prepare("imagenet2012", str(source), str(out), labels=given, unpublished=True)
    assert folder.name == "5.1.0" and {k: v["examples"] for k, v in manifest["splits"].items()} == {
        "train": 6,
        "validation": 3,
    }
    dataset = load_dataset("imagenet2012", str(out), image_size=8)
    classes = [dataset.class_names[label] for label in dataset.train_labels]
    # JPEG, CMYK and grey keep a constant colour to within a step or two.
    assert sorted(zip(classes, np.round(dataset.train_images.mean((1, 2, 3)) / 20).tolist(), strict=True)) == [
        (synset, 3.0 * c + 1) for c, synset in enumerate(SYNSETS) for _ in range(2)
    ]
    # By picture: 1 is of SYNSETS[2], 2 of SYNSETS[0], 3 of SYNSETS[1].
    found = {
        round(float(image.mean()) / 10): dataset.class_names[label]
        for image, label in zip(dataset.test_images, dataset.test_labels, strict=True)
    }
    assert found == {1: SYNSETS[2], 2: SYNSETS[0], 3: SYNSETS[1]}

    import tensorflow_datasets as tfds

    decoders: Any = {"image": tfds.decode.SkipDecoding()}
    stored = list(tfds.builder("imagenet2012", data_dir=str(out)).as_data_source("train", decoders=decoders))  # type: ignore[arg-type]
    assert all(example["image"][:2] == b"\xff\xd8" for example in stored), "all are JPEG, as the stock set has them"
    with tarfile.open(source / "ILSVRC2012_img_train.tar") as tar:
        inner = tar.extractfile("n01440764.tar")
        assert inner is not None
        with tarfile.open(fileobj=inner) as nested:
            original = nested.extractfile("n01440764_0.JPEG").read()  # type: ignore[union-attr]
    assert [e["image"] for e in stored if e["file_name"] == b"n01440764_0.JPEG"] == [original]


def test_a_folder_keeps_jpeg_and_png_and_converts_the_rest(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "from")
    kept = (root / "train" / "cat" / "odd.jpg", root / "train" / "cat" / "grey.png")
    kept[0].write_bytes(jpeg(random_pixels(1, 32, 32, 3)))
    Image.fromarray(random_pixels(2, 32, 32)).save(kept[1])
    Image.fromarray(random_pixels(3, 32, 32, 3)).save(root / "train" / "cat" / "other.bmp")
    (root / "test").rename(root / "val")
    folder, manifest = prepare("my_pictures", str(root), str(tmp_path / "out"))
    assert folder == tmp_path / "out" / "my_pictures" / "1.0.0"
    expected, got = load_dataset("folder", str(root)), load_dataset("my_pictures", str(tmp_path / "out"))
    assert got.class_names == expected.class_names
    assert by_content(got.train_images, got.train_labels) == by_content(expected.train_images, expected.train_labels)
    assert by_content(got.test_images, got.test_labels) == by_content(expected.test_images, expected.test_labels)
    import tensorflow_datasets as tfds

    decoders: Any = {"image": tfds.decode.SkipDecoding()}
    stored = tfds.builder_from_directory(str(folder)).as_data_source("train", decoders=decoders)
    encoded = {e["file_name"].decode(): e["image"] for e in stored}  # type: ignore[union-attr]
    assert all(encoded[f"cat/{file.name}"] == file.read_bytes() for file in kept)
    assert encoded["cat/other.bmp"].startswith(b"\x89PNG")
    assert manifest["splits"]["train"]["examples"] == 53


def test_what_a_jpeg_and_a_plain_png_are() -> None:
    """A multi-picture file is stored as it is; a PNG with a transparent colour becomes opaque."""
    first, second = (Image.fromarray(random_pixels(seed, 24, 32, 3)) for seed in (1, 2))
    several, see_through = io.BytesIO(), io.BytesIO()
    first.save(several, "MPO", save_all=True, append_images=[second])
    assert checked_picture(several.getvalue(), "several.jpg") == several.getvalue()
    assert checked_picture(several.getvalue(), "several.jpg", "JPEG") == several.getvalue()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(see_through, "PNG", transparency=(1, 2, 3))
    stored = Image.open(io.BytesIO(checked_picture(see_through.getvalue(), "see_through.png")))
    assert "transparency" not in stored.info and stored.getpixel((0, 0)) == (255, 255, 255)


# Trained on by name


@pytest.mark.usefixtures("quick_runs")
def test_prepared_sets_train_for_an_epoch_by_their_names(tmp_path: Path) -> None:
    """All layouts of one content make one program, which is compiled once."""
    from fdjax.config import CheckpointConfig, Config, DataConfig, ModelConfig, WeightPhaseConfig
    from fdjax.training.run import train

    had_tensorflow = "tensorflow" in sys.modules
    out, sources = str(tmp_path / "out"), tmp_path / "from"
    prepare("cifar10", str(write_cifar10_binary(sources / "binary")), f"{out}/binary", unpublished=True)
    archive = write_cifar10_python(sources / "cifar-10-python.tar.gz")
    prepare("cifar10", str(archive), f"{out}/python", unpublished=True)
    prepare("my_set", str(write_folder(sources / "folder")), f"{out}/folder")
    prepare("mnist", str(write_idx_folder(sources / "idx", 50)), f"{out}/idx", unpublished=True)
    summaries = {}
    for kind, name in (("binary", "cifar10"), ("python", "cifar10"), ("folder", "my_set"), ("idx", "mnist")):
        config = Config(
            phases=("pretrain",),
            data=DataConfig(name=name, path=f"{out}/{kind}", batch_size=25, crop_padding=1),
            model=ModelConfig(name="mobilenetv2_small", width=0.3),
            pretrain=WeightPhaseConfig(epochs=1.0, learning_rate=0.01),
            checkpoint=CheckpointConfig(evaluate_every_epochs=5.0),
        )
        summary = train(config, str(tmp_path / "runs" / kind))
        summaries[kind] = summary
        assert summary["phases"][0]["steps"] == 2 and summary["num_examples"] == (50 if kind == "idx" else 10)
        spec = json.loads((tmp_path / "runs" / kind / "config.json").read_text())
        assert spec["data"]["name"] == name
    assert summaries["binary"]["loss"] == pytest.approx(summaries["python"]["loss"], rel=1e-6)
    assert ("tensorflow" in sys.modules) == had_tensorflow


# Interrupted


@pytest.mark.parametrize("damaged", [False, True])
def test_an_interrupted_call_goes_on_and_ends_in_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    """Also if a shard that was complete has been damaged since."""
    source = write_folder(tmp_path / "from")
    monkeypatch.setattr(writer, "_SHARD_BYTES", 40_000)
    folder, manifest = prepare("pictures", str(source), str(tmp_path / "whole"))
    shards = manifest["splits"]["train"]["shards"]
    assert len(shards) >= 3
    write_shard, written = writer._write_shard, []

    def interrupted(file: Path, *arguments: Any) -> Any:
        if len(written) == 2:
            file.with_name(f"{file.name}.partial").write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(file.name)
        return write_shard(file, *arguments)

    monkeypatch.setattr(writer, "_write_shard", interrupted)
    out = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        prepare("pictures", str(source), str(out))
    assert not (out / "pictures" / "1.0.0").exists()
    with pytest.raises(UserError, match="holds no prepared 'pictures'"):
        load_dataset("pictures", str(out))
    if damaged:
        (lost,) = out.rglob(written.pop(0))
        lost.write_bytes(b"")
    again: list[str] = []

    def counted(file: Path, *arguments: Any) -> Any:
        again.append(file.name)
        return write_shard(file, *arguments)

    monkeypatch.setattr(writer, "_write_shard", counted)
    resumed_folder, resumed = prepare("pictures", str(source), str(out))
    assert len(again) + len(written) == sum(len(split["shards"]) for split in manifest["splits"].values())
    # As text, because the order of the shards is that of the examples.
    assert not set(again) & set(written) and json.dumps(resumed) == json.dumps(manifest)
    labels, expected = (np.load(of / writer.LABELS_FILE)["train"] for of in (resumed_folder, folder))
    np.testing.assert_array_equal(labels, expected)
    names = sorted(path.name for path in folder.iterdir())
    assert sorted(path.name for path in resumed_folder.iterdir()) == names
    assert not any(name.startswith((".", "fdjax_journal")) or name.endswith(".partial") for name in names)


def test_a_changed_source_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_idx_folder(tmp_path / "from", 20)
    write_metadata = writer._write_metadata
    monkeypatch.setattr(writer, "_write_metadata", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare("mnist", str(source), str(tmp_path / "out"), unpublished=True)
    write_idx(source / "train-labels-idx1-ubyte.gz", np.full(20, 3, np.uint8))
    monkeypatch.setattr(writer, "_write_metadata", write_metadata)
    prepare("mnist", str(source), str(tmp_path / "out"), unpublished=True)
    assert load_dataset("mnist", str(tmp_path / "out")).train_labels.tolist() == [3] * 20


def test_pictures_that_have_changed_places_are_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_folder(tmp_path / "from")
    write_metadata = writer._write_metadata
    monkeypatch.setattr(writer, "_write_metadata", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare("pictures", str(source), str(tmp_path / "out"))
    first, second = (sorted((source / "train" / name).iterdir())[0] for name in ("cat", "dog"))
    contents = [file.read_bytes() for file in (first, second)]
    for file, content in zip((second, first), contents, strict=True):
        file.unlink()
        file.write_bytes(content)
    monkeypatch.setattr(writer, "_write_metadata", write_metadata)
    prepare("pictures", str(source), str(tmp_path / "out"))
    prepare("pictures", str(source), str(tmp_path / "anew"))
    found, expected = (load_dataset("pictures", str(tmp_path / out), 16) for out in ("out", "anew"))
    np.testing.assert_array_equal(found.train_images, expected.train_images)
    np.testing.assert_array_equal(found.train_labels, expected.train_labels)


# Bad input


def cut(name: str, size: int) -> Callable[[Path], None]:
    def damage(source: Path) -> None:
        (source / name).write_bytes((source / name).read_bytes()[:size])

    return damage


def wrong_label(source: Path) -> None:
    content = bytearray((source / "data_batch_2.bin").read_bytes())
    content[3 * 3073] = 10
    (source / "data_batch_2.bin").write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message", "kept"),
    [
        (
            cut("data_batch_3.bin", 7000),
            r"data_batch_3\.bin is truncated.* record 2, at offset 6,146, is incomplete",
            42,
        ),
        (wrong_label, r"data_batch_2\.bin, record 3 at offset 9,219 has the label 10; .* it must be 0\.\.9", 49),
    ],
)
def test_damaged_cifar_files_stop_or_are_counted(
    tmp_path: Path, damage: Callable[[Path], None], message: str, kept: int, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write_cifar10_binary(tmp_path / "from"), tmp_path / "out"
    damage(source)
    arguments = ["data", "prepare", "cifar10", "--source", str(source), "--out", str(out), "--unpublished"]
    with pytest.raises(SystemExit) as stopped:
        fdjax_command(arguments)
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and len(error.splitlines()) == 1
    with pytest.raises(UserError, match=message):
        prepare("cifar10", str(source), str(out), unpublished=True)
    assert leftovers(out) in ([], ["cifar10"])
    assert fdjax_command([*arguments, "--damaged", "skip"]) == 0
    assert f"train: {kept} images" in capsys.readouterr().out
    assert len(load_dataset("cifar10", str(out)).train_labels) == kept


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "train-images-idx3-ubyte",
            b"",
            r"train-images-idx3-ubyte is not an idx file of images: it begins with nothing",
        ),
        (
            "train-labels-idx1-ubyte",
            b"\x00\x00\x08\x03" + bytes(60),
            "not an idx file of labels: it begins with 00000803",
        ),
        ("t10k-images-idx3-ubyte", None, "promises 20 images, but it holds .* it ends in index 17, at offset 14,000"),
    ],
)
def test_damaged_idx_files(tmp_path: Path, file: str, content: bytes | None, message: str) -> None:
    source, out = write_idx_folder(tmp_path / "from", 20, ""), tmp_path / "out"
    (source / file).write_bytes((source / file).read_bytes()[:14_000] if content is None else content)
    with pytest.raises(UserError, match=message):
        prepare("mnist", str(source), str(out), unpublished=True)
    assert leftovers(out) == []
    if content is None:
        _, manifest = prepare("mnist", str(source), str(out), skip_damaged=True, unpublished=True)
        assert manifest["splits"]["test"]["examples"] == 17


def test_a_damaged_picture_of_a_folder_is_named_or_counted(tmp_path: Path) -> None:
    source, out = write_folder(tmp_path / "from"), tmp_path / "out"
    file = source / "train" / "cat" / "half.jpg"
    file.write_bytes(jpeg(random_pixels(0, 64, 64, 3))[:1500])
    with pytest.raises(UserError, match=r"half\.jpg is a damaged or unsupported image.*--damaged skip"):
        prepare("pictures", str(source), str(out))
    assert leftovers(out) == []
    _, manifest = prepare("pictures", str(source), str(out), skip_damaged=True)
    assert manifest["splits"]["train"]["num_skipped"] == 1 and "half.jpg" in manifest["splits"]["train"]["skipped"][0]
    assert len(load_dataset("pictures", str(out)).train_labels) == 50


def test_imagenet_with_missing_or_truncated_files(tmp_path: Path) -> None:
    source, out = write_imagenet(tmp_path / "from"), tmp_path / "out"
    (tmp_path / "labels.txt").write_text(f"{SYNSETS[0]}\n" * 2)

    def refused(message: str, **options: Any) -> None:
        with pytest.raises(UserError, match=message):
            prepare("imagenet2012", str(source), str(out), unpublished=True, **options)
        assert leftovers(out) == []

    refused(r"labels\.txt has 2 labels for 3 validation pictures|names no class", labels=str(tmp_path / "labels.txt"))
    (tmp_path / "labels.txt").write_text(f"{SYNSETS[0]}\nfish\n")
    refused(r"labels\.txt, line 2 is 'fish'; it must be", labels=str(tmp_path / "labels.txt"))
    (tmp_path / "labels.txt").write_text("n99999999\n" * 3)
    refused(r"val_0000000\d\.JPEG at offset .* has the label -1", labels=str(tmp_path / "labels.txt"))
    content = (source / "ILSVRC2012_img_train.tar").read_bytes()
    (source / "ILSVRC2012_img_train.tar").write_bytes(content[:9000])
    refused(r"ILSVRC2012_img_train\.tar is not a tar file, or is truncated|is truncated")
    (source / "ILSVRC2012_img_val.tar").unlink()
    refused(r"has no file ILSVRC2012_img_val\.tar")


def test_published_checksums_and_counts_are_asked_for(tmp_path: Path) -> None:
    archive = write_cifar10_python(tmp_path / "cifar-10-python.tar.gz")
    with pytest.raises(UserError, match=r"is not the published file: its md5 is .*c58f30108f718f92721af3b95e74349a"):
        prepare("cifar10", str(archive), str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte\.gz is not the published file: its sha256|t10k"):
        prepare("fashion_mnist", str(write_idx_folder(tmp_path / "idx", 20)), str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"split has 50 examples, and the published set has 50,000.*--unpublished"):
        prepare("cifar10", str(write_cifar10_binary(tmp_path / "bin")), str(tmp_path / "out"))
    assert leftovers(tmp_path / "out") == []


def test_a_pickle_that_would_run_code_does_not(tmp_path: Path) -> None:
    source = write_cifar100(tmp_path / "from", binary=False)

    class Harmful:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "harm"),)

    (source / "train").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(UserError, match=r"it asks for posix\.mkdir"):
        prepare("cifar100", str(source), str(tmp_path / "out"), unpublished=True)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar10", "holds no cifar10 in its original layout"),
        ("mnist", r"has no file train-images-idx3-ubyte\.gz"),
        ("imagenet2012", r"has no file ILSVRC2012_img_train\.tar"),
        ("emnist", "another set of TFDS, whose original layout fdjax does not know"),
        ("cifar_10", r"not a folder with train/<class>/\*.*did you mean 'cifar100?'"),
        ("My/Set", "cannot be named 'My/Set'"),
    ],
)
def test_sources_without_what_they_should_hold(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        prepare(name, str(tmp_path / "empty"), str(tmp_path / "out"))
    with pytest.raises(UserError, match="is not there"):
        prepare(name, str(tmp_path / "nowhere"), str(tmp_path / "out"))
    assert leftovers(tmp_path / "out") == []


def test_a_folder_without_a_split_or_images(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "from")
    (source / "train" / "zebra").mkdir()
    with pytest.raises(UserError, match="zebra holds no images"):
        prepare("pictures", str(source), str(tmp_path / "out"))
    (source / "train" / "zebra").rmdir()
    shutil.rmtree(source / "test")
    with pytest.raises(UserError, match="has no folder 'test'"):
        prepare("pictures", str(source), str(tmp_path / "out"))


def test_names_that_could_not_be_read_back(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "from")
    for name in ("folder", "prepared", "fashion_mnist_subset"):
        with pytest.raises(UserError, match="means something else; give the set another name"):
            prepare(name, str(source), str(tmp_path / "out"))
    for split in ("train", "test"):
        (source / split / "cat").rename(source / split / "cat ")
    with pytest.raises(UserError, match="'cat ' begins or ends with a space"):
        prepare("pictures", str(source), str(tmp_path / "out"))


def test_targets_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = str(write_idx_folder(tmp_path / "from", 20))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is a file; give a directory"):
        prepare("mnist", source, str(tmp_path / "file"), unpublished=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        with pytest.raises(UserError, match="is not writable; give another one"):
            prepare("mnist", source, str(tmp_path / "out"), unpublished=True)
    prepare("mnist", source, str(tmp_path / "out"), unpublished=True)
    with pytest.raises(UserError, match=r"3\.0\.1 already exists; remove it, or give another --out"):
        prepare("mnist", source, str(tmp_path / "out"), unpublished=True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_no_space_left_is_said_in_a_line_and_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shard goes to a device that is always full."""
    import array_record.python.array_record_module as module

    full = module.ArrayRecordWriter
    monkeypatch.setattr(module, "ArrayRecordWriter", lambda file, options: full("/dev/full", options))
    source = str(write_idx_folder(tmp_path / "from", 20))
    with pytest.raises(UserError, match=r"no space is left in .*; nothing was kept"):
        prepare("mnist", source, str(tmp_path / "out"), unpublished=True)
    assert leftovers(tmp_path / "out") == []


def test_the_command_says_what_it_has_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write_idx_folder(tmp_path / "from", 20), tmp_path / "out"
    arguments = ["--source", str(source), "--out", str(out), "--unpublished", "--json", str(tmp_path / "report.json")]
    assert fdjax_command(["data", "prepare", "mnist", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "train: 20 images in 1 shards" in printed and f"--data.name mnist --data.path {out}" in printed
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == json.loads((out / "mnist" / "3.0.1" / "fdjax_manifest.json").read_text())
    assert fdjax_command(["data"]) == 2 and fdjax_command(["data", "--help"]) == 0
    with pytest.raises(SystemExit) as stopped:
        fdjax_command(["data", "prepair"])
    assert stopped.value.code == 2 and "did you mean 'prepare'" in capsys.readouterr().err


# The real files, where they are there


@pytest.mark.slow
def test_fashion_mnist_of_debian(tmp_path: Path) -> None:
    folder = next((f for f in Path("/usr/share").glob("datasets/fashion-mnist*") if f.is_dir()), None)
    if folder is None:
        pytest.skip("needs Debian's dataset-fashion-mnist")
    prepare("fashion_mnist", str(folder), str(tmp_path))
    dataset = load_dataset("fashion_mnist", str(tmp_path))
    np.testing.assert_array_equal(np.bincount(dataset.train_labels), [6000] * 10)

"""Data: the embedded subset and its tool, image folders, TFDS without TensorFlow or network, augmentation, batching."""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from fdjax import data
from fdjax.data import decode
from fdjax.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
SEEDS = st.integers(-(2**63), 2**63)


def save_image(file: Path, pixels: np.ndarray, **options: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file, **options)


def random_pixels(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def make_folder(root: Path, height: int = 6, width: int = 6, per_class: int = 2) -> Path:
    """Writes an image folder with the classes ant and bee."""
    for s, split in enumerate(("train", "test")):
        for c, name in enumerate(("ant", "bee")):
            for i in range(per_class):
                save_image(root / split / name / f"{i:03}.png", random_pixels(100 * i + 10 * s + c, height, width, 3))
    return root


# The embedded subset and the tool that makes it


def test_subset_is_balanced_small_and_licensed() -> None:
    dataset = data.load_dataset("fashion_mnist_subset")
    assert dataset.train_images.shape == (10_000, 28, 28, 1) and dataset.train_images.dtype == np.uint8
    assert dataset.test_images.shape == (2_000, 28, 28, 1) and dataset.test_images.dtype == np.uint8
    assert dataset.train_labels.dtype == dataset.test_labels.dtype == np.int32
    np.testing.assert_array_equal(np.bincount(dataset.train_labels), [1000] * 10)
    np.testing.assert_array_equal(np.bincount(dataset.test_labels), [200] * 10)
    assert dataset.image_shape == (28, 28, 1) and dataset.num_classes == 10
    assert dataset.class_names[0] == "T-shirt/top" and dataset.class_names[9] == "Ankle boot"
    assert len(np.unique(dataset.train_labels[:100])) == 10, "the order must be shuffled"
    mean, std = data.channel_statistics(dataset.train_images)
    # The full training set's published statistics are 0.2860 and 0.3530 of 255.
    assert mean[0] / 255 == pytest.approx(0.2860, abs=0.005) and std[0] / 255 == pytest.approx(0.3530, abs=0.005)
    folder = ROOT / "fdjax" / "data"
    assert (folder / "fashion_mnist_subset.npz").stat().st_size < 6_000_000
    notice = (folder / "FASHION_MNIST_LICENSE.txt").read_text(encoding="utf-8")
    assert "Zalando SE" in notice and "MIT License" in notice and "subset" in notice


def test_subset_is_resized_on_request() -> None:
    plain, larger = data.load_dataset("fashion_mnist_subset"), data.load_dataset("fashion_mnist_subset", image_size=32)
    assert larger.image_shape == (32, 32, 1)
    expected = Image.fromarray(plain.test_images[7, :, :, 0]).resize((32, 32), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(larger.test_images[7, :, :, 0], np.asarray(expected))


@pytest.fixture
def subset_tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("subset_tool", ROOT / "tools" / "make_fashion_mnist_subset.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(tool, "TRAIN_PER_CLASS", 4)
    monkeypatch.setattr(tool, "TEST_PER_CLASS", 2)
    return tool


def write_idx(file: Path, array: np.ndarray) -> None:
    header = b"\x00\x00\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    file.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    for prefix, count in (("train", 120), ("t10k", 60)):
        labels = (np.arange(count) * 7 % 10).astype(np.uint8)
        images = random_pixels(count, count, 28, 28)
        images[:, 0, 0] = labels  # so that a test can see whether image and label stay together
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", labels)
    return tmp_path


def test_tool_writes_the_same_bytes_whenever_it_runs(
    subset_tool: ModuleType, idx_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    for run, seed in enumerate((3, 3, 4)):
        out = idx_folder / f"{run}.npz"
        monkeypatch.setattr("time.time", lambda run=run: 1.7e9 + 1e6 * run)
        arguments = ["tool", "--source", str(idx_folder), "--out", str(out), "--seed", str(seed)]
        monkeypatch.setattr(sys, "argv", arguments)
        assert subset_tool.main() == 0
        written.append(out.read_bytes())
    assert written[0] == written[1] != written[2]
    with zipfile.ZipFile(io.BytesIO(written[0])) as archive:
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    with np.load(io.BytesIO(written[0])) as arrays:
        for split, per_class in (("train", 4), ("test", 2)):
            images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
            np.testing.assert_array_equal(np.bincount(labels), [per_class] * 10)
            np.testing.assert_array_equal(images[:, 0, 0], labels)
            assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images), "an example came twice"


@pytest.mark.parametrize(
    "content", [b"not gzip", gzip.compress(b"\x00\x00\x08", mtime=0), gzip.compress(b"\x00\x00\x08\x01\0\0", mtime=0)]
)
def test_tool_refuses_damaged_files(
    subset_tool: ModuleType, idx_folder: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (idx_folder / "t10k-labels-idx1-ubyte.gz").write_bytes(content)
    out = idx_folder / "out.npz"
    monkeypatch.setattr(sys, "argv", ["tool", "--source", str(idx_folder), "--out", str(out)])
    assert subset_tool.main() == 2
    assert not out.exists()


# Image folders


def test_folder_keeps_pixels_and_orders_classes_by_name(tmp_path: Path) -> None:
    pixels = {(c, i): random_pixels(10 * c + i, 5, 7, 3) for c in range(3) for i in range(3)}
    for c, name in enumerate(("apple", "bear", "cow")):
        for i in (2, 0, 1):
            save_image(tmp_path / "train" / name / f"{i}.png", pixels[c, i])
    save_image(tmp_path / "test" / "cow" / "x.bmp", pixels[0, 0])  # a test set may lack classes
    (tmp_path / "train" / ".DS_Store").write_bytes(b"x")
    (tmp_path / "train" / "apple" / ".hidden").write_bytes(b"x")
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / "labels.csv").write_text("not a class folder")
    data.check_source("folder", str(tmp_path))
    dataset = data.load_dataset("folder", str(tmp_path))
    assert dataset.class_names == ("apple", "bear", "cow") and dataset.image_shape == (5, 7, 3)
    np.testing.assert_array_equal(dataset.train_labels, np.repeat([0, 1, 2], 3))
    np.testing.assert_array_equal(dataset.train_images, np.stack([pixels[c, i] for c in range(3) for i in range(3)]))
    np.testing.assert_array_equal(dataset.test_labels, [2])
    np.testing.assert_array_equal(dataset.test_images, pixels[0, 0][None])
    assert dataset.train_images.dtype == np.uint8 and dataset.train_labels.dtype == np.int32


def test_folder_reads_large_images_in_order_through_threads(tmp_path: Path) -> None:
    make_folder(tmp_path, 64, 64, per_class=1)
    for i in range(150):
        save_image(tmp_path / "train" / "bee" / f"b{i:03}.bmp", np.full((64, 64, 3), i, np.uint8))
    dataset = data.load_dataset("folder", str(tmp_path))
    np.testing.assert_array_equal(dataset.train_images[2:, 0, 0, 0], np.arange(150))
    np.testing.assert_array_equal(dataset.train_images[2:].min(axis=(1, 2, 3)), np.arange(150))
    np.testing.assert_array_equal(dataset.train_images[2:].max(axis=(1, 2, 3)), np.arange(150))
    (tmp_path / "train" / "bee" / "b120.bmp").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"b120\.bmp is not an image"):
        data.load_dataset("folder", str(tmp_path))


def test_folder_brings_every_pixel_format_to_eight_bits(tmp_path: Path) -> None:
    make_folder(tmp_path, 4, 4)
    folder = tmp_path / "train" / "cat"
    grey = np.arange(0, 256, 16, dtype=np.uint8).reshape(4, 4)
    save_image(folder / "0.png", grey)
    save_image(folder / "1.png", grey.astype(np.uint16) * 257)
    Image.fromarray(grey).convert("P").save(folder / "2.gif")
    Image.fromarray(grey).convert("RGBA").save(folder / "3.png")
    Image.fromarray(grey).convert("LA").save(folder / "4.png")
    Image.fromarray(grey > 127).save(folder / "5.png")
    for grayscale in (False, True):
        images = data.load_dataset("folder", str(tmp_path), grayscale=grayscale).train_images[-6:]
        assert images.shape == (6, 4, 4, 1 if grayscale else 3)
        np.testing.assert_array_equal(images[:5], np.broadcast_to(grey[:, :, None], images[:5].shape))
        np.testing.assert_array_equal(images[5, ..., 0], np.where(grey > 127, 255, 0))
    Image.fromarray(grey.astype(np.float32)).save(folder / "6.tiff")
    with pytest.raises(UserError, match=r"6\.tiff has 32-bit pixels"):
        data.load_dataset("folder", str(tmp_path))


def test_image_size_resizes_the_middle_square_and_leaves_fitting_images_alone(tmp_path: Path) -> None:
    make_folder(tmp_path, 8, 8)
    wide, high, fitting = random_pixels(1, 16, 32, 3), random_pixels(2, 24, 8, 3), random_pixels(3, 8, 8, 3)
    for i, pixels in enumerate((wide, high, fitting)):
        save_image(tmp_path / "train" / "cat" / f"{i}.png", pixels)
    images = data.load_dataset("folder", str(tmp_path), image_size=8).train_images[-3:]
    resized = np.asarray(Image.fromarray(wide).resize((16, 8), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(images[0], resized[:, 4:12])
    np.testing.assert_array_equal(images[1], high[8:16])
    np.testing.assert_array_equal(images[2], fitting)


@settings(deadline=None)
@example(900, 1200, (224, 224), 1.0)
@example(218, 400, (120, 200), 1.0)
@given(
    st.integers(1, 1300),
    st.integers(1, 1300),
    st.sampled_from([(28, 28), (100, 100), (200, 200), (224, 224), (299, 299), (120, 200)]),
    st.sampled_from([1.0, 0.875]),
)
def test_the_middle_of_a_picture_of_any_size_lies_within_it(
    width: int, height: int, size: tuple[int, int], share: float
) -> None:
    """Pillow refuses a part that goes beyond the picture, even by the last bit of a number."""
    fitted = decode.fit_middle(Image.new("L", (width, height), 7), size, share)
    assert fitted.size == size[::-1] and fitted.getextrema() == (7, 7)


def test_differing_sizes_need_an_image_size(tmp_path: Path) -> None:
    make_folder(tmp_path, 6, 6)
    save_image(tmp_path / "test" / "bee" / "z.png", random_pixels(0, 6, 9, 3))
    with pytest.raises(UserError, match="image_size") as caught:
        data.load_dataset("folder", str(tmp_path))
    assert "6 wide and 6 high" in str(caught.value) and "9 wide and 6 high" in str(caught.value)
    assert "z.png" in str(caught.value) and os.path.join("ant", "000.png") in str(caught.value)


def only_one_class(root: Path) -> None:
    shutil.rmtree(root / "train" / "bee")
    shutil.rmtree(root / "test" / "bee")


def loose_images(root: Path) -> None:
    for split in ("train", "test"):
        for file in (root / split).glob("*/*"):
            file.rename(root / split / f"{file.parent.name}{file.name}")
        for folder in ("ant", "bee"):
            (root / split / folder).rmdir()


def empty_class(root: Path) -> None:
    (root / "train" / "cat").mkdir()
    (root / "train" / "cat" / ".keep").touch()


def unknown_test_class(root: Path) -> None:
    (root / "test" / "bee").rename(root / "test" / "bees")


def folder_in_class(root: Path) -> None:
    (root / "train" / "bee" / "more").mkdir()


def no_test_classes(root: Path) -> None:
    shutil.rmtree(root / "test")
    (root / "test").mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "is not there"),
        (lambda root: (shutil.rmtree(root), root.touch()), "is not a folder"),
        (lambda root: (shutil.rmtree(root), root.mkdir()), "has no folder 'train'"),
        (lambda root: shutil.rmtree(root / "test"), "has no folder 'test'"),
        (only_one_class, "has only the class 'ant'; at least two classes"),
        (loose_images, "has no class folders"),
        (no_test_classes, "test has no class folders"),
        (empty_class, r"cat holds no images"),
        (unknown_test_class, r"bees has no counterpart .*did you mean 'bee'"),
        (folder_in_class, r"more is a folder"),
    ],
)
def test_wrong_folders_are_found_before_loading(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    root = make_folder(tmp_path / "images")
    damage(root)
    for call in (data.check_source, data.load_dataset):
        with pytest.raises(UserError, match=message) as caught:
            call("folder", str(root))
        assert str(root) in str(caught.value)


@pytest.mark.parametrize("keep", [0, 10, -40, None])
def test_a_file_that_is_no_image_is_named(tmp_path: Path, keep: int | None) -> None:
    make_folder(tmp_path, 32, 32)
    file = tmp_path / "train" / "bee" / "broken.jpg"
    Image.fromarray(random_pixels(0, 32, 32, 3)).save(file)
    file.write_bytes(file.read_bytes()[:keep] if keep is not None else b"just some text")
    data.check_source("folder", str(tmp_path))
    with pytest.raises(UserError, match=re.escape(str(file))):
        data.load_dataset("folder", str(tmp_path))


def test_wrong_names_and_paths(tmp_path: Path) -> None:
    make_folder(tmp_path)
    for name, path, message in (
        ("folder", None, "needs a path"),
        ("folder", "", "needs a path"),
        ("prepared", None, "needs the directory of a prepared TFDS set.*no path was given"),
        ("prepared", str(tmp_path), "dataset_info.json, as path; .* holds none"),
        ("fashion_mnist_subset", str(tmp_path), "takes no path"),
        ("fashion_mnist_subst", None, "unknown data set .*did you mean 'fashion_mnist_subset'"),
        ("Folder", str(tmp_path), "unknown data set .*did you mean 'folder'"),
        ("cifar_10", str(tmp_path), "unknown data set .*did you mean 'cifar10"),
        ("no such set", None, "unknown data set 'no such set'; accepted are"),
        ("../train", str(tmp_path), "unknown data set"),
        ("", None, "unknown data set"),
    ):
        for call in (data.check_source, data.load_dataset):
            with pytest.raises(UserError, match=message):
                call(name, path)
    with pytest.raises(UserError, match="image_size is 0"):
        data.load_dataset("folder", str(tmp_path), image_size=0)


def test_cifar10_jpeg_copy_loads(tmp_path: Path) -> None:
    root = os.environ.get("FDJAX_TEST_DATA")
    archive = Path(root or "") / "cifar10-jpeg.tar.xz"
    if not root or not archive.is_file():
        pytest.skip("needs FDJAX_TEST_DATA with cifar10-jpeg.tar.xz")
    with tarfile.open(archive, "r|xz") as tar:
        for member in tar:
            if re.fullmatch(r"(\./)?(train|test)/\w+/000\d\.jpg", member.name):
                tar.extract(member, tmp_path, filter="data")
    dataset = data.load_dataset("folder", str(tmp_path))
    assert dataset.image_shape == (32, 32, 3) and dataset.num_classes == 10
    assert dataset.train_images.shape[0] == dataset.test_images.shape[0] == 100
    assert dataset.class_names[:2] == ("airplane", "automobile")


# TFDS, without TensorFlow and without a network


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"something asked the network: {args}")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def prepare(
    data_dir: Path,
    name: str,
    version: str = "1.0.0",
    config: str | None = None,
    splits: dict[str, int] | None = None,
    channels: int = 3,
    keys: tuple[str, str] = ("image", "label"),
    class_label: bool = True,
    label_of: Callable[[int], int] = lambda i: i % 2,
) -> Path:
    """Writes a TFDS set as array_record; image i is 8x8 pixels of the value i, except for a corner pixel of 200."""
    tfds = pytest.importorskip("tensorflow_datasets")
    image_key, label_key = keys
    builder_version = version

    def pixels(i: int) -> np.ndarray:
        image = np.full((8, 8, channels), i, np.uint8)
        image[0, 0] = 200
        return image[..., 0] if channels == 1 else image

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # pyright: ignore[reportCallIssue, reportGeneralTypeIssues]
        VERSION = tfds.core.Version(builder_version)
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []

        def _info(self) -> Any:
            label = tfds.features.ClassLabel(names=["odd", "even"]) if class_label else np.int64
            fields = {image_key: tfds.features.Image(shape=(None, None, channels)), label_key: label, "id": np.int64}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(fields), supervised_keys=(image_key, label_key)
            )

        def _split_generators(self, dl_manager: Any) -> Any:
            del dl_manager
            return {s: self._generate_examples(n) for s, n in (splits or {"train": 20, "test": 6}).items()}

        def _generate_examples(self, count: int) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            for i in range(count):
                png = io.BytesIO()
                Image.fromarray(pixels(i)).save(png, "PNG")
                png.seek(0)
                yield i, {image_key: png, label_key: label_of(i), "id": i}

    Tiny.name = name
    builder = Tiny(data_dir=str(data_dir), file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    return Path(builder.data_dir)


def edit_info(folder: Path, **changes: Any) -> None:
    file = folder / "dataset_info.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(("name", "version"), [("tiny_shapes", "1.0.0"), ("mnist", "3.0.1"), ("cifar10", "9.8.7")])
def test_prepared_tfds_set_loads_by_name(tmp_path: Path, name: str, version: str) -> None:
    had_tensorflow = "tensorflow" in sys.modules
    channels = 1 if name == "mnist" else 3
    prepare(tmp_path, name, version, channels=channels)
    data.check_source(name, str(tmp_path))
    dataset = data.load_dataset(name, str(tmp_path))
    assert dataset.name == name and dataset.class_names == ("odd", "even")
    assert dataset.image_shape == (8, 8, channels)
    for images, labels, count in (
        (dataset.train_images, dataset.train_labels, 20),
        (dataset.test_images, dataset.test_labels, 6),
    ):
        values = images[:, 1, 1, 0]  # TFDS stores examples in an order of its own
        np.testing.assert_array_equal(np.sort(values), np.arange(count))
        np.testing.assert_array_equal(labels, values % 2)
        assert (images[:, 0, 0] == 200).all() and (images[:, 1:] == values[:, None, None, None]).all()
        assert images.dtype == np.uint8 and labels.dtype == np.int32
    assert ("tensorflow" in sys.modules) == had_tensorflow
    small = data.load_dataset(f"{name}:{version}", str(tmp_path), image_size=4, grayscale=True)
    assert small.image_shape == (4, 4, 1)
    directly = data.load_dataset("prepared", str(tmp_path / name / version))
    np.testing.assert_array_equal(directly.train_images, dataset.train_images)


def test_tfds_default_directory_versions_and_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    for version, count in (("2.0.0", 4), ("10.0.0", 8)):
        prepare(tmp_path, "sets", version, splits={"train": count, "validation": 2})
    assert len(data.load_dataset("sets").train_labels) == 8, "10.0.0 is newer than 2.0.0"
    assert len(data.load_dataset("sets:2.0.0").train_labels) == 4
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        data.check_source("sets:3.0.0")
    prepare(tmp_path, "sized", config="large", splits={"train": 6, "test": 2})
    assert len(data.load_dataset("sized").train_labels) == 6
    prepare(tmp_path, "sized", config="small", splits={"train": 4, "test": 2})
    assert len(data.load_dataset("sized/small").train_labels) == 4
    (tmp_path / "sized" / ".config" / "metadata.json").unlink()
    with pytest.raises(UserError, match="name one of sized/large, sized/small"):
        data.check_source("sized")


def test_tfds_takes_supervised_keys_and_a_labelled_test_split(tmp_path: Path) -> None:
    prepare(tmp_path, "renamed", keys=("photo", "species"))
    assert data.load_dataset("renamed", str(tmp_path)).class_names == ("odd", "even")
    # As ImageNet's: the test split's labels are withheld, so the validation split is what can be tested on.
    splits = {"train": 4, "validation": 2, "test": 3}
    prepare(tmp_path, "withheld", splits=splits, label_of=lambda i: -1)
    with pytest.raises(UserError, match="record 0 has the label -1"):
        data.load_dataset("withheld", str(tmp_path))
    folder = prepare(tmp_path, "labelled", splits=splits)
    withheld = tmp_path / "withheld" / "1.0.0" / "withheld-test.array_record-00000-of-00001"
    shutil.copy(withheld, folder / "labelled-test.array_record-00000-of-00001")
    dataset = data.load_dataset("labelled", str(tmp_path))
    assert len(dataset.test_labels) == 2 and dataset.validation_labels is None


@pytest.mark.parametrize("stream", [False, True])
def test_a_prepared_sets_validation_split_is_used_as_one(tmp_path: Path, stream: bool) -> None:
    prepare(tmp_path, "three", splits={"train": 6, "validation": 4, "test": 2})
    dataset = data.open_dataset("three", str(tmp_path), 8, stream=stream)
    images, labels = dataset.held_out(np.zeros(0, np.int32))
    assert (len(dataset.train_labels), len(labels), len(dataset.test_labels)) == (6, 4, 2)
    np.testing.assert_array_equal(np.asarray(images[:4])[:, 1, 1, 0] % 2, labels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fileFormat": "tfrecord"}, "stored as tfrecord.*array_record"),
        ({"splits": [{"name": "train", "shardLengths": ["20"]}]}, "'test' .*needed"),
        ({"splits": 3}, "is damaged"),
    ],
)
def test_unusable_tfds_sets_are_found_before_loading(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = prepare(tmp_path, "tiny")
    edit_info(folder, **changes)
    for call in (data.check_source, data.load_dataset):
        with pytest.raises(UserError, match=message) as caught:
            call("tiny", str(tmp_path))
        assert str(folder) in str(caught.value)


def test_damaged_or_unsuited_tfds_sets(tmp_path: Path) -> None:
    prepare(tmp_path, "counts", class_label=False)
    with pytest.raises(UserError, match=r"'image' \(uint8\) and 'label'.*it has .*'label' \((Tensor|Scalar)\)"):
        data.load_dataset("counts", str(tmp_path))
    folder = prepare(tmp_path, "damaged")
    (folder / "features.json").write_text("{")
    with pytest.raises(UserError, match=re.escape(str(folder))):
        data.load_dataset("damaged", str(tmp_path))
    folder = prepare(tmp_path, "lost")
    (folder / "lost-test.array_record-00000-of-00001").unlink()
    with pytest.raises(UserError, match=re.escape(str(folder))):
        data.load_dataset("lost", str(tmp_path))


def test_a_known_tfds_set_that_is_not_prepared_says_what_to_do(tmp_path: Path) -> None:
    pytest.importorskip("tensorflow_datasets")
    for path in (tmp_path, tmp_path / "nowhere"):
        for call in (data.check_source, data.load_dataset):
            with pytest.raises(UserError, match="'mnist' is not on this machine") as caught:
                call("mnist", str(path))
            assert str(path) in str(caught.value) and "array_record" in str(caught.value)
            assert "'folder'" in str(caught.value)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path, "tiny")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "array_record" else find_spec(name))
    with pytest.raises(UserError, match="needs the Python package array_record"):
        data.check_source("tiny", str(tmp_path))


def test_importing_data_imports_neither_tfds_nor_tensorflow() -> None:
    code = (
        "import sys, fdjax.data; print(*[m for m in ('tensorflow_datasets', 'tensorflow', 'flax') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# Statistics and the validation split


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_channel_statistics_are_those_of_numpy(n: int, height: int, width: int, channels: int, seed: int) -> None:
    images = random_pixels(seed, n, height, width, channels)
    mean, std = data.channel_statistics(images)
    pixels = images.reshape(-1, channels).astype(np.float64)
    np.testing.assert_allclose(mean, pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(std, np.maximum(pixels.std(axis=0), 1e-3), rtol=1e-9)


def test_channel_statistics_over_many_chunks_and_wrong_input() -> None:
    images = random_pixels(0, 5000, 16, 16, 1)
    assert data.channel_statistics(images)[0][0] == images.mean(dtype=np.float64)
    for wrong in (images.astype(np.float32), images[0], images[:0]):
        with pytest.raises(ValueError, match="uint8"):
            data.channel_statistics(wrong)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=80), st.floats(0, 1, exclude_max=True), SEEDS)
def test_validation_split_is_a_stratified_partition(labels: list[int], share: float, seed: int) -> None:
    array = np.array(labels, np.int32)
    try:
        train, validation = data.split_validation(len(array), array, share, seed)
    except UserError:
        wanted = share * np.bincount(array)
        # Refused only if it would be empty: nothing to hold out, or no class can spare the one example that is wanted.
        assert round(share * len(array)) == 0 or (np.bincount(array) <= 1).all() or (wanted < 1).all()
        return
    np.testing.assert_array_equal(np.sort(np.concatenate([train, validation])), np.arange(len(array)))
    for part in (train, validation):
        assert part.dtype == np.int32 and (np.diff(part) > 0).all()
    for label in set(labels):
        count = labels.count(label)
        assert abs(np.sum(array[validation] == label) - share * count) < 1
        assert np.any(array[train] == label)
    again = data.split_validation(len(array), array, share, seed)
    np.testing.assert_array_equal(again[1], validation)
    if share == 0:
        assert validation.size == 0


def test_validation_split_has_the_asked_size_and_follows_the_seed() -> None:
    labels = np.arange(1000) % 100
    _, validation = data.split_validation(1000, labels, 0.05, seed=1)
    assert len(validation) == 50, "small classes must not be rounded away"
    _, other = data.split_validation(1000, labels, 0.05, seed=2)
    assert not np.array_equal(validation, other)
    for share in (-0.1, 1.0, 1.5, float("nan")):
        with pytest.raises(UserError, match="validation share"):
            data.split_validation(1000, labels, share, seed=0)
    with pytest.raises(UserError, match="holds out none"):
        data.split_validation(1000, labels, 1e-6, seed=0)
    with pytest.raises(ValueError, match="shape"):
        data.split_validation(999, labels, 0.1, seed=0)


# Fewer training images


def labelled(labels: np.ndarray) -> data.Dataset:
    """A set whose images tell their place."""
    images = np.arange(len(labels), dtype=np.uint8).reshape(-1, 1, 1, 1)
    names = tuple(f"class{label}" for label in range(int(labels.max()) + 1))
    return data.Dataset("numbers", images, labels.astype(np.int32), images[:3], labels[:3].astype(np.int32), names)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=80), st.data(), SEEDS)
def test_a_limit_keeps_exactly_so_many_and_every_class_its_share(labels: list[int], drawn, seed: int) -> None:
    whole = labelled(np.array(labels))
    limit = drawn.draw(st.integers(1, len(labels)))
    kept = data.limit_training(whole, limit, seed)
    places = kept.train_images.ravel()
    assert len(places) == len(kept.train_labels) == limit
    assert (np.diff(places.astype(int)) > 0).all()
    np.testing.assert_array_equal(kept.train_labels, whole.train_labels[places])
    for label in set(labels):
        assert abs(np.sum(kept.train_labels == label) - labels.count(label) * limit / len(labels)) < 1
    again = data.limit_training(whole, limit, seed)
    np.testing.assert_array_equal(again.train_images, kept.train_images)
    assert kept.test_images is whole.test_images and kept.class_names == whole.class_names


@pytest.mark.parametrize("limit", [1, 10, 95, 191, 199])
def test_a_limit_follows_the_seed_and_holds_up_to_the_last_image(limit: int) -> None:
    whole = labelled(np.arange(200) % 10)
    first, other = (data.limit_training(whole, limit, seed).train_images.ravel() for seed in (1, 2))
    assert len(first) == len(other) == limit
    assert first.tolist() != other.tolist()


def test_no_limit_or_that_of_the_set_keeps_it_and_more_is_refused() -> None:
    whole = labelled(np.arange(20) % 2)
    assert data.limit_training(whole, None, 0) is whole
    assert data.limit_training(whole, 20, 0) is whole
    with pytest.raises(UserError, match=r"data\.train_limit is 1,021, but numbers has 20 training images"):
        data.limit_training(whole, 1021, 0)


# Batches


@given(SEEDS, st.integers(0, 10_000), st.integers(0, 200))
def test_epoch_order_is_a_permutation_that_depends_on_its_arguments_only(seed: int, epoch: int, count: int) -> None:
    order = data.epoch_order(seed, epoch, count)
    np.random.default_rng(1).random(3)
    assert order.dtype == np.int32
    np.testing.assert_array_equal(np.sort(order), np.arange(count))
    np.testing.assert_array_equal(order, data.epoch_order(seed, epoch, count))
    assume(count > 50)
    assert not np.array_equal(order, data.epoch_order(seed, epoch + 1, count))
    assert not np.array_equal(order, data.epoch_order(seed + 1, epoch, count))


def test_epoch_order_stays_what_it_was() -> None:
    # Resumed runs rely on these numbers; a change here changes every run's result.
    np.testing.assert_array_equal(data.epoch_order(0, 0, 8), [4, 6, 3, 5, 2, 1, 0, 7])
    with pytest.raises(ValueError, match="epoch is -1"):
        data.epoch_order(0, -1, 8)


@given(st.integers(1, 60), st.integers(1, 60))
def test_an_epoch_visits_no_example_twice_and_drops_less_than_a_batch(count: int, batch_size: int) -> None:
    assume(batch_size <= count)
    order = data.epoch_order(3, 0, count)
    steps = data.steps_per_epoch(count, batch_size)
    batches = [data.batch_indices(order, step, batch_size) for step in range(steps)]
    assert all(batch.shape == (batch_size,) for batch in batches)
    visited = np.concatenate(batches)
    assert len(np.unique(visited)) == len(visited) > count - batch_size
    for step in (-1, steps):
        with pytest.raises(ValueError, match="no step"):
            data.batch_indices(order, step, batch_size)


def test_wrong_batch_sizes() -> None:
    with pytest.raises(UserError, match="batch size is 11, but there are only 10"):
        data.steps_per_epoch(10, 11)
    with pytest.raises(UserError, match="at least 1"):
        data.steps_per_epoch(10, 0)


# Augmentation


def crop_windows(image: np.ndarray, pad: int) -> dict[tuple[int, int], np.ndarray]:
    """Returns every crop of a padded image by its offset, in plain NumPy."""
    height, width, _ = image.shape
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    offsets = range(2 * pad + 1)
    return {(r, c): padded[r : r + height, c : c + width] for r in offsets for c in offsets}


@pytest.mark.parametrize("shape", [(40, 5, 7, 3), (40, 8, 8, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_each_crop_is_a_window_of_the_padded_image(shape: tuple[int, int, int, int], dtype: type) -> None:
    pad = 2
    images = np.random.default_rng(0).integers(1, 256, shape).astype(dtype)
    cropped = np.asarray(jax.jit(data.random_crop, static_argnums=2)(jax.random.key(1), images, pad))
    assert cropped.dtype == dtype and cropped.shape == shape
    found = []
    for image, crop in zip(images, cropped, strict=True):
        matches = [offset for offset, window in crop_windows(image, pad).items() if np.array_equal(window, crop)]
        assert matches, "a crop is no window of its padded image"
        found.append(matches[0])
    if shape[0] > 1:
        assert {row for row, _ in found} == {column for _, column in found} == set(range(2 * pad + 1))
        assert any(row != column for row, column in found), "row and column offsets must be independent"


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31 - 1))
def test_the_middle_of_a_constant_image_stays_constant(seed: int) -> None:
    images = jnp.full((16, 8, 8, 3), 9, jnp.uint8)
    cropped = np.asarray(data.random_crop(jax.random.key(seed), images, 3))
    assert (cropped[:, 3:-3, 3:-3] == 9).all() and set(np.unique(cropped)) <= {0, 9}
    kept_rows, kept_columns = (cropped != 0).any(axis=(2, 3)).sum(1), (cropped != 0).any(axis=(1, 3)).sum(1)
    np.testing.assert_array_equal((cropped != 0).sum(axis=(1, 2, 3)), 3 * kept_rows * kept_columns)


def test_flips_mirror_about_half_of_the_images() -> None:
    images = random_pixels(0, 200, 4, 6, 3)
    flipped = np.asarray(data.random_flip(jax.random.key(0), jnp.asarray(images)))
    mirrored = (flipped == images[:, :, ::-1]).all(axis=(1, 2, 3))
    assert np.logical_xor(mirrored, (flipped == images).all(axis=(1, 2, 3))).all()
    assert 60 < mirrored.sum() < 140


def test_augment_is_a_function_of_its_key() -> None:
    images = jnp.asarray(random_pixels(0, 30, 6, 6, 3))
    key = jax.random.key(0)
    np.testing.assert_array_equal(data.augment(key, images, 0, False), images)
    np.testing.assert_array_equal(data.augment(key, images, 2, True), data.augment(key, images, 2, True))
    assert not np.array_equal(data.augment(key, images, 2, True), data.augment(jax.random.key(1), images, 2, True))
    assert data.augment(key, images, 2, True).dtype == jnp.uint8
    for flip in (False, True):
        for image, augmented in zip(np.asarray(images), np.asarray(data.augment(key, images, 1, flip)), strict=True):
            variants = (augmented, augmented[:, ::-1]) if flip else (augmented,)
            assert any(np.array_equal(v, window) for v in variants for window in crop_windows(image, 1).values())
    with pytest.raises(ValueError, match="pad is -1"):
        data.random_crop(key, images, -1)


def test_normalize_works_in_the_units_of_the_images() -> None:
    images = random_pixels(0, 3, 4, 4, 3)
    mean, std = (125.3, 122.9, 113.9), (62.9, 62.1, 66.7)
    expected = (images.astype(np.float64) - np.array(mean)) / np.array(std)
    for given_images in (images, images.astype(np.float32), jnp.asarray(images)):
        result = data.normalize(given_images, mean, std)
        assert result.dtype == jnp.float32
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)
    half = data.normalize(images, mean, std, jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    # Computed in float32 and rounded once, so within half a unit in the last of bfloat16's 8 bits.
    np.testing.assert_allclose(half.astype(jnp.float32), expected, rtol=2**-8, atol=1e-6)


def test_augmentation_needs_no_implicit_promotion() -> None:
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        images = data.augment(jax.random.key(0), jnp.zeros((2, 4, 4, 3), jnp.uint8), 1, True)
        for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
            assert data.normalize(images, (1.0, 2.0, 3.0), np.ones(3), dtype).dtype == dtype

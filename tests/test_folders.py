"""Image folders as people have them: each kind is read for what it is, or refused in one message."""

from __future__ import annotations

import dataclasses
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fdjax import data
from fdjax.config import Config, DataConfig
from fdjax.data.class_list import read_class_list
from fdjax.data.decode import read_pixels
from fdjax.data.folder import list_folder, natural, readable
from fdjax.errors import UserError
from fdjax.training.announce import renamed_classes
from fdjax.training.checks import check_classes
from tests.original_layouts import random_pixels


def save(file: Path, pixels: np.ndarray | Image.Image, **options) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, **options)
    return file


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number, split in enumerate(("train", "test")):
        for name in ("ant", "bee"):
            save(tmp_path / split / name / "0.png", random_pixels(number, 8, 8, 3))
    return tmp_path


# Splits


@pytest.mark.parametrize("name", ["validation", "val", "valid"])
@pytest.mark.parametrize("stream", [False, True])
def test_train_validation_and_test_are_what_they_are_called(root: Path, name: str, stream: bool) -> None:
    pixels = random_pixels(5, 8, 8, 3)
    save(root / name / "bee" / "0.png", pixels)
    dataset = data.open_dataset("folder", str(root), image_size=8, stream=stream)
    assert (len(dataset.train_labels), len(dataset.test_labels)) == (2, 2)
    images, labels = dataset.held_out(np.arange(0))
    np.testing.assert_array_equal(images[:], pixels[None])
    assert labels.tolist() == [1]
    # A share of the training set that was asked for goes before it.
    assert dataset.held_out(np.array([0]))[1].tolist() == [0]


def test_without_a_test_folder_the_validation_pictures_are_the_test_set(root: Path) -> None:
    (root / "test").rename(root / "val")
    dataset = data.load_dataset("folder", str(root))
    assert len(dataset.test_labels) == 2 and dataset.validation_images is None


def test_two_validation_folders_are_refused(root: Path) -> None:
    for name in ("val", "validation"):
        save(root / name / "bee" / "0.png", random_pixels(5, 8, 8, 3))
    with pytest.raises(UserError, match="has both validation and val; keep one"):
        list_folder(root)


def test_classes_that_only_one_split_has_are_refused(root: Path) -> None:
    save(root / "validation" / "wasp" / "0.png", random_pixels(5, 8, 8, 3))
    with pytest.raises(UserError, match=r"validation/wasp has no counterpart in .*train"):
        list_folder(root)


# What is no picture


def test_foreign_files_are_passed_over_and_counted(root: Path) -> None:
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "notes.txt", "readme"):
        (root / "train" / "ant" / name).write_text("no picture")
    (root / "train" / "labels.csv").write_text("ant,bee")
    for folder in ("__MACOSX", "@eaDir", ".cache"):
        save(root / "train" / folder / "0.png", random_pixels(0, 8, 8, 3))
    save(root / "train" / "ant" / "__MACOSX" / "0.png", random_pixels(0, 8, 8, 3))
    os.mkfifo(root / "train" / "bee" / "pipe.png")
    (root / "train" / "bee" / "gone.png").symlink_to(root / "nowhere.png")
    bare = save(root / "train" / "bee" / "1.png", random_pixels(3, 8, 8, 3))
    bare.rename(bare.with_suffix(""))
    listing = list_folder(root)
    assert [len(files) for files in listing.splits["train"].values()] == [1, 2]
    assert dict(listing.skipped) == {
        "files .db": 1,
        "files .ini": 1,
        "files .txt": 1,
        "files that are not pictures": 1,
        "hidden or system files and folders": 5,
        "files beside class folders": 1,
        "special files": 1,
        "broken links": 1,
    }
    dataset = data.load_dataset("folder", str(root))
    assert len(dataset.train_labels) == 3 and "1 files .ini" in dataset.skipped


def test_no_pictures_at_all_is_one_message(root: Path) -> None:
    for file in (root / "test").glob("*/*"):
        file.rename(file.with_suffix(".txt"))
    with pytest.raises(UserError, match=r"test holds no pictures \(passed over: 2 files \.txt\)"):
        list_folder(root)
    for file in (root / "train" / "ant").iterdir():
        file.unlink()
    with pytest.raises(UserError, match=r"ant holds no images.*remove it, or fill it"):
        list_folder(root)


def test_a_class_may_be_empty_where_nothing_is_learned_from_it(root: Path) -> None:
    (root / "test" / "ant" / "0.png").unlink()
    dataset = data.load_dataset("folder", str(root))
    assert dataset.test_labels.tolist() == [1] and dataset.class_names == ("ant", "bee")


def test_what_lies_there_is_named_where_train_is_missing(root: Path) -> None:
    (root / "train").rename(root / "training")
    with pytest.raises(UserError, match=r"has no folder 'train' \(it has test, training\)"):
        list_folder(root)


# Order of classes


def test_classes_come_in_natural_order(tmp_path: Path) -> None:
    for name in ("class 10", "class 2", "class 1", "other"):
        for split in ("train", "test"):
            save(tmp_path / split / name / "0.png", random_pixels(0, 8, 8, 3))
    assert list_folder(tmp_path).classes == ("class 1", "class 2", "class 10", "other")
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbfother\r\nclass 10\r\nclass 1\r\nclass 2\r\n\r\n")
    dataset = data.load_dataset("folder", str(tmp_path))
    assert dataset.class_names == ("other", "class 10", "class 1", "class 2")
    assert [Path(file).parent.name for file, _ in list_folder(tmp_path).files("train")] == list(dataset.class_names)
    (tmp_path / "classes.txt").write_text("other\nclass 10\nclass 1\n")
    with pytest.raises(UserError, match="differ in class 2; correct or remove"):
        list_folder(tmp_path)
    (tmp_path / "classes.txt").write_text("other\nclass 10\nclass 1\nother")
    with pytest.raises(UserError, match=r"the list of classes .*'other' occurs twice"):
        list_folder(tmp_path)


@given(st.lists(st.text("ab01 ", max_size=6), unique=True, max_size=8))
def test_natural_order_is_a_total_order(names: list[str]) -> None:
    ordered = sorted(names, key=natural)
    assert sorted(sorted(names), key=natural) == ordered and sorted(ordered) == sorted(names)
    numbers = [f"n{number}" for number in (1, 2, 10, 30, 200)]
    assert sorted(numbers, key=natural) == numbers


@given(names=st.permutations(["ant", "bee", "cat", "dog"]))
def test_a_data_set_takes_the_order_of_a_network(names: list[str]) -> None:
    labels = np.array([0, 1, 2, 3, 1], np.int32)
    images = random_pixels(0, 5, 2, 2, 1)
    dataset = data.Dataset("folder", images, labels, images, labels[:4], ("ant", "bee", "cat", "dog"), images, labels)
    found = dataset.in_order_of(tuple(names))
    for part in ("train_labels", "test_labels", "validation_labels"):
        assert [found.class_names[i] for i in getattr(found, part)] == [
            dataset.class_names[i] for i in getattr(dataset, part)
        ]
    assert found.class_names == tuple(names)
    assert dataset.in_order_of(("ant", "bee", "cat", "eel")) is dataset


def test_outputs_that_get_other_classes_are_said() -> None:
    line = renamed_classes(("ant", "cat", "bee", "eel"), ("ant", "bee", "cat", "dog"))
    assert "3 of 4 classes" in line and "output 1 was 'cat' and is 'bee' now" in line
    assert renamed_classes(("ant", "bee"), ("ant", "bee")) == renamed_classes((), ("ant", "bee")) == ""


def test_classes_of_init_keep_their_places_unless_the_run_pretrains() -> None:
    for fitting in ((), ("a", "b", "c"), ("x", "y", "z"), ("a", "y", "c")):
        check_classes(fitting, ("a", "b", "c"), pretrains=False)
    check_classes(("cat", "dog", "horse"), ("bird", "cat", "dog"), pretrains=True)
    with pytest.raises(UserError, match="the class 'cat' is output 0 in the network of --init and 1 in the data set"):
        check_classes(("cat", "dog", "horse"), ("bird", "cat", "dog"), pretrains=False)


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_class_lists_are_read_as_editors_write_them(tmp_path: Path, ends: str, encoding: str) -> None:
    (tmp_path / "classes.txt").write_bytes((ends.join(("Käfer", " b ", "c\t")) + 3 * ends).encode(encoding))
    assert read_class_list(str(tmp_path / "classes.txt")) == ("Käfer", "b", "c")


# Pixels


def test_transparency_shows_the_background(root: Path) -> None:
    for number, (mode, colour) in enumerate((("RGBA", (255, 0, 0, 0)), ("LA", (0, 0)), ("RGBA", (0, 0, 0, 128)))):
        save(root / "train" / "bee" / f"{number + 1}.png", Image.new(mode, (8, 8), colour))
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([9, 9, 9, 200, 0, 0])
    save(root / "train" / "bee" / "4.gif", palette, transparency=1)
    save(root / "train" / "bee" / "5.png", Image.new("RGB", (8, 8), (1, 2, 3)), transparency=(1, 2, 3))
    for background, value in (("white", (255, 255, 255)), ("#0000ff", (0, 0, 255))):
        images = data.load_dataset("folder", str(root), background=background).train_images[2:, 0, 0]
        np.testing.assert_array_equal(images[[0, 1, 3, 4]], np.broadcast_to(value, (4, 3)))
        np.testing.assert_allclose(images[2], np.array(value) * 127 / 255, atol=1)
    streamed = data.open_dataset("folder", str(root), 8, stream=True, background="#0000ff")
    np.testing.assert_array_equal(streamed.train_images[2:][0, 0, 0], (0, 0, 255))
    with pytest.raises(UserError, match="background must be a colour's name"):
        DataConfig(background="no colour")


def pgm(pixels: np.ndarray, most: int) -> bytes:
    kind = ">u2" if most > 255 else "u1"
    return f"P5 {pixels.shape[1]} {pixels.shape[0]} {most}\n".encode() + pixels.astype(kind).tobytes()


def png16(pixels: np.ndarray) -> bytes:
    """RGB of 16 bits, which Pillow does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(pixels: np.ndarray, bits: int) -> bytes:
    """A grey TIFF of 12 bits, which are packed, or 16."""
    strip = pixels.astype("<u2").tobytes()
    if bits == 12:
        one, two = pixels.astype(int).reshape(-1, 2).T
        strip = np.stack([one >> 4, (one & 15) << 4 | two >> 8, two & 255], -1).astype(np.uint8).tobytes()
    height, width = pixels.shape
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, 1), (273, 8), (277, 1), (278, height)]
    tags.append((279, len(strip)))
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHIHH", tag, 3, 1, v, 0) for tag, v in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + directory + bytes(4)


LEVELS = np.linspace(0, 1, 64).reshape(8, 8)
DEPTHS = {
    "1 bit": lambda: Image.fromarray(LEVELS > 0.5),
    "16 bits, PNG": lambda: Image.fromarray((LEVELS * 65535).round().astype(np.uint16)),
    "4 of 8 bits, PGM": lambda: pgm((LEVELS * 15).round(), 15),
    "10 of 16 bits, PGM": lambda: pgm((LEVELS * 1023).round(), 1023),
    "16 bits, PGM": lambda: pgm((LEVELS * 65535).round(), 65535),
    "16 bits, RGB": lambda: png16(np.repeat((LEVELS * 65535).round()[..., None], 3, -1)),
    "16 bits, TIFF": lambda: tiff((LEVELS * 65535).round(), 16),
    "12 bits, TIFF": lambda: tiff((LEVELS * 4095).round(), 12),
}


@pytest.mark.parametrize("depth", DEPTHS)
def test_other_depths_are_scaled_by_their_true_range(depth: str, tmp_path: Path) -> None:
    made = DEPTHS[depth]()
    file = tmp_path / "picture.png"
    if isinstance(made, bytes):
        file.write_bytes(made)
    else:
        made.save(file)
    found = data.load_image(str(file), (8, 8, 1))[..., 0]
    expected = 255 * ((LEVELS > 0.5) if depth == "1 bit" else LEVELS)
    assert np.abs(found - expected).max() <= (9 if depth.startswith("4") else 1)
    assert (found.min(), found.max()) == (0, 255)


def test_depths_without_a_range_are_refused(tmp_path: Path) -> None:
    for name, array in (("float.tiff", LEVELS.astype(np.float32)), ("int.tiff", (LEVELS * 9).astype(np.int32))):
        save(tmp_path / name, array)
        with pytest.raises(UserError, match=rf"{name} has 32-bit pixels"):
            data.load_image(str(tmp_path / name), (8, 8, 1))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_pictures_are_turned_upright_by_their_exif_orientation(orientation: int, kind: str, tmp_path: Path) -> None:
    steps = np.arange(0, 240, 5, dtype=np.uint8)
    upright = np.broadcast_to(steps[:16, None] + 5 * np.arange(24, dtype=np.uint8), (16, 24))[..., None].repeat(3, -1)
    turn = {
        1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1), 6: lambda x: x.swapaxes(0, 1)[::-1],
        7: lambda x: x.swapaxes(0, 1)[::-1, ::-1], 8: lambda x: x.swapaxes(0, 1)[:, ::-1],
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(turn[orientation](upright)))
    file = save(tmp_path / f"picture.{kind}", stored, exif=exif, **({"quality": 100} if kind == "jpg" else {}))
    for found in (data.load_image(str(file), (16, 24, 3)), read_pixels(file.read_bytes(), 3, "it")):
        assert found.shape == (16, 24, 3)
        assert np.abs(found.astype(int) - upright).max() <= 3
    crop = data.RandomResizedCrop(area=(1.0, 1.0), ratio=(1.5, 1.5))
    from fdjax.data.stream import crop_and_resize

    whole = crop_and_resize(file.read_bytes(), crop, np.full((10, 4), 0.5), (16, 24), 3, "it")
    assert np.abs(whole.astype(int) - upright).max() <= 3


def test_an_orientation_in_xmp_alone_counts_as_well(tmp_path: Path) -> None:
    levels = np.arange(0, 240, 10, dtype=np.uint8).repeat(16).reshape(24, 16)
    xmp = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
        "</rdf:RDF></x:xmpmeta>"
    )
    file = tmp_path / "turned.jpg"
    Image.fromarray(levels).save(file, quality=100, xmp=xmp.encode())
    upright = np.rot90(levels, -1)[..., None].astype(int)
    for found in (data.load_image(str(file), (16, 24, 1)), read_pixels(file.read_bytes(), 1, "it")):
        np.testing.assert_allclose(found.astype(int), upright, atol=3)


def test_names_that_are_not_utf8(tmp_path: Path, root: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    os.mkdir(root / "train" / name)
    save(root / "train" / name / "0.png", random_pixels(1, 8, 8, 3))
    with pytest.raises(UserError, match="a name that is not UTF-8; rename it") as refusal:
        data.open_dataset("folder", str(root), 16)
    assert str(refusal.value).encode()
    assert readable(name) == "caf\ufffd"


# Sizes


@pytest.mark.parametrize("stream", [False, True])
def test_an_image_size_may_be_of_height_and_width(root: Path, stream: bool) -> None:
    pixels = random_pixels(7, 40, 24, 3)
    save(root / "test" / "ant" / "0.png", pixels)
    dataset = data.open_dataset("folder", str(root), (16, 24), stream=stream)
    assert dataset.image_shape == (16, 24, 3)
    np.testing.assert_array_equal(dataset.test_images[:1][0], pixels[12:28])
    assert data.describe_source("folder", str(root), (16, 24))[0] == (16, 24, 3)
    config = Config(data=DataConfig(name="folder", path=str(root), image_size=(16, 24)))
    assert Config.from_dict(config.to_dict()) == config and config.data.size == (16, 24)
    assert dataclasses.replace(config.data, image_size=16).size == (16, 16)
    with pytest.raises(UserError, match="image_size must be from 1 to 16,384 pixels"):
        DataConfig(image_size=(16, 0))


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_pictures_of_a_single_pixel_are_refused(kind: str, root: Path) -> None:
    save(root / "train" / "ant" / f"1.{kind}", np.full((1, 1, 3), 77, np.uint8))
    for stream in (False, True):
        with pytest.raises(
            UserError, match=rf"1\.{kind} is a picture of a single pixel, which shows nothing; remove it"
        ):
            data.open_dataset("folder", str(root), 8, stream=stream).train_images[:]


def test_pictures_with_a_side_of_one_pixel_are_read(root: Path) -> None:
    save(root / "train" / "ant" / "1.png", np.full((1, 2, 3), 77, np.uint8))
    save(root / "train" / "ant" / "2.jpg", np.full((2, 1, 3), 77, np.uint8))
    save(root / "train" / "ant" / "3.png", np.full((1, 300, 3), 77, np.uint8))
    for stream in (False, True):
        images = data.open_dataset("folder", str(root), 8, stream=stream).train_images[1:4]
        assert images.shape == (3, 8, 8, 3) and np.abs(images.astype(int) - 77).max() <= 2


def enormous_png(side: int) -> bytes:
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_enormous_pictures_are_called_that(kind: str, root: Path) -> None:
    """30,000 pixels a side: not read at all, whoever would decode them."""
    file = root / "train" / "bee" / f"huge.{kind}"
    if kind == "png":
        file.write_bytes(enormous_png(30_000))
    else:
        save(file, random_pixels(0, 8, 8, 3))
        content = bytearray(file.read_bytes())
        place = content.index(b"\xff\xc0")
        content[place + 5 : place + 9] = struct.pack(">HH", 30_000, 30_000)
        file.write_bytes(content)
    for stream in (False, True):
        with pytest.raises(UserError, match=rf"huge\.{kind} is a picture.*more than 179 million pixels"):
            data.open_dataset("folder", str(root), 8, stream=stream).train_images[:]

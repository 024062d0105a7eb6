"""Sets that stay on disk: the same batches whatever the workers, sensible crops, and runs from them."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fdjax import data
from fdjax.commands.train import train_command
from fdjax.config import CheckpointConfig, Config, DataConfig, ModelConfig, WeightPhaseConfig
from fdjax.data.decode import read_pixels
from fdjax.data.prepare import prepare
from fdjax.data.stream import RandomResizedCrop, crop_and_resize, position_uniforms
from fdjax.errors import UserError
from tests.original_layouts import jpeg, random_pixels, write_folder

SIZE = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-10's layout: 50 training and 10 test images in 10 classes."""
    return write_folder(tmp_path_factory.mktemp("stream") / "images")


def opened(folder: Path, **options: Any) -> data.Dataset:
    return data.open_dataset("folder", str(folder), SIZE, stream=True, **options)


def stream_of(dataset: data.Dataset, seed: int = 3, batch: int = 8, **options: Any) -> data.TrainingStream:
    assert isinstance(dataset.train_images, data.StoredImages)
    order = data.TrainingOrder(seed, np.arange(len(dataset.train_labels)), batch)
    return data.TrainingStream(dataset.train_images, dataset.train_labels, order.rows, seed=seed, **options)


def assert_same(got: list, expected: list) -> None:
    assert len(got) == len(expected)
    for (images, labels), (other, their) in zip(got, expected, strict=True):
        np.testing.assert_array_equal(images, other)
        np.testing.assert_array_equal(labels, their)


# The view of a set


def test_a_streamed_set_holds_what_the_loaded_one_does(folder: Path, tmp_path: Path) -> None:
    loaded = data.load_dataset("folder", str(folder), SIZE)
    prepare("pictures", str(folder), str(tmp_path))
    by_name = data.open_dataset("pictures", str(tmp_path), SIZE, stream=True)
    for streamed, expected in ((opened(folder), loaded), (by_name, data.load_dataset("pictures", str(tmp_path), SIZE))):
        assert streamed.class_names == expected.class_names and streamed.image_shape == (SIZE, SIZE, 3)
        for split in ("train", "test"):
            images, array = getattr(streamed, f"{split}_images"), getattr(expected, f"{split}_images")
            assert images.shape == array.shape and images.nbytes == array.nbytes and len(images) == len(array)
            np.testing.assert_array_equal(images[:], array)
            np.testing.assert_array_equal(images[3:7], array[3:7])
            np.testing.assert_array_equal(getattr(streamed, f"{split}_labels"), getattr(expected, f"{split}_labels"))
        rows = np.array([5, 1, 9])
        np.testing.assert_array_equal(data.take_rows(streamed.test_images, rows)[:2], expected.test_images[[5, 1]])
    limited = data.limit_training(opened(folder), 20, 1)
    np.testing.assert_array_equal(limited.train_images[:], data.limit_training(loaded, 20, 1).train_images)
    assert data.training_statistics(opened(folder), 0) == data.channel_statistics(loaded.train_images)


def test_labels_are_read_from_the_records_where_they_are_not_written_down(folder: Path, tmp_path: Path) -> None:
    prepared, _ = prepare("pictures", str(folder), str(tmp_path))
    labels = data.open_dataset("pictures", str(tmp_path), SIZE, stream=True).train_labels
    (prepared / "fdjax_labels.npz").unlink()
    np.testing.assert_array_equal(data.open_dataset("prepared", str(prepared), SIZE, stream=True).train_labels, labels)
    assert np.bincount(labels).sum() == 50


def test_the_middle_of_test_images_is_imagenets_custom(tmp_path: Path) -> None:
    """Resizing the shorter side to 256 and cutting out 224 x 224 is taking 0.875 of it and resizing that."""
    picture = Image.fromarray(random_pixels(0, 6, 8, 3)).resize((400, 300), Image.Resampling.BICUBIC)
    for split in ("train", "test"):
        for name in ("ant", "bee"):
            (tmp_path / split / name).mkdir(parents=True)
            picture.save(tmp_path / split / name / "a.png")
    shown = data.open_dataset("folder", str(tmp_path), 224, stream=True, crop_share=0.875).test_images[:1][0]
    resized = picture.resize((round(400 * 256 / 300), 256), Image.Resampling.BILINEAR)
    left, top = (resized.width - 224) / 2, (resized.height - 224) / 2
    expected = np.asarray(resized.crop((round(left), round(top), round(left) + 224, round(top) + 224)), int)
    assert np.abs(expected - shown).mean() < 1.0
    np.testing.assert_array_equal(
        data.load_image(str(tmp_path / "test" / "ant" / "a.png"), (224, 224, 3), 0.875), shown
    )


# Batches


@pytest.mark.parametrize("crop", [None, RandomResizedCrop()], ids=["middle", "random-resized-crop"])
def test_batches_do_not_depend_on_threads_or_on_where_a_run_begins(folder: Path, crop: Any) -> None:
    dataset = opened(folder)
    whole = list(stream_of(dataset, crop=crop, threads=1).batches(0, 13))
    assert len(whole) == 13 and whole[0][0].shape == (8, SIZE, SIZE, 3) and whole[0][0].dtype == np.uint8
    for first, threads in ((0, 4), (7, 3), (12, 2)):
        assert_same(list(stream_of(dataset, crop=crop, threads=threads).batches(first, 13)), whole[first:])
    # Interrupted at a step, and then on with other workers.
    begun = stream_of(dataset, crop=crop, threads=2).batches(0, 13)
    taken = [next(begun) for _ in range(5)]
    begun.close()
    assert_same(taken + list(stream_of(dataset, crop=crop, threads=5).batches(5, 13)), whole)
    other = list(stream_of(dataset, seed=4, crop=crop).batches(0, 1))
    assert not np.array_equal(other[0][1], whole[0][1]) or not np.array_equal(other[0][0], whole[0][0])


def test_an_epoch_has_each_example_once_and_epochs_differ(folder: Path) -> None:
    dataset = opened(folder)
    images = dataset.train_images[:]
    place = {image.tobytes(): n for n, image in enumerate(images)}
    epochs = []
    for epoch in range(2):
        seen = []
        for batch, labels in stream_of(dataset, batch=10).batches(5 * epoch, 5 * epoch + 5):
            rows = [place[image.tobytes()] for image in batch]
            np.testing.assert_array_equal(labels, dataset.train_labels[rows])
            seen += rows
        assert sorted(seen) == list(range(50))
        epochs.append(seen)
    assert epochs[0] != epochs[1]
    assert epochs[0] == data.epoch_order(3, 0, 50).tolist(), "in the same order as a set in memory"


def test_processes_share_each_batch(folder: Path) -> None:
    dataset = opened(folder)
    whole = list(stream_of(dataset, crop=RandomResizedCrop()).batches(2, 5))
    parts = [
        list(stream_of(dataset, crop=RandomResizedCrop(), part=part).batches(2, 5))
        for part in (slice(0, 4), slice(4, 8))
    ]
    together = [tuple(np.concatenate(pair) for pair in zip(*both, strict=True)) for both in zip(*parts, strict=True)]
    assert_same(together, whole)


def test_a_damaged_image_is_named_when_its_turn_comes(folder: Path, tmp_path: Path) -> None:
    root = write_folder(tmp_path / "images")
    (root / "train" / "cat" / "zz.jpg").write_bytes(jpeg(random_pixels(0, 64, 64, 3))[:1200])
    with pytest.raises(UserError, match=r"zz\.jpg is a damaged or unsupported image"):
        list(stream_of(opened(root), batch=17).batches(0, 3))


# Decoding and crops


def test_grey_cmyk_and_other_pictures_become_what_is_asked_for() -> None:
    red = np.zeros((32, 48, 3), np.uint8) + np.array([200, 40, 30], np.uint8)
    for mode, file_format in (("RGB", "JPEG"), ("CMYK", "JPEG"), ("L", "JPEG"), ("RGBA", "PNG"), ("P", "GIF")):
        encoded = jpeg(red, mode, file_format)
        pixels = read_pixels(encoded, 3, "it")
        grey = read_pixels(encoded, 1, "it")
        assert pixels.shape == (32, 48, 3) and grey.shape == (32, 48, 1), mode
        expected = [87, 87, 87] if mode == "L" else [200, 40, 30]
        # Pillow converts CMYK without a profile, and a palette has 216 colours.
        assert np.abs(pixels.mean((0, 1)) - expected).max() < (30 if mode in ("CMYK", "P") else 3), mode
        assert abs(grey.mean() - 87) < (15 if mode in ("CMYK", "P") else 3), mode
        cut = crop_and_resize(encoded, RandomResizedCrop(), position_uniforms(0, 1, 40).reshape(10, 4), 8, 3, "it")
        assert cut.shape == (8, 8, 3) and np.abs(cut.mean((0, 1)) - pixels.mean((0, 1))).max() < 3


def test_a_jpeg_is_decoded_as_pillow_does() -> None:
    smooth = np.asarray(Image.fromarray(random_pixels(0, 6, 8, 3)).resize((80, 60), Image.Resampling.BICUBIC))
    encoded = jpeg(smooth)
    expected = np.asarray(Image.open(io.BytesIO(encoded)), int)
    assert np.abs(read_pixels(encoded, 3, "it") - expected).max() <= 2


def test_random_parts_have_the_areas_ratios_and_places_of_the_paper() -> None:
    crop, side = RandomResizedCrop(), 400
    boxes = np.array([crop.box(position_uniforms(1, n, 40).reshape(10, 4), side, side) for n in range(4000)])
    top, left, high, wide = boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (top + high <= side).all() and (left + wide <= side).all()
    share = high * wide / side**2
    assert share.min() > 0.075 and share.max() > 0.9
    fits = share < 0.74  # Below 3/4 every ratio fits at the first try; above, some do not, and are drawn again.
    assert share[fits].mean() == pytest.approx((0.08 + 0.74) / 2, abs=0.02)
    assert np.mean(share[fits] < 0.41) == pytest.approx(0.5, abs=0.04)
    ratio = np.log(wide / high)
    assert np.abs(ratio).max() < np.log(4 / 3) + 0.02 and abs(ratio.mean()) < 0.02
    assert ratio[fits].std() == pytest.approx(2 * np.log(4 / 3) / 12**0.5, rel=0.05)
    for edge, room in ((top, side - high), (left, side - wide)):
        place = (edge / np.maximum(room, 1))[share < 0.3]
        assert abs(place.mean() - 0.5) < 0.03 and place.min() < 0.03 and place.max() > 0.97
    whole = RandomResizedCrop(area=(1.0, 1.0), ratio=(1.0, 1.0))
    assert whole.box(position_uniforms(0, 0, 40).reshape(10, 4), 300, 900) == (0, 300, 300, 300)


def test_a_part_that_is_much_larger_than_the_result_is_decoded_small_and_looks_the_same() -> None:
    smooth = Image.fromarray(random_pixels(0, 6, 8, 3)).resize((640, 480), Image.Resampling.BICUBIC)
    encoded = jpeg(np.asarray(smooth))
    uniforms = np.full((10, 4), 0.5)
    crop = RandomResizedCrop(area=(0.5, 0.5), ratio=(1.0, 1.0))
    top, left, high, wide = crop.box(uniforms, 480, 640)
    expected = smooth.resize((32, 32), Image.Resampling.BOX, box=(left, top, left + wide, top + high))
    got = crop_and_resize(encoded, crop, uniforms, 32, 3, "it")
    # The part may lie half a pixel of the smaller picture beside where it would in the full one.
    assert np.corrcoef(got.ravel(), np.asarray(expected).ravel())[0, 1] > 0.98
    assert np.abs(got.astype(int) - np.asarray(expected, int)).mean() < 8


def test_random_numbers_of_a_position_stay_what_they_were() -> None:
    # Resumed runs rely on these numbers; a change here changes the images that a run sees.
    np.testing.assert_allclose(position_uniforms(0, 0, 3), POSITION_0, rtol=1e-12)
    many = np.concatenate([position_uniforms(5, n, 4) for n in range(2000)])
    assert many.min() >= 0 and many.max() < 1 and abs(many.mean() - 0.5) < 0.01
    assert len(np.unique(many)) == many.size


POSITION_0 = [0.011546754286331562, 0.24154919656271812, 0.11142585551493822]


# A run


def config_of(folder: Path, **settings: Any) -> Config:
    options = {"random_resized_crop": True, "crop_padding": 0, "eval_crop": 0.875, **settings}
    return Config(
        phases=("pretrain",),
        data=DataConfig(
            name="folder", path=str(folder), loading="stream", image_size=SIZE, batch_size=10, validation=0.2, **options
        ),
        model=ModelConfig(name="mobilenetv2_small", width=0.3),
        pretrain=WeightPhaseConfig(steps=9, learning_rate=0.01),
        checkpoint=CheckpointConfig(every_epochs=1.0, evaluate_every_epochs=2.0),
    )


@pytest.mark.usefixtures("quick_runs")
def test_a_streamed_run_stops_and_goes_on_with_other_workers(folder: Path, tmp_path: Path) -> None:
    from fdjax.training import loop
    from fdjax.training.run import train

    whole = train(config_of(folder, workers=1), str(tmp_path / "whole"))
    save, stopped = loop.Run._save, []

    def stop_after_first(self: Any, *arguments: Any) -> None:
        save(self, *arguments)
        stopped.append(arguments[1])
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop.Run, "_save", stop_after_first)
        train(config_of(folder, workers=2), str(tmp_path / "parts"))
    assert stopped == [4]
    parts = train(config_of(folder, workers=3), str(tmp_path / "parts"))
    for name in ("loss", "top1", "num_examples"):
        assert parts[name] == whole[name]
    records = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    waits = [record["data_wait"] for record in records if "data_wait" in record]
    assert waits and all(0 <= wait <= 1 for wait in waits)
    saved = json.loads((tmp_path / "parts" / "config.json").read_text())["data"]
    assert saved["eval_crop"] == 0.875 and saved["loading"] == "stream"

    from fdjax.checkpoint import find_checkpoint
    from fdjax.training.restore import evaluate_restored, restore

    restored = restore(*find_checkpoint(str(tmp_path / "parts")))
    assert restored.graph.class_names == opened(folder).class_names and len(restored.graph.input_mean) == 3
    again = evaluate_restored(restored)
    assert again["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert evaluate_restored(restored, "validation")["num_examples"] == 10


def test_settings_that_do_not_fit(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for settings, message in (
        ({"loading": "stream", "name": "cifar10"}, "image_size must be a number of pixels when loading is 'stream'"),
        ({"loading": "stream", "image_size": 8}, "loading must be 'memory' for the embedded subset"),
        ({"random_resized_crop": True}, "random_resized_crop must be off unless loading is 'stream'"),
        ({"eval_crop": 0.875}, "eval_crop must be 1 unless loading is 'stream'"),
        ({"eval_crop": 0.0}, "eval_crop must be a share above 0"),
        ({"workers": 0}, "workers must be from 1 to 1,024"),
    ):
        with pytest.raises(UserError, match=message):
            DataConfig(**settings)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="crop_padding must be 0 with random_resized_crop"):
        config_of(folder, crop_padding=4)
    for name, size, message in (("fashion_mnist_subset", 8, "cannot be streamed"), ("folder", None, "image size")):
        with pytest.raises(UserError, match=message):
            data.open_dataset(name, str(folder) if name == "folder" else None, size, stream=True)
    config = tmp_path / "config.py"
    config.write_text("from fdjax.config import Config\ndef get_config():\n    return Config()\n")
    with pytest.raises(SystemExit) as stopped:
        train_command(["--config", str(config), "--workdir", str(tmp_path / "run"), "--data.loading", "stream"])
    assert stopped.value.code == 2 and not (tmp_path / "run").exists()
    assert "image_size" in capsys.readouterr().err
    assert dataclasses.replace(config_of(folder).data, workers=2).workers == 2

"""Training on pictures without labels, taught by the unpruned network."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fdjax.config import DistillConfig
from fdjax.data import load_dataset, open_dataset, with_unlabelled
from fdjax.data.unlabelled import list_pictures
from fdjax.errors import UserError
from fdjax.training.run import train
from tests.frozen_checkpoints import CONFIG, write_checkpoint


def draw(folder: Path, count: int, size: tuple[int, int] = (28, 28), mode: str = "L") -> list[np.ndarray]:
    """Random pictures: some in the folder, some in one inside; and files that are none of them."""
    rng = np.random.default_rng(count)
    (folder / "more").mkdir(parents=True)
    pixels = [rng.integers(0, 256, (*size, *((3,) if mode == "RGB" else ()))).astype(np.uint8) for _ in range(count)]
    for index, picture in enumerate(pixels):
        Image.fromarray(picture).save((folder / "more" if index % 2 else folder) / f"{index:02d}.png")
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.png").write_text("no picture either")
    return pixels


def test_the_pictures_take_the_place_of_the_training_images(tmp_path) -> None:
    pixels = draw(tmp_path / "pictures", 6)
    subset = load_dataset("fashion_mnist_subset")
    found = with_unlabelled(subset, tmp_path / "pictures")
    expected = [pixels[index] for index in (0, 2, 4, 1, 3, 5)]  # by path: those inside "more" last
    np.testing.assert_array_equal(found.train_images, np.stack(expected)[..., None])
    assert found.test_images is subset.test_images and found.class_names == subset.class_names


def test_every_picture_of_a_folder_is_found(tmp_path) -> None:
    folder, elsewhere = tmp_path / "pictures", tmp_path / "elsewhere"
    draw(folder, 2)
    elsewhere.mkdir()
    picture = Image.new("L", (28, 28), 5)
    for file in (folder / "a.jfif", folder / "b.JPE", folder / "c.ppm", elsewhere / "linked.png"):
        picture.save(file, {".jfif": "JPEG", ".JPE": "JPEG"}.get(file.suffix))
    (folder / "@eaDir").mkdir()
    picture.save(folder / "@eaDir" / "thumbnail.png")
    (folder / "link").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)
    skipped: Counter[str] = Counter()
    found = [str(Path(file).relative_to(folder)) for file in list_pictures(folder, skipped)]
    assert found == ["00.png", "a.jfif", "b.JPE", "c.ppm", "link/linked.png", "more/01.png"]
    assert skipped == {"files .txt": 1, "hidden or system files and folders": 2}
    assert "1 files .txt" in with_unlabelled(load_dataset("fashion_mnist_subset"), folder).skipped
    with pytest.raises(UserError, match=r"holds no picture \(passed over: 1 files \.txt\)"):
        (tmp_path / "none").mkdir()
        (tmp_path / "none" / "a.txt").write_text("")
        list_pictures(tmp_path / "none")


def test_pictures_of_another_size_are_cut_to_that_of_the_set_and_streamed_alike(tmp_path) -> None:
    draw(tmp_path / "pictures", 5, (40, 50), "RGB")
    for split in ("train", "test"):
        for label in ("a", "b"):
            draw(tmp_path / "set" / split / label, 2, (16, 16), "RGB")
            (tmp_path / "set" / split / label / "more" / "01.png").unlink()
            (tmp_path / "set" / split / label / "more").rmdir()
            (tmp_path / "set" / split / label / "notes.txt").unlink()
    given = ("folder", str(tmp_path / "set"), 16)
    in_memory, streamed = (
        with_unlabelled(open_dataset(*given, stream=stream), tmp_path / "pictures") for stream in (False, True)
    )
    assert in_memory.train_images.shape == streamed.train_images.shape == (5, 16, 16, 3)
    # Decoders of JPEG differ, those of PNG do not.
    np.testing.assert_array_equal(in_memory.train_images[:], streamed.train_images[:])


def test_transparent_parts_have_the_background_of_the_set(tmp_path) -> None:
    (tmp_path / "pictures").mkdir()
    Image.new("RGBA", (28, 28), (0, 0, 0, 0)).save(tmp_path / "pictures" / "0.png")
    subset = load_dataset("fashion_mnist_subset")
    for background, level in (("white", 255), ("black", 0)):
        assert (with_unlabelled(subset, tmp_path / "pictures", background).train_images == level).all()


def test_a_network_is_pruned_by_pictures_alone(tmp_path, quick_runs) -> None:
    trained = write_checkpoint(tmp_path / "trained", "pretrain")
    draw(tmp_path / "pictures", 40)
    config = dataclasses.replace(
        CONFIG,
        phases=("learn",),
        data=dataclasses.replace(CONFIG.data, unlabelled=str(tmp_path / "pictures"), batch_size=16, crop_padding=0),
        learn=dataclasses.replace(CONFIG.learn, steps=2),  # an epoch: nothing is evaluated before its end
        distill=DistillConfig(weight=1.0),
    )
    summary = train(config, str(tmp_path / "run"), init=str(trained))
    assert summary["macs"]["ratio"] == pytest.approx(0.7, abs=0.05) and summary["num_examples"] == quick_runs
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("train_loss" in record for record in records)
    # There is no accuracy on pictures without labels.
    assert not any("train_top1" in record for record in records)

    with pytest.raises(UserError, match="or give --init DIR"):
        train(config, str(tmp_path / "none"))
    # Such as imported weights, which would be fine-tuned before masks are learned.
    unfinished = write_checkpoint(tmp_path / "unfinished", "pretrain", 0)
    fine_tuned = dataclasses.replace(config, phases=("pretrain", "learn"))
    with pytest.raises(UserError, match=r"no labels to pretrain with: leave pretrain out .*--phases learn\)"):
        train(fine_tuned, str(tmp_path / "none"), init=str(unfinished))
    with pytest.raises(UserError, match=r"give --distill\.weight 1"):
        dataclasses.replace(config, distill=DistillConfig(weight=0.5))
    with pytest.raises(UserError, match=r"0 with data\.unlabelled"):
        dataclasses.replace(config.data, validation=0.1)
    assert not (tmp_path / "none").exists()


def test_folders_without_pictures_are_refused(tmp_path) -> None:
    subset = load_dataset("fashion_mnist_subset")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name, message in (("absent", "not there"), ("file", "not a folder"), ("empty", "holds no picture")):
        with pytest.raises(UserError, match=message):
            with_unlabelled(subset, tmp_path / name)
    (tmp_path / "empty" / "broken.png").write_text("")
    with pytest.raises(UserError, match=r"broken\.png"):
        with_unlabelled(subset, tmp_path / "empty")

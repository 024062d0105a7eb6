"""`fdjax data inspect` and `fdjax data sheet`: what a set holds, what is wrong with it, and how it is augmented."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fdjax.commands.main import fdjax_command
from fdjax.data.inspection import inspect_set
from tests.original_layouts import jpeg, random_pixels, write_folder


def test_inspecting_a_folder_finds_what_is_wrong_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_folder(tmp_path / "images")
    cat, dog = root / "train" / "cat", root / "train" / "dog"
    Image.fromarray(random_pixels(50, 40, 20)).save(cat / "grey.png")
    (cat / "cmyk.jpg").write_bytes(jpeg(random_pixels(51, 16, 16, 3), "CMYK"))
    (dog / "half.jpg").write_bytes(jpeg(random_pixels(52, 64, 64, 3))[:900])
    original = sorted((root / "train" / "bird").iterdir())[0].read_bytes()
    (dog / "twin.png").write_bytes(original)
    (root / "train" / "bird" / "zz.png").write_bytes(original)
    (root / "test" / "bird" / "zz.png").write_bytes(original)
    arguments = ["--path", str(root), "--sheet", str(tmp_path / "sheet.png"), "--json", str(tmp_path / "report.json")]
    assert fdjax_command(["data", "inspect", "folder", *arguments]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    train = report["splits"]["train"]
    assert train["images"] == 55 and report["splits"]["test"]["images"] == 11
    assert train["per_class"]["cat"] == 7 and sum(train["per_class"].values()) == 55
    sizes = {"different": 3, "most_frequent": [32, 32], "smallest": [16, 16], "largest": [32, 32]}
    assert train["sizes"] == sizes
    assert train["forms"] == {"RGB": 52, "grey": 1, "CMYK": 1}
    problems = {problem["kind"]: problem for problem in report["problems"]}
    assert {kind: problem["count"] for kind, problem in problems.items()} == {
        "unreadable": 1, "duplicates": 1, "duplicates with other labels": 1, "duplicates across splits": 1,
    }  # fmt: skip
    assert "half.jpg" in problems["unreadable"]["examples"][0] and "half.jpg" in printed
    assert "twin.png" in problems["duplicates with other labels"]["examples"][0]
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (110 + 7 * 66, 10 * 66), "a row for each class; the largest has seven readable images"


def test_what_is_no_fault_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, rng = write_folder(tmp_path / "images"), np.random.default_rng(3)
    cat = root / "train" / "cat"
    Image.fromarray(random_pixels(50, 40, 20, 4)).save(cat / "alpha.png")
    Image.fromarray(random_pixels(51, 32, 32).astype(np.uint16) * 257).save(cat / "deep.png")
    Image.fromarray(random_pixels(52, 6, 5, 3)).save(cat / "small.png")
    Image.fromarray(random_pixels(53, 20, 90, 3)).save(cat / "long.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(random_pixels(54, 32, 32, 3)).save(cat / "turned.jpg", exif=exif)
    (cat / "Thumbs.db").write_bytes(b"x")
    smooth = Image.fromarray(random_pixels(55, 5, 5, 3)).resize((64, 64), Image.Resampling.BICUBIC)
    noisy = np.clip(np.asarray(smooth).astype(int) + rng.integers(-3, 4, (64, 64, 3)), 0, 255).astype(np.uint8)
    smooth.save(cat / "near.png")
    Image.fromarray(noisy).resize((60, 60)).save(root / "test" / "cat" / "near.png")
    assert fdjax_command(["data", "inspect", "folder", "--path", str(root), "--json", str(tmp_path / "r.json")]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "r.json").read_text())
    warnings = {warning["kind"]: warning for warning in report["warnings"]}
    assert {kind: warning["count"] for kind, warning in warnings.items()} == {
        "transparency (data.background shows through)": 1,
        "more than 8 bits (scaled to 8)": 1,
        "turned by EXIF (brought upright)": 1,
        "much smaller than the others": 1,
        "very long: a square of it leaves out most": 1,
        "near-duplicates across splits": 1,
        "passed over: files .db": 1,
    }
    assert "near.png" in warnings["near-duplicates across splits"]["examples"][0]
    assert "warning: near-duplicates across splits: 1" in printed and "no problems found" in printed
    assert report["problems"] == []


def test_near_duplicates_are_found_whatever_the_order() -> None:
    from fdjax.data.oddities import fingerprint, near_pairs

    smooth = [np.asarray(Image.fromarray(random_pixels(s, 4, 4, 3)).resize((48, 48), 2)) for s in range(40)]
    shifted = [np.clip(pixels.astype(int) + 2, 0, 255).astype(np.uint8) for pixels in smooth]
    first, second = ([fingerprint(pixels) for pixels in some] for some in (smooth, shifted[::-1]))
    assert sorted(near_pairs(first, second) or ()) == [(number, 39 - number) for number in range(40)]
    assert fingerprint(np.full((9, 9, 3), 7, np.uint8)) is None
    assert list(near_pairs([None], first) or ()) == []


def test_a_search_that_is_not_made_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fdjax.data.oddities._MOST_PAIRS", 3)
    report = inspect_set("folder", str(write_folder(tmp_path)))
    assert "near-duplicates across splits, not looked for: too many pairs" in [w["kind"] for w in report["warnings"]]


def test_inspecting_a_prepared_set_and_wrong_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fdjax.data.prepare import prepare

    prepared, _ = prepare("pictures", str(write_folder(tmp_path / "images")), str(tmp_path / "sets"))
    report = inspect_set("prepared", str(prepared))
    assert report["problems"] == [] and report["splits"]["train"]["sizes"]["different"] == 1
    assert set(report["splits"]["train"]["per_class"].values()) == {5}
    for arguments, message in (
        (["nothing_like_it"], "unknown data set"),
        (["folder", "--path", str(tmp_path)], "has no folder 'train'"),
        (["prepared", "--path", str(prepared), "--sheet", str(tmp_path / "sheet.gif")], r"give a \.png file"),
        (["prepared", "--path", str(prepared), "--per-class", "0"], "--per-class must be at least 1"),
    ):
        with pytest.raises(SystemExit) as stopped:
            fdjax_command(["data", "inspect", *arguments])
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and len(error.strip().splitlines()) == 1
        assert re.search(message, error)


def test_the_sheet_shows_images_as_a_run_would_see_them(tmp_path: Path) -> None:
    config = tmp_path / "config.py"
    config.write_text(
        "from fdjax.config import Config, DataConfig\n"
        "def get_config():\n    return Config(data=DataConfig(name='folder', path='', erase=1.0))\n"
    )
    root, out = write_folder(tmp_path / "images"), tmp_path / "sheet.png"
    flags = ["--data.path", str(root), "--data.image-size", "16", "--data.loading", "stream"]
    flags += ["--data.random-resized-crop", "--data.crop-padding", "0"]
    arguments = ["data", "sheet", "--config", str(config), "--out", str(out), "--images", "3", "--times", "2", *flags]
    assert fdjax_command(arguments) == 0
    with Image.open(out) as sheet:
        assert sheet.size == (110 + 3 * 66, 3 * 66)
        pixels = np.asarray(sheet)
    # The second and third tile of a row are augmented, differently.
    tiles = [pixels[:64, 110 + 66 * n : 110 + 66 * n + 64].astype(int) for n in range(3)]
    assert all(np.abs(a - b).mean() > 1 for a, b in ((tiles[0], tiles[1]), (tiles[1], tiles[2])))

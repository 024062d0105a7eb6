"""Every config in `configs/` runs from end to end, at its full size, on a few hundred random pictures."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fdjax.config import PHASES, Config, load_config
from fdjax.training.run import train

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
STEPS = 2


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder of 256 training and 64 test pictures in two classes, larger than any network's input."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, count in (("train", 128), ("test", 32)):
        for label in ("dark", "light"):
            (root / split / label).mkdir(parents=True)
            for index in range(count):
                small = rng.integers(0, 128, (16, 16, 3)) + (128 if label == "light" else 0)
                picture = Image.fromarray(small.astype(np.uint8)).resize((256, 240))
                picture.save(root / split / label / f"{index}.png")
    return root


def shortened(config: Config, root: Path) -> Config:
    """The config with a few steps in each phase, on the pictures."""
    data = config.data
    if data.name != "fashion_mnist_subset":
        size = data.image_size or 32
        data = dataclasses.replace(data, name="folder", path=str(root), image_size=size, batch_size=8)
    phases = {name: dataclasses.replace(getattr(config, name), steps=STEPS) for name in PHASES}
    untimed = dataclasses.replace(config.checkpoint, time=False)
    return dataclasses.replace(config, data=data, checkpoint=untimed, **phases)


@pytest.mark.slow
@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_config_runs_from_end_to_end(file: Path, pictures, tmp_path, monkeypatch) -> None:
    # Optimised, unlike `quick_runs`: at these sizes that is quicker.
    monkeypatch.setattr("fdjax.training.measure.plot_run", lambda *arguments, **options: [])
    config = shortened(load_config(str(file)), pictures)
    init = None
    if config.phases[0] != "pretrain":
        # Such a config begins with a trained network.
        begun = dataclasses.replace(config, phases=("pretrain",))
        train(begun, str(tmp_path / "pretrained"))
        init = str(tmp_path / "pretrained")
    summary = train(config, str(tmp_path / "run"), init=init)
    assert [phase["name"] for phase in summary["phases"]] == list(config.phases)
    assert all(phase["steps"] == STEPS for phase in summary["phases"])
    if any(name in config.phases for name in ("learn", "alternate")):
        assert summary["macs"]["ratio"] == pytest.approx(config.learn.target_macs, rel=0.1)
    assert 0 <= summary["top1"] <= 1


def test_a_shipped_config_is_found_beside_a_folder_of_its_name(tmp_path, monkeypatch) -> None:
    """As a run leaves it that is begun with --config quickstart --workdir quickstart."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()
    assert load_config("quickstart").model.name

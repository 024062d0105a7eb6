"""What the documentation shows works."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from statistics import mean

import pytest

from fdjax.config import Config, load_config

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "results" / "quickstart"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```python" in page.read_text()], ids=lambda page: page.name
)
def test_python_examples_run(page):
    namespace: dict = {}
    for example in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(example, str(page), "exec"), namespace)
    assert "fdjax" in namespace


def test_relative_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_readme_has_the_two_commands():
    commands = re.findall(r"<!-- command: (\w+) -->\n```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert [name for name, _ in commands] == ["quickstart", "tests"]
    assert all("requirements" in command for _, command in commands)


def recorded(run: str, file: str = "summary.json") -> dict:
    return json.loads((QUICKSTART / run / file).read_text())


def times_of(network: str) -> list[float]:
    """Pruned over dense: in XLA for 1 and 8 images at once, then in ONNX Runtime."""
    rows = json.loads((QUICKSTART / "time.json").read_text())["rows"]
    found = {(row["engine"], row["batch"]): row["time_ratio"] for row in rows if row["network"] == network}
    return [found[engine, batch] for engine in ("xla", "onnxruntime") for batch in (1, 8)]


def test_readmes_table_is_that_of_the_recorded_runs():
    figures = []
    for seed in range(3):
        dense, pruned = recorded(f"dense_seed{seed}"), recorded(f"seed{seed}")
        # The control has had as many steps.
        assert dense["phases"][-1]["steps"] == sum(phase["steps"] for phase in pruned["phases"][1:])
        figures.append([dense["top1"], pruned["top1"], pruned["macs"]["ratio"], *times_of(f"seed{seed}")])
    rows = zip(
        ("0", "1", "2", "mean"), [*figures, [mean(column) for column in zip(*figures, strict=True)]], strict=True
    )
    readme = (ROOT / "README.md").read_text()
    for name, (dense, pruned, macs, *times) in rows:
        cells = [name, f"{100 * dense:.2f}%", f"{100 * pruned:.2f}%", f"{100 * (pruned - dense):+.2f}", f"{macs:.3f}x"]
        row = f"| {' | '.join([*cells, *(f'{time:.2f}x' for time in times)])} |"
        assert row in readme, row


def test_readme_says_what_the_papers_masks_take():
    readme = " ".join((ROOT / "README.md").read_text().split())
    top1 = mean(recorded(f"paper_seed{seed}")["top1"] for seed in range(3))
    one, eight, *others = (f"{time:.1f}" for time in times_of("paper_seed0"))
    assert f"reach {100 * top1:.2f}% at the same MACs" in readme
    assert f"takes {one} and {eight} times the dense one's time in XLA at 1 and 8 images" in readme
    assert f"and {others[0]} and {others[1]} times in ONNX Runtime" in readme


@pytest.mark.parametrize(("run", "file"), [("seed", "quickstart.py"), ("paper_seed", "quickstart_paper.py")])
def test_the_recorded_runs_are_of_the_configs(run, file):
    config = load_config(str(ROOT / "configs" / file))
    for seed in range(3):
        found = Config.from_dict(recorded(f"{run}{seed}", "config.json"))
        assert (found.seed, found.phases, found.data, found.model) == (seed, config.phases, config.data, config.model)
        for phase in config.phases:
            asked, had = getattr(config, phase), getattr(found, phase)
            if phase == "learn" and asked.gate == "macs":
                # How many images are timed at once makes no difference to the gate by MACs.
                asked = dataclasses.replace(asked, engine_batch=had.engine_batch)
            assert had == asked

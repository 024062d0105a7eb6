"""What the documentation shows works: blocks of Python run, links lead somewhere, figures are the recorded ones."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest

from fdjax.config import Config, load_config

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "results" / "quickstart"
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "results").rglob("README.md")),
]
# Their blocks train or compile for longer than the gate has time for.
LONG_PAGES = ("tutorial.md", "deploy.md")


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if page.name in LONG_PAGES else [], id=page.name)
        for page in PAGES
        if "```python" in page.read_text()
    ],
)
def test_python_examples_run(page, tmp_path, monkeypatch):
    """A block that is marked as Python runs, after those above it; others are commands, or parts of programs."""
    monkeypatch.chdir(tmp_path)
    if page.name == "deploy.md":
        pytest.importorskip("onnxruntime")
    namespace: dict = {}
    for example in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(example, str(page), "exec"), namespace)
    assert "fdjax" in namespace


def test_relative_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_to_a_heading_find_it():
    for page in PAGES:
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", page.read_text()):
            assert anchor in anchors(page.parent / target if target else page), f"{page.name}: {target}#{anchor}"


def test_every_page_is_in_the_navigation():
    index = (ROOT / "docs" / "index.md").read_text()
    for page in sorted((ROOT / "docs").rglob("*.md")):
        if page.name != "index.md":
            assert f"]({os.path.relpath(page, ROOT / 'docs')})" in index, f"docs/index.md does not name {page.name}"


def test_readme_has_the_two_commands():
    commands = re.findall(r"<!-- command: (\w+) -->\n```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert [name for name, _ in commands] == ["quickstart", "tests"]
    assert all("requirements" in command for _, command in commands)


def recorded(run: str, file: str = "summary.json") -> dict:
    return json.loads((QUICKSTART / run / file).read_text())


def test_the_tables_of_results_are_those_of_the_recorded_runs(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "results"))
    table = importlib.import_module("table")
    rows = table.load()
    assert [row.words("pruned") for row in rows if row.name == "quickstart.channels"] == ["88.10±0.23%"]
    for page, of_rows in table.PAGES.items():
        assert page.read_text() == table.renewed(page.read_text(), rows, of_rows), f"python results/table.py: {page}"


def test_the_controls_of_the_quick_start_had_as_many_steps():
    for seed in range(3):
        control, run = recorded(f"dense_seed{seed}"), recorded(f"seed{seed}")
        assert control["phases"][-1]["steps"] == sum(phase["steps"] for phase in run["phases"][1:])


def test_the_page_on_frequency_says_what_the_papers_masks_take():
    page = " ".join((ROOT / "docs" / "when-frequency-pays.md").read_text().split())
    rows = json.loads((QUICKSTART / "paper_time.json").read_text())["rows"]
    times = {(row["engine"], row["batch"]): row["time_ratio"] for row in rows if row["network"] == "paper_seed0"}
    one, eight, *others = (f"{times[engine, batch]:.1f}" for engine in ("xla", "onnxruntime") for batch in (1, 8))
    top1 = mean(recorded(f"paper_seed{seed}")["top1"] for seed in range(3))
    assert f"reach {100 * top1:.2f}% at the same MACs" in page
    assert f"takes {one} and {eight} times the dense one's time in XLA at 1 and 8 images" in page
    assert f"and {others[0]} and {others[1]} times in ONNX Runtime" in page


def test_the_page_of_the_quick_start_has_its_accuracies():
    page = (QUICKSTART / "README.md").read_text()
    for seed in range(3):
        dense, pruned = recorded(f"dense_seed{seed}"), recorded(f"seed{seed}")
        loss = 100 * (dense["top1"] - pruned["top1"])
        cells = (
            f"{100 * pruned['top1']:.2f}% | {100 * dense['top1']:.2f}% | {loss:.2f} | {pruned['macs']['ratio']:.3f}x"
        )
        assert re.search(rf"^\| {seed} \|.* \| {re.escape(cells)} \|", page, re.MULTILINE), cells


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


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-c", "docs", "-d", str(tmp_path / "trees"), "."]
    done = subprocess.run([*command, str(tmp_path / "site")], cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    pages = {str(file.relative_to(tmp_path / "site")): file.read_text() for file in (tmp_path / "site").rglob("*.html")}
    assert "docs/index.html" in pages["index.html"]
    assert {"docs/tutorial.html", "README.html", "results/quickstart/README.html"} <= pages.keys()
    assert "--learn.target-macs" in pages["docs/reference/flags.html"]
    assert "fdjax.harden" in pages["docs/reference/api.html"]
    for name, text in pages.items():
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*src=\"(https?:[^\"]+)|<link[^>]*href=\"(https?:[^\"]+)", text)
        assert not loaded, (name, loaded)

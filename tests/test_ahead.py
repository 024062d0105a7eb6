"""What compiles for accelerators that are not here: every config's steps, every form of masks, and the page of it."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fdjax.config import load_config
from fdjax.errors import UserError
from fdjax.frozen.targets import AheadOfTime

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "configs").glob("*.py"))
PACKAGES = {"tpu:v5e": ("libtpu",), "cuda:h100": ("jax_cuda13_plugin", "jax_cuda12_plugin")}


@pytest.fixture
def ahead(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("ahead")


def compiled(tmp_path: Path, target: str, *flags: str) -> list[dict]:
    """The rows that the script writes; a compiler wants a process of its own."""
    if all(importlib.util.find_spec(package) is None for package in PACKAGES[target]):
        pytest.skip(f"nothing here compiles for {target}")
    command = [sys.executable, "benchmarks/ahead.py", "--target", target, "--json", str(tmp_path / "rows.json"), *flags]
    done = subprocess.run([*command, "--limit", "3600"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert rows and [row["problem"] for row in rows if "problem" in row] == []
    assert all(row["memory_mb"] > 0 and (row["cycles"] is not None) == target.startswith("tpu") for row in rows)
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("target", list(PACKAGES))
@pytest.mark.parametrize("config", CONFIGS)
def test_every_step_of_a_config_compiles(tmp_path, config, target) -> None:
    steps = {row["form"] for row in compiled(tmp_path, target, "--config", config, "--network")}
    assert {form.partition(":")[0] for form in steps} == {*load_config(str(ROOT / config)).phases}


@pytest.mark.slow
@pytest.mark.parametrize("target", list(PACKAGES))
def test_every_form_of_masks_compiles(ahead, tmp_path, target) -> None:
    rows = compiled(tmp_path, target, "--config", "--network", "mobilenet_v2_small", "--batch", "1", "8")
    cycles = {(row["form"], row["batch"]): row["cycles"] for row in rows}
    assert {form for form, _ in cycles} == {form for form in ahead.FORMS if "estimate" not in form or "tpu" in target}
    if target.startswith("tpu"):
        # What is estimated part by part is not exactly what the whole takes.
        assert all(cycles["tied, by estimate", batch] <= 1.1 * cycles["dense", batch] for batch in (1, 8))


# The page, without compilers


class Lowered:
    digest = "same"

    def __init__(self, made: list[int]) -> None:
        self.made = made

    def compile(self) -> AheadOfTime:
        self.made.append(1)
        return AheadOfTime(1.0, 2.5, 1000, {})


def facts(**other) -> dict:
    return {"what": "n", "form": "dense", "target": "tpu:v5e", "batch": 1, "dtype": "bfloat16", "macs": 100, **other}


def test_the_same_program_is_compiled_once_and_a_refusal_is_a_row(ahead) -> None:
    made: list[int] = []
    first = ahead._compiled(facts(), lambda: Lowered(made), {})
    again = ahead._compiled(facts(what="m"), lambda: Lowered(made), {("same", "tpu:v5e"): first})
    assert len(made) == 1 and again["as"] == "n, dense" and again["cycles"] == first["cycles"] == 1000

    def refuses():
        raise UserError("the compiler for tpu:v5e refuses it")

    refused = ahead._compiled(facts(), refuses, {})
    assert refused["problem"] == "the compiler for tpu:v5e refuses it" and "cycles" not in refused


def test_the_page_says_what_was_compiled_and_what_was_not(ahead, tmp_path) -> None:
    figures = {"processor_seconds": 3.2, "memory_mb": 1.5, "cycles": 1000, "commit": "abc"}
    rows = [
        {**facts(), **figures},
        {**facts(form="tied", macs=40), **figures, "cycles": 1500},
        {**facts(target="cuda:h100"), **figures, "cycles": None},
        {**facts(what="configs/c.py", form="learn: mask step"), "problem": "not finished in 9 s"},
    ]
    del rows[-1]["macs"]
    report = {"machine": {"cpu": "Some CPU", "jax": "1"}, "rows": rows}
    ahead.write_page(SimpleNamespace(page=str(tmp_path / "page.md")), report)
    page = (tmp_path / "page.md").read_text()
    assert "| n | dense | 1.00x | 1 | bfloat16 | 3, 1.5 | 3, 1.5, 1,000 | not measured |" in page
    assert "| n | tied | 0.40x | 1 | bfloat16 | not measured | 3, 1.5, 1,500 (1.50x) | not measured |" in page
    assert "| c | learn: mask step | 1 | bfloat16 | not measured | not finished in 9 s | not measured |" in page
    assert "| quickstart | every step | - | - | not measured | not measured | not measured |" in page
    assert "| mobilenet_v2_192 | tied, by estimate | - | 64 | - | - | not measured | not measured |" in page

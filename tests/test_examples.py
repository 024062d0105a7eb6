"""The examples run, and end with a network of half the MACs that knows its classes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "package"), [("linen", "flax"), ("nnx", "flax"), ("equinox", "equinox"), ("keras", "keras")]
)
def test_an_example_prunes_to_half_of_its_macs(name, package) -> None:
    pytest.importorskip(package)
    command, environment = [sys.executable, f"examples/own_{name}.py"], {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    found = re.search(r"dense ([\d.]+)%, pruned ([\d.]+)% at ([\d.]+)x MACs", done.stdout)
    assert found is not None, done.stdout
    dense, pruned, ratio = map(float, found.groups())
    assert dense > 65 and pruned > dense - 5 and 0.47 <= ratio <= 0.53


@pytest.mark.parametrize("name", ["linen", "nnx", "equinox", "keras"])
def test_an_example_is_short(name) -> None:
    assert len((ROOT / "examples" / f"own_{name}.py").read_text().splitlines()) < 50


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quickstart", "photograph"])
def test_a_notebook_runs_from_its_first_cell_to_its_last(name, tmp_path) -> None:
    """Its code is plain Python, so that it runs without Jupyter; what it claims, it asserts."""
    notebook = json.loads((ROOT / "examples" / "notebooks" / f"{name}.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 5 and sum("assert " in cell for cell in cells) >= 2
    (tmp_path / "notebook.py").write_text("\n\n".join(cells))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    command = [sys.executable, "notebook.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    assert not any(cell.get("outputs") for cell in notebook["cells"]), "kept without outputs"

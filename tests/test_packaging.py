"""What is installed is whole, and the files around the package say the same version."""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

import fdjax
from fdjax.commands.main import fdjax_command
from fdjax.config import load_config
from fdjax.errors import UserError

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_file_of_the_package_is_installed() -> None:
    """What is no Python file goes into a wheel only if package-data names it: headers, images, the mark of types."""
    data = PROJECT["tool"]["setuptools"]["package-data"]
    files = [file for file in (ROOT / "fdjax").rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")]
    assert ROOT / "fdjax" / "py.typed" in files
    for file in files:
        package = ".".join(file.parent.relative_to(ROOT).parts)
        assert any(fnmatch(file.name, pattern) for pattern in data.get(package, ())), f"no wheel has {file}"
        # setuptools finds packages by this file, and data by their package.
        assert (file.parent / "__init__.py").exists(), file.parent


def test_every_package_is_installed_and_the_configs_are_too() -> None:
    tools = PROJECT["tool"]["setuptools"]
    folders = {file.parent.relative_to(ROOT) for file in (ROOT / "fdjax").rglob("*.py")}
    assert set(tools["packages"]) == {".".join(folder.parts) for folder in folders} | {"fdjax.configs"}
    assert ROOT / tools["package-dir"]["fdjax.configs"] == ROOT / "configs"


def test_configs_that_come_with_it_go_by_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("finetune") == load_config(str(ROOT / "configs" / "finetune.py"))
    with pytest.raises(UserError, match="no config file 'fintune'"):
        load_config("fintune")
    # A file of the user's own goes first.
    (tmp_path / "finetune").write_text("def get_config(): return 1")
    with pytest.raises(UserError, match=r"must return an fdjax.config.Config"):
        load_config("finetune")


def test_the_version_is_one_and_semantic(capsys: pytest.CaptureFixture[str]) -> None:
    version = fdjax.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == version
    assert fdjax_command(["--version"]) == 0
    assert capsys.readouterr().out == f"fdjax {version}\n"


def test_the_local_gate_is_that_of_ci_and_hooks_need_no_network() -> None:
    assert "bash .ci/run" in (ROOT / "CONTRIBUTING.md").read_text()
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert set(re.findall(r"repo: (\S+)", hooks)) == {"local"}
    gate = (ROOT / ".ci" / "run").read_text()
    for tool in ("ruff check", "ruff format"):
        assert tool in hooks and tool in gate

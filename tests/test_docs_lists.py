"""Lists on the pages are those of the code: networks, formats, engines, targets, phases, commands, flags, fields."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import json
import re
import textwrap
import typing
from pathlib import Path

import pytest

from fdjax.checkpoints import freeze
from fdjax.commands.main import COMMANDS
from fdjax.config import Config, LearnConfig, ModelConfig
from fdjax.config.phases import PHASES
from fdjax.frozen import artifact
from fdjax.frozen.engines import ENGINES
from fdjax.importers.formats import FORMATS
from fdjax.training.build import build_network
from tools import docs_reference

from .test_docs import PAGES, QUICKSTART, ROOT

DOCS = ROOT / "docs"
# Scripts with flags of their own.
SCRIPTS = [file for folder in ("benchmarks", "results", "tools", "examples") for file in (ROOT / folder).rglob("*.py")]
# `model.onnx` is a file and no setting of a model.
FILE_SUFFIXES = {"cc", "onnx", "stablehlo", "json", "html", "py"}
# Of a Keras or a Flax model.
METHODS = {"stateless_call", "apply", "variables"}
# Flags of other programs, and of JAX's.
XLA_FLAGS = {"--xla_gpu_deterministic_ops", "--xla_cpu_experimental_ynn_fusion_type"}
FOREIGN_FLAGS = {"--help", "--version", "--dist", "--no-isolation", *XLA_FLAGS}


def section(page: str, title: str) -> str:
    """The text under a heading, up to the next one."""
    text = (DOCS / page).read_text()
    return re.split(r"^#+ ", text.split(f"# {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def first_cells(text: str) -> list[str]:
    """The code in the first cell of each row of the tables in a text."""
    rows = [row for row in text.splitlines() if row.startswith("| `")]
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])]


def choices(kind: type, field: str) -> tuple[str, ...]:
    """The values of a `Literal`."""
    return typing.get_args(typing.get_type_hints(kind)[field])


def test_networks() -> None:
    table = (DOCS / "networks.md").read_text().split("\n\n## ")[0]
    names = [name for name in first_cells(table) if name != "model.name"]
    # `resnet20`, `32`, ...: what follows has the same beginning.
    whole = [f"resnet{name}" if name.isdecimal() else name for name in names]
    assert sorted(whole) == sorted(choices(ModelConfig, "name"))


def test_formats() -> None:
    rows = [row for row in (DOCS / "import.md").read_text().splitlines() if re.match(r"\| `\w+` [(|]", row)]
    assert {row.split("`")[1] for row in rows} == set(FORMATS)


def test_engines() -> None:
    assert first_cells(section("freeze.md", "Engines")) == list(ENGINES)
    assert choices(LearnConfig, "engine") == ENGINES
    deploy = (DOCS / "deploy.md").read_text()
    assert all(f"--engine {engine}" in deploy for engine in ENGINES if engine != "xla")
    for page in PAGES:
        for given in re.findall(r"--(?:learn\.)?engine ([a-z]+)", page.read_text()):
            assert given in ENGINES, f"{page.name}: --engine {given}"


def test_phases() -> None:
    assert first_cells(section("train.md", "Phases"))[: len(PHASES)] == list(PHASES)


def test_commands() -> None:
    named: set[str] = set()
    for page in PAGES:
        for code in re.findall(r"^ {4}.*$|`[^`\n]+`", page.read_text(), re.MULTILINE):
            named |= set(re.findall(r"(?:^|[`\s])(?:python -m )?fdjax ([a-z]+)\b(?!\.)", code))
    assert named <= {*COMMANDS}, f"no such command: {sorted(named - {*COMMANDS})}"
    assert {*COMMANDS} <= named, f"no page names {sorted({*COMMANDS} - named)}"


@functools.cache
def known_flags() -> frozenset[str]:
    rows = [row for _, _, rows in docs_reference.settings() for row in rows]
    rows += [row for _, kind in docs_reference.commands() for row in docs_reference.rows_of(kind)]
    flags = {flag for row in rows for flag in row[0].split(", ")}
    texts = [file.read_text() for file in SCRIPTS]
    of_scripts = {flag for text in texts for flag in re.findall(r"--[a-z][\w-]*", text)}
    # What tyro makes of the fields of their dataclasses.
    of_scripts |= {
        f"--{name.replace('_', '-')}" for text in texts for name in re.findall(r"^    (\w+):", text, re.MULTILINE)
    }
    return frozenset(flags | of_scripts | FOREIGN_FLAGS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_flags(page: Path) -> None:
    """A flag on a page is one of a command, of a config or of a script."""
    if page.name == "CHANGELOG.md":
        pytest.skip("the changelog names flags of before")
    known = known_flags()
    # `--seed$seed` and `--gate time` alike; a flag ends before what is not of its name.
    found = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*[a-z0-9]", page.read_text()))
    unknown = {flag for flag in found - known if not any(other.startswith(f"{flag}.") for other in known)}
    assert not unknown, f"{page.name}: {sorted(unknown)}"


def test_settings_by_their_dotted_names() -> None:
    parts = {
        name: {field.name.rstrip("_") for field in dataclasses.fields(kind)}
        for name, kind, _ in docs_reference.settings()
    }
    for page in PAGES:
        if page.name == "CHANGELOG.md":
            continue
        for part, field in re.findall(r"`(\w+)\.([a-z_]+)[` ]", page.read_text()):
            if part in parts and field not in FILE_SUFFIXES | METHODS:
                assert field in parts[part], f"{page.name}: {part}.{field}"


def test_files_that_pages_name_are_there() -> None:
    for page in PAGES:
        if page.name == "CHANGELOG.md":
            continue
        for file in re.findall(
            r"`((?:fdjax|configs|benchmarks|tools|tests|examples|docs)/[\w/.-]+\.\w+)`", page.read_text()
        ):
            assert (ROOT / file).exists(), f"{page.name}: {file}"


def test_fields_of_a_summary_are_those_on_the_page() -> None:
    page = (DOCS / "reference" / "files.md").read_text()
    summary = json.loads((QUICKSTART / "seed0" / "summary.json").read_text())
    records = [json.loads(line) for line in (QUICKSTART / "seed0" / "metrics.jsonl").read_text().splitlines()]
    for field in {*summary, *summary["macs"], *summary["layers"][0], *summary["time"], *summary["versions"]}:
        assert f"`{field}`" in page, field
    for field in {name for record in records for name in record}:
        assert f"`{field}`" in page, field


@pytest.mark.slow
def test_counts_of_octave_networks_are_those_on_the_page() -> None:
    rows = re.findall(
        r"^\| `(\w+)`, (\d+) \|.* M \| (.*) \|$", section("networks.md", "Octave convolution"), re.MULTILINE
    )
    assert len(rows) >= 5
    for name, side, cells in rows:
        at_224 = side == "224"
        shape = (int(side), int(side), 1 if name.endswith("small") else 3)
        for octave, cell in zip((0.25, 0.375, 0.5), cells.split(" | "), strict=True):
            for maps, millions in zip(("wide", "all"), cell.split(", "), strict=True):
                model = ModelConfig(name=name, octave=octave, octave_maps=maps, count_classifier=at_224)  # type: ignore[arg-type]
                _, graph = build_network(Config(model=model), shape, 1000 if at_224 else 10)
                assert f"{sum(layer.dense_macs for layer in graph.counted_layers.values()) / 1e6:.2f}" == millions, name


def names_used(function: ast.FunctionDef) -> set[str]:
    """The names that a function calls or hands on."""
    return {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}


def names_imported(tree: ast.Module) -> set[str]:
    """What a file imports by `from module import name`, also within its functions, as `module.name`."""
    found = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
    return {f"{node.module}.{alias.name}" for node in found for alias in node.names}


def test_a_reader_of_three_files_gets_from_train_py_to_the_mask_step() -> None:
    """Each function that the map names exists in its file, and uses the next one, which it has from the next file."""
    rows = re.findall(
        r"^\| `([^`]+)` \| (`.*?`) \| .* \| (.*?) ?\|$",
        section("architecture.md", "From train.py to a step that updates masks"),
        re.MULTILINE,
    )
    assert 2 <= len(rows) <= 3
    assert rows[0][0] == "train.py" and rows[-1][0] == "fdjax/training/steps.py"
    way = [(file, name) for file, names, _ in rows for name in re.findall(r"`(\w+)`", names)]
    assert way[-1][1] == "make_mask_step"
    assert [called for *_, called in rows[:-1]] == [f"`{names.split('`')[1]}`" for _, names, _ in rows[1:]]
    for (file, name), (next_file, following) in itertools.pairwise(way):
        tree = ast.parse((ROOT / file).read_text())
        function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
        assert following in names_used(function), f"{file}: {name} does not use {following}"
        if next_file != file:
            module = next_file.removesuffix(".py").replace("/", ".")
            assert f"{module}.{following}" in names_imported(tree), (
                f"{file} does not import {following} from {next_file}"
            )


def string_keys(function: object) -> set[str]:
    """The keys of all dicts that a function writes out."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))  # type: ignore[arg-type]
    return {
        key.value for node in ast.walk(tree) if isinstance(node, ast.Dict)
        for key in node.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)
    }  # fmt: skip


@pytest.mark.parametrize("writer", [artifact._write, freeze.freeze_checkpoint, freeze._accuracy])
def test_fields_of_a_manifest_are_those_on_the_page(writer: object) -> None:
    page = (DOCS / "reference" / "files.md").read_text()
    keys = string_keys(writer)
    assert keys and not {key for key in keys if f"`{key}`" not in page}


def test_every_setting_and_flag_has_words_in_the_reference() -> None:
    text = docs_reference.markdown()
    assert all(f"### {program}\n" in text for program in ("train.py", "eval.py", "fdjax freeze", "fdjax data prepare"))
    rows = [row for _, _, rows in docs_reference.settings() for row in rows]
    rows += [row for _, kind in docs_reference.commands() for row in docs_reference.rows_of(kind)]
    assert {row[0] for row in rows} >= {
        "--learn.target-macs",
        "--learn.lambda",
        "--learn.tied, --learn.no-tied",
        "IMAGES",
    }
    assert not [row[0] for row in rows if not row[3]], "a flag without help"
    assert set(Config().to_dict()) - {"seed", "phases", "skip_nonfinite"} == {
        name for name, _, _ in docs_reference.settings() if name
    }

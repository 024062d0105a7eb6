"""The rules of the house (docs/architecture.md): floors, imports, the public names, and docstring examples."""

from __future__ import annotations

import ast
import doctest
import graphlib
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fdjax
import fdjax.ops

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted([*(ROOT / "fdjax").rglob("*.py"), ROOT / "train.py", ROOT / "eval.py"])

# Room -> floor. A room is a folder, or a file that stands alone on its floor.
FLOORS = {
    "fdjax.config": 0,
    "fdjax.errors": 0,
    "fdjax.provenance": 0,
    "fdjax.python_file": 0,
    "fdjax.runtime": 0,
    "fdjax.ops": 1,
    "fdjax.graph": 1,
    "fdjax.zoo": 2,
    "fdjax.pruning": 2,
    "fdjax.frozen": 2,
    "fdjax.onnx": 2,
    "fdjax.data": 2,
    "fdjax.reports": 2,
    "fdjax.checkpoint": 2,
    "fdjax.training": 3,
    "fdjax.importers": 3,
    "fdjax.experiments": 4,
    "fdjax.checkpoints": 4,
    "fdjax.commands": 5,
    "fdjax.__main__": 5,
    "train": 5,
    "eval": 5,
}
# Files that belong to one room, earlier ones first in its table: the foundations, the graph beside ops (a network's
# count is the sum of its layers'), and the entry points.
SHARED_ROOMS = (
    ("fdjax.errors", "fdjax.runtime", "fdjax.python_file", "fdjax.config"),
    ("fdjax.ops", "fdjax.graph"),
    (
        "fdjax.commands",
        "fdjax.__main__",
        "train",
        "eval",
    ),
)


def module_name(file: Path) -> str:
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in FILES}


def room_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


def may_import(importer: str, imported: str) -> bool:
    """Whether a file of one module may import another."""
    here, there = room_of(importer), room_of(imported)
    if here == there or FLOORS[there] < FLOORS[here]:
        return True
    return any(here in room and there in room and room.index(there) < room.index(here) for room in SHARED_ROOMS)


class WithoutTypes(ast.NodeTransformer):
    """Takes away what only type checkers see."""

    def visit_If(self, node: ast.If) -> ast.If | None:
        self.generic_visit(node)
        return None if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING" else node


def imported_names(
    source: str, module: str, is_package: bool, *, top_level: bool = False, types: bool = True
) -> set[str]:
    """Every name that a file imports, also inside functions: modules, and `module.name` of from-imports.

    `types`: also what is imported for type checkers alone.
    """
    tree = ast.parse(source) if types else WithoutTypes().visit(ast.parse(source))
    found = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [base])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def imports_of(module: str, **how) -> set[str]:
    file = MODULES[module]
    return imported_names(file.read_text(), module, file.name == "__init__.py", **how)


def own_modules(names: set[str], modules=MODULES) -> set[str]:
    """The modules of this project among imported names; a name from a module counts as that module."""
    found = set()
    for name in names:
        while name and name not in modules:
            name = name.rpartition(".")[0]
        if name:
            found.add(name)
    return found


def packages_of(module: str, **how) -> set[str]:
    return {name.partition(".")[0] for name in imports_of(module, **how)}


def modules_in(*rooms: str) -> list[str]:
    found = [module for module in MODULES if room_of(module) in rooms]
    assert found, rooms
    return found


# Floors


def test_every_file_has_its_floor() -> None:
    homeless = [module for module in MODULES if module != "fdjax" and room_of(module) not in FLOORS]
    assert not homeless, f"docs/architecture.md names no floor for {homeless}"


@pytest.mark.parametrize("module", [module for module in MODULES if module != "fdjax"])
def test_a_file_imports_from_lower_floors_and_its_own_room_only(module: str) -> None:
    wrong = {other for other in own_modules(imports_of(module)) if other != "fdjax" and not may_import(module, other)}
    assert not wrong, f"{module} (floor {FLOORS[room_of(module)]}) imports {sorted(wrong)}, above it or beside it"


def test_the_package_itself_offers_ops_and_the_functions_for_any_model() -> None:
    of_models = {module for module, _ in fdjax._OF_MODELS.values()}
    assert own_modules(imports_of("fdjax")) == {"fdjax.ops", *of_models}
    assert {room_of(module) for module in of_models} <= {"fdjax.graph", "fdjax.pruning", "fdjax.frozen", "fdjax.onnx"}
    from_package = {name for module in MODULES for name in imports_of(module) if own_modules({name}) == {"fdjax"}}
    assert from_package <= {"fdjax.__version__"}


def test_files_import_each_other_in_one_order() -> None:
    """No circle: a file imports from earlier files only. Rules may name the type of the walk that calls them."""
    graph = {
        module: own_modules(imports_of(module, types=False)) - {module, "fdjax"}
        for module in MODULES
        if module != "fdjax"
    }
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert sorted(order) == sorted(graph)


@pytest.mark.parametrize(
    ("module", "source", "allowed"),
    [
        ("fdjax.ops.dct", "from fdjax.ops.blocks import check_block", True),
        ("fdjax.ops.dct", "from fdjax.graph.network import Graph", False),
        ("fdjax.graph.counting", "from fdjax.ops import macs", True),
        ("fdjax.zoo.frequency", "from fdjax import ops", True),
        ("fdjax.zoo.frequency", "from fdjax import pruning", False),
        ("fdjax.zoo.frequency", "from ..pruning import harden", False),
        ("fdjax.zoo.frequency", "from . import mobilenetv2", True),
        ("fdjax.pruning.harden", "def late():\n    import fdjax.training.run", False),
        ("fdjax.reports.tables", "import fdjax.checkpoint", False),
        ("fdjax.training.run", "from fdjax.commands.main import main", False),
        ("fdjax.errors", "import fdjax.config", False),
        ("fdjax.commands.main", "from fdjax.training.run import train", True),
        ("fdjax.commands.main", "import fdjax.__main__", False),
        ("train", "from fdjax.commands.train import train_command", True),
    ],
)
def test_the_rule_itself_tells_right_from_wrong(module: str, source: str, allowed: bool) -> None:
    others = own_modules(imported_names(source, module, is_package=False)) - {"fdjax"}
    assert len(others) == 1
    assert all(may_import(module, other) for other in others) == allowed


def docstring_lines(source: str) -> int:
    """How many lines of a file are docstrings of its functions and classes."""
    documented = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    found = [node.body[0] for node in nodes if ast.get_docstring(node) is not None]
    return sum((text.end_lineno or text.lineno) - text.lineno + 1 for text in found)


def test_no_file_is_long() -> None:
    """Docstrings aside, which `test_docstrings.py` asks for."""
    sources = {name: file.read_text() for name, file in MODULES.items()}
    lengths = {name: len(source.splitlines()) - docstring_lines(source) for name, source in sources.items()}
    long = {name: lines for name, lines in lengths.items() if lines > 400}
    assert not long, "a file of over 400 lines holds more than one thing: give each a file of its own"


# What knows which network it is

FAMILIES = re.compile("mobilenet|resnet|resnext|efficientnet|octave", re.IGNORECASE)
ROLES = {"expand", "project", "stem", "head", "conv1", "conv2", "conv3", "shortcut"}
# The networks themselves, and the names by which a config asks for them.
NAMES_NETWORKS = ("fdjax.zoo", "fdjax.config")
# Elsewhere a family is named for one of these reasons.
NAMES_A_FAMILY = {
    "fdjax.ops.octave": "the mathematics of the octave convolution, which is called that",
    "fdjax.importers.names": "what foreign files call the layers of each network",
    "fdjax.importers.formats": "the formats of foreign files, called after the networks that they hold",
    "fdjax.importers.best_fit": "tells which network a foreign file holds",
    "fdjax.commands.import_weights": "its --source is the name of a format",
    "fdjax.reports": "hands on the published figures",
    "fdjax.reports.references": "published figures, which are of named networks",
    "fdjax.reports.results": "says in words what a config's model.octave is",
    "fdjax.reports.results_text": "lists the settings of a config in which runs differ",
}
NAMES_A_ROLE = {
    "fdjax.importers.names": "what foreign files call the layers of each network",
}


def role_names(source: str) -> set[str]:
    """The roles that a file's strings name: alone, or as a part of a layer's path."""
    texts = (node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    return {part for text in texts if isinstance(text, str) for part in text.split("/")} & ROLES


def family_names(source: str) -> set[str]:
    """The families that a file names, also in its comments."""
    return {found.lower() for found in FAMILIES.findall(source)}


@pytest.mark.parametrize(("find", "exceptions"), [(family_names, NAMES_A_FAMILY), (role_names, NAMES_A_ROLE)])
def test_only_networks_and_configs_know_a_family_or_a_role(find, exceptions: dict[str, str]) -> None:
    """What works on a graph works on any network."""
    elsewhere = [module for module in MODULES if room_of(module) not in NAMES_NETWORKS]
    found = {module: names for module in elsewhere if (names := find(MODULES[module].read_text()))}
    wrong = {module: names for module, names in found.items() if module not in exceptions}
    assert not wrong, "leave to the network what only it can know, or say above why a file has to name it"
    assert exceptions.keys() <= found.keys(), "an exception that is none any more"


def test_the_search_for_names_finds_them() -> None:
    assert family_names("# as in MobileNetV2\nx = 'resnet50'") == {"mobilenet", "resnet"}
    assert role_names("a, b = f'{unit}/project', layers['expand']\nhead = 'the head of a table'") == {
        "expand",
        "project",
    }


# What a part may import from outside


@pytest.mark.parametrize("module", modules_in("fdjax.ops"))
def test_ops_needs_jax_numpy_and_chex_only(module: str) -> None:
    assert packages_of(module) - sys.stdlib_module_names <= {"jax", "numpy", "chex", "fdjax"}


def test_nothing_imports_tensorflow() -> None:
    assert [module for module in MODULES if "tensorflow" in packages_of(module)] == []


def test_parts_stay_with_their_own_trade() -> None:
    for rooms, foreign in (
        (("fdjax.zoo",), {"optax", "orbax"}),
        (("fdjax.graph", "fdjax.pruning", "fdjax.frozen", "fdjax.reports"), {"flax", "optax", "orbax"}),
        (("fdjax.reports",), {"jax"}),
        (
            ("fdjax.config", "fdjax.errors", "fdjax.provenance", "fdjax.python_file", "fdjax.runtime"),
            {"jax", "flax", "optax", "orbax"},
        ),
        (("fdjax.checkpoint",), {"flax", "optax"}),
    ):
        for module in modules_in(*rooms):
            assert not (packages_of(module) | own_modules(imports_of(module))) & foreign, module
    # Networks take plain keyword arguments; one file makes them of a config's.
    reads_configs = {module for module in modules_in("fdjax.zoo") if "fdjax.config" in own_modules(imports_of(module))}
    assert reads_configs == {"fdjax.zoo.registry"}


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_fdjax_loads_neither_jax_nor_anything_heavy() -> None:
    """PEP 562: `fdjax.runtime` can set the process up before jax is loaded."""
    heavy = ("jax", "numpy", "flax", "orbax", "grain", "tensorflow_datasets", "optax", "tensorflow")
    assert run_python(f"import sys, fdjax; print([name for name in {heavy} if name in sys.modules])").strip() == "[]"


def test_entry_points_can_set_the_process_up_before_jax_is_loaded() -> None:
    """`runtime.setup` refuses to run once jax is there, so importing an entry point must not load it."""
    code = "import sys, train, eval, fdjax.commands.main, fdjax.__main__, fdjax.runtime; print('jax' in sys.modules)"
    assert run_python(code).strip() == "False"
    late = run_python(
        """
import jax, fdjax.runtime
try:
    fdjax.runtime.setup()
except RuntimeError as error:
    print(error)
"""
    )
    assert "before jax is imported" in late


def test_the_public_functions_need_no_training_packages() -> None:
    heavy = ("flax", "orbax", "grain", "tensorflow_datasets", "optax", "tensorflow", "tyro")
    code = f"""
import sys, fdjax
for name in fdjax.__all__:
    getattr(fdjax, name)
print("jax" in sys.modules, [name for name in {heavy} if name in sys.modules])
"""
    assert run_python(code).strip() == "True []"


# Public names

SIGNATURES = {
    "zigzag_order": ["block"],
    "dct_basis": ["block", "dtype"],
    "block_dct": ["x", "block", "num_coefs"],
    "block_idct": ["y", "block", "size"],
    "coef_mask": ["fcmask", "num_coefs"],
    "kept_counts": ["fcmask", "num_coefs"],
    "fcmask_penalty": ["fcmasks"],
    "dense_pointwise": ["x", "kernel"],
    "masked_pointwise": ["x", "kernel", "block", "input_mask", "output_mask"],
    "banded_pointwise": ["x", "kernel", "plan"],
    "plan_bands": ["input_counts", "output_counts", "block"],
    "depthwise_conv": ["x", "kernel", "stride"],
}


def test_public_names_resolve_and_are_those_of_ops_and_of_any_model() -> None:
    assert {*SIGNATURES, "BandPlan"} <= {*fdjax.__all__}
    assert sorted(fdjax.__all__) == sorted([*fdjax.ops.__all__, *fdjax._OF_MODELS])
    for name in fdjax.__all__:
        public = getattr(fdjax, name)
        module, attribute = fdjax._OF_MODELS.get(name, ("fdjax.ops", name))
        assert public is getattr(importlib.import_module(module), attribute)
        assert callable(public) and inspect.getdoc(public)
        assert name in dir(fdjax)


@pytest.mark.parametrize("name", SIGNATURES)
def test_public_functions_take_what_the_design_says(name: str) -> None:
    parameters = [
        parameter.name
        for parameter in inspect.signature(getattr(fdjax, name)).parameters.values()
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY
    ]
    assert parameters[: len(SIGNATURES[name])] == SIGNATURES[name]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'fdjax' has no attribute 'block_dtc'"):
        fdjax.block_dtc  # noqa: B018


# Docstring examples


def test_docstring_examples_of_ops_are_tests() -> None:
    """A plain `pytest` runs them; and there are some."""
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert "--doctest-modules" in options["addopts"].split()
    assert {"tests", "fdjax/ops"} <= {*options["testpaths"]}
    modules = [importlib.import_module(info.name) for info in pkgutil.iter_modules(fdjax.ops.__path__, "fdjax.ops.")]
    examples = [test for module in modules for test in doctest.DocTestFinder().find(module) if test.examples]
    assert len(examples) >= 2
    runner = doctest.DocTestRunner()
    for test in examples:
        assert runner.run(test).failed == 0, test.name

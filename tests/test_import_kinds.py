"""The kinds of weights files that people have: each gives the same network as its bare state dict, or one message."""

from __future__ import annotations

import argparse
import datetime
import io
import json
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: it writes the files that are read here")

from fdjax.checkpoint import find_checkpoint  # noqa: E402
from fdjax.commands.evaluate import eval_command  # noqa: E402
from fdjax.commands.main import fdjax_command  # noqa: E402
from fdjax.errors import UserError  # noqa: E402
from fdjax.importers import Fitted, count_classes, fit, open_weights  # noqa: E402
from fdjax.training.restore import restore  # noqa: E402
from fdjax.zoo import MobileNet  # noqa: E402
from tests.graph_networks import network_for  # noqa: E402
from tests.torch_networks import randomise, small_mobilenetv2  # noqa: E402

NETWORK = MobileNet("mobilenetv2_small", 10, 0.35, 1, padding="torch")
GRAPH = network_for(NETWORK, (28, 28, 1))
State = dict[str, torch.Tensor]


def fitted(file: Path, **options) -> Fitted:
    averaged = options.get("averaged", False)
    found = open_weights(str(file), averaged)
    by_names = fit(found.tensors, "torchvision", NETWORK, GRAPH, NETWORK.width, **options)
    return by_names._replace(notes=[*found.notes, *by_names.notes])


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    leaves = [jax.tree.leaves_with_path(variables) for variables in (found, expected)]
    pairs = zip(*leaves, strict=True)
    return all(one[0] == other[0] and np.array_equal(one[1], other[1]) for one, other in pairs)


@pytest.fixture(scope="module")
def module() -> torch.nn.Module:
    return randomise(small_mobilenetv2(), 4)


@pytest.fixture(scope="module")
def state(module) -> State:
    return dict(module.state_dict())


@pytest.fixture(scope="module")
def expected(state, tmp_path_factory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("plain") / "w.pth"
    torch.save(state, file)
    return fitted(file).variables


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def flat_names(state: State) -> State:
    """As tonylins and the first torchvision named a unit's layers: conv.0, conv.1, conv.3, ... in one row."""
    renamed = {}
    for name, tensor in state.items():
        unit, _, rest = name.partition(".conv.")
        parts = rest.split(".")
        if not rest:
            renamed[name] = tensor
        elif parts[1].isdigit():
            renamed[f"{unit}.conv.{3 * int(parts[0]) + int(parts[1])}.{parts[2]}"] = tensor
        else:
            last = max(
                int(other.split(".conv.")[1].split(".")[0]) for other in state if other.startswith(f"{unit}.conv.")
            )
            # The projection and its batch norm are the last two.
            renamed[f"{unit}.conv.{3 * (last - 1) + int(parts[0]) - (last - 1)}.{parts[1]}"] = tensor
    return renamed


def tonylins(state: State) -> State:
    renamed = {}
    for name, tensor in flat_names(state).items():
        if name.startswith("features.5."):
            name = name.replace("features.5.", "conv.")
        renamed[name.replace("classifier.1", "classifier")] = tensor
    return renamed


def optimizer_state(state: State) -> dict[str, Any]:
    buffers = {
        number: {"momentum_buffer": tensor + 1, "step": torch.tensor(3.0)}
        for number, tensor in enumerate(state.values())
    }
    return {"state": buffers, "param_groups": [{"lr": 0.1, "params": list(buffers)}]}


def noisy(state: State) -> State:
    return {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in state.items()}


class OfTheTrainer:
    """A class that only the training program has."""

    def __init__(self):
        self.history = [1, 2, 3]


KINDS: dict[str, Callable[[State], Any]] = {
    "argparse arguments": lambda s: {"model": s, "args": argparse.Namespace(lr=0.1, path=Path("data"))},
    "numpy scalars": lambda s: {"state_dict": s, "best": np.float64(0.7), "epoch": np.int64(3), "seen": np.arange(3)},
    "an optimizer's state": lambda s: {
        "state_dict": s,
        "optimizer": optimizer_state(s),
        "scheduler": {"last_epoch": 3},
    },
    "an optimizer's state first": lambda s: {"optimizer_state_dict": optimizer_state(s), "model_state_dict": s},
    "dates and dtypes": lambda s: {"model": s, "when": datetime.datetime(2020, 1, 1), "dtype": torch.float16},
    "random states": lambda s: {"state_dict": s, "rng": torch.get_rng_state(), "loss": torch.tensor(0.3)},
    "a class of the trainer": lambda s: {"state_dict": s, "trainer": OfTheTrainer()},
    "lightning": lambda s: {
        "state_dict": prefixed(s, "model."),
        "hyper_parameters": argparse.Namespace(lr=1),
        "callbacks": {},
        "optimizer_states": [optimizer_state(s)],
    },
    "two wrappers": lambda s: prefixed(s, "module._orig_mod."),
    "any prefix": lambda s: prefixed(s, "backbone.net.encoder."),
    "under a key of its own": lambda s: {"best_network": s, "epoch": 3},
    "beside a metric": lambda s: {"best_accuracy": torch.tensor(71.0), "network": s},
    "two keys deep": lambda s: {"checkpoint": {"state_dict": s}, "epoch": 3},
    "an ordered dictionary": lambda s: OrderedDict(s),
    "parameters": lambda s: {name: torch.nn.Parameter(t, False) for name, t in s.items()},
    "the first torchvision": flat_names,
    "tonylins": tonylins,
    "tonylins in a wrapper": lambda s: {"state_dict": prefixed(tonylins(s), "module."), "args": argparse.Namespace()},
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_the_same_network(kind: str, zipped: bool, state, expected, tmp_path: Path) -> None:
    torch.save(KINDS[kind](state), tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    assert same(fitted(tmp_path / "w.pth").variables, expected)


def test_what_was_passed_over_and_taken_off_is_said(state, tmp_path: Path) -> None:
    torch.save({"state_dict": prefixed(tonylins(state), "net2."), "args": argparse.Namespace(a=1)}, tmp_path / "w.pth")
    said = "\n".join(fitted(tmp_path / "w.pth").notes)
    assert "skipped unread: argparse.Namespace" in said
    assert "all names begin with 'net2.'" in said and "the names are those of tonylins/pytorch-mobilenet-v2" in said


# Before torch 1.6, and before 0.4


def test_weights_of_torch_before_0_4_are_read(state, expected, tmp_path: Path) -> None:
    """Five pickles and the numbers; `_rebuild_tensor`, names and keys as Python 2 wrote them, a part of a storage."""

    class Storage:
        def __init__(self, *pid):
            self.pid = pid

    class Tensor:
        def __init__(self, storage, shape, strides):
            self.call = (torch._utils._rebuild_tensor, (storage, 0, shape, strides))

        def __reduce__(self):
            return self.call

    class Pickler(pickle._Pickler):  # type: ignore[name-defined]
        def persistent_id(self, obj):
            return obj.pid if isinstance(obj, Storage) else None

    def dumped(content: Any) -> bytes:
        stream = io.BytesIO()
        Pickler(stream, protocol=2).dump(content)
        return stream.getvalue()

    kinds = {torch.float32: torch.FloatStorage, torch.int64: torch.LongStorage}
    described, numbers = OrderedDict(), {}
    for name, tensor in state.items():
        count, view = tensor.numel(), None
        values = tensor.contiguous().reshape(-1)
        if name == "classifier.1.bias":
            values, view = torch.cat([torch.zeros(3), values]), ("part", 3, count)
        numbers[name] = values
        storage = Storage("storage", kinds[tensor.dtype], name, "cuda:0", len(values), view)
        described[name] = Tensor(storage, tuple(tensor.shape), tensor.stride())
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    with (tmp_path / "w.pth.tar").open("wb") as file:
        for part in (0x1950A86A20F9469CFC6C, 1001, system, {"state_dict": described}, list(numbers)):
            file.write(dumped(part))
        for values in numbers.values():
            file.write(struct.pack("<q", len(values)) + values.numpy().tobytes())
    assert same(fitted(tmp_path / "w.pth.tar").variables, expected)


# Averaged weights


def averaged_model(module: torch.nn.Module) -> State:
    return dict(torch.optim.swa_utils.AveragedModel(module).state_dict())


BOTH: dict[str, Callable[[State, State], Any]] = {
    "state_dict_ema": lambda s, e: {"state_dict": s, "state_dict_ema": e, "args": argparse.Namespace()},
    "model_ema": lambda s, e: {"model": s, "model_ema": {"n_averaged": torch.tensor(7), **prefixed(e, "module.")}},
    "ema under a key": lambda s, e: {"model": s, "ema": {"state_dict": e, "decay": 0.999}},
    "one dictionary": lambda s, e: {"state_dict": {**prefixed(s, "model."), **prefixed(e, "model_ema.")}},
}


@pytest.mark.parametrize("kind", BOTH)
def test_averaged_weights_are_chosen_by_a_flag(kind: str, state, expected, tmp_path: Path) -> None:
    other = noisy(state)
    torch.save(other, tmp_path / "other.pth")
    averaged = fitted(tmp_path / "other.pth").variables
    assert not same(averaged, expected)
    torch.save(BOTH[kind](state, other), tmp_path / "w.pth")
    if kind == "one dictionary":
        tensors = open_weights(str(tmp_path / "w.pth")).tensors
        for flag, wanted in ((False, expected), (True, averaged)):
            found = fit(tensors, "torchvision", NETWORK, GRAPH, NETWORK.width, averaged=flag)
            assert same(found.variables, wanted)
        return
    plain = fitted(tmp_path / "w.pth")
    assert same(plain.variables, expected) and any("--ema" in note for note in plain.notes)
    assert same(fitted(tmp_path / "w.pth", averaged=True).variables, averaged)


def test_an_averaged_model_is_found_and_said(module, expected, tmp_path: Path) -> None:
    torch.save(averaged_model(module), tmp_path / "w.pth")
    assert "n_averaged" in averaged_model(module)
    found = fitted(tmp_path / "w.pth")
    assert same(found.variables, expected) and any("averages over training (EMA)" in note for note in found.notes)


def test_averaged_weights_that_are_not_there_are_refused(state, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"has no averaged weights.*leave --ema out"):
        open_weights(str(tmp_path / "w.pth"), averaged=True)


def test_several_unknown_sets_are_refused_by_name(state, tmp_path: Path) -> None:
    torch.save({"student": state, "teacher_net": state}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="several sets of tensors, under 'student', 'teacher_net'"):
        open_weights(str(tmp_path / "w.pth"))


def test_quantised_weights_are_refused_by_name(tmp_path: Path) -> None:
    quantised = torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8)
    torch.save({"a.weight": quantised, "a.bias": torch.ones(2)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"weight is not a plain tensor of numbers \(torch\._utils\._rebuild_qtensor\)"):
        open_weights(str(tmp_path / "w.pth"))


# By order


def test_only_names_differ(state, expected, tmp_path: Path) -> None:
    renamed = {f"layers_{number:03}.{name.rpartition('.')[2]}": tensor for number, name, tensor in numbered(state)}
    torch.save(renamed, tmp_path / "w.pth")
    with pytest.raises(UserError, match="If only names differ, give --by-order"):
        fitted(tmp_path / "w.pth")
    found = fitted(tmp_path / "w.pth", by_order=True)
    assert same(found.variables, expected)
    assert ("layers_000.weight", "params/stem/kernel") in found.mapping
    assert len(found.mapping) == len(jax.tree.leaves(expected))


def numbered(state: State):
    modules: dict[str, int] = {}
    for name, tensor in state.items():
        yield modules.setdefault(name.rpartition(".")[0], len(modules)), name, tensor


def test_by_order_refuses_another_network_by_its_layers(state, tmp_path: Path) -> None:
    del (few := dict(state))["features.2.conv.1.0.weight"]
    torch.save(few, tmp_path / "few.pth")
    with pytest.raises(UserError, match=r"1 layers are not found and [0-9]+ tensors are left over"):
        fitted(tmp_path / "few.pth", by_order=True)
    torch.save({**state, "more.weight": torch.ones(3, 3)}, tmp_path / "more.pth")
    with pytest.raises(UserError, match=r"left over: more\.weight \[3, 3\]"):
        fitted(tmp_path / "more.pth", by_order=True)


# Another classifier, or none


def new_classifier(tensors: State, tmp_path: Path, **options) -> Fitted:
    torch.save(tensors, tmp_path / "w.pth")
    return fitted(tmp_path / "w.pth", new_classifier=5, **options)


@pytest.mark.parametrize("by_order", [False, True])
@pytest.mark.parametrize("had", ["the same", "another number", "none", "another name"])
def test_a_new_classifier_is_begun(had: str, by_order: bool, state, expected, tmp_path: Path) -> None:
    body = {name: tensor for name, tensor in state.items() if not name.startswith("classifier")}
    content = {
        "the same": state,
        "another number": {**body, "classifier.1.weight": torch.ones(7, 256), "classifier.1.bias": torch.ones(7)},
        "none": body,
        "another name": {**body, "fc.weight": torch.ones(7, 256), "fc.bias": torch.ones(7)},
    }[had]
    found = new_classifier(content, tmp_path, by_order=by_order)
    theirs = found.variables["params"].pop("classifier")
    without = {**expected, "params": {k: v for k, v in expected["params"].items() if k != "classifier"}}
    assert same(found.variables, without)
    assert theirs["kernel"].shape == (256, 10) and not theirs["bias"].any()
    assert 0.008 < theirs["kernel"].std() < 0.012
    assert any("the classifier is new" in note for note in found.notes)


def test_without_the_flag_it_is_named(state, tmp_path: Path) -> None:
    body = {name: tensor for name, tensor in state.items() if not name.startswith("classifier")}
    torch.save(body, tmp_path / "w.pth")
    with pytest.raises(UserError, match="The weights have no classifier; --new-classifier start"):
        fitted(tmp_path / "w.pth")


# Another architecture


def test_the_network_that_fits_best_is_named(tmp_path: Path) -> None:
    torch.save(small_mobilenetv2(width=0.75).state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"fits best is --model\.name mobilenetv2_small --model\.width 0\.75"):
        fitted(tmp_path / "w.pth")
    torch.save({"a.weight": torch.ones(3, 4), "a.bias": torch.ones(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="No network of fdjax has kernels like these"):
        fitted(tmp_path / "other.pth")


# Class lists


CONFIG = str(Path(__file__).parent / "tiny_run.py")


def imported(weights: Path, out: Path, *more: str) -> int:
    given = ["--config", CONFIG, "--format", "torchvision", "--weights", str(weights), "--out", str(out)]
    return fdjax_command(["import", *given, "--model.width", "0.35", "--input-mean", "73", "--input-std", "90", *more])


FASHION = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
LISTS = {
    "plain": "\n".join(FASHION).encode(),
    "BOM, CRLF, blank lines": b"\xef\xbb\xbf" + "\r\n".join(FASHION).encode() + b"\r\n\r\n\r\n",
    "UTF-16": "\n".join(FASHION).encode("utf-16"),
    "old line ends, spaces": "\r".join(f" {name}\t" for name in FASHION).encode(),
}


@pytest.mark.parametrize("kind", LISTS)
def test_class_lists_of_every_editor_are_read(kind: str, state, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "w.pth")
    (tmp_path / "classes.txt").write_bytes(LISTS[kind])
    assert imported(tmp_path / "w.pth", tmp_path / "out", "--classes", str(tmp_path / "classes.txt")) == 0
    assert restore(*find_checkpoint(str(tmp_path / "out"))).graph.class_names == FASHION


def test_a_permuted_class_list_reorders_the_classifier(state, tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(10)
    permuted = {
        **state,
        **{f"classifier.1.{leaf}": state[f"classifier.1.{leaf}"][order] for leaf in ("weight", "bias")},
    }
    torch.save(permuted, tmp_path / "w.pth")
    torch.save(state, tmp_path / "plain.pth")
    (tmp_path / "classes.txt").write_text("\n".join(FASHION[number] for number in order))
    assert imported(tmp_path / "w.pth", tmp_path / "out", "--classes", str(tmp_path / "classes.txt")) == 0
    assert imported(tmp_path / "plain.pth", tmp_path / "plain") == 0
    found, expected = (restore(*find_checkpoint(str(tmp_path / name))) for name in ("out", "plain"))
    assert found.graph.class_names == expected.graph.class_names == FASHION
    assert same(found.state.params, expected.state.params)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("\n".join(FASHION[:9]), "the data set alone has Ankle boot"),
        ("\n".join((*FASHION[:9], "Hat")), "the data set alone has Ankle boot; the file alone has Hat"),
        ("\n".join((*FASHION, "Bag")), "'Bag' occurs twice"),
        ("", "it has 0"),
    ],
)
def test_other_class_lists_are_refused(content: str, expected: str, state, tmp_path: Path, capsys) -> None:
    torch.save(state, tmp_path / "w.pth")
    (tmp_path / "classes.txt").write_text(content)
    with pytest.raises(SystemExit) as stop:
        imported(tmp_path / "w.pth", tmp_path / "out", "--classes", str(tmp_path / "classes.txt"))
    assert stop.value.code == 2 and expected in capsys.readouterr().err and not (tmp_path / "out").exists()


# Real weights of others

RESNET_CONFIG = """
from fdjax.config import Config, DataConfig, ModelConfig

def get_config():
    data = DataConfig(name="folder", path={path!r})
    return Config(data=data, model=ModelConfig(name="resnet20"), phases=("pretrain",))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "published"), [("resnet20", 91.73), ("resnet56", 93.39)])
def test_resnets_of_others_have_their_published_accuracy(
    name: str, published: float, test_data, tmp_path: Path, capsys
) -> None:
    """CIFAR-10 ResNets by Y. Idelbayev, on the lossless test images."""
    import tarfile

    files, archive = list(test_data.glob(f"{name}-*.th")), test_data / "cifar10-png.tar.xz"
    if not files or not archive.is_file():
        pytest.skip(f"{name}-*.th or cifar10-png.tar.xz is not in {test_data}")
    seen: set[str] = set()
    with tarfile.open(archive) as tar:
        for member in tar:
            *_, split, label, _ = ("", "", "", *member.name.split("/"))
            # The folder needs training images too: one of each class will do.
            if member.isfile() and (split == "test" or label not in seen):
                seen |= {label} if split == "train" else set()
                tar.extract(member, tmp_path / "data", filter="data")
    root = next(path.parent for path in (tmp_path / "data").rglob("test"))
    (tmp_path / "config.py").write_text(RESNET_CONFIG.format(path=str(root)))
    given = ["--config", str(tmp_path / "config.py"), "--model.name", name, "--weights", str(files[0])]
    assert fdjax_command(["import", *given, "--format", "torchvision", "--out", str(tmp_path / "out")]) == 0
    # There are no masks to learn in it, so the next command removes filters.
    assert f"prune --checkpoint {tmp_path / 'out'} --method l1" in capsys.readouterr().out
    assert eval_command(["--checkpoint", str(tmp_path / "out"), "--json", str(tmp_path / "eval.json")]) == 0
    found = json.loads((tmp_path / "eval.json").read_text())
    assert found["num_examples"] == 10_000 and abs(100 * found["top1"] - published) <= 0.05


def test_classes_of_the_file_are_counted_whatever_the_names(state, tmp_path: Path) -> None:
    for kind in ("tonylins", "any prefix", "the first torchvision"):
        torch.save(KINDS[kind](state), tmp_path / "w.pth")
        assert count_classes(open_weights(str(tmp_path / "w.pth")).tensors, "torchvision", NETWORK) == 10

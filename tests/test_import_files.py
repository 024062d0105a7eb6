"""Weights files, read without the frameworks that wrote them; anything else is refused."""

from __future__ import annotations

import builtins
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from fdjax.errors import UserError
from fdjax.importers import read_weights

torch = pytest.importorskip("torch", reason="torch is not installed: it writes the files that are read here")


def some_tensors() -> dict[str, torch.Tensor]:
    """Of every kind of number, and of views: turned, cut out, of one element, empty."""
    base = torch.arange(24.0).reshape(2, 3, 4) / 7
    kinds = (torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8)
    return {
        **{str(kind): (10 * base).to(kind) for kind in (*kinds, torch.uint8, torch.bool)},
        "turned": base.permute(2, 0, 1),
        "cut": base[1, :, 1:3],
        "stepped": base.reshape(-1)[3::5],
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(base + 1),
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_tensors_are_read_as_torch_wrote_them(tmp_path: Path, zipped: bool) -> None:
    tensors = some_tensors()
    torch.save(tensors, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    found = read_weights(str(tmp_path / "w.pth"))
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        expected = tensor.detach().numpy()
        assert found[name].dtype == expected.dtype
        np.testing.assert_array_equal(found[name], expected, err_msg=name)


@pytest.mark.parametrize("file", ["w.pth", "legacy.pth", "w.safetensors"])
def test_bfloat16_is_read(tmp_path: Path, file: str) -> None:
    tensor = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    path = tmp_path / file
    if file == "w.safetensors":
        pytest.importorskip("safetensors.torch").save_file({"a": tensor}, path)
    else:
        torch.save({"a": tensor}, path, _use_new_zipfile_serialization=file == "w.pth")
    np.testing.assert_array_equal(read_weights(str(path))["a"].astype(np.float32), tensor.float().numpy())


def test_safetensors_are_read(tmp_path: Path) -> None:
    writer = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    tensors = {"module.a": np.arange(6, dtype=np.float32).reshape(2, 3), "module.b": np.ones(4, np.float16)}
    writer.save_file(tensors, tmp_path / "w.safetensors")
    found = read_weights(str(tmp_path / "w.safetensors"))
    assert sorted(found) == ["a", "b"]
    np.testing.assert_array_equal(found["a"], tensors["module.a"])
    # By their numbers, because layers that only differ in their order are told apart by it.
    writer.save_file({f"body.{number}.weight": tensors["module.a"] for number in range(12)}, tmp_path / "n.safetensors")
    assert list(read_weights(str(tmp_path / "n.safetensors"))) == [f"body.{number}.weight" for number in range(12)]
    (tmp_path / "w.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:-3])
    with pytest.raises(UserError, match=r"w\.safetensors cannot be read as a safetensors file"):
        read_weights(str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": {"module.a.weight": torch.ones(2)}, "optimizer": {"lr": 0.1}, "epoch": 7},
        {"model": {"a.weight": torch.ones(2)}, "args": [1, None, "text"]},
        {"model_state_dict": {"_orig_mod.module.a.weight": torch.ones(2)}},
        {"a.weight": torch.ones(2), "step": 3},
    ],
)
def test_state_dicts_are_found_in_training_checkpoints(tmp_path: Path, content) -> None:
    torch.save(content, tmp_path / "w.pth")
    found = read_weights(str(tmp_path / "w.pth"))
    assert list(found) == ["a.weight"] and found["a.weight"].tolist() == [1, 1]


class Calls:
    """What its pickle calls when it is read."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def attacks(marker: Path) -> dict[str, object]:
    text = f"open({str(marker)!r}, 'w').close()"
    return {
        "posix.system": Calls(os.system, f"touch {marker}"),
        "builtins.eval": Calls(builtins.eval, text),
        "builtins.exec": Calls(builtins.exec, text),
    }


@pytest.mark.parametrize("name", ["posix.system", "builtins.eval", "builtins.exec"])
@pytest.mark.parametrize("layout", ["zip", "legacy", "pickle"])
def test_a_pickle_that_wants_to_execute_code_is_refused(tmp_path: Path, name: str, layout: str) -> None:
    file, marker = tmp_path / "w.pth", tmp_path / "executed"
    content = {"a": torch.ones(2), "b": attacks(marker)[name]}
    if layout == "pickle":
        file.write_bytes(pickle.dumps(attacks(marker)[name]))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=layout == "zip")
    with pytest.raises(UserError, match=rf"wants to execute code.*\({name}\).*only tensors are read") as refusal:
        read_weights(str(file))
    assert not marker.exists() and str(file) in str(refusal.value)


def test_bound_methods_beside_the_weights_are_passed_over(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(2)}, "hook": Calls(builtins.getattr, "", "join")}, tmp_path / "w.pth")
    assert read_weights(str(tmp_path / "w.pth"))["a"].tolist() == [1, 1]


def test_a_whole_module_is_refused_by_name(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 3), tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"torch\.nn\.modules\.linear\.Linear.*state_dict"):
        read_weights(str(tmp_path / "w.pth"))


def test_numbers_written_on_a_big_endian_machine_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "little.pth")
    with zipfile.ZipFile(tmp_path / "little.pth") as little, zipfile.ZipFile(tmp_path / "big.pth", "w") as big:
        for name in little.namelist():
            big.writestr(name, b"big" if name.endswith("byteorder") else little.read(name))
    torch.save({"a": torch.ones(2)}, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    legacy = (tmp_path / "legacy.pth").read_bytes()
    # The system's description comes third; NEWTRUE is its only byte of that kind.
    place = legacy.index(b"little_endian")
    place = legacy.index(b"\x88", place)
    (tmp_path / "legacy.pth").write_bytes(legacy[:place] + b"\x89" + legacy[place + 1 :])
    for file in ("big.pth", "legacy.pth"):
        with pytest.raises(UserError, match="big-endian"):
            read_weights(str(tmp_path / file))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([torch.ones(2)], "holds no state dict"),
        ({"lr": 0.1}, "holds no state dict"),
        (torch.ones(3), "holds no state dict"),
    ],
)
def test_a_file_that_is_no_state_dict_is_refused(tmp_path: Path, content, expected: str) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match=expected):
        read_weights(str(tmp_path / "w.pth"))


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("not weights")
    (tmp_path / "nothing.pth").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    for file, expected in (
        ("text.pth", "is not a weights file"),
        ("nothing.pth", "is not a weights file"),
        ("other.zip", "cannot be read as a file of torch.save"),
        ("none.pth", "no weights file"),
    ):
        with pytest.raises(UserError, match=expected):
            read_weights(str(tmp_path / file))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_damaged_file_is_refused(tmp_path: Path, zipped: bool) -> None:
    torch.save({"a": torch.ones(2000)}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / "w.pth").read_bytes()
    (tmp_path / "w.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"w\.pth"):
        read_weights(str(tmp_path / "w.pth"))


def test_a_tensor_beyond_its_storage_is_refused(tmp_path: Path) -> None:
    """torch itself would read other memory."""

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return ("storage", torch.FloatStorage, "0", "cpu", 4) if isinstance(obj, Storage) else None

    beyond, repeated = "does not fit its storage", r"repeats its 4 numbers .* save its \.clone"
    for arguments, expected in (
        ((0, (5,), (1,)), beyond),
        ((2, (3,), (1,)), beyond),
        ((0, (2,), (-1,)), beyond),
        ((0, (1000, 1000), (0, 0)), repeated),
    ):
        with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
            with archive.open("w/data.pkl", "w") as stream:
                tensor = Calls(torch._utils._rebuild_tensor_v2, Storage(), *arguments, False, None)
                Pickler(stream, protocol=2).dump({"a": tensor})
            archive.writestr("w/data/0", bytes(16))
        with pytest.raises(UserError, match=expected):
            read_weights(str(tmp_path / "w.pth"))

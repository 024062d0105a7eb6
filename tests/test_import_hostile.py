"""Weights files that are damaged, or made to take memory, time or other files: one message each, and little memory."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

h5py = pytest.importorskip("h5py", reason="h5py is not installed: it writes the files that are read here")
torch = pytest.importorskip("torch", reason="torch is not installed: it writes the files that are read here")

from fdjax.errors import UserError  # noqa: E402
from fdjax.importers import keras_file, read_weights  # noqa: E402


def archive_of(file: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file


def keras_weights(file: Path, **data_set) -> Path:
    """One layer of the name "layer" whose kernel is made by h5py from these arguments."""
    with h5py.File(file, "w") as root:
        root.attrs["layer_names"] = [b"layer"]
        group = root.create_group("layer")
        group.attrs["weight_names"] = [b"kernel:0"]
        if data_set:
            group.create_dataset("kernel:0", **data_set)
    return file


def torch_bytes(**tensors: torch.Tensor) -> bytes:
    stream = io.BytesIO()
    torch.save(tensors or {"a": torch.ones(50), "b": torch.zeros(3, 4)}, stream)
    return stream.getvalue()


# What takes memory


def greedy_pickle(folder: Path) -> Path:
    """Nine bytes; Python's unpickler makes room for 268 million memorised objects."""
    (folder / "w.pth").write_bytes(b"\x80\x02Nr\x00\x00\x00\x10.")
    return folder / "w.pth"


def greedy_pickle_in_an_archive(folder: Path) -> Path:
    return archive_of(folder / "w.pth", {"w/data.pkl": b"\x80\x02Nr\x00\x00\x00\x10.", "w/version": b"3"})


def bomb(folder: Path) -> Path:
    members = {"w/data.pkl": pickle.dumps({}), "w/data/0": bytes(1 << 28)}
    return archive_of(folder / "w.pth", members, zipfile.ZIP_DEFLATED)


def keras_bomb(folder: Path) -> Path:
    members = {"model.weights.h5": b"\x89HDF\r\n\x1a\n" + bytes(1 << 28)}
    return archive_of(folder / "w.keras", members, zipfile.ZIP_DEFLATED)


def unwritten_data_set(folder: Path) -> Path:
    """Numbers that were never written are no part of the file, and are made when they are read."""
    return keras_weights(folder / "w.h5", shape=(30_000, 30_000), dtype="f4", chunks=(1000, 1000))


def compressed_data_set(folder: Path) -> Path:
    data = np.zeros((16_384, 8192), np.float32)
    return keras_weights(folder / "w.h5", data=data, compression="gzip", chunks=(2048, 2048))


def long_text(folder: Path) -> Path:
    """A text that says that it has 4 GB."""
    (folder / "w.pth").write_bytes(b"\x80\x04\x8d" + struct.pack("<Q", 1 << 32) + b"ab.")
    return folder / "w.pth"


def long_bytearray(folder: Path) -> Path:
    (folder / "w.pth").write_bytes(b"\x80\x05\x96" + struct.pack("<Q", 1 << 32) + b"ab.")
    return folder / "w.pth"


def many_operations(folder: Path) -> Path:
    content = b"\x80\x02" + 4_000_000 * b"N" + b"."
    return archive_of(folder / "w.pth", {"w/data.pkl": content})


def huge_storage(folder: Path) -> Path:
    """A storage that says that it has 4 billion numbers, and has none."""
    content = torch_bytes(a=torch.ones(4)).replace(b"K\x04tq", b"\x8a\x05\x00\x00\x00\x00\x01tq")
    (folder / "w.pth").write_bytes(content)
    return folder / "w.pth"


GREEDY = (
    greedy_pickle,
    greedy_pickle_in_an_archive,
    bomb,
    keras_bomb,
    unwritten_data_set,
    compressed_data_set,
    long_text,
    long_bytearray,
    many_operations,
    huge_storage,
)
MEASURED = """
import resource, sys
from pathlib import Path
from fdjax.errors import UserError
from fdjax.importers import read_weights

def peak():
    # getrusage counts what a process had before it became this one: the peak of the process that started it.
    own = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(own.split()[1]), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss

start = peak()[0]
for path in sys.argv[1:]:
    try:
        read_weights(path)
    except UserError as error:
        print("refused:", repr(str(error)))
    print(*((kilobytes - start) / 1024 for kilobytes in peak()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted in other units elsewhere")
def test_files_that_ask_for_memory_are_refused_without_it(tmp_path: Path) -> None:
    files = []
    for make in GREEDY:
        folder = tmp_path / make.__name__
        folder.mkdir()
        files.append(str(make(folder)))
        assert Path(files[-1]).stat().st_size < 11e6
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *files], capture_output=True, text=True, check=True, env={**os.environ}
    )
    lines = done.stdout.splitlines()
    assert [line.startswith("refused: ") for line in lines] == [True, False] * len(GREEDY), lines
    assert all("\\n" not in line for line in lines)
    for file, said, figures in zip(files, lines[::2], lines[1::2], strict=True):
        assert file in said
        own, child = map(float, figures.split())
        assert own < 150 and child < 150, f"{file}: {own:.0f} MB more, {child:.0f} MB more in the reader of its own"


def test_tensors_that_share_a_storage_take_its_memory_once(tmp_path: Path) -> None:
    base = torch.arange(1000.0)
    torch.save({str(number): base for number in range(100)}, tmp_path / "w.pth")
    found = read_weights(str(tmp_path / "w.pth"))
    assert len(found) == 100 and all(np.shares_memory(found["0"], array) for array in found.values())


# What lies elsewhere


def external_link(folder: Path) -> None:
    keras_weights(folder / "secret.h5", data=np.ones((2, 2), np.float32))
    with h5py.File(keras_weights(folder / "w.h5"), "a") as root:
        root["layer/kernel:0"] = h5py.ExternalLink(str(folder / "secret.h5"), "layer/kernel:0")


def external_link_to_a_layer(folder: Path) -> None:
    keras_weights(folder / "secret.h5", data=np.ones((2, 2), np.float32))
    with h5py.File(folder / "w.h5", "w") as root:
        root.attrs["layer_names"] = [b"layer"]
        root["layer"] = h5py.ExternalLink(str(folder / "secret.h5"), "layer")


def external_link_to_all(folder: Path) -> None:
    keras_weights(folder / "secret.h5", data=np.ones((2, 2), np.float32))
    with h5py.File(folder / "w.h5", "w") as root:
        root["model_weights"] = h5py.ExternalLink(str(folder / "secret.h5"), "/")


def soft_link(folder: Path) -> None:
    with h5py.File(keras_weights(folder / "w.h5"), "a") as root:
        root["layer/kernel:0"] = h5py.SoftLink("/layer")


def external_storage(folder: Path) -> None:
    (folder / "secret").write_bytes(bytes(range(64)))
    keras_weights(folder / "w.h5", shape=(4, 4), dtype="f4", external=[(str(folder / "secret"), 0, 64)])


def virtual_data_set(folder: Path) -> None:
    keras_weights(folder / "secret.h5", data=np.ones((2, 2), np.float32))
    layout = h5py.VirtualLayout((2, 2), "f4")
    layout[:] = h5py.VirtualSource(str(folder / "secret.h5"), "layer/kernel:0", (2, 2))
    with h5py.File(keras_weights(folder / "w.h5"), "a") as root:
        root["layer"].create_virtual_dataset("kernel:0", layout)


def numbered_external_link(folder: Path) -> None:
    with h5py.File(folder / "secret.h5", "w") as root:
        root["0"] = np.ones((2, 2), np.float32)
    with h5py.File(folder / "w.h5", "w") as root:
        variables = root.create_group("layers/dense/vars")
        variables.attrs["name"] = "layer"
        variables["0"] = h5py.ExternalLink(str(folder / "secret.h5"), "0")


ELSEWHERE = {
    external_link: "links are not followed",
    external_link_to_a_layer: "links are not followed",
    external_link_to_all: "links are not followed",
    soft_link: "links are not followed",
    numbered_external_link: "links are not followed",
    external_storage: "other files are not read",
    virtual_data_set: "other files are not read",
}


@pytest.mark.parametrize("make", ELSEWHERE, ids=lambda make: make.__name__)
def test_keras_files_read_no_other_files(make, tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(UserError, match=ELSEWHERE[make]):
        read_weights(str(tmp_path / "w.h5"))


# What takes for ever


def test_a_keras_file_on_which_the_library_never_ends_is_refused(tmp_path: Path, monkeypatch) -> None:
    """The list of free places in a heap of names leads back to itself: the library follows it, and takes memory."""
    file = keras_weights(tmp_path / "w.h5", data=np.ones((2, 2), np.float32))
    content = bytearray(file.read_bytes())
    heap = content.index(b"HEAP")
    free, place = struct.unpack("<QQ", content[heap + 16 : heap + 32])
    content[place + free : place + free + 8] = struct.pack("<Q", free)
    file.write_bytes(content)
    monkeypatch.setattr(keras_file, "_SECONDS", 10.0)
    with pytest.raises(UserError, match=r"cannot be read as Keras weights: .*(seconds|memory)"):
        read_weights(str(file))


def test_the_reader_of_keras_files_is_stopped_by_a_clock(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "reader.py").write_text("while True:\n    pass\n")
    monkeypatch.setattr(keras_file, "_WORKER", tmp_path / "reader.py")
    monkeypatch.setattr(keras_file, "_SECONDS", 1.0)
    with pytest.raises(UserError, match="took more than 1 seconds, so it is probably damaged"):
        read_weights(str(keras_weights(tmp_path / "w.h5", data=np.ones((2, 2), np.float32))))


# Damage


def test_a_deep_pickle_is_no_recursion(tmp_path: Path) -> None:
    deep = b"\x80\x02" + 200_000 * b"]" + 199_999 * b"a" + b"."
    archive_of(tmp_path / "w.pth", {"w/data.pkl": deep})
    with pytest.raises(UserError, match="holds no state dict"):
        read_weights(str(tmp_path / "w.pth"))


def test_a_key_that_takes_for_ever_to_hash_is_passed_over(tmp_path: Path) -> None:
    """A tuple of twice the tuple of twice the tuple ..., as the key of a dictionary."""
    nested = b"\x80\x02})" + 60 * b"2\x86" + b"K\x01s."
    archive_of(tmp_path / "w.pth", {"w/data.pkl": nested})
    with pytest.raises(UserError, match="holds no state dict"):
        read_weights(str(tmp_path / "w.pth"))


def test_an_archive_with_a_damaged_directory_is_refused(tmp_path: Path) -> None:
    whole = torch_bytes()
    (tmp_path / "w.pth").write_bytes(whole.replace(b"PK\x01\x02", b"PK\x01\x07", 1))
    with pytest.raises(UserError, match=r"w\.pth"):
        read_weights(str(tmp_path / "w.pth"))


def test_flipped_numbers_are_seen_by_the_archives_checksum(tmp_path: Path) -> None:
    whole = torch_bytes(a=torch.full((50,), 1.5))
    place = whole.index(struct.pack("<f", 1.5) * 3)
    (tmp_path / "w.pth").write_bytes(whole[:place] + b"\x01" + whole[place + 1 :])
    with pytest.raises(UserError, match=r"w\.pth.*CRC"):
        read_weights(str(tmp_path / "w.pth"))


def legacy_bytes() -> bytes:
    stream = io.BytesIO()
    torch.save({"a": torch.ones(50), "b": torch.zeros(3, 4)}, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def plain_pickle_bytes() -> bytes:
    return pickle.dumps({"a": list(range(20)), "b": {"c": ("text", 1.5, None)}}, protocol=4)


WHOLE = {"zip": torch_bytes, "legacy": legacy_bytes, "pickle": plain_pickle_bytes}


@settings(max_examples=150)
@given(
    kind=st.sampled_from(sorted(WHOLE)),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
    kept=st.one_of(st.just(1.0), st.floats(0, 1)),
)
def test_whatever_is_damaged_there_is_an_answer_or_one_message(tmp_path_factory, kind, changes, kept) -> None:
    content = bytearray(WHOLE[kind]())
    for place, value in changes:
        content[int(place * len(content))] = value
    file = tmp_path_factory.mktemp("damaged") / "w.pth"
    file.write_bytes(content[: round(kept * len(content))])
    try:
        found = read_weights(str(file))
    except UserError as error:
        assert "w.pth" in str(error) and len(str(error)) < 2000
    else:
        assert all(isinstance(array, np.ndarray) for array in found.values())


@pytest.mark.slow
def test_damaged_keras_files_give_an_answer_or_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras_file, "_SECONDS", 5.0)
    whole = keras_weights(tmp_path / "whole.h5", data=np.ones((2, 2), np.float32)).read_bytes()
    chance = random.Random(0)
    for _ in range(60):
        content = bytearray(whole)
        for _ in range(chance.randint(1, 6)):
            content[chance.randrange(len(content))] = chance.randrange(256)
        (tmp_path / "w.h5").write_bytes(content)
        try:
            found = read_weights(str(tmp_path / "w.h5"))
        except UserError as error:
            assert "w.h5" in str(error) and len(str(error).splitlines()) == 1
        else:
            assert set(found) <= {"layer/kernel"} or len(found) == 1


# What is made to mislead


def tensor_record(key: str, kind: str, size: int) -> bytes:
    """The pickle of a vector of `size` numbers of a storage that says it has as many."""

    def text(word: str) -> bytes:
        return b"X" + struct.pack("<I", len(word)) + word.encode()

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    storage = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + number(size) + b"tQ"
    shape = b"(" + number(size) + b"t(" + number(1) + b"t"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(0) + shape + b"\x89}tR"


@pytest.mark.parametrize(("kind", "size"), [("FloatStorage", 64), ("FloatStorage", 400_000_000), ("DoubleStorage", 4)])
def test_records_of_one_storage_that_differ_are_refused(tmp_path: Path, kind: str, size: int) -> None:
    """Numbers beyond the storage would be read from other memory, or end Python."""
    tensors = (("a", "FloatStorage", 4), ("b", kind, size))
    names = [b"X" + struct.pack("<I", 1) + name.encode() + tensor_record("0", *of) for name, *of in tensors]
    pickled = b"\x80\x02}(" + b"".join(names) + b"u."
    numbers = np.arange(4, dtype=np.float32).tobytes()
    file = archive_of(tmp_path / "w.pth", {"w/data.pkl": pickled, "w/data/0": numbers, "w/version": b"3\n"})
    with pytest.raises(UserError, match="storage 0 has 16 bytes and should have"):
        read_weights(str(file))


def test_a_mapping_within_itself_is_looked_into_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fdjax.importers import state_dicts

    looks, tensors_of = [], state_dicts._tensors

    def counted(content, tensor, at):
        looks.append(at)
        assert len(looks) < 100  # Without end it would be looked into millions of times.
        return tensors_of(content, tensor, at)

    monkeypatch.setattr(state_dicts, "_tensors", counted)
    looped: dict[str, object] = {}
    looped.update(dict.fromkeys((*state_dicts._WEIGHTS, *state_dicts._AVERAGED), looped))
    with pytest.raises(UserError, match="holds no state dict"):
        read_weights(str(archive_of(tmp_path / "w.pth", {"w/data.pkl": pickle.dumps(looped), "w/version": b"3\n"})))
    assert looks

"""Labels of every type: right, or one message."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdjax.data.labels import class_numbers
from fdjax.data.prepare import prepare
from fdjax.errors import UserError
from tests.original_layouts import write_cifar100

TYPES = [
    "bool",
    "int8",
    "uint8",
    "int16",
    "uint16",
    "int32",
    "uint32",
    "int64",
    "uint64",
    "float16",
    "float32",
    "float64",
]


@given(st.lists(st.integers(0, 100), max_size=20), st.sampled_from(TYPES), st.booleans())
def test_whole_numbers_of_every_type_are_themselves(values: list[int], dtype: str, as_list: bool) -> None:
    array = np.array(values, dtype)
    found = class_numbers(array.tolist() if as_list else array, "here")
    assert found.dtype == np.int64 and found.tolist() == [int(value) for value in array]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([0, 1.5], "1.5"),
        ([0.0, float("nan")], "nan"),
        ([float("inf")], "inf"),
        ([1e300], "1e+300"),
        (["0", "1"], "'0'"),
        ([b"cat"], "b'cat'"),
        ([1 + 0j], "(1+0j)"),
        ([None], "None"),
        ([[0, 1], [1]], "None"),
        ([[0], [1]], "0"),
        (np.array([2**64 - 1], np.uint64), "18446744073709551615"),
        (np.array(["2020-01-01"], "datetime64[D]"), "2020"),
    ],
)
def test_others_are_one_message(values: Any, said: str) -> None:
    with pytest.raises(UserError) as caught:
        class_numbers(values, "file.npz, split 'train',")
    message = str(caught.value)
    assert message.startswith("file.npz, split 'train', has the label") and said in message.replace(
        "datetime.date(", ""
    )
    assert "numbers of the classes" in message and "\n" not in message


@pytest.mark.parametrize(
    ("labels", "right"),
    [(float, True), (lambda n: n + 0.5, False), (str, False), (lambda n: b"%d" % n, False)],
)
def test_a_pickle_of_cifar_with_labels_of_another_type(labels, right: bool, tmp_path: Path) -> None:
    source = write_cifar100(tmp_path / "source", binary=False)
    for split in ("train", "test"):
        batch = pickle.loads((source / split).read_bytes())
        batch["fine_labels"] = [labels(label) for label in batch["fine_labels"]]
        (source / split).write_bytes(pickle.dumps(batch))
    if right:
        folder, _ = prepare("cifar100", str(source), str(tmp_path / "out"), unpublished=True)
        assert (folder / "dataset_info.json").exists()
    else:
        with pytest.raises(UserError, match="'fine_labels', has the label"):
            prepare("cifar100", str(source), str(tmp_path / "out"), unpublished=True)

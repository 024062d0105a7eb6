"""StableHLO of a frozen network: written, read back, and run with any batch size."""

from __future__ import annotations

import errno
import os

import jax.export
import numpy as np
import pytest

from fdjax.commands.main import fdjax_command
from fdjax.errors import UserError
from fdjax.frozen import save
from fdjax.frozen.export import PLATFORMS, export, read_stablehlo
from tests.frozen_networks import frozen_logits, frozen_of, random_counts, random_variables, raw_images, relative_error
from tests.test_frozen import MEANS, TIED, UNTIED, make


@pytest.mark.parametrize(("fields", "levels"), [(TIED, MEANS), (UNTIED, (2,))])
def test_stablehlo_reloads_and_agrees(tmp_path, fields, levels) -> None:
    network, graph = make(**fields)
    frozen = frozen_of(graph, random_variables(network, graph, 0), random_counts(graph, 1, levels))
    file = tmp_path / "network.stablehlo"
    export(frozen, file)
    assert set(jax.export.deserialize(bytearray(file.read_bytes())).platforms) == set(PLATFORMS)
    read, images = read_stablehlo(file), raw_images(graph, 2, 0)
    expected = frozen_logits(frozen, images)
    assert relative_error(np.asarray(read(images)), expected) < 1e-4 / 4
    assert relative_error(np.asarray(read(images[:1])), expected[:1]) < 1e-4 / 4


def test_the_command_reads_the_artifact_only(tmp_path, capsys) -> None:
    network, graph = make(**TIED)
    frozen = frozen_of(graph, random_variables(network, graph, 0), graph.full_counts())
    save(tmp_path / "frozen", graph, frozen, {})
    out = tmp_path / "network.stablehlo"
    assert fdjax_command(["export", "--frozen", str(tmp_path / "frozen"), "--out", str(out)]) == 0
    images = raw_images(graph, 1, 0)
    assert relative_error(np.asarray(read_stablehlo(out)(images)), frozen_logits(frozen, images)) < 1e-4 / 4
    for name, expected in (("network.tflite", ".stablehlo or .onnx"), ("none/network.onnx", "directory that exists")):
        with pytest.raises(SystemExit) as stop:
            fdjax_command(["export", "--frozen", str(tmp_path / "frozen"), "--out", str(tmp_path / name)])
        assert stop.value.code == 2 and expected in capsys.readouterr().err
    (tmp_path / "other.stablehlo").write_bytes(b"no network")
    with pytest.raises(UserError, match="no network that fdjax export wrote"):
        read_stablehlo(tmp_path / "other.stablehlo")


def test_an_export_that_fails_leaves_the_file_that_was_there(tmp_path, monkeypatch) -> None:
    network, graph = make(**TIED)
    frozen = frozen_of(graph, random_variables(network, graph, 0), graph.full_counts())
    file = tmp_path / "network.stablehlo"
    file.write_bytes(b"before")

    def full(*_) -> bytearray:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("fdjax.frozen.export.to_stablehlo", full)
    with pytest.raises(UserError, match=r"network\.stablehlo cannot be written: No space left on device"):
        export(frozen, file)
    assert file.read_bytes() == b"before" and list(tmp_path.iterdir()) == [file]

"""Data parallelism: however many devices share a batch, the state moves as on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from fdjax.errors import UserError
from fdjax.training.devices import Devices

ROOT = Path(__file__).parents[1]
KINDS = ("weights", "masks")
COUNTS = (2, 4, 8)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    """What `data_parallel_worker` found on eight fake devices."""
    out = tmp_path_factory.mktemp("devices") / "report.json"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "NPROC": "16",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    result = subprocess.run(
        [sys.executable, "-m", "tests.data_parallel_worker", str(out)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads(out.read_text())
    assert found["devices"] == 8
    return found


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_on_several_devices_is_that_of_one(report, kind, count):
    # The optimizers' states are the gradients here.
    assert all(distance < 1e-5 for distance in report["float32"][f"{kind} {count}"].values())


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", KINDS)
def test_three_steps_in_double_precision_are_those_of_one(report, kind, count):
    assert all(distance < 1e-9 for distance in report["float64"][f"{kind} {count}"].values())


def test_each_step_moves_its_own_collection(report):
    assert report["moves"] == {
        "weights": {"params": True, "batch_stats": True, "fcmask": False, "weight_opt": True, "mask_opt": False},
        "masks": {"params": False, "batch_stats": False, "fcmask": True, "weight_opt": False, "mask_opt": True},
    }


def test_the_state_stays_on_every_device(report):
    assert report["replicated"]


def test_examples_from_the_host_give_the_state_that_resident_ones_give(report):
    assert report["host_fed_bit_equal"] == dict.fromkeys(KINDS, True)


@pytest.mark.parametrize("kind", KINDS)
def test_several_steps_in_one_dispatch_are_as_many_single_ones(report, kind):
    assert all(distance < 1e-6 for distance in report["dispatch"][kind].values())


def test_a_step_takes_nothing_from_the_hosts_arrays(report):
    assert report["host_state_untouched"]


def test_a_count_that_the_process_has_not_is_refused():
    available = jax.local_device_count()
    assert len(Devices()) == available
    assert len(Devices(local=1)) == 1
    for count in (0, -1, available + 1):
        with pytest.raises(UserError, match=rf"--devices {count}: this process has {available}; give 1 to {available}"):
            Devices(local=count)


class _Several(Devices):
    """Says that it is three, whatever there is."""

    def __len__(self) -> int:
        return 3


@pytest.mark.parametrize(("batch", "near"), [(16, "15 or 18"), (2, "3"), (100, "99 or 102")])
def test_a_batch_that_cannot_be_split_evenly_is_refused(batch, near):
    devices = _Several(local=1)
    devices.check_batch(15)
    with pytest.raises(UserError) as refused:
        devices.check_batch(batch)
    message = str(refused.value)
    assert f"data.batch_size is {batch}," in message
    assert "over 3 devices" in message
    assert f"such as {near}, or" in message


def test_bfloat16_needs_devices_that_compute_in_it():
    devices = Devices(local=1)
    devices.check_precision("float32")
    if devices.platform != "cpu":
        pytest.skip("the refusal is about CPUs")
    with pytest.raises(UserError, match=r"model\.precision bfloat16 is not supported on cpu .* give float32"):
        devices.check_precision("bfloat16")


@pytest.mark.parametrize(("capability", "supported"), [("7.5", False), ("8.0", True), ("9.0", True)])
def test_old_gpus_are_refused_bfloat16(capability, supported):
    class Gpu:
        compute_capability, device_kind = capability, "a GPU"

    devices = Devices(local=1)
    devices.platform, devices._devices = "gpu", [Gpu()]  # type: ignore[list-item]
    if supported:
        devices.check_precision("bfloat16")
        return
    with pytest.raises(UserError, match=f"compute capability {capability}"):
        devices.check_precision("bfloat16")


def test_what_is_placed_is_read_back_and_what_is_in_place_is_not_moved():
    devices = Devices()
    tree = {"a": np.arange(6.0, dtype=np.float32).reshape(2, 3), "b": [np.int32(7)]}
    placed = devices.replicate(tree)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(placed))
    assert all(a is b for a, b in zip(jax.tree.leaves(devices.replicate(placed)), jax.tree.leaves(placed), strict=True))
    np.testing.assert_array_equal(placed["a"], tree["a"])
    rows = np.array([1, 0])
    if len(devices) == 1:
        np.testing.assert_array_equal(devices.split(tree["a"], axis=1), tree["a"])
        np.testing.assert_array_equal(devices.split_rows(tree["a"], rows), tree["a"][rows])

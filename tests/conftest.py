"""What all tests share: the environment (before jax is imported), the hypothesis profile, optional data."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

# Several fake CPU devices abort on jax 0.10.2 when the machine has few cores, unless NPROC says that it has many.
os.environ.setdefault("NPROC", "16")
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fdjax" / "tests"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import hypothesis  # noqa: E402
import pytest  # noqa: E402

hypothesis.settings.register_profile(
    "fdjax",
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("fdjax")


@pytest.fixture
def test_data() -> Path:
    """The folder of optional data; tests that need it are skipped where it is missing."""
    folder = os.environ.get("FDJAX_TEST_DATA")
    if not folder:
        pytest.skip("FDJAX_TEST_DATA is not set: optional data is missing")
    if not Path(folder).is_dir():
        pytest.skip(f"FDJAX_TEST_DATA names {folder}, which is no folder")
    return Path(folder)


@pytest.fixture
def few_test_images(monkeypatch: pytest.MonkeyPatch) -> int:
    """Runs in this process evaluate on one batch of the test set, whose program is the one for all; how many images."""
    from fdjax.training import opening
    from fdjax.training.evaluate import EVAL_BATCH

    open_data = opening.open_data

    def open_few(*arguments, **options):
        dataset = open_data(*arguments, **options)
        if len(dataset.test_labels) <= EVAL_BATCH:
            return dataset
        few = {"test_images": dataset.test_images[:EVAL_BATCH], "test_labels": dataset.test_labels[:EVAL_BATCH]}
        return dataclasses.replace(dataset, **few)

    monkeypatch.setattr(opening, "open_data", open_few)
    return EVAL_BATCH


@pytest.fixture
def quick_runs(monkeypatch: pytest.MonkeyPatch, few_test_images: int) -> Iterator[int]:
    """For tests that look at what goes into a run and comes out: no optimisation of its programs, few test images (how
    many is what it gives), and no plots."""
    import jax

    monkeypatch.setattr("fdjax.training.measure.plot_run", lambda *arguments, **options: [])
    jax.config.update("jax_disable_most_optimizations", True)
    yield few_test_images
    jax.config.update("jax_disable_most_optimizations", False)

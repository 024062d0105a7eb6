"""Weights saved by Keras: whole models (`.h5`, `.keras`) and weights alone (`.h5`, `.weights.h5`), all in HDF5."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from fdjax.errors import UserError
from fdjax.importers.archives import check_archive, most_bytes

KERAS_ARCHIVE_MEMBER = "model.weights.h5"
# A damaged file can keep the HDF5 library busy forever; a sound file of 100 MB takes a second.
_SECONDS, _BYTES_A_SECOND = 20.0, 5e6
_WORKER = Path(__file__).with_name("keras_worker.py")


def read_keras(file: Path, zipped: bool = False) -> dict[str, np.ndarray]:
    """Reads the weights of a Keras model, by layer.

    Args:
      file: an HDF5 file, as `model.save` and `model.save_weights` of Keras 2 and 3 write it.
      zipped: whether the file is an archive (`.keras`) that holds the HDF5 file.

    Returns:
      "LAYER/kernel", "LAYER/bias", "LAYER/gamma", ... -> array; the kernel of a depthwise layer is also named "kernel".

    Raises:
      UserError: h5py is not installed; or the file is damaged, does not name its layers, refers to other files, holds
        far more than its size, or takes longer than any sound file of its size.
    """
    if importlib.util.find_spec("h5py") is None:
        raise UserError(f"{file} is an HDF5 file: pip install h5py, then give the command again")
    with tempfile.TemporaryDirectory() as folder:
        source = file
        if zipped:
            source = Path(folder) / KERAS_ARCHIVE_MEMBER
            with zipfile.ZipFile(file) as archive:
                check_archive(archive, file)
                with archive.open(KERAS_ARCHIVE_MEMBER) as member, source.open("wb") as unpacked:
                    shutil.copyfileobj(member, unpacked)
        return _read_apart(file, source, Path(folder) / "weights.npz")


def _read_apart(file: Path, source: Path, out: Path) -> dict[str, np.ndarray]:
    """Reads `source` in a separate process; messages call it `file`."""
    size = source.stat().st_size
    seconds = _SECONDS + size / _BYTES_A_SECOND
    command = [sys.executable, "-P", str(_WORKER), str(source), str(out), str(most_bytes(size))]
    # The threads of an unused BLAS would count towards the memory limit.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OPENBLAS_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=seconds, env=environment, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"{file} cannot be read as Keras weights: it took more than {seconds:.0f} seconds, so it is probably "
            "damaged; save the weights again"
        ) from error
    if done.returncode:
        last = (done.stdout if done.returncode == 3 else done.stderr).strip().splitlines()[-1:]
        reason = last[0] if last else f"the HDF5 library stopped with status {done.returncode}"
        raise UserError(f"{file} cannot be read as Keras weights: {reason}")
    names = [name.encode().decode("unicode_escape") for name in done.stdout.splitlines()]
    with np.load(out, allow_pickle=False) as arrays:
        return {name: arrays[str(number)] for number, name in enumerate(names)}

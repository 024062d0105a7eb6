"""Quantizes a dense and a pruned network by ONNX Runtime, and measures all files: accuracy, size, time.

    taskset -c 0 python results/int8/measure.py --runs runs/time --data DIR --work FOLDER

The two networks are finished runs in --runs (--names); DIR is their data. The ONNX files stay in --work. The figures go
into narrow.json here, or --json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(1, str(HERE.parents[1]))

import numpy as np  # noqa: E402

from fdjax import runtime  # noqa: E402

# Without VNNI, sums of two products of 8 bits can overflow 16 bits; with weights of 7 bits they cannot.
KINDS = ("float32", "int8", "int8_7_bits", "int8_signed")


def write_float(run: Path, images: int, data: str, file: Path) -> tuple[Any, np.ndarray]:
    """Writes a run's network as ONNX; returns its data set, and images of the training set for calibration."""
    from fdjax.checkpoints.calibrate import training_sample
    from fdjax.frozen.assemble import freeze
    from fdjax.frozen.choice import Stopwatch
    from fdjax.frozen.onnx_model import facts_for_onnx, write_onnx
    from fdjax.training.network import graph_variables
    from fdjax.training.restore import load_restored_data, open_checkpoint

    restored = open_checkpoint(str(run))[2]
    graph = restored.graph
    counts = graph.full_counts() if restored.hard is None else restored.hard.counts
    variables = graph_variables(graph, restored.state.params, restored.state.batch_stats)
    choose = Stopwatch(1, runtime.times_cache_dir(), "onnxruntime").choose
    frozen = freeze(graph, variables, counts, choose)
    write_onnx(frozen.program, frozen.arrays, file, facts_for_onnx(graph))
    dataset = load_restored_data(restored, data)
    return dataset, training_sample(restored.config, dataset, images)[0]


def quantize(model: Path, images: np.ndarray, file: Path, kind: str) -> None:
    """Quantizes a file statically: QDQ, int8 weights for each channel, activations of 8 bits calibrated on images.

    Signed activations are ONNX Runtime's default; with unsigned ones it fuses all layers.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        """Yields the images one by one."""

        def __init__(self) -> None:
            self.left = iter(images)

        def get_next(self) -> Any:
            image = next(self.left, None)
            return None if image is None else {"images": image[None].astype(np.float32)}

    prepared = file.with_suffix(".prepared.onnx")
    # Its symbolic inference does not know the Resize of block means; ONNX's own, which follows, does.
    with contextlib.chdir(file.parent):  # It leaves a file with the weights in the current directory.
        quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(file),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QInt8 if kind == "int8_signed" else QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        reduce_range=kind == "int8_7_bits",
    )


def session(file: Path) -> Any:
    """Opens a file in ONNX Runtime, on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def top1(file: Path, images: Any, labels: np.ndarray, batch: int = 250) -> float:
    """Returns the accuracy of a file in ONNX Runtime."""
    opened, right = session(file), 0
    for start in range(0, len(labels), batch):
        given = {"images": np.asarray(images[start : start + batch], np.float32)}
        right += int((opened.run(None, given)[0].argmax(axis=-1) == labels[start : start + batch]).sum())
    return right / len(labels)


def times(files: dict[str, Path], batch: int, rounds: int, repeats: int) -> dict[str, list[float]]:
    """Returns the milliseconds of each file: processor time, all files in turn, a median for each repetition."""
    from fdjax.frozen.clock import interleaved

    opened = {name: session(file) for name, file in files.items()}
    size = next(iter(opened.values())).get_inputs()[0].shape[1:]
    image = np.random.default_rng(0).uniform(0, 255, (batch, *size)).astype(np.float32)

    def call(name: str) -> Any:
        return lambda: opened[name].run(None, {"images": image})

    found = [interleaved({name: call(name) for name in files}, rounds) for _ in range(repeats)]
    return {name: [float(np.median(run[name].processor)) for run in found] for name in files}


def main() -> None:
    """Writes, quantizes and measures the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--names", nargs=2, metavar=("DENSE", "PRUNED"), default=("control_s0", "channels_ort07_s0"))
    parser.add_argument("--data", required=True, help="folder of the data set")
    parser.add_argument("--work", type=Path, required=True, help="folder for the ONNX files")
    parser.add_argument("--images", type=int, default=512, help="training images to calibrate on")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, default=HERE / "narrow.json")
    flags = parser.parse_args()
    runtime.limit_threads(1)
    runtime.setup()
    flags.work.mkdir(parents=True, exist_ok=True)
    flags.work = flags.work.resolve()
    files, accuracies = {}, {}
    for name in flags.names:
        of_kind = {kind: flags.work / f"{Path(name).name}_{kind}.onnx" for kind in KINDS}
        dataset, images = write_float(flags.runs / name, flags.images, flags.data, of_kind["float32"])
        for kind in KINDS[1:]:
            quantize(of_kind["float32"], images, of_kind[kind], kind)
        for kind, file in of_kind.items():
            files[f"{name} {kind}"] = file
            accuracies[f"{name} {kind}"] = top1(file, dataset.test_images, np.asarray(dataset.test_labels))
            print(f"{name} {kind}: {accuracies[f'{name} {kind}']:.4f}, {file.stat().st_size:,} bytes", flush=True)
    rows = []
    for batch in (1, 8):
        found = times(files, batch, flags.rounds, flags.repeats)
        first = next(iter(found.values()))
        for key, measured in found.items():
            ratios = sorted(own / dense for own, dense in zip(measured, first, strict=True))
            network, kind = key.split()
            row = {"network": network, "kind": kind, "engine": "onnxruntime", "batch": batch, "top1": accuracies[key]}
            row |= {"bytes": files[key].stat().st_size, "ms": median(measured), "time_ratio": median(ratios)}
            rows.append({**row, "time_ratio_range": [ratios[0], ratios[-1]]})
            print(json.dumps(rows[-1]), flush=True)
    report = {"images": flags.images, "rounds": flags.rounds, "repeats": flags.repeats, "rows": rows}
    flags.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Measures how fast training images are read: decoded, cut to a random part, resized to 224; beside the decoder alone.

    python benchmarks/decode.py [--images DIR] [--json FILE]

Without --images it makes JPEGs of 500 x 375 pixels, whose size in bytes is like ImageNet's. Rates are images per second
of processor time of all threads, that is images per second and core. The forms take turns, and each rate is compared
with the decoder's rate in the same round, so that other work on the machine slows both.
"""

from __future__ import annotations

import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import _contest as contest

from fdjax.commands.output_files import check_json_target, write_report
from fdjax.data import RandomResizedCrop, TrainingOrder, TrainingStream, open_dataset
from fdjax.data.decode import read_pixels
from fdjax.data.prepare import prepare
from fdjax.data.stream import crop_and_resize, cv2, position_uniforms, simplejpeg
from fdjax.errors import reports_user_errors

SIZE, BATCH = 224, 32


def picture(seed: int) -> bytes:
    """Returns a JPEG of 500 x 375 pixels with a spectrum like a photograph's: amplitude falls with frequency."""
    rng = np.random.default_rng(seed)
    rows, columns = np.meshgrid(np.fft.fftfreq(375), np.fft.rfftfreq(500), indexing="ij")
    fall = 1 / np.maximum(np.hypot(rows, columns), 1 / 500)
    planes = [np.fft.irfft2(fall * np.fft.rfft2(rng.standard_normal((375, 500))), (375, 500)) for _ in range(3)]
    # Mostly grey, as photographs are.
    pixels = np.stack([planes[0] + 0.3 * plane for plane in planes], axis=-1)
    pixels = 128 + 50 * pixels / pixels.std()
    stream = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(stream, "JPEG", quality=96)
    return stream.getvalue()


def make_images(folder: Path, count: int) -> None:
    """Makes a folder of two classes."""
    for split, number in (("train", count), ("test", 2)):
        for n in range(number):
            file = folder / split / ("ant", "bee")[n % 2] / f"{n:04}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(picture(n))


def forms(folder: Path, work: Path, threads: int) -> tuple[dict[str, Callable[[], int]], float]:
    """Returns what is measured, as functions that process images and return their number; and the bytes of an image."""
    files = sorted((folder / "train").glob("*/*"))[:256]
    encoded = [file.read_bytes() for file in files]
    crop = RandomResizedCrop()
    uniforms = [position_uniforms(0, n, 40).reshape(10, 4) for n in range(len(encoded))]

    def each(call: Callable[[int], object]) -> Callable[[], int]:
        def run() -> int:
            for n in range(len(encoded)):
                call(n)
            return len(encoded)

        return run

    def pillow(n: int) -> None:
        Image.open(io.BytesIO(encoded[n])).convert("RGB").load()

    def stream(name: str, path: Path) -> Callable[[], int]:
        dataset = open_dataset(name, str(path), SIZE, stream=True)
        order = TrainingOrder(0, np.arange(len(dataset.train_labels)), BATCH)
        source = TrainingStream(
            dataset.train_images,  # type: ignore[arg-type]
            dataset.train_labels,
            order.rows,
            crop=crop,
            threads=threads,
        )
        steps = max(16, len(encoded) // BATCH)  # Enough for the time of making the pipeline not to matter.

        def run() -> int:
            return sum(len(images) for images, _ in source.batches(0, steps))

        return run

    prepare("pictures", str(folder), str(work))
    found = {
        "decoder alone (simplejpeg)" if simplejpeg else "decoder alone (Pillow)": each(
            lambda n: read_pixels(encoded[n], 3, "it")
        ),
        "Pillow alone": each(pillow),
        "decode, random part, resize": each(lambda n: crop_and_resize(encoded[n], crop, uniforms[n], SIZE, 3, "it")),
        "the same through Grain, from a folder": stream("folder", folder),
        "the same through Grain, from a prepared set": stream("pictures", work),
    }
    if cv2 is not None:
        found["OpenCV alone"] = each(lambda n: cv2.imdecode(np.frombuffer(encoded[n], np.uint8), cv2.IMREAD_COLOR))
    return found, statistics.mean(map(len, encoded))


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints."""
    parser = contest.Parser("Measures how fast training images are read, beside the decoder alone.")
    parser.add_argument("--images", type=Path, help="folder with train/<class>/*.jpg and test/<class>/*")
    made = "number of images to make without --images"
    parser.add_argument("--count", type=contest.integer(BATCH), default=96, help=made)
    parser.add_argument("--rounds", type=contest.integer(1), default=7, help="number of rounds")
    parser.add_argument("--threads", type=contest.integer(1), default=1, help="number of Grain's threads")
    parser.add_argument("--json", help="file to write the results to")
    flags = parser.parse_args(arguments)
    check_json_target(flags.json)
    with tempfile.TemporaryDirectory() as work:
        folder = flags.images or Path(work) / "images"
        if flags.images is None:
            make_images(folder, flags.count)
        measured, size = forms(folder, Path(work) / "sets", flags.threads)
        rates: dict[str, list[float]] = {name: [] for name in measured}
        for round_ in range(flags.rounds + 1):
            for name, run in measured.items():
                begin = time.process_time()
                count = run()
                if round_:  # The first round is the warm-up.
                    rates[name].append(count / (time.process_time() - begin))
    ceiling = next(iter(rates.values()))
    rows = [
        {
            "form": name,
            "images_per_core_second": statistics.median(found),
            "of_the_decoder": statistics.median(r / c for r, c in zip(found, ceiling, strict=True)),
        }
        for name, found in rates.items()
    ]
    print(f"JPEGs of {size / 1000:,.0f} kB on average; medians of {flags.rounds} rounds")
    for row in rows:
        print(f"{row['form']:45} {row['images_per_core_second']:8,.0f} /s and core  {row['of_the_decoder']:5.2f}x")
    write_report(flags.json, {"bytes": size, "threads": flags.threads, "rows": rows})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Training batches of a set that stays on disk, read by Grain; their order does not depend on the number of threads."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from fdjax.data.decode import BACKGROUND, orientation_of, read_pixels, sides, to_pixels
from fdjax.data.images import StoredImages

try:
    import cv2
    import simplejpeg
except ImportError:  # Pillow then does all the work.
    cv2 = simplejpeg = None

_TRIES = 10
# The most examples that Grain hands over at once. Handing them over one by one took a fifth of the time.
_CHUNK = 16
# Chunks to prefetch per thread.
_AHEAD = 2
_FULL_RATIO = (3 / 4, 4 / 3)


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop:
    """A random part of an image, resized (Szegedy et al. 2015, arXiv 1409.4842).

    Attributes:
      area: least and largest share of the image's area; uniform between them.
      ratio: least and largest width / height; log-uniform between them.
    """

    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = _FULL_RATIO

    @classmethod
    def asked(cls, random_resized_crop: bool, crop_area: float) -> RandomResizedCrop | None:
        """Returns the crop of the data settings of these names, or None for the middle of each image."""
        if crop_area:
            return cls(area=(crop_area, 1.0))
        return cls() if random_resized_crop else None

    def box(self, uniforms: np.ndarray, height: int, width: int) -> tuple[int, int, int, int]:
        """Draws a part of an image; after ten parts that do not fit, it takes the middle, as torchvision does.

        Args:
          uniforms: float [10, 4] in [0, 1).
          height: height of the image in pixels.
          width: width of the image in pixels.

        Returns:
          (top, left, height, width) of the part, in pixels.
        """
        log_ratio = (math.log(self.ratio[0]), math.log(self.ratio[1]))
        for share, shape, row, column in uniforms.tolist():
            pixels = (self.area[0] + share * (self.area[1] - self.area[0])) * height * width
            ratio = math.exp(log_ratio[0] + shape * (log_ratio[1] - log_ratio[0]))
            wide, high = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
            if 0 < wide <= width and 0 < high <= height:
                return int(row * (height - high + 1)), int(column * (width - wide + 1)), high, wide
        wide, high = min(width, round(height * self.ratio[1])), min(height, round(width / self.ratio[0]))
        return (height - high) // 2, (width - wide) // 2, high, wide


def position_uniforms(seed: int, position: int, count: int) -> np.ndarray:
    """Draws numbers in [0, 1) that depend only on the seed and on an example's position in the run.

    They come from the raw bits of a Philox generator, which NumPy guarantees across versions.

    Args:
      seed: any integer.
      position: position of the example in the run, 0 or more.
      count: how many numbers to draw.

    Returns:
      float64 [count].
    """
    raw = np.random.Philox(key=np.array([seed % 2**64, position], np.uint64)).random_raw(count)
    return (raw >> np.uint64(11)) * 2.0**-53


def crop_and_resize(
    encoded: bytes,
    crop: RandomResizedCrop,
    uniforms: np.ndarray,
    size: int | tuple[int, int],
    channels: int,
    name: str,
    background: str = BACKGROUND,
) -> np.ndarray:
    """Decodes an image, cuts a random part out of it, and resizes the part (bilinear).

    If half the resolution of a JPEG or less suffices, it is decoded at that resolution.

    Args:
      encoded: the encoded image.
      crop: the distribution of the part.
      uniforms: float [10, 4] in [0, 1).
      size: H and W of the result, or one number for both.
      channels: C, 1 or 3.
      name: what a message calls the image.
      background: the colour behind transparent parts.

    Returns:
      uint8 [H, W, C].

    Raises:
      UserError: the image cannot be decoded.
    """
    height, width = sides(size)
    full = _jpeg_size(encoded)
    if full is None:
        pixels = read_pixels(encoded, channels, name, background=background)
        full = pixels.shape[:2]
        top, left, high, wide = crop.box(uniforms, *full)
    else:
        top, left, high, wide = crop.box(uniforms, *full)
        factor = min(high / height, wide / width)
        enough = None
        if factor >= 2:
            enough = (math.ceil(full[0] / factor), math.ceil(full[1] / factor))
        pixels = read_pixels(encoded, channels, name, enough)
        if pixels.shape[:2] != full:
            down, across = pixels.shape[0] / full[0], pixels.shape[1] / full[1]
            top, left = round(top * down), round(left * across)
            high, wide = max(1, round(high * down)), max(1, round(wide * across))
    return _resize(pixels[top : top + high, left : left + wide], height, width)


def _jpeg_size(encoded: bytes) -> tuple[int, int] | None:
    if simplejpeg is None or encoded[:2] != b"\xff\xd8":
        return None
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(encoded)
    except ValueError:
        return None
    return (int(width), int(height)) if orientation_of(encoded) > 4 else (int(height), int(width))


def _resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    if cv2 is None:
        image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        return to_pixels(image.resize((width, height), Image.Resampling.BILINEAR))
    # Linear interpolation reads 2 x 2 pixels, so it would skip pixels beyond a factor of two.
    far = min(pixels.shape[0] / height, pixels.shape[1] / width) > 2
    resized = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA if far else cv2.INTER_LINEAR)
    return resized if resized.ndim == 3 else resized[..., None]


class TrainingStream:
    """Batches of training examples, which Grain's threads prefetch.

    The batch of a step depends on the seed and the step only, not on where the run began or on the number of threads.

    Args:
      images: the encoded images of the training set.
      labels: int [n].
      rows_of: step of the run -> int [B], the rows of its batch.
      seed: seed of the crops.
      crop: a random part of each image; None for the middle.
      threads: number of threads that decode; None for one per processor.
      part: the rows of each batch to make; other processes make the others.
    """

    def __init__(
        self,
        images: StoredImages,
        labels: np.ndarray,
        rows_of: Callable[[int], np.ndarray],
        *,
        seed: int = 0,
        crop: RandomResizedCrop | None = None,
        threads: int | None = None,
        part: slice = slice(None),
    ):
        self._images, self._labels, self._rows_of = images, labels, rows_of
        self._seed, self._crop, self._part = seed, crop, part
        self._threads = threads or os.cpu_count() or 1
        self._batch = len(rows_of(0))
        self._begin, stop, _ = part.indices(self._batch)
        self._local = stop - self._begin
        self._chunk = next(size for size in range(min(_CHUNK, self._local), 0, -1) if self._local % size == 0)

    def _image(self, step: int, place: int, row: int) -> np.ndarray:
        images, index = self._images, int(self._images.rows[row])
        if self._crop is None:
            return images.middle(index)
        uniforms = position_uniforms(self._seed, step * self._batch + place, 4 * _TRIES).reshape(_TRIES, 4)
        return crop_and_resize(
            images.encoded(index),
            self._crop,
            uniforms,
            images.size,
            images.channels,
            images.name_of(index),
            images.background,
        )

    def chunk(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Makes a chunk of consecutive examples.

        Args:
          number: number of the chunk in the run.

        Returns:
          Images uint8 [chunk, H, W, C] and labels int32 [chunk].
        """
        step, at = divmod(number, self._local // self._chunk)
        places = self._begin + at * self._chunk + np.arange(self._chunk)
        rows = self._rows_of(step)[places]
        pixels = np.empty((self._chunk, *self._images.shape[1:]), np.uint8)
        for image, place, row in zip(pixels, places.tolist(), rows.tolist(), strict=True):
            image[:] = self._image(step, place, row)
        return pixels, self._labels[rows].astype(np.int32)

    def batches(self, first: int, stop: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Makes the batches of the steps `first` to `stop` - 1.

        Args:
          first: the first step.
          stop: the step after the last.

        Yields:
          Images uint8 [part, H, W, C] and labels int32 [part] of each step.

        Raises:
          UserError: an image cannot be decoded.
        """
        import grain

        if cv2 is not None:
            cv2.setNumThreads(0)  # Grain's threads suffice.
        each = self._local // self._chunk
        chunks = grain.MapDataset.source(_Chunks(self, stop * each))[first * each :]
        options = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=max(each, _AHEAD * self._threads))
        decoded = iter(chunks.to_iter_dataset(options))
        for _ in range(first, stop):
            parts = [next(decoded) for _ in range(each)]
            images, labels = (np.concatenate(some) for some in zip(*parts, strict=True))
            yield images, labels


class _Chunks:
    """Grain's view of a stream: the chunks of all steps, one after another."""

    def __init__(self, stream: TrainingStream, count: int):
        self._stream, self._count = stream, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self._stream.chunk(int(index))

    def __repr__(self) -> str:
        return f"{self._count} chunks of training examples"

"""Training batches: which pictures, changed how, in which order; all of it a function of (seed, step)."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from refinedet_cli.core.config import AugmentConfig, PreprocessConfig
from refinedet_cli.core.preprocess import Window, preprocess
from refinedet_cli.core.structures import Target, Targets
from refinedet_cli.data.augment import distort_colours, draw_view, view_boxes
from refinedet_cli.data.dataset import Dataset, Record
from refinedet_cli.data.images import read_image
from refinedet_cli.data.mosaic import draw_panels
from refinedet_cli.data.sampling import draw_companions, draw_weighted
from refinedet_cli.errors import DataError, DeviceError

# Batches that each worker keeps ready.
PREFETCHED = 4
# After so long without a batch, it is lost: a worker that cannot hand it over, as where shared memory is full, says
# nothing and goes on.
_PATIENCE_SECONDS = 300.0


class Draw(NamedTuple):
    """One sample to make.

    Attributes:
        picture: which one.
        epoch: the pass over the data; picture, epoch and turn seed the sample's randomness.
        preprocess: with the input size of this step.
        turn: how often the picture came before in this epoch.
        done: fraction of the run that lies behind.
    """

    picture: int
    epoch: int
    preprocess: PreprocessConfig
    turn: int = 0
    done: float = 0.0


class Batch(NamedTuple):
    """One training batch.

    Attributes:
        images: float32[B, 3, height, width], preprocessed.
        targets: their objects.
        indices: the pictures, by their place in the data set.
    """

    images: Tensor
    targets: Targets
    indices: tuple[int, ...]


class Plan:
    """The order of pictures over a whole run, readable from any step.

    Args:
        count: pictures.
        batch: pictures a step; a data set smaller than this is taken whole at each step.
        epochs: passes; the remainder of a pass that does not fill a batch is left out and reshuffled.
        seed: of the permutations.
        sizes: the preprocessing of a step, given the fraction of the run that is done.
        steps: of the whole run, which may end within a pass; 0 leaves it to ``epochs``.
        weights: float64[count], how often a picture comes compared to others; None shows each once a pass.
    """

    def __init__(
        self,
        count: int,
        batch: int,
        epochs: int,
        seed: int,
        sizes: Callable[[float], PreprocessConfig],
        *,
        steps: int = 0,
        weights: np.ndarray | None = None,
    ) -> None:
        self.weights = weights
        self.count, self.batch, self.seed, self.sizes = count, min(batch, count), seed, sizes
        self.steps_per_epoch = max(1, count // self.batch)
        self.steps = steps or self.steps_per_epoch * epochs

    @property
    def epochs(self) -> float:
        """Passes over the data in the whole run."""
        return self.steps / self.steps_per_epoch

    def batches(self, start: int) -> Iterator[list[Draw]]:
        """Yield the draws of each step from ``start`` to the end of the run."""
        for step in range(start, self.steps):
            epoch, place = divmod(step, self.steps_per_epoch)
            if step == start or place == 0:
                order = self._order(epoch)
            done = step / self.steps
            size = self.sizes(done)
            yield [
                Draw(picture, epoch, size, turn, done)
                for picture, turn in order[place * self.batch : (place + 1) * self.batch]
            ]

    def _order(self, epoch: int) -> list[tuple[int, int]]:
        """Shuffle the pictures of an epoch, each with how often it came before."""
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(self.count)
        if self.weights is None:
            return [(int(i), 0) for i in order]
        chosen = draw_weighted(self.weights, self.count, generator)
        turns = np.arange(self.count) - np.searchsorted(chosen, chosen)
        return [(int(chosen[i]), int(turns[i])) for i in order]


class TrainingSet(TorchDataset[tuple[Tensor, Target, int]]):
    """Makes samples; every random choice of a sample derives from (seed, epoch, index), so workers cannot change it."""

    def __init__(self, dataset: Dataset, augment: AugmentConfig, seed: int, weights: np.ndarray | None = None) -> None:
        self.dataset, self.augment, self.seed, self.weights = dataset, augment, seed, weights
        self._panel_augment = replace(augment, expand_probability=0.0)
        self._cache: Tensor | None = None
        self._starts: Tensor | None = None

    def fill_cache(self, threads: int, on_picture: Callable[[], None]) -> None:
        """Decode all pictures into memory that worker processes are forked with, or else given.

        Raises:
            DataError: a picture cannot be read.
        """
        sizes = torch.tensor([r.width * r.height * 3 for r in self.dataset.records], dtype=torch.int64)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
        cache = torch.empty(int(starts[-1]), dtype=torch.uint8)

        def fill(index: int) -> None:
            picture = read_record(self.dataset.records[index])
            cache[starts[index] : starts[index + 1]] = torch.from_numpy(picture).flatten()

        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(fill, range(len(self.dataset.records))):
                on_picture()
        self._cache, self._starts = cache, starts

    def cache_bytes(self) -> int:
        """Compute what the decoded pictures would take."""
        return sum(r.width * r.height * 3 for r in self.dataset.records)

    def __len__(self) -> int:
        return len(self.dataset.records)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, Target, int]:
        """Make one sample: float32[3, height, width], its objects, and the picture's place."""
        # The turn is 0 unless pictures repeat; without it seeds stay those of earlier versions.
        seeds = [self.seed, draw.epoch, draw.picture, *([draw.turn] if draw.turn else [])]
        generator = np.random.default_rng(seeds)
        size = (draw.preprocess.height, draw.preprocess.width)
        chance = self.augment.mosaic_probability if draw.done < self.augment.mosaic_until else 0.0
        if chance and generator.random() < chance:
            pixels, boxes, labels = self._mosaic(draw, size, generator)
        else:
            pixels, boxes, labels = self._sample(draw.picture, draw.preprocess, size, self.augment, generator)
        sides = (boxes[:, 2:] - boxes[:, :2]) * (size[1], size[0])
        kept = sides.min(axis=1, initial=np.inf) >= self.augment.min_size
        target = Target(torch.from_numpy(boxes[kept]).float(), torch.from_numpy(labels[kept]))
        return pixels, target, draw.picture

    def _begin(self, record: Record, augment: AugmentConfig, generator: np.random.Generator) -> None:
        """Let a subclass see what a picture will be changed with; it must leave the generator as it is."""

    def _sample(
        self,
        index: int,
        config: PreprocessConfig,
        size: tuple[int, int],
        augment: AugmentConfig,
        generator: np.random.Generator,
    ) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """Crop, change and resize one picture.

        Returns:
            float32[3, height, width]; its boxes, float64[N, 4], xyxy, norm; their labels, int64[N].
        """
        record = self.dataset.records[index]
        self._begin(record, augment, generator)
        image = self._picture(index, record)
        trainable = ~record.crowd
        boxes, labels = record.boxes[trainable], record.labels[trainable]
        height, width = image.shape[:2]
        view = draw_view(height, width, boxes, augment, generator)
        left, top = max(view.window.left, 0), max(view.window.top, 0)
        visible = image[top : min(view.window.bottom, height), left : min(view.window.right, width)]
        visible = distort_colours(visible, augment, generator)
        window = Window(
            view.window.left - left, view.window.top - top, view.window.right - left, view.window.bottom - top
        )
        moved, kept = view_boxes(boxes, view)
        pixels = preprocess(torch.from_numpy(np.ascontiguousarray(visible)), config, window, view.mirror, size)
        return pixels, moved, labels[kept]

    def _mosaic(
        self, draw: Draw, size: tuple[int, int], generator: np.random.Generator
    ) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """Put the picture and three more into the quarters of one input, as `_sample` makes them."""
        panels = draw_panels(size, generator)
        count = len(self.dataset.records)
        others = draw_companions(count, self.weights, len(panels) - 1, generator)
        pixels = torch.empty(3, *size)
        boxes, labels = [], []
        for panel, index in zip(panels, [draw.picture, *others], strict=True):
            part, found, names = self._sample(index, draw.preprocess, panel.size, self._panel_augment, generator)
            pixels[:, panel.top : panel.bottom, panel.left : panel.right] = part
            boxes.append(panel.place(found, size))
            labels.append(names)
        return pixels, np.concatenate(boxes), np.concatenate(labels)

    def _picture(self, index: int, record: Record) -> np.ndarray:
        if self._cache is None or self._starts is None:
            return read_record(record)
        flat = self._cache[self._starts[index] : self._starts[index + 1]]
        return flat.view(record.height, record.width, 3).numpy()


def read_record(record: Record) -> np.ndarray:
    """Read a picture of a data set.

    Returns:
        uint8[H, W, 3], RGB.

    Raises:
        DataError: it cannot be read, or is not of the size that the annotations say.
    """
    image = read_image(record.path)
    if image.shape[:2] != (record.height, record.width):
        raise DataError(
            f"{record.path}: the picture is {image.shape[1]} x {image.shape[0]} but its annotation says "
            f"{record.width} x {record.height}",
            "boxes would not fit; correct the annotation file, or rotate the picture as its EXIF data says",
        )
    return image


def collate(samples: Sequence[tuple[Tensor, Target, int]]) -> Batch:
    """Join samples."""
    images, targets, indices = zip(*samples, strict=True)
    return Batch(torch.stack(images), Targets.pack(targets), indices)


class _Guarded(TorchDataset[tuple[Tensor, Target, int] | DataError]):
    """Hands an error on as a value: raised in a worker process, it would arrive as the text of a traceback."""

    def __init__(self, data: TrainingSet) -> None:
        self.data = data

    def __getitem__(self, draw: Draw) -> tuple[Tensor, Target, int] | DataError:
        try:
            return self.data[draw]
        except DataError as error:
            return error


def _collate_guarded(samples: Sequence[tuple[Tensor, Target, int] | DataError]) -> Batch | DataError:
    made = []
    for sample in samples:
        if isinstance(sample, DataError):
            return sample
        made.append(sample)
    return collate(made)


def make_loader(
    data: TrainingSet, plan: Plan, start: int, workers: int, *, pin: bool, share: slice = slice(None)
) -> Iterator[Batch]:
    """Load the batches of a plan from a step on, ahead of their use, in ``workers`` processes (0: in this one).

    Of each batch only ``share`` is loaded, which must hold a picture of each.

    Raises:
        DataError: a picture cannot be read.
        DeviceError: a process was killed in the moment of handing a batch over.
    """
    loader = DataLoader(
        _Guarded(data),
        batch_sampler=(draws[share] for draws in plan.batches(start)),
        collate_fn=_collate_guarded,
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=PREFETCHED if workers else None,
        timeout=_PATIENCE_SECONDS if workers else 0,
        worker_init_fn=_leave_interrupts_to_the_run,
    )
    batches = iter(loader)
    try:
        while True:
            batch: Batch | DataError | DeviceError | None
            try:
                batch = next(batches, None)
            except (OSError, EOFError) as error:
                if not workers:
                    raise
                # What a worker hands over needs its help to be taken: in that moment, it was killed.
                batch = lost_worker(error)
            if batch is None:
                return
            if isinstance(batch, DataError | DeviceError):
                raise batch
            yield batch
    finally:
        # An error keeps this frame. What is left of the loader would end with it, at any time, in any order: queues
        # would close before it writes its last words to them.
        del batches


def lost_worker(error: Exception) -> DeviceError:
    """Say what it means that a process that makes samples is gone, which was noticed by an error."""
    return DeviceError(
        f"a process that loads training pictures is lost: {error}",
        "most often memory ran out: give fewer --workers or --no-cache; in a container, more shared memory "
        "(docker run --shm-size)",
    )


def _leave_interrupts_to_the_run(worker: int) -> None:
    # Ctrl-C reaches every process of the terminal, and SIGTERM every process of a job; the run wants to finish its step
    # first. Workers end with it, as they do when it is killed.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

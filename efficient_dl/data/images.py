"""Images with classes, in memory: shuffled epochs, optional shifts and mirrors."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from efficient_dl.config import DataSpec
from efficient_dl.data.dataset import content_fingerprint, slice_of_step, spread
from efficient_dl.data.draw import MIRROR, SHIFT_COLUMN, SHIFT_ROW, Integers, draw_below, permutation

Images = NDArray[np.uint8]  # (samples, channels, height, width)
Labels = NDArray[np.uint8]  # (samples,)


class ImageData:
    """Images of one size. Step s takes the next samples of an endless sequence of shuffled epochs.

    The global batch of step s is the samples s · G … s · G + G − 1 of that sequence, G = batch_size · world_size ·
    accumulate; an epoch's order is a function of (seed, epoch), and a batch may reach over an epoch's end. Nothing
    but the step is remembered. x = (pixel − mean) / std.

    augment: shift by up to an eighth of the side (the border repeats nothing: it is black), and mirror every
    second image if `mirror`; both drawn by (seed, step, index in the global batch).
    """

    def __init__(
        self,
        name: str,
        train: tuple[Images, Labels],
        validation: tuple[Images, Labels],
        *,
        classes: int,
        mean: float,
        std: float,
        seed: int,
        augment: bool = False,
        mirror: bool = False,
    ) -> None:
        self.name = name
        channels, height, width = train[0].shape[1:]
        self.spec = DataSpec(kind="images", classes=classes, shape=(channels, height, width))
        self.fingerprint = content_fingerprint((*train, *validation))
        self.num_train = len(train[0])
        self.num_validation = len(validation[0])
        self._train, self._validation = train, validation
        self._mean, self._std, self._seed = mean, std, seed
        self._augment, self._mirror = augment, mirror

    def train_batch(
        self,
        step: int,
        rank: int = 0,
        world_size: int = 1,
        batch_size: int = 1,
        accumulate: int = 1,
        part: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """x: float32 (batch_size, channels, height, width), y: int64 (batch_size,); see Dataset."""
        index = slice_of_step(rank, world_size, batch_size, accumulate, part)
        position = step * batch_size * world_size * accumulate + index
        epochs, offsets = np.divmod(position, self.num_train)
        samples = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            samples[inside] = permutation(self.num_train, self._seed, int(epoch))[offsets[inside]]
        images = self._train[0][samples]
        if self._augment:
            images = self._augmented(images, step, index)
        return self._tensors(images, self._train[1][samples])

    def eval_batches(self, num_batches: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """x, y as in train_batch, up to batch_size of them, never augmented; see Dataset."""
        samples = spread(self.num_validation, num_batches * batch_size)
        for first in range(0, len(samples), batch_size):
            chosen = samples[first : first + batch_size]
            yield self._tensors(self._validation[0][chosen], self._validation[1][chosen])

    def _tensors(self, images: Images, labels: Labels) -> tuple[Tensor, Tensor]:
        pixels = torch.from_numpy(images.astype(np.float32))
        return (pixels - self._mean) / self._std, torch.from_numpy(labels.astype(np.int64))

    def _augmented(self, images: Images, step: int, index: Integers) -> Images:
        height, width = images.shape[2:]
        reach = max(1, min(height, width) // 8)
        padded = np.pad(images, ((0, 0), (0, 0), (reach, reach), (reach, reach)))
        top = draw_below(2 * reach + 1, self._seed, SHIFT_ROW, step, index)
        left = draw_below(2 * reach + 1, self._seed, SHIFT_COLUMN, step, index)
        rows = (top[:, None] + np.arange(height))[:, None, :, None]
        columns = np.broadcast_to(np.arange(width), (len(index), width))
        if self._mirror:
            mirrored = draw_below(2, self._seed, MIRROR, step, index).astype(bool)
            columns = np.where(mirrored[:, None], columns[:, ::-1], columns)
        columns = (left[:, None] + columns)[:, None, None, :]
        sample = np.arange(len(index))[:, None, None, None]
        channel = np.arange(images.shape[1])[None, :, None, None]
        return padded[sample, channel, rows, columns]

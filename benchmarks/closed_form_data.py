"""The data of the closed-form study: three toys, scikit-learn's digits, Fashion-MNIST where the machine has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from efficient_dl.closed_form.network import Scale, deviation
from efficient_dl.config import DataConfig
from efficient_dl.data.fashion_mnist import DEBIAN_FOLDER, load_fashion_mnist

TOY_TRAIN, TOY_TEST = 400, 2000
SWEEP_ROWS = 300

Rows = tuple[NDArray[Any], NDArray[Any]]


@dataclass(frozen=True)
class Split:
    """Rows (n, features) with labels 0 … classes − 1, for training and for the test."""

    train: Rows
    test: Rows

    @property
    def inputs(self) -> int:
        return self.train[0].shape[1]

    @property
    def classes(self) -> int:
        return int(self.train[1].max()) + 1

    def inner(self) -> Split:
        """A fifth of the training rows as the test: for choices."""
        x, y = self.train
        cut = len(x) // 5
        return Split((x[cut:], y[cut:]), (x[:cut], y[:cut]))

    def first(self, rows: int) -> Split:
        return Split((self.train[0][:rows], self.train[1][:rows]), self.test)

    def tensors(self, part: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
        x, y = self.train if part == "train" else self.test
        return torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.int64)

    def scale(self) -> nn.Module:
        """Columns to mean 0 and variance 1, as closed forms scale them."""
        x, _ = self.tensors("train")
        return Scale(x.mean(0), deviation(x.var(0, unbiased=False)))


def xor(seed: int) -> Split:
    """The sign of x₀x₁ on a square, with noise on the inputs."""

    def rows(count: int, rng: np.random.Generator) -> Rows:
        x = rng.uniform(-1, 1, size=(count, 2))
        return x + 0.05 * rng.normal(size=x.shape), (x[:, 0] * x[:, 1] > 0).astype(np.int64)

    return _toy(rows, seed)


def spirals(seed: int) -> Split:
    """Two spirals of 1.75 turns."""

    def rows(count: int, rng: np.random.Generator) -> Rows:
        y = rng.integers(2, size=count)
        turn = np.sqrt(rng.uniform(0.02, 1, size=count))
        angle = 3.5 * np.pi * turn + np.pi * y
        x = turn[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        return x + 0.03 * rng.normal(size=x.shape), y

    return _toy(rows, seed)


def rings(seed: int) -> Split:
    """Four concentric rings, of two classes in turn."""

    def rows(count: int, rng: np.random.Generator) -> Rows:
        ring = rng.integers(4, size=count)
        angle = rng.uniform(0, 2 * np.pi, size=count)
        x = (0.25 + 0.25 * ring)[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        return x + 0.05 * rng.normal(size=x.shape), ring % 2

    return _toy(rows, seed)


def digits(seed: int) -> Split:
    """A quarter for the test, stratified, by the seed."""
    x, y = _digits()
    rows: Any = train_test_split(x, y, test_size=0.25, random_state=seed, stratify=y)
    return Split((rows[0], rows[2]), (rows[1], rows[3]))


def fashion_mnist(seed: int) -> Split:
    """The authors' split; the seed orders the training rows."""
    train, test = _fashion()
    order = np.random.default_rng(seed).permutation(len(train[0]))
    return Split((train[0][order], train[1][order]), test)


def _toy(rows: Callable[[int, np.random.Generator], Rows], seed: int) -> Split:
    rng = np.random.default_rng(seed)
    return Split(rows(TOY_TRAIN, rng), rows(TOY_TEST, rng))


@cache
def _digits() -> Rows:
    x, y = load_digits(return_X_y=True)
    return np.asarray(x), np.asarray(y)


@cache
def _fashion() -> tuple[Rows, Rows]:
    data = load_fashion_mnist(DataConfig(name="fashion-mnist", path=str(DEBIAN_FOLDER)), seed=0)
    return _flat(*data._train), _flat(*data._validation)  # all images at once, as no training step wants them


def _flat(images: NDArray[Any], labels: NDArray[Any]) -> Rows:
    return images.reshape(len(images), -1).astype(np.float32) / 255, labels.astype(np.int64)


DATA: dict[str, Callable[[int], Split]] = {
    "xor": xor,
    "spirals": spirals,
    "rings": rings,
    "digits": digits,
} | ({"fashion-mnist": fashion_mnist} if Path(DEBIAN_FOLDER).is_dir() else {})

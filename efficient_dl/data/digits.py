"""scikit-learn's digits: 1,797 images of 8 × 8 pixels, inside the package itself."""

from __future__ import annotations

import numpy as np

from efficient_dl.data.images import ImageData
from efficient_dl.errors import DataError

# Over all images, whose pixels are 0 … 16.
MEAN, STD = 4.884, 6.017


def load_digits(*, holdout: float, seed: int, augment: bool) -> ImageData:
    """The last `holdout` share of the images, in scikit-learn's order, is validation. Raises DataError."""
    try:
        from sklearn import datasets  # an extra, and slow to import
    except ImportError:
        raise DataError(
            "the digits come with scikit-learn, which is not installed",
            where="data.name=digits",
            fix="pip install 'efficient_dl[data]', or take data that needs nothing: data.name=stdlib",
        ) from None
    pixels, targets = datasets.load_digits(return_X_y=True)
    images = np.asarray(pixels).astype(np.uint8).reshape(-1, 1, 8, 8)
    labels = np.asarray(targets).astype(np.uint8)
    cut = len(images) - max(1, round(len(images) * holdout))
    if cut < 1:
        fix = "take a smaller data.holdout"
        raise DataError("no digits are left to train on", found=f"holdout {holdout}", fix=fix)
    train, validation = (images[:cut], labels[:cut]), (images[cut:], labels[cut:])
    return ImageData("digits", train, validation, classes=10, mean=MEAN, std=STD, seed=seed, augment=augment)

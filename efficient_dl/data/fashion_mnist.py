"""Fashion-MNIST: 70,000 images of 28 × 28 pixels, from a folder, from Debian's package or from the network."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from efficient_dl.config import DataConfig
from efficient_dl.data.download import cache_folder, fetch_all
from efficient_dl.data.images import ImageData
from efficient_dl.errors import DataError

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # apt install dataset-fashion-mnist
MIRRORS = (
    "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
)
# sha-256 of the four files as their authors publish them (Xiao, Rasul & Vollgraf 2017, arXiv 1708.07747).
CHECKSUMS = {
    "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}
# Over the training images' pixels, 0 … 255.
MEAN, STD = 72.94, 90.02


def load_fashion_mnist(config: DataConfig, *, seed: int) -> ImageData:
    """60,000 images to train on, 10,000 for validation: the authors' split.

    The files, gzipped or not, are looked for in data.path if it is given, and nowhere else; without it in Debian's
    package, in the cache, and last, if data.download, on the network (31 MB, checked). Raises DataError.
    """
    folder = _folder(config)
    train, validation = (
        (
            _read_idx(folder, f"{split}-images-idx3-ubyte", 3),
            _read_idx(folder, f"{split}-labels-idx1-ubyte", 1),
        )
        for split in ("train", "t10k")
    )
    for images, labels in (train, validation):
        if len(images) != len(labels) or not len(images) or int(labels.max()) > 9:
            raise DataError(
                "these are not Fashion-MNIST's files",
                expected="as many labels as images, none above 9",
                found=f"{len(images):,} images, {len(labels):,} labels up to {labels.max(initial=0)}",
                where=str(folder),
                fix="take the four files from one source, for example apt install dataset-fashion-mnist",
            )
    return ImageData(
        "fashion-mnist",
        (train[0][:, None], train[1]),
        (validation[0][:, None], validation[1]),
        classes=10,
        mean=MEAN,
        std=STD,
        seed=seed,
        augment=config.augment,
        mirror=True,
    )


def _folder(config: DataConfig) -> Path:
    if config.path:
        return Path(config.path).expanduser()
    cache = cache_folder() / "fashion-mnist"
    for folder in (DEBIAN_FOLDER, cache):
        if all(_idx_file(folder, name.removesuffix(".gz")) for name in CHECKSUMS):
            return folder
    if not config.download:
        raise DataError(
            "Fashion-MNIST is not on this machine, and data.download is off",
            where=f"{DEBIAN_FOLDER}, {cache}",
            fix="apt install dataset-fashion-mnist, or data.path=FOLDER, or data.download=true",
        )
    fetch_all(CHECKSUMS, MIRRORS, cache)
    return cache


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _read_idx(folder: Path, name: str, num_axes: int) -> NDArray[np.uint8]:
    """An IDX file of unsigned bytes: 00 00 08 axes, each axis's length as big-endian u32, then the bytes."""
    path = _idx_file(folder, name)
    if path is None:
        raise DataError(
            f"{name} is missing",
            expected=", ".join(name.removesuffix(".gz") for name in CHECKSUMS) + ", each with .gz or without",
            where=str(folder),
            fix="correct data.path, or leave it out to use Debian's package or a download",
        )
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(
            "a file of Fashion-MNIST cannot be read",
            found=str(error),
            where=str(path),
            fix="remove the file and fetch it again",
        ) from None
    header_bytes = 4 + 4 * num_axes
    head = np.frombuffer(content[:header_bytes].ljust(header_bytes, b"\0"), dtype=">u4")
    shape = tuple(int(one) for one in head[1:])
    if int(head[0]) != 0x0800 + num_axes or len(content) != header_bytes + int(np.prod(shape)):
        raise DataError(
            "not an IDX file of bytes, or cut short",
            expected=f"{num_axes} axes of unsigned bytes, magic {0x0800 + num_axes:#010x}",
            found=f"magic {int(head[0]):#010x}, shape {shape}, {len(content):,} bytes",
            where=str(path),
            fix="fetch the file again",
        )
    return np.frombuffer(content, dtype=np.uint8, offset=header_bytes).reshape(shape)

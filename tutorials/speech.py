"""Recorded speech with phone labels, for the tutorials: voices of the Festival synthesiser, or planted data.

A diphone runs from the middle of one phone to the middle of the next. A voice is one speaker's recordings of (nearly)
all the diphones of a language, kept as frames of some ten milliseconds: an energy and the coefficients of a linear
prediction (LPC), with the frame where the one phone becomes the other marked. They stand in for TIMIT, which is
licensed. Files are found, checked and kept as in `data`.
"""

from __future__ import annotations

__all__ = ["CHANNELS", "VOICES", "Recording", "Speech", "Voice", "cepstra", "load_speech", "load_voice", "read_group"]

import hashlib
import io
import lzma
import shutil
import subprocess
import tarfile
import tempfile
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from data import UNREACHABLE, DataError, MissingDataError, cache, checked, first_existing, keep
from planted_speech import planted
from recordings import CHANNELS, Recording, Speech

FESTIVAL = Path("/usr/share/festival/voices/english")
UNPACKABLE = (*UNREACHABLE, lzma.LZMAError, ValueError)


@dataclass(frozen=True)
class Voice:
    """Where a speaker's recordings are.

    Args:
        name: of the speaker.
        package: the Debian package.
        version: of the package.
        folder: of the voice, where the package is installed.
        file: of the recordings.
        package_sha256: of the package's file.
        sha256: of the recordings.
    """

    name: str
    package: str
    version: str
    folder: str
    file: str
    package_sha256: str
    sha256: str

    @property
    def package_file(self) -> str:
        """The name of the package's file."""
        return f"{self.package}_{self.version}_all.deb"

    @property
    def url(self) -> str:
        """Where Debian has the package's file."""
        return f"https://deb.debian.org/debian/pool/main/f/{self.package}/{self.package_file}"


VOICES = {
    "ked": Voice(
        "KED",
        "festvox-kdlpc16k",
        "1.4.0-6.1",
        "ked_diphone",
        "kedlpc16k.group",
        "3c359e51b6c85d5f5e00368804c52a68f551b1961ee03a79dde5245bc1accb6c",
        "3a3bbcf8b80cd7260ced48ce3f01cea435b4f3b4d7b000538c9da45030515548",
    ),
    "kal": Voice(
        "KAL",
        "festvox-kallpc16k",
        "2.4-1",
        "kal_diphone",
        "kallpc16k.group",
        "bb21a90974a2754044c6dc11e4cf958aa8ba91ddb312e20ea7a114f3b73dadae",
        "c7bb846006bfcaff73f561c8acdac133ff035da51113d82c70814d9694c43730",
    ),
}


def load_speech(voice: str = "ked", data: str = "auto") -> Speech:
    """Load a voice, or what stands in for it.

    Args:
        voice: a key of `VOICES`.
        data: `"festvox"` for the recorded voice, `"planted"` for the embedded data, or `"auto"`: the voice if it can be
            had, else the embedded data.

    Returns:
        The recordings; their `source` says what was chosen and, on a fall-back, how to get the voice.

    Raises:
        MissingDataError: if `data` is `"festvox"` and the voice can't be had.
        DataError: if a file is damaged.
    """
    if data == "planted":
        return planted()
    try:
        return load_voice(voice)
    except MissingDataError as missing:
        if data == "festvox":
            raise
        return planted(source=f"synthetic, in the place of recorded speech. {missing}")


def load_voice(voice: str, *, fetch: bool = True) -> Speech:
    """The recordings of a speaker.

    Args:
        voice: a key of `VOICES`.
        fetch: whether to look outside this machine when there is no file.

    Returns:
        All of them.

    Raises:
        MissingDataError: if they are not here and can't be fetched; the text says what to put where.
        DataError: if a file is damaged.
    """
    known = VOICES[voice]
    file, source = find_voice(known)
    if file is None and fetch:
        file, source = fetch_voice(known)
    if file is None:
        raise MissingDataError(
            f"To use the real voice {known.name}, put {known.file} or the Debian package that it is in, {known.url}, "
            f"into {cache() / 'festvox'}, or install the package {known.package}."
        )
    return Speech(known.name, tuple(read_group(file)), f"a speaker of US English, {source}")


# -- where files are kept, and where they come from


def find_voice(voice: Voice) -> tuple[bytes | None, str]:
    """The recordings, checked, from the cache (as they are, or in the package) or where the package is installed."""
    folders = (cache() / "festvox", cache())
    path = first_existing(*(folder / voice.file for folder in folders))
    if path is not None:
        return checked(path.read_bytes(), voice.sha256, str(path), algorithm="sha256"), "cached"
    path = first_existing(*(folder / voice.package_file for folder in folders))
    if path is not None:
        return unpacked(path.read_bytes(), voice, str(path)), "cached"
    path = first_existing(FESTIVAL / voice.folder / "group" / voice.file)
    if path is not None and hashlib.sha256(file := path.read_bytes()).hexdigest() == voice.sha256:
        return file, "installed"  # another version is none of ours to complain of
    return None, ""


def fetch_voice(voice: Voice) -> tuple[bytes | None, str]:
    """Try each source for a few seconds; keep in the cache what the first good one gave."""
    sources: list[tuple[str, Callable[[Voice], bytes]]] = [(voice.url, from_url), ("apt-get", from_apt)]
    for name, source in sources:
        try:
            file = unpacked(source(voice), voice, name)
        except (DataError, *UNREACHABLE):
            continue
        return file, f"fetched from {name}, {keep({voice.file: file}, 'festvox')}"
    return None, ""


def from_url(voice: Voice, timeout: float = 5.0) -> bytes:
    """The package from Debian's mirrors."""
    with urllib.request.urlopen(voice.url, timeout=timeout) as answer:
        return answer.read()


def from_apt(voice: Voice, timeout: float = 60.0) -> bytes:
    """The package through apt, which may know a mirror that is nearer."""
    apt = shutil.which("apt-get")
    if apt is None:
        raise FileNotFoundError("apt-get")
    with tempfile.TemporaryDirectory() as folder:
        command = [apt, "download", f"{voice.package}={voice.version}"]
        subprocess.run(command, cwd=folder, timeout=timeout, check=True, capture_output=True)
        return (Path(folder) / voice.package_file).read_bytes()


def unpacked(package: bytes, voice: Voice, where: str) -> bytes:
    """The recordings out of a Debian package, which is an `ar` archive of `tar` archives."""
    checked(package, voice.package_sha256, where, algorithm="sha256")
    try:
        with tarfile.open(fileobj=io.BytesIO(ar_member(package, b"data.tar"))) as archive:
            name = next(name for name in archive.getnames() if name.endswith(f"/{voice.file}"))
            member = archive.extractfile(name)
            assert member is not None
            return checked(member.read(), voice.sha256, where, algorithm="sha256")
    except (StopIteration, *UNPACKABLE) as error:
        raise DataError(f"{where} can't be unpacked ({error!r}): delete it and fetch it again.") from error


def ar_member(archive: bytes, name: bytes) -> bytes:
    """The first file of an `ar` archive whose name begins so: headers of 60 bytes, contents padded to even lengths."""
    place = len(b"!<arch>\n")
    while place + 60 <= len(archive):
        size = int(archive[place + 48 : place + 58])
        if archive[place : place + 16].startswith(name):
            return archive[place + 60 : place + 60 + size]
        place += 60 + size + size % 2
    raise ValueError(f"no {name.decode()} in it")


# -- the format


class Entry(NamedTuple):
    """A line of a group file's index: the diphone, where its track begins, and the first frame of its right phone."""

    name: str
    offset: int
    middle: int


def read_group(data: bytes) -> list[Recording]:
    """The recordings in a `.group` file of the Edinburgh Speech Tools: an index, then a track and a signal for each.

    Raises:
        DataError: if it is not such a file, or is cut short.
    """
    try:
        header, place = read_header(data, 0, "EST_File index")
        entries = []
        for _ in range(int(header["NumEntries"])):
            end = data.index(b"\n", place)
            name, offset, _, middle = data[place:end].decode("ascii").split()
            entries.append(Entry(name, int(offset), int(middle)))
            place = end + 1
        return [read_recording(data, place, entry) for entry in entries]
    except (KeyError, ValueError) as error:
        raise DataError(f"this is not a group file, or it is damaged: {error}.") from error


def read_header(data: bytes, place: int, first: str) -> tuple[dict[str, str], int]:
    """An ASCII header of `name value` lines, and where it ends."""
    end = data.index(b"EST_Header_End\n", place)
    lines = data[place:end].decode("ascii").splitlines()
    if lines[:1] != [first]:
        raise ValueError(f"{first!r} expected at byte {place}")
    pairs = (line.partition(" ") for line in lines[1:])
    return {name: value.strip() for name, _, value in pairs}, end + len(b"EST_Header_End\n")


def read_recording(data: bytes, start: int, entry: Entry) -> Recording:
    """One diphone's track: rows of float32, `[time, valid, energy, a_1 .. a_p]`."""
    header, place = read_header(data, start + entry.offset, "EST_File Track")
    order = {"01": "<f4", "10": ">f4"}[header["ByteOrder"]]
    shape = int(header["NumFrames"]), 2 + int(header["NumChannels"])
    rows = np.frombuffer(data, order, shape[0] * shape[1], place).reshape(shape)[:, 2:].astype(np.float64)
    if not np.isfinite(rows).all() or not (rows[:, 0] > 0).all() or not 0 <= entry.middle <= shape[0]:
        raise ValueError(f"the frames of {entry.name} make no sense")
    frames = np.column_stack([np.log(rows[:, 0]), cepstra(rows[:, 1:])])
    left, right = (phone.strip("_$") for phone in entry.name.split("-"))
    return Recording(left, right, entry.middle, frames)


def cepstra(a: np.ndarray) -> np.ndarray:
    r"""The cepstrum of the filter ``1 / (1 - Σ a_k z^-k)``, as many coefficients as it has, one filter a row.

    .. math:: c_n = a_n + \sum_{k=1}^{n-1} \tfrac{k}{n} c_k a_{n-k}
    """
    c = np.zeros_like(a)
    for n in range(1, a.shape[1] + 1):
        c[:, n - 1] = a[:, n - 1] + sum(k / n * c[:, k - 1] * a[:, n - k - 1] for k in range(1, n))
    return c

"""The loader of recorded speech: the format is read, a voice is found where it may be, checked, or asked for."""

from __future__ import annotations

import hashlib
import importlib
import io
import struct
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tutorials"))
data = importlib.import_module("data")
speech = importlib.import_module("speech")
planted_speech = importlib.import_module("planted_speech")

Row = Sequence[float]

# Two recordings of 3 and 2 frames; each row is an energy and two coefficients of a linear prediction.
SMALL: list[tuple[str, int, list[Row]]] = [
    ("_k-$aa_", 1, [(1.0, 0.5, 0.0), (np.e, 0.5, 0.25), (100.0, -0.5, 0.0)]),
    ("aa-pau", 2, [(2.0, 0.0, 0.0), (3.0, 1.0, -0.5)]),
]


def group(entries: list[tuple[str, int, list[Row]]], *, order: str = "<", name: str = "EST_File index") -> bytes:
    """A group file, written from its description."""
    index, body = "", b""
    for diphone, middle, rows in entries:
        track = (
            f"EST_File Track\nDataType binary\nNumFrames {len(rows)}\nByteOrder {'01' if order == '<' else '10'}\n"
            f"NumChannels {len(rows[0])}\nBreaksPresent true\nCommentChar ;\n\nChannel_0 lpc_0\nEST_Header_End\n"
        ).encode()
        for t, row in enumerate(rows):
            track += struct.pack(f"{order}{2 + len(row)}f", 0.01 * t, 1.0, *row)
        index += f"{diphone} {len(body)} {len(body) + len(track)} {middle}\n"
        body += track + b"the signal, whatever it is"
    header = f"{name}\nDataType ascii\nNumEntries {len(entries)}\nIndexName tiny\nDataFormat grouped\nEST_Header_End\n"
    return (header + index).encode() + body


def archived(files: dict[str, bytes]) -> bytes:
    """A tar archive, packed by xz."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:xz") as archive:
        for name, contents in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(contents)
            archive.addfile(member, io.BytesIO(contents))
    return stream.getvalue()


def package(files: dict[str, bytes]) -> bytes:
    """A Debian package: an `ar` archive of a version and two tar archives, the first with an odd length."""
    result = b"!<arch>\n"
    for name, contents in {"debian-binary": b"2.0", "control.tar.xz": b"no", "data.tar.xz": archived(files)}.items():
        fields = [name.encode().ljust(16), b"0".ljust(12), b"0".ljust(6), b"0".ljust(6), b"100644".ljust(8)]
        result += b"".join(fields) + str(len(contents)).encode().ljust(10) + b"`\n" + contents
        result += b"\n" * (len(contents) % 2)
    return result


INSIDE = "./usr/share/festival/voices/english/ked_diphone/group/kedlpc16k.group"


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A small voice and its package, with the loader made to expect them."""
    small = group(SMALL)
    packed = package({INSIDE: small})
    sums = {"sha256": hashlib.sha256(small).hexdigest(), "package_sha256": hashlib.sha256(packed).hexdigest()}
    monkeypatch.setitem(speech.VOICES, "ked", replace(speech.VOICES["ked"], **sums))
    return {"kedlpc16k.group": small, "festvox-kdlpc16k_1.4.0-6.1_all.deb": packed}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, nothing installed, and no way to the world outside."""

    def unreachable(*args: object, **kwargs: object) -> None:
        raise OSError("no network in the tests")

    monkeypatch.setenv("METAOPT_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(speech, "FESTIVAL", tmp_path / "festival")
    monkeypatch.setattr(speech.urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(speech.subprocess, "run", unreachable)
    return tmp_path / "cache"


def put(folder: Path, name: str, contents: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(contents)
    return folder / name


def assert_is_small(voice: Any) -> None:
    assert voice.name == "KED"
    assert [recording.diphone for recording in voice.recordings] == ["k-aa", "aa-pau"]
    assert voice.phones == ["aa", "k", "pau"]


# -- the format


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_group_file_is_read(order: str) -> None:
    first, second = speech.read_group(group(SMALL, order=order))
    assert (first.left, first.right, first.middle) == ("k", "aa", 1)
    assert (second.left, second.right, second.middle) == ("aa", "pau", 2)
    # c_1 = a_1 and c_2 = a_2 + a_1 a_1 / 2.
    expected = [[0.0, 0.5, 0.125], [1.0, 0.5, 0.375], [np.log(100), -0.5, 0.125]]
    np.testing.assert_allclose(first.frames, expected, atol=1e-6)
    np.testing.assert_allclose(second.frames, [[np.log(2), 0, 0], [np.log(3), 1, 0]], atol=1e-6)


def test_cepstra_are_the_power_sums_of_the_poles() -> None:
    random = np.random.default_rng(0)
    halves = random.uniform(0.2, 0.95, (5, 4)) * np.exp(1j * random.uniform(0, np.pi, (5, 4)))
    poles = np.concatenate([halves, halves.conj()], axis=1)
    a = np.array([-np.poly(row).real[1:] for row in poles])
    n = np.arange(1, 9)
    expected = (poles[:, :, None] ** n).sum(1).real / n
    np.testing.assert_allclose(speech.cepstra(a), expected, rtol=1e-9, atol=1e-12)


def test_cepstra_are_the_fourier_series_of_the_log_spectrum() -> None:
    a = np.array([[1.3, -0.9, 0.2]])
    spectrum = np.fft.fft(np.concatenate([[1.0], -a[0]]), 4096)
    series = np.fft.ifft(-np.log(np.abs(spectrum))).real
    np.testing.assert_allclose(speech.cepstra(a)[0], 2 * series[1:4], atol=1e-9)


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b"<html>log in first</html>",
        group(SMALL, name="EST_File wave"),
        group(SMALL)[:-60],
        group(SMALL)[:150],
        group([("aa-b", 4, [(1.0, 0.5)])]),
        group([("aa-b", 0, [(0.0, 0.5)])]),
        group([("aa-b", 0, [(np.nan, 0.5)])]),
        group([("aab", 0, [(1.0, 0.5)])]),
        group(SMALL).replace(b"ByteOrder 01", b"ByteOrder 99"),
    ],
    ids=["empty", "html", "kind", "cut", "index", "middle", "silent", "nan", "name", "order"],
)
def test_what_is_no_group_file_is_refused(junk: bytes) -> None:
    with pytest.raises(data.DataError, match="not a group file, or it is damaged"):
        speech.read_group(junk)


# -- what is there


@pytest.mark.parametrize("folder", ["festvox", "."])
@pytest.mark.parametrize("name", ["kedlpc16k.group", "festvox-kdlpc16k_1.4.0-6.1_all.deb"])
def test_a_cached_voice_is_found(files: dict[str, bytes], cache: Path, folder: str, name: str) -> None:
    put(cache / folder, name, files[name])
    voice = speech.load_speech("ked", "festvox")
    assert_is_small(voice)
    assert voice.source.endswith("cached")


def test_an_installed_voice_is_found(files: dict[str, bytes], tmp_path: Path) -> None:
    put(tmp_path / "festival" / "ked_diphone" / "group", "kedlpc16k.group", files["kedlpc16k.group"])
    voice = speech.load_voice("ked")
    assert_is_small(voice)
    assert voice.source.endswith("installed")


def test_another_version_that_is_installed_is_left_alone(files: dict[str, bytes], tmp_path: Path) -> None:
    put(tmp_path / "festival" / "ked_diphone" / "group", "kedlpc16k.group", files["kedlpc16k.group"] + b"x")
    with pytest.raises(data.MissingDataError):
        speech.load_voice("ked")


@pytest.mark.parametrize("name", ["kedlpc16k.group", "festvox-kdlpc16k_1.4.0-6.1_all.deb"])
@pytest.mark.parametrize("choice", ["auto", "festvox"])
def test_a_damaged_file_is_an_error_that_names_it(files: dict[str, bytes], cache: Path, name: str, choice: str) -> None:
    path = put(cache / "festvox", name, files[name][:-1] + b"x")
    with pytest.raises(data.DataError, match=f"{path.name} has SHA256 .* delete it") as error:
        speech.load_speech("ked", choice)
    assert not isinstance(error.value, data.MissingDataError)


@pytest.mark.parametrize(
    "packed", [package({}), package({INSIDE: b"x"}), b"!<arch>\n", b"!<arch>\n" + b"x" * 70, package({})[:-40]]
)
def test_a_package_without_the_voice_is_an_error(cache: Path, monkeypatch: pytest.MonkeyPatch, packed: bytes) -> None:
    voice = replace(speech.VOICES["ked"], package_sha256=hashlib.sha256(packed).hexdigest())
    monkeypatch.setitem(speech.VOICES, "ked", voice)
    put(cache, "festvox-kdlpc16k_1.4.0-6.1_all.deb", packed)
    with pytest.raises(data.DataError, match=r"\.deb (can't be unpacked|has SHA256).*delete it"):
        speech.load_voice("ked")


# -- what is not


@pytest.mark.parametrize("voice", ["ked", "kal"])
def test_a_missing_voice_is_asked_for_in_one_sentence(cache: Path, voice: str) -> None:
    with pytest.raises(data.MissingDataError) as error:
        speech.load_speech(voice, "festvox")
    text, known = str(error.value), speech.VOICES[voice]
    assert "\n" not in text
    for wanted in (known.name, known.file, known.url, str(cache / "festvox"), known.package):
        assert wanted in text


def test_auto_falls_back_to_planted_data_and_says_so() -> None:
    voice = speech.load_speech("ked", "auto")
    assert voice.name == "planted"
    assert voice.source.startswith("synthetic, in the place of recorded speech. To use the real voice KED, put")


def test_planted_data_asked_for_are_no_fall_back(files: dict[str, bytes], cache: Path) -> None:
    put(cache, "kedlpc16k.group", files["kedlpc16k.group"])
    assert speech.load_speech("ked", "planted").source == "synthetic, embedded"


def test_nothing_is_fetched_when_that_was_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech, "fetch_voice", lambda voice: pytest.fail("it was fetched"))
    with pytest.raises(data.MissingDataError):
        speech.load_voice("ked", fetch=False)


# -- fetching


def serve(packed: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def urlopen(url: str, timeout: float) -> io.BytesIO:
        assert timeout <= 10
        assert url.endswith("/festvox-kdlpc16k_1.4.0-6.1_all.deb")
        return io.BytesIO(packed)

    monkeypatch.setattr(speech.urllib.request, "urlopen", urlopen)


def apt(packed: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], *, cwd: str, **_: object) -> None:
        assert command[1:] == ["download", "festvox-kdlpc16k=1.4.0-6.1"]
        put(Path(cwd), "festvox-kdlpc16k_1.4.0-6.1_all.deb", packed)

    monkeypatch.setattr(speech.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(speech.subprocess, "run", run)


@pytest.mark.parametrize(("source", "name"), [(serve, "https://"), (apt, "apt-get")])
def test_what_was_fetched_is_kept(
    files: dict[str, bytes], cache: Path, monkeypatch: pytest.MonkeyPatch, source: Any, name: str
) -> None:
    source(files["festvox-kdlpc16k_1.4.0-6.1_all.deb"], monkeypatch)
    voice = speech.load_speech("ked")
    assert_is_small(voice)
    assert f"fetched from {name}" in voice.source
    assert [path.name for path in (cache / "festvox").iterdir()] == ["kedlpc16k.group"]
    assert speech.load_voice("ked", fetch=False).source.endswith("cached")


def test_wrong_bytes_send_it_to_the_next_source_and_are_never_kept(
    files: dict[str, bytes], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(b"<html>log in first</html>", monkeypatch)
    assert speech.load_speech("ked").name == "planted"
    assert not cache.exists()
    apt(files["festvox-kdlpc16k_1.4.0-6.1_all.deb"], monkeypatch)
    assert "apt-get" in speech.load_speech("ked").source


@pytest.mark.parametrize("failure", [subprocess.TimeoutExpired("apt-get", 60), OSError("no apt"), None])
def test_a_client_that_fails_is_no_source(failure: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object, **__: object) -> None:
        if failure is not None:
            raise failure

    monkeypatch.setattr(speech.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(speech.subprocess, "run", run)
    with pytest.raises(data.MissingDataError):
        speech.load_voice("ked")


# -- the planted data


def test_planted_data_have_the_form_of_a_voice_and_are_the_same_each_time() -> None:
    first, again = planted_speech.planted(), planted_speech.planted()
    assert len(first.phones) == planted_speech.PHONES
    assert len({recording.diphone for recording in first.recordings}) == len(first.recordings)
    for recording, twin in zip(first.recordings, again.recordings, strict=True):
        assert recording.frames.shape[1] == speech.CHANNELS
        assert 0 < recording.middle < len(recording.frames)
        np.testing.assert_array_equal(recording.frames, twin.frames)


@pytest.mark.slow
@pytest.mark.parametrize(("voice", "counts"), [("ked", (1682, 20438, 46)), ("kal", (1619, 20534, 41))])
def test_the_real_voices(monkeypatch: pytest.MonkeyPatch, voice: str, counts: tuple[int, int, int]) -> None:
    monkeypatch.undo()  # the real cache
    try:
        found = speech.load_voice(voice, fetch=False)
    except data.MissingDataError as missing:
        pytest.skip(str(missing))
    assert (len(found.recordings), sum(len(r.frames) for r in found.recordings), len(found.phones)) == counts

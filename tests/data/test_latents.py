from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from ltd.config import ConfigError
from ltd.data import DataConfig, ViewConfig, build_loader, evaluation_batches
from ltd.data.index import Index, index_tar, open_index
from ltd.data.latent_join import finish_cache
from ltd.data.latent_writer import LatentCacheWriter
from ltd.data.latents import RULES, CacheIdentity, LatentCache, check_cache, check_source, read_cache_manifest
from ltd.data.row_file import RowFile
from ltd.data.windows import Window, Windows, enumerate_windows, window_starts
from ltd.data.write import encode_image

VIEWS = (ViewConfig(num_frames=5, height=24, width=32), ViewConfig(num_frames=1, height=24, width=32))


@pytest.fixture
def index(toy: Path) -> Index:
    return open_index(str(toy))


@pytest.fixture
def windows(index: Index) -> Windows:
    return enumerate_windows(index, VIEWS)


@pytest.fixture
def captioned(tmp_path: Path, write_tar: Callable[[Path, Mapping[str, bytes]], Path]) -> Index:
    """Stills with no caption, with one, and with three of unequal weight."""
    still = encode_image(np.zeros((24, 32, 3), dtype=np.uint8))
    several = [["a lot", 2.0], ["some é", 1.0], ["few", 1.0]]
    members = {"a.png": still, "b.png": still, "b.txt": b"one", "c.png": still}
    tar = write_tar(tmp_path / "captioned" / "x.tar", {**members, "c.captions.json": json.dumps(several).encode()})
    index_tar(tar)
    return open_index(str(tar))


def identity(index: Index, **fields: Any) -> CacheIdentity:
    given = {
        "autoencoder_hash": "aaaa",
        "compression": (4, 8, 8),
        "latent_channels": 3,
        "data_digest": index.digest,
        "transforms": {"flip": False, "precision": "fp32"},
        "text_encoder": "words",
        "text_encoder_hash": "tttt",
        "dtype": "fp32",
    }
    return CacheIdentity(**{**given, **fields})


def latents(window: Window) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(window.position)
    t = 1 + (window.view.num_frames - 1) // 4
    both = torch.randn(2, 3, t, 3, 4, generator=generator)
    return both[0], both[1]


def embed(caption: str) -> tuple[Tensor, Tensor]:
    words = caption.split() or ["<none>"]
    table = torch.tensor([[float(len(word)), float(ord(word[0]))] for word in words])
    padded = torch.cat([table, torch.full((2, 2), 99.0)])
    return padded, torch.tensor([True] * len(words) + [False] * 2)


def write(
    directory: Path, index: Index, windows: Windows, *, stop: int | None = None, **fields: Any
) -> LatentCacheWriter:
    world = {"global_rank": fields.pop("global_rank", 0), "world_size": fields.pop("world_size", 1)}
    shards = [str(Path(shard).resolve()) for shard in index.shards]
    writer = LatentCacheWriter(directory, identity(index, **fields), windows, shards=shards, **world)
    for window in writer.pending()[:stop]:
        captions = index.captions(window.entry)
        if writer.identity.text_encoder is not None:
            for text in writer.missing_texts(["", *(text for text, _ in captions)]):
                writer.add_text(text, *embed(text))
        mean, logvar = latents(window)
        writer.add(window, captions=captions, mean=mean, logvar=logvar)
    writer.close()
    return writer


def check_content(cache: LatentCache, index: Index, windows: list[Window], tolerance: float = 0.0) -> None:
    """Every window in a shuffled order, one call per latent shape, with neighbours in the batch."""
    assert [entry.key for entry in cache.entries] == [window.key for window in windows]
    order = np.random.default_rng(0).permutation(len(windows))
    for t in (1, 2):
        rows = order[cache.latent_shapes[order, 0] == t]
        loaded = cache.load(rows, np.zeros(len(rows)))
        assert loaded.mean.dtype == loaded.logvar.dtype == cache.dtype
        for place, row in enumerate(rows.tolist()):
            mean, logvar = latents(windows[row])
            assert torch.allclose(loaded.mean[place].float(), mean, rtol=tolerance, atol=0)
            assert torch.allclose(loaded.logvar[place].float(), logvar, rtol=tolerance, atol=0)
            assert loaded.captions[place] == index.caption(windows[row].entry)
            assert loaded.fps[place] == windows[row].fps
            assert loaded.text is not None and loaded.text_mask is not None
            expected, mask = embed(loaded.captions[place])
            text = loaded.text[place].float()
            assert torch.allclose(text[loaded.text_mask[place]], expected[mask], rtol=tolerance, atol=0)
            assert not text[~loaded.text_mask[place]].any()


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 0.0), ("bf16", 2**-8), ("fp16", 2**-10)])
def test_what_is_written_is_read(tmp_path: Path, index: Index, windows: Windows, dtype: str, tolerance: float) -> None:
    write(tmp_path / "c", index, windows, dtype=dtype)
    manifest = finish_cache(tmp_path / "c")
    cache = LatentCache(tmp_path / "c")
    check_content(cache, index, list(windows), tolerance)
    assert manifest["counts"]["windows"] == cache.num_windows == len(windows) == 13 * 2 + 11
    captions = {index.caption(entry) for entry in index.entries} | {""}
    assert manifest["counts"]["captions"] == len(captions)  # each once
    null, mask = cache.text("")
    assert null is not None and mask is not None and mask.sum() == 1
    assert torch.allclose(null[0], torch.tensor([6.0, 60.0]), rtol=2**-8)
    with pytest.raises(ValueError, match="more than one latent shape"):
        cache.load(np.array([0, len(windows) - 1]))
    for rows in ([-1], [len(windows)]):
        with pytest.raises(IndexError):
            cache.load(np.array(rows))


def test_several_captions_are_chosen_by_weight(tmp_path: Path, captioned: Index) -> None:
    windows = enumerate_windows(captioned, VIEWS, flip=True)
    assert [window.key.split("@")[0] for window in windows] == ["a", "a", "b", "b", "c", "c"]
    write(tmp_path / "c", captioned, windows)
    assert finish_cache(tmp_path / "c")["counts"]["captions"] == 5
    cache = LatentCache(tmp_path / "c")
    uniform = np.array([0.0, 0.49, 0.51, 0.74, 0.76, 0.999])
    rows = np.array([4, 4, 5, 4, 5, 4])
    assert cache.load(rows, uniform).captions == ("a lot", "a lot", "some é", "some é", "few", "few")
    assert cache.load(rows).captions == ("a lot",) * 6
    mixed = cache.load(np.array([0, 2, 4]), np.array([0.9, 0.9, 0.6]))
    assert mixed.captions == ("", "one", "some é")
    assert mixed.text is not None and mixed.text_mask is not None
    assert mixed.text_mask.tolist() == [[True, False], [True, False], [True, True]]
    assert torch.equal(mixed.text[2], embed("some é")[0][:2])
    assert cache.entries[4].caption_chars == (5, 6, 3) and not cache.entries[0].captioned

    write(tmp_path / "plain", captioned, windows, text_encoder=None, text_encoder_hash=None)
    finish_cache(tmp_path / "plain")
    plain = LatentCache(tmp_path / "plain").load(np.array([0, 2, 4]), np.array([0.9, 0.9, 0.6]))
    assert plain.captions == mixed.captions and plain.text is None and plain.text_mask is None


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
sys.path.insert(0, sys.argv[1])
import test_latents as t
from ltd.data.index import open_index
from ltd.data.latent_writer import LatentCacheWriter
from ltd.data.windows import enumerate_windows
record, count = LatentCacheWriter._record, 0
def dies(self, line):
    global count
    count += "position" in line
    if count == 12:
        os.kill(os.getpid(), signal.SIGKILL)  # the row is written, its record is not
    record(self, line)
LatentCacheWriter._record = dies
index = open_index(sys.argv[2])
t.write(Path(sys.argv[3]), index, enumerate_windows(index, t.VIEWS))
"""


def test_a_process_killed_in_the_middle_of_a_row_goes_on(
    tmp_path: Path, toy: Path, index: Index, windows: Windows
) -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(toy), str(tmp_path / "c")]
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


@pytest.mark.parametrize(
    ("fields", "differs", "message"),
    [
        ({"autoencoder_hash": "bbbb"}, "autoencoder_hash", "autoencoder_hash = aaaa, but this run has bbbb"),
        ({"text_encoder_hash": "uuuu"}, "text_encoder_hash", "text_encoder_hash = tttt, but this run has uuuu"),
        ({"data_digest": "dddd"}, "data_digest", "data_digest = [0-9a-f]{64}, but this run has dddd"),
        (
            {"transforms": {"flip": True, "precision": "fp32"}},
            "transforms",
            "made with transforms.flip = False, but this run has True; make",
        ),
        (
            {"rules": {**RULES, "filter": "nearest"}},
            "rules",
            f"made with rules.filter = {RULES['filter']}, but this run has nearest; make",
        ),
    ],
)
def test_a_cache_of_other_making_is_refused(
    tmp_path: Path, index: Index, windows: Windows, fields: dict[str, Any], differs: str, message: str
) -> None:
    write(tmp_path / "c", index, windows)
    finish_cache(tmp_path / "c")
    with pytest.raises(ConfigError, match=f"differs in .*{differs}.*identity.*; delete it"):
        write(tmp_path / "c", index, windows, **fields)
    manifest = read_cache_manifest(tmp_path / "c")
    check_cache(manifest, autoencoder_hash="aaaa", compression=(4, 8, 8), data_digest=index.digest)
    with pytest.raises(ConfigError, match=rf"{message}.* again in another directory: python tools/cache_latents.py"):
        check_cache(manifest, **fields)
    with pytest.raises(TypeError, match="'hash' is no field"):
        check_cache(manifest, hash="x")


def test_a_cache_of_older_rules_is_refused_without_being_asked(
    tmp_path: Path, index: Index, windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "c", index, windows)
    manifest = finish_cache(tmp_path / "c")
    check_cache(manifest)
    monkeypatch.setitem(RULES, "crop", "top left")
    with pytest.raises(ConfigError, match=r"rules\.crop = largest part, centre, but this run has top left"):
        check_cache(manifest)


def test_a_cache_of_tars_that_changed_is_refused(tmp_path: Path, captioned: Index) -> None:
    windows = enumerate_windows(captioned, VIEWS)
    write(tmp_path / "c", captioned, windows)
    manifest = finish_cache(tmp_path / "c")
    assert check_source(manifest)
    tar = Path(captioned.shards[0])
    with tarfile.open(tar) as archive:
        kept = {m.name: archive.extractfile(m).read() for m in archive if not m.name.startswith("b.")}  # type: ignore[union-attr]
    with tarfile.open(tar, "w") as archive:
        for name, data in kept.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    index_tar(tar)
    with pytest.raises(ConfigError, match=f"data_digest = {captioned.digest}, but this run has [0-9a-f]{{64}}; make"):
        check_source(manifest)
    tar.unlink()
    assert not check_source(manifest)


def test_the_named_window_rule_is_what_the_code_does() -> None:
    """Whoever changes where windows lie changes RULES["windows"], so that caches made before are refused."""
    starts = [window_starts(29, 5, count=count, step=step) for count in (None, 1, 3) for step in (None, 4, 9)]
    assert RULES["windows"] == "evenly spread, centred"
    assert starts == [
        [2, 7, 12, 17, 22],
        [0, 4, 8, 12, 16, 20, 24],
        [3, 12, 21],
        *[[12]] * 3,
        [4, 12, 20],
        [4, 12, 20],
        [3, 12, 21],
    ]


def test_a_damaged_or_foreign_directory_is_refused(tmp_path: Path, index: Index, windows: Windows) -> None:
    directory = tmp_path / "c"
    write(directory, index, windows)
    finish_cache(directory)
    keys = directory / "columns" / "keys.bin"
    whole = keys.read_bytes()
    keys.write_bytes(whole[:-1])
    with pytest.raises(ConfigError, match="is damaged .*keys.bin has .* bytes, needed"):
        LatentCache(directory)
    keys.write_bytes(whole)
    row = directory / "columns" / "row.npy"
    np.save(row, np.load(row) + 1)
    with pytest.raises(ConfigError, match="is damaged: a row is not in its file"):
        LatentCache(directory).load(np.arange(26))
    path = next((directory / "parts" / "00000-of-00001").glob("latents_3x2*.bin"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="is truncated: 25 rows, needed 26"):
        LatentCache(directory)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="is not empty and holds no latent cache"):
        LatentCacheWriter(tmp_path / "other", identity(index), windows)
    with pytest.raises(ConfigError, match="is no latent cache"):
        read_cache_manifest(tmp_path / "other")
    manifest = directory / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 1}))
    with pytest.raises(ConfigError, match="of format 1, needed 2; make it again"):
        LatentCache(directory)


def test_rows_that_are_not_in_memory_are_asked_for_first(
    tmp_path: Path, index: Index, windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in range(2):
        write(tmp_path / "c", index, windows, global_rank=rank, world_size=2)
    finish_cache(tmp_path / "c")
    cache = LatentCache(tmp_path / "c")
    rows = np.array([3, 20, 8, 9])
    asked: list[tuple[Path, int, int]] = []
    monkeypatch.setattr(RowFile, "request", lambda self, row, count=1: asked.append((self.path, row, count)))
    monkeypatch.setattr(RowFile, "in_memory", lambda self, row: True)
    expected = cache.load(rows)
    assert not asked
    monkeypatch.setattr(RowFile, "in_memory", lambda self, row: False)
    assert torch.equal(cache.load(rows).mean, expected.mean)
    parts = [tmp_path / "c" / "parts" / f"0000{row % 2}-of-00002" / "latents_3x2x3x4.bin" for row in rows]
    assert asked[:4] == [(path, row // 2, 1) for path, row in zip(parts, rows.tolist(), strict=True)]
    tokens = [len(caption.split()) for caption in expected.captions]
    assert [count for _, _, count in asked[4:]] == tokens


def test_the_files_of_a_cache_open_and_ask_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cache" / "part" / "x.bin"
    path.parent.mkdir(parents=True)
    values = np.arange(60_000, dtype=np.int16).reshape(5, 3, 4000)
    path.write_bytes(values.tobytes() + b"half a row")
    rows = {"num_rows": 5, "shape": (3, 4000), "dtype": np.dtype(np.int16)}
    file = RowFile(path, **rows)
    assert np.array_equal(file.rows, values) and not file.rows.flags.writeable
    file.request(1, 2)  # more than a hint only where the rows are not in memory
    for answer, known in ((1, True), (BlockingIOError(), False), (OSError(errno.EOPNOTSUPP, "cannot tell"), False)):
        monkeypatch.setattr("os.preadv", mock.Mock(side_effect=[answer]))
        assert file.in_memory(4) == known
    with pytest.raises(ConfigError, match="truncated: 5 rows, needed 6"):
        RowFile(path, **{**rows, "num_rows": 6})

    def none_left(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("mmap.mmap", none_left)
    with pytest.raises(ConfigError, match=r"cache lies in more files than a process may open; .*ulimit -n"):
        RowFile(path, **rows)


def test_threads_read_the_same_cache(tmp_path: Path, index: Index, windows: Windows) -> None:
    for rank in range(2):
        write(tmp_path / "c", index, windows, global_rank=rank, world_size=2)
    finish_cache(tmp_path / "c")
    cache = LatentCache(tmp_path / "c")
    expected = cache.load(np.arange(26))
    orders = [np.random.default_rng(seed).permutation(26) for seed in range(200)]
    with ThreadPoolExecutor(4) as pool:
        for order, loaded in zip(orders, pool.map(cache.load, orders), strict=True):
            assert torch.equal(loaded.mean, expected.mean[order])
            assert loaded.captions == tuple(expected.captions[place] for place in order)


def test_training_and_evaluation_read_the_cache_like_shards(tmp_path: Path, index: Index, windows: Windows) -> None:
    write(tmp_path / "c", index, windows)
    finish_cache(tmp_path / "c")
    config = DataConfig(shards=str(tmp_path / "c"), views=VIEWS, global_batch=8, num_workers=1)
    by_key = {window.key: window for window in windows}
    with build_loader(config, seed=0, global_rank=1, world_size=2) as loader:
        for (batch,), info in loader:
            assert batch.pixels is None and batch.mean is not None and batch.text is not None
            assert str(batch.shape) == ("2x3x4" if batch.kinds[0] == "video" else "1x3x4")
            for number, key in enumerate(batch.keys):
                assert torch.equal(batch.mean[number], latents(by_key[key])[0])
            if info.step == 8:
                break
    by_latents = dataclasses.replace(config, views=(ViewConfig(num_frames=2, height=3, width=4),))
    assert sum(int(batch.weight.sum()) for batch in evaluation_batches(by_latents, batch_size=8)) == 26
    with pytest.raises(ConfigError, match=r"data.views\[0\]: got 9x24x32, .*cached at 5x24x32 pixels"):
        build_loader(
            dataclasses.replace(config, views=(ViewConfig(num_frames=9, height=24, width=32),)),
            seed=0,
            global_rank=0,
            world_size=1,
        )


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


def test_each_sample_is_cut_to_the_view_it_is_given_to(index: Index) -> None:
    samples = [np.array([4, 2]), np.array([15])]
    windows = enumerate_windows(index, VIEWS, samples=samples, windows_per_clip=1)
    entries = [index.entries[place] for place in (4, 2, 15)]
    assert [(w.entry, w.view) for w in windows] == list(zip(entries, (VIEWS[0], VIEWS[0], VIEWS[1]), strict=True))


def test_windows_as_columns_are_the_windows_one_by_one(index: Index) -> None:
    views = (ViewConfig(num_frames=3, height=24, width=32, fps=4.0), *VIEWS)
    windows = enumerate_windows(index, views, windows_per_clip=2, window_step=3, flip=True)
    expected = []
    for view in views:
        for entry in (e for e in index.entries if e.kind == view.kind):
            for start in window_starts(entry.frames, view.span(entry.fps), count=2, step=3):
                expected += [(entry, view, start, flip) for flip in (False, True)]
    found = [(w.entry, w.view, w.placement.start, w.placement.flip) for w in windows]
    assert found == expected
    parts = list(windows[3:].by_view())
    assert sorted(w.position for part in parts for w in part) == list(range(3, len(windows)))
    assert all(len({window.view for window in part}) == 1 for part in parts)

"""What a user sees for each mistake and each kind of broken data: one message, an exit code, nothing lost."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import sample
from tools.proofs._bad_cases import DENOISER, ROOT, VIEWS, Case, Outcome, call, toy, train_toy
from tools.proofs._bad_denoisers import CASES as DENOISER_CASES
from tools.proofs._bad_metrics import CASES as METRIC_CASES
from tools.proofs.table import Proof

NAME = "bad_input"


def _damage(folder: Path, change: Callable[[str, bytes], bytes | None]) -> None:
    """Rewrite the toy tar member by member and index it again; None drops a member."""
    from ltd.data.index import index_tar

    tar = toy(folder)
    with tarfile.open(tar) as archive:
        members = [(m.name, archive.extractfile(m).read()) for m in archive if m.isfile()]  # type: ignore[union-attr]
    with tarfile.open(tar, "w") as archive:
        for name, data in members:
            kept = change(name, data)
            if kept is not None:
                info = tarfile.TarInfo(name)
                info.size = len(kept)
                archive.addfile(info, io.BytesIO(kept))
    index_tar(tar)


def _bad_counts(folder: Path) -> Outcome:
    """Report what a finished run says of its bad samples."""
    last = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    counts = ", ".join(f"{key}={value}" for key, value in last.items() if key.startswith("data/bad"))
    records = [json.loads(line) for line in (folder / "run" / "quarantine.jsonl").read_text().splitlines()]
    listed = "; ".join(f"{r['key']}: {r['cause']}: {r['message']}" for r in records[:1])
    return Outcome(0, f"trained on; {counts}; quarantine.jsonl: {listed}")


def _unknown_key(folder: Path) -> Outcome:
    return train_toy(folder, "optm.lr=1")


def _wrong_type(folder: Path) -> Outcome:
    return train_toy(folder, "optim.lr=fast")


def _missing_shards(folder: Path) -> Outcome:
    return train_toy(folder, f"data.shards={folder / 'absent'}")


def _empty_folder(folder: Path) -> Outcome:
    (folder / "train").mkdir()
    return train_toy(folder)


def _zero_bytes_tar(folder: Path) -> Outcome:
    toy(folder).write_bytes(b"")
    return train_toy(folder)


def _not_indexed(folder: Path) -> Outcome:
    tar = toy(folder)
    Path(f"{tar}.index.npz").unlink()
    return train_toy(folder)


def _truncated_tar(folder: Path) -> Outcome:
    tar = toy(folder)
    tar.write_bytes(tar.read_bytes()[:-20_000])
    return train_toy(folder)


def _short_clips(folder: Path) -> Outcome:
    toy(folder)
    return train_toy(folder, VIEWS % 33)


def _off_rule(folder: Path) -> Outcome:
    toy(folder)
    return train_toy(folder, VIEWS % 8)


def _global_batch(folder: Path) -> Outcome:
    toy(folder)
    return train_toy(folder, "parallel.accumulation=3")


def _world(folder: Path) -> Outcome:
    toy(folder)
    environment = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0"}
    with mock.patch.dict("os.environ", environment):
        return train_toy(folder, "parallel.engine=deepspeed", "parallel.sequence=2", config=DENOISER)


def _zero_bytes_video(folder: Path) -> Outcome:
    _damage(folder, lambda name, data: b"" if name.endswith("0003.mp4") else data)
    outcome = train_toy(folder, VIEWS % 9)
    return _bad_counts(folder) if outcome.code == 0 else outcome


def _broken_after_indexing(folder: Path) -> Outcome:
    tar = toy(folder)
    data = bytearray(tar.read_bytes())
    with tarfile.open(tar) as archive:
        member = next(m for m in archive if m.name.endswith("0003.mp4"))
    data[member.offset_data : member.offset_data + member.size] = bytes(member.size)
    tar.write_bytes(bytes(data))
    outcome = train_toy(folder, VIEWS % 9, steps=4)
    return _bad_counts(folder) if outcome.code == 0 else outcome


def _too_many_bad(folder: Path) -> Outcome:
    tar = toy(folder)
    data = bytearray(tar.read_bytes())
    with tarfile.open(tar) as archive:
        for member in archive:
            if member.name.endswith(".mp4"):
                data[member.offset_data : member.offset_data + member.size] = bytes(member.size)
    tar.write_bytes(bytes(data))
    return train_toy(folder, VIEWS % 9, "data.bad_window=20", steps=8)


def _missing_caption(folder: Path) -> Outcome:
    _damage(folder, lambda name, data: None if name.endswith("0002.txt") else data)
    outcome = train_toy(folder)
    return _bad_counts(folder) if outcome.code == 0 else outcome


def _not_utf8(folder: Path) -> Outcome:
    _damage(folder, lambda name, data: b"\xff\xfe caption" if name.endswith("0002.txt") else data)
    outcome = train_toy(folder)
    return _bad_counts(folder) if outcome.code == 0 else outcome


def _stale_cache(folder: Path) -> Outcome:
    """Cache latents with one autoencoder, train on them with another."""
    from tools import cache_latents

    toy(folder)
    (folder / "train").rename(folder / "shards")
    data = f"data.shards={folder / 'shards'}"
    for name, seed in (("a", 0), ("b", 1)):
        trained = train_toy(folder, data, f"run_dir={folder / name}", f"seed={seed}", steps=1)
        assert trained.code == 0, trained
    config = folder / "latents.yaml"
    config.write_text(
        f"shards: {folder / 'shards'}\nout: {folder / 'cache'}\nautoencoder: {folder / 'a'}\n"
        "text: {kind: bytes, dim: 32, max_length: 48}\nviews: [{num_frames: 9, height: 32, width: 32}]\n"
    )
    with contextlib.redirect_stdout(io.StringIO()):
        cached = call(cache_latents.main, str(config))
    assert cached.code == 0, cached
    use = (f"data.shards={folder / 'cache'}", "untrained_autoencoder=null", f"autoencoder={folder / 'b'}")
    return train_toy(folder, *use, VIEWS % 9, config=DENOISER)


def _text_width(folder: Path) -> Outcome:
    toy(folder)
    return train_toy(folder, "text.dim=16", config=DENOISER)


def _other_model(folder: Path) -> Outcome:
    toy(folder)
    first = train_toy(folder)
    assert first.code == 0, first
    return train_toy(folder, "model.channels=[16, 64]", steps=4)


def _no_checkpoint(folder: Path) -> Outcome:
    toy(folder)
    return train_toy(folder, f"resume={folder / 'elsewhere'}")


def _damaged_checkpoint(folder: Path) -> Outcome:
    toy(folder)
    first = train_toy(folder)
    assert first.code == 0, first
    shard = next((folder / "run" / "checkpoints").rglob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:1000])
    return train_toy(folder, steps=4)


def _full_disk(folder: Path) -> Outcome:
    """Let the disk fill up at the second checkpoint; the first stays whole and the run goes on from it."""
    toy(folder)
    genuine = os.fsync

    def full(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if "step-00000004" in name and name.endswith(".safetensors"):
            raise OSError(errno.ENOSPC, "No space left on device")
        genuine(descriptor)

    with mock.patch.object(os, "fsync", full):
        outcome = train_toy(folder, "checkpoint.every=2", steps=4)
    left = sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())
    again = train_toy(folder, "checkpoint.every=2", steps=4)
    return Outcome(outcome.code, f"{outcome.message} [left: {', '.join(left)}; run again: exit code {again.code}]")


def _not_finite(folder: Path) -> Outcome:
    toy(folder)
    return train_toy(folder, "optim.lr=1e30", "optim.grad_clip=null", "optim.warmup_steps=0", steps=8)


def _no_prompts(folder: Path) -> Outcome:
    return call(sample.main, str(folder), "--prompts", str(folder / "absent.txt"), "--out", str(folder / "out"))


def _not_a_run(folder: Path) -> Outcome:
    (folder / "prompts.txt").write_text("a disc\n")
    return call(sample.main, str(folder), "--prompts", str(folder / "prompts.txt"), "--out", str(folder / "out"))


CASES = (
    Case("unknown config key", _unknown_key, 2, ("optm.lr", "did you mean 'optim.lr'?")),
    Case("wrong type", _wrong_type, 2, ("optim.lr", "expected float", "'fast'")),
    Case("missing shards", _missing_shards, 2, ("data.shards", "absent", "make_shards.py")),
    Case("empty folder of shards", _empty_folder, 2, ("data.shards", "no .tar")),
    Case("zero-byte tar", _zero_bytes_tar, 2, ("data.shards", "0 bytes")),
    Case("tar without index", _not_indexed, 2, ("data.shards", "--index-only")),
    Case("truncated tar", _truncated_tar, 2, ("data.shards", "truncated", "--index-only")),
    Case("clips shorter than asked", _short_clips, 2, ("data.views", "33x32x32", "short")),
    Case("frame count off the 1 + k f rule", _off_rule, 2, ("num_frames", "got 8", "5 and 9")),
    Case("global batch that does not divide", _global_batch, 2, ("data.global_batch", "got 4", "multiple of 3")),
    Case("world size that does not divide", _world, 2, ("parallel.sequence", "world size 3")),
    Case("zero-byte video", _zero_bytes_video, 0, ("trained on", "data/bad=1", "0003")),
    Case("undecodable video", _broken_after_indexing, 0, ("trained on", "undecodable", "0003")),
    Case("too many bad samples", _too_many_bad, 2, ("data.max_bad_fraction", "bad samples")),
    Case("missing caption", _missing_caption, 0, ("trained on", "no_caption", "0002")),
    Case("caption that is not UTF-8", _not_utf8, 0, ("trained on", "caption_not_utf8", "0002")),
    Case("latent cache of another autoencoder", _stale_cache, 2, ("data.shards", "autoencoder_hash", "cache_latents")),
    Case("text encoder of another width", _text_width, 2, ("model.text_dim", "32", "16")),
    Case("checkpoint of another model", _other_model, 2, ("resume", "another model", "(64")),
    Case("no checkpoint to resume", _no_checkpoint, 2, ("resume", "elsewhere", "auto, never")),
    Case("damaged checkpoint", _damaged_checkpoint, 2, (".safetensors", "damaged")),
    Case(
        "no disk space for a checkpoint",
        _full_disk,
        1,
        ("step-00000004", "needed", "free", "left: step-00000002;", "code 0"),
    ),
    Case("loss or gradient not finite", _not_finite, 1, ("before the optimizer step", "Samples of the batch")),
    Case("missing prompt file", _no_prompts, 2, ("--prompts", "does not exist")),
    Case("sampling from something else", _not_a_run, 2, ("no whole checkpoint", "run directory")),
    *DENOISER_CASES,
    *METRIC_CASES,
)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Give a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def check(case: Case) -> tuple[Outcome, list[str]]:
    """Make a mistake and check what comes of it.

    Args:
        case: The mistake.

    Returns:
        The outcome, with paths shortened, and what is wrong with it.
    """
    with scratch() as folder:
        outcome = case.act(folder)
        message = outcome.message.replace(f"{folder}/", "").replace(str(folder), ".").replace(f"{ROOT}/", "")
        outcome = Outcome(outcome.code, message)
    wrong = [
        f"{case.name}: {text!r} is not in {outcome.message!r}" for text in case.expected if text not in outcome.message
    ]
    if outcome.code != case.code:
        wrong.append(f"{case.name}: exit code {outcome.code}, needed {case.code}: {outcome.message!r}")
    return outcome, wrong


def measure() -> Proof:
    """Make every mistake and list what each said."""
    rows, misses = [], []
    for case in CASES:
        outcome, wrong = check(case)
        rows.append([case.name, outcome.code, outcome.message.removeprefix("error: ")])
        misses += wrong
    notes = "Exit code 2: the user's to mend, before any work; 1: stopped, nothing lost; 0: the run went on."
    return Proof("Bad input gets one clear message", ["input", "exit code", "message"], rows, misses, notes)

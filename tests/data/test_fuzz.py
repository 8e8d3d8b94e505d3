from __future__ import annotations

from pathlib import Path

import pytest

from ltd.data.batch import BadSampleError
from ltd.data.decode import available_backends
from ltd.data.index import index_tar
from tools.proofs import fuzz
from tools.proofs._fuzz_files import media_seeds, mutate, tar_seeds
from tools.proofs.fuzz import Outcome
from tools.proofs.memory import GROWTH_LIMIT_MB, soak_in_process


def check(outcomes: dict[str, Outcome], files: int) -> None:
    faults = [fault for outcome in outcomes.values() for fault in outcome.faults]
    assert not faults, "\n".join(faults)
    assert sum(outcome.files for outcome in outcomes.values()) == files
    for outcome in outcomes.values():  # damage that leaves everything readable, or nothing, would test nothing
        assert 0.1 < outcome.results["undecodable"] / outcome.files < 0.9
        assert outcome.results["read"] / outcome.files > 0.1


@pytest.mark.parametrize("backend", available_backends())
def test_damaged_media_are_read_or_refused(backend: str) -> None:
    check(fuzz.fuzz(backend, 1200), 1200)


def test_damaged_tars_are_read_or_refused() -> None:
    outcomes = fuzz.fuzz("tar", 120)
    assert not outcomes["tar"].faults, "\n".join(outcomes["tar"].faults)
    assert outcomes["tar"].results["read in part"] > 20


def test_whole_files_are_read() -> None:
    for name, data in media_seeds().items():
        for backend in available_backends():
            assert fuzz._read_media(data, name.rsplit(".", 1)[1], 0, backend) == "read", name


def test_a_damaged_file_is_a_function_of_its_number() -> None:
    seeds = media_seeds()
    made = [mutate(seeds, number) for number in range(96)]
    assert made == [mutate(seeds, number) for number in range(96)]
    assert {name for name, _, _ in made} == set(seeds)
    assert len({damage for _, damage, _ in made}) == 8
    assert sum(data == seeds[name] for name, _, data in made) < 5


def test_tricks_in_tars_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    for name in ("tricks.tar", "links.tar"):
        (folder / name).write_bytes(tar_seeds()[name])
        entries, bad = index_tar(folder / name)
        keys = {entry.key for entry in entries}
        assert {"000", "001", "002", "003"} <= keys
        assert not any(".." in key or key.startswith("/") or "\\" in key for key in keys)
        assert len(bad) >= 6 and {record.cause for record in bad} <= {"unsafe_name", "no_media"}
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 4 and all(path.parent == folder for path in written)


@pytest.mark.parametrize(
    ("error", "fault"),
    [(ZeroDivisionError("x"), "ZeroDivisionError"), (BadSampleError("odd", "x"), "unknown cause odd")],
)
def test_other_errors_are_faults(error: Exception, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(fuzz, "probe", fail)
    assert fault in fuzz._read_media(b"x", "mp4", 0, "pyav")


def test_a_crash_is_seen_and_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that dies at file 3, by a signal, and whose successor lives."""
    script = (
        "import json, os, signal, sys\n"
        "for n in range(int(sys.argv[1]), 6):\n"
        "    print(json.dumps([n, 'a.mp4', 'cut']), flush=True)\n"
        "    n == 3 and os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    print(json.dumps([n, 'a.mp4', 'cut', 'read']), flush=True)\n"
    )
    run = fuzz.subprocess.run

    def other(command: list[str], **options: object) -> object:
        return run([command[0], "-c", script, command[4]], **options)  # type: ignore[call-overload]

    monkeypatch.setattr(fuzz.subprocess, "run", other)
    outcome = fuzz.fuzz("pyav", 6)["mp4"]
    assert outcome.files == 6
    assert outcome.faults == ["file 3 (a.mp4, cut): process ended: code -11"]


@pytest.mark.slow
@pytest.mark.parametrize("backend", available_backends())
def test_memory_stays_flat(backend: str) -> None:
    curve = soak_in_process(backend, (500, 2000))  # type: ignore[arg-type]
    assert curve[2000] - curve[500] < GROWTH_LIMIT_MB

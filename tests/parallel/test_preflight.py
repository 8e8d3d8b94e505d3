"""What preflight refuses and whom it names: on written-down times, and on processes that differ."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from ltd.parallel.preflight import code_digests, outliers, package_versions

ROOT = Path(__file__).resolve().parents[2]
HOSTS = ["a", "a", "b", "b"]
EVEN = [0.1] * 4


def times(**changes: list[float]) -> dict[str, list[float]]:
    return {"matmul": EVEN, "all_reduce": [9.0, 1.0, 1.0, 1.0], "link": EVEN, "storage": EVEN, **changes}


def test_outliers_are_named_with_their_host() -> None:
    assert outliers(times(matmul=[0.1, 0.12, 0.31, 0.25]), HOSTS) == [
        "host b (processes 2-3): matrix products 2.6 times slower than the median (310.0 against 120.0 ms)"
    ]


def test_the_slower_of_two_processes_is_named() -> None:
    two = {kind: [0.1, 0.1] for kind in times()} | {"storage": [0.1, 0.3]}
    (found,) = outliers(two, ["a", "b"])
    assert found.startswith("host b (process 1): storage 3.0 times slower")


def test_a_slow_link_is_named_by_its_ends() -> None:
    (found,) = outliers(times(link=[0.5, 0.1, 0.1, 0.1]), HOSTS)
    assert found.startswith("link from process 3 (host b) to process 0 (host a) 5.0 times slower")


@pytest.mark.parametrize("storage", [[0.1, 0.1, 0.1, 0.19], [1e-4, 1e-4, 1e-4, 1.5e-3]], ids=["ratio", "floor"])
def test_noise_is_not_named(storage: list[float]) -> None:
    assert outliers(times(storage=storage), HOSTS) == []


def test_code_and_packages_are_covered() -> None:
    files = code_digests()
    name = "ltd/parallel/preflight.py"
    assert files[name] == hashlib.sha256((ROOT / name).read_bytes()).hexdigest()
    assert {f"ltd/{path.relative_to(ROOT / 'ltd')}" for path in (ROOT / "ltd").rglob("*.py")} <= files.keys()
    assert package_versions()["torch"] == version("torch")


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("preflight")
    out = folder / "out.json"
    command = [sys.executable, "-m", "tests.parallel.preflight_worker", str(out), str(folder / "worlds")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    # torch looks up its peer's name as it connects; a name service that does not answer costs 5 s otherwise.
    environment["RES_OPTIONS"] = "timeout:1 attempts:1"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return json.loads(out.read_text())


@pytest.mark.dist
@pytest.mark.slow
def test_equal_processes_pass_and_are_measured(cases: dict[str, Any]) -> None:
    case = cases["equal"]
    assert case["codes"] == [0, 0]
    assert case["files"] == ["rates0.json", "rates1.json"], "it leaves no file of its own"
    first, second = case["rates"]
    del first["took_s"], second["took_s"]
    assert first == second, "the figures are of the run, not of a process"
    for kind in ("matmul_tflops", "all_reduce_gb_per_s", "link_gb_per_s", "storage_gb_per_s"):
        assert 0 < first[f"preflight/{kind}_worst"] <= first[f"preflight/{kind}"]
    assert 1e-3 < first["preflight/matmul_tflops"] < 10 and 1e-2 < first["preflight/storage_gb_per_s"] < 100


@pytest.mark.dist
@pytest.mark.slow
def test_delayed_process_is_named(cases: dict[str, Any]) -> None:
    case = cases["delayed"]
    assert case["codes"] == [0, 0, 0, 0], "slow is not fatal"
    said = case["logs"][0]
    assert "host node1 (process 1): matrix products" in said
    assert "host node2 (process 2): storage" in said
    assert "link from process 3 (host node3) to process 0 (host node0)" in said
    assert said.count("WARNING preflight") >= 3
    assert not any("preflight" in log for log in case["logs"][1:]), "said once, by the main process"


DIFFERENCES = {
    "configuration": "configuration is aaaaaaaaaaaa on process 0 (host node0) and cccccccccccc on process 1",
    "package": f"torch is {version('torch')} on processes 0-1 (host node0) and 2.12.0 on process 2 (host node1)",
    "code": "on processes 1-2 (host node0, node1) and ffffffffffff on process 0 (host node0)",
    "directory": "is of no use to process 1 (host node0): a file that process 0 wrote there does not appear",
    "full": "is of no use to process 1 (host node0): [Errno 27] File too large",
}


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("name", DIFFERENCES)
def test_difference_ends_all_with_one_message(cases: dict[str, Any], name: str) -> None:
    case = cases[name]
    assert set(case["codes"]) == {2}
    for log in case["logs"]:
        assert log.count("error: ") == 1 and DIFFERENCES[name] in log
    assert case["files"] == []
    if name == "code":
        assert "ltd/nn/norm.py is " in case["logs"][0] and "code is" not in case["logs"][0]

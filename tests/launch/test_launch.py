"""The command each launcher would run, seen by a stand-in for the Python interpreter."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ARGUMENTS = ["configs/debug/denoiser.yaml", "optim.lr=1e-3", "run_dir=runs/a b"]

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="launch scripts need bash")


def launched(tmp_path: Path, script: str, **environment: str) -> tuple[list[str], dict[str, str]]:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nfor x in "$@"; do echo "arg $x"; done\nenv | sed "s/^/env /"\n')
    python.chmod(0o755)
    kept = {"PATH": os.environ["PATH"], "PYTHON": str(python), "NPROC": "2", **environment}
    done = subprocess.run(
        [str(ROOT / "launch" / script), *ARGUMENTS], env=kept, capture_output=True, text=True, timeout=30, check=True
    )
    lines = done.stdout.splitlines()
    arguments = [line[4:] for line in lines if line.startswith("arg ")]
    return arguments, dict(line[4:].split("=", 1) for line in lines if line.startswith("env ") and "=" in line)


def test_torchrun(tmp_path: Path) -> None:
    arguments, environment = launched(tmp_path, "torchrun.sh", MAX_RESTARTS="3")
    expected = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "3", "train.py", *ARGUMENTS]
    assert arguments == ["-m", "torch.distributed.run", *expected]
    assert environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert int(environment["OMP_NUM_THREADS"]) >= 1


@pytest.mark.parametrize("script", ["torchrun.sh", "torchrun_multinode.sh", "deepspeed_hostfile.sh"])
def test_another_program(tmp_path: Path, script: str) -> None:
    settings = {"NUM_NODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "10.0.0.1", "HOSTFILE": "hosts.txt"}
    arguments, _ = launched(tmp_path, script, PROGRAM="sample.py", **settings)
    assert arguments[-4:] == ["sample.py", *ARGUMENTS] and "train.py" not in arguments


@pytest.mark.parametrize(("rank", "is_host"), [("0", "true"), ("1", "false")])
def test_torchrun_on_many_hosts(tmp_path: Path, rank: str, is_host: str) -> None:
    settings = {"NUM_NODES": "2", "NODE_RANK": rank, "MASTER_ADDR": "10.0.0.1", "LOCAL_ADDR": "10.0.0.2", "IFACE": "x0"}
    arguments, environment = launched(tmp_path, "torchrun_multinode.sh", **settings)
    assert arguments[arguments.index("--rdzv-conf") + 1] == f"is_host={is_host}"
    assert arguments[arguments.index("--rdzv-endpoint") + 1] == "10.0.0.1:29500"
    assert arguments[arguments.index("--local-addr") + 1] == "10.0.0.2"
    assert environment["GLOO_SOCKET_IFNAME"] == environment["NCCL_SOCKET_IFNAME"] == "x0"
    assert arguments[-4:] == ["train.py", *ARGUMENTS]


def test_deepspeed_without_ssh(tmp_path: Path) -> None:
    settings = {"HOSTFILE": "hosts.txt", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"}
    arguments, _ = launched(tmp_path, "deepspeed_hostfile.sh", **settings)
    # Without --no_local_rank the launcher would put --local_rank=N in front of the configuration.
    assert "--no_local_rank" in arguments and "--no_ssh" in arguments
    assert arguments[arguments.index("--node_rank") + 1] == "1"
    assert arguments[-4:] == ["train.py", *ARGUMENTS]


def test_missing_variable_is_named(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        launched(tmp_path, "torchrun_multinode.sh", NUM_NODES="2")
    assert "set NODE_RANK" in caught.value.stderr


def test_scripts_hold_no_hyper_parameters() -> None:
    for script in (ROOT / "launch").glob("*.sh"):
        subprocess.run(["bash", "-n", str(script)], check=True)
        assert "optim." not in script.read_text() and "data." not in script.read_text()

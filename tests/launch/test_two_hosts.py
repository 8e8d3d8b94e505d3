"""Two network namespaces as hosts, each with its own launcher: one run, as on one host."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.proofs import _runs
from tools.proofs._hosts import TwoHosts, missing

STEPS = 10
pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.fixture(autouse=True)
def _namespaces() -> None:
    if reason := missing():
        pytest.skip(reason)


def test_two_hosts_train_as_one(tmp_path: Path) -> None:
    settings = [*_runs.make_data(tmp_path / "toy"), f"steps={STEPS}", "evaluation.every=0", "parallel.timeout_s=60"]
    config = "configs/debug/denoiser.yaml"
    with TwoHosts(tmp_path) as hosts:
        processes = []
        for host, address in enumerate(hosts.addresses):
            env = {"NUM_NODES": "2", "NODE_RANK": str(host), "MASTER_ADDR": hosts.addresses[0], "NPROC": "1"}
            env |= {"LOCAL_ADDR": address, "IFACE": hosts.interface, "OMP_NUM_THREADS": "1"}
            command = ["launch/torchrun_multinode.sh", config, f"run_dir={tmp_path / 'two'}", *settings]
            processes.append(hosts.start(host, command, env, f"{host}.log"))
        codes = [process.wait(timeout=120) for process in processes]
        output = "\n".join((tmp_path / f"{host}.log").read_text() for host in (0, 1))
        assert codes == [0, 0], output[-3000:]
    # The world has a process of each host, and the run is that of two processes on one.
    assert "2 per process x 2 processes" in output
    _runs.start(2, [config, f"run_dir={tmp_path / 'one'}", *settings], tmp_path / "one.log").wait()
    assert len(_runs.rows(tmp_path / "two")) == STEPS
    assert _runs.different_rows(tmp_path / "one", tmp_path / "two") == []
    different, number = _runs.different_shards(tmp_path / "one", tmp_path / "two", STEPS)
    assert different == [] and number >= 2

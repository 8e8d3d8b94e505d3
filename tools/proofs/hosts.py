"""Two hosts with addresses of their own: train, lose one, say which, resume; lose a process, restart by itself."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ltd import storage
from tools.proofs import _runs
from tools.proofs._hosts import TwoHosts, missing
from tools.proofs.table import Cell, Proof

NAME = "hosts"
TITLE = "Two hosts"
COLUMNS = ("case", "launcher", "what was seen", "rows that differ", "shards that differ", "verdict")
STEPS = 60
#: parallel.timeout_s of the runs, and the seconds after which a launcher without processes is ended.
TIMEOUT_S, GRACE_S = 15, 10
_WAIT_S = 240.0
NOTES = """Two network namespaces with an address and a host name of their own, joined by one virtual cable; gloo, one
CPU process per host, one file system, `configs/debug/denoiser.yaml` for 60 steps with a checkpoint every 10. Every run
is compared with the same run of two processes on one host: rows of `metrics.jsonl` without their clocks, and bytes of
the last checkpoint's shards. The deepspeed launcher is started on each host without ssh.

What each process printed when the second host was cut off (`parallel.timeout_s` {timeout}, launchers ended {grace} s
after their last process):

```
{excerpt}
```
"""


@dataclass(frozen=True)
class Bench:
    """What every case needs."""

    folder: Path
    hosts: TwoHosts
    #: Overrides of all runs, and the run on one host.
    common: list[str]
    whole: Path

    def launch(self, script: str, run_dir: Path, tag: str, **env: str) -> list[subprocess.Popen[bytes]]:
        """Start a script of ``launch/`` on both hosts."""
        processes = []
        for host, address in enumerate(self.hosts.addresses):
            settings = {"NUM_NODES": "2", "NODE_RANK": str(host), "MASTER_ADDR": self.hosts.addresses[0]}
            settings |= {"LOCAL_ADDR": address, "IFACE": self.hosts.interface, "NPROC": "1", "OMP_NUM_THREADS": "1"}
            settings |= {"LAUNCHER_GRACE_S": str(GRACE_S), "GLOO_SOCKET_IFNAME": self.hosts.interface, **env}
            command = [f"launch/{script}", _runs.DEBUG_CONFIG, f"run_dir={run_dir}", *self.common]
            processes.append(self.hosts.start(host, command, settings, f"{tag}-{host}.log"))
        return processes

    def output(self, tag: str, host: int) -> str:
        """Read what a host printed."""
        return (self.folder / f"{tag}-{host}.log").read_text(errors="replace")

    def compare(self, run_dir: Path) -> tuple[int, int]:
        """Count rows and shards that differ from the run on one host."""
        shards, _ = _runs.different_shards(self.whole, run_dir, STEPS)
        return len(_runs.different_rows(self.whole, run_dir)), len(shards)


def measure() -> Proof:
    """Run every case.

    Returns:
        The table; one line that says why, where namespaces cannot be made.
    """
    reason = missing()
    if reason:
        return Proof(TITLE, ("not measured",), [(reason,)], [f"not measured: {reason}"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with TwoHosts(folder) as hosts:
            common = [*_runs.make_data(folder / "toy"), f"steps={STEPS}", "checkpoint.every=10", "evaluation.every=0"]
            common += [f"parallel.timeout_s={TIMEOUT_S}", "parallel.slow_s=5"]
            whole = folder / "whole"
            _runs.start(2, [_runs.DEBUG_CONFIG, f"run_dir={whole}", *common], folder / "whole.log").wait()
            bench = Bench(folder, hosts, common, whole)
            rows = [together(bench), *cut_off(bench), restarted(bench), deepspeed(bench)]
            excerpt = "\n".join(
                f"host-{'ab'[host]}: {line}" for host in (0, 1) for line in _said(bench.output("cut", host))
            )
    misses = [f"{row[0]}: {row[2]}" for row in rows if row[-1] != "holds"]
    return Proof(TITLE, COLUMNS, rows, misses, NOTES.format(timeout=TIMEOUT_S, grace=GRACE_S, excerpt=excerpt))


def together(bench: Bench) -> tuple[Cell, ...]:
    """Train to the end on both hosts."""
    run_dir = bench.folder / "together"
    codes = _finish(bench.launch("torchrun_multinode.sh", run_dir, "together"))
    return _row(bench, "train to the end", "torchrun, c10d", f"exit codes {codes}", run_dir, codes == [0, 0])


def cut_off(bench: Bench) -> list[tuple[Cell, ...]]:
    """Pull the cable of the second host, see both end and say why; put it back and resume."""
    run_dir = bench.folder / "cut"
    processes = bench.launch("torchrun_multinode.sh", run_dir, "cut")
    _wait_for(lambda: storage.checkpoint_path(run_dir, 20).is_dir(), "a checkpoint")
    bench.hosts.cut()
    began = time.monotonic()
    codes = _finish(processes)
    seconds = time.monotonic() - began
    left = bench.hosts.pids(0) + bench.hosts.pids(1)
    named = "host host-b" in bench.output("cut", 0), "does not answer" in bench.output("cut", 1)
    seen = f"host a names process 1 on host-b: {named[0]}; host b names the store's host: {named[1]}; "
    seen += f"all ended within {seconds:.0f} s, exit codes {codes}, {len(left)} processes left"
    holds = all(named) and all(codes) and not left and seconds < 4 * TIMEOUT_S + GRACE_S
    bench.hosts.mend()
    codes = _finish(bench.launch("torchrun_multinode.sh", run_dir, "resumed"))
    return [
        ("second host cut off", "torchrun, c10d", seen, None, None, "holds" if holds else "FAILS"),
        _row(bench, "cable back, same command", "torchrun, c10d", f"exit codes {codes}", run_dir, codes == [0, 0]),
    ]


def restarted(bench: Bench) -> tuple[Cell, ...]:
    """Kill the process on the second host; the launchers start both anew and training resumes."""
    run_dir = bench.folder / "restarted"
    processes = bench.launch("torchrun_multinode.sh", run_dir, "restarted", MAX_RESTARTS="2", LAUNCHER_GRACE_S="200")
    _wait_for(lambda: storage.checkpoint_path(run_dir, 20).is_dir(), "a checkpoint")
    for pid in bench.hosts.pids(1):
        command = _command(pid)
        launcher = "torch.distributed.run" in command or "launch/" in command
        if f"run_dir={run_dir}" in command and not launcher:
            os.kill(pid, signal.SIGKILL)
    codes = _finish(processes)
    told = "process 1" in bench.output("restarted", 0)
    seen = f"SIGKILL of the process on host-b; the other names it: {told}; exit codes {codes}"
    return _row(bench, "process killed, restarted", "torchrun, c10d", seen, run_dir, told and codes == [0, 0])


def deepspeed(bench: Bench) -> tuple[Cell, ...]:
    """Train to the end under the deepspeed launcher."""
    run_dir, hostfile = bench.folder / "deepspeed", bench.folder / "hosts.txt"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in bench.hosts.addresses))
    codes = _finish(bench.launch("deepspeed_hostfile.sh", run_dir, "deepspeed", HOSTFILE=str(hostfile)))
    return _row(bench, "train to the end", "deepspeed, hostfile", f"exit codes {codes}", run_dir, codes == [0, 0])


def _row(bench: Bench, case: str, launcher: str, seen: str, run_dir: Path, ended_well: bool) -> tuple[Cell, ...]:
    if not ended_well:
        return case, launcher, seen, None, None, "FAILS"
    rows, shards = bench.compare(run_dir)
    return case, launcher, seen, rows, shards, "FAILS" if rows or shards else "holds"


def _finish(processes: list[subprocess.Popen[bytes]]) -> list[int]:
    """Wait for both hosts' launchers; one that does not end is killed and shows as such."""
    codes = []
    for process in processes:
        try:
            codes.append(process.wait(timeout=_WAIT_S))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            codes.append(-9)
    return codes


def _wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _WAIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} was never reached")
        time.sleep(0.02)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _said(output: str) -> list[str]:
    """Pick what the training processes and the launch script said themselves."""
    lines = [line for line in output.splitlines() if re.match(r"(\d\d:\d\d:\d\d (WARNING|ERROR)|error:)", line)]
    kept = [line for line in lines if "data" not in line or "process" in line]
    return [
        re.sub(r"/\S*/", "", line)[:240] for line in kept if "untrained" not in line and "shards is null" not in line
    ]

"""Two "hosts" on one machine: network namespaces with addresses and host names of their own, joined by one cable."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parents[2]
_PREFIX = "ltdhost"


def missing() -> str:
    """Say what keeps this machine from making hosts; empty where nothing does."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not all(shutil.which(tool) for tool in ("ip", "unshare")):
        return "network namespaces need the commands ip and unshare"
    name = f"{_PREFIX}{os.getpid()}p"
    probe = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return "" if probe.returncode == 0 else f"network namespaces are refused here: {probe.stderr.strip()}"


class TwoHosts:
    """A cable with a host at each end; everything is gone when the block is left.

    Args:
        log_dir: Folder of the hosts' output files.
    """

    #: Address of each host.
    addresses = ("10.231.77.1", "10.231.77.2")
    #: Interface of each host.
    interface = "eth0"

    def __init__(self, log_dir: Path) -> None:
        self.log_dir = log_dir
        self._names = [f"{_PREFIX}{os.getpid()}{end}" for end in "ab"]

    def __enter__(self) -> TwoHosts:
        for name in [*_left_over(), *self._names]:
            _remove(name)
        for name in self._names:
            _ip("netns", "add", name)
        cables = [f"ltd{os.getpid()}{end}" for end in "ab"]
        _ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
        for name, cable, address in zip(self._names, cables, self.addresses, strict=True):
            _ip("link", "set", cable, "netns", name)
            _ip("-n", name, "link", "set", cable, "name", self.interface)
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", self.interface)
            _ip("-n", name, "link", "set", self.interface, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in self._names:
            _remove(name)

    def start(self, host: int, command: Sequence[str], env: Mapping[str, str], log: str) -> subprocess.Popen[bytes]:
        """Start a command on a host.

        Args:
            host: 0 or 1.
            command: Command and arguments, run in the repository.
            env: Variables added to the environment.
            log: Name of the output file, overwritten.

        Returns:
            The process.
        """
        inside = f'hostname host-{"ab"[host]} && exec "$@"'
        whole = ["ip", "netns", "exec", self._names[host], "unshare", "--uts", "sh", "-c", inside, "sh", *command]
        with (self.log_dir / log).open("wb") as file:
            return subprocess.Popen(
                whole,
                cwd=ROOT,
                env={**os.environ, **env},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def cut(self) -> None:
        """Pull the cable out of the second host."""
        _ip("-n", self._names[1], "link", "set", self.interface, "down")

    def mend(self) -> None:
        """Put the cable back."""
        _ip("-n", self._names[1], "link", "set", self.interface, "up")

    def pids(self, host: int) -> list[int]:
        """List the processes on a host."""
        return _pids(self._names[host])


def _left_over() -> list[str]:
    """List hosts of processes that ended without removing them."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    owners = {match[0]: match[1] for match in re.finditer(rf"^{_PREFIX}(\d+)[a-z]", listed, re.MULTILINE)}
    return [name for name, pid in owners.items() if not Path(f"/proc/{pid}").exists()]


def _pids(name: str) -> list[int]:
    found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


def _remove(name: str) -> None:
    """Kill what runs on a host and remove it, if it exists."""
    for pid in _pids(name):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)

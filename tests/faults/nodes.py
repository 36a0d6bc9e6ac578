"""A Ray cluster of real processes on this machine: a head that has no room for work, and nodes that are killed whole.

A node is `ray start --block` with an address (127.x.y.z), ports and a folder of its own. It is in a session of its own, which
none of its processes leaves, its workers among them: so all of a node is known, and killed, at once.
"""

from __future__ import annotations

import os
import random
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tests.pipeline.driver import SECONDS, die_with_the_tests, next_line
from tests.pipeline.world import environment

PORTS = [
    "object-manager-port",
    "node-manager-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
]
STORE_BYTES = 80_000_000


class Node:
    """One node; it is up after `wait_until_up`."""

    def __init__(self, address: str, folder: Path, variables: dict[str, str], arguments: list[str]):
        wanted = [*PORTS, "ray-client-server-port"] if "--head" in arguments else PORTS
        ports = [f"--{name}={port}" for name, port in zip(wanted, _free_ports(address, len(wanted)), strict=True)]
        common = ["--node-ip-address", address, "--temp-dir", str(folder), "--num-gpus=0", "--object-store-memory", str(STORE_BYTES)]
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--min-worker-port=0", "--max-worker-port=0", *common]
        self.process = subprocess.Popen(
            [*command, *ports, *arguments],
            env=environment() | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_the_tests,
        )
        self.session = self.process.pid
        self.said = b""

    def wait_until_up(self) -> None:
        """Raises AssertionError with what it said when it ends instead, or takes too long."""
        assert self.process.stdout is not None
        try:
            while b"--block" not in self.said:  # the first word of what it says last
                self.said += next_line(self.process, self.process.stdout.fileno())
        except AssertionError as error:
            raise AssertionError(f"{error}; it said:\n{self.said.decode()}") from None

    def kill(self) -> None:
        """SIGKILL to every process of the node; none lives when this returns."""
        while alive := processes(self.session):
            for pid in alive:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for pid in alive:
                with suppress(ProcessLookupError):
                    handle = os.pidfd_open(pid)
                    assert select.select([handle], [], [], SECONDS)[0], f"process {pid} does not end"
                    os.close(handle)
        self.process.wait()


class Nodes:
    """The cluster. `address` is for --ray.address, `variables` are for the driver's environment."""

    def __init__(self, folder: Path):
        # a token of its own: Ray takes the user's where there is one, and asks for one where there is none
        self.variables = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex, "PYTHONUNBUFFERED": "1"}
        self._folder, self._network = folder, "127." + ".".join(str(random.SystemRandom().randint(1, 250)) for _ in range(2))
        self._started: list[Node] = []

    def start_head(self) -> None:
        self._start("--head", "--port=0", "--num-cpus=0", "--include-dashboard=false").wait_until_up()
        self.address = re.search(rb"--address='([^']+)'", self._started[0].said)[1].decode()  # type: ignore[index]

    def start(self, count: int = 1) -> list[Node]:
        """So many more nodes, each with room for one worker."""
        nodes = [self._start("--num-cpus=1", "--address", self.address) for _ in range(count)]
        for node in nodes:
            node.wait_until_up()
        return nodes

    def of(self, pid: int) -> Node:
        """The node that a process belongs to."""
        session = os.getsid(pid)
        return next(node for node in self._started if node.session == session)

    def stop(self) -> None:
        for node in self._started:
            node.kill()

    def _start(self, *arguments: str) -> Node:
        number = len(self._started) + 1
        self._started.append(Node(f"{self._network}.{number}", self._folder / str(number), self.variables, list(arguments)))
        return self._started[-1]


@contextmanager
def nodes(count: int) -> Iterator[Nodes]:
    """A head and so many nodes. Whatever happens, none of their processes and files is left at the end."""
    folder = Path(tempfile.mkdtemp(prefix="nodes-", dir="/tmp"))  # short: Ray's sockets are in it, and their names have a limit
    cluster = Nodes(folder)
    try:
        cluster.start_head()
        cluster.start(count)
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder)


def processes(session: int) -> list[int]:
    """Processes of a session that live."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, of = path.read_text().rpartition(")")[2].split()[:4]
            if int(of) == session and state not in "ZX":
                found.append(int(path.parent.name))
    return found


def _free_ports(address: str, count: int) -> list[int]:
    with ExitStack() as stack:
        taken = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in taken:
            one.bind((address, 0))
        return [one.getsockname()[1] for one in taken]

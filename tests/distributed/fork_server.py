"""A process with everything imported that forks commands and ranks, because a start costs seconds.

What it forks is the product's own code: `drumline …` with the real supervisor, and real ranks on
real gloo. Only torchrun is stood in for, by a client of this file that asks for the ranks; runs
through torchrun itself are in test_runs.py.

    python fork_server.py serve SOCKET [MODULE…]           the server, and what it imports beforehand
    python fork_server.py launch SOCKET WORLD ARGUMENTS…   what the supervisor starts in torchrun's place
"""

import array
import contextlib
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_OF_A_RUN = ("drumline.train.worker", "drumline.train.loop", "drumline.session.train_here")
ROOT = Path(__file__).resolve().parents[2]
SOURCES = f"{ROOT}/toolkit:{ROOT}/launchers"


class ForkServer:
    """The server, seen from a test."""

    def __init__(self, folder: Path, *modules: str) -> None:
        self._socket = str(folder / "socket")
        env = {**os.environ, "PYTHONPATH": f"{SOURCES}:{ROOT}/tests/distributed", "OMP_NUM_THREADS": "1",
               "OPENBLAS_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # fmt: skip
        command = [sys.executable, __file__, "serve", self._socket, *modules]
        self._server = subprocess.Popen(command, env=env, start_new_session=True)
        deadline = time.monotonic() + 120
        while not os.path.exists(self._socket):
            assert self._server.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)

    def drumline(
        self,
        folder: Path,
        *arguments: str,
        faults: list[dict[str, Any]] | None = None,
        err: int | None = None,
    ) -> "Child":
        """`drumline ARGUMENTS` in a folder, with faults planted in its ranks (see faults.py).

        `err`: a descriptor for standard error, instead of a file.
        """
        folder.mkdir(parents=True, exist_ok=True)
        env = {
            **os.environ,
            "DRUMLINE_TEST_FAULTS": json.dumps(faults or []),
            "FORK_SERVER": self._socket,
        }
        return Child(self._socket, "drumline", list(arguments), folder, env, err)

    def run(
        self, folder: Path, *arguments: str, timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """`drumline ARGUMENTS` in a folder, to its end."""
        child = self.drumline(folder, *arguments)
        try:
            code = child.wait(timeout)
        finally:
            child.end()
        return subprocess.CompletedProcess(list(arguments), code, child.out, child.err)

    def program(
        self, kind: str, argv: list[str], folder: Path, env: dict[str, str], log: int
    ) -> tuple[socket.socket, int]:
        """Fork a process that runs one of PROGRAMS; the connection tells its exit code."""
        return ask(self._socket, kind, argv, str(folder), env, [log, log])

    def close(self) -> None:
        """End the server, and nothing else."""
        self._server.kill()
        self._server.wait()


class Child:
    """A forked process: its number, its exit code, what it printed."""

    def __init__(
        self,
        server: str,
        kind: str,
        argv: list[str],
        folder: Path,
        env: dict[str, str],
        err: int | None,
    ) -> None:
        self._out = (folder / f".out-{time.monotonic_ns()}").open("w+")
        self._err = (folder / f".err-{time.monotonic_ns()}").open("w+")
        fds = [self._out.fileno(), self._err.fileno() if err is None else err]
        self._connection, self.pid = ask(server, kind, argv, str(folder), env, fds)

    def wait(self, timeout: float = 60) -> int:
        """The exit code; negative for the signal that killed it."""
        self._connection.settimeout(timeout)
        return int(self._connection.recv(64).decode())

    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return not select.select([self._connection], [], [], 0)[0]

    def end(self) -> None:
        """Kill it if a test has failed before it ended; its ranks follow it."""
        if self.is_running():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    @property
    def out(self) -> str:
        """Standard output so far."""
        return Path(self._out.name).read_text()

    @property
    def err(self) -> str:
        """Standard error so far."""
        return Path(self._err.name).read_text()


def ask(
    server: str, kind: str, argv: list[str], cwd: str, env: dict[str, str], fds: list[int]
) -> tuple[socket.socket, int]:
    """A connection that will tell the exit code, and the process's number."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(server)
    request = json.dumps({"kind": kind, "argv": argv, "cwd": cwd, "env": env}).encode()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
    connection.sendmsg([len(request).to_bytes(8, "little")], rights)
    connection.sendall(request)
    return connection, int(connection.recv(16).decode())


def serve(path: str, modules: list[str]) -> None:
    """Import everything, then fork on request and tell how each child ended."""
    from drumline.cli import COMMANDS

    commands = [f"drumline.cli.{name}" for name in sorted(set(COMMANDS.values()))]
    for module in ("transformers.models.llama.modeling_llama", *commands, *_OF_A_RUN, *modules):
        importlib.import_module(module)

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path + ".new")
    listener.listen(64)
    os.rename(path + ".new", path)
    children: dict[int, socket.socket] = {}
    while True:
        if select.select([listener], [], [], 0.01)[0]:
            connection, _ = listener.accept()
            head, ancillary, _, _ = connection.recvmsg(8, socket.CMSG_SPACE(16))
            fds = array.array("i")
            fds.frombytes(ancillary[0][2])
            size = int.from_bytes(head, "little")
            request = json.loads(connection.recv(size, socket.MSG_WAITALL))
            pid = os.fork()
            if pid == 0:
                listener.close()
                connection.close()
                for other in children.values():
                    other.close()
                become(request, list(fds))
            for fd in fds:
                os.close(fd)
            children[pid] = connection
            connection.sendall(str(pid).encode())
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    break
                connection = children.pop(pid)
                with contextlib.suppress(OSError):
                    connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
                connection.close()


def become(request: dict[str, Any], fds: list[int]) -> None:
    """In the forked child: be the command or the rank, and end."""
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"])
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, fd in enumerate(fds, start=1):
            os.dup2(fd, number)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
        code = PROGRAMS[request["kind"]](request)
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def be_command(request: dict[str, Any]) -> int:
    """The real command line; its launcher asks this server for ranks."""
    import drumline_launchers
    from drumline.cli import main as drumline
    from drumline_launchers.base import WORKER_ENVIRONMENT, Command, worker_arguments

    def render(plan: Any, job: Any) -> Command:
        argv = [sys.executable, "-I", "-S", __file__, "launch", os.environ["FORK_SERVER"],
                str(plan.batch.gpus), *worker_arguments(job)[1:]]  # fmt: skip
        return Command(argv, WORKER_ENVIRONMENT)

    drumline_launchers.LAUNCHERS["torchrun"] = render
    sys.argv = ["drumline", *request["argv"]]
    drumline()
    return 0


def be_rank(request: dict[str, Any]) -> int:
    """One real rank, with the faults that the test asks for."""
    import faults

    from drumline.train import worker

    faults.plant(request["argv"])
    return worker.main(request["argv"])


def be_jobs(request: dict[str, Any]) -> int:
    """A rank that does a list of jobs; see ranks.py."""
    import ranks

    ranks.main(request["argv"][0])
    return 0


PROGRAMS = {"drumline": be_command, "rank": be_rank, "jobs": be_jobs}


def launch(server: str, world: int, argv: list[str]) -> int:
    """Ask for the ranks, wait for all, tell whether one failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    connections = []
    for rank in range(world):
        env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
        connections.append(ask(server, "rank", argv, os.getcwd(), env, [1, 2])[0])
    codes = [int(connection.recv(64).decode() or 1) for connection in connections]
    return int(any(codes))


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        serve(sys.argv[2], sys.argv[3:])
    else:
        sys.exit(launch(sys.argv[2], int(sys.argv[3]), sys.argv[4:]))

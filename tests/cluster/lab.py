"""A real Slurm of eight nodes of eight (fake) GPUs on this machine, on loopback only.

Several slurmd with names of their own, munge with a key of its own, null character devices for GPUs. Nothing
outside its folder is touched but /etc/hosts, where the nodes' names stand while it runs.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from drumline.processes import free_port

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged")
NODES, GPUS, CPUS = 8, 8, 8
HOSTS = Path("/etc/hosts")


def why_not(*more: str) -> str:
    """What keeps a Slurm from running here, or nothing; `more` are further programs that are needed."""
    lacking = [name for name in (*PROGRAMS, *more) if shutil.which(name) is None]
    if lacking:
        return f"no {', '.join(lacking)}: .ci/run lists the Debian packages"
    return "" if os.geteuid() == 0 else "slurmd needs root"


class Lab:
    """The daemons of one Slurm, by their process numbers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        for name in ("state", "log", "run", "dev"):
            (folder / name).mkdir(parents=True)
        self.names = [f"node{n}" for n in range(NODES)]
        self._write_configuration()
        self._add_hosts()

    def start(self) -> None:
        """Up in a second or two; every node idle."""
        self.start_munge()
        self.start_controller()
        for name in self.names:
            self.start_node(name)
        wait(
            lambda: (
                self.ask("sinfo", "-h", "-N", "-p", "batch", "-o", "%t").split() == ["idle"] * NODES
            ),
            30,
        )

    def start_munge(self) -> None:
        """munged alone, unless it runs already."""
        if "munged" in self._daemons:
            return
        munge = self.folder / "run/munge"
        self._start("munged", "--foreground", "--force", f"--key-file={self.folder}/munge.key",
                    f"--socket={munge}.sock", f"--pid-file={munge}.pid", f"--seed-file={munge}.seed",
                    f"--log-file={self.folder}/log/munged.log")  # fmt: skip
        wait(lambda: Path(f"{munge}.sock").exists(), 20)

    def start_controller(self, *, forgetful: bool = False) -> None:
        """slurmctld alone; `forgetful`: without the jobs that it knew."""
        forget = ["-c"] if forgetful else []
        self._start("slurmctld", "-D", *forget, "-f", self.environment["SLURM_CONF"])

    def start_accounting(self) -> None:
        """MariaDB and slurmdbd, before `start`. They listen on all addresses: in a network namespace only."""
        base, socket_file = self.folder / "mysql", self.folder / "run/mysql.sock"
        install = ["mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={base}",
                   "--auth-root-authentication-method=normal", "--skip-test-db"]  # fmt: skip
        subprocess.run(install, check=True, capture_output=True, timeout=120)
        self._start("mariadbd", "--no-defaults", "--user=root", f"--datadir={base}", f"--socket={socket_file}",
                    f"--pid-file={self.folder}/run/mysql.pid", "--bind-address=127.0.0.1", "--port=13306",
                    "--innodb-buffer-pool-size=64M")  # fmt: skip
        client = ["mariadb", "--no-defaults", f"--socket={socket_file}", "--user=root", "--execute"]
        users = "".join(
            f"CREATE USER slurm@'{host}' IDENTIFIED BY 'slurm'; GRANT ALL ON slurm_acct.* TO slurm@'{host}';"
            for host in ("127.0.0.1", "localhost")
        )
        wait(lambda: subprocess.run([*client, "SELECT 1"], capture_output=True).returncode == 0, 60)
        subprocess.run([*client, users], check=True, capture_output=True, timeout=60)
        host = socket.gethostname().partition(".")[0]
        conf = self.folder / "slurmdbd.conf"
        conf.write_text(ACCOUNTING.format(folder=self.folder, host=host))
        conf.chmod(0o600)
        with (self.folder / "slurm.conf").open("a") as file:
            file.write(
                "AccountingStorageHost=127.0.0.1\nAccountingStoragePort=16819\n"
                f"AccountingStoragePass={self.folder}/run/munge.sock\n"
            )
        text = (self.folder / "slurm.conf").read_text()
        (self.folder / "slurm.conf").write_text(
            text.replace("accounting_storage/none", "accounting_storage/slurmdbd")
        )
        self.start_munge()
        self._start("slurmdbd", "-D", SLURM_CONF=self.environment["SLURM_CONF"])
        wait(lambda: "lab" in self.ask("sacctmgr", "-i", "add", "cluster", "lab")
             or "lab" in self.ask("sacctmgr", "-n", "show", "cluster"), 60)  # fmt: skip

    def start_node(self, name: str) -> None:
        """One slurmd alone."""
        (self.folder / "spool" / name).mkdir(parents=True, exist_ok=True)
        self._start(f"slurmd {name}", "-D", "-f", self.environment["SLURM_CONF"], "-N", name)

    def kill(self, daemon: str) -> None:
        """SIGKILL, as a machine that loses its power."""
        process = self._daemons.pop(daemon)
        process.kill()
        process.wait()

    def kill_node(self, name: str) -> None:
        """A node's slurmd and everything that runs on it; nobody is left to tell the controller."""
        self.kill(f"slurmd {name}")
        theirs = self.processes_of(name)
        for pid in [*_step_daemons(theirs), *theirs]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def processes_of(self, name: str) -> list[int]:
        """Steps' processes of a node: those that Slurm gave its name."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                names = path.read_bytes().split(b"\0")
                if (
                    f"SLURMD_NODENAME={name}".encode() in names
                    and str(self.folder).encode() in path.read_bytes()
                ):
                    found.append(int(path.parent.name))
        return found

    def ask(self, *command: str) -> str:
        """What a command of Slurm prints."""
        env = {**os.environ, **self.environment}
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60).stdout

    def job(self, job: str) -> dict[str, str]:
        """scontrol's fields of a job."""
        words = self.ask("scontrol", "show", "job", "-o", job).split()
        return dict(word.partition("=")[::2] for word in words if "=" in word)

    def hosts_of(self, job: str) -> list[str]:
        """The nodes that a job has; none before it starts."""
        listed = self.job(job).get("NodeList", "(null)")
        return [] if "null" in listed else self.ask("scontrol", "show", "hostnames", listed).split()

    def stop(self) -> None:
        """End what was started here, and nothing else."""
        with contextlib.suppress(Exception):
            self.ask("scancel", "--user=root")
            wait(lambda: not self.ask("squeue", "-h").strip(), 15)
        for process in reversed(self._daemons.values()):
            process.terminate()
        for process in self._daemons.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        lines = HOSTS.read_text().splitlines(keepends=True)
        HOSTS.write_text("".join(line for line in lines if line.rstrip() not in self._host_lines()))

    def _start(self, name: str, *arguments: str, **environment: str) -> None:
        with (self.folder / "log" / f"{name.replace(' ', '-')}.out").open("ab") as log:
            command = [name.split()[0], *arguments]
            self._daemons[name] = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **environment},
            )

    def _host_lines(self) -> list[str]:
        return [f"127.0.0.1 {name}" for name in self.names]

    def _add_hosts(self) -> None:
        known = HOSTS.read_text()
        missing = [line for line in self._host_lines() if line not in known.splitlines()]
        with HOSTS.open("a") as file:
            file.writelines(f"{line}\n" for line in missing)

    def _write_configuration(self) -> None:
        folder, host = self.folder, socket.gethostname().partition(".")[0]
        ports = free_ports(NODES + 1)
        last = NODES - 1
        for number in range(GPUS):
            os.mknod(folder / f"dev/nvidia{number}", 0o20666, os.makedev(1, 3))
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o600)
        (folder / "gres.conf").write_text(
            f"NodeName=node[0-{last}] Name=gpu File={folder}/dev/nvidia[0-{GPUS - 1}]\n"
        )
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} Boards=1 SocketsPerBoard=1 "
            f"CoresPerSocket={CPUS} ThreadsPerCore=1 RealMemory=16000 Gres=gpu:{GPUS} State=UNKNOWN"
            for name, port in zip(self.names, ports[1:], strict=True)
        )
        (folder / "slurm.conf").write_text(
            CONFIGURATION.format(folder=folder, host=host, port=ports[0], nodes=nodes, last=last)
        )


def _step_daemons(pids: list[int]) -> set[int]:
    """The slurmstepd that these processes are children of."""
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            if Path(f"/proc/{parent}/comm").read_text().startswith("slurmstepd"):
                found.add(parent)
    return found


CONFIGURATION = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.sock,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobcomp.txt
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
DefMemPerCPU=256
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=45
TCPTimeout=5
MessageTimeout=10
InactiveLimit=0
KillWait=2
MinJobAge=3600
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
{nodes}
PartitionName=batch Nodes=node[0-{last}] Default=YES MaxTime=02:00:00 DefaultTime=00:10:00 LLN=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes=node[0-{last}] MaxTime=02:00:00 State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=closed Nodes=node[0-{last}] State=DOWN
"""


ACCOUNTING = """\
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort=16819
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.sock
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=13306
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct
LogFile={folder}/log/slurmdbd.log
PidFile={folder}/run/slurmdbd.pid
"""


def free_ports(count: int) -> list[int]:
    """Ports that nobody has now, and that the system gives to nobody while a node is down."""
    found: set[int] = set()
    while len(found) < count:
        found.add(free_port())
    return sorted(found)


PATIENCE = 3
"""Other tests may have the cores; waiting longer costs nothing where all is well."""


def wait(condition: Callable[[], Any], seconds: float) -> Any:
    """Until it holds; its value."""
    deadline = time.monotonic() + PATIENCE * seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.1)
    return found

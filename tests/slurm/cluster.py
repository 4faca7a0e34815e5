"""A real Slurm cluster of several nodes on this machine, from Debian's packages; it lives as long as its ``with``."""

import contextlib
import getpass
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil

from pretrain.ports import COUNT, FIRST
from slurm.attempt import ROOT, rendezvous_port
from slurm.restart import Attempt
from tests.slurm.keeper import kill_at_once

T = TypeVar("T")
PATIENCE_S = 400.0
"""Bound of every wait: nothing here takes so long on a quiet machine, it only keeps a hang from lasting for ever."""
GPUS = ("/dev/null", "/dev/zero")
"""Of every node, as far as Slurm is concerned."""

CONFIG = """\
ClusterName=lavit
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmdParameters=config_overrides
SlurmUser=root
SlurmdUser=root
{auth}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
MpiDefault=none
ReturnToService=2
JobRequeue=1
MessageTimeout=4
SlurmdTimeout=5
GresTypes=gpu
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
FirstJobId={first_job}
Prolog={folder}/prolog
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=0
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
"""


OTHER = "games"
QUICK = """\
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
KillWait=15
MinJobAge=3600"""
SITE = """\
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd}
AccountingStoragePass={folder}/munge.socket
AccountingStorageEnforce=associations,limits,qos,wckeys
TrackWCKey=yes
DefMemPerCPU=100"""
SLURMDBD = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={dbd}
SlurmUser=root
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database}
StorageUser=root
StorageLoc=slurm
TrackWCKey=yes
"""


def ordinary_user() -> tuple[str, str, dict[str, str]]:
    """Whose the jobs on a cluster like a site's are, a Python for him, and what to add to his environment.

    Another user, where we may become one and he may run this Python, or the system's with our packages; else ourselves.
    """
    system = f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    for python, added in ((sys.executable, {}), (system, {"PYTHONPATH": sysconfig.get_path("purelib")})):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run([python, "-c", "import submitit, torch"], user=OTHER, group=OTHER, extra_groups=[], cwd=ROOT,
                           env=os.environ | added, capture_output=True, check=True)  # fmt: skip
            return OTHER, python, added
    return getpass.getuser(), sys.executable, {}


class Cluster:
    """One controller and ``len(names)`` node daemons.

    Nodes are named by loopback addresses, so that their names resolve without /etc/hosts.
    """

    def __init__(self, folder: Path, nodes: int, *, site: bool = False) -> None:
        self.folder, self.site = folder, site
        network = f"127.{random.SystemRandom().randint(1, 250)}.{random.SystemRandom().randint(0, 250)}"
        self.names = [f"{network}.{number + 10}" for number in range(nodes)]
        ports, host = free_ports(nodes + 3), socket.gethostname()
        self._ports = {"dbd": ports[-2], "database": ports[-3]}
        gres, typed = (f"gpu:h100:{len(GPUS)}", "Type=h100 ") if site else (f"gpu:{len(GPUS)}", "")
        nodes_text = "\n".join(
            f"NodeName={name} NodeAddr={name} NodeHostname={host} Port={port} CPUs=8 RealMemory=9000 Gres={gres}"
            for name, port in zip(self.names, ports, strict=False)
        )
        (folder / "state").mkdir(parents=True)
        auth = SITE.format(folder=folder, **self._ports) if site else QUICK
        self._config = CONFIG.format(port=ports[-1], folder=folder, nodes=nodes_text, first_job=first_job(), auth=auth)
        (folder / "slurm.conf").write_text(self._config)
        prolog = folder / "prolog"
        prolog.write_text(
            f"#!/bin/sh\n[ -e {folder}/slow-$SLURMD_NODENAME ] && sleep 20\n[ ! -e {folder}/launches-fail ]\n"
        )
        prolog.chmod(0o755)
        (folder / "gres.conf").write_text("".join(f"Name=gpu {typed}File={device}\n" for device in GPUS))
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        self.home = folder / "home"
        """Of the user, on a cluster like a site's."""
        self.user, self.python, added = ordinary_user() if site else (getpass.getuser(), sys.executable, {})
        if site:
            folder.chmod(0o755)
            self.home.mkdir()
            shutil.chown(self.home, self.user, self.user)
            self.environment |= {"HOME": str(self.home), "USER": self.user, "LOGNAME": self.user} | added
        self._keeper = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("keeper.py")), str(folder)],
            env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def start(self) -> None:
        if self.site:
            self._start_accounting()
        self.start_controller()
        for name in self.names:
            self.start_node(name)
        self.wait_for(lambda: self.ask("sinfo", "-h", "-o", "%T %D") == f"idle {len(self.names)}", "idle nodes")

    def start_controller(self) -> None:
        """Start slurmctld, again where it was killed, and wait until it answers."""
        self._start("slurmctld", "slurmctld", "-D", "-i")
        self.wait_for(lambda: "is UP" in self.ask("scontrol", "ping", check=False), "slurmctld")

    def _start_accounting(self) -> None:
        """Start munge, a database and slurmdbd, with account and wckey "lab", QOS "normal" and "one"."""
        folder = self.folder
        key, configuration = folder / "munge.key", folder / "slurmdbd.conf"
        key.write_bytes(random.randbytes(128))
        configuration.write_text(SLURMDBD.format(folder=folder, **self._ports))
        for secret in (key, configuration):
            secret.chmod(0o600)
        self._start("munge", "munged", "--foreground", "--force", f"--socket={folder}/munge.socket",
                    f"--key-file={key}", f"--pid-file={folder}/munge.pid", f"--log-file={folder}/munge.log",
                    f"--seed-file={folder}/seed")  # fmt: skip
        data = f"--datadir={folder}/database"
        self.ask("mariadb-install-db", "--no-defaults", data, "--user=root", "--skip-test-db",
                 "--auth-root-authentication-method=normal")  # fmt: skip
        self._start("mariadb", "mariadbd", "--no-defaults", data, "--user=root", f"--socket={folder}/database.socket",
                    f"--port={self._ports['database']}", "--bind-address=127.0.0.1",
                    "--innodb-flush-log-at-trx-commit=0", f"--pid-file={folder}/database.pid")  # fmt: skip
        sockets = (folder / "database.socket", folder / "munge.socket")
        self.wait_for(lambda: all(path.exists() for path in sockets), "munge and the database")
        self._start("slurmdbd", "slurmdbd", "-D")
        self.wait_for(lambda: "lavit" in self.ask("sacctmgr", "-i", "add", "cluster", "lavit", check=False), "slurmdbd")
        user = f"user {self.user} account=lab wckeys=lab defaultwckey=lab qos=normal,one defaultqos=normal"
        for words in ("qos one MaxSubmitJobsPerUser=1", "account lab", user):
            self.ask("sacctmgr", "-i", "add", *words.split())

    def as_user(self, *words: str, **changed: str) -> "subprocess.CompletedProcess[str]":
        """A program that the user of the jobs runs in the repository, with some variables changed."""
        return subprocess.run(
            words, user=self.user, group=self.user, extra_groups=[], cwd=ROOT, env=self.environment | changed,
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    def start_node(self, name: str) -> None:
        (self.folder / f"spool-{name}").mkdir(exist_ok=True)
        self._start(name, "slurmd", "-D", "-N", name)

    def kill_controller(self) -> None:
        self._order("kill", "slurmctld")

    def kill_node(self, name: str) -> None:
        """What a power cut does: the daemon and everything that runs on the node is gone at once."""
        self._order("kill", name)
        kill_at_once(self.processes_on(name))

    def processes_on(self, name: str) -> list[psutil.Process]:
        """Job processes on a node: slurmstepds with all that they started."""
        log = str(self.folder / f"slurmd-{name}.log")
        found = []
        for process in psutil.Process(self._keeper.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.name() == "slurmstepd" and log in [file.path for file in process.open_files()]:
                    found += [process, *process.children(recursive=True)]
        return found

    def set_preemption(self, *, grace: int, user_signal: bool) -> None:
        """Seconds between telling a job that it is preempted and ending it; whether it is sent its own signal first."""
        chosen = "SlurmctldParameters=preempt_send_user_signal\n" if user_signal else ""
        (self.folder / "slurm.conf").write_text(chosen + self._config)
        self.ask("scontrol", "reconfigure")
        self.ask("scontrol", "update", "PartitionName=batch", f"GraceTime={grace}")

    @contextlib.contextmanager
    def _prolog_finds(self, name: str) -> Iterator[None]:
        (self.folder / name).touch()
        yield
        (self.folder / name).unlink()

    def failing_launches(self) -> contextlib.AbstractContextManager[None]:
        """While in it, no job can be started: Slurm takes the first node for broken and holds the job."""
        return self._prolog_finds("launches-fail")

    def slow_prolog(self, name: str) -> contextlib.AbstractContextManager[None]:
        """While in it, a node takes longer to start a step than MessageTimeout."""
        return self._prolog_finds(f"slow-{name}")

    @contextlib.contextmanager
    def silent_controller(self) -> Iterator[None]:
        """While in it, slurmctld answers nobody; what it was told meanwhile it does afterwards, as where it is busy."""
        (controller,) = (p for p in psutil.Process(self._keeper.pid).children() if p.name() == "slurmctld")
        controller.suspend()
        try:
            yield
        finally:
            controller.resume()

    def preempt(self) -> None:
        """Take all nodes for two seconds, for a job that matters more."""
        order = ("sbatch", "-p", "urgent", "-N", str(len(self.names)), "--exclusive", "-o", "/dev/null",
                 "--wrap", "sleep 2")  # fmt: skip
        assert self.as_user(*order).returncode == 0 if self.site else self.ask(*order)

    def ask(self, *words: str, check: bool = True) -> str:
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        words = self.ask("scontrol", "-o", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, condition: Callable[[], T | None], what: str, told: Callable[[], str] = lambda: "") -> T:
        """Poll until ``condition`` holds; what it then says."""
        deadline = time.monotonic() + PATIENCE_S
        while not (answer := condition()):
            assert time.monotonic() < deadline, f"{self.logs()}\n{told()}\nnot within {PATIENCE_S} s: {what}"
            time.sleep(0.05)
        return answer

    def logs(self) -> str:
        return "\n".join(
            f"--- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-12:])
            for log in sorted(self.folder.glob("slurm*[0-9d].log"))
        )

    def close(self) -> None:
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()
        assert self._keeper.wait() == 0, "the cluster's keeper failed, what it should have ended may still run"

    def _start(self, name: str, *command: str) -> None:
        self._order("start", name, str(self.folder / f"{name}-output.log"), *command)

    def _order(self, *words: str) -> None:
        assert self._keeper.stdin is not None
        assert self._keeper.stdout is not None
        self._keeper.stdin.write(json.dumps(words) + "\n")
        self._keeper.stdin.flush()
        assert self._keeper.stdout.readline() == "done\n", "the cluster's keeper died"


def own_part(ports: range) -> range:
    """The part of some ports that is this process's: tests that run side by side have no port in common."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    size = len(ports) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    return ports[worker * size : (worker + 1) * size]


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, all different; above those of rendezvous and below those handed out to clients."""
    ports: list[int] = []
    own = own_part(range(FIRST + COUNT, 32_768))
    for port in random.SystemRandom().sample(own, len(own)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise AssertionError("there are no free ports")


def first_job() -> int:
    """A random id. Clusters of tests that run side by side get rendezvous ports of their own, which come of the ids."""
    own = own_part(range(FIRST, FIRST + COUNT))
    begins = own[: len(own) // 2]  # each cluster has some jobs
    ids = [job for job in range(1000, 60_000) if rendezvous_port(Attempt(str(job), 0)) in begins]
    return random.SystemRandom().choice(ids)


@contextlib.contextmanager
def cluster(nodes: int, *, site: bool = False) -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # not below pytest's: the path of a socket has 108 bytes at most
    made = Cluster(folder, nodes, site=site)
    try:
        made.start()
        yield made
    finally:
        made.close()

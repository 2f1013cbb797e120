"""A real SLURM of eight nodes on this one machine, for tests: slurmctld, munged and eight slurmds on 127.0.0.1.

Everything lies in one temporary folder; only processes that carry its slurm.conf in their environment are ended. Needs
root and Debian's slurm-wlm and munge (`make slurm-setup`), whose slurmd can run several times on a machine.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")

CONF = """
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits until its old credentials have expired; the default is two minutes
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/pid/slurmctld
SlurmctldLogFile={folder}/log/slurmctld
SlurmdPidFile={folder}/pid/%n
SlurmdLogFile={folder}/log/%n
SlurmdSpoolDir={folder}/spool/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
# a node may claim what this machine has not
SlurmdParameters=config_overrides
# a node that comes back is used again
ReturnToService=2
JobRequeue=1
KillWait=8
SlurmdTimeout=20
MessageTimeout=20
MinJobAge=600
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_min_interval=200000,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
NodeName=node[1-{nodes}] NodeAddr=127.0.0.1 NodeHostname={host} Port={first_port}-{last_port} CPUs=8 \\
  RealMemory=4000 {gres}
PartitionName=lab Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def what_is_missing() -> str:
    """Why no lab can run here, in one line; "" if it can."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)} here; `make slurm-setup` installs SLURM where apt-get can"
    return "" if os.geteuid() == 0 else "the virtual SLURM needs root (munged and slurmd run as the same user)"


class Lab:
    """Eight nodes; `with Lab(folder) as lab` starts and ends them.

    Args:
        folder: of everything that belongs to the cluster.
        nodes: how many.
        gpus: of every node, for SLURM to count and to hand out; behind them is /dev/null, and torch finds no CUDA.
    """

    def __init__(self, folder: Path, nodes: int = 8, gpus: int = 8) -> None:
        self.folder, self.nodes, self.gpus = folder.resolve(), nodes, gpus
        self.conf = self.folder / "slurm.conf"
        self.environment = {**_plain_environment(), "SLURM_CONF": str(self.conf)}

    def __enter__(self) -> Lab:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        """Write the settings and start what does not run; RuntimeError with the end of the logs if it does not."""
        for name in ("munge", "state", "pid", "log", *(f"spool/node{i}" for i in self._numbers())):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        if not self.conf.is_file():
            first = _free_ports(self.nodes + 1)
            self._write_gpus()
            self.conf.write_text(
                CONF.format(
                    host=socket.gethostname().split(".")[0], folder=self.folder, nodes=self.nodes, control_port=first,
                    first_port=first + 1, last_port=first + self.nodes,
                    gres=f"Gres=gpu:{self.gpus}" if self.gpus else "",
                )
            )  # fmt: skip
        if not self._alive("munged"):
            key = self.folder / "munge/key"
            key.touch(mode=0o600)
            key.write_bytes(os.urandom(1024))
            options = {"key-file": key, "socket": self.folder / "munge/socket", "pid-file": self._pid_file("munged"),
                       "log-file": self.folder / "log/munged", "seed-file": self.folder / "munge/seed"}  # fmt: skip
            self._run("munged", "--force", *(f"--{name}={value}" for name, value in options.items()))
        if not self._alive("slurmctld"):
            self._run("slurmctld", "-f", str(self.conf))
        for i in self._numbers():
            self.revive(f"node{i}")
        self._wait_for(lambda: self.up() == self.nodes, 30, f"{self.nodes} nodes")

    def stop(self) -> None:
        """Cancel the jobs, end the daemons, and kill what is left of ours; the folder stays."""
        if self._alive("slurmctld"):
            with contextlib.suppress(subprocess.SubprocessError):
                self._run("scancel", "-u", "root")
                self._wait_for(lambda: not self._run("squeue", "-h").strip(), 30, "an empty queue")
        pids = [pid for path in (self.folder / "pid").glob("*") if (pid := self._alive(path.name))]
        for pid in pids:
            _kill(pid, signal.SIGTERM)
        with contextlib.suppress(RuntimeError):
            self._wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 15, "the daemons' end")
        for pid in {*pids, *self.processes()}:
            _kill(pid, signal.SIGKILL)

    def up(self) -> int:
        """Number of nodes that can work."""
        return sum(self.state(f"node{i}") in ("idle", "alloc", "mix", "comp") for i in self._numbers())

    def state(self, node: str) -> str:
        """As sinfo has it: idle, alloc, down*, ..."""
        return self._run("sinfo", "-h", "-n", node, "-o", "%t").strip()

    def revive(self, node: str) -> None:
        """Start a node's slurmd, unless it runs."""
        if not self._alive(node):
            self._run("slurmd", "-f", str(self.conf), "-N", node)

    def kill_node(self, node: str) -> None:
        """As if the plug were pulled: slurmd, its step daemons and every task, by SIGKILL."""
        if pid := self._alive(node):
            _kill(pid, signal.SIGKILL)
        self._pid_file(node).unlink(missing_ok=True)
        tasks = [pid for pid, env in self.processes().items() if env.get("SLURMD_NODENAME") == node]
        for pid in {*tasks, *(parent for task in tasks for parent in _step_daemons_above(task))}:
            _kill(pid, signal.SIGKILL)

    def submit(self, *arguments: str, cwd: Path, **variables: str) -> int:
        """sbatch; the job's number."""
        said = self._run("sbatch", *arguments, cwd=cwd, **variables)
        return int(re.search(r"Submitted batch job (\d+)", said)[1])  # type: ignore[index]

    def command(self, *arguments: str) -> str:
        """One of SLURM's own commands, against this cluster."""
        return self._run(*arguments)

    def job(self, number: int) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Restarts, ExitCode, ..."""
        return dict(re.findall(r"(\w+)=(\S*)", self._run("scontrol", "show", "job", str(number))))

    def states(self, number: int) -> set[str]:
        """The states of a job, or of every task of an array job."""
        return set(re.findall(r"JobState=(\w+)", self._run("scontrol", "show", "job", str(number))))

    def wait(self, number: int, seconds: float, poll: Callable[[dict[str, str]], bool] = lambda job: False) -> str:
        """The last state, once the job and its tasks have ended or `poll` says so; RuntimeError after `seconds`."""
        job: dict[str, str] = {}

        def over() -> bool:
            job.update(self.job(number))
            return self.states(number) <= ENDED or poll(job)

        self._wait_for(over, seconds, f"job {number}")
        return job["JobState"]

    def ranks(self, module: str = "one4d_pl.fit") -> dict[int, int]:
        """Rank -> process id of the Pythons that run `module` in a job."""
        found = {}
        for pid, env in self.processes().items():
            words = _words(pid, "cmdline")
            if "SLURM_PROCID" in env and words[1:3] == ["-m", module]:
                found[int(env["SLURM_PROCID"])] = pid
        return found

    def processes(self) -> dict[int, dict[str, str]]:
        """Every process of a job of this cluster, with its environment; the daemons are not among them."""
        daemons = {self._alive(path.name) for path in (self.folder / "pid").glob("*")} | {os.getpid()}
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            pid = int(folder.name)
            env = dict(word.split("=", 1) for word in _words(pid, "environ") if "=" in word)
            if env.get("SLURM_CONF") == str(self.conf) and "SLURM_JOB_ID" in env and pid not in daemons:
                found[pid] = env
        return found

    def _write_gpus(self) -> None:
        """gres.conf; SLURM tells a job of a GPU only where its file is a device."""
        devices = self.folder / "dev"
        devices.mkdir(exist_ok=True)
        for number in range(self.gpus):
            (devices / f"gpu{number}").symlink_to("/dev/null")
        gres = f"Name=gpu File={devices}/gpu[0-{self.gpus - 1}]\n" if self.gpus else ""
        (self.folder / "gres.conf").write_text(gres)

    def _numbers(self) -> Iterator[int]:
        return iter(range(1, self.nodes + 1))

    def _pid_file(self, name: str) -> Path:
        return self.folder / "pid" / name

    def _alive(self, name: str) -> int:
        """The daemon's process id, 0 where it does not run."""
        with contextlib.suppress(OSError, ValueError):
            pid = int(self._pid_file(name).read_text())
            if any(str(self.folder) in word for word in _words(pid, "cmdline")):
                return pid
        return 0

    def _run(self, *command: str, cwd: Path | None = None, **variables: str) -> str:
        done = subprocess.run(
            command, env={**self.environment, **variables}, cwd=cwd, capture_output=True, text=True, timeout=60
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()} {self._log_ends()}")
        return done.stdout

    def _wait_for(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        until = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > until:
                raise RuntimeError(f"no {what} after {seconds:.0f} s; {self._log_ends()}")
            time.sleep(0.5)

    def _log_ends(self) -> str:
        logs = sorted((self.folder / "log").glob("*"))
        return "\n".join(f"{log.name}: {line}" for log in logs for line in log.read_text().splitlines()[-3:])


def _plain_environment() -> dict[str, str]:
    """This environment without what a job around the tests may have set."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "MASTER_"))}


def _free_ports(count: int) -> int:
    """The first of `count` neighbouring free ports, below those of outgoing connections."""
    for first in range(16800, 30000, 20):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise RuntimeError("no free ports")


def _words(pid: int, file: str) -> list[str]:
    try:
        return Path(f"/proc/{pid}/{file}").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # it has ended, or is none of ours
        return []


def _step_daemons_above(pid: int) -> Iterator[int]:
    while pid > 1:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return
        name, rest = stat[stat.index("(") + 1 : stat.rindex(")")], stat[stat.rindex(")") + 2 :].split()
        if name.startswith("slurmstepd"):
            yield pid
        pid = int(rest[1])


def _kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)

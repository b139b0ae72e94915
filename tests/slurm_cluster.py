"""A real Slurm of two nodes on this machine, for tests: everything of it in one folder, and gone when it is over."""

import contextlib
import functools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo", "squeue")
NODES = ("node1", "node2")
GPUS_PER_NODE = 2
# munged and slurmd live in /usr/sbin, which need not be in the PATH of who runs the tests.
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
# A unix socket's address holds 107 bytes; the longest is slurmstepd's, spool/node1/node1_<job>.<step>, with a step
# that has 10 digits for a batch script.
LONGEST_FOLDER = 107 - len("/spool/node1/node1_1234567.4294967291.0")


class SlurmError(RuntimeError):
    """Slurm did not start, did not stop, or a job did not become what it should."""


@dataclass(frozen=True)
class Cluster:
    """A running Slurm."""

    environment: Mapping[str, str]  # what a process needs in its environment to talk to this Slurm
    low: str  # the default partition, whose jobs are requeued, after a time of grace, when one of `high` wants to run
    high: str
    nodes: tuple[str, ...]
    folder: Path
    logs: Path
    grace: int  # seconds that a preempted job is given
    daemons: dict[str, subprocess.Popen[bytes]]  # munged, slurmctld, and a slurmd for each node by the node's name

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command of Slurm's."""
        given = {**clean_environment(), **self.environment, **environment}
        return subprocess.run(command, cwd=self.folder, env=given, capture_output=True, text=True, timeout=60)


def is_possible() -> str | None:
    """Why Slurm cannot be started here, or None if it can."""
    if not sys.platform.startswith("linux"):
        return "Slurm needs Linux"
    if os.geteuid() != 0:
        return "Slurm is started as root here"
    missing = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]
    return f"not installed: {', '.join(missing)} (apt-get install slurm-wlm munge)" if missing else None


def clean_environment() -> dict[str, str]:
    """This process's environment without what an outer Slurm may have put there."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "SRUN"))}
    return {**kept, "PATH": PATH}


@contextlib.contextmanager
def running(
    folder: Path, *, grace: int = 5, settings: Mapping[str, str] | None = None, start_timeout: float = 60
) -> Iterator[Cluster]:
    """Start Slurm in a folder, and stop it at the end; `settings` replace lines of slurm.conf."""
    folder = folder.resolve()
    if len(os.fsencode(folder)) > LONGEST_FOLDER:
        raise SlurmError(f"{folder} is too long for the sockets in it: {LONGEST_FOLDER} bytes at most")
    logs = folder / "logs"
    for path in (folder, logs, folder / "state", *(folder / "spool" / node for node in NODES)):
        path.mkdir(parents=True, exist_ok=True)
    environment = {"SLURM_CONF": str(folder / "slurm.conf")}
    cluster = Cluster(environment, "low", "high", NODES, folder, logs, grace, {})
    try:
        write_configuration(cluster, settings or {})
        start_munge(cluster)
        start_daemon(cluster, "slurmctld", ["slurmctld", "-D", "-c"])
        for node in cluster.nodes:
            start_node(cluster, node)
        wait_until(
            lambda: node_states(cluster) == dict.fromkeys(cluster.nodes, "idle"),
            start_timeout,
            lambda: f"Slurm did not start: {node_states(cluster)}\n{tail_of_logs(cluster)}",
            cluster.daemons.values(),
        )
        yield cluster
    finally:
        stop(cluster)


def write_configuration(cluster: Cluster, settings: Mapping[str, str]) -> None:
    folder, logs = cluster.folder, cluster.logs
    host = socket.gethostname().split(".")[0]
    controller_port, *node_ports = free_ports(1 + len(cluster.nodes))
    conf = {
        "ClusterName": "test",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmctldPort": str(controller_port),
        "SlurmUser": "root",
        "SlurmdUser": "root",
        "AuthType": "auth/munge",
        # A requeued job does not start before its old credential has expired, which would take two minutes.
        "AuthInfo": f"socket={folder / 'munge.socket'},cred_expire=5",
        "CredType": "cred/munge",
        "StateSaveLocation": str(folder / "state"),
        "SlurmdSpoolDir": str(folder / "spool" / "%n"),
        "SlurmctldPidFile": str(folder / "slurmctld.pid"),
        "SlurmdPidFile": str(folder / "slurmd.%n.pid"),
        "SlurmctldLogFile": str(logs / "slurmctld.log"),
        "SlurmdLogFile": str(logs / "%n.log"),
        "SlurmctldDebug": "verbose",
        "SlurmdDebug": "verbose",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "SwitchType": "switch/none",
        "MpiDefault": "none",
        "JobAcctGatherType": "jobacct_gather/none",
        "AccountingStorageType": "accounting_storage/none",
        "JobCompType": "jobcomp/none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core_Memory",
        "SchedulerType": "sched/backfill",
        "SchedulerParameters": "batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1",
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        "JobRequeue": "1",
        "KillWait": "5",
        "MinJobAge": "300",
        "CompleteWait": "0",
        "SlurmdTimeout": "10",
        "ReturnToService": "2",
        "GresTypes": "gpu",
        # The nodes have more processors and memory than this machine, or the two of them together have.
        "SlurmdParameters": "config_overrides",
        **settings,
    }
    lines = [f"{name}={value}" for name, value in conf.items()]
    for node, port in zip(cluster.nodes, node_ports, strict=True):
        size = f"CPUs=4 RealMemory=100000 Gres=gpu:{GPUS_PER_NODE}"
        lines.append(f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} {size}")
    both = f"Nodes={','.join(cluster.nodes)} MaxTime=INFINITE DefaultTime=10 DefMemPerCPU=100 State=UP"
    lines.append(f"PartitionName={cluster.low} Default=YES PriorityTier=1 GraceTime={cluster.grace} {both}")
    lines.append(f"PartitionName={cluster.high} PriorityTier=2 PreemptMode=OFF {both}")
    (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
    # Any device will do, and Slurm counts it by the digits at the end of its name, and sets CUDA_VISIBLE_DEVICES.
    for number in range(GPUS_PER_NODE):
        (folder / f"gpu{number}").symlink_to("/dev/null")
    devices = f"Name=gpu File={folder}/gpu[0-{GPUS_PER_NODE - 1}]"
    gres = ["AutoDetect=off", *(f"NodeName={node} {devices}" for node in cluster.nodes)]
    (folder / "gres.conf").write_text("\n".join(gres) + "\n")
    (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def start_munge(cluster: Cluster) -> None:
    key, address = cluster.folder / "munge.key", cluster.folder / "munge.socket"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    options = {"key-file": key, "socket": address, "pid-file": cluster.folder / "munged.pid"}
    options["seed-file"] = cluster.folder / "munge.seed"
    # By force, because a folder of pytest's can be read by its owner alone, which munged takes for a mistake.
    command = ["munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in options.items())]
    daemon = start_daemon(cluster, "munged", command)
    wait_until(address.exists, 20, lambda: f"munged did not start\n{tail_of_logs(cluster)}", [daemon])


def start_node(cluster: Cluster, node: str) -> None:
    """Start a node's slurmd: at the beginning, or after `kill_node`, when Slurm has seen that the node is down.

    Sooner, and Slurm need not notice that a part of a job is missing: srun waits for it, and nothing is requeued.
    """
    start_daemon(cluster, node, ["slurmd", "-D", "-N", node], SLURM_TEST_NODE=node)


def start_daemon(cluster: Cluster, name: str, command: list[str], **environment: str) -> subprocess.Popen[bytes]:
    # These last: slurmstepd writes its title over what stands before SLURM_CONF, where `processes` would miss it.
    given = {**clean_environment(), **cluster.environment, **environment}
    with (cluster.logs / f"{name}.out").open("ab") as output:
        # In a session of its own, out of reach of the terminal's Ctrl-C: `stop` is what ends it.
        cluster.daemons[name] = subprocess.Popen(
            command,
            cwd=cluster.folder,
            env=given,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    return cluster.daemons[name]


def kill_node(cluster: Cluster, node: str) -> None:
    """End a node as a loss of power would: its slurmd, and all that runs on it, at once."""
    cluster.daemons[node].kill()
    cluster.daemons[node].wait()
    kill(lambda: processes(cluster, node))


def node_states(cluster: Cluster) -> dict[str, str]:
    """What sinfo says of each node; nothing while the controller does not answer."""
    listed = cluster.run("sinfo", "--noheader", "--Node", "--partition", cluster.low, "--format", "%N %T")
    return dict(line.split(maxsplit=1) for line in listed.stdout.splitlines())


def job(cluster: Cluster, job_id: int | str) -> dict[str, str]:
    """What scontrol says of a job: JobState, Reason, Restarts, NodeList, ExitCode and so on."""
    shown = cluster.run("scontrol", "show", "job", "--oneliner", str(job_id))
    if shown.returncode:
        raise SlurmError(f"job {job_id}: {shown.stderr.strip()}")
    return dict(re.findall(r"(\S+?)=(\S*)", shown.stdout))


def job_state(cluster: Cluster, job_id: int | str) -> str:
    """A job's state: PENDING, RUNNING, COMPLETING, COMPLETED, FAILED, CANCELLED, TIMEOUT, PREEMPTED, NODE_FAIL..."""
    return job(cluster, job_id)["JobState"]


def wait_for(cluster: Cluster, job_id: int | str, states: str | Iterable[str], timeout: float = 60) -> str:
    """Wait until a job is in one of some states, and return which."""
    wanted = {states} if isinstance(states, str) else set(states)
    seen: list[str] = []

    def arrived() -> bool:
        seen.append(job_state(cluster, job_id))
        return seen[-1] in wanted

    wait_until(
        arrived,
        timeout,
        lambda: f"job {job_id} is not {wanted} after {timeout} s: {job(cluster, job_id)}\n{tail_of_logs(cluster)}",
    )
    return seen[-1]


def wait_until(
    holds: Callable[[], bool],
    timeout: float,
    complaint: Callable[[], str],
    daemons: Collection[subprocess.Popen[bytes]] = (),
) -> None:
    """Wait until something holds, for as long as these daemons live."""
    deadline = time.monotonic() + timeout
    while not holds():
        if time.monotonic() > deadline or any(daemon.poll() is not None for daemon in daemons):
            raise SlurmError(complaint())
        time.sleep(0.2)


def tail_of_logs(cluster: Cluster, lines: int = 20) -> str:
    parts = []
    for path in sorted(cluster.logs.iterdir()):
        if path.suffix == ".out" and path.with_suffix(".log").exists():
            continue  # the log has all that was printed, and what slurmstepd wrote
        if text := path.read_text(errors="replace").splitlines():
            parts.append("\n".join([f"--- {path.name}", *text[-lines:]]))
    return "\n".join(parts)


def processes(cluster: Cluster, node: str | None = None, job_id: int | str | None = None) -> dict[int, str]:
    """The processes of this Slurm, its jobs and clients, or those of a node or a job: ids and command lines."""
    ours = f"SLURM_CONF={cluster.environment['SLURM_CONF']}".encode()
    # A daemon has the first of these from `start_node`, what a job runs the second from Slurm.
    marks = {f"SLURM_TEST_NODE={node}".encode(), f"SLURMD_NODENAME={node}".encode()}
    found = {}
    for path in Path("/proc").iterdir():
        if not path.name.isdigit() or int(path.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # it ended meanwhile
            environment = set((path / "environ").read_bytes().split(b"\0"))
            if (
                ours in environment
                and (node is None or marks & environment)
                and (job_id is None or f"SLURM_JOB_ID={job_id}".encode() in environment)
            ):
                command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                found[int(path.name)] = command
    return found


def kill(which: Callable[[], Iterable[int]], timeout: float = 10) -> None:
    """Kill processes until there are none, for they may start others meanwhile."""
    deadline = time.monotonic() + timeout
    while found := list(which()):
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        if time.monotonic() > deadline:
            return
        time.sleep(0.05)


def stop(cluster: Cluster) -> None:
    """Cancel the jobs, end the daemons, and kill whatever is left of either."""
    controller = cluster.daemons.get("slurmctld")
    if controller is not None and controller.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired, SlurmError):
            cancel_jobs(cluster)
    # munged last, which the others ask.
    for daemon in reversed(cluster.daemons.values()):
        daemon.terminate()
        try:
            daemon.wait(timeout=10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
    kill(lambda: processes(cluster))
    if left := processes(cluster):
        raise SlurmError(f"still running: {left}")


def cancel_jobs(cluster: Cluster) -> None:
    """Cancel all jobs without the time that Slurm gives them after SIGTERM, and wait until they are gone."""
    if jobs := unfinished_jobs(cluster):
        cluster.run("scancel", *jobs)
        for job_id in jobs:
            kill(functools.partial(processes, cluster, job_id=job_id))
        wait_until(lambda: not unfinished_jobs(cluster), 10, lambda: f"not cancelled: {unfinished_jobs(cluster)}")


def unfinished_jobs(cluster: Cluster) -> list[str]:
    return cluster.run("squeue", "--noheader", "--format", "%A").stdout.split()

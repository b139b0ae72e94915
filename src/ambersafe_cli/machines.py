"""Several machines that train one model: which of them this is, where they meet, and what torchrun is told of it."""

import contextlib
import fcntl
import os
import re
import socket
import struct
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ambersafe_cli import display, standstill
from ambersafe_cli.errors import MachinesError, UsageError

DEFAULT_PORT = 29400
"""torchrun's own."""

LOST, STUCK = "no sign of life of rank", "ends: stuck for "
"""In a line of train.py that ends because another process has gone, or because none gets on."""

_SIOCGIFADDR = 0x8915  # ioctl(2), netdevice(7): the address of an interface


@dataclass(frozen=True)
class Machines:
    """How many machines train, the number of this one, where they meet (HOST:PORT of machine 0; None for one machine
    alone), how often torchrun may start all processes again, and how many seconds machines wait for one another."""

    count: int = 1
    number: int = 0
    endpoint: str | None = None
    restarts: int = 0
    patience: int = 600


ALONE = Machines()


def from_flags(count: int | None, number: int | None, endpoint: str | None, restarts: int, patience: int) -> Machines:
    """Read --nnodes, --node-rank, --rdzv-endpoint, --max-restarts and --rdzv-timeout. Raises UsageError."""
    if (count or 1) == 1:
        if number or endpoint:
            flag = "--rdzv-endpoint" if endpoint else "--node-rank"
            raise UsageError(f"{flag} is for several machines.", "Say how many with --nnodes.")
        return Machines(restarts=restarts, patience=patience)
    assert count  # noqa: S101, for mypy
    if number is None or endpoint is None:
        missing = "--node-rank" if number is None else "--rdzv-endpoint"
        raise UsageError(
            f"--nnodes {count} needs {missing}.",
            f"On each machine the same command, with --rdzv-endpoint HOST:PORT of machine 0, and --node-rank 0 there "
            f"and up to {count - 1} on the others.",
        )
    if number >= count:
        raise UsageError(f"--node-rank {number} is none of {count} machines.", f"They are numbered 0 to {count - 1}.")
    _split(endpoint)
    return Machines(count, number, endpoint if ":" in endpoint else f"{endpoint}:{DEFAULT_PORT}", restarts, patience)


def in_slurm(environment: Mapping[str, str], count: int, restarts: int, patience: int) -> Machines:
    """The same of a task that srun has started on each machine of a job. Raises MachinesError, UsageError."""
    number = environment.get("SLURM_NODEID", "0")
    if count == 1:
        return Machines(restarts=restarts, patience=patience)
    found = environment.get("SLURM_STEP_NUM_NODES") or environment.get("SLURM_JOB_NUM_NODES") or "1"
    if int(found) != count:
        raise UsageError(f"The run was queued for {count} machines, and this job has {found}.")
    nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    host = _scontrol("hostnames", nodes).split()[0]
    # A node's name need not be one that the network knows.
    address = re.search(r"\bNodeAddr=(\S+)", _scontrol("node", host))
    host = address[1] if address else host
    port = 20000 + int(environment["SLURM_JOB_ID"]) % 10000  # so that two jobs on one machine do not meet
    return Machines(count, int(number), f"{host}:{port}", restarts, patience)


def _scontrol(what: str, name: str) -> str:
    command = ["scontrol", "--oneliner", "show", what, name]
    try:
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, timeout=60
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        raise MachinesError(f"scontrol does not tell the hosts of this job: {said}") from error


def _split(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.rpartition(":") if ":" in endpoint else (endpoint, ":", str(DEFAULT_PORT))
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(f"Invalid value for '--rdzv-endpoint': {endpoint!r}.", "It is HOST:PORT of machine 0.")
    return host.strip("[]"), int(port)


def torchrun_words(machines: Machines, processes: int) -> list[str]:
    """What torchrun is told, with so many processes a machine. Raises MachinesError."""
    words = ["--nproc-per-node", str(processes)]
    if machines.restarts:
        words += ["--max-restarts", str(machines.restarts)]
    if machines.count == 1 or machines.endpoint is None:
        return ["--standalone", *words]
    waits = f"join_timeout={machines.patience},read_timeout={min(60, machines.patience)}"
    # Which machine has the meeting point, and which address it tells the others: torchrun would guess both from host
    # names, which on many clusters stand for 127.0.1.1.
    return [
        *("--nnodes", str(machines.count), *words),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", machines.endpoint),
        *("--rdzv-conf", f"{waits},is_host={str(machines.number == 0).lower()}"),
        *("--local-addr", own_address(machines.endpoint)),
    ]


_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def settings(machines: Machines) -> dict[str, str]:
    """What the environment of torchrun has to hold."""
    # Each attempt a store of its own: in one that is shared it finds what the last one left.
    found = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    if machines.count > 1 and machines.endpoint:
        found["DPO_NODE_RANK"] = str(machines.number)
        if interface := _interface(own_address(machines.endpoint)):
            found |= {name: interface for name in _INTERFACES if not os.environ.get(name)}
    return found


def own_address(endpoint: str) -> str:
    """The address of this machine by which the one at an endpoint can be reached. Raises MachinesError."""
    host, port = _split(endpoint)
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing: it only asks the routes
            return str(probe.getsockname()[0])
    except socket.gaierror as error:
        raise MachinesError(
            f"{host} is not known here: {error.strerror}.", "Give its address: --rdzv-endpoint."
        ) from error
    except OSError as error:
        raise MachinesError(f"There is no way from here to {endpoint}: {error.strerror}.", _HINT) from error


_HINT = "Look at the address, the network and its firewall."


def _interface(address: str) -> str | None:
    """The name of the network interface that has an IPv4 address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                request = struct.pack("256s", name.encode()[:15])
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None


def meet(machines: Machines) -> None:
    """Look whether machine 0 can open the meeting point, or wait until it has. Raises MachinesError."""
    if machines.count == 1 or machines.endpoint is None:
        return
    host, port = _split(machines.endpoint)
    if machines.number == 0:
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
        except OSError as error:
            raise MachinesError(
                f"{machines.endpoint}, where the machines are to meet, cannot be opened here: {error.strerror}.",
                "It has to be an address of machine 0, and a port that is free: give --rdzv-endpoint on each of them.",
            ) from error
        display.say(f"waiting for {machines.count - 1} more at {machines.endpoint}, {machines.patience} s at most")
        return
    display.say(f"machine {machines.number} of {machines.count}: waiting for machine 0 at {machines.endpoint}")
    deadline = time.monotonic() + machines.patience
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            why = error.strerror or str(error)
        if time.monotonic() > deadline:
            raise MachinesError(f"No machine answers at {machines.endpoint}: {why} ({machines.patience} s).", _HINT)
        time.sleep(0.5)


def explain(lines: Iterable[str], machines: Machines) -> MachinesError | None:
    """What the output of a torchrun that has failed says of the machines, in one error; None if it says nothing."""
    found = last = None
    for line in lines:
        if (match := _DIED.search(line)) and int(match[1]) < 0:
            last = MachinesError(
                f"A process on machine {machines.number}, this one, was ended by signal {-int(match[1])}.",
                "9 may be the system's, for want of memory. --max-restarts N begins again by itself.",
            )
        if _CLOSED.search(line):
            last = last or MachinesError(
                f"A process on another of the {machines.count} machines has ended; this one is {machines.number}.",
                "What it said stands on that machine. --max-restarts N begins again by itself.",
            )
        if line.startswith("error: the machines differ in "):
            return MachinesError(f"T{line.removeprefix('error: t').strip()}.", "Make them alike, and start again.")
        if STUCK in line and (said := standstill.parse_line(line)):
            found = found or MachinesError(said, standstill.MEND)
        if LOST in line and line.startswith("error: "):
            found = found or MachinesError(line.removeprefix("error: ").strip().capitalize() + ".", _HINT)
        if "RendezvousTimeoutError" in line:
            found = found or MachinesError(
                f"Not all of {machines.count} machines came to {machines.endpoint} within {machines.patience} s.",
                "Start the command on each of them; --rdzv-timeout says how long they wait.",
            )
        if "RendezvousConnectionError" in line or "RendezvousClosedError" in line:
            found = found or MachinesError(
                f"The meeting point {machines.endpoint} is gone: machine 0 has ended, or cannot be reached.", _HINT
            )
    return found or (last if machines.count > 1 else None)


# torchrun's own table at its end, and the words of gloo, nccl and torchrun's store for a peer that is gone.
_DIED = re.compile(r"^\s*exitcode\s*: (-?\d+)")
_CLOSED = re.compile(r"Connection (closed|reset) by peer|remote process exited|Broken pipe")

"""Hosts of their own on this machine: network namespaces, joined by a bridge, each with an address and a host name."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Host:
    """A namespace, its address, and the words in front of a command that is to run in it."""

    name: str
    address: str
    link: str
    prefix: tuple[str, ...]

    def cut_off(self) -> None:
        """Pull its cable: what is sent is lost without a word, and no connection is closed."""
        _ip("link", "set", self.link, "down")

    def connect(self) -> None:
        _ip("link", "set", self.link, "up")


def why_not() -> str | None:
    """The reason why namespaces cannot be made here; None where they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    name = f"ambersafe-{os.getpid()}"
    try:
        _ip("netns", "add", name)
        _ip("netns", "delete", name)
    except FileNotFoundError:
        return "there is no `ip` (iproute2)"
    except subprocess.CalledProcessError as error:
        return f"network namespaces cannot be made: {error.stderr.strip()}"
    return None


@contextlib.contextmanager
def made(count: int) -> Iterator[list[Host]]:
    """So many hosts on a network of their own; whatever runs on them at the end is killed."""
    number = os.getpid() % 16384
    net = f"10.{64 + number // 256}.{number % 256}"
    bridge = f"am{number}"
    hosts: list[Host] = []
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("link", "set", bridge, "up")
        for i in range(count):
            name, link = f"{bridge}-{i}", f"{bridge}v{i}"
            # A fork of warm.py's would be on the host of its server.
            begin = f'hostname host{i}; unset AMBERSAFE_PYTHON; exec "$@"'
            run = ("ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", begin, "sh")
            hosts.append(Host(f"host{i}", f"{net}.{i + 1}", link, run))
            _ip("netns", "add", name)
            _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", link, "master", bridge, "up")
            _ip("-n", name, "address", "add", f"{net}.{i + 1}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield hosts
    finally:
        for i in range(count):
            with contextlib.suppress(subprocess.CalledProcessError):
                for pid in _ip("netns", "pids", f"{bridge}-{i}").split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), 9)
                _ip("netns", "delete", f"{bridge}-{i}")
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("link", "delete", bridge)


def processes(host: Host) -> list[int]:
    """What runs on a host."""
    return [int(pid) for pid in _ip("netns", "pids", host.prefix[3]).split()]


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout

"""Two hosts on this machine: network namespaces with addresses of their own and a link between them that can be cut."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def why_not() -> str:
    """Why there can be none here; empty where there can."""
    if not shutil.which("ip"):
        return "ip not installed (apt-get install iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"duet-{os.getpid()}-try"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if done.returncode == 0:
        ip("netns", "delete", name)
    return f"no network namespaces here: {done.stderr.strip()}" if done.returncode else ""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Hosts:
    """Hosts 0 and 1 with addresses[0] and addresses[1]; what they run ends with the context.

    Both know host 0 as "host0"; to itself that is a loopback address, as Debian's installer writes it.
    """

    def __init__(self) -> None:
        self.addresses = ("10.213.77.1", "10.213.77.2")
        self.names = [f"duet-{os.getpid()}-{host}" for host in (0, 1)]
        self.running: list[subprocess.Popen] = []

    def __enter__(self) -> Hosts:
        for name in self.names:
            ip("netns", "add", name)
        for host, address in enumerate(("127.0.1.1", self.addresses[0])):
            self.hosts_file(host).parent.mkdir(parents=True)
            self.hosts_file(host).write_text(f"127.0.0.1 localhost\n{address} host0\n")
            # No name server is reached from here: one that refuses says so at once, instead of after ten seconds.
            self.hosts_file(host).with_name("resolv.conf").write_text("nameserver 127.0.0.1\n")
        ip("-n", self.names[0], "link", "add", "link0", "type", "veth", "peer", "name", "link1", "netns", self.names[1])
        for host, (name, address) in enumerate(zip(self.names, self.addresses, strict=True)):
            ip("-n", name, "address", "add", f"{address}/24", "dev", f"link{host}")
            ip("-n", name, "link", "set", "lo", "up")
        self.link("up")
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for name in self.names:  # a worker that outlived its launcher is in no group of ours
            listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout
            for pid in listed.split():
                os.kill(int(pid), signal.SIGKILL)
            ip("netns", "delete", name)
        for host in (0, 1):
            shutil.rmtree(self.hosts_file(host).parent, ignore_errors=True)

    def hosts_file(self, host: int) -> Path:
        """What `ip netns exec` puts into the place of /etc/hosts."""
        return Path("/etc/netns", self.names[host], "hosts")

    def link(self, state: str) -> None:
        """`down` cuts the link silently, as a pulled cable does: nobody is told."""
        ip("-n", self.names[0], "link", "set", "link0", state)
        ip("-n", self.names[1], "link", "set", "link1", state)
        if state == "up":
            for host in (0, 1):
                ip("-n", self.names[host], "route", "replace", "default", "dev", f"link{host}")

    def on(self, host: int) -> list[str]:
        """What a command line begins with to run on a host."""
        return ["ip", "netns", "exec", self.names[host]]

    def start(self, host: int, log: Path, *arguments: str, **environment: str) -> subprocess.Popen:
        """launch/multinode.sh on a host, with a process on CPU cores; its output goes to `log`."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "DUET", "PET_", "MASTER", "NODE"))}
        clean |= {"DUET_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
        place = ["--node_rank", str(host), "--address", "host0", "--engine", "cpu", "--processes", "1"]
        command = [*self.on(host), "./launch/multinode.sh", *place, *arguments]
        with log.open("ab") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, env=clean, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.running.append(process)
        return process

"""Addresses of this host: the one from which another host is reached, and the interface that has it."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
import time

import psutil

from train import cli

ELSEWHERE = "192.0.2.1"
"""An address that no host has (RFC 5737): what leads to it is the default route."""


def own_address(peer: str) -> str:
    """The address from which this host would talk to `peer` (name or address); no packet is sent.

    Debian's /etc/hosts has a host's own name mean 127.0.1.1, which no other host can use: for such a name it is the
    address of the default route.

    Environment: DUET_RESOLVE, seconds that `peer` gets to appear, for pods and containers that start together (0).

    Raises:
        ValueError: the name is unknown, or there is no route to it.
    """
    deadline = time.monotonic() + float(os.environ.get("DUET_RESOLVE", "0"))
    while True:
        try:
            own = _towards(peer)
            if ipaddress.ip_address(own.split("%")[0]).is_loopback and not _means_loopback(peer):
                own = _towards(ELSEWHERE)
            return own
        except OSError as error:
            if time.monotonic() >= deadline:
                raise ValueError(
                    f"--address {peer}: this host has no way to it ({error}); give an address that it can reach"
                ) from error
            time.sleep(1)


def _towards(peer: str) -> str:
    """The local address of a socket that is connected to `peer`."""
    family, _, _, _, target = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)
        return probe.getsockname()[0]


def _means_loopback(peer: str) -> bool:
    """Whether the user has asked for this host alone."""
    try:
        return ipaddress.ip_address(peer).is_loopback
    except ValueError:
        return peer == "localhost"


def interface(peer: str) -> str:
    """Name of the network interface that leads to `peer`; empty where it cannot be told."""
    address = own_address(peer)
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.split("%")[0] == address for entry in entries):
            return name
    return ""


if __name__ == "__main__":
    sys.exit(cli.exit_status(lambda: print(interface(sys.argv[1]))))

"""Addresses of this host: the one from which another host is reached, and the interface that has it."""

from __future__ import annotations

import socket
import sys

import psutil


def own_address(peer: str) -> str:
    """The address from which this host would talk to `peer` (name or address); no packet is sent.

    Raises:
        ValueError: the name is unknown, or there is no route to it.
    """
    try:
        family, _, _, _, target = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            return probe.getsockname()[0]
    except OSError as error:
        raise ValueError(
            f"--address {peer}: this host has no way to it ({error}); give one that it can reach"
        ) from error


def interface(peer: str) -> str:
    """Name of the network interface that leads to `peer`; empty where it cannot be told."""
    address = own_address(peer)
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.split("%")[0] == address for entry in entries):
            return name
    return ""


if __name__ == "__main__":
    try:
        print(interface(sys.argv[1]))
    except ValueError as mistake:
        sys.exit(f"error: {mistake}")

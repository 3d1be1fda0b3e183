"""A run on a range of hosts (--nodes LEAST:MOST): torchrun's elastic agent, for which accelerate has no option.

When a host is lost, the others form a new group and resume from the newest checkpoint. When one comes (back), all save
at the next step boundary and resume together. Each start shares the same micro-batches among the ranks that are there,
so the curve stays the same. Host 0 holds the rendezvous: without it all end; the same commands start the run again.
"""

from __future__ import annotations

import argparse
import os
import select
import sys

from torch.distributed import run as torchrun
from torch.distributed.elastic.agent.server import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.launcher import api

from launch.network import own_address

FAILURES = 20
"""After how many failures a host gives up. Hosts that come do not count."""
JOIN_SECONDS = "30"
WRONG_INPUT = 2


class Agent(LocalElasticAgent):
    """Starts its workers again after each end but success, wrong input, and a signal to this host."""

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        super()._rendezvous(worker_group)
        print(f"training on {worker_group.group_world_size} host(s)", file=sys.stderr, flush=True)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        codes = [failure.exitcode for failure in result.failures.values()]
        if WRONG_INPUT in codes or asked_to_stop():
            self._remaining_restarts = 0
        return result


def asked_to_stop() -> bool:
    """Whether the process above (launch.start) has received a signal, which it writes to DUET_STOP_FD."""
    return bool(select.select([int(os.environ["DUET_STOP_FD"])], [], [], 0)[0])


def prepare(nodes: str, options: argparse.Namespace) -> None:
    """Have the torchrun that accelerate is about to call take LEAST:MOST hosts.

    options: of `accelerate launch`, for MOST machines; machine_rank tells only who is host 0.

    Environment: DUET_JOIN, seconds that a group which could start waits for more hosts (default 30).

    Raises:
        ValueError: this host has no way to main_process_ip.
    """
    address, host = options.main_process_ip, int(options.machine_rank) == 0
    own = own_address(address)
    # What workers get between TERM and KILL when the group grows: a step and a checkpoint.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120")
    # The store that agents share with workers keeps the address of the first group: hosts that come later wait for it.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    plain = torchrun.run

    def run(arguments: argparse.Namespace) -> None:
        arguments.nnodes, arguments.max_restarts = nodes, FAILURES
        arguments.rdzv_backend, arguments.rdzv_id = "c10d", "duet"
        arguments.rdzv_endpoint = f"{address}:{options.main_process_port}"
        arguments.rdzv_conf = f"is_host={int(host)},last_call_timeout={os.environ.get('DUET_JOIN', JOIN_SECONDS)}"
        arguments.local_addr = own
        arguments.master_addr, arguments.node_rank = None, 0
        plain(arguments)

    torchrun.run = run
    api.LocalElasticAgent = Agent  # type: ignore[misc]

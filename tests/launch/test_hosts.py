"""Training over two hosts with addresses of their own, and what happens when the link between them is cut."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.hosts import ROOT, Hosts, why_not
from tests.support.running import assert_same_curve
from tests.support.slurm import wait_for
from tests.support.training import finish, saved_step, small_run, wait_for_step
from train import cli
from train.config import RunConfig

TIMEOUT = 20  # seconds, DUET_TIMEOUT
LEAVING = 40  # seconds that the ranks and their launchers get on top: torchrun kills after 30


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if reason := why_not():
        pytest.skip(reason)
    with Hosts() as hosts:
        yield hosts


def command(config: RunConfig, directory: Path) -> tuple[str, ...]:
    path = directory / "hosts.yaml"
    path.write_text(cli.to_yaml(config))
    return ("--config", str(path))


def own_address(hosts: Hosts, host: int, peer: str, **environment: str) -> subprocess.Popen:
    code = "import sys; from launch.network import own_address; print(own_address(sys.argv[1]))"
    command = [*hosts.on(host), sys.executable, "-c", code, peer]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, text=True)


def test_a_host_knows_its_address_by_a_name_that_means_loopback_to_it(hosts):
    for host, peer, expected in (
        (0, "host0", hosts.addresses[0]),
        (1, "host0", hosts.addresses[1]),
        (0, "localhost", "127.0.0.1"),
        (0, "127.0.0.1", "127.0.0.1"),
    ):
        assert own_address(hosts, host, peer).communicate()[0].strip() == expected, (host, peer)


def test_a_name_may_appear_late(hosts):
    waiting = own_address(hosts, 1, "late", DUET_RESOLVE="60")
    time.sleep(2)
    assert waiting.poll() is None
    with hosts.hosts_file(1).open("a") as file:
        file.write(f"{hosts.addresses[0]} late\n")
    assert waiting.communicate(timeout=60)[0].strip() == hosts.addresses[1]
    assert own_address(hosts, 1, "never", DUET_RESOLVE="1").wait(60) == 1


@pytest.mark.slow
def test_a_cut_link_ends_all_ranks_and_the_same_commands_go_on(hosts, tmp_path):
    config = small_run(tmp_path, steps=8)
    config.checkpoint.every = 2
    logs = [tmp_path / f"host{host}" for host in (0, 1)]
    arguments = ("--nodes", "2", *command(config, tmp_path))
    both = [hosts.start(host, logs[host], *arguments, DUET_TIMEOUT=str(TIMEOUT)) for host in (0, 1)]
    wait_for_step(config, 3, logs[0])
    hosts.link("down")
    cut = time.monotonic()
    expected = finish(replace(config, name="single"))  # here, as the others only wait
    codes = [process.wait(TIMEOUT + LEAVING) for process in both]
    assert time.monotonic() - cut < TIMEOUT + LEAVING
    assert codes == [1, 1]
    for rank, log in enumerate(logs):
        assert f"error: rank {rank} has lost the other ranks" in log.read_text()
        assert "the same command resumes from it" in log.read_text()
    assert saved_step(config) >= 2

    hosts.link("up")
    both = [hosts.start(host, logs[host], *arguments) for host in (0, 1)]
    assert [process.wait(300) for process in both] == [0, 0], logs[0].read_text() + logs[1].read_text()
    assert "resumes from" in logs[0].read_text()
    assert_same_curve(finish(config), expected)


@pytest.mark.slow
def test_a_range_of_hosts_goes_on_without_a_lost_one_and_takes_it_back(hosts, tmp_path):
    """--nodes 1:2: host 1 is gone from one moment to the next, host 0 resumes alone; host 1 is back and taken in."""
    config = small_run(tmp_path, steps=80)
    config.checkpoint.every = 2
    logs = [tmp_path / f"host{host}" for host in (0, 1)]
    arguments = ("--nodes", "1:2", *command(config, tmp_path))
    environment = {"DUET_TIMEOUT": str(TIMEOUT), "DUET_JOIN": "5"}
    first, second = (hosts.start(host, logs[host], *arguments, **environment) for host in (0, 1))
    wait_for_step(config, 3, logs[0])
    together = logs[0].read_text().count("training on 2 host(s)")
    assert together >= 1
    hosts.link("down")
    second.kill()
    wait_for(lambda: "training on 1 host(s)" in logs[0].read_text(), "group of one", 180)
    wait_for_step(config, saved_step(config) + 3, logs[0])

    hosts.link("up")
    second = hosts.start(1, logs[1], *arguments, **environment)
    wait_for(lambda: logs[0].read_text().count("training on 2 host(s)") > together, "group of two again", 180)
    assert [first.wait(400), second.wait(400)] == [0, 0], logs[0].read_text() + logs[1].read_text()
    alone = replace(config, name="single")
    assert_same_curve(finish(config), finish(alone))

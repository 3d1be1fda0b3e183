"""Training over two hosts with addresses of their own, and what happens when the link between them is cut."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.launch.hosts import Hosts, why_not
from tests.launch.slurm import wait_for
from tests.launch.training import assert_same, finish, saved_step, small_run, wait_for_step
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


def test_a_cut_link_ends_all_ranks_and_the_same_commands_go_on(hosts, tmp_path):
    config = small_run(tmp_path, steps=8)
    config.checkpoint.every = 2
    logs = [tmp_path / f"host{host}" for host in (0, 1)]
    arguments = ("--nodes", "2", *command(config, tmp_path))
    both = [hosts.start(host, logs[host], *arguments, DUET_TIMEOUT=str(TIMEOUT)) for host in (0, 1)]
    wait_for_step(config, 3, logs[0])
    hosts.link("down")
    cut = time.monotonic()
    codes = [process.wait(TIMEOUT + LEAVING) for process in both]
    assert time.monotonic() - cut < TIMEOUT + LEAVING
    assert codes == [1, 1]
    for rank, log in enumerate(logs):
        assert f"error: rank {rank} has lost the other ranks" in log.read_text()
        assert "the same command goes on from it" in log.read_text()
    assert saved_step(config) >= 2

    hosts.link("up")
    both = [hosts.start(host, logs[host], *arguments) for host in (0, 1)]
    assert [process.wait(300) for process in both] == [0, 0], logs[0].read_text() + logs[1].read_text()
    assert "going on from" in logs[0].read_text()
    alone = replace(config, name="single")
    assert_same(finish(config), finish(alone))


@pytest.mark.slow
def test_a_range_of_hosts_goes_on_without_a_lost_one_and_takes_it_back(hosts, tmp_path):
    """--nodes 1:2: host 1 is gone from one moment to the next, host 0 goes on alone; host 1 is back and taken in."""
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
    assert_same(finish(config), finish(alone))

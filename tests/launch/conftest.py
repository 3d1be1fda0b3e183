"""One SLURM for all tests that need one."""

from collections.abc import Callable, Iterator

import pytest

from launch.slurm.submit import main
from tests.support.slurm import ROOT, Cluster, wait_for, why_not


@pytest.fixture(scope="session")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if why_not():
        pytest.skip(why_not())
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def cluster(started: Cluster) -> Iterator[Cluster]:
    """Two idle nodes; what the test leaves running is cancelled."""
    yield started
    started.ask("scancel", "--me")
    wait_for(lambda: started.idle() == {"n1", "n2"} and not started.ask("squeue", "-h"), "idle nodes", 90)


@pytest.fixture
def submit(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """submit.py in this process, on the cluster: submit(*arguments) is (exit status, what it says)."""
    monkeypatch.chdir(ROOT)
    for name in ("PATH", "SLURM_CONF", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, cluster.environment[name])

    def call(*arguments: str) -> tuple[int, str]:
        status = main(list(arguments))
        said = capsys.readouterr()
        return status, said.out + said.err

    return call

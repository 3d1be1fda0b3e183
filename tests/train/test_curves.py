"""The recorded curve is still the curve, on any number of processes and any engine."""

import pytest

from tests.support import curves
from tests.support.curves import STEPS, Curve
from tests.support.exactness import ENGINES, worlds

# Other processors and versions round otherwise, and a network with kinks amplifies that over 50 steps.
GOLDEN_TOLERANCE = 1e-3
TOLERANCE = 1e-4
REMEDY = "if the change is meant, record it again: python -m tests.benchmarks.curves --update"


@pytest.fixture(scope="module")
def plain() -> Curve:
    return curves.record()


def test_the_curve_is_the_recorded_one(plain: Curve) -> None:
    expected, versions = curves.golden()
    assert len(plain.losses) == len(expected.losses) == STEPS
    assert plain.digests == expected.digests, f"other samples, or another order; {REMEDY}"
    difference = plain.differs(expected)
    assert difference <= GOLDEN_TOLERANCE, (
        f"{difference:.1e}, recorded with {versions}, is {curves.versions()}; {REMEDY}"
    )


def test_a_difference_is_seen() -> None:
    expected, _ = curves.golden()
    losses = [*expected.losses[:-1], expected.losses[-1] * 1.002]
    swapped = [expected.digests[1], expected.digests[0], *expected.digests[2:]]
    assert expected._replace(losses=losses).differs(expected) == pytest.approx(2e-3, rel=1e-3)
    assert expected._replace(digests=swapped).differs(expected) == float("inf")


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "world"), [(engine, world) for engine in ENGINES[1:] for world in worlds(engine)])
def test_every_engine_and_world_makes_the_same_curve(plain: Curve, engine: str, world: int) -> None:
    difference = curves.record(engine, world, resident=1).differs(plain)
    assert difference <= TOLERANCE, f"{difference:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize("rows", ["full", "local"])
def test_every_way_to_compute_the_loss_makes_the_same_curve(plain: Curve, rows: str) -> None:
    for engine, world in (("plain", 1), ("ddp", 2)):
        assert curves.record(engine, world, rows).differs(plain) <= TOLERANCE, engine

"""Every engine, world size and accumulation gives the gradient of one plain process that holds the whole batch."""

import pytest

from tests.exactness import ENGINES, LOSSES, run_cases, worlds

TOLERANCE = 1e-5


def check(engine: str, world: int, losses: tuple[str, ...], accumulations: tuple[int, ...] = (1, 2, 4)) -> None:
    for case, (loss, gradient, parameter) in run_cases(engine, world, accumulations, losses).items():
        assert loss <= TOLERANCE, f"{case}: the loss is off by {loss:.1e}"
        assert gradient <= TOLERANCE, f"{case}: the gradient of {parameter} is off by {gradient:.1e}"


@pytest.mark.parametrize(("engine", "world"), [("plain", 1), ("ddp", 2), ("zero2", 2), ("zero3", 2)])
def test_gradients_equal_one_plain_process(engine: str, world: int) -> None:
    check(engine, world, ("tiled", "sigmoid"))


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "world"), [(engine, world) for engine in ENGINES for world in worlds(engine)])
def test_the_whole_matrix(engine: str, world: int) -> None:
    check(engine, world, LOSSES)


def test_a_wrong_gradient_is_seen() -> None:
    """Accumulation that backpropagates the whole loss in every part: k times the temperature's gradient."""
    results = run_cases("plain", 1, (2,), ("tiled",), sabotage=True)
    ((_, gradient, parameter),) = results.values()
    assert gradient > 0.5 and parameter == "log_scale"

"""Every engine, world size and accumulation gives the gradient of one plain process that holds the whole batch."""

import pytest

from tests.support.exactness import (
    ENGINES,
    LEVELS,
    LOSSES,
    SELF_SUPERVISED,
    TOLERANCE,
    run_cases,
    worlds,
)
from tests.support.wrong_schemes import SCHEMES


def check(engine: str, world: int, losses: tuple[str, ...], accumulations: tuple[int, ...] = (1, 2, 4)) -> None:
    for case, (loss, gradient, parameter) in run_cases(engine, world, accumulations, losses).items():
        assert loss <= TOLERANCE, f"{case}: the loss is off by {loss:.1e}"
        assert gradient <= TOLERANCE, f"{case}: the gradient of {parameter} is off by {gradient:.1e}"


@pytest.mark.parametrize(
    ("engine", "world", "losses", "accumulations"),
    [
        ("plain", 1, ("sigmoid", LEVELS), (1, 4)),
        ("ddp", 2, ("sigmoid", SELF_SUPERVISED), (1, 4)),
        ("zero2", 2, ("tiled", SELF_SUPERVISED), (1, 4)),
        ("zero3", 2, ("tiled", LEVELS), (2,)),
    ],
)
def test_gradients_equal_one_plain_process(
    engine: str, world: int, losses: tuple[str, ...], accumulations: tuple[int, ...]
) -> None:
    check(engine, world, losses, accumulations)


@pytest.mark.parametrize(
    ("engine", "world"),
    [("zero2", 2), *(pytest.param(engine, 2, marks=pytest.mark.slow) for engine in ("ddp", "zero3"))],
)
def test_bf16_is_as_exact_as_fp32(engine: str, world: int) -> None:
    for case, (loss, gradient, parameter) in run_cases(engine, world, (1, 2), ("tiled",), bf16=True).items():
        assert loss <= TOLERANCE, f"{case}: the loss is off by {loss:.1e}"
        assert gradient <= TOLERANCE, f"{case}: the gradient of {parameter} is off by {gradient:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "world"), [(engine, world) for engine in ENGINES for world in worlds(engine)])
def test_the_whole_matrix(engine: str, world: int) -> None:
    check(engine, world, (*LOSSES, LEVELS, SELF_SUPERVISED))


@pytest.mark.parametrize(
    "engine", ["ddp", *(pytest.param(engine, marks=pytest.mark.slow) for engine in ("zero1", "zero2", "zero3"))]
)
def test_wrong_gradients_are_seen_and_the_next_step_is_right(engine: str) -> None:
    results = run_cases(engine, 2, (2,), ("tiled",), (*SCHEMES, ""))
    for case, (_, gradient, parameter) in results.items():
        if not case.scheme:
            assert gradient <= TOLERANCE, f"{gradient:.1e} of {parameter} after wrong steps"
        elif case.scheme in ("temperature summed", "whole loss in every part"):
            assert parameter == "log_scale" and gradient == pytest.approx(1, rel=1e-3), case
        else:
            assert gradient >= 0.5e-3, f"{case} goes unnoticed: {gradient:.1e} of {parameter}"

"""The controller of modality balance. Over ranks, engines and resumption: test_meter.py."""

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from train.config import BalanceConfig, RunConfig
from train.engine.balance import Balance

KINDS = ("gradient", "update", "progress")
HALF = math.sqrt(10) ** 0.5  # what strength 1/2 makes of a factor of 10, for each of two towers


def make(kind: str = "gradient", **options) -> Balance:
    """A controller that measures at every step and does not smooth."""
    config = RunConfig()
    config.balance = BalanceConfig(**({"kind": kind, "every": 1, "smoothing": 0.0} | options))
    config.optim.warmup_steps = 0
    return Balance(config, {})


def measured(image: float = 1.0, text: float = 1.0, **others: float) -> dict[str, float]:
    """Two towers that differ in the norm of their gradients alone."""
    metrics = {"grad_norm/image": image, "grad_norm/text": text}
    metrics |= {f"weight_norm/{tower}": 50.0 for tower in ("image", "text")}
    return metrics | {f"update_ratio/{tower}": 1e-3 for tower in ("image", "text")} | others


@pytest.mark.parametrize("kind", ["gradient", "progress"])
def test_a_tower_with_ten_times_the_gradient_is_slowed_and_recovers(kind: str) -> None:
    balance = make(kind)
    balance.update(0, measured())
    assert balance.multipliers() == {"image": 1.0, "text": 1.0}
    balance.update(1, measured(image=10.0))
    assert balance.multipliers() == pytest.approx({"image": 1 / HALF, "text": HALF})
    # Updates shrink with the multiplier that is in force; that must not count as a change of the tower.
    balance.update(2, measured(10.0, 1.0, **{"update_ratio/image": 1e-3 / HALF, "update_ratio/text": 1e-3 * HALF}))
    assert balance.multipliers() == pytest.approx({"image": 1 / HALF, "text": HALF})
    balance.update(3, measured(1.0, 10.0, **{"update_ratio/image": 1e-3 / HALF, "update_ratio/text": 1e-3 * HALF}))
    assert balance.multipliers() == pytest.approx({"image": HALF, "text": 1 / HALF})
    balance.update(4, measured(1.0, 1.0, **{"update_ratio/image": 1e-3 * HALF, "update_ratio/text": 1e-3 / HALF}))
    assert balance.multipliers() == pytest.approx({"image": 1.0, "text": 1.0})


def test_what_is_measured_is_relative_to_the_weights() -> None:
    balance = make("gradient")
    balance.update(0, measured(10.0, 1.0, **{"weight_norm/image": 500.0}))
    assert balance.multipliers() == pytest.approx({"image": 1.0, "text": 1.0})


def test_at_full_strength_updates_relative_to_the_weights_become_equal() -> None:
    balance, speed = make("update", strength=1.0), {"image": 3e-3, "text": 1e-3}
    for step in range(3):
        factors = balance.multipliers()
        ratios = {f"update_ratio/{tower}": speed[tower] * factors[tower] for tower in speed}
        balance.update(step, measured(**ratios))
    factors = balance.multipliers()
    assert speed["image"] * factors["image"] == pytest.approx(speed["text"] * factors["text"])


def test_a_negative_strength_favours_the_tower_with_the_larger_gradient() -> None:
    balance = make(strength=-0.5)
    balance.update(0, measured(image=10.0))
    assert balance.multipliers() == pytest.approx({"image": HALF, "text": 1 / HALF})


def test_smoothing_is_an_unbiased_moving_average_of_the_logarithm() -> None:
    balance, ratios = make(smoothing=0.6, strength=1.0, max=100.0), [4.0, 0.5, 3.0, 9.0]
    for step, ratio in enumerate(ratios):
        balance.update(step, measured(image=ratio))
    weights = [0.6**age for age in range(len(ratios))][::-1]
    average = sum(w * math.log(r) for w, r in zip(weights, ratios, strict=True)) / sum(weights)
    assert balance.multipliers()["image"] == pytest.approx(math.exp(-average / 2))


def test_from_the_start_on_only_what_changes_counts() -> None:
    balance = make(reference="start", strength=1.0)
    balance.settled = 3
    for step in range(3):
        balance.update(step, measured(image=5.0 + step))
        assert balance.multipliers() == {"image": 1.0, "text": 1.0}
    balance.update(3, measured(image=70.0))
    assert balance.multipliers() == pytest.approx({"image": 10**-0.5, "text": 10**0.5})


@given(
    kind=st.sampled_from(KINDS),
    strength=st.floats(0.01, 1),
    largest=st.floats(1.001, 1e6),
    smoothing=st.floats(0, 0.999),
    values=st.lists(st.tuples(*[st.floats(0) | st.just(math.nan)] * 6), max_size=20),
)
@example(kind="gradient", strength=1.0, largest=2.0, smoothing=0.0, values=[(1e-300, 1e300, 1.0, 1.0, 1.0, 1.0)])
def test_multipliers_never_leave_their_bounds(kind, strength, largest, smoothing, values) -> None:
    balance = make(kind, strength=strength, max=largest, smoothing=smoothing)
    names = [f"{norm}/{tower}" for norm in ("grad_norm", "weight_norm", "update_ratio") for tower in ("image", "text")]
    for step, value in enumerate(values):
        balance.update(step, dict(zip(names, value, strict=True)))
        for factor in balance.multipliers().values():
            assert 1 / largest <= factor <= largest


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("locked_until", [-1, 5])
def test_locked_towers_have_multiplier_one(kind: str, locked_until: int) -> None:
    config = RunConfig()
    config.balance = BalanceConfig(kind=kind, every=1, smoothing=0.0)
    config.model.text.locked_until = locked_until
    balance = Balance(config, {})
    for step in range(5):
        assert not balance.due(step)
        balance.update(step, measured(image=10.0, text=0.0, **{"update_ratio/text": 0.0}))
    assert balance.multipliers() == {"image": 1.0, "text": 1.0}
    assert balance.due(5) == (locked_until == 5)


def test_a_step_without_a_gradient_in_a_tower_changes_nothing() -> None:
    balance = make()
    balance.update(0, measured(image=10.0))
    before = dict(balance.state)
    for metrics in ({"loss": 1.0}, measured(image=0.0), measured(text=math.nan), measured(**{"weight_norm/text": 0.0})):
        balance.update(1, metrics)
    assert balance.state == before


def test_off_measures_nothing_and_multiplies_nothing() -> None:
    balance = make("off")
    balance.update(0, measured(image=10.0))
    assert not balance.due(0) and balance.multipliers() == {} and balance.state == {}

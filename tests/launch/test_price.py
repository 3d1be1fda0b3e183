"""The price of a run: the sum of what was measured, and the whole command once."""

import json
from dataclasses import replace

import pytest

from launch.links import Links
from launch.price import Calibration, exchanged, main, predict, priced
from tests.support.distributed import run_distributed
from tests.support.exactness import engine_environment, make_batch
from tests.support.running import prepare
from train import cli
from train.config import RunConfig

LINKS = Links(ranks=2, latency=0.001, reduce=1e9, gather=2e9)
FOUND = Calibration(
    fixed=0.5, kept=1.0, cached=1.5, logit=1e-9, loader=0.5, alone=False, gradients=10**9, features=10**6, links=LINKS
)


def config_of(resident: int) -> RunConfig:
    config = RunConfig()
    config.train.global_batch, config.train.micro_batch, config.train.resident = 1024, 128, resident
    return config


def test_a_step_is_the_sum_of_its_parts():
    one = predict(FOUND, config_of(1), 1)
    assert one["towers"] == 7 * 1.5 + 1.0 and one["exchange"] == 0 and one["wait"] == 0
    assert one["step"] == pytest.approx(11.5 + 0.5 + 1024**2 * 1e-9)
    assert predict(FOUND, config_of(8), 1)["towers"] == 8 * 1.0, "all of it is kept"
    four = predict(FOUND, config_of(1), 4)
    assert four["towers"] == 1.5 + 1.0
    # Rings: three quarters of 2 x (1 GB of gradients + 1 GB of features' gradients), and of 1 GB of features.
    assert four["exchange"] == pytest.approx(2 * 0.003 + 2 * 0.75 * 2.024 + 0.75 * 1.024 / 2)


def test_zero_exchanges_more_and_each_rank_updates_its_part():
    for stage, reduced, gathered in ((1, 1, 1), (2, 2, 1), (3, 1, 5)):  # of 1 GB, in two parts of a rank's share
        four = predict(replace(FOUND, stage=stage), config_of(1), 4)
        wanted = 2 * 0.003 + 2 * 0.75 * (reduced + 1.024) + 0.75 * (gathered + 1.024) / 2
        assert four["exchange"] == pytest.approx(wanted)
        assert four["other"] == 0.5 / 4
    assert predict(replace(FOUND, stage=3), config_of(1), 1)["exchange"] == 0


def exchanged_by(path: str) -> tuple[float, float]:
    """What DeepSpeed all-reduces (half of it where it scatters) and gathers in a step, in units of the gradients."""
    from collections import Counter

    from torch import distributed as dist

    sent: Counter[str] = Counter()

    def count(name: str, whole: str, position: int, share: float = 1.0) -> None:
        plain = getattr(dist, name)

        def counting(*arguments, **named):
            tensor = arguments[position] if len(arguments) > position else named[whole]
            sent[name] += share * tensor.nbytes
            return plain(*arguments, **named)

        setattr(dist, name, counting)

    count("all_reduce", "tensor", 0)
    count("reduce_scatter_tensor", "input", 1, share=0.5)
    count("all_gather_into_tensor", "output_tensor", 0)  # before DeepSpeed looks them up
    from train import distributed
    from train.engine.build import engine_of_run
    from train.engine.start import start
    from train.model.pair import build_model
    from train.step import training_step

    config = cli.load(path)
    engine = engine_of_run(start(), build_model(config, (0.5,) * 3, (0.25,) * 3), config)
    gradients = 4 * sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    share = config.train.global_batch // config.train.micro_batch // distributed.world_size()
    for step in range(2):  # stage 3 has to see once which weights come when
        sent.clear()
        training_step(engine, make_batch(config, step)[distributed.rank() * share :][:share], config)
    reduced = sent["all_reduce"] + sent["reduce_scatter_tensor"]
    return reduced / gradients, sent["all_gather_into_tensor"] / gradients


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "parts"), [(1, 2), (2, 2), (2, 1), (3, 4), (3, 2), (3, 1)])
def test_what_deepspeed_exchanges(tmp_path, stage, parts):
    config = prepare(tmp_path)
    config.data.image_size, config.train.global_batch, config.train.resident = 32, 16 * parts, 1
    (tmp_path / "run.yaml").write_text(cli.to_yaml(config))
    environment = engine_environment(f"zero{stage}", tmp_path)
    found = run_distributed(exchanged_by, 2, str(tmp_path / "run.yaml"), environment=environment)[0]
    # Beside it go small numbers; stage 3 keeps small weights everywhere.
    assert found == pytest.approx(exchanged(stage, parts), rel=0.03, abs=0.01)


def test_a_loader_that_is_slower_is_waited_for():
    slow = replace(FOUND, loader=3.0)
    computing = predict(FOUND, config_of(1), 1)["step"]
    assert predict(slow, config_of(1), 1)["wait"] == pytest.approx(8 * 3.0 - computing)
    assert predict(replace(FOUND, alone=True), config_of(1), 1)["wait"] == 8 * 0.5, "without loader processes it adds"


def test_hours_and_money_and_what_has_no_price():
    rows = priced(FOUND, config_of(1), steps=3600, gpus=(1, 2, 3, 16), price=2.5)
    assert rows[0]["device_hours"] == pytest.approx(rows[0]["step"])
    assert rows[1]["price"] == pytest.approx(2 * rows[1]["step"] * 2.5)
    assert "--train.global_batch 1024 is not divisible by 3 processes" in rows[2]["why"]
    assert "16 processes x micro_batch 128" in rows[3]["why"]
    (alone,) = priced(replace(FOUND, links=None), config_of(1), steps=1, gpus=(2,), price=0.0)
    assert "run it where there are two or more" in alone["why"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpus", "0"], "--gpus 0: give numbers of processes from 1 on"),
        (["--price-per-hour", "-1"], "--price-per-hour -1.0: give the price of one device"),
        ([], "--data.train is empty"),
        (["--optim.lrr", "1"], "did you mean --optim.lr"),
    ],
)
def test_mistakes_have_a_remedy(arguments, words, capsys):
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_command(tmp_path, capsys):
    config = prepare(tmp_path)
    (tmp_path / "run.yaml").write_text(cli.to_yaml(config))
    options = ["--config", str(tmp_path / "run.yaml"), "--seconds", "2", "--gpus", "1", "2", "--price-per-hour", "3"]
    assert main(["--json", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 8 and found["calibration"]["links"]["ranks"] == 2
    one, two = found["runs"]
    assert one["step"] > two["towers"] > 0 and two["exchange"] > 0
    assert one["price"] == pytest.approx(3 * one["step"] * 8 / 3600)

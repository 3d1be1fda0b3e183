"""--engine auto: the ranks choose one engine together, by the memory plan and the device that has the least memory."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import DeepSpeedPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env

from launch.slurm import submit
from tests.support.distributed import run_distributed
from tests.support.running import MICRO_BATCH, curve, prepare
from train import cli
from train.engine.start import engine_is_open, zero_plugin
from train.memory import FILL, GB, Plan, engine_that_fits, own_plan, plan, resident
from train.model.pair import build_model

ROOT = Path(__file__).parents[2]
LARGE = Plan(parameters=10**9, learning=10**9, activations=10**9, loss=0, world=8, ema=False)


def test_the_least_stage_that_fits_is_chosen():
    whole = [LARGE.total(stage) for stage in range(4)]
    assert whole == sorted(whole, reverse=True), "each stage takes less than the one before it"
    for stage, bytes_ in enumerate(whole):
        assert LARGE.smallest_stage(bytes_ / FILL) == stage
        assert LARGE.smallest_stage(bytes_ / FILL - 1) == min(stage + 1, 3)
    assert LARGE.smallest_stage(0, most=2) == 2 and LARGE.smallest_stage(0, most=0) == 0
    assert LARGE.smallest_stage(0) == 3 and not LARGE.fits(3, 0), "the least where none fits"
    assert replace(LARGE, world=1).smallest_stage(0) == 0, "one process splits nothing"


def test_the_choice_is_said_with_its_reason():
    whole = [LARGE.total(stage) / GB for stage in range(4)]
    said = LARGE.engine_in_words(0, 80e9)
    assert said.startswith(f"engine ddp: the run takes {whole[0]:.1f} of 80 GB ")
    assert said.endswith("; --engine zero2 to split it")
    said = LARGE.engine_in_words(1, 16e9)
    assert f"engine zero1: the run takes {whole[1]:.1f} of 16 GB" in said
    assert f"; ddp would take {whole[0]:.1f}, and 90% is the most; --engine NAME" in said
    assert LARGE.engine_in_words(3, 1e9).endswith("which may be too much")
    assert "--engine" not in replace(LARGE, world=1).engine_in_words(0, 80e9)
    said = LARGE.choice_in_words()
    assert said.startswith(f"engine: ddp where each GPU has {whole[0] / FILL:.1f} GB or more, else zero1 from ")
    assert f"else zero3 from {whole[3] / FILL:.1f} GB; " in said


def test_only_a_launcher_that_names_no_zero_stage_leaves_the_engine_open(monkeypatch):
    for name in ("DUET_ENGINE", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    assert not engine_is_open(), "accelerate launch by hand"
    monkeypatch.setenv("DUET_ENGINE", "auto")
    assert engine_is_open()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert not engine_is_open(), "the file that was given says which"
    monkeypatch.setenv("DUET_ENGINE", "zero2")
    with pytest.raises(ValueError, match=r"DUET_ENGINE=zero2: auto .* --config_file"):
        engine_is_open()


def test_submit_says_from_which_memory_on_each_engine_is_taken(tmp_path):
    config = prepare(tmp_path, steps=2)
    needs = plan(config, 2, bf16=True)
    for options, more in (([], [needs.choice_in_words()]), (["--engine", "zero2"], [])):
        options = submit.make_parser().parse_args(["--nodes", "1", "--gpus_per_node", "a100:2", *options])
        assert submit.memory_plan(options, config) == [f"memory: {needs.in_words()}", *more]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_chosen_stage_is_what_its_file_makes_of_a_process(monkeypatch, stage):
    chosen = zero_plugin(stage).deepspeed_config
    file = str(ROOT / f"launch/accelerate/zero{stage}.yaml")
    options = launch_command_parser().parse_args(["--config_file", file, "--num_processes", "2", "x.py"])
    options, _, _ = _validate_launch_command(options)
    options.main_process_port, options.deepspeed_fields_from_accelerate_config = 0, ""
    _, environment = prepare_deepspeed_cmd_env(options)
    for name in set(environment) - set(os.environ):
        monkeypatch.setenv(name, environment[name])
    assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == str(stage)
    named = DeepSpeedPlugin()
    assert named.zero3_init_flag is zero_plugin(stage).zero3_init_flag is False
    differ = {key for key in named.deepspeed_config if named.deepspeed_config[key] != chosen[key]}
    assert differ <= {"gradient_accumulation_steps"}, "the Accelerator fills that in"


def test_measuring_a_model_leaves_it_as_it_is_and_a_failure_refuses_none(tmp_path):
    config = prepare(tmp_path, steps=2)
    model = build_model(config, (0.5,) * 3, (0.25,) * 3)
    before, drawn = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    stage, why = engine_that_fits(config, own_plan(config, model))
    assert stage == 0 and why.startswith("engine ddp: the run takes ")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), drawn)

    path = tmp_path / "run.yaml"
    path.write_text(cli.to_yaml(config))
    stage, why = choice_without_a_plan(str(path))
    assert stage == 0 and why.startswith("engine ddp: no memory plan can be made (")
    for stage, why in run_distributed(choice_without_a_plan, 2, str(path)):
        assert stage == 2 and why.startswith("engine zero2: no memory plan can be made (")


def choice_without_a_plan(path: str) -> tuple[int, str]:
    """Of this rank, for a model that cannot be measured."""
    config = cli.load(Path(path))
    model = build_model(config, (0.5,) * 3, (0.25,) * 3)
    model.text.register_forward_pre_hook(lambda *_: torch.empty(1, device="meta").item())
    needs = own_plan(config, model)
    with pytest.raises(ValueError, match=r"train.resident null: no memory plan .* such as 1"):
        resident(needs, 0)
    return engine_that_fits(config, needs)


def train_with(path: str, memories: list[float]) -> tuple[int, str, int]:
    """A run whose rank r has memories[r] bytes; its exit status, Accelerate's word for the engine, its ZeRO stage."""
    from accelerate.state import AcceleratorState

    from train import distributed, loop, memory

    memory.own_memory = lambda: memories[distributed.rank()]
    memory.BUCKET_ELEMENTS = 0  # which alone is more than a small model's state
    memory.build_model = None  # what is measured is the run's own model
    status = loop.run(cli.load(Path(path)))
    state = AcceleratorState()
    plugin = state.deepspeed_plugin
    return status, state.distributed_type.value, plugin.zero_stage if plugin else 0


def test_ranks_with_unequal_memory_train_with_one_engine(tmp_path, monkeypatch):
    config = prepare(tmp_path, steps=2)
    config.data.val, config.data.image_size, config.checkpoint.every = "", 32, 0
    config.train.resident = None
    monkeypatch.setattr("train.memory.BUCKET_ELEMENTS", 0)
    needs = plan(config, 2, bf16=False)
    assert needs.total(1) < needs.total(0) and needs.share == 32 // MICRO_BATCH // 2
    path = tmp_path / "run.yaml"
    path.write_text(cli.to_yaml(config))
    memories, environment = [1e12, needs.total(1) / FILL + 1], {"DUET_ENGINE": "auto"}
    ranks = run_distributed(train_with, 2, str(path), memories, environment=environment)
    assert ranks == [(0, "DEEPSPEED", 1)] * 2, "rank 0 by itself would take DDP"
    assert len(curve(config)) == 2

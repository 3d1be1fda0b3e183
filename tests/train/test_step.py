"""What a step computes: nothing twice that it need not, compiled or not."""

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.seeds import micro_batch_seed
from tests.support.exactness import keep_gradients, make_batch, make_config, write_text_tower
from train.checks import check_compile
from train.config import RunConfig
from train.engine.base import Engine
from train.engine.build import engine_of_run
from train.engine.start import start
from train.model.pair import build_model
from train.step import training_step

MICRO_BATCHES = 3
STATISTICS = ((0.5,) * 3, (0.25,) * 3)


def config_of(directory, resident: int = 1) -> RunConfig:
    config = make_config(write_text_tower(directory), "tiled", global_batch=4 * MICRO_BATCHES, resident=resident)
    config.model.image.name = "tests.train.model.test_own.Tower"
    config.model.image.dropout = 0.5
    return config


def engine_of(config: RunConfig, backend: str = "") -> Engine:
    """Without updates: a step leaves whole gradients as `engine.gradients`."""
    model = build_model(config, *STATISTICS)
    if backend:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model.compile_towers(backend)
    engine = engine_of_run(start(), model, config)
    engine.step = partial(keep_gradients, engine)
    return engine


def test_a_cached_step_goes_forward_once_more_in_all_parts_but_the_last(tmp_path):
    config = config_of(tmp_path)
    engine, batches = engine_of(config), make_batch(config)
    batches = [batches[0]] * MICRO_BATCHES  # of one length
    flops = {}
    for config.train.resident in (MICRO_BATCHES, 1, 2):
        with FlopCounterMode(display=False) as counter:
            training_step(engine, batches, config)
        flops[config.train.resident] = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        engine.features(batches[:1], [0])
    forward = counter.get_total_flops()
    assert flops[1] - flops[MICRO_BATCHES] == (MICRO_BATCHES - 1) * forward > 0
    assert flops[2] - flops[MICRO_BATCHES] == 2 * forward


def test_compiled_towers_are_whole_programs_one_for_images_and_one_for_each_length(tmp_path):
    config = config_of(tmp_path)
    # As the compiler sees them, but without its code.
    engine, batches = engine_of(config, "eager"), make_batch(config)
    lengths = {batch.ids_BL.shape[1] for batch in batches}
    assert len(lengths) == 2
    for config.train.resident in (1, MICRO_BATCHES):
        training_step(engine, batches, config)
    compiled = {name: gradient.clone() for name, gradient in engine.gradients.items()}
    engine.module.eval()
    engine.module.encode_image(batches[0].images_BCHW)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1 + len(lengths)
    plain = engine_of(config)
    assert engine.module.state_dict().keys() == plain.module.state_dict().keys()
    training_step(plain, batches, config)
    for name, gradient in plain.gradients.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-3, atol=1e-5)
    for one, other in zip(engine.module.image.buffers(), plain.module.image.buffers(), strict=True):
        assert not one.is_floating_point() or (one.isfinite().all() and other.isfinite().all())


@pytest.mark.slow
def test_a_compiled_pass_that_is_cached_is_repeated_to_the_bit(tmp_path):
    config = config_of(tmp_path)
    engine, batches = engine_of(config, "inductor"), make_batch(config)[:1]
    seeds = [micro_batch_seed(0, 0, 0)]
    cached, other = engine.features(batches, seeds), engine.features(batches, [seeds[0] + 1])
    repeated = engine.forward(batches, seeds)
    for tower in ("image", "text"):
        assert not cached[tower].requires_grad and repeated[tower].requires_grad
        assert torch.equal(cached[tower], repeated[tower])
        assert not torch.equal(cached[tower], other[tower]), "dropout is at work"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_what_cannot_be_compiled_is_refused(tmp_path):
    config = config_of(tmp_path)
    config.train.compile = True
    check_compile(config)
    config.model.image.checkpointing = True
    with pytest.raises(ValueError, match=r"train\.compile true does not go with model\.image\.checkpointing"):
        check_compile(config)
    config.model.image.norm = "sync_batch"
    with pytest.raises(ValueError, match=r"take model\.image\.norm batch"):
        check_compile(config)
    config = make_config(write_text_tower(tmp_path), "tiled, multi-scale")
    with pytest.raises(ValueError, match=r"MultiScale|reads layers inside of the towers"):
        build_model(config, *STATISTICS).compile_towers()

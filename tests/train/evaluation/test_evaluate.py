import copy
import os
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from data_pipeline.loader import eval_loader
from data_pipeline.storage.manifest import load_manifest
from data_pipeline.tokenizer import Tokenizer
from tests.support.distributed import run_distributed
from tests.support.pictures import picture
from tests.support.small import small_config, write_data
from tests.support.tars import write_shards
from tests.train.evaluation.test_retrieval import reference, without_chance
from train import distributed
from train.config import EvalTask, RunConfig
from train.evaluation import build_task
from train.evaluation.encode import Encoder, Features
from train.evaluation.retrieval import Retrieval
from train.evaluation.task import Evaluation
from train.model.pair import PairModel, build_model


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> RunConfig:
    return small_config(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), (5, 6, 2))


def parts(config: RunConfig) -> tuple[PairModel, Tokenizer]:
    return build_model(config, (0.5,) * 3, (0.25,) * 3), Tokenizer(config.model.text.name, config.data.max_tokens)


def retrieval(
    model: PairModel, config: RunConfig, tokenizer: Tokenizer, data: Path, autocast=nullcontext
) -> Evaluation:
    return build_task(EvalTask(data=str(data))).measure(Encoder(model, config, tokenizer, autocast=autocast))


def measured(config: RunConfig, data: Path, autocast=nullcontext) -> Evaluation:
    model, tokenizer = parts(config)
    return retrieval(model, config, tokenizer, data, autocast)


def test_evaluation_equals_encoding_one_at_a_time(config, data):
    model, tokenizer = parts(config)
    model.eval()
    images, texts, owners = [], [], []
    with torch.no_grad():
        for batch in eval_loader(config.data, load_manifest(data), tokenizer, batch=1):
            images.append(model.encode_image(batch.images_BCHW))
            for caption in batch.captions:
                texts.append(model.encode_text(*tokenizer([caption])))
                owners.append(len(images) - 1)
    images_ND, texts_MD = torch.cat(images), torch.cat(texts)
    found = measured(config, data)
    assert torch.allclose(found.features.image_ND, images_ND, atol=1e-5)
    assert torch.allclose(found.features.text_MD, texts_MD, atol=1e-5)
    assert found.features.image_of_text_M.tolist() == owners
    assert found.metrics["n_images"] == 13 and found.metrics["n_texts"] == 25 and found.metrics["n_bad"] == 0
    own = {name: value for name, value in without_chance(found.metrics).items() if name != "n_bad"}
    assert own == pytest.approx(reference(images_ND.numpy(), texts_MD.numpy(), np.array(owners)))


def test_a_run_is_evaluated_at_the_size_that_it_says(config, data):
    larger, same = copy.deepcopy(config), copy.deepcopy(config)
    larger.data.eval_size, same.data.image_size = 48, 48
    found, wanted, plain = (measured(each, data).features.image_ND for each in (larger, same, config))
    assert torch.equal(found, wanted) and not torch.allclose(found, plain, atol=1e-3)


def test_evaluation_leaves_the_model_as_it_was(config, data):
    model, tokenizer = parts(config)
    model.train()
    model.text.eval()  # as a tower that never learns
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    kept = {}
    model.image.register_forward_hook(
        lambda module, inputs, output: output * kept.setdefault("buffer", torch.ones(1) + 1)
    )
    retrieval(model, config, tokenizer, data)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model([model.blank_micro_batch()], [0])["image"].sum().backward()  # what a module keeps can be trained with
    assert model.image_projection.weight.grad is not None


def test_dropout_and_batch_statistics_play_no_part(config, data):
    model, tokenizer = parts(config)
    model.train()
    twice = [retrieval(model, config, tokenizer, data).features for _ in range(2)]
    assert torch.equal(twice[0].text_MD, twice[1].text_MD)
    assert torch.equal(twice[0].image_ND, twice[1].image_ND)


def test_an_interrupted_evaluation_leaves_the_model_as_it_was(config, data):
    model, tokenizer = parts(config)

    def autocast():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        retrieval(model, config, tokenizer, data, autocast)
    assert model.training and torch.is_grad_enabled()


def test_forward_passes_run_in_the_context_that_is_given(config, data):
    plain = measured(config, data).features
    rounded = measured(config, data, lambda: torch.autocast("cpu", torch.bfloat16)).features
    for one, other in ((plain.image_ND, rounded.image_ND), (plain.text_MD, rounded.text_MD)):
        assert other.dtype == torch.float32
        assert not torch.equal(one, other) and torch.allclose(one, other, atol=0.05)


def test_more_captions_than_a_batch_holds(config, data):
    whole = measured(config, data).features
    config = copy.deepcopy(config)
    config.eval.batch = 1  # the samples have up to three captions
    single = measured(config, data).features
    assert torch.allclose(whole.text_MD, single.text_MD, atol=1e-5)
    assert whole.captions == single.captions


def _on_a_rank(config: RunConfig, sets: list[Path]) -> list[tuple[dict, Features, int]]:
    """Metrics, features and forward passes on each data set."""
    torch.manual_seed(distributed.rank())  # nothing may depend on the rank's random numbers
    model, tokenizer = parts(config)
    results, passes = [], []
    for tower in (model.image, model.text):
        tower.register_forward_hook(lambda *_: passes.append(1))
    for data in sets:
        passes.clear()
        found = retrieval(model, config, tokenizer, data)
        results.append((found.metrics, found.features, len(passes)))
    return results


def test_every_world_gets_the_same_result(config, tmp_path):
    # Uneven shares with a bad sample, and fewer images than ranks: one has nothing to do but must join in.
    config = copy.deepcopy(config)
    config.eval.batch = 2  # so that ranks differ in the number of caption batches, too
    sets = [write_data(tmp_path / "uneven", (5, 4, 2), bad=(4,)), write_data(tmp_path / "few", (2,))]
    alone, ranks = _on_a_rank(config, sets), run_distributed(_on_a_rank, 3, config, sets)
    for number, (metrics, features, _) in enumerate(alone):
        for result in ranks:
            assert result[number][0] == metrics
            other = result[number][1]
            assert (other.keys, other.captions, other.classes) == (features.keys, features.captions, features.classes)
            assert torch.equal(other.image_of_text_M, features.image_of_text_M)
            assert torch.allclose(other.image_ND, features.image_ND, atol=1e-5)
            assert torch.allclose(other.text_MD, features.text_MD, atol=1e-5)
        passes = {result[number][2] for result in ranks}
        assert len(passes) == 1, f"ranks differ in forward passes, {passes}: ZeRO-3 would hang"


def _encoded(config: RunConfig, sets: list[Path]) -> list[Features]:
    model, tokenizer = parts(config)
    encoder = Encoder(model, config, tokenizer)
    return [encoder.features(load_manifest(data)) for data in sets]


def test_images_without_captions_are_encoded_by_every_world(config, tmp_path):
    def sample(number: int) -> tuple[str, dict[str, bytes]]:
        captions = {"txt": b"the last one"} if number >= 5 else {}
        return f"{number:04d}", {"png": picture(number), "cls": str(number % 2).encode(), **captions}

    sets = [write_shards(tmp_path / name, (count,), sample) for name, count in (("none", 4), ("some", 6))]
    alone, ranks = _encoded(config, sets), run_distributed(_encoded, 2, config, sets)
    for number, texts in enumerate((0, 1)):
        for result in ranks:
            assert result[number].text_MD.shape == alone[number].text_MD.shape == (texts, config.model.embed_dim)
            assert torch.allclose(result[number].image_ND, alone[number].image_ND, atol=1e-5)


def test_unreadable_samples_are_left_out_and_counted(config, tmp_path):
    bad = (0, 4, 5, 6, 7, 11)  # 4 to 7 are a whole batch
    found = measured(config, write_data(tmp_path, (8, 5), bad=bad))
    assert found.metrics["n_bad"] == len(found.features.bad) == 6
    assert found.metrics["n_images"] == 7
    numbers = [int(key.rpartition("/")[2]) for key in found.features.keys]
    assert numbers == [number for number in range(13) if number not in bad]
    owners = found.features.image_of_text_M.tolist()
    for caption, row in zip(found.features.captions, owners, strict=True):
        assert caption.endswith(f"no. {numbers[row]}")


def test_no_readable_sample_is_an_error(config, tmp_path):
    with pytest.raises(ValueError, match="not one of its 3 samples could be read"):
        measured(config, write_data(tmp_path, (3,), bad=(0, 1, 2)))


def test_diverged_weights_are_an_error(config, data):
    model, tokenizer = parts(config)
    nn.init.constant_(model.image_projection.weight, torch.nan)
    with pytest.raises(ValueError, match="13 of 13 image features are not finite"):
        retrieval(model, config, tokenizer, data)


def test_the_table_shows_both_directions_beside_chance(config, data):
    metrics = measured(config, data).metrics
    table = Retrieval.table
    lines = table(metrics).splitlines()
    assert lines[1].split() == ["R@1", f"{metrics['t2i_R@1']:.1f}%", "7.7%", f"{metrics['i2t_R@1']:.1f}%", "7.7%"]
    assert lines[-1].strip() == "13 images, 25 texts"
    assert table(metrics | {"n_bad": 2.0}).endswith("13 images, 25 texts, 2 unreadable")


@pytest.mark.parametrize("captioned", [0, 5])
def test_captions_are_needed_only_where_the_task_uses_them(tmp_path, config, captioned):
    """CLIP_benchmark's classification sets have none, and others lack some."""

    def sample(number: int) -> tuple[str, dict[str, bytes]]:
        text = {"txt": f"picture {number}".encode()} if number % 2 and number < 2 * captioned else {}
        return f"{number:03d}", {"png": picture(number), "cls": str(number % 3).encode(), **text}

    data = write_shards(tmp_path / "data", (6, 6), sample)
    (tmp_path / "names.txt").write_text("red\ngreen\nblue\n")
    model, tokenizer = parts(config)
    encoder = Encoder(model, config, tokenizer)
    task = EvalTask(task="zeroshot", data=str(data), classnames=str(tmp_path / "names.txt"))
    assert build_task(task).measure(encoder).metrics["n_images"] == 12
    if not captioned:
        with pytest.raises(ValueError, match="0 images and 0 texts"):
            build_task(EvalTask(data=str(data))).measure(encoder)
        return
    found = build_task(EvalTask(data=str(data))).measure(encoder)
    assert found.metrics["n_images"] == found.metrics["n_texts"] == captioned
    assert found.metrics["n_bad"] == 12 - captioned
    assert [found.features.keys[row] for row in found.features.image_of_text_M] == found.features.keys
    assert found.features.captions == [f"picture {int(key[-3:])}" for key in found.features.keys]
    whole = encoder.features(load_manifest(data))
    rows = [whole.keys.index(key) for key in found.features.keys]
    assert torch.equal(found.features.image_ND, whole.image_ND[rows])


def test_held_out_images_are_decoded_once_where_they_fit(config, tmp_path):
    """What is kept is what was decoded; of what is not kept the shards are read again."""
    data = write_data(tmp_path / "data", (5, 4), bad=(2,))
    config = copy.deepcopy(config)
    model, tokenizer = parts(config)
    size = 3 * config.data.image_size**2
    for kept, gigabytes in ((True, 9 * size / 1e9), (False, 8 * size / 1e9), (False, 0.0)):
        config.eval.cache_gb = gigabytes
        encoder, task = Encoder(model, config, tokenizer), build_task(EvalTask(data=str(data)))
        first = task.measure(encoder)
        encoder.forget()
        shard = tmp_path / "data" / "part-000001.tar"
        stamp = shard.stat().st_mtime_ns
        os.utime(shard, ns=(stamp, stamp + 1))  # no reader takes it any more
        if not kept:
            with pytest.raises(ValueError, match=r"part-000001\.tar: .* was changed"):
                task.measure(encoder)
        else:
            again = task.measure(encoder)
            assert again.metrics == first.metrics and again.metrics["n_bad"] == 1
            assert torch.equal(again.features.image_ND, first.features.image_ND)
            assert again.features.bad == first.features.bad and again.features.captions == first.features.captions
        os.utime(shard, ns=(stamp, stamp))


def test_what_is_kept_is_no_memory_of_a_loader_process(config, data):
    config = copy.deepcopy(config)
    config.data.workers = 1
    model, tokenizer = parts(config)
    encoder = Encoder(model, config, tokenizer)
    retrieved = build_task(EvalTask(data=str(data))).measure(encoder).features
    kept = encoder._decoded[str(data / "manifest.json")]
    assert sum(len(batch.keys) for batch in kept) == 13 and not any(batch.images_BCHW.is_shared() for batch in kept)
    encoder.forget()
    assert torch.equal(build_task(EvalTask(data=str(data))).measure(encoder).features.image_ND, retrieved.image_ND)

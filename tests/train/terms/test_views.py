import copy

import pytest
import torch
import transformers
from torch.nn import functional as F

from tests.support.syncs import Syncs
from tests.train.model.test_model import MEAN, STD, make_batches, small_config
from train import cli
from train.config import RunConfig
from train.distributed import all_reduce_sum
from train.engine.optim import param_groups
from train.loss.ids import Rows
from train.model import norm
from train.model.pair import build_model
from train.terms.objective import Objective


@pytest.fixture
def off(text_tower) -> RunConfig:
    return small_config(text_tower)


@pytest.fixture
def config(off) -> RunConfig:
    config = copy.deepcopy(off)
    config.model.self_supervision.image, config.model.self_supervision.text = 0.5, 0.25
    config.model.self_supervision.hidden, config.model.self_supervision.dim = 32, 8
    return config


def batches_with_extras(count: int) -> list:
    batches = make_batches(count)
    for number, batch in enumerate(batches):
        batch.views_BCHW = batch.images_BCHW.flip(3)
        batch.masked_BL, batch.targets_BL = batch.ids_BL.clone(), torch.full_like(batch.ids_BL, -100)
        batch.targets_BL[:, : 1 + number], batch.masked_BL[:, : 1 + number] = batch.ids_BL[:, : 1 + number], 3
    return batches


@pytest.mark.parametrize("kind", ["batch", "sync_batch"])
def test_the_pair_is_that_of_a_run_without(config, off, kind):
    """Features, dropout and running statistics; second passes leave no trace but in their own outputs."""
    config.model.image.norm = off.model.image.norm = kind
    model, plain = build_model(config, MEAN, STD), build_model(off, MEAN, STD)
    outputs = []
    for one in (model, plain):
        with torch.no_grad(), norm.recording(one):
            outputs.append(one(batches_with_extras(2), [3, 4]))
        norm.update_running(one, all_reduce_sum, 2)
    assert outputs[0].keys() - outputs[1].keys() == {"view", "other_view", "words_loss", "words_count"}
    assert all(torch.equal(outputs[0][name], value) for name, value in outputs[1].items())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in plain.state_dict().items())
    assert outputs[0]["words_count"].tolist() == [1, 1, 1, 2, 2, 2]


def test_two_views_are_contrasted_by_nt_xent():
    torch.manual_seed(0)
    config = RunConfig()
    config.loss.kind, config.loss.label_smoothing = "sigmoid", 0.1  # which are the pair's, not the views'
    config.model.self_supervision.image = 2.0
    pair, views = (F.normalize(torch.randn(2, 6, 5, dtype=torch.float64), dim=-1) for _ in range(2))
    outputs = dict(zip(("image", "text", "view", "other_view"), (*pair, *views), strict=True))
    outputs |= {
        name: torch.tensor([value], dtype=torch.float64) for name, value in (("logit_scale", 9), ("logit_bias", 0))
    }
    scores = (views.flatten(0, 1) @ views.flatten(0, 1).T / 0.1).fill_diagonal_(-torch.inf)
    expected = F.cross_entropy(scores, torch.arange(12).roll(6))
    with Syncs() as syncs:
        parts = [Objective(config)(outputs, Rows(start, start + 2))[1] for start in (0, 2, 4)]
    assert not syncs.at, "a GPU would be waited for"
    torch.testing.assert_close(sum(part["loss/views"] for part in parts) / 3, expected)
    torch.testing.assert_close(parts[0]["loss/total"], parts[0]["loss"] + 2 * parts[0]["loss/views"])


def test_hidden_words_are_scored_as_bert_does(config):
    """The same as transformers' BertForMaskedLM with these weights; the mean is over words, not over captions."""
    model = build_model(config, MEAN, STD).eval()
    reference = transformers.BertForMaskedLM(model.text.encoder.config).eval()
    reference.bert.load_state_dict(model.text.encoder.state_dict())
    head = reference.cls.predictions
    with torch.no_grad():
        model.text_ssl.bias_V.normal_()
        head.transform.dense.load_state_dict(model.text_ssl.layer.state_dict())
        head.transform.LayerNorm.load_state_dict(model.text_ssl.norm.state_dict())
        head.decoder.bias.copy_(model.text_ssl.bias_V)
        batches = batches_with_extras(2)
        outputs = model(batches, [0, 1])
        losses = []
        for batch in batches:
            scores = reference(batch.masked_BL, attention_mask=batch.mask_BL).logits
            losses.append(F.cross_entropy(scores.flatten(0, 1), batch.targets_BL.flatten(), reduction="sum"))
    expected = torch.stack(losses).sum() / 9
    terms = Objective(config)(outputs, Rows())[1]
    torch.testing.assert_close(terms["loss/words"], expected, rtol=1e-4, atol=1e-4)


def test_a_micro_batch_without_hidden_words_has_a_gradient_of_zero(config):
    model = build_model(config, MEAN, STD)
    (batch,) = batches_with_extras(1)
    batch.targets_BL.fill_(-100)
    with Syncs() as syncs:
        Objective(config)(model([batch], [0]), Rows())[0].backward()
    assert [place.split()[1] for place in syncs.at.elements()] == ["nonzero"], syncs.at
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.text_ssl.bias_V.grad.abs().max() == 0


def test_the_state_holds_the_tied_embeddings_once(config):
    config.train.seed = 1
    model = build_model(config, MEAN, STD)
    state = model.state_dict()
    assert not [name for name in state if "tied" in name]
    config.train.seed = 2
    other = build_model(config, MEAN, STD)
    other.load_state_dict(state)
    assert other.text_ssl.tied_VD is other.text.encoder.get_input_embeddings().weight
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))
    groups = {name: group for group in param_groups(model, config) for name in group["names"]}
    assert (
        groups["text_ssl.layer.weight"]["tower"] == "text" and groups["image_ssl.layers.0.weight"]["tower"] == "image"
    )


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ("self_supervision.image=-1", "self_supervision.image is -1.0: a weight, 0 is off"),
        ("self_supervision.dim=0", "self_supervision.dim is 0: it must be above 0"),
        ("text.locked_until=-1", r"self_supervision.text is 0.25, but model.text.locked_until -1 keeps the tower"),
    ],
)
def test_configs_that_are_refused(config, option, match, tmp_path):
    (tmp_path / "run.yaml").write_text(cli.to_yaml(config))
    with pytest.raises(ValueError, match=f"^model.{match}"):
        build_model(cli.parse(["--config", str(tmp_path / "run.yaml"), f"--model.{option}"]), MEAN, STD)

"""Runs that start from another run."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support import running
from tests.support.bert import write_bert
from tests.support.running import curve, metrics, prepare, run_dir
from tests.support.small import write_data
from tests.support.vocabulary import write_tokenizer
from train import checkpoint, cli, loop
from train.checkpoint import TrainState, load_part, load_state
from train.config import ParentConfig, RunConfig
from train.feed import Feed
from train.parent import Parent, settled
from train.run.lineage import read_record

pytestmark = pytest.mark.usefixtures("runs_in_this_process")
STEPS = 6


@pytest.fixture(scope="module")
def old(runs_in_this_process, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A finished run of one process, saved every second step."""
    config = prepare(tmp_path_factory.mktemp("old"), steps=STEPS, global_batch=16)
    config.data.val, config.data.image_size, config.checkpoint.every = "", 32, 2
    config.optim.lr, config.optim.ema, config.name = 1e-3, 0.5, "old"
    config.model.image.name = "shufflenet_v2_x0_5"
    assert loop.run(config) == 0
    return config


def child(
    old: RunConfig, *arguments: str, step: int | str = 2, name: str = "new", runs: Path | None = None
) -> RunConfig:
    """What the command line gives for a run that starts from a step of `old`."""
    line = ["--from", str(run_dir(old)), "--step", str(step), "--name", name, *arguments]
    return cli.parse([*line, *(["--runs_dir", str(runs)] if runs else [])])


def said(capfd: pytest.CaptureFixture) -> str:
    return capfd.readouterr().out


def saved(config: RunConfig, step: int = STEPS) -> dict[str, bytes]:
    """The tensors of a checkpoint, as bytes."""
    path = run_dir(config) / "checkpoints" / f"step_{step:08d}"
    return {part: (path / f"{part}.safetensors").read_bytes() for part in ("model", "optimizer", "ema")}


def test_where_nothing_was_changed_it_is_the_old_curve_to_the_byte(old, tmp_path: Path, capfd) -> None:
    new = child(old, runs=tmp_path)
    assert loop.run(new) == 0
    assert curve(new) == curve(old)[2:]
    assert saved(new) == saved(old)
    states = [load_state(checkpoint.newest(run_dir(config))) for config in (new, old)]
    own = {"first_step": 0, "seconds": 0, "samples": {}}
    assert replace(states[0], **own) == replace(states[1], **own)
    shown = said(capfd)
    assert f"starts from {run_dir(old)}/checkpoints/step_00000002: everything of step 2\n" in shown
    assert "data: in the parent's order, from its next sample on\n" in shown and "differs" not in shown
    kept = cli.load(run_dir(new) / "config.yaml")
    assert kept.parent == ParentConfig(str(run_dir(old)), "2", "all")
    record = read_record(run_dir(new))
    assert (record["run"], record["step"], record["differences"]) == (str(run_dir(old)), 2, [])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_another_engine_starts_from_it_with_the_same_curve(old, tmp_path: Path, engine: str) -> None:
    new = child(old, runs=tmp_path)
    running.run(new, tmp_path, engine=engine, processes=2)
    if engine == "ddp":
        assert saved(new) == saved(old)
    running.assert_same_curve(curve(new), curve(old)[2:], 1e-12 if engine == "ddp" else 1e-4)
    back = cli.parse(["--from", str(run_dir(new)), "--step", "4", "--name", "back"])
    assert loop.run(back) == 0
    running.assert_same_curve(curve(back), curve(old)[4:], 1e-12 if engine == "ddp" else 1e-4)


def test_it_needs_its_parent_until_it_has_saved_and_no_longer(old, tmp_path: Path, capfd) -> None:
    shutil.copytree(run_dir(old), tmp_path / "old")
    parent = replace(old, runs_dir=str(tmp_path))
    (run_dir(parent) / "checkpoints" / "best").write_text("step_00000002\n")
    new = child(parent, step="best")
    assert loop.run(new) == 0 and new.runs_dir == old.runs_dir, "taken from the parent, as all that was not given"
    checkpoints = run_dir(new) / "checkpoints"

    # Killed before its first checkpoint; its parent has another best one by then.
    (run_dir(new) / "results.json").unlink()
    shutil.rmtree(checkpoints)
    (run_dir(new) / "metrics.jsonl").write_text((run_dir(new) / "metrics.jsonl").read_text().splitlines(True)[0])
    (run_dir(parent) / "checkpoints" / "best").write_text("step_00000004\n")
    assert loop.run(new) == 0
    assert curve(new) == curve(old)[2:] and saved(new) == saved(old)

    # Killed after it; its parent is gone.
    (run_dir(new) / "results.json").unlink()
    shutil.rmtree(checkpoints / f"step_{STEPS:08d}")
    shutil.rmtree(run_dir(parent))
    said(capfd)
    again = child(parent, step="best", runs=Path(new.runs_dir))
    assert again == new
    assert loop.run(again) == 0
    assert "resumes from " in said(capfd)
    assert curve(new) == curve(old)[2:] and saved(new) == saved(old)

    # All of its checkpoints gone, too.
    (run_dir(new) / "results.json").unlink()
    shutil.rmtree(checkpoints)
    with pytest.raises(ValueError, match=r"metrics\.jsonl has 6 steps, but there is no checkpoint"):
        loop.run(new)


def test_what_was_changed_is_said_and_the_schedule_is_that_of_the_step(old, tmp_path: Path, capfd) -> None:
    fields = ("--optim.schedule", "constant", "--optim.cooldown_steps", "4", "--train.steps", "8", "--optim.lr", "2e-3")
    new = child(old, *fields, step=4, runs=tmp_path)
    assert loop.run(new) == 0
    assert [record["lr/text"] for record in metrics(new)] == pytest.approx(
        [2e-3 * (1 - (step / 4) ** 0.5) for step in range(4)]
    )
    assert [entry[:2] for entry in curve(new)][:2] == [entry[:2] for entry in curve(old)[4:]]
    changed = [
        "optim.cooldown_steps: 0 -> 4",
        "optim.lr: 0.001 -> 0.002",
        "optim.schedule: 'cosine' -> 'constant'",
        "train.steps: 6 -> 8",
    ]
    assert read_record(run_dir(new))["differences"] == changed
    shown = said(capfd)
    assert all(f"differs from its parent in {line}\n" in shown for line in changed)


def at_step_2(config: RunConfig) -> tuple[TrainState, str]:
    """Where a run starts, and what is said of its data."""
    feed, parent = Feed(config), Parent(config, Path(config.runs_dir) / config.name)
    own = TrainState(data_hash=feed.identity, order=feed.order_identity)
    state = parent.begin(own, feed)
    (line,) = [line for line in parent.lines if line.startswith("data: ")]
    return state, line


def test_where_it_goes_on_in_the_data(old, tmp_path: Path) -> None:
    new = child(old)
    state, line = at_step_2(new)
    assert (state.step, state.first_step, state.moved_by, state.samples_seen) == (2, 2, 0, 32)
    assert line == "data: in the parent's order, from its next sample on"

    def of(**data: object) -> RunConfig:
        return replace(new, data=replace(new.data, **data))

    def in_batches_of(size: int) -> RunConfig:
        return replace(new, train=replace(new.train, global_batch=size))

    state, line = at_step_2(of(train=str(write_data(tmp_path / "mended", (20, 30, 20)))))
    assert state.moved_by == 0 and line == "data: others than the parent's in the same order, from its next sample on"
    state, line = at_step_2(in_batches_of(8))
    assert state.step + state.moved_by == 4 and "in the parent's order" in line
    state, line = at_step_2(in_batches_of(24))
    assert state.step + state.moved_by == 2  # 32 samples are 1 1/3 batches: the rest of the second one is left out
    longer = of(train=str(write_data(tmp_path / "longer", (20, 30, 21))))
    for other in (longer, of(lanes=2), replace(new, train=replace(new.train, seed=1))):
        state, line = at_step_2(other)
        assert state.step + state.moved_by == 0
        assert line == "data: in another order than the parent's, which starts at its beginning"


@pytest.mark.slow
def test_a_run_from_other_data_sees_them_from_the_beginning_and_resumes_in_them(old, tmp_path: Path) -> None:
    new = child(old, "--train.seed", "1", "--train.steps", "5", "--checkpoint.every", "1", runs=tmp_path)
    assert loop.run(new) == 0
    fresh = replace(new, name="fresh", parent=ParentConfig(), train=replace(new.train, steps=3))
    assert loop.run(fresh) == 0
    straight = curve(new)
    assert [digest for _, digest, _ in straight] == [digest for _, digest, _ in curve(fresh)]
    shutil.rmtree(run_dir(new) / "checkpoints" / "step_00000005")
    (run_dir(new) / "results.json").unlink()
    assert loop.run(new) == 0
    assert curve(new) == straight


def test_bad_samples_and_skipped_steps_of_the_parent_do_not_count(old, tmp_path: Path) -> None:
    shutil.copytree(run_dir(old), tmp_path / "old")
    path = tmp_path / "old" / "checkpoints" / "step_00000002"
    content = json.loads((path / "state.json").read_text())
    content["state"] |= {"bad_samples": 30, "skipped": 9, "skipped_in_row": 9}
    (path / "state.json").write_text(json.dumps(content))
    hashes = json.loads((path / "sha256.json").read_text())
    hashes["state.json"] = checkpoint.sha256_of(path / "state.json")
    (path / "sha256.json").write_text(json.dumps(hashes))
    state, _ = at_step_2(child(replace(old, runs_dir=str(tmp_path)), runs=tmp_path))
    assert (state.bad_samples, state.skipped, state.skipped_in_row, state.samples_seen) == (0, 0, 0, 32)


def test_what_the_parent_does_not_have_is_fresh_and_said(old, tmp_path: Path, capfd) -> None:
    new = child(
        old, "--model.multiscale.enabled", "true", "--model.embed_dim", "24", "--train.steps", "3", runs=tmp_path
    )
    assert loop.run(new) == 0
    shown = said(capfd)
    heads = "level_log_scales, level_logits, image_projection, text_projection, image_levels (9 tensors), text_levels ("
    assert f"\nfresh: {heads}" in shown and f"\nmoments of zero, since the parent has none: {heads}" in shown
    moments = load_part(checkpoint.newest(run_dir(new)), "optimizer")
    assert all(value.isfinite().all() for value in moments.values())


def test_its_weights_alone_are_those_that_were_evaluated_at_step_0(old, tmp_path: Path) -> None:
    new = cli.parse(["--from-weights", str(run_dir(old)), "--name", "new", "--runs_dir", str(tmp_path)])
    feed, parent = Feed(new), Parent(settled(new), tmp_path / "new")
    model, averaged = parent.model(feed), load_part(checkpoint.newest(run_dir(old)), "ema")
    for name, value in model.state_dict().items():
        assert torch.equal(value, averaged[name]), name
    own = TrainState()
    assert parent.begin(own, feed) is own
    assert parent.lines[0].endswith("step_00000006: the averaged weights of step 6")


def test_a_tower_that_does_not_fit_is_as_the_config_says(old, tmp_path: Path, capfd) -> None:
    other = ("--model.image.name", "shufflenet_v2_x1_0")
    with pytest.raises(
        ValueError, match=r"(?s)model\.image\.name shufflenet_v2_x1_0, the parent has shufflenet_v2_x0_5 .*take weights"
    ):
        loop.run(child(old, *other, runs=tmp_path))
    line = ["--from-weights", str(run_dir(old)), *other, "--name", "new", "--runs_dir", str(tmp_path)]
    feed, parent = Feed(cli.parse(line)), Parent(settled(cli.parse(line)), tmp_path / "new")
    model, weights = parent.model(feed), load_part(checkpoint.newest(run_dir(old)), "ema")
    taken = [
        name for name, value in model.state_dict().items() if name in weights and torch.equal(value, weights[name])
    ]
    assert {name.partition(".")[0] for name in taken} >= {"text", "text_projection", "log_scale"}
    assert not any(name.startswith("image") and name.endswith("weight") for name in taken)
    assert [line for line in parent.lines if line.startswith("the image tower is as the config says: ")]


def test_another_tokenizer_is_another_tower(old, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "text")
    write_bert(tmp_path / "text", width=32, vocab_size=100, max_position_embeddings=40)
    same = child(old, "--model.text.name", str(tmp_path / "text"), runs=tmp_path)
    Parent(settled(same), tmp_path / "new").model(Feed(same))
    write_bert(tmp_path / "text", width=16, vocab_size=100, max_position_embeddings=40)
    with pytest.raises(ValueError, match=r"(?s)model\.text\.name .* is not what .*hidden_size: 32 -> 16.*take weights"):
        loop.run(same)
    both = replace(same, parent=replace(same.parent, take="weights"), model=replace(same.model))
    both.model.image = replace(same.model.image, name="shufflenet_v2_x1_0")
    with pytest.raises(ValueError, match=r"no tower of it fits"):
        loop.run(both)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "5"], r"parent\.run .*: step 5: .* has no such checkpoint\. There are: 2, 4, 6"),
        (["--step", "best"], r"parent\.run .*: step best: .* has no such checkpoint; checkpoint\.best has it kept"),
        (["--name", "old"], r"name old: a run cannot start from itself"),
        ([], r"it is at step 6 already, and this run ends at step 6: give more train\.steps"),
        (["--step", "4", "--train.steps", "3"], r"it is at step 4 already, and this run ends at step 3"),
    ],
)
def test_what_cannot_be_started_from_is_refused(old, tmp_path: Path, arguments: list[str], message: str) -> None:
    line = ["--from", str(run_dir(old)), "--name", "new", *arguments]
    line += [] if "old" in arguments else ["--runs_dir", str(tmp_path)]
    with pytest.raises(ValueError, match=message):
        loop.run(cli.parse(line))
    assert not (tmp_path / "new" / "metrics.jsonl").exists()


def test_a_run_has_one_parent(old, tmp_path: Path) -> None:
    new = child(old, "--train.steps", "3", runs=tmp_path)
    assert loop.run(new) == 0
    inside = cli.parse(
        ["--from", f"{run_dir(old)}/checkpoints/step_00000002", "--name", "new", "--runs_dir", str(tmp_path)]
    )
    assert inside.train.steps == STEPS and settled(inside).parent == settled(new).parent
    for other, message in (
        (replace(new, parent=ParentConfig()), r"parent\.run: '.*' -> ''"),
        (replace(new, parent=replace(new.parent, step="4")), r"parent\.step: '2' -> '4'"),
        (replace(new, parent=replace(new.parent, take="weights")), r"parent\.take: 'all' -> 'weights'"),
        (replace(old, name="new", runs_dir=str(tmp_path)), r"parent\.run: '.*' -> ''"),
    ):
        with pytest.raises(ValueError, match=message):
            loop.run(other)


def follow(message: str, runs: Path, *changed: str) -> TrainState:
    """Where the run begins that a message advises: under another name, by its --from or --from-weights."""
    advised = re.search(r"under which (--from(?:-weights)? \S+) starts|give another --name, (--from \S+) and", message)
    assert advised is not None, message
    line = [*(advised[1] or advised[2]).split(), "--name", "onward", "--runs_dir", str(runs), *changed]
    new = settled(cli.parse(line))
    feed, parent = Feed(new), Parent(new, runs / "onward")
    parent.model(feed)
    return parent.begin(TrainState(data_hash=feed.identity, order=feed.order_identity), feed)


MORE = ("--train.steps", "8")


@pytest.mark.parametrize(
    ("changed", "more", "step"),
    [
        (("--optim.lr", "0.5"), MORE, STEPS),
        (("--train.global_batch", "24"), MORE, STEPS),
        (("--data.augment.policy", "strong"), MORE, STEPS),
        (MORE, (), STEPS),  # which is the change
        (("--model.image.name", "shufflenet_v2_x1_0"), (), 0),
        (("--data.image_size", "40"), (), 0),
    ],
)
def test_a_refused_change_names_the_way_and_the_way_is_open(old, tmp_path: Path, changed, more, step: int) -> None:
    same = ["--config", str(run_dir(old) / "config.yaml")]
    with pytest.raises(ValueError) as error:
        loop.run(cli.parse([*same, *changed]))
    shown = cli.with_flags(str(error.value))
    assert "or choose another --name" in shown and ("with more --train.steps" in shown) is (step > 0)
    assert follow(shown, tmp_path, *changed, *more).step == step


def test_the_way_on_from_the_end_and_from_other_data_is_open(old, tmp_path: Path, capfd) -> None:
    assert loop.run(old) == 0
    finished = cli.with_flags(said(capfd))
    assert "is finished already; to train on from its end" in finished and "more --train.steps" in finished
    assert follow(finished, tmp_path, *MORE).step == STEPS
    shutil.copytree(run_dir(old), tmp_path / "old")
    (tmp_path / "old" / "results.json").unlink()
    mended = ("--data.train", str(write_data(tmp_path / "mended", (20, 30, 20))))
    with pytest.raises(ValueError, match="was trained on other data") as error:
        loop.run(cli.parse(["--config", str(tmp_path / "old" / "config.yaml"), "--runs_dir", str(tmp_path), *mended]))
    assert follow(cli.with_flags(str(error.value)), tmp_path, *mended, *MORE).step == STEPS

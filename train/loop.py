"""The training run: builds the parts, then the loop."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data_pipeline import overlap
from data_pipeline.loader import LoaderFailure, MicroBatch, Patience
from data_pipeline.seeds import model_seed
from data_pipeline.storage.manifest import Manifest
from train import distributed
from train.account import account, agree
from train.arrival import arriving
from train.begin import beginning
from train.checkpoint import TrainState
from train.checks import check, check_resident, hints
from train.config import RunConfig
from train.engine.balance import Balance
from train.engine.base import Engine
from train.engine.build import engine_of_run
from train.engine.ema import WeightAverage
from train.engine.optim import set_lrs
from train.engine.start import engine_is_open, join, make_accelerator, timeout_seconds
from train.evaluation import find_task
from train.evaluation.best import Best, follow
from train.evaluation.encode import Encoder
from train.evaluation.suite import HELD_OUT, Suite
from train.evaluation.task import Evaluation
from train.feed import Feed, fetch
from train.memory import engine_that_fits, own_plan, resident
from train.model.text_files import own_tokenizer, text_files
from train.model.trial import try_out
from train.parent import settled
from train.report import exhibit
from train.report.page import write_report
from train.run.directory import open_run, read_results, record_config, write_results
from train.run.lineage import write_record
from train.run.records import LEDGER, METRICS, read_records
from train.run.signals import EXIT_PREEMPTED, StopRequest
from train.run.tally import Tally, replaced_rows
from train.run.tracker import Tracker
from train.run.version import code_version
from train.run.watch import PATIENCE, Watch
from train.saving.saver import Saver
from train.saving.write import mark_best
from train.speed import Speed
from train.step import training_step
from train.timing import StepClock

SLOW = f". It has {PATIENCE:.0%} of DUET_TIMEOUT: raise that where the storage is slow"


@dataclass
class Run:
    """The parts of a run, built and at the step where it starts or resumes."""

    config: RunConfig
    directory: Path
    engine: Engine
    average: WeightAverage
    state: TrainState
    balance: Balance
    steps: int
    training: Sequence[Manifest]
    batches: Iterable[MicroBatch]
    suite: Suite
    encoder: Encoder
    saver: Saver
    best: Best
    tracker: Tracker
    stop: StopRequest
    watch: Watch
    tally: Tally
    speed: Speed


def run(config: RunConfig) -> int:
    """Train, or resume, or say that it is done. Returns the exit status: 0, or 85 where a signal stopped it.

    In a thread that is not the main one signals are left alone.

    Raises:
        ValueError: something that the user can mend; the message names the field, the value and the remedy.
    """
    check(config, int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else None)
    stop = StopRequest()
    device = join()
    config = settled(config)
    with open_run(config) as directory:
        if results := distributed.broadcast_object(read_results(directory)):
            longer = f"to train on from its end, give another --name, --from {directory} and more --train.steps"
            announce(directory, results, f"is finished already; {longer}")
            return 0
        check(config, distributed.world_size())
        with Watch(directory, timeout_seconds(), stop) as watch, StepClock(device) as clock:
            built = build(config, directory, stop, watch, clock)
            with built.saver:
                return train(built)


def train(run: Run) -> int:
    """The loop: fetch, step, account, and now and then evaluate and save.

    Raises:
        ValueError, LoaderFailure: on all ranks, where one gets no data; what was trained is saved.
    """
    config, engine, state, tracker, watch = run.config, run.engine, run.state, run.tracker, run.watch
    share = config.train.global_batch // (config.train.micro_batch * distributed.world_size())
    batches = arriving(iter(run.batches), engine.device, ahead=share)
    clock, saved = time.perf_counter(), state.step
    found = held_out(run, overdue(run))
    if improved(run, found):
        mark_best(run.directory, state.step, config.checkpoint.keep)
    if (config.init or config.parent.run) and not state.step:
        held_out(run, run.suite.tasks)  # what it starts from
    while state.step < run.steps and not run.best.exhausted:
        watch.now(f"waiting for the data of step {state.step + 1}")
        run.speed.begin(state.step + 1)
        try:
            micro_batches = fetch(batches, share, engine.device, run.stop, at_once=config.data.workers == 0)
        except (ValueError, LoaderFailure):
            if state.step > saved:
                save(run)
            run.saver.wait()
            raise
        if micro_batches is None:
            return leave(run, run.stop.name or "a signal to another rank", saved)
        waited = time.perf_counter() - clock
        watch.now(f"in step {state.step + 1}")
        multipliers = run.balance.multipliers()
        lrs = set_lrs(engine.optimizer, state.step, run.steps, config.optim, multipliers)
        measure = run.balance.due(state.step) or due(state.step + 1, config.tracking.diagnostics_every)
        on_device = training_step(engine, micro_batches, config, measure)
        run.average.update()
        metrics, news = agree(run, micro_batches, on_device | run.speed.count(state.step + 1, micro_batches))
        run.balance.update(state.step, metrics)
        seconds, clock = time.perf_counter() - clock, time.perf_counter()
        speed = run.speed.end(state.step + 1, metrics, seconds)

        stopping = account(run, micro_batches, metrics, news, seconds)
        rate = config.train.global_batch / seconds
        metrics |= {f"lr/{tower}": lr for tower, lr in lrs.items()}
        metrics |= {f"lr_multiplier/{tower}": factor for tower, factor in multipliers.items()}
        speed |= {"samples_per_second": rate, "data_wait": waited / seconds}
        tracker.log(state.step, metrics | speed | news.digests)

        # Who sends a signal gives little time: the state is saved first, and what is due is evaluated on resuming.
        due_now = run.suite.due(state.step) if state.step < run.steps and not stopping else []
        found = held_out(run, due_now)
        better = improved(run, found)
        done = state.step == run.steps or run.best.exhausted
        if done or stopping or better or due(state.step, config.checkpoint.every):
            save(run, better)
            saved = state.step
        if stopping and not done:
            return leave(run, stopping, saved)
        clock = time.perf_counter()
    return finish(run, found)


def save(run: Run, best: bool = False) -> None:
    """A checkpoint of the run as it is, written while training goes on; a collective. Raises as Saver.save."""
    run.tracker.check()
    run.watch.now(f"saving step {run.state.step}")
    run.saver.save(run.engine, run.average, run.state, best)


def leave(run: Run, signal: str, saved: int) -> int:
    """Stop for a signal, between two steps; the exit status. saved: the step of the newest checkpoint, or 0."""
    if run.state.step > saved:
        save(run)
    run.saver.wait()
    run.stop.ignore_further()
    saved_at = f"saved at step {run.state.step}; the same command resumes it" if run.state.step else "no step was made"
    run.tracker.finish(EXIT_PREEMPTED, f"{signal}: {saved_at}")
    return EXIT_PREEMPTED


def finish(run: Run, found: dict[str, Evaluation]) -> int:
    """Make the evaluations of the finished model that are not `found` yet, write the report, mark the run as done."""
    state, best = run.state, run.best
    run.saver.wait()
    if best.exhausted:
        run.tracker.message(
            f"train.patience {best.patience}: {best.metric} has not got better since step {best.step}; the run ends"
        )
    last = held_out(run, [name for name in run.suite.tasks if name not in found])
    if improved(run, last):
        mark_best(run.directory, state.step, run.config.checkpoint.keep)
    found = found | last
    tasks = {
        name: {"task": run.suite.tasks[name].given.task, "metrics": evaluation.metrics}
        for name, evaluation in found.items()
        if name != HELD_OUT
    }
    run.tracker.log(state.step, run.tally.totals(), prefix="samples/")
    with run.average.applied():
        shown = exhibit.collect(run.encoder, run.suite, found, run.training)
    results = {
        "steps": state.step,
        "samples_seen": state.samples_seen,
        "seconds": round(state.seconds, 1),
        "bad_samples": state.bad_samples,
        "skipped_steps": state.skipped,
        "samples": run.tally.records(),
        "val": found[HELD_OUT].metrics if HELD_OUT in found else {},
        "tasks": tasks,
        "best": {"metric": best.metric, "step": best.step, "value": best.value} if best.step is not None else {},
        "warnings": shared_images(run.training, run.suite),
    }
    if distributed.is_main():
        listed = replaced_rows(read_records(run.directory / LEDGER))
        for line in run.tally.lines(state.step - state.first_step, listed):
            run.tracker.message(line)
    distributed.barrier()  # the last of all ranks: what follows takes rank 0 as long as it needs
    run.tracker.finish(0)
    if distributed.is_main():
        try:
            write_report(run.directory, run.config, results, shown)
            write_results(run.directory, results)
        except OSError as error:
            raise ValueError(
                f"{run.directory}: the results could not be written: {error}; free or mend the disk and start again: "
                "only the evaluations are made again"
            ) from error
        announce(run.directory, results, "is finished")
    return 0


def build(config: RunConfig, directory: Path, stop: StopRequest, watch: Watch, clock: StepClock) -> Run:
    """All parts of a run, at the step where it begins or resumes; `train.begin` says where that is."""
    feed, suite = Feed(config), Suite(config)
    fresh = TrainState(data_hash=feed.identity, order=feed.order_identity, mean=list(feed.mean), std=list(feed.std))
    start = beginning(config, directory)
    torch.manual_seed(model_seed(config.train.seed))  # the same fresh weights on every rank
    model = start.model(feed)
    state = start.begin(fresh, feed)
    tokenizer = own_tokenizer(model, start.source)
    notes = try_out(model, tokenizer, config)
    # Measured once, where the model is whole.
    needs = own_plan(start.source, model) if engine_is_open() or config.train.resident is None else ""
    stage, why = engine_that_fits(start.source, needs) if engine_is_open() else (0, "")
    engine = engine_of_run(make_accelerator(stage), model, config)
    average = WeightAverage(engine, config.optim.ema)
    start.restore(engine, average)

    state.precision, state.code = engine.precision, code_version()
    files = start.saved_text or text_files(model, tokenizer)
    patience = Patience(PATIENCE * watch.limit, stop.check, watch.loader_stacks, SLOW)
    batches = feed.batches(tokenizer, state.step, patience, state.moved_by)
    encoder = Encoder(engine.module, config, tokenizer, autocast=engine.autocast)
    if not start.resumes:
        write_record(directory, start.record())
    record_config(directory, config)
    tracker = Tracker(config, directory, resumed_step=state.step, total_steps=feed.steps)
    tracker.check()
    mean, std = ("/".join(f"{value:.3f}" for value in values) for values in (state.mean, state.std))
    normalized = f"images are normalized by data.normalize {config.data.normalize}: mean {mean}, std {std}"
    for line in [*filter(None, [why]), normalized, *start.lines, *notes, *hints(config, feed.steps)]:
        tracker.message(line)
    for line in [] if start.resumes else shared_images(feed.manifests, suite):
        tracker.message(line)
    tally = Tally(feed.order, config.train.global_batch, state.samples, state.step - state.first_step, state.moved_by)
    balance, best = Balance(config, state.balance), follow(config, directory, state.step)
    saver = Saver(directory, config, files, tracker.message)
    parts = (engine, average, state, balance, feed.steps, feed.manifests, batches, suite, encoder, saver, best)
    speed = Speed(config, directory, clock, engine.module, engine.precision, feed.steps, tracker.message)
    if config.train.resident is None:
        config = replace(config, train=replace(config.train, resident=resident(needs, engine.stage)))
        check_resident(config, distributed.world_size())
        tracker.message(f"train.resident is {config.train.resident}: what fits by the memory plan")
    return Run(config, directory, *parts, tracker, stop, watch, tally, speed)


def shared_images(training: Sequence[Manifest], suite: Suite) -> list[str]:
    """Warnings, on rank 0, where held-out images are among those of training."""
    if not distributed.is_main():
        return []
    try:
        return overlap.warnings(training, suite.manifests())
    except (OSError, ValueError) as error:  # no reason for this rank to leave the others
        return [f"warning: held-out images were not looked for among the training images: {error}"]


def held_out(run: Run, names: Iterable[str]) -> dict[str, Evaluation]:
    """These evaluations, logged: of the weights as they are, or of their average where `optim.ema` is set."""
    names = list(names)
    if not names:
        return {}
    run.watch.now(f"evaluating after step {run.state.step}")
    with run.average.applied():
        found = run.suite.measure(run.encoder, names)
    for name, evaluation in found.items():
        cost = {"eval_seconds": round(evaluation.seconds, 3)}
        run.tracker.log(run.state.step, evaluation.metrics | cost, prefix=f"{name}/")
    return found


def overdue(run: Run) -> list[str]:
    """Evaluations that were due at the step at which a run resumes, and are not in its log; a collective."""
    step, names = run.state.step, run.suite.due(run.state.step)
    if not names or not run.state.first_step < step < run.steps:
        return []
    made = [record for record in read_records(run.directory / METRICS) if record["step"] == step]
    missing = [name for name in names if not any(f"{name}/eval_seconds" in record for record in made)]
    return distributed.broadcast_object(missing)


def improved(run: Run, found: dict[str, Evaluation]) -> bool:
    """Whether this step is the best so far by `checkpoint.best`; one decision on all ranks."""
    name, _, metric = run.config.checkpoint.best.partition("/")
    return name in found and run.best.update(run.state.step, distributed.broadcast_object(found[name].metrics[metric]))


def due(step: int, every: int) -> bool:
    """Whether what is done every so many steps is due; never where `every` is 0."""
    return every > 0 and step % every == 0


def announce(directory: Path, results: dict, how: str) -> None:
    """What the user sees at the end of a run, and on starting a finished one."""
    if not distributed.is_main():
        return
    print(f"\nThe run in {directory} {how}: {results['steps']} steps, {results['seconds']:.0f} s of training.")
    if results["val"]:
        print(find_task("retrieval").table(results["val"]))
    for name, found in results.get("tasks", {}).items():
        print(f"{name}:\n{find_task(found['task']).table(found['metrics'])}")
    if results["val"] or results.get("tasks"):
        print(f"Report: {directory / 'report' / 'index.html'}")

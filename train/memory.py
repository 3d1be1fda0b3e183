"""What a run needs of each device: weights, gradients, optimizer, activations, loss; and the engine that fits.

Per parameter, all fp32 (train.engine): 4 bytes of weight, 4 of gradient, 8 of AdamW's two moments, 4 more with EMA; a
parameter that never learns has its weight alone. ZeRO-1 splits the moments over the ranks, ZeRO-2 the gradients too,
ZeRO-3 the weights too (arXiv 1910.02054). DeepSpeed adds a bucket for the gradients, and in stages 1 and 2 a second
copy of the weights, which is split.
Activations are not estimated: a small micro-batch goes forward on the CPU and what autograd keeps is counted.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from data_pipeline.loader import STEPS_AHEAD, Extras
from data_pipeline.stages.handover import piece_bytes
from data_pipeline.stages.slots import check_batch
from data_pipeline.stages.workers import number_of_workers, prepared
from train import distributed, terms
from train.config import TOWERS, RunConfig
from train.engine.precision import asked
from train.engine.zero import BUCKET_ELEMENTS
from train.loss.tiled import tile_on
from train.model.pair import PairModel, build_model
from train.run import watch
from train.terms.objective import Objective

GB = 1e9
FILL = 0.9
"""Part of a device that a run may fill by the plan, which is up to 9 % too low (tests/benchmarks/RESULTS.md)."""
RESERVE, WORKING = 1.15, 1.08
"""Factors on state and activations for what is not counted: fragmentation, copies of a gradient while it is added up,
gradients of activations. With LIBRARIES, what these take once they compute, fitted to steps on a CPU."""
LIBRARIES = 0.25 * GB


@dataclass(frozen=True)
class Plan:
    """Bytes per rank of a run on `world` ranks; of `parameters`, `learning` ones ever learn. parts: passes in which a
    rank's share of a step goes back through the towers. recomputable: towers that could compute their blocks again.
    share: micro-batches of a rank's step; more: activations that each of them adds."""

    parameters: int
    learning: int
    activations: int
    loss: int
    world: int
    ema: bool
    parts: int = 1
    recomputable: tuple[str, ...] = ()
    share: int = 1
    more: int = 0

    def state(self, stage: int) -> float:
        """Weights, gradients and optimizer state under ZeRO `stage`; 0 is DDP."""
        weight, average, gradient, moments = 4.0, 4.0 * self.ema, 4.0, 8.0
        moments /= self.world if stage >= 1 else 1
        gradient /= self.world if stage >= 2 else 1
        weight, average = (kept / (self.world if stage >= 3 else 1) for kept in (weight, average))
        copy = 4.0 / self.world if stage in (1, 2) else 0.0
        bucket = 4 * BUCKET_ELEMENTS if stage else 0
        return self.parameters * weight + self.learning * (average + gradient + moments + copy) + bucket

    def total(self, stage: int) -> float:
        """At the peak of a step; tests/benchmarks/RESULTS.md has it beside what steps take."""
        state, working = self.state(stage), WORKING * self.activations
        if stage == 0 and self.world == 1 and self.parts == 1:
            # Gradients come as activations go; otherwise they stay from part to part, or in the buckets of DDP.
            gradients = 4.0 * self.learning
            state, working = state - gradients, max(working, RESERVE * gradients)
        return RESERVE * state + working + self.loss + LIBRARIES

    @property
    def snapshot(self) -> int:
        """Bytes of the host of rank 0, beside `total`, from which checkpoints are written (train.saving)."""
        return 4 * (1 + self.ema) * self.parameters + 8 * self.learning

    def in_words(self) -> str:
        """The whole of each engine, and its parts."""
        whole = [self.total(stage) / GB for stage in range(4)]
        return (
            f"{self.parameters / 1e6:.0f} M parameters; each of {self.world} rank(s): {whole[0]:.1f} GB under DDP, "
            f"{whole[1]:.1f}/{whole[2]:.1f}/{whole[3]:.1f} under ZeRO-1/2/3; of that, under DDP, state "
            f"{self.state(0) / GB:.1f}, activations {self.activations / GB:.1f}, loss {self.loss / GB:.2f}; "
            f"beside it rank 0's host {self.snapshot / GB:.1f} GB, to write checkpoints while training goes on"
        )

    def fits(self, stage: int, memory: float) -> bool:
        """Into a device of so many bytes, with room for what the plan does not know."""
        return self.total(stage) <= FILL * memory

    def smallest_stage(self, memory: float, most: int = 3) -> int:
        """The first of DDP and ZeRO-1 to `most` that fits; the one that takes the least where none does."""
        stages = range(most + 1)
        return next((stage for stage in stages if self.fits(stage, memory)), min(stages, key=self.total))

    def engine_in_words(self, stage: int, memory: float) -> str:
        """Why it is the engine of this run on devices of so many bytes, and how to have another one."""
        each = "on each GPU" if torch.cuda.is_available() else "for each process"
        said = f"engine {engine_name(stage)}: the run takes {self.total(stage) / GB:.1f} of {memory / GB:.0f} GB"
        said += f" {each}" if self.world > 1 else ""
        if stage:
            said += f"; ddp would take {self.total(0) / GB:.1f}, and {FILL:.0%} is the most"
        if not self.fits(stage, memory):
            return f"{said}, which may be too much"
        if self.world == 1:
            return said
        return f"{said}; --engine {'NAME for another one' if stage else 'zero2 to split it'}"

    def choice_in_words(self) -> str:
        """Where it is not known yet how much memory there is: which engine the run will take, and from when on."""
        most = [self.total(stage) / FILL / GB for stage in range(4)]
        zero = [
            f"{engine_name(stage)} from {most[stage]:.1f} GB" for stage in (1, 2, 3) if most[stage] < min(most[:stage])
        ]
        named = ", else ".join([f"ddp where each GPU has {most[0]:.1f} GB or more", *zero])
        return f"engine: {named}; the ranks choose it together when they start, --engine NAME names one"

    def most_resident(self, memory: float, stage: int) -> int:
        """How many micro-batches' activations fit into `memory` bytes, of a plan that keeps one; at least 1."""
        fitting = 1
        for kept in range(2, self.share + 1):
            activations, parts = self.activations + (kept - 1) * self.more, -(-self.share // kept)
            if replace(self, activations=activations, parts=parts).fits(stage, memory):
                fitting = kept
        return fitting


def own_memory() -> int:
    """Bytes that a rank has: of its GPU, or its part of the host's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return int(watch.memory()[1]) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def engine_name(stage: int) -> str:
    """Of --engine, on GPUs."""
    return f"zero{stage}" if stage else "ddp"


def own_plan(config: RunConfig, model: PairModel) -> Plan | str:
    """The plan of this run by its own model, or why none can be made.

    Args:
        model: before an engine has it; it stays as it is.
    """
    try:
        return plan(config, distributed.world_size(), asked() == "bf16", model)
    except Exception as error:  # of a tower that computes on GPUs alone
        return f"no memory plan can be made ({type(error).__name__}: {error})"


def resident(needs: Plan | str, stage: int) -> int:
    """What `train.resident` null stands for: what fits on every rank by `own_plan`; a collective.

    Args:
        stage: of ZeRO; 0 for DDP and for one process.

    Raises:
        ValueError: on all ranks, where one has no plan.
    """
    fitting = 0 if isinstance(needs, str) else needs.most_resident(own_memory(), stage)
    least = -int(distributed.all_reduce_max(torch.tensor([-fitting])))
    if not least:
        problems = distributed.all_gather_objects(needs if isinstance(needs, str) else "")
        problem = next(filter(None, problems))
        raise ValueError(f"train.resident null: {problem}; give a number of micro-batches, such as 1")
    return least


def engine_that_fits(config: RunConfig, needs: Plan | str) -> tuple[int, str]:
    """The engine of a run whose launcher leaves it open: the ZeRO stage, 0 for DDP, and why.

    By `own_plan` and the device that has the least memory, so that it is the same on every rank; a collective.
    """
    least = -float(distributed.all_reduce_max(torch.tensor([-own_memory()], dtype=torch.float64)))
    there = importlib.util.find_spec("deepspeed") is not None
    if isinstance(needs, str):
        stage = 2 if there and distributed.world_size() > 1 else 0
        why = f"engine {engine_name(stage)}: {needs}; --engine NAME for another one"
        return distributed.broadcast_object((stage, why))
    # As engine_of_run says, stage 3 cannot be compiled.
    stage = needs.smallest_stage(least, (2 if config.train.compile else 3) if there else 0)
    why = needs.engine_in_words(stage, least)
    if not needs.fits(stage, least):
        why += f": {less_memory(needs, config)}{'' if there else '; or pip install deepspeed, to split the state'}"
    return distributed.broadcast_object((stage, why))


def less_memory(needs: Plan, config: RunConfig) -> str:
    """What takes less memory, and whether the curve stays the same."""
    same = ["--train.resident 1"] * ((config.train.resident or 1) > 1)
    same += [f"--model.{tower}.checkpointing true" for tower in needs.recomputable]
    return f"the same curve with {', '.join([*same, 'more ranks'])}; another one with a smaller --train.micro_batch"


def plan(config: RunConfig, world: int, bf16: bool, model: PairModel | None = None) -> Plan:
    """Measures the run's model on the CPU, with fresh weights where it is not given. `train.resident` null counts as 1.

    Raises:
        ValueError: the model cannot be built, or the batch cannot be shared among `world` ranks.
    """
    model = model or build_model(config, [0.5] * 3, [0.5] * 3, pretrained=False)
    (small, outputs), (large, _) = (_forward(model, rows, config.data.max_tokens, bf16) for rows in (2, 4))
    per_sample = (large - small) / 2
    # What does not grow with the rows is above all what autocast makes of the weights, for each micro-batch by itself.
    more = int(max(0, small - 2 * per_sample) + per_sample * config.train.micro_batch)
    scalars = Objective(config).scalars
    numbers = {name: value[0].numel() for name, value in outputs.items() if name not in scalars}
    check_batch(config.train.global_batch, config.train.micro_batch, world)
    share = config.train.global_batch // (config.train.micro_batch * world)
    kept = min(max(1, config.train.resident or 1), share)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    loss, parts = loss_bytes(config, world, numbers), -(-share // kept)
    towers = [
        tower for tower in TOWERS if getattr(model, tower).blocks and not getattr(config.model, tower).checkpointing
    ]
    ema = config.optim.ema > 0
    return Plan(parameters, learning, kept * more, loss, world, ema, parts, tuple(towers), share, more)


def loss_bytes(config: RunConfig, world: int, numbers: Mapping[str, int]) -> int:
    """Features that the loss sees and their gradients, and the logits that exist at once with their gradient.

    Args:
        numbers: how many numbers the model puts out per pair, by output: of both embeddings, and of the terms.
    """
    batch, tile = config.train.global_batch, tile_on("cuda" if torch.cuda.is_available() else "cpu", config.loss)
    objective = Objective(config)
    seen = {name: batch if objective.gathers(name) else batch // world for name in numbers}  # rows
    features = 2 * 4 * sum(seen[name] * count for name, count in numbers.items())
    rows = {"full": batch, "local": batch // world, "tiled": min(tile, batch // world)}[config.loss.rows]
    columns = min(tile, batch) if config.loss.rows == "tiled" else batch
    return features + 3 * rows * columns * 4


def loader_bytes(config: RunConfig, world: int, local: int) -> int:
    """Shared memory of a host that the loaders of its `local` ranks fill with images: all that they prepare ahead, what
    each process is at, and a step's share that is in use."""
    workers = number_of_workers(config.data.workers)
    count = config.train.global_batch // (config.train.micro_batch * world)
    images = config.train.micro_batch * (2 if Extras(**terms.extras(config.model)).second_view else 1)
    micro_batches = prepared(workers, config.data.prefetch, STEPS_AHEAD * count) + workers + count if workers else 0
    return local * micro_batches * piece_bytes(images * 3 * config.data.image_size**2)


def _forward(model: PairModel, rows: int, tokens: int, bf16: bool) -> tuple[int, dict[str, torch.Tensor]]:
    """Bytes that autograd keeps of a forward pass of `rows` samples, weights not counted, and the model's outputs."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = model.blank_micro_batch(rows, tokens)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        outputs = model([batch], [0])
    return sum(kept.values()), {name: value.detach() for name, value in outputs.items()}

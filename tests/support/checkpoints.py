"""A run whose checkpoints are written by hand, as training writes them, with weights that mean something."""

from collections.abc import Mapping
from pathlib import Path

import torch

from train import checkpoint, cli, distributed
from train.checkpoint import Tensors, TrainState
from train.config import RunConfig
from train.model.pair import PairModel, build_model
from train.model.text_files import own_tokenizer, text_files
from train.saving.write import begin, contents, write

MEAN, STD = [0.5, 0.45, 0.4], [0.25, 0.2, 0.3]


def write_run(config: RunConfig, steps: int = 2) -> Path:
    """A run directory with a checkpoint after each step; returns it."""
    directory = Path(config.runs_dir) / config.name
    model = build_model(config, MEAN, STD).train()
    tokenizer = own_tokenizer(model, config)
    for step in range(1, steps + 1):
        stir(model, step)
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        average = {name: tensor.clone() for name, tensor in weights.items()} if config.optim.ema else {}
        if average:
            average["log_scale"] += 0.5
        state = TrainState(step=step, mean=MEAN, std=STD, data_hash="1234", precision="no", code="abcd")
        save(directory, Tensors(weights, {}, average), state, config, text_files(model, tokenizer))
    (directory / "config.yaml").write_text(cli.to_yaml(config))
    return directory


def save(
    run_dir: Path, tensors: Tensors, state: TrainState, config: RunConfig, text_files: Mapping[str, bytes]
) -> Path:
    """Write a checkpoint of this step as a run does, but here and now; a collective.

    Args:
        text_files: of the text encoder and its tokenizer, from `train.model.text_files` or `saved_text_files`.

    Raises:
        ValueError: on all ranks, where the directory cannot be written; earlier checkpoints stay as they are.
    """
    problem = ""
    if distributed.is_main():
        content = contents(tensors, state, config, text_files)
        problem = begin(run_dir, state.step) or write(run_dir, state.step, content, config.checkpoint.keep)
    if problem := distributed.broadcast_object(problem):
        raise ValueError(problem)
    return checkpoint.path_of(run_dir, state.step)


@torch.no_grad()
def stir(model: PairModel, seed: int) -> None:
    """Weights and statistics that spread the embeddings of different inputs, as training does."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point() or name in ("log_scale", "logit_bias", "mean", "std"):
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("running_var"):
            tensor.copy_(1 + noise.abs())
        elif tensor.dim() > 1:
            tensor.add_(0.5 * tensor.std() * noise)
        else:
            tensor.add_(0.1 * noise)

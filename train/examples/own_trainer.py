"""A model and a trainer of your own on Duet's data and loss: plain DDP, the exact gradient of the whole global batch.

python -m train.examples.own_trainer data/train bert-base-uncased
torchrun --nproc_per_node 2 -m train.examples.own_trainer data/train bert-base-uncased     # the same losses
"""

import os
import sys

import torch
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from data_pipeline import DataConfig, MicroBatch, Tokenizer, build_order, load_manifest, recolored, train_loader
from train import loss_gradients

GLOBAL_BATCH, MICRO_BATCH, STEPS, SEED = 32, 8, 10, 0


class Pair(nn.Module):
    """Yours: whatever maps a micro-batch to unit vectors `image` and `text` [rows, D] and a `logit_scale` [1]."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, 32, 8, 8), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.text, self.log_scale = nn.EmbeddingBag(words, 32), nn.Parameter(torch.tensor([2.7]))

    def forward(self, batch: MicroBatch) -> dict[str, torch.Tensor]:
        image_BD, text_BD = self.image(batch.images_BCHW / 255), self.text(batch.ids_BL)
        return {"image": F.normalize(image_BD), "text": F.normalize(text_BD), "logit_scale": self.log_scale.exp()}


def main(data: str, tokenizer_name: str) -> None:
    """Train for STEPS steps and print the loss of each."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    manifests, tokenizer = [load_manifest(data)], Tokenizer(tokenizer_name, max_tokens=32)
    order = build_order(manifests, [1.0], batch=GLOBAL_BATCH, lanes=4, seed=SEED, shuffle_shards=8)
    config = DataConfig(image_size=64)
    loader = train_loader(
        config, order, manifests, tokenizer, seed=SEED, micro_batch=MICRO_BATCH, rank=rank, world=world, stop_step=STEPS
    )
    torch.manual_seed(SEED)
    model = Pair(tokenizer.vocab_size)
    wrapped = DistributedDataParallel(model) if dist.is_initialized() else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    micro_batches = iter(loader)
    for step in range(STEPS):
        parts = [recolored(next(micro_batches)) for _ in range(GLOBAL_BATCH // MICRO_BATCH // world)]
        with torch.no_grad():
            outputs = [model(part) for part in parts]
        losses, gradients = loss_gradients(outputs)  # over the rows of all ranks
        for number, (part, gradient) in enumerate(zip(parts, gradients, strict=True), start=1):
            wrapped.require_backward_grad_sync = number == len(parts)  # ranks exchange gradients once per step
            output = wrapped(part)
            torch.autograd.backward([output[name] for name in gradient], list(gradient.values()))
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            print(f"step {step}  loss {float(losses['loss']):.6f}", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])

"""timm's models as image towers: twelve families, each the smallest there is."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from train.config import ImageTowerConfig
from train.distributed import all_reduce_sum
from train.model import norm
from train.model.image import ImageTower

timm = pytest.importorskip("timm")
MEAN, STD = (0.5,) * 3, (0.25,) * 3
# Blocks and stages, counted in timm's sources.
FAMILIES = {
    "test_resnet": (4, 4),
    "test_vit": (6, 1),
    "test_convnext": (9, 4),
    "test_efficientnet": (5, 5),
    "test_byobnet": (4, 4),
    "test_maxvit": (4, 4),
    "test_coatnet": (5, 4),
    "test_nfnet": (4, 4),
    "test_mambaout": (6, 4),
    "mobilenetv3_small_050": (12, 6),
    "regnetx_002": (13, 4),
    "levit_128s": (9, 3),
}


def tower(name: str, size: int = 64, **options) -> ImageTower:
    torch.manual_seed(1)
    return ImageTower(ImageTowerConfig(name=f"timm/{name}", **options), size)


def pixels(size: int = 64, rows: int = 3) -> torch.Tensor:
    return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(2))


def kept_for_backward(module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Features, and the bytes that the forward pass keeps beside the parameters."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        features = module(x)
    return features, sum(size for address, size in kept.items() if address not in own)


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    """Forward and backward, with recomputation too; every parameter in one layer and with a gradient."""
    plain, recomputing = tower(name), tower(name, checkpointing=True)
    assert (len(plain.blocks), len(plain.stages)) == FAMILIES[name], (plain.blocks, plain.stages)
    layers = plain.layers()
    assert [n for layer in layers for n in layer] == [n for n, _ in plain.named_parameters()]
    assert len(layers) == len(plain.blocks) + 1
    assert all(layer[0].startswith(f"{block}.") for layer, block in zip(layers[1:], plain.blocks, strict=True))

    norm.convert(plain, "batch")
    norm.convert(recomputing, "batch")
    x = pixels()
    features, kept = kept_for_backward(plain, x)
    again, kept_again = kept_for_backward(recomputing, x)
    assert features.shape == (3, plain.width) and torch.equal(features, again)
    assert kept_again < 0.8 * kept, kept_again / kept
    for result in (features, again):
        (result * torch.linspace(-1, 1, result.numel()).view_as(result)).sum().backward()
    for (parameter_name, parameter), other in zip(plain.named_parameters(), recomputing.parameters(), strict=True):
        assert parameter.requires_grad and parameter.grad is not None, parameter_name
        assert torch.equal(parameter.grad, other.grad), parameter_name


@pytest.mark.parametrize("name", FAMILIES)
def test_normalization_is_that_of_timm(name):
    """With statistics of the micro-batch, or frozen: the same features as timm's own, activations included."""
    plain = tower(name)
    batch, frozen, group = copy.deepcopy(plain), copy.deepcopy(plain), copy.deepcopy(plain)
    for module, kind in ((batch, "batch"), (frozen, "frozen"), (group, "group")):
        norm.convert(module, kind)
        activations = [type(m) for m in plain.modules() if not isinstance(m, nn.modules.batchnorm._BatchNorm)]
        kept = [type(m) for m in module.modules() if not isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert [t for t in kept if t is not nn.GroupNorm] == [t for t in activations if t is not nn.GroupNorm]
    x = pixels()
    has_batch_norm = any(isinstance(m, norm.MicroBatchNorm) for m in batch.modules())
    assert batch.state_dict().keys() == frozen.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        assert group(x).isfinite().all()
        assert torch.equal(group(x), plain(x)) == (not has_batch_norm)
        before = {key: value.clone() for key, value in batch.state_dict().items()}
        with norm.recording(batch):
            features = batch(x)
        assert all(torch.equal(value, before[key]) for key, value in batch.state_dict().items())
        norm.update_running(batch, all_reduce_sum, 1)
        torch.testing.assert_close(features, plain(x), rtol=1e-4, atol=1e-5)  # moves the running statistics
        plain.load_state_dict(before)
        torch.testing.assert_close(features, plain(x), rtol=1e-4, atol=1e-5)
        for key, value in plain.state_dict().items():
            torch.testing.assert_close(batch.state_dict()[key], value, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(frozen(x), plain.eval()(x)) if not has_batch_norm else None

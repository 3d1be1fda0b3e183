"""What a forward pass keeps for the backward pass."""

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


def kept_for_backward(module: nn.Module, *inputs: Tensor) -> tuple[Tensor, int]:
    """Its output, and the bytes that the forward pass keeps beside the parameters."""
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = module(*inputs)
    return output, sum(size for address, size in kept.items() if address not in own)


def gradients(tower: nn.Module, *inputs: Tensor) -> tuple[Tensor, dict[str, Tensor], int]:
    """Features, gradients, and the bytes that were kept; dropout is the same in every call."""
    tower.zero_grad()
    torch.manual_seed(7)
    features, size = kept_for_backward(tower, *inputs)
    (features * torch.linspace(-1, 1, features.numel()).view_as(features)).sum().backward()
    return features.detach(), {name: parameter.grad for name, parameter in tower.named_parameters()}, size


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Bitwise, under the same names."""
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())

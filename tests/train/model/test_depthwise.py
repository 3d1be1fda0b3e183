import copy

import pytest
import torch
from timm.layers import Conv2dSame
from torch import nn

from train.model import depthwise
from train.model.depthwise import InFloat


def tower() -> nn.Sequential:
    """Four convolutions of which the first two, of torch and timm, are depthwise, large, and learn."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(8, 8, 5, groups=8), Conv2dSame(8, 8, 5, stride=2, groups=8), nn.Conv2d(8, 8, 3, groups=8)]
    made = nn.Sequential(*layers, nn.Conv2d(8, 4, 5, padding=2))
    depthwise.convert(made)
    return made.to(memory_format=torch.channels_last)


def passed(module: nn.Module, x: torch.Tensor, gradient: torch.Tensor, bf16: bool) -> list[torch.Tensor]:
    """Output, and the gradients of its weight and bias."""
    module.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        y = module(x)
    y.backward(gradient.to(y.dtype))
    return [y.detach(), module.weight.grad, module.bias.grad]


@pytest.mark.parametrize("index", [0, 1])
def test_the_convolution_is_that_of_fp32_between_bf16(index):
    conv, x = tower()[index], torch.randn(6, 8, 9, 9).bfloat16()
    gradient = torch.randn_like(conv(x.float())).bfloat16()
    exact = passed(conv, x.float(), gradient, bf16=False)
    found = passed(conv, x, gradient, bf16=True)
    assert found[0].dtype == torch.bfloat16 and torch.equal(found[0], exact[0].bfloat16())
    for ours, fp32 in zip(found[1:], exact[1:], strict=True):
        assert torch.equal(ours, fp32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # as features are cached
        assert torch.equal(conv(x), found[0])
        conv.eval()  # nothing learns: as fast as it goes
        assert not torch.equal(conv(x), found[0])


def test_large_depthwise_convolutions_that_learn_are_converted_and_nothing_else():
    made = tower()
    assert [isinstance(conv, InFloat) for conv in made] == [True, True, False, False]
    assert isinstance(made[1], Conv2dSame)
    assert copy.deepcopy(made)[1].load_state_dict(Conv2dSame(8, 8, 5, stride=2, groups=8).state_dict())
    locked = nn.Sequential(nn.Conv2d(8, 8, 5, groups=8).requires_grad_(False))
    depthwise.convert(locked)
    assert type(locked[0]) is nn.Conv2d

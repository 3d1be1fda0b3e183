import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.support.distributed import run_distributed
from train.distributed import all_reduce_sum, rank, world_size
from train.model import norm
from train.model.norm import FrozenBatchNorm, GlobalBatchNorm, MicroBatchNorm


def plain_norm(channels: int, momentum: float = 0.1) -> nn.BatchNorm2d:
    """A BatchNorm as it may come out of training."""
    plain = nn.BatchNorm2d(channels, momentum=momentum)
    generator = torch.Generator().manual_seed(1)
    for tensor in (plain.weight.data, plain.bias.data, plain.running_mean, plain.running_var):
        tensor.copy_(torch.rand(channels, generator=generator) + 0.5)
    return plain


def converted(plain: nn.Module, kind: str) -> nn.Module:
    holder = nn.Sequential(copy.deepcopy(plain))
    norm.convert(holder, kind)
    return holder[0]


def images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(*shape, generator=generator) + 2).to(dtype)


def forward_backward(module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Output and gradients for input, weight and bias, of a loss that depends on every output differently."""
    x = x.detach().requires_grad_()
    module.zero_grad()
    y = module(x)
    (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return y.detach(), x.grad, module.weight.grad.clone(), module.bias.grad.clone()


def assert_equal_bitwise(ours, reference):
    assert all(torch.equal(a, b) for a, b in zip(ours, reference, strict=True))


def own(tensor):
    """The reduction over one process."""
    return tensor


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 5),
    channels=st.integers(1, 9),
    size=st.integers(2, 7),
    momentum=st.sampled_from([0.01, 0.1, 0.37, 1.0]),
    layout=st.sampled_from(
        [
            (torch.contiguous_format, torch.float32),
            (torch.contiguous_format, torch.bfloat16),
            (torch.channels_last, torch.bfloat16),
        ]
    ),
)
def test_one_micro_batch_equals_torch_bitwise(rows, channels, size, momentum, layout):
    memory, dtype = layout
    plain = plain_norm(channels, momentum)
    ours = converted(plain, "batch")
    for step in range(3):
        x = images(rows, channels, size, size, seed=step, dtype=dtype).contiguous(memory_format=memory)
        expected = forward_backward(plain, x)
        with norm.recording(ours):
            actual = forward_backward(ours, x)
            norm.record(ours)
        norm.update_running(ours, own, 1)
        assert_equal_bitwise(actual, expected)
        assert_equal_bitwise(ours.state_dict().values(), plain.state_dict().values())
    assert_equal_bitwise([ours.eval()(x)], [plain.eval()(x)])


@pytest.mark.parametrize("threads", [1, 2])
def test_channels_last_on_cpu_is_as_exact_as_fp32_can_be(threads):
    plain = plain_norm(16)
    ours = converted(plain, "batch")
    x = images(32, 16, 32, 32).contiguous(memory_format=torch.channels_last)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with norm.recording(ours):
            actual = forward_backward(ours, x)
            norm.record(ours)
        rough = forward_backward(plain, x)
    finally:
        torch.set_num_threads(before)
    norm.update_running(ours, own, 1)
    exact = copy.deepcopy(plain_norm(16)).double()
    expected = forward_backward(exact, x.double())
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(ours, name).double(), getattr(exact, name), rtol=3e-7, atol=0)
    errors, rough_errors = (
        [float((a - b).norm() / b.norm()) for a, b in zip(ours_or_torchs, expected, strict=True)]
        for ours_or_torchs in (actual, rough)
    )
    assert max(errors) < 1e-6
    assert max(rough_errors) > 2 * max(errors)  # what this is for; where torch has caught up, drop _torch_sums_roughly


@pytest.mark.parametrize("mean, bound", [(0, 1e-6), (1000, 3e-4)])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("shape", [(2, 10, 5, 7), (4, 12, 4, 6), (24, 5, 1, 1)])
def test_parts_that_fit_the_cache_are_put_together_exactly(monkeypatch, shape, layout, mean, bound):
    """Whatever the layout of the gradient; in fp32 an input of 1000 is off by 3e-5 itself."""
    x, gradient = images(*shape).contiguous(memory_format=torch.channels_last) + mean, images(*shape).sin()
    for name, value in {"CACHED": 100, "WIDTH": 45, "LENGTH": 3}.items():
        monkeypatch.setattr(norm, name, value)
    parts = len(list(norm._in_cache(norm._pixels_beside(x), x)))
    assert parts > 1
    plain, found = plain_norm(shape[1]), []
    for made, leaf in ((converted(plain, "sync_batch"), x.clone()), (plain.double(), x.double())):
        y = made(leaf.requires_grad_())
        y.backward(gradient.to(leaf.dtype).contiguous(memory_format=layout))
        found.append([y.detach(), leaf.grad, made.weight.grad, made.bias.grad])
    assert found[0][1].stride() == x.stride()
    for ours, exact in zip(*found, strict=True):
        assert (ours - exact).norm() < bound * exact.norm()


@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 6), steps=st.integers(1, 3))
def test_running_statistics_move_once_by_the_mean_over_micro_batches(count, steps):
    plain = plain_norm(4)
    ours = converted(plain, "batch")
    mean, var = plain.running_mean.double(), plain.running_var.double()
    for step in range(steps):
        batches = [images(3, 4, 2, 2, seed=100 * step + i) for i in range(count)]
        before = ours.running_mean.clone()
        with norm.recording(ours):
            for x in batches:
                ours(x)
                norm.record(ours)
        assert torch.equal(ours.running_mean, before), "a forward has moved the running statistics"
        norm.update_running(ours, own, count)
        double = [x.double() for x in batches]
        mean = 0.9 * mean + 0.1 * sum(x.mean((0, 2, 3)) for x in double) / count
        var = 0.9 * var + 0.1 * sum(x.var((0, 2, 3)) for x in double) / count
    torch.testing.assert_close(ours.running_mean.double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.running_var.double(), var, rtol=1e-6, atol=1e-6)
    assert ours.num_batches_tracked == steps


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(8)))
def test_running_statistics_do_not_depend_on_how_micro_batches_are_dealt(order):
    results = []
    for indices in (range(8), order):
        ours = converted(plain_norm(16), "batch")
        with norm.recording(ours):
            for i in indices:
                ours(images(2, 16, 3, 3, seed=i))
                norm.record(ours)
        norm.update_running(ours, own, 8)
        results.append(torch.stack((ours.running_mean, ours.running_var)))
    assert torch.equal(*results)


def test_replayed_forwards_collect_nothing():
    plain = plain_norm(5)
    once, replayed = converted(plain, "batch"), converted(plain, "batch")
    x = images(4, 5, 3, 3)
    with norm.recording(once):
        once(x)
        norm.record(once)
    norm.update_running(once, own, 1)

    with norm.recording(replayed), torch.no_grad():
        replayed(x)
        norm.record(replayed)
    first, second = replayed(x), replayed(x)
    norm.record(replayed)
    (first + second).sum().backward()
    norm.update_running(replayed, own, 1)
    assert_equal_bitwise(replayed.state_dict().values(), once.state_dict().values())


def test_recomputation_in_the_backward_pass_records_nothing():
    plain = plain_norm(5)
    ours = converted(plain, "batch")
    x = images(4, 5, 3, 3)
    plain(x)
    calls = []
    ours.register_forward_hook(lambda *_: calls.append(1))
    recomputing = x.clone().requires_grad_()
    with norm.recording(ours):
        # The sine makes the backward pass need what is inside, so that the forward really runs again.
        y = checkpoint(lambda x: ours(x).sin(), recomputing, use_reentrant=False)
        norm.record(ours)
        y.sum().backward()
    assert len(calls) == 2
    norm.update_running(ours, own, 1)
    assert_equal_bitwise(ours.state_dict().values(), plain.state_dict().values())


def test_a_step_that_is_not_finite_leaves_the_running_statistics():
    ours = converted(plain_norm(3), "batch")
    before = copy.deepcopy(ours.state_dict())
    x = images(2, 3, 2, 2)
    x[0, 1] = torch.inf
    with norm.recording(ours):
        ours(x)
        norm.record(ours)
    norm.update_running(ours, own, 1)
    assert torch.equal(ours.running_mean[1], before["running_mean"][1])
    assert not torch.equal(ours.running_mean[0], before["running_mean"][0])
    with norm.recording(ours):
        ours(images(2, 3, 2, 2))
        norm.record(ours)
    norm.update_running(ours, own, 1)
    assert all(value.isfinite().all() for value in ours.state_dict().values())


def test_a_micro_batch_that_was_not_recorded_is_a_programming_error():
    ours = converted(plain_norm(3), "batch")
    with norm.recording(ours):
        ours(images(2, 3, 2, 2))
        norm.record(ours)
    with pytest.raises(AssertionError):
        norm.update_running(ours, own, 2)


def test_convert_keeps_weights_and_statistics_and_finds_nested_norms():
    plain = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ModuleDict({"inner": nn.Sequential(plain_norm(8))}))
    for kind, expected in {
        "batch": MicroBatchNorm,
        "sync_batch": GlobalBatchNorm,
        "frozen": FrozenBatchNorm,
    }.items():
        module = copy.deepcopy(plain)
        norm.convert(module, kind)
        assert type(module[1]["inner"][0]) is expected
        assert module.state_dict().keys() == plain.state_dict().keys()
        assert_equal_bitwise(module.state_dict().values(), plain.state_dict().values())


def test_group_norm_does_not_look_at_other_samples_and_takes_any_number_of_channels():
    for channels, groups in ((64, 32), (48, 16), (24, 8), (7, 1)):
        group = converted(plain_norm(channels), "group")
        assert (group.num_groups, group.num_channels) == (groups, channels)
        x = images(4, channels, 3, 3)
        torch.testing.assert_close(group(x)[:1], group(x[:1]))


def test_frozen_statistics_stay_while_weight_and_bias_learn():
    plain = plain_norm(6)
    frozen = converted(plain, "frozen").train()
    x = images(4, 6, 3, 3)
    assert_equal_bitwise(forward_backward(frozen, x), forward_backward(plain.eval(), x))
    assert_equal_bitwise(frozen.state_dict().values(), plain.state_dict().values())
    norm.update_running(frozen, own, 1)
    assert torch.equal(frozen.running_mean, plain.running_mean)


def synchronized(batch: int, dtype: torch.dtype):
    """This rank's rows through a synchronized norm: output, gradients, and the statistics after the step."""
    ours = converted(plain_norm(5), "sync_batch")
    share = batch // world_size()
    rows = slice(rank() * share, (rank() + 1) * share)
    weights = torch.linspace(-1, 1, batch * 5 * 3 * 3).view(batch, 5, 3, 3)[rows]
    x = (images(batch, 5, 3, 3, dtype=dtype) + 100)[rows].requires_grad_()
    with norm.recording(ours):
        y = ours(x)
        norm.record(ours)
    (y.float() * weights).sum().backward()
    norm.update_running(ours, all_reduce_sum, batch)
    sums = [all_reduce_sum(parameter.grad) for parameter in (ours.weight, ours.bias)]
    return y.detach(), x.grad, *sums, ours.running_mean, ours.running_var


@pytest.mark.parametrize("world", [1, 2])
def test_synchronized_norm_equals_one_process_with_the_whole_batch(world):
    plain = plain_norm(5)
    expected = [*forward_backward(plain, images(6, 5, 3, 3) + 100), plain.running_mean, plain.running_var]
    ranks = run_distributed(synchronized, world, 6, torch.float32)
    for index, reference in enumerate(expected):
        parts = [result[index] for result in ranks]
        actual = torch.cat(parts) if index < 2 else parts[0]
        torch.testing.assert_close(actual, reference, rtol=1e-5, atol=2e-5)
        assert index < 2 or all(torch.equal(part, parts[0]) for part in parts)


def test_synchronized_norm_in_bfloat16_gives_bfloat16_and_float32_statistics():
    y, x_grad, _, _, mean, _ = synchronized(6, torch.bfloat16)
    assert y.dtype == x_grad.dtype == torch.bfloat16
    plain = plain_norm(5)
    reference = forward_backward(plain, images(6, 5, 3, 3, dtype=torch.bfloat16) + 100)
    torch.testing.assert_close(mean, plain.running_mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y.float(), reference[0].float(), rtol=0.05, atol=0.05)


def micro_batches_over_ranks(count: int):
    ours = converted(plain_norm(5), "batch")
    share = count // world_size()
    with norm.recording(ours):
        for i in range(rank() * share, (rank() + 1) * share):
            ours(images(3, 5, 4, 4, seed=i))
            norm.record(ours)
    norm.update_running(ours, all_reduce_sum, count)
    return ours.running_mean, ours.running_var


def test_running_statistics_are_bitwise_the_same_for_any_number_of_ranks():
    one, (first, second) = micro_batches_over_ranks(4), run_distributed(micro_batches_over_ranks, 2, 4)
    assert_equal_bitwise(one, first)
    assert_equal_bitwise(one, second)

"""Normalization whose statistics belong to the micro-batch, so that they are the same wherever a micro-batch runs.

Training normalizes by the statistics of the micro-batch and never touches the running ones. Each forward leaves behind
what the running statistics would be after it; `record` adds that up while `recording`, and once per step
`update_running` sets the running statistics to the mean over all micro-batches of all ranks. So a forward does the same
whether it is recorded or repeated (cached features, checkpointing), and one compiled program does for both.

Shapes: B samples, C channels, H height, W width; inputs may also be [B, C] or [B, C, L].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FrozenBatchNorm2d

from train.config import Norm
from train.distributed import all_reduce_sum, world_size

CACHED = 1 << 17
"""Numbers of a tensor that a CPU's cache holds, with two more of that size."""


class MicroBatchNorm(_BatchNorm):
    """BatchNorm (arXiv 1502.03167) by the statistics of the micro-batch; with one per step it equals torch's own."""

    # Torch's own class may be without these; this one always has them.
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum, affine=affine)
        self.recording = False
        self.after: tuple[Tensor, Tensor] | None = None
        self.recorded_count = 0
        self.recorded_sum_2C: Tensor | None = None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(
                x_BCHW, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        # On copies, even where nothing is noted: a recomputed forward has to save the same tensors as the first.
        mean_C, var_C = self.running_mean.clone(), self.running_var.clone()
        y_BCHW = self._normalize(x_BCHW, mean_C, var_C)
        self.after = mean_C, var_C
        return y_BCHW

    def _normalize(self, x_BCHW: Tensor, mean_C: Tensor, var_C: Tensor) -> Tensor:
        """Normalizes by the batch and moves the given running statistics in place."""
        # A compiled tower has sums of its own, by Welford's method.
        if not torch.compiler.is_compiling() and _torch_sums_roughly(x_BCHW):
            return self._normalize_by(_same, x_BCHW, mean_C, var_C)
        return F.batch_norm(x_BCHW, mean_C, var_C, self.weight, self.bias, True, self.momentum, self.eps)

    def _normalize_by(self, total: Callable[[Tensor], Tensor], x: Tensor, mean_C: Tensor, var_C: Tensor) -> Tensor:
        x_BCHW = x.view(*x.shape, *[1] * (4 - x.ndim))
        weight_C = torch.ones_like(mean_C) if self.weight is None else self.weight
        bias_C = torch.zeros_like(mean_C) if self.bias is None else self.bias
        y_BCHW = _Normalize.apply(x_BCHW, weight_C, bias_C, mean_C, var_C, self.momentum, self.eps, total)
        return y_BCHW if x.ndim == 4 else y_BCHW.view_as(x)


class GlobalBatchNorm(MicroBatchNorm):
    """The same, by the statistics of everything that all ranks normalize in one call (on any backend)."""

    def _normalize(self, x_BCHW: Tensor, mean_C: Tensor, var_C: Tensor) -> Tensor:
        return self._normalize_by(all_reduce_sum, x_BCHW, mean_C, var_C)


class FrozenBatchNorm(_BatchNorm):
    """Always normalizes by the running statistics, which stay as they were loaded; weight and bias learn."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.batch_norm(x_BCHW, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


FROZEN = (FrozenBatchNorm, FrozenBatchNorm2d)
"""Norms whose running statistics nothing moves."""


class _Normalize(torch.autograd.Function):
    """Batch normalization with statistics in full fp32; backward gives the gradient of the sum of the ranks' losses.

    With xhat = (x - mean) / sqrt(var + eps) and n values per channel (arXiv 1502.03167, section 3):
    dx = weight / sqrt(var + eps) * (dy - sum(dy) / n - xhat * sum(dy * xhat) / n).
    `total` turns this rank's sums into those of all ranks whose rows are normalized together.
    """

    @staticmethod
    def forward(ctx, x_BCHW, weight_C, bias_C, running_mean_C, running_var_C, momentum, eps, total):
        x = x_BCHW.to(torch.promote_types(x_BCHW.dtype, torch.float32))
        count = torch.full((1,), x.numel() // x.shape[1], dtype=x.dtype, device=x.device)
        totals = total(torch.cat((x.sum((0, 2, 3)), count)))
        n = totals[-1]
        mean_C = totals[:-1] / n
        # Squares about the mean in a second sum: E[x^2] - mean^2 would cancel where the mean is large.
        y = torch.empty_like(x)
        for part, squares in _in_cache(x, y):
            torch.sub(part, mean_C, out=squares).square_()
        var_C = total(y.sum((0, 2, 3))) / n
        inverse_std_C = (var_C + eps).rsqrt()
        running_mean_C.lerp_(mean_C, momentum)
        running_var_C.lerp_(var_C * (n / (n - 1)), momentum)
        ctx.save_for_backward(x_BCHW, weight_C, mean_C, inverse_std_C, n)
        ctx.total = total
        scale_C = inverse_std_C * weight_C
        for part, normalized in _in_cache(x, y):
            torch.sub(part, mean_C, out=normalized).mul_(scale_C).add_(bias_C)
        return y.to(x_BCHW.dtype)

    @staticmethod
    def backward(ctx, dy_BCHW):
        x_BCHW, weight_C, mean_C, inverse_std_C, n = ctx.saved_tensors
        dy = dy_BCHW.to(mean_C.dtype)
        products = torch.empty_like(dy)
        for part, of_y, product in _in_cache(x_BCHW, dy, products):
            torch.sub(part, mean_C, out=product).mul_(inverse_std_C).mul_(of_y)
        # Each in the order in which its numbers lie in memory, which decides how their sum is rounded.
        dbias_C, dweight_C = dy.sum((0, 2, 3)), products.sum((0, 2, 3))
        mean_dy_C, mean_dy_xhat_C = ctx.total(torch.stack((dbias_C, dweight_C))) / n
        scale_C = inverse_std_C * weight_C
        alike = products.stride() == x_BCHW.stride()
        dx = products if alike else torch.empty_like(x_BCHW, dtype=dy.dtype)
        for part, of_y, of_x in _in_cache(x_BCHW, dy, dx):
            xhat = torch.sub(part, mean_C, out=of_x).mul_(inverse_std_C)
            xhat.mul_(-mean_dy_xhat_C).add_(of_y).sub_(mean_dy_C).mul_(scale_C)
        return dx.to(x_BCHW.dtype), dweight_C, dbias_C, None, None, None, None, None


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _in_cache(*tensors_BCHW: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same parts [..., C] of tensors of one shape, views, so small that a CPU reads each of them once from memory,
    however much is done with it; elsewhere the whole."""
    whole = [tensor.permute(0, 2, 3, 1) for tensor in tensors_BCHW]
    if whole[0].device.type == "cpu" and all(tensor.is_contiguous() for tensor in whole):
        rows = max(1, CACHED // whole[0].shape[-1])
        yield from zip(*(tensor.flatten(0, 2).split(rows) for tensor in whole), strict=True)
    else:
        yield tuple(whole)


def _torch_sums_roughly(x_BCHW: Tensor) -> bool:
    """Whether torch's own kernel adds up each channel in one long fp32 sum per thread: channels_last on the CPU.

    Its statistics are then off by up to 1e-5, by another amount for every number of threads; through a ResNet-18 that
    grows to 2% of the gradient of the first layers.
    """
    if x_BCHW.ndim != 4 or x_BCHW.device.type != "cpu" or x_BCHW.dtype != torch.float32:
        return False
    return not x_BCHW.is_contiguous() and x_BCHW.is_contiguous(memory_format=torch.channels_last)


def convert(module: nn.Module, kind: Norm) -> None:
    """Replaces every BatchNorm inside `module`, in place, keeping weights, statistics and the activation it may hold.

    batch: MicroBatchNorm; sync_batch: GlobalBatchNorm; frozen: FrozenBatchNorm; group: GroupNorm (arXiv 1803.08494) of
    32 groups, or the largest common divisor of 32 and the channels.

    Raises:
        ValueError: a norm of another kind has running statistics, which every forward pass would move.
    """
    for name, child in list(module.named_children()):
        if isinstance(child, _BatchNorm) and child.running_mean is not None:
            setattr(module, name, _converted(child, kind))
            continue
        if "running_var" in dict(child.named_buffers(recurse=False)) and not isinstance(child, FROZEN):
            raise ValueError(
                f"model.image.norm {kind}: {type(child).__name__} ({name}) keeps running statistics in a way that "
                "is not known here; take a tower with BatchNorm, GroupNorm or LayerNorm"
            )
        convert(child, kind)


def _converted(norm: _BatchNorm, kind: Norm) -> nn.Module:
    channels, eps = norm.num_features, norm.eps
    converted: nn.Module
    if kind == "group":
        converted = nn.GroupNorm(math.gcd(32, channels), channels, eps=eps, affine=norm.affine)
    else:
        classes = {"batch": MicroBatchNorm, "sync_batch": GlobalBatchNorm, "frozen": FrozenBatchNorm}
        momentum = 0.1 if norm.momentum is None else norm.momentum
        converted = classes[kind](channels, eps=eps, momentum=momentum, affine=norm.affine)
        converted.load_state_dict({name: value for name, value in norm.state_dict().items() if "." not in name})
    converted.weight, converted.bias = norm.weight, norm.bias
    # timm's norms hold what follows them, under these names.
    if follows := [name for name in ("drop", "act") if isinstance(getattr(norm, name, None), nn.Module)]:
        for name in follows:
            converted.add_module(name, getattr(norm, name))
        converted.register_forward_hook(partial(_then, names=follows))
    return converted


def _then(norm: nn.Module, _inputs: tuple, output: Tensor, names: Sequence[str]) -> Tensor:
    for name in names:
        output = norm.get_submodule(name)(output)
    return output


def _norms(module: nn.Module) -> list[MicroBatchNorm]:
    return [norm for norm in module.modules() if isinstance(norm, MicroBatchNorm)]


@contextmanager
def recording(module: nn.Module) -> Iterator[None]:
    """Inside it `record` adds up; each micro-batch of a step has to be recorded once."""
    norms = _norms(module)
    for norm in norms:
        norm.recording = True
    try:
        yield
    finally:
        for norm in norms:
            norm.recording = False


def record(module: nn.Module) -> None:
    """After a training forward of `module`: adds up what it has left behind, where it is being recorded."""
    norms = [norm for norm in _norms(module) if norm.recording and norm.training]
    if not norms:
        return
    # All of them at once: a ResNet-50 has 53, and each small operation costs a GPU as much as a large one.
    assert all(norm.after is not None for norm in norms), "a norm that no forward has gone through"
    statistics = torch.cat([value_C for norm in norms for value_C in norm.after or ()])
    # In float64 the mean does not show in which order, and on which rank, micro-batches were added.
    double = statistics if statistics.device.type == "mps" else statistics.double()
    sums = double.split([2 * norm.num_features for norm in norms])
    before = [norm.recorded_sum_2C for norm in norms if norm.recorded_sum_2C is not None]
    for norm, sum_2C in zip(norms, torch._foreach_add(before, sums) if before else sums, strict=True):
        norm.recorded_sum_2C, norm.after = sum_2C, None
        norm.recorded_count += 1


@torch.no_grad()
def update_running(module: nn.Module, all_reduce: Callable[[Tensor], Tensor], count: int) -> None:
    """Sets all running statistics to the mean over the micro-batches that were recorded since the last update.

    Where a mean is not finite (such a step is skipped), the running statistic keeps its value.

    Args:
        all_reduce: returns the sum of a tensor over all ranks.
        count: micro-batches of the global batch; each was recorded once, on one of the ranks.
    """
    norms = [norm for norm in _norms(module) if norm.training]
    if not norms:
        return
    for norm in norms:
        recorded = norm.recorded_count * world_size()
        # A synchronized norm records once per rank and call, whatever the number of micro-batches.
        assert recorded > 0 and (recorded == count or isinstance(norm, GlobalBatchNorm)), (recorded, count)
    recorded_sums = [norm.recorded_sum_2C for norm in norms if norm.recorded_sum_2C is not None]
    sums = all_reduce(torch.cat(recorded_sums)).split([2 * norm.num_features for norm in norms])
    means = torch.cat(torch._foreach_div(sums, [float(norm.recorded_count * world_size()) for norm in norms]))
    running = [running_C for norm in norms for running_C in (norm.running_mean, norm.running_var)]
    moved = torch.where(means.isfinite(), means, torch.cat(running).to(means.dtype))
    torch._foreach_copy_(running, moved.split([len(running_C) for running_C in running]))
    torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)
    for norm in norms:
        norm.recorded_sum_2C, norm.recorded_count = None, 0

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

CACHED, WIDTH, LENGTH = 1 << 19, 1 << 11, 1 << 9
"""Of a part of a tensor: how many numbers a CPU's cache holds, how many are beside one another, and how many torch's
kernels for channels_last may add up, which they do in one long fp32 sum."""


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
        channels, beside = len(weight_C), _pixels_beside(x)
        parts = [part for (part,) in _in_cache(beside, x)]
        # Filled on the device: numbers that come from the host would make a GPU wait. Only the last part is smaller.
        counts_P1 = x.new_full((len(parts) * beside, 1), parts[0].numel() // parts[0].shape[1])
        counts_P1[-beside:] = parts[-1].numel() // parts[-1].shape[1]
        moments = zip(*(torch.batch_norm_update_stats(part, None, None, 0.0) for part in parts), strict=True)
        means_PC, vars_PC = (torch.stack(of_parts).view(-1, channels) for of_parts in moments)
        totals = total(torch.cat(((means_PC * counts_P1).sum(0), counts_P1.sum(0))))
        n = totals[-1]
        mean_C = totals[:-1] / n
        # The variance of all from those of parts (Chan, Golub and LeVeque, Stanford STAN-CS-79-773, 1979):
        # E[x^2] - mean^2 would cancel where the mean is large.
        var_C = total((counts_P1 * (vars_PC + (means_PC - mean_C).square())).sum(0)) / n
        running_mean_C.lerp_(mean_C, momentum)
        running_var_C.lerp_(var_C * (n / (n - 1)), momentum)
        ctx.save_for_backward(x_BCHW, weight_C, mean_C, (var_C + eps).rsqrt(), n)
        ctx.total = total
        return F.batch_norm(x, mean_C, var_C, weight_C, bias_C, False, 0.0, eps).to(x_BCHW.dtype)

    @staticmethod
    def backward(ctx, dy_BCHW):
        x_BCHW, weight_C, mean_C, inverse_std_C, n = ctx.saved_tensors
        x, dy = x_BCHW.to(mean_C.dtype), dy_BCHW.to(mean_C.dtype)
        channels, beside = len(weight_C), _pixels_beside(x)
        wide = [value_C.repeat(beside) for value_C in (weight_C, mean_C, inverse_std_C)]
        of_parts = [_weight_gradient(*part, *wide) for part in _in_cache(beside, x, dy)]
        dweight_C, dbias_C = torch.stack(of_parts).view(-1, channels).sum(0), dy.sum((0, 2, 3))
        mean_dy_C, mean_dy_xhat_C = ctx.total(torch.stack((dbias_C, dweight_C))) / n
        scale_C = inverse_std_C * weight_C
        slope_C = -scale_C * inverse_std_C * mean_dy_xhat_C
        shift_C = -scale_C * mean_dy_C - mean_C * slope_C
        scale, slope, shift = (value_C.repeat(beside)[:, None, None] for value_C in (scale_C, slope_C, shift_C))
        dx = torch.empty_like(x)
        for part, of_y, of_x in _in_cache(beside, x, dy, dx):
            torch.addcmul(shift, part, slope, out=of_x).addcmul_(of_y, scale)
        return dx.to(x_BCHW.dtype), dweight_C, dbias_C, None, None, None, None, None


def _weight_gradient(x: Tensor, dy: Tensor, weight_C: Tensor, mean_C: Tensor, inverse_std_C: Tensor) -> Tensor:
    """Of each channel sum(dy * xhat)."""
    backward = torch.ops.aten.native_batch_norm_backward
    return backward(dy, x, weight_C, None, None, mean_C, inverse_std_C, True, 0.0, [False, True, False])[1]


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _pixels_beside(x_BCHW: Tensor) -> int:
    """How many pixels `_in_cache` may put beside one another."""
    channels = x_BCHW.shape[1]
    power_of_two = 1 << max(1, WIDTH // channels).bit_length() - 1
    return math.gcd(x_BCHW.numel() // channels, power_of_two) if _comes_in_parts(x_BCHW) else 1


def _in_cache(beside: int, *tensors_BCHW: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same parts of tensors of one shape: where the first is channels_last and on a CPU, [1, beside * C, R, 1], so
    small that it reads each of them once from memory, however much is done with it, and views if they are channels_last
    as well; else the whole.

    beside: pixels that count as one with more channels, so that the sums over R are short: that is exact, and fast.
    """
    if not _comes_in_parts(tensors_BCHW[0]):
        yield tensors_BCHW
        return
    width = beside * tensors_BCHW[0].shape[1]
    rows = max(1, min(LENGTH, CACHED // width))
    wide = (x_BCHW.permute(0, 2, 3, 1).reshape(-1, width) for x_BCHW in tensors_BCHW)
    for parts in zip(*(rows_RW.split(rows) for rows_RW in wide), strict=True):
        yield tuple(part_RW.T[None, :, :, None] for part_RW in parts)


def _comes_in_parts(x_BCHW: Tensor) -> bool:
    return x_BCHW.device.type == "cpu" and x_BCHW.is_contiguous(memory_format=torch.channels_last)


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

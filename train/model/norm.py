"""Normalization whose statistics belong to the micro-batch, so that they are the same wherever a micro-batch runs.

Training normalizes by the statistics of the micro-batch at hand and never touches the running ones. While `recording`,
each micro-batch leaves what it would have made of the running statistics; once per step `update_running` moves these to
the mean over all micro-batches of all ranks. A replayed forward (cached features, checkpointing) leaves nothing.

Shapes: B samples, C channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.config import Norm
from train.distributed import all_reduce_sum, world_size


class MicroBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm (arXiv 1502.03167) by the statistics of the micro-batch; equals nn.BatchNorm2d for one per step."""

    # What torch's own class has only on request, this one always has.
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.recording = False
        self.recorded_count = 0
        self.recorded_sum_2C: Tensor | None = None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(
                x_BCHW, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        # The update is made on copies, also when it is then dropped: a recomputed forward must save the same tensors.
        mean_C, var_C = self.running_mean.clone(), self.running_var.clone()
        y_BCHW = self._normalize(x_BCHW, mean_C, var_C)
        if self.recording and not _in_backward():
            self._record(torch.stack((mean_C, var_C)))
        return y_BCHW

    def _normalize(self, x_BCHW: Tensor, mean_C: Tensor, var_C: Tensor) -> Tensor:
        """Normalizes by the batch and moves the given running statistics in place."""
        if _sums_are_rough(x_BCHW):
            return _Normalize.apply(x_BCHW, self.weight, self.bias, mean_C, var_C, self.momentum, self.eps, _own)
        return F.batch_norm(x_BCHW, mean_C, var_C, self.weight, self.bias, True, self.momentum, self.eps)

    def _record(self, statistics_2C: Tensor) -> None:
        # Sums in float64, so that the order in which micro-batches are dealt to ranks does not show in the mean.
        double_2C = statistics_2C if statistics_2C.device.type == "mps" else statistics_2C.double()
        self.recorded_sum_2C = double_2C if self.recorded_sum_2C is None else self.recorded_sum_2C + double_2C
        self.recorded_count += 1


class GlobalBatchNorm2d(MicroBatchNorm2d):
    """The same by the statistics of everything that all ranks normalize together in this call (any backend)."""

    def _normalize(self, x_BCHW: Tensor, mean_C: Tensor, var_C: Tensor) -> Tensor:
        return _Normalize.apply(x_BCHW, self.weight, self.bias, mean_C, var_C, self.momentum, self.eps, all_reduce_sum)


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Always normalizes by the running statistics, which stay as loaded; weight and bias learn."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.batch_norm(x_BCHW, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class _Normalize(torch.autograd.Function):
    """Batch normalization by statistics in full fp32. Backward: the gradient of the sum of the ranks' losses.

    With xhat = (x - mean) / sqrt(var + eps) and n values per channel (arXiv 1502.03167, section 3):
    dx = weight / sqrt(var + eps) * (dy - sum(dy) / n - xhat * sum(dy * xhat) / n).
    `total` makes the sums over all ranks of sums over this one; sums over one rank need none.
    """

    @staticmethod
    def forward(ctx, x_BCHW, weight_C, bias_C, running_mean_C, running_var_C, momentum, eps, total):
        x = x_BCHW.to(torch.promote_types(x_BCHW.dtype, torch.float32))
        count = torch.full((1,), x.numel() // x.shape[1], dtype=x.dtype, device=x.device)
        totals = total(torch.cat((x.sum((0, 2, 3)), count)))
        n = totals[-1]
        mean_C = totals[:-1] / n
        # Squares about the mean in a second sum: E[x^2] - mean^2 would cancel where the mean is large.
        centred = x - _per_channel(mean_C)
        var_C = total(centred.square().sum((0, 2, 3))) / n
        inverse_std_C = (var_C + eps).rsqrt()
        running_mean_C.lerp_(mean_C, momentum)
        running_var_C.lerp_(var_C * (n / (n - 1)), momentum)
        ctx.save_for_backward(x_BCHW, weight_C, mean_C, inverse_std_C, n)
        ctx.total = total
        return centred.mul_(_per_channel(inverse_std_C * weight_C)).add_(_per_channel(bias_C)).to(x_BCHW.dtype)

    @staticmethod
    def backward(ctx, dy_BCHW):
        x_BCHW, weight_C, mean_C, inverse_std_C, n = ctx.saved_tensors
        dy = dy_BCHW.to(mean_C.dtype)
        xhat = (x_BCHW - _per_channel(mean_C)).mul_(_per_channel(inverse_std_C))
        dbias_C, dweight_C = dy.sum((0, 2, 3)), (dy * xhat).sum((0, 2, 3))
        mean_dy_C, mean_dy_xhat_C = ctx.total(torch.stack((dbias_C, dweight_C))) / n
        dx = xhat.mul_(_per_channel(-mean_dy_xhat_C)).add_(dy).sub_(_per_channel(mean_dy_C))
        dx = dx.mul_(_per_channel(inverse_std_C * weight_C)).to(x_BCHW.dtype)
        return dx, dweight_C, dbias_C, None, None, None, None, None


def _own(tensor: Tensor) -> Tensor:
    return tensor


def _per_channel(values_C: Tensor) -> Tensor:
    return values_C[None, :, None, None]


def _sums_are_rough(x_BCHW: Tensor) -> bool:
    """Whether torch's own kernel would add up a channel in one long fp32 sum per thread: channels_last on the CPU.

    Its statistics are off by up to 1e-5, differently for every number of threads, and a ResNet-18 makes 2% of that in
    the gradient of its first layers.
    """
    on_cpu = x_BCHW.device.type == "cpu" and x_BCHW.dtype == torch.float32
    return on_cpu and not x_BCHW.is_contiguous() and x_BCHW.is_contiguous(memory_format=torch.channels_last)


def _in_backward() -> bool:
    """Whether this thread is inside a backward pass, that is, recomputing activations (as torch's checkpoint asks)."""
    return torch._C._current_graph_task_id() != -1


def convert(module: nn.Module, kind: Norm) -> None:
    """Replaces every nn.BatchNorm2d inside `module`, in place, keeping weights and statistics.

    batch: MicroBatchNorm2d; sync_batch: GlobalBatchNorm2d; frozen: FrozenBatchNorm2d; group: GroupNorm (arXiv
    1803.08494) of 32 groups, or the largest common divisor of 32 and the channels.
    """
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, _converted(child, kind))
        else:
            convert(child, kind)


def _converted(norm: nn.BatchNorm2d, kind: Norm) -> nn.Module:
    channels, eps = norm.num_features, norm.eps
    if kind == "group":
        group = nn.GroupNorm(math.gcd(32, channels), channels, eps=eps)
        group.weight, group.bias = norm.weight, norm.bias
        return group
    classes = {"batch": MicroBatchNorm2d, "sync_batch": GlobalBatchNorm2d, "frozen": FrozenBatchNorm2d}
    converted = classes[kind](channels, eps=eps, momentum=norm.momentum)
    converted.weight, converted.bias = norm.weight, norm.bias
    converted.load_state_dict(norm.state_dict())
    return converted


def _norms(module: nn.Module) -> list[MicroBatchNorm2d]:
    return [norm for norm in module.modules() if isinstance(norm, MicroBatchNorm2d)]


@contextmanager
def recording(module: nn.Module) -> Iterator[None]:
    """Within it every training forward adds to the recorded statistics: enter it once per micro-batch and step."""
    norms = _norms(module)
    for norm in norms:
        norm.recording = True
    try:
        yield
    finally:
        for norm in norms:
            norm.recording = False


@contextmanager
def not_recording(module: nn.Module) -> Iterator[None]:
    """Within it nothing is recorded: for a further pass of a micro-batch that has been recorded once."""
    norms = [norm for norm in _norms(module) if norm.recording]
    for norm in norms:
        norm.recording = False
    try:
        yield
    finally:
        for norm in norms:
            norm.recording = True


@torch.no_grad()
def update_running(module: nn.Module, all_reduce: Callable[[Tensor], Tensor], count: int) -> None:
    """Moves all running statistics by one step, to the mean over the micro-batches recorded since the last update.

    Where a mean is not finite (such a step is skipped), its running statistic stays as it is.

    Args:
        all_reduce: returns the sum of a tensor over all ranks.
        count: micro-batches of the global batch; each must have been recorded once, on one of the ranks.
    """
    norms = [norm for norm in _norms(module) if norm.training]
    if not norms:
        return
    for norm in norms:
        recorded = norm.recorded_count * world_size()
        # A synchronized norm records once per rank and call, whatever the number of micro-batches.
        assert recorded > 0 and (recorded == count or isinstance(norm, GlobalBatchNorm2d)), (recorded, count)
    recorded_sums = [norm.recorded_sum_2C.flatten() for norm in norms if norm.recorded_sum_2C is not None]
    sums = all_reduce(torch.cat(recorded_sums))
    for norm, sum_2C in zip(norms, sums.split([2 * norm.num_features for norm in norms]), strict=True):
        means_2C = (sum_2C / (norm.recorded_count * world_size())).view(2, -1)
        for running_C, mean_C in zip((norm.running_mean, norm.running_var), means_2C, strict=True):
            running_C.copy_(torch.where(mean_C.isfinite(), mean_C, running_C))
        norm.num_batches_tracked += 1
        norm.recorded_sum_2C, norm.recorded_count = None, 0

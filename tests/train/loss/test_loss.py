import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from train.config import LossConfig
from train.loss.full import contrastive_loss
from train.loss.products import three_products
from train.loss.tiled import tile_on

ROWS = ["full", "local", "tiled"]
KINDS = ["softmax", "sigmoid"]


class Batch:
    """Features, temperature, bias and ids of a random batch, with some equal images and captions."""

    def __init__(self, B, D=6, seed=0, scale=14.0, dtype=torch.float64, alike=0.5):
        generator = torch.Generator().manual_seed(seed)
        shared = torch.randn(B, D, generator=generator, dtype=torch.float64)
        image, text = (shared * alike + torch.randn(B, D, generator=generator, dtype=torch.float64) for _ in range(2))
        self.image, self.text = (F.normalize(x, dim=1).to(dtype).requires_grad_() for x in (image, text))
        self.scale = torch.tensor([scale], dtype=dtype, requires_grad=True)
        self.bias = torch.tensor([-3.0], dtype=dtype, requires_grad=True)
        self.image_ids, self.text_ids = (torch.randint(0, 2 * B, (B,), generator=generator) for _ in range(2))

    def inputs(self, kind):
        return [self.image, self.text, self.scale, *([self.bias] if kind == "sigmoid" else [])]

    def loss(self, config, start=0, stop=None, collective=False):
        return contrastive_loss(
            self.image,
            self.text,
            self.scale,
            start=start,
            stop=self.image.shape[0] if stop is None else stop,
            config=config,
            bias=self.bias if config.kind == "sigmoid" else None,
            image_ids_B=self.image_ids if config.mask_duplicates else None,
            text_ids_B=self.text_ids if config.mask_duplicates else None,
            collective=collective,
        )

    def to(self, dtype):
        other = object.__new__(Batch)
        other.__dict__.update(self.__dict__)
        for name in ("image", "text", "scale", "bias"):
            setattr(other, name, getattr(self, name).detach().to(dtype).requires_grad_())
        return other


def plain_loss(batch, config, start=0, stop=None):
    """The definition, in float64, with every matrix in full."""
    image, text, scale, bias = (x.double() for x in (batch.image, batch.text, batch.scale, batch.bias))
    B = image.shape[0]
    kept = torch.ones(B, B, dtype=torch.bool)
    if config.mask_duplicates:
        for i, j in itertools.permutations(range(B), 2):
            kept[i, j] = batch.image_ids[i] != batch.image_ids[j] and batch.text_ids[i] != batch.text_ids[j]
    smoothing = config.label_smoothing
    targets = (1 - smoothing) * torch.eye(B, dtype=torch.float64) + smoothing * kept.double() / kept.sum(
        1, keepdim=True
    )
    logits = scale * image @ text.T
    if config.kind == "sigmoid":
        costs = F.binary_cross_entropy_with_logits(logits + bias, targets, reduction="none")
        return (costs * kept).sum(1)[start:stop].mean()
    losses = 0
    for direction in (logits, logits.T):
        losses -= (targets * direction.masked_fill(~kept, -1e300).log_softmax(1)).sum(1)
    return losses[start:stop].mean() / 2


def value_and_gradients(loss, inputs):
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


@given(
    rows=st.sampled_from(ROWS),
    kind=st.sampled_from(KINDS),
    B=st.integers(1, 24),
    tile=st.integers(1, 26),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    mask=st.booleans(),
    part=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    seed=st.integers(0, 1000),
)
@settings(max_examples=300, deadline=None)
def test_value_and_gradients_are_those_of_the_definition(rows, kind, B, tile, smoothing, mask, part, seed):
    config = LossConfig(kind=kind, rows=rows, tile=tile, label_smoothing=smoothing, mask_duplicates=mask)
    batch = Batch(B, seed=seed)
    start, stop = sorted(int(p * B) for p in part)
    stop = max(stop, start + 1) if start < B else B
    start = min(start, B - 1)
    inputs = batch.inputs(kind)
    found = value_and_gradients(batch.loss(config, start, stop), inputs)
    expected = value_and_gradients(plain_loss(batch, config, start, stop), inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def relative(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("scale", [1.0, 14.0, 100.0])
@pytest.mark.parametrize("kind", KINDS)
def test_fp32_is_as_exact_tiled_as_full(kind, scale):
    exact = Batch(300, D=64, scale=scale).to(torch.float32)
    expected = value_and_gradients(plain_loss(exact, LossConfig(kind=kind)), exact.inputs(kind))
    errors = {}
    for rows in ROWS:
        config = LossConfig(kind=kind, rows=rows, tile=128)
        found = value_and_gradients(exact.loss(config), exact.inputs(kind))
        errors[rows] = [relative(a, b) for a, b in zip(found, expected, strict=True)]
    for tiled, full in zip(errors["tiled"], errors["full"], strict=True):
        assert tiled <= max(2 * full, 1e-6), errors


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("start", "stop"), [(0, 7), (2, 5)])
def test_gradcheck(kind, mask, start, stop):
    config = LossConfig(kind=kind, rows="tiled", tile=3, label_smoothing=0.1, mask_duplicates=mask)
    batch = Batch(7, D=3)

    def loss(*inputs):
        batch.image, batch.text, batch.scale = inputs[:3]
        batch.bias = inputs[3] if kind == "sigmoid" else None
        return batch.loss(config, start, stop)

    assert torch.autograd.gradcheck(loss, batch.inputs(kind))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_and_fast_matmuls_change_nothing(kind, rows):
    batch, config = Batch(40, dtype=torch.float32), LossConfig(kind=kind, rows=rows, tile=16)
    expected = value_and_gradients(batch.loss(config), batch.inputs(kind))
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = batch.loss(config)
            found = value_and_gradients(found, batch.inputs(kind))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def test_matmul_precision_that_is_set_for_a_backend_alone_is_kept():
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    batch, config = Batch(40, dtype=torch.float32), LossConfig(tile=16)
    expected = value_and_gradients(batch.loss(config), batch.inputs("softmax"))
    try:
        for backend, value in zip(backends, ("tf32", "bf16"), strict=True):
            backend.fp32_precision = value
        found = value_and_gradients(batch.loss(config), batch.inputs("softmax"))
        assert [backend.fp32_precision for backend in backends] == ["tf32", "bf16"]
    finally:
        torch.set_float32_matmul_precision("highest")
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_features_are_computed_in_fp32(kind, rows):
    batch, config = Batch(40, dtype=torch.bfloat16), LossConfig(kind=kind, rows=rows, tile=16)
    wide = batch.to(torch.float32)
    found = value_and_gradients(batch.loss(config), batch.inputs(kind))
    expected = value_and_gradients(wide.loss(config), wide.inputs(kind))
    assert found[0].dtype == torch.float32 and torch.equal(found[0], expected[0])
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert a.dtype == torch.bfloat16 and torch.equal(a, b.bfloat16())


@pytest.mark.parametrize("kind", KINDS)
def test_three_products_in_bf16_are_as_good_as_they_should_be(kind):
    B, D = 256, 64
    image, noise = torch.randn(2, B, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    features = [F.normalize(image, dim=1), F.normalize(0.3 * image + noise, dim=1)]
    found = {}
    for name, dtype in (("float64", torch.float64), ("fp32", torch.float32), ("three", torch.float32)):
        leaves = [value.to(dtype).requires_grad_() for value in features]
        scale = leaves[0].new_tensor([100.0 if kind == "softmax" else 10.0]).requires_grad_()
        bias = leaves[0].new_tensor([-10.0]) if kind == "sigmoid" else None
        with three_products(name == "three"):
            loss = contrastive_loss(*leaves, scale, bias=bias, config=LossConfig(kind=kind, tile=100), start=40)
        found[name] = [loss.detach().double(), *(g.double() for g in torch.autograd.grad(loss, [*leaves, scale]))]
    errors = {
        name: max(float((a - b).norm() / b.norm()) for a, b in zip(values, found["float64"], strict=True))
        for name, values in found.items()
    }
    assert 5 * errors["fp32"] < errors["three"] < 1e-4, errors


def far_apart(B):
    """Rows and columns whose logits differ by 200, so that powers relative to another row's maximum are 0."""
    batch = Batch(B, D=2, scale=100.0, dtype=torch.float32)
    with torch.no_grad():
        batch.image[:] = torch.tensor([[1.0, 0.0]])
        batch.text[:] = torch.tensor([[1.0, 0.0]])
        batch.image[2] *= -1
        batch.text[5] *= -1
        batch.image_ids = (torch.arange(B) - B + 3).clamp(min=0)  # in the first tiles whole rows are excluded
        batch.text_ids = torch.arange(B)
    return batch


@pytest.mark.parametrize("mask", [False, True])
def test_logits_far_apart(mask):
    batch = far_apart(8)
    for rows in ROWS:
        config = LossConfig(rows=rows, tile=2, mask_duplicates=mask)
        found = value_and_gradients(batch.loss(config), batch.inputs("softmax"))
        assert all(x.isfinite().all() for x in found)
        double = batch.to(torch.float64)
        expected = value_and_gradients(
            double.loss(LossConfig(rows="full", mask_duplicates=mask)), double.inputs("softmax")
        )
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


def test_not_a_number_stays_visible():
    for kind, rows in itertools.product(KINDS, ROWS):
        batch = Batch(9)
        with torch.no_grad():
            batch.image[4, 0] = torch.nan
        assert batch.loss(LossConfig(kind=kind, rows=rows, tile=4)).isnan()


def test_tiles_are_larger_where_there_is_no_small_cache():
    assert (tile_on("cpu", LossConfig()), tile_on("cuda", LossConfig())) == (1024, 4096)
    assert tile_on("cuda", LossConfig(tile=7)) == 7


class LargestTensor(TorchDispatchMode):
    """Notes the largest number of elements of any tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("start", "stop"), [(0, 256), (64, 192)])
def test_tiled_never_holds_the_logits(kind, mask, start, stop):
    batch = Batch(256, D=8, dtype=torch.float32)
    largest = {}
    for rows in ("local", "tiled"):
        config = LossConfig(kind=kind, rows=rows, tile=32, label_smoothing=0.1, mask_duplicates=mask)
        with LargestTensor() as mode:
            batch.loss(config, start, stop).backward()
        largest[rows] = mode.elements
    assert largest["local"] >= 256 * (stop - start)
    assert largest["tiled"] == 256 * 8  # the features; a tile has 32 * 32


# ---- several ranks -----------------------------------------------------------------------------------------------

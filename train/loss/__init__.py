"""The contrastive loss over the global batch, and its gradient for a model that sees a part of it at a time."""

from train.loss.full import contrastive_loss
from train.loss.gradients import loss_gradients
from train.loss.ids import Rows

__all__ = ["Rows", "contrastive_loss", "loss_gradients"]

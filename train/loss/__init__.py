"""The contrastive loss over the global batch."""

from train.loss.full import contrastive_loss

__all__ = ["contrastive_loss"]

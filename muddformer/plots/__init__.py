"""Pictures, made from columns of numbers alone."""

from .losses import plot_losses

__all__ = ["plot_losses"]

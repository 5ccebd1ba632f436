"""Pictures, made from columns of numbers alone."""

from .connections import plot_connection_weights, plot_history_norms, plot_similarities, plot_sinks
from .losses import plot_losses

__all__ = ["plot_connection_weights", "plot_history_norms", "plot_losses", "plot_similarities", "plot_sinks"]

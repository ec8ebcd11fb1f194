"""Few-shot steerable alignment: users, models, training and generation."""

__version__ = "0.1.0"

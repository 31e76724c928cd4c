"""Models that ``test_model_source`` builds by name in another process."""

from torch import nn


def dense() -> nn.Module:
    return nn.Linear(4, 4)

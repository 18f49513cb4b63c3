"""Two small models for the factory recipes: each takes float features [n, features], gives [n, classes]."""

from torch import Tensor, nn


def mlp(features: int, hidden: int, classes: int) -> nn.Module:
    """Two hidden layers with GELU."""
    return nn.Sequential(
        nn.Linear(features, hidden),
        nn.GELU(),
        nn.Linear(hidden, hidden),
        nn.GELU(),
        nn.Linear(hidden, classes),
    )


class ConvNet(nn.Module):
    """A one-dimensional CNN whose normalisation is the caller's choice."""

    def __init__(self, features: int, channels: int, classes: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(1, channels, 3, padding=1),
            norm(channels),
            nn.ReLU(),
            nn.Conv1d(channels, channels, 3, padding=1),
            norm(channels),
            nn.ReLU(),
        )
        self.head = nn.Linear(channels * features, classes)

    def forward(self, values: Tensor) -> Tensor:
        """Features [n, features] to logits [n, classes]."""
        return self.head(self.body(values.unsqueeze(1)).flatten(1))


def cnn(features: int, channels: int, classes: int) -> nn.Module:
    """BatchNorm after each convolution: its statistics depend on how the batch is split."""
    return ConvNet(features, channels, classes, nn.BatchNorm1d)


def cnn_groupnorm(features: int, channels: int, classes: int) -> nn.Module:
    """The same with GroupNorm, which does not depend on the batch."""
    return ConvNet(features, channels, classes, lambda width: nn.GroupNorm(4, width))  # type: ignore[arg-type]

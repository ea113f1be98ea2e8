"""Time an epoch of M4 on the CPU, side by side, on Linux: python tests/benchmark.py

usual  PIL transforms for each image, a DataLoader, `nn.Dropout`, AdamW, `.item()` at each step, on
       all cores; without worker processes for the transforms, and with two
ours   train_M4.py itself: the second of two epochs, with the threads that it chooses

Usual and ours are also timed beside a busy process, which keeps one core. Each measurement is a
process of its own that trains on a part of the images and evaluates on a sixth as many, scaled to a
whole epoch (60,000 and 10,000). Reading and straightening, once a run, do not count.

The measurements alternate. The table gives medians, and a ratio is the median of the ratios of
measurements from the same round; the speedup beside a busy process is over usual beside one. Peak
memory is that of a run with all images. Together they take some ten minutes on two idle cores;
`--images 3000 --repeats 1` gives a rough table in two or three.
"""

import argparse
import contextlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

import models
import train_M4
import utils

ALL = 60_000  # training images
BATCH_SIZE = train_M4.BATCH_SIZE
BUSY = " beside a busy process"


def usual(args, workers=0):
    from torchvision import datasets, transforms

    normalize = [transforms.ToTensor(), transforms.Normalize((utils.MEAN,), (utils.STD,))]
    affine = transforms.RandomAffine(6, (0.04, 0.04), (0.94, 1.06), shear=4)  # as in train_M4.py
    models.Dropout = nn.Dropout
    model = models.MNIST_CNN_M4()
    optimizer = torch.optim.AdamW(model.parameters())

    def batches(is_training, count, steps):
        digits = datasets.MNIST(args.data_dir, is_training, transforms.Compose(steps))
        part = Subset(digits, range(count))
        return DataLoader(part, BATCH_SIZE, shuffle=is_training, num_workers=workers)

    def train(count):
        model.train()
        for images, labels in batches(True, count, [affine, *normalize]):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            loss.item()

    def test(count):
        model.eval()
        with torch.no_grad():
            for images, labels in batches(False, count, normalize):
                (model(images).argmax(1) == labels).sum().item()

    train(1000)  # to warm up
    start = time.perf_counter()
    train(args.images)
    test(args.images // 6)
    return time.perf_counter() - start


def ours(args):
    with tempfile.TemporaryDirectory() as output:
        sys.argv = ["train_M4.py", "--device", "cpu", "--epochs", "2", "--output-dir", output]
        sys.argv += ["--data-dir", str(args.data_dir)]
        if args.images < ALL:  # what is held out is tested on: a sixth, as of the whole
            sys.argv += ["--limit", str(args.images), "--holdout", str(args.images // 6)]
        train_M4.main()
        metrics = json.loads(Path(output, "metrics.json").read_text())
    return metrics["history"][-1]["seconds"]


PIPELINES = {
    "usual": usual,
    "usual, two workers": partial(usual, workers=2),
    "ours": ours,
}
ROWS = (*PIPELINES, "usual" + BUSY, "ours" + BUSY)


def measure(row, args):
    """Print the seconds of an epoch and the peak memory in MiB, as JSON."""
    with contextlib.ExitStack() as stack:
        if row.endswith(BUSY):
            busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            stack.callback(busy.kill)
        seconds = PIPELINES[row.removesuffix(BUSY)](args) * ALL / args.images
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps([seconds, memory]))


def print_table(seconds):
    """seconds: of each row, by round."""

    def ratio(row, other):
        pairs = zip(seconds[row], seconds[other], strict=True)
        return f"{statistics.median(one / two for one, two in pairs):.2f}"

    print("| pipeline | seconds an epoch | speedup over usual | relative to idle |")
    print("|---|---|---|---|")
    for row in ROWS:
        idle = row.removesuffix(BUSY)
        speedup = ratio(row.replace(idle, "usual"), row)
        print(f"| {row} | {statistics.median(seconds[row]):.1f} | {speedup} | {ratio(row, idle)} |")


def run(row, *options):
    """Return what `measure` prints in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--row", row, *options]
    printed = subprocess.check_output(command, text=True)
    return json.loads(printed.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--images", type=int, default=10_000, help="to train on in a measurement (10000)")
    add("--repeats", type=int, default=5, help="measurements of each row (5)")
    add("--data-dir", type=Path, default="data")
    add("--row", choices=ROWS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        return measure(args.row, args)
    utils.read_idx_files(args.data_dir)
    seconds = {row: [] for row in ROWS}
    for _ in range(args.repeats):
        for row in ROWS:
            seconds[row].append(run(row)[0])
    print_table(seconds)
    epoch, memory = run("ours", "--images", str(ALL))
    print(f"\nours with all images: {epoch:.1f} seconds, {memory:.0f} MiB of memory at most")
    print(f"ours: {utils.environment(utils.set_up_device('cpu'))}")


if __name__ == "__main__":
    utils.launch(main)

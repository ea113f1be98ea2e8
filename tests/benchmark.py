"""Time an epoch of M4 on the CPU, side by side: python tests/benchmark.py (not collected by pytest).

usual  PIL transforms for each image, a DataLoader, `nn.Dropout`, AdamW, `.item()` at each step, all cores on one batch;
       without worker processes for the transforms, and with two
ours   what train_M4.py does: an epoch without the images' border and one with it, weighted as in a run
floor  forward, backward and torch's AdamW of an M4 without dropout on one ready batch of whole images, no evaluation,
       with the memory layout and settings of ours, all cores on one batch

Each measurement is a process of its own that starts with a few batches untimed and then takes a part of the images,
scaled to a whole epoch (60,000 images, and 10,000 to evaluate). They alternate, and the table gives medians.
"""

import argparse
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn
from torch.nn import functional as F

import models
import train_M4
import utils

CPU = torch.device("cpu")
WARM_UP = 8  # batches


def timed(work, *args):
    """Return the seconds that `work(*args)` takes."""
    start = time.perf_counter()
    work(*args)
    return time.perf_counter() - start


def usual(images, batch_size, data_dir, workers=0):
    from torchvision import datasets, transforms

    models.Dropout = nn.Dropout
    a = train_M4.AUGMENT
    normalize = [transforms.ToTensor(), transforms.Normalize((utils.MEAN,), (utils.STD,))]
    shift, scale = (a["shift"], a["shift"]), (1 - a["scale"], 1 + a["scale"])
    affine = transforms.RandomAffine(a["rotation"], shift, scale, a["shear"])
    model = models.MNIST_CNN_M4(train_M4.DROPOUT)
    optimizer = torch.optim.AdamW(model.parameters(), 0.001)

    def loader(train, count, steps):
        part = torch.utils.data.Subset(datasets.MNIST(str(data_dir), train, transforms.Compose(steps)), range(count))
        return torch.utils.data.DataLoader(part, batch_size, shuffle=train, num_workers=workers)

    def train(batches):
        model.train()
        total = 0
        for pixels, labels in batches:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(pixels), labels)
            loss.backward()
            optimizer.step()
            total += loss.item()

    def test(batches):
        model.eval()
        correct = 0
        with torch.no_grad():
            for pixels, labels in batches:
                correct += (model(pixels).argmax(1) == labels).sum().item()

    train(loader(True, WARM_UP * batch_size, [affine, *normalize]))
    seconds = timed(train, loader(True, images, [affine, *normalize]))
    return seconds + timed(test, loader(False, images // 6, normalize))


def ours(images, batch_size, data_dir):
    data = utils.Data(*(part[:images].to(CPU) for part in utils.read_idx_files(data_dir)))
    model = utils.build(models.MNIST_CNN_M4, 1, CPU, train_M4.DROPOUT)
    average = utils.weight_average(model, train_M4.AVERAGE_DECAY)
    optimizer = utils.Muon(model, 0.001, train_M4.MOMENTUM)
    scheduler = utils.one_cycle(optimizer, 0.001, 3 * (images // batch_size), train_M4.WARMUP)

    def train(data, border):
        parts = (model, average, data, optimizer, scheduler, batch_size, train_M4.AUGMENT)
        utils.train(*parts, border, "float32")

    train(utils.Data(*(part[: WARM_UP * batch_size] for part in data)), 0)
    small, whole = timed(train, data, train_M4.BORDER), timed(train, data, 0)
    seconds = train_M4.BORDER_EPOCHS * small + (1 - train_M4.BORDER_EPOCHS) * whole
    return seconds + timed(utils.evaluate, average, data.test_images[: images // 6], data.test_labels[: images // 6])


def floor(images, batch_size, data_dir):
    model = utils.build(models.MNIST_CNN_M4, 1, CPU, 0.0).train()
    optimizer = torch.optim.AdamW(model.parameters(), 0.001, fused=True)
    pixels, labels = torch.randn(batch_size, 1, 28, 28), torch.randint(10, (batch_size,))

    def train(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(pixels), labels).backward()
            optimizer.step()

    train(WARM_UP)
    return timed(train, images // batch_size)


PIPELINES = {"usual": usual, "usual, two workers": partial(usual, workers=2), "ours": ours, "floor": floor}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=30_000, help="training images per measurement (30000)")
    parser.add_argument("--batch-size", type=int, default=train_M4.BATCH_SIZE)
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each (5)")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--pipeline", choices=PIPELINES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.pipeline:
        print(PIPELINES[args.pipeline](args.images, args.batch_size, args.data_dir) * 60_000 / args.images)
        return
    utils.read_idx_files(args.data_dir)
    runs = {pipeline: [] for pipeline in PIPELINES}
    for _ in range(args.repeats):
        for pipeline, results in runs.items():
            command = [sys.executable, __file__, "--pipeline", pipeline, *sys.argv[1:]]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            results.append(float(done.stdout))
    medians = {pipeline: statistics.median(results) for pipeline, results in runs.items()}
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, batch {args.batch_size}\n")
    print("| pipeline | seconds per epoch | speedup over usual | time relative to floor |")
    print("|---|---|---|---|")
    for pipeline, seconds in medians.items():
        print(f"| {pipeline} | {seconds:.1f} | {medians['usual'] / seconds:.2f} | {seconds / medians['floor']:.2f} |")


if __name__ == "__main__":
    main()

"""Time an epoch of M4 three ways, side by side: python tests/benchmark.py (not collected by pytest).

usual  PIL transforms for each image, a DataLoader, stock `nn.Dropout`, `.item()` at each step, in float32
ours   what train_M4.py does: an epoch of cropped images, an epoch of whole ones, and the mean over a run's epochs
floor  forward, backward and step of torch's AdamW of an M4 without dropout on one ready-made batch of whole images, no
       evaluation, in float32, in the same memory layout and with the same memory settings as ours

Each measurement is a process of its own that starts with a few batches untimed and then takes a part of the images,
scaled to a whole epoch (60,000 images, and 10,000 to evaluate); the three alternate, and the table gives medians.
On a GPU it also trains until an epoch reaches 99.4%.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn
from torch.nn import functional as F

import models
import train_M4
import utils

TRAIN = 60_000
WARM_UP = 8  # batches, more than the three that come before the recording of a CUDA graph


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device, work, *args):
    """Return the seconds that `work(*args)` takes and its result."""
    synchronize(device)
    start = time.perf_counter()
    result = work(*args)
    synchronize(device)
    return time.perf_counter() - start, result


def usual(args):
    from torchvision import datasets, transforms

    models.Dropout = nn.Dropout
    a = train_M4.AUGMENT
    normalize = [transforms.ToTensor(), transforms.Normalize((models.MEAN,), (models.STD,))]
    shift, scale = (a["shift"], a["shift"]), (1 - a["scale"], 1 + a["scale"])
    affine = transforms.RandomAffine(a["rotation"], shift, scale, a["shear"])

    def loader(train, count, steps):
        pictures = datasets.MNIST(str(args.data_dir), train=train, transform=transforms.Compose(steps))
        part = torch.utils.data.Subset(pictures, range(count))
        return torch.utils.data.DataLoader(part, batch_size=args.batch_size, shuffle=train)

    model = models.MNIST_CNN_M4(train_M4.DROPOUT).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), 0.001)
    train_loader = loader(True, args.images, [affine, *normalize])
    test_loader = loader(False, args.images // 6, normalize)

    def train(batches):
        model.train()
        total = 0
        for images, labels in batches:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images.to(args.device)), labels.to(args.device))
            loss.backward()
            optimizer.step()
            total += loss.item()

    def test():
        model.eval()
        correct = 0
        with torch.no_grad():
            for images, labels in test_loader:
                predicted = model(images.to(args.device)).argmax(1).cpu()
                correct += (predicted == labels).sum().item()

    train(loader(True, WARM_UP * args.batch_size, [affine, *normalize]))
    return {"train": timed(args.device, train, train_loader)[0], "evaluate": timed(args.device, test)[0]}


def ours(args):
    data = utils.load_data(args)
    model, average = utils.build(models.MNIST_CNN_M4, args, 1, train_M4.DROPOUT)
    optimizer = utils.Muon(model, 0.001, train_M4.MOMENTUM)
    scheduler = utils.one_cycle(optimizer, 0.001, 3, args.images, args.batch_size, train_M4.WARMUP)

    def train(data, epoch):
        recipe = (train_M4.AUGMENT, train_M4.AVERAGE_DECAY, train_M4.CROP)
        utils.train(model, average, data, optimizer, scheduler, args, epoch, *recipe)

    def augment():
        # On the CPU two threads do it side by side: what counts is the time of one, for half of the images.
        side_by_side = 2 if args.device.type == "cpu" else 1
        torch.set_num_threads(max(1, torch.get_num_threads() // side_by_side))
        for batch in data.train_images[: args.images // side_by_side].split(args.batch_size):
            utils.augment_batch(batch / 255.0, **train_M4.AUGMENT)

    def test():
        part = args.images // 6
        utils.evaluate(average, data.test_images[:part], data.test_labels[:part])

    # A cropped epoch and a whole one: the mean is that of all the epochs of a run.
    train(utils.Data(*(tensor[: WARM_UP * args.batch_size] for tensor in data)), args.epochs)
    cropped, whole = (timed(args.device, train, data, epoch)[0] for epoch in (1, args.epochs))
    part = train_M4.CROP[1] if train_M4.CROP else 0
    return {
        "train": part * cropped + (1 - part) * whole,
        "cropped": cropped,
        "whole": whole,
        "evaluate": timed(args.device, test)[0],
        "augment": timed(args.device, augment)[0],
    }


def floor(args):
    model, _ = utils.build(models.MNIST_CNN_M4, args, 1, 0.0)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 0.001, fused=True)
    images = torch.randn(args.batch_size, 1, 28, 28, device=args.device)
    labels = torch.randint(10, (args.batch_size,), device=args.device)

    def train(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()

    train(WARM_UP)
    return {"train": timed(args.device, train, args.images // args.batch_size)[0], "evaluate": 0.0}


def peak_memory(device):
    """Return the process's peak memory in MB: on the GPU for a GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


def measure(pipeline, options):
    command = [sys.executable, __file__, "--pipeline", pipeline, *options]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def seconds_to_target(args):
    """Return the training seconds until an epoch of the recipe first reaches 99.4%, or None."""
    data = utils.load_data(args)
    model, average = utils.build(models.MNIST_CNN_M4, args, 1, train_M4.DROPOUT)
    optimizer = utils.Muon(model, train_M4.MAX_LR, train_M4.MOMENTUM)
    cycle = (args.epochs, len(data.train_labels), args.batch_size, train_M4.WARMUP)
    scheduler = utils.one_cycle(optimizer, train_M4.MAX_LR, *cycle)
    start = time.perf_counter()
    for epoch in range(1, args.epochs + 1):
        recipe = (train_M4.AUGMENT, train_M4.AVERAGE_DECAY, train_M4.CROP)
        utils.train(model, average, data, optimizer, scheduler, args, epoch, *recipe)
        if utils.evaluate(average, data.test_images, data.test_labels)[1] >= 99.4:
            return time.perf_counter() - start
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=30_000, help="training images per measurement (30000)")
    parser.add_argument("--batch-size", type=int, default=train_M4.BATCH_SIZE)
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each (5)")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--device", type=utils.device, default="auto")
    parser.add_argument("--precision", default="auto", help="of ours: auto, float32 or bfloat16 (auto)")
    parser.add_argument("--pipeline", choices=("usual", "ours", "floor"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    args = SimpleNamespace(**vars(options), read_only_data=False, holdout=0, limit=options.images)
    args.epochs, args.max_lr, args.cuda_graph = 15, train_M4.MAX_LR, True
    try:
        args.precision = utils.precision(args.precision, args.device)
    except argparse.ArgumentTypeError as error:
        parser.error(f"argument --precision: {error}")
    if args.pipeline:
        seconds = {"usual": usual, "ours": ours, "floor": floor}[args.pipeline](args)
        print(json.dumps({**seconds, "memory": peak_memory(args.device)}))
        return
    utils.load_data(args)
    runs = {"usual": [], "ours": [], "floor": []}
    for _ in range(args.repeats):
        for pipeline, results in runs.items():
            results.append(measure(pipeline, sys.argv[1:]))
    scale = TRAIN / args.images
    median = {
        pipeline: {key: statistics.median(r[key] for r in results) for key in results[0]}
        for pipeline, results in runs.items()
    }
    run = median["ours"]
    side, part = train_M4.CROP or (28, 0)
    rows = {
        "usual": median["usual"],
        f"ours, {args.precision}, mean of a run's epochs": run,
        f"- the first {part:.0%}: {side}x{side} pixels": run | {"train": run["cropped"]},
        "- the others: whole images": run | {"train": run["whole"]},
        "floor": median["floor"],
    }
    seconds = [scale * (row["train"] + row["evaluate"]) for row in rows.values()]
    name = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else "CPU"
    threads = f"{torch.get_num_threads()} threads"
    print(f"{name}, {threads}, torch {torch.__version__}, batch {args.batch_size}\n")
    columns = ("pipeline", "seconds an epoch", "images a second", "times as fast as usual", "times the floor")
    print("| " + " | ".join((*columns, "peak memory, MB")) + " |\n|" + "---|" * (len(columns) + 1))
    for (pipeline, row), t in zip(rows.items(), seconds, strict=True):
        ratios = f"{seconds[0] / t:.2f} | {t / seconds[-1]:.2f}"
        print(f"| {pipeline} | {t:.1f} | {TRAIN / t:,.0f} | {ratios} | {row['memory']:.0f} |")
    if args.device.type == "cuda":
        args.limit = None
        t = seconds_to_target(args)
        print("\n99.4% was not reached." if t is None else f"\n{t:.1f} s to the first epoch at 99.4%.")
    else:  # a part of a graph cannot be timed by itself
        shares = (run["augment"], run["train"] - run["augment"], run["evaluate"])
        shares = (f"{t / (run['train'] + run['evaluate']):.0%}" for t in shares)
        print("\nOf our epoch augmentation takes {}, the rest of training {}, evaluation {}.".format(*shares))


if __name__ == "__main__":
    main()

"""Draw the README's pictures and print its tables from finished runs: python tests/figures.py

reads   runs/Mx/seed-S/metrics.json and model.pt of `python train_Mx.py --seeds 1 2 3 4 5`, and the runs of
        tests/ablation.py below runs/ablation
writes  images/ladder.png, images/augmentation.png, images/ablation.png
prints  Markdown tables: results over the seeds, the ablation, receptive fields; how many of M4's errors the seeds
        share, and how many test images it reads right as pictures of their own
"""

import argparse
import io
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from PIL import Image, ImageOps
from torch import nn

import models
import train_M4
import utils

NETWORKS = {name: getattr(models, f"MNIST_CNN_{name}") for name in ("M1", "M2", "M3", "M4")}
EARLIER_RUN = {"M1": 98.95, "M2": 98.72, "M3": 99.27, "M4": 99.53}  # best test accuracies, one run each
# Okabe and Ito's palette.
COLORS = {"M1": "#E69F00", "M2": "#009E73", "M3": "#CC79A7", "M4": "#0072B2"}


def read_metrics(directory):
    """Return the content of every metrics.json one level below `directory`, by seed."""
    runs = [json.loads(path.read_text()) for path in directory.glob("seed-*/metrics.json")]
    if any(run["config"] != runs[0]["config"] for run in runs):
        sys.exit(f"error: the runs in {directory} were made with different settings")
    return sorted(runs, key=lambda run: run["seed"])


def spread(values):
    """Return mean, standard deviation and minimum of `values` as text for a table."""
    values = torch.tensor(values, dtype=torch.double)
    return f"{values.mean():.3f} ± {values.std():.3f} | {values.min():.2f}"


def receptive_fields(model):
    """Return a row for each convolution and pooling of `model`, in order: layer, kernel, stride, channels, side
    of the feature map, receptive field and distance between neighbouring receptive fields (jump), in pixels.

    Source: Araujo et al., 2019, https://distill.pub/2019/computing-receptive-fields/
    """
    rows, field, jump = [], 1, 1

    def row(layer, inputs, output):
        nonlocal field, jump
        if isinstance(layer, nn.AdaptiveAvgPool2d):
            kernel = stride = inputs[0].shape[-1]
        else:
            kernel, stride = (n if isinstance(n, int) else n[0] for n in (layer.kernel_size, layer.stride))
        field += (kernel - 1) * jump
        jump *= stride
        rows.append((names[layer], kernel, stride, output.shape[1], output.shape[-1], field, jump))

    names = {layer: name for name, layer in model.named_modules()}
    kinds = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
    hooks = [layer.register_forward_hook(row) for layer in names if isinstance(layer, kinds)]
    with torch.inference_mode():
        model.eval()(torch.zeros(1, 1, 28, 28))
    for hook in hooks:
        hook.remove()
    return rows


def print_receptive_fields():
    for name, network in NETWORKS.items():
        print(f"\n{name}\n\n| layer | kernel | stride | channels | map | receptive field | jump |")
        print("|---|---|---|---|---|---|---|")
        for layer, *numbers in receptive_fields(network()):
            print(f"| {layer} | " + " | ".join(map(str, numbers)) + " |")


def print_results(runs):
    columns = ("model", "parameters", "final, mean ± std", "lowest final", "lowest of all last-five epochs")
    columns += ("best epoch", "training accuracy", "time, s", "one earlier run")
    print("\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for name, results in runs.items():
        summaries = [run["summary"] for run in results]
        final = spread([s["final_test_acc"] for s in summaries])
        low, best = min(s["last5_min"] for s in summaries), max(s["best_test_acc"] for s in summaries)
        train = sum(run["history"][-1]["train_acc"] for run in results) / len(results)
        seconds = torch.tensor([s["train_seconds"] for s in summaries]).median()
        print(
            f"| {name} | {results[0]['parameters']:,} | {final} | {low:.2f} | {best:.2f} | {train:.2f} "
            f"| {seconds:.0f} | {EARLIER_RUN[name]} |"
        )
    for name, results in runs.items():
        print(
            f"\n{name}\n\n| seed | final | best | last-five minimum | last-five mean |\n|---|---|---|---|---|"
        )
        for run in results:
            keys = ("final_test_acc", "best_test_acc", "last5_min")
            scores = " | ".join(f"{run['summary'][key]:.2f}" for key in keys)
            print(f"| {run['seed']} | {scores} | {run['summary']['last5_mean']:.3f} |")


def draw_ladder(path, runs):
    """Draw test accuracy by epoch, mean and range over the seeds, beside the final accuracy by parameters."""
    fig = utils.figure(10, 4.4)
    left, right = fig.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for name, results in runs.items():
        scores = torch.tensor([[epoch["test_acc"] for epoch in run["history"]] for run in results])
        epochs, color = range(1, scores.shape[1] + 1), COLORS[name]
        utils.plot_mean_and_range(left, epochs, scores, color, label=name, marker="o", markersize=3)
        final, parameters = scores[:, -1], results[0]["parameters"]
        bars = [[final.mean() - final.min()], [final.max() - final.mean()]]
        right.errorbar(parameters, final.mean(), bars, color=color, marker="o", capsize=4)
        # M3 and M4 stand so close that one name goes to the right and one to the left.
        beside = (-26, -4) if name == "M4" else (9, -4)
        right.annotate(name, (parameters, final.mean()), beside, textcoords="offset points", color=color)
    for axes in (left, right):
        axes.axhline(99.4, color="black", linestyle="--", linewidth=1, label="target, 99.4%")
        axes.grid(alpha=0.3)
    left.set(xlabel="epoch", ylabel="test accuracy (%)", ylim=(97.5, 99.8), title="by epoch")
    right.set(xlabel="parameters", xlim=(3500, 8500), title="last epoch")
    fig.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    utils.write_whole(path, fig.savefig)


def draw_augmentation(path, images):
    """Draw five training digits, each followed by nine augmented draws at M4's strength."""
    torch.manual_seed(1)
    rows = [images[:5] / 255.0] + [
        utils.augment_batch(images[:5] / 255.0, **train_M4.AUGMENT) for _ in range(9)
    ]
    captions = ["original", *[""] * 9] * 5
    digits = torch.stack(rows, 1).flatten(0, 1) * 255
    utils.plot_digits(path, "Five training digits and nine draws of each", digits, captions)


def draw_ablation(path, rows):
    """Draw the final holdout accuracy of each seed, and their mean, for each row of the ablation."""
    fig = utils.figure(8, 0.5 * len(rows) + 1.4)
    axes = fig.subplots()
    for place, results in enumerate(rows.values()):
        final = torch.tensor([run["summary"]["final_test_acc"] for run in results])
        axes.plot(final.tolist(), [place] * len(final), "o", color=utils.BLUE, alpha=0.5, label="one seed")
        axes.plot(
            final.mean(), place, "|", color=utils.ORANGE, markersize=22, markeredgewidth=3, label="mean"
        )
    axes.set(
        yticks=range(len(rows)), yticklabels=rows, xlabel="final accuracy on the 10,000 held-out images (%)"
    )
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    axes.margins(y=0.15)
    fig.legend(handles=axes.get_lines()[:2], loc="outside lower center", ncols=2)
    utils.write_whole(path, fig.savefig)


def print_ablation(rows):
    print("\n| M4 | final, mean ± std | lowest final | last-five minimum | final loss, mean | highest |")
    print("|---|---|---|---|---|---|")
    for name, results in rows.items():
        final = spread([run["summary"]["final_test_acc"] for run in results])
        low = min(run["summary"]["last5_min"] for run in results)
        losses = [run["history"][-1]["test_loss"] for run in results]
        print(f"| {name} | {final} | {low:.2f} | {sum(losses) / len(losses):.4f} | {max(losses):.4f} |")


def print_shared_errors(directory, images, labels):
    """Print how many test images one, several or all of the seeds of M4 get wrong."""
    wrong = []
    for path in sorted(directory.glob("seed-*/model.pt")):
        model = models.load_model(models.MNIST_CNN_M4, path)
        wrong.append(utils.evaluate(model, images, labels)[2].argmax(1) != labels)
    by_count = torch.stack(wrong).sum(0).bincount(minlength=len(wrong) + 1).tolist()
    print(f"\nTest images that n of the {len(wrong)} M4 get wrong: ", end="")
    print(", ".join(f"{count} by {n}" for n, count in enumerate(by_count) if n))


def print_pasted(path, images, labels):
    """Print how many of the test images a model still reads right when each is a picture of its own: scaled to 28
    to 200 pixels, anywhere on a page of up to three times its size, half of them dark on light.
    """
    model, chance, digits = models.load_model(models.MNIST_CNN_M4, path), random.Random(0), []
    for image in images[:, 0]:
        side = chance.randint(28, 200)
        digit = Image.fromarray(image.numpy()).resize((side, side), Image.Resampling.BICUBIC)
        width, height = chance.randint(side, 3 * side), chance.randint(side, 3 * side)
        page = Image.new("L", (width, height))
        page.paste(digit, (chance.randint(0, width - side), chance.randint(0, height - side)))
        if chance.random() < 0.5:
            page = ImageOps.invert(page)
        file = io.BytesIO()
        page.save(file, "png")
        file.seek(0)
        digits.append(models.prepare_digit(file))
    read = torch.tensor([digit for digit, _, _ in models.predict(model, torch.cat(digits))])
    print(f"\nTest images read right as pictures of their own: {100 * (read == labels).double().mean():.2f}%")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--images-dir", type=Path, default=Path("images"))
    args = parser.parse_args()
    train_images, _, test_images, test_labels = utils.read_idx_files(args.data_dir)
    draw_augmentation(args.images_dir / "augmentation.png", train_images)
    print_receptive_fields()
    runs = {name: read_metrics(args.runs / name) for name in NETWORKS}
    if all(runs.values()):
        print_results(runs)
        draw_ladder(args.images_dir / "ladder.png", runs)
        print_shared_errors(args.runs / "M4", test_images, test_labels)
        print_pasted(args.runs / "M4" / "seed-1" / "model.pt", test_images, test_labels)
    else:
        print(f"\nNot all of the four models have finished runs in {args.runs}: no results, no ladder")
    rows = {
        path.name[2:].replace("-", " "): read_metrics(path) for path in sorted(args.runs.glob("ablation/*"))
    }
    rows = {name: results for name, results in rows.items() if len(results) > 1}
    if rows:
        print_ablation(rows)
        draw_ablation(args.images_dir / "ablation.png", rows)


if __name__ == "__main__":
    main()

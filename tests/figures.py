"""Print the README's tables and draw its pictures from finished runs: python tests/figures.py

reads   runs/Mx/seed-S/metrics.json of `python train_Mx.py --seeds 1 2 3 4 5`, and the runs of tests/ablation.py below
        runs/ablation
writes  images/ladder.png, images/augmentation.png, images/ablation.png
prints  Markdown tables of results and ablation
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import models
import train_M4
import utils

NETWORKS = {name: getattr(models, f"MNIST_CNN_{name}") for name in ("M1", "M2", "M3", "M4")}
EXERCISE = {"M1": 98.95, "M2": 98.72, "M3": 99.27, "M4": 99.53}  # best epochs of one run each
# Okabe and Ito's palette.
COLORS = {"M1": "#E69F00", "M2": "#009E73", "M3": "#CC79A7", "M4": "#0072B2"}


def read_metrics(directory):
    """Return the content of every metrics.json one level below `directory`, by seed."""
    runs = [json.loads(path.read_text()) for path in directory.glob("seed-*/metrics.json")]
    if len({json.dumps(run["config"] | {"seed": 0}) for run in runs}) > 1:
        raise utils.UserError(f"the runs in {directory} were made with different settings")
    return sorted(runs, key=lambda run: run["seed"])


def row(*cells):
    print(f"| {' | '.join(map(str, cells))} |")


def header(*cells):
    print()
    row(*cells)
    row(*["---"] * len(cells))


def spread(values):
    """Return mean and standard deviation of `values` as text for a table."""
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def print_results(runs):
    columns = ("model", "parameters", "final: mean ± std", "lowest final", "lowest of all last-five epochs", "time")
    header(*columns, "exercise, best epoch")
    for name, results in runs.items():
        summaries = [run["summary"] for run in results]
        final = [s["final_test_acc"] for s in summaries]
        lowest = f"{min(s['last5_min'] for s in summaries):.2f}"
        seconds = f"{statistics.median(s['train_seconds'] for s in summaries):.0f} s"
        row(name, f"{results[0]['parameters']:,}", spread(final), f"{min(final):.2f}", lowest, seconds, EXERCISE[name])


def draw_ladder(runs):
    """Return a figure of test accuracy by epoch beside the final accuracy by parameters: means and ranges."""
    figure = utils.new_figure(10, 4.4)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
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
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def draw_augmentation(images):
    """Return a figure of five training digits, each followed by nine augmented draws at M4's strength."""
    torch.manual_seed(1)
    draws = [utils.augment_batch(images[:5] / 255, **train_M4.AUGMENT) for _ in range(9)]
    digits = torch.stack([images[:5] / 255, *draws], 1).flatten(0, 1) * 255
    return utils.plot_digits("Five training digits and nine draws of each", digits, ["original", *[""] * 9] * 5)


def draw_ablation(rows):
    """Return a figure of the final holdout accuracy of each seed, and their mean, for each row of the ablation."""
    figure = utils.new_figure(8, 0.5 * len(rows) + 1.4)
    axes = figure.subplots()
    for place, results in enumerate(rows.values()):
        final = [run["summary"]["final_test_acc"] for run in results]
        axes.plot(final, [place] * len(final), "o", color=utils.BLUE, alpha=0.5, label="one seed")
        mean = {"color": utils.ORANGE, "markersize": 22, "markeredgewidth": 3, "label": "mean"}
        axes.plot(statistics.mean(final), place, "|", **mean)
    axes.set(yticks=range(len(rows)), yticklabels=rows, xlabel="final accuracy on the 10,000 held-out images (%)")
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    axes.margins(y=0.15)
    figure.legend(handles=axes.get_lines()[:2], loc="outside lower center", ncols=2)
    return figure


def print_ablation(rows):
    header("M4", "final: mean ± std", "lowest of all last-five epochs", "final loss")
    for name, results in rows.items():
        final = [run["summary"]["final_test_acc"] for run in results]
        low = min(run["summary"]["last5_min"] for run in results)
        loss = statistics.mean(run["history"][-1]["test_loss"] for run in results)
        row(name, spread(final), f"{low:.2f}", f"{loss:.4f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--images-dir", type=Path, default=Path("images"))
    args = parser.parse_args()
    runs = {name: read_metrics(args.runs / name) for name in NETWORKS}
    missing = [name for name, results in runs.items() if len(results) < 2]
    if missing:
        commands = ", ".join(f"python train_{name}.py --seeds 1 2 3 4 5" for name in missing)
        raise utils.UserError(f"{args.runs} needs two seeds or more of {', '.join(missing)}: {commands}")
    train_images = utils.read_idx_files(args.data_dir)[0]
    print_results(runs)
    utils.save_picture(args.images_dir / "ladder.png", draw_ladder, runs)
    utils.save_picture(args.images_dir / "augmentation.png", draw_augmentation, train_images)
    rows = {path.name[2:].replace("-", " "): read_metrics(path) for path in sorted(args.runs.glob("ablation/*"))}
    rows = {name: results for name, results in rows.items() if len(results) > 1}
    if rows:
        print_ablation(rows)
        utils.save_picture(args.images_dir / "ablation.png", draw_ablation, rows)


if __name__ == "__main__":
    utils.run(main)

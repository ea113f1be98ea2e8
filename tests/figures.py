"""Print the README's tables and draw its pictures from tests/results.csv: python tests/figures.py

With `--runs runs` the file is first made anew from the finished runs in runs/M1/seed-1 and so on, and from those of
tests/ablation.py in runs/ablation. With `--digits runs/M4/model.pt` M4 also reads pictures made of MNIST's test images.
"""

import argparse
import csv
import io
import json
import platform
import random
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from ablation import LENGTHS, NETWORKS, PARTS, ROWS, WHOLE, directory
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

import models
import train_M4
import utils

RESULTS = Path(__file__).with_name("results.csv")
COLUMNS = ("run", "seed", "epoch", "lr", "train_loss", "train_acc", "test_loss", "test_acc", "seconds")
LADDER = ("M1", "M2", "M3", "M4")
GROUPS = {"one part changed": PARTS, "network": (*NETWORKS, WHOLE), "epochs": (*LENGTHS, WHOLE)}
KINDS = ("28x28", "own page", "sheet on a desk", "cut to its ink", "at one border", "small", "two digits", "no digit")
EXERCISE = {"M1": 98.95, "M2": 98.72, "M3": 99.27, "M4": 99.53}  # best epochs of one run each
# Okabe and Ito's palette.
COLORS = {"M1": "#E69F00", "M2": "#009E73", "M3": "#CC79A7", "M4": "#0072B2"}


def write_results(runs, path):
    """Write every epoch of the finished runs below `runs` to the CSV file `path`, under the versions they ran with."""
    lines, environments, parts = [",".join(COLUMNS)], set(), set()
    for run in (*LADDER, *ROWS):
        place = runs / run if run in LADDER else runs / "ablation" / directory(run)
        records = [json.loads(file.read_text()) for file in place.glob("seed-*/metrics.json")]
        if len({json.dumps(record["config"] | {"seed": 0}) for record in records}) > 1:
            raise utils.UserError(f"the runs in {place} were made with different settings")
        images = {(record["config"]["holdout"], record["config"]["limit"]) for record in records}
        if run in ROWS:
            parts |= images
        elif any(map(any, images)):
            raise utils.UserError(f"the runs in {place} were made with --holdout or --limit, not with all of MNIST")
        if len(parts) > 1:
            raise utils.UserError(f"the runs in {place} have another --holdout or --limit than the rows before")
        for record in sorted(records, key=lambda record: record["seed"]):
            environments.add(" ".join(f"{key}={value}" for key, value in record["environment"].items()))
            for epoch in record["history"]:
                cells = run, record["seed"], *(epoch[column] for column in COLUMNS[2:])
                lines.append(",".join(f"{cell:.6g}" if isinstance(cell, float) else str(cell) for cell in cells))
    if len(lines) == 1:
        raise utils.UserError(f"no finished run in {runs}/M1/seed-1 and so on: python train_M1.py --seeds 1 2 3 4 5")
    cpuinfo = Path("/proc/cpuinfo")
    processor = re.search("model name.*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    notes = [f"# {environment}" for environment in sorted(environments)]
    notes.append(f"# written on a machine with {processor[1] if processor else platform.processor()}")
    others = "".join(f", of {held:,} held-out ones for the others" for held, _ in parts)
    notes.append(f"# test_loss, test_acc: of the test images for M1 to M4{others}")
    utils.write_file(path, lambda file: file.write("\n".join([*notes, *lines, ""]).encode()))


def read_results(path):
    """Return run -> seed -> list of epochs, each a dictionary of numbers."""
    runs = {}
    for cells in csv.DictReader(line for line in path.read_text().splitlines() if line[0] != "#"):
        history = runs.setdefault(cells.pop("run"), {}).setdefault(int(cells.pop("seed")), [])
        history.append({key: float(value) for key, value in cells.items()})
    return runs


def last(histories, key="test_acc"):
    return torch.tensor([history[-1][key] for history in histories.values()])


def lowest(histories):
    """Return the lowest test accuracy in the last five epochs of any seed, as text."""
    return f"{min(epoch['test_acc'] for history in histories.values() for epoch in history[-5:]):.2f}"


def mean_and_error(values, form, count=1):
    """Return the mean of `values` and, if there are several, their standard deviation by the root of `count` as text."""
    error = f" ± {values.std() / count**0.5:{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{values.mean():{form}}{error}"


def parameters(name):
    return sum(p.numel() for p in getattr(models, f"MNIST_CNN_{name}")().parameters())


def print_table(*rows):
    print()
    for cells in (rows[0], ["---"] * len(rows[0]), *rows[1:]):
        print(f"| {' | '.join(cells)} |")


def print_ladder(runs):
    rows = [("model", "parameters", "seeds", "final: mean ± std", "lowest final", "lowest of all last-five epochs")]
    rows[0] += ("minutes", "exercise, best epoch")
    for name in (name for name in LADDER if name in runs):
        scores = last(runs[name])
        minutes = statistics.median(sum(epoch["seconds"] for epoch in run) for run in runs[name].values()) / 60
        cells = (name, f"{parameters(name):,}", str(len(scores)), mean_and_error(scores, ".3f"), f"{scores.min():.2f}")
        rows.append((*cells, lowest(runs[name]), f"{minutes:.1f}", f"{EXERCISE[name]:.2f}"))
    print_table(*rows)


def differences(runs, row, key="test_acc"):
    """Return the final figures of `row` less those of the whole recipe, for each seed that both have."""
    seeds = sorted(runs[row].keys() & runs[WHOLE].keys())
    part, whole = ({seed: runs[name][seed] for seed in seeds} for name in (row, WHOLE))
    return last(part, key) - last(whole, key)


def print_ablation(runs):
    """Print means of the whole recipe and, of each other row, mean differences from it and their standard errors."""
    for title, rows in GROUPS.items():
        table = [(title, "seeds", "accuracy", "loss")]
        for row in (row for row in rows if row in runs):
            cells = [label(row, title), str(len(differences(runs, row)))]
            for key, digits in (("test_acc", 2), ("test_loss", 4)):
                change = differences(runs, row, key)
                text = mean_and_error(change, f"+.{digits}f", len(change))
                cells.append(f"{last(runs[WHOLE], key).mean():.{digits}f}" if row == WHOLE else text)
            table.append(cells)
        print_table(*(table if title == "one part changed" else zip(*table, strict=True)))


def label(row, title):
    """Return how a row is called in the table or panel `title`."""
    whole = {"one part changed": WHOLE, "network": "M4", "epochs": "15"}[title]
    return whole if row == WHOLE else row.partition(" with M4")[0].removesuffix(" epochs")


def draw_ladder(runs):
    """Return a figure of test accuracy by epoch beside the final accuracy by parameters: means and ranges."""
    figure = utils.new_figure(10, 4.4)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for name in (name for name in LADDER if name in runs):
        scores = torch.tensor([[epoch["test_acc"] for epoch in history] for history in runs[name].values()])
        epochs, color = range(1, scores.shape[1] + 1), COLORS[name]
        utils.plot_mean_and_range(left, epochs, scores, color, label=name, marker="o", markersize=3)
        final, count = scores[:, -1], parameters(name)
        bars = [[final.mean() - final.min()], [final.max() - final.mean()]]
        right.errorbar(count, final.mean(), bars, color=color, marker="o", capsize=4)
        # M3 and M4 stand so close that one name goes to the right and one to the left.
        beside = (-26, -4) if name == "M4" else (9, -4)
        right.annotate(name, (count, final.mean()), beside, textcoords="offset points", color=color)
    for axes in (left, right):
        axes.axhline(99.4, color="black", linestyle="--", linewidth=1, label="target, 99.4%")
        axes.grid(alpha=0.3)
    left.set(
        xlabel="epoch", ylabel="test accuracy (%)", ylim=(97.5, 99.8), title="by epoch: mean and range of the seeds"
    )
    right.set(xlabel="parameters", xlim=(3500, 8500), title="last epoch: mean and range")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def draw_ablation(runs):
    """Return a figure of the differences in final accuracy, seed by seed, and their means, a panel for each table."""
    figure = utils.new_figure(10, 4.2)
    panels = figure.subplots(1, 3, sharex=True, width_ratios=(3, 2, 2))
    for axes, (title, rows) in zip(panels, GROUPS.items(), strict=True):
        rows = [row for row in rows if row in runs and row != WHOLE]
        for place, row in enumerate(rows):
            change = differences(runs, row)
            axes.plot(change, [place] * len(change), "o", color=utils.BLUE, alpha=0.5, label="one seed")
            mean = {"color": utils.ORANGE, "markersize": 18, "markeredgewidth": 3, "label": "mean"}
            axes.plot(change.mean(), place, "|", **mean)
        names = [label(row, title) for row in rows]
        axes.set(yticks=range(len(rows)), yticklabels=names, title=title, xlabel="change in accuracy (points)")
        axes.axvline(0, color="black", linestyle="--", linewidth=1)
        axes.locator_params("x", nbins=4)
        axes.invert_yaxis()
        axes.grid(alpha=0.3)
        axes.margins(y=0.15)
    figure.legend(handles=axes.get_lines()[:2], loc="outside lower center", ncols=2)
    return figure


def draw_augmentation(images):
    """Return a figure of five training digits, straightened, and of eight augmented draws of each at M4's strength."""
    torch.manual_seed(1)
    upright = utils.straighten(images[:5])
    draws = [255 * utils.augment_batch(upright / 255, **train_M4.AUGMENT) for _ in range(8)]
    digits = torch.stack([images[:5], upright, *draws], 1).flatten(0, 1)
    captions = ["original", "straightened", *[""] * 8] * 5
    return utils.plot_digits("Five training digits, straightened, and eight draws of each", digits, captions)


def ink(digit, side):
    """Return a digit cut to its ink, the longer side `side` pixels."""
    digit = digit.crop(digit.getbbox())
    return digit.resize([max(1, round(side * length / max(digit.size))) for length in digit.size])


def put(digit, size, chance, paper=0, pen=255):
    """Return a page with the digit somewhere on it."""
    page = Image.new("L", size, paper)
    page.paste(pen, [chance.randint(0, whole - part) for whole, part in zip(size, digit.size, strict=True)], digit)
    return page


def draw_picture(kind, digit, other, chance):
    """Return a picture of one of the KINDS."""
    side, width, height = (chance.randint(*limits) for limits in ((30, 200), (200, 400), (200, 400)))
    mark, page, pen_width = ink(digit, side), Image.new("L", (width, height)), chance.randint(2, 20)
    if kind == "28x28":
        return digit
    if kind == "own page":
        return put(digit.resize((side, side)), [side + width, side + height], chance)
    if kind == "cut to its ink":
        return mark
    if kind == "at one border":
        margins = [0, *(chance.randint(side // 5, side) for _ in range(3))]
        return ImageOps.expand(mark, tuple(chance.sample(margins, 4)))
    if kind == "small":  # a twentieth to a fifth of the longer side
        small = ink(digit, chance.randint(24, 60))
        page = put(small, [max(small.size) * chance.randint(4, 18) for _ in range(2)], chance)
        return ImageOps.expand(page, max(small.size) // 2)
    if kind == "two digits":
        two = ink(other, round(side * chance.uniform(0.8, 1.2)))
        both = Image.new("L", (mark.width + two.width + chance.randint(side // 10, side), 2 * side))
        both.paste(mark)
        both.paste(two, (both.width - two.width, chance.randint(0, side // 4)))
        return ImageOps.expand(both, side // 2)
    if kind == "sheet on a desk":  # or with a frame, or below a dark bar
        paper, desk = chance.randint(150, 220), chance.choice([chance.randint(0, 100), 255])
        page = put(ink(digit, chance.randint(60, 130)), (width, height), chance, paper, chance.randint(0, 80))
        page, margins = ImageOps.expand(page, 60, paper), [chance.randint(20, 90) for _ in range(4)]
        if chance.random() < 0.3:
            page = page.rotate(chance.uniform(-8, 8), Image.Resampling.BICUBIC, expand=True, fillcolor=desk)
        else:
            seen = [margin * (chance.random() < 0.5) for margin in margins]
            margins = chance.choice([seen, seen, (0, 30, 0, 0), (2,) * 4, (20,) * 4])
        return ImageOps.expand(page, tuple(margins), desk)
    # No digit: a frame, a disc, a block, stripes, noise or an empty page.
    number, edge, pen = chance.randint(0, 5), chance.uniform(0.05, 0.3), ImageDraw.Draw(page)
    box = (edge * width, edge * height, (1 - edge) * width, (1 - edge) * height)
    if number < 3:
        (pen.ellipse if number == 1 else pen.rectangle)(box, 255 if number else None, 255, pen_width)
    for x in range(0, width if number == 3 else 0, 2 * pen_width):
        pen.rectangle((x, 0, x + pen_width, height), 255)
    grain = Image.frombytes("L", page.size, chance.randbytes(width * height))
    return Image.blend(page, grain, 0.5 if number == 4 else 0.03)


def print_digits(path, test_images, labels, count):
    """Print how the M4 in `path` reads pictures made of the first `count` test images."""
    model = models.MNIST_CNN_M4().eval()
    rows = [(f"pictures, {count:,} each", "right", "refused", "wrong, over 90% sure")]
    try:
        model.load_state_dict(utils.load_file(path))
    except (RuntimeError, TypeError, AttributeError):
        raise utils.UserError(f"{path} does not hold the weights of an M4") from None
    digits = [Image.fromarray(image[0].numpy()) for image in test_images[:count]]
    for kind in KINDS:
        right = refused = sure = 0
        for number, digit in enumerate(tqdm(digits, kind, leave=False, disable=None)):
            chance, file = random.Random(number), io.BytesIO()
            page = draw_picture(kind, digit, digits[number - 1], chance)
            (page if chance.random() < 0.5 else ImageOps.invert(page)).save(file, "png")
            try:
                prepared = utils.prepare_digit(file)
            except ValueError:
                refused += 1
                continue
            confidence, answer = model(utils.normalize(prepared / 255)).softmax(1)[0].max(0)
            correct = int(answer == labels[number] and kind not in KINDS[-2:])
            right, sure = right + correct, sure + int(not correct and confidence > 0.9)
        rows.append((kind, *(f"{100 * number / len(digits):.2f}%" for number in (right, refused, sure))))
    print_table(*zip(*rows, strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=Path, help="make results.csv from the runs in this directory first")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="for augmentation.png")
    parser.add_argument("--images-dir", type=Path, default=Path("images"))
    parser.add_argument("--digits", type=Path, metavar="MODEL", help="the weights of an M4, to read digits with")
    parser.add_argument("--count", type=int, default=1000, help="of test images for --digits; default: 1000 (20 min)")
    args = parser.parse_args()
    if args.count < 1:
        parser.error("--count must be at least 1")
    if args.runs:
        write_results(args.runs, args.results)
    runs = read_results(args.results)
    print_ladder(runs)
    utils.save_picture(args.images_dir / "ladder.png", draw_ladder, runs)
    if WHOLE in runs:
        print_ablation(runs)
        utils.save_picture(args.images_dir / "ablation.png", draw_ablation, runs)
    if args.data_dir.exists() or args.digits:
        train_images, _, test_images, test_labels = utils.read_idx_files(args.data_dir)
        utils.save_picture(args.images_dir / "augmentation.png", draw_augmentation, train_images)
        if args.digits:
            print_digits(args.digits, test_images, test_labels, args.count)


if __name__ == "__main__":
    utils.run(main)

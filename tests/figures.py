"""`python tests/figures.py` makes the README's tables and pictures from tests/results.csv.

With `--runs runs` the file is first made anew from the finished runs in runs/M1/seed-1 and so on,
and from those of tests/ablation.py in runs/ablation. With `--digits tests/M4.pt`, or the model of a
run, that M4 reads pictures made of MNIST's test images instead.
"""

import argparse
import csv
import functools
import io
import json
import multiprocessing
import platform
import random
import re
from pathlib import Path

import torch
from ablation import FEWER, PARTS, PLAIN, ROWS, WHOLE, directory  # and the path of the rest
from PIL import Image, ImageDraw, ImageFilter, ImageOps

import models
import train_M4
import utils

RESULTS = Path(__file__).with_name("results.csv")
LADDER = ("M1", "M2", "M3", "M4")
# The exercise's networks: the best epoch of one run each, on plain images.
EXERCISE = {"M1": "98.95", "M2": "98.72", "M3": "99.27", PLAIN: "99.53"}
# The rungs of the ladder, in Okabe and Ito's palette.
COLORS = {"M1": "#E69F00", "M2": "#009E73", "M3": "#CC79A7", PLAIN: "#56B4E9", "M4": "#0072B2"}
NO_DIGIT = ("two digits", "no digit", "no stroke")
KINDS = ("28x28", "own page", "sheet on a desk", "cut to its ink", "at one border", "small")
KINDS += ("ruled paper", "cell of a form", "faint", "soft shadow", "hard shadow", *NO_DIGIT)

# The runs -----------------------------------------------------------------------------------------


def write_results(runs, path):
    """Write every epoch of the finished runs below `runs` to the CSV file `path`.

    Its first lines say which ran on what. Raises UserError if runs that a table compares were made
    with different settings.
    """
    rows, environments, held = [], {}, set()
    for run in (*LADDER, *ROWS):
        place = runs / run if run in LADDER else runs / "ablation" / directory(run)
        for record in read_runs(place):
            images = record["config"]["holdout"], record["config"]["limit"]
            if run in PARTS:
                held.add(images)
            elif any(images):
                raise utils.UserError(f"{place}: --holdout or --limit, not with all of MNIST")
            if len(held) > 1:
                raise utils.UserError(f"{place}: another --holdout or --limit than rows before")
            for epoch in record["history"]:
                names = environments.setdefault(epoch.pop("environment"), [])
                if run not in names:
                    names.append(run)
                rows.append({"run": run, "seed": record["seed"]} | epoch)
    if not rows:
        raise utils.UserError(f"no finished run in {runs}/M1/seed-1 and so on")
    lines = [f"# {what}: {', '.join(names)}" for what, names in environments.items()]
    lines.append(f"# written on a machine with {processor()}")
    others = "".join(f", of {count:,} held-out ones for: {', '.join(PARTS)}" for count, _ in held)
    lines.append(f"# test_loss, test_acc: of the test images{others}")
    lines.append(",".join(rows[0]))
    for row in rows:
        lines.append(",".join(map(cell, row.values())))
    utils.write_text(path, "\n".join(lines) + "\n")


def read_runs(place):
    """Return the records of the finished runs in `place`, by seed."""
    records = [json.loads(file.read_text()) for file in place.glob("seed-*/metrics.json")]
    settings = [record["config"] | {"seed": None} for record in records]
    if settings[1:] != settings[:-1]:
        raise utils.UserError(f"{place}: the seeds were run with different settings")
    return sorted(records, key=lambda record: record["seed"])


def processor():
    """Return the name of this machine's processor."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    name = re.search("model name.*: (.*)", text)
    return name[1] if name else platform.processor()


def cell(value):
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def read_results(path):
    """Return run -> seed -> list of epochs, each a dictionary of numbers."""
    runs = {}
    lines = path.read_text().splitlines()
    for cells in csv.DictReader(line for line in lines if not line.startswith("#")):
        seeds = runs.setdefault(cells.pop("run"), {})
        history = seeds.setdefault(int(cells.pop("seed")), [])
        history.append({key: float(value) for key, value in cells.items()})
    return runs


def last(histories, key="test_acc"):
    return torch.tensor([history[-1][key] for history in histories.values()])


def lowest(histories):
    """Return the lowest test accuracy in the last five epochs of any seed, as text."""
    scores = [epoch["test_acc"] for history in histories.values() for epoch in history[-5:]]
    return f"{min(scores):.2f}"


def differences(runs, row, key="test_acc"):
    """Return the final figures of `row` less the whole recipe's, for each seed that both have."""
    part, whole = runs[row], runs[WHOLE]
    seeds = sorted(part.keys() & whole.keys())
    return torch.tensor([part[seed][-1][key] - whole[seed][-1][key] for seed in seeds])


def parameters(run):
    model = getattr(models, f"MNIST_CNN_{run[:2] if run[0] == 'M' else 'M4'}")()
    return sum(p.numel() for p in model.parameters())


def minutes(histories):
    """Return how long a run takes at the pace of the quickest epoch: others shared the machine."""
    seconds = [epoch["seconds"] for history in histories.values() for epoch in history]
    epochs = len(seconds) / len(histories)
    return epochs * min(seconds) / 60


# The tables ---------------------------------------------------------------------------------------


def print_table(*rows):
    print()
    line = ["---"] * len(rows[0])
    for cells in (rows[0], line, *rows[1:]):
        print_row(cells)


def print_row(cells):
    print(f"| {' | '.join(cells)} |", flush=True)


def mean_and_error(values, form, count=1):
    """Return the mean of `values` ± their standard deviation by the root of `count`, as text."""
    text = f"{values.mean():{form}}"
    if len(values) > 1:
        error = values.std() / count**0.5
        text += f" ± {error:{form.lstrip('+')}}"
    return text


def print_ladder(runs):
    head = ["model", "parameters", "seeds", "final: mean ± std", "misread of 10,000"]
    head += ["lowest of last five", "minutes", "exercise"]
    rows = []
    for name in filter(runs.get, COLORS):
        scores = last(runs[name])
        row = [name, f"{parameters(name):,}", str(len(scores))]
        row += [mean_and_error(scores, ".3f"), f"{10_000 - 100 * scores.mean():.0f}"]
        row += [lowest(runs[name]), f"{minutes(runs[name]):.1f}", EXERCISE.get(name, "")]
        rows.append(row)
    print_table(head, *rows)


def print_ablation(runs):
    """Print the whole recipe's means, and the others' mean differences ± standard errors."""
    table = [["one part changed", "seeds", "accuracy", "loss", "lowest of last five"]]
    for row in filter(runs.get, PARTS):
        cells = [row, str(len(differences(runs, row)))]
        for key, digits in (("test_acc", 2), ("test_loss", 5)):
            if row == WHOLE:
                cells.append(f"{last(runs[row], key).mean():.{digits}f}")
            else:
                change = differences(runs, row, key)
                cells.append(mean_and_error(change, f"+.{digits}f", len(change)))
        table.append([*cells, lowest(runs[row])])
    print_table(*table)


def print_fewer(runs):
    """Print how runs of fewer epochs and other networks do with M4's recipe, on seeds 1 to 5."""
    head = "M4's recipe", "parameters", "seeds", "final: mean", "lowest of last five"
    table = [(*head, "minutes")]
    for name in filter(runs.get, ("M4", *FEWER)):
        run = {seed: epochs for seed, epochs in runs[name].items() if seed <= 5}
        counts = f"{parameters(name):,}", str(len(run))
        table.append((name, *counts, f"{last(run).mean():.2f}", lowest(run), f"{minutes(run):.1f}"))
    print_table(*table)


# The pictures -------------------------------------------------------------------------------------


def draw_ladder(runs):
    """Return a figure of test accuracy by epoch beside the final accuracy by parameters."""
    figure = utils.new_figure(10, 4.4)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for name in filter(runs.get, COLORS):
        histories = runs[name].values()
        scores = torch.tensor([[epoch["test_acc"] for epoch in run] for run in histories])
        mean = scores.mean(0)
        low = scores.amin(0)
        high = scores.amax(0)
        epochs = range(1, len(mean) + 1)
        color = COLORS[name]
        left.plot(epochs, mean, color=color, label=name, marker="o", markersize=3)
        left.fill_between(epochs, low, high, color=color, alpha=0.25, linewidth=0)
        final = mean[-1]
        bars = [[final - low[-1]], [high[-1] - final]]
        count = parameters(name)
        right.errorbar(count, final, bars, color=color, marker="o", capsize=4)
        # M3 and M4 stand so close that one name goes to the right and the other to the left.
        place, side = (-9, "right") if name in (PLAIN, "M4") else (9, "left")
        right.annotate(
            name,
            (count, final),
            xytext=(place, -4),
            textcoords="offset points",
            ha=side,
            color=color,
        )
    for axes in (left, right):
        axes.axhline(99.4, color="black", linestyle="--", linewidth=1, label="target, 99.4%")
        axes.grid(alpha=0.3)
    left.set(xlabel="epoch", ylabel="test accuracy (%)", ylim=(97.5, 99.8))
    left.set_title("by epoch: mean and range of the seeds")
    right.set(xlabel="parameters", xlim=(3500, 8500), title="last epoch: mean and range")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


def draw_augmentation(images):
    """Return a figure of five training digits, straightened, and eight draws of each for M4."""
    torch.manual_seed(1)
    upright = utils.straighten(images[:5])
    draws = [255 * utils.augment(upright / 255, **train_M4.AUGMENT) for _ in range(8)]
    digits = torch.stack([images[:5], upright, *draws], 1).flatten(0, 1)
    captions = ["original", "straightened", *[""] * 8] * 5
    title = "Five training digits, straightened, and eight draws of each"
    return utils.plot_digits(title, digits, captions)


# Digits in pictures -------------------------------------------------------------------------------


def print_digits(path, test_images, labels, count):
    """Print how the M4 in `path` reads pictures made of the first `count` test images."""
    model, straightened = utils.load_model(path, models.MNIST_CNN_M4)
    digits = [Image.fromarray(image[0].numpy()) for image in test_images[:count]]
    read = functools.partial(read_kind, model, straightened, digits, labels[:count])
    print_table((f"pictures, {count:,} each", "right", "refused", "wrong, over 90% sure"))
    # Each core has a kind of its own.
    with multiprocessing.get_context("spawn").Pool(utils.THREADS) as pool:
        for kind, shares in zip(KINDS, pool.imap(read, KINDS), strict=True):
            print_row([kind, *(f"{share:.1f}%" for share in shares)])


def read_kind(model, straightened, digits, labels, kind):
    """Return how many percent of a kind are read right, refused, and wrong but over 90% sure."""
    torch.set_num_threads(1)
    right = refused = sure = 0
    for number, digit in enumerate(digits):
        file = picture_file(kind, digit, digits[number - 1], random.Random(f"{number} {kind}"))
        try:
            prepared = utils.prepare_digit(file, straightened)
        except ValueError:
            refused += 1
            continue
        confidence, answer = model(utils.normalize(prepared / 255)).softmax(1)[0].max(0)
        if answer == labels[number] and kind not in NO_DIGIT:
            right += 1
        elif confidence > 0.9:
            sure += 1
    return [100 * number / len(digits) for number in (right, refused, sure)]


def picture_file(kind, digit, other, chance):
    """Return a PNG file of a picture of one of the KINDS, light on dark or dark on light."""
    page = draw_picture(kind, digit, other, chance)
    if chance.random() >= 0.5:
        page = ImageOps.invert(page)
    file = io.BytesIO()
    page.save(file, "png")
    return file


def draw_picture(kind, digit, other, chance):
    side = chance.randint(30, 200)
    width = chance.randint(200, 400)
    height = chance.randint(200, 400)
    pen_width = chance.randint(2, 20)
    mark = ink(digit, side)
    apart = ImageOps.expand(mark, 8)  # from the border
    page = Image.new("L", (side + width, side + height))
    match kind:
        case "28x28":
            return digit
        case "own page":
            return put(digit.resize((side, side)), page, chance)
        case "sheet on a desk":
            return on_desk(digit, (width, height), chance)
        case "cut to its ink":
            return mark
        case "at one border":
            margins = [0, *(chance.randint(side // 5, side) for _ in range(3))]
            return ImageOps.expand(mark, tuple(chance.sample(margins, 4)))
        case "small":  # a twentieth to a fifth of the longer side
            mark = ink(digit, chance.randint(24, 60))
            side = max(mark.size)
            size = [side * chance.randint(4, 18) for _ in range(2)]
            return ImageOps.expand(put(mark, Image.new("L", size), chance), side // 2)
        case "faint":
            return put(mark, page, chance, chance.randint(12, 40))
        case "ruled paper":
            return on_lines(apart, page.size, chance)
        case "cell of a form":
            return in_cell(mark, chance)
        case "soft shadow":
            return in_shadow(apart, page.size, chance, chance.randint(8, 30))
        case "hard shadow":
            return in_shadow(apart, page.size, chance, chance.uniform(0, 2))
        case "no stroke":
            return no_stroke((width, height), chance)
        case "two digits":
            return two_digits(mark, other, side, chance)
    return no_digit((width, height), pen_width, chance)


def ink(digit, side):
    """Return a digit cut to its ink, the longer side `side` pixels."""
    digit = digit.crop(digit.getbbox())
    longest = max(digit.size)
    return digit.resize([max(1, round(side * length / longest)) for length in digit.size])


def put(mark, page, chance, pen=255):
    """Return the page with the digit somewhere on it."""
    left = chance.randint(0, page.width - mark.width)
    top = chance.randint(0, page.height - mark.height)
    page.paste(pen, (left, top), mark)
    return page


def on_desk(digit, size, chance):
    """Return a sheet of paper on a desk, or with a frame, or below a dark bar."""
    paper = chance.randint(150, 220)
    desk = chance.choice([chance.randint(0, 100), 255])
    mark = ink(digit, chance.randint(60, 130))
    sheet = put(mark, Image.new("L", size, paper), chance, chance.randint(0, 80))
    sheet = ImageOps.expand(sheet, 60, paper)
    margins = [chance.randint(20, 90) for _ in range(4)]
    if chance.random() < 0.3:
        angle = chance.uniform(-8, 8)
        sheet = sheet.rotate(angle, Image.Resampling.BICUBIC, expand=True, fillcolor=desk)
    else:
        seen = [margin * (chance.random() < 0.5) for margin in margins]
        margins = chance.choice([seen, seen, (0, 30, 0, 0), (2,) * 4, (20,) * 4])
    return ImageOps.expand(sheet, tuple(margins), desk)


def on_lines(mark, size, chance):
    """Return ruled paper, half of it with a margin line, turned a little."""
    page = Image.new("L", (size[0] + 200, size[1] + 200))
    style = {"fill": chance.randint(15, 110), "width": chance.randint(1, 4)}
    rows = range(0, page.height, chance.randint(20, 50))
    rule(page, [chance.randint(100, 2 * page.width)], rows, style)
    page = page.rotate(chance.uniform(-6, 6), Image.Resampling.BICUBIC)
    return put(mark, ImageOps.crop(page, 100), chance, chance.randint(40, 200))


def in_cell(mark, chance):
    """Return a cell of a form, whose lines reach the border, and almost the digit."""
    gaps = [chance.randint(2, 12) for _ in range(4)]
    margins = [chance.randint(8, 30) for _ in range(4)]
    style = {"fill": chance.randint(60, 240), "width": chance.randint(1, 4)}
    cell = put(mark, Image.new("L", mark.size), chance, chance.randint(60, 200))
    page = ImageOps.expand(ImageOps.expand(cell, tuple(gaps)), tuple(margins))
    columns = margins[0] - 2, page.width - margins[2] + 2
    rows = margins[1] - 2, page.height - margins[3] + 2
    rule(page, columns, rows, style)
    return page


def rule(page, columns, rows, style):
    """Draw lines from border to border on the page."""
    pen = ImageDraw.Draw(page)
    for x in columns:
        pen.line((x, 0, x, page.height), **style)
    for y in rows:
        pen.line((0, y, page.width, y), **style)


def in_shadow(mark, size, chance, blur):
    """Return a page with a shadow that has a corner or an edge near the digit, or across it."""
    paper = chance.randint(180, 250)
    page = put(mark, Image.new("L", size, paper), chance, paper - chance.randint(60, 170))
    shadow = Image.new("L", size)
    corner = [length * chance.uniform(0.2, 0.8) for length in size]
    start = chance.randint(0, 360)
    reach = [(place - 999, place + 999) for place in corner]
    box = (reach[0][0], reach[1][0], reach[0][1], reach[1][1])
    ImageDraw.Draw(shadow).pieslice(box, start, start + chance.randint(60, 180), 255)
    shadow = shadow.filter(ImageFilter.GaussianBlur(blur))
    share = chance.uniform(0.6, 0.9)
    return Image.composite(page.point(lambda tone: tone * share), page, shadow)


def no_stroke(size, chance):
    """Return a hand: a palm with fingers far thinner than it."""
    page = Image.new("L", size)
    pen = ImageDraw.Draw(page)
    tone = chance.randint(50, 150)
    palm = (0.3, 0.5, chance.uniform(0.65, 0.8), 0.95)
    pen.ellipse([share * size[i % 2] for i, share in enumerate(palm)], tone)
    for finger in range(chance.randint(0, 5)):
        root = (0.35 + 0.08 * finger) * size[0], 0.65 * size[1]
        tip = root[0] + chance.randint(-30, 30), chance.uniform(0.1, 0.3) * size[1]
        pen.line((root, tip), tone, chance.randint(15, 30))
    return page.filter(ImageFilter.GaussianBlur(3))


def two_digits(mark, other, side, chance):
    other = ink(other, round(side * chance.uniform(0.8, 1.2)))
    gap = chance.randint(side // 10, side)
    page = Image.new("L", (mark.width + gap + other.width, 2 * side))
    page.paste(mark)
    page.paste(other, (mark.width + gap, chance.randint(0, side // 4)))
    return ImageOps.expand(page, side // 2)


def no_digit(size, pen_width, chance):
    """Return a frame, a disc, a block, stripes, noise or an empty page."""
    what = chance.choice(["frame", "disc", "block", "stripes", "noise", "empty"])
    edge = chance.uniform(0.05, 0.3)
    width, height = size
    box = (edge * width, edge * height, (1 - edge) * width, (1 - edge) * height)
    page = Image.new("L", size)
    pen = ImageDraw.Draw(page)
    if what == "frame":
        pen.rectangle(box, outline=255, width=pen_width)
    elif what == "disc":
        pen.ellipse(box, 255)
    elif what == "block":
        pen.rectangle(box, 255)
    elif what == "stripes":
        for x in range(0, width, 2 * pen_width):
            pen.rectangle((x, 0, x + pen_width, height), 255)
    grain = Image.frombytes("L", size, chance.randbytes(width * height))
    return Image.blend(page, grain, 0.5 if what == "noise" else 0.03)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--runs", type=Path, help="make results.csv from the runs in this directory first")
    add("--data-dir", type=Path, default=Path("data"), help="for augmentation.png and --digits")
    add("--images-dir", type=Path, default=Path("images"))
    add("--digits", type=Path, metavar="MODEL", help="of M4, to read drawn pictures with")
    add("--count", type=utils.whole_number, default=200, help="of images for --digits")
    args = parser.parse_args()
    if args.digits:
        *_, images, labels = utils.read_idx_files(args.data_dir)
        return print_digits(args.digits, images, labels, args.count)
    if args.runs:
        write_results(args.runs, RESULTS)
    runs = read_results(RESULTS)
    print_ladder(runs)
    utils.save_picture(args.images_dir / "ladder.png", draw_ladder, runs)
    for name in filter(runs.get, LADDER):
        histories = list(runs[name].values())
        picture = args.images_dir / f"{name}_training.png"
        utils.save_picture(picture, utils.plot_training, name, histories, "test")
    if WHOLE in runs:
        print_ablation(runs)
    print_fewer(runs)
    if args.data_dir.exists():
        images, *_ = utils.read_idx_files(args.data_dir)
        utils.save_picture(args.images_dir / "augmentation.png", draw_augmentation, images)


if __name__ == "__main__":
    utils.launch(main)

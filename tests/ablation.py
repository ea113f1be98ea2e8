"""Train variants of M4 on held-out images: python tests/ablation.py [--rows ROW ...] [--seeds SEED ...]

Each row and seed goes into a directory of its own below runs/ablation, and what is finished there is not repeated:
remove it after a change of the code. tests/figures.py makes the tables from it. Further options go to train_M4.py.
"""

import argparse
import contextlib
import sys
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.nn.functional import conv2d

import models
import train_M4
import utils


def constant(optimizer, *_):
    """Return a schedule that leaves the rate as it is."""
    return torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)


def adamw(model, lr, momentum):
    return torch.optim.AdamW(model.parameters(), lr)


def bfloat16_conv2d(pixels, weight, *args):
    """Return `conv2d` as a processor with bfloat16 computes it under autocast: it sums in float32, too.

    torch itself takes four to six times as long on a processor without.
    """
    if not torch.is_autocast_enabled("cpu"):
        return conv2d(pixels, weight, *args)
    with torch.autocast("cpu", enabled=False):
        return conv2d(pixels.bfloat16().float(), weight.bfloat16().float(), *args).bfloat16()


# For each row, what stands in the place of which name, and the options.
WHOLE = "whole recipe"
PARTS = {
    WHOLE: {},
    "without straightening": {"utils.straighten": lambda images: images, "utils.HEIGHT": None, "utils.WIDTH": None},
    "without dropout": {"train_M4.DROPOUT": 0.0},
    "without augmentation": {"train_M4.AUGMENT": None},
    # The peak would be far too high a rate to stay at: a quarter of it, untuned.
    "without OneCycle": {"utils.one_cycle": constant, "--max-lr": train_M4.MAX_LR / 4},
    "without averaging": {"train_M4.AVERAGE_DECAY": 0.0},
    # The rate of the first round in TRIALS.md.
    "AdamW instead of Muon": {"utils.Muon": adamw, "--max-lr": 0.02},
    "emulated bfloat16": {"--precision": "bfloat16", "torch.nn.functional.conv2d": bfloat16_conv2d},
    "whole images throughout": {"train_M4.BORDER": 0},
}
# M1 and M2 take whole images only, and M1 has no dropout.
NETWORKS = {
    "M1 with M4's recipe": {"train_M4.MNIST_CNN_M4": lambda dropout=0: models.MNIST_CNN_M1(), "train_M4.BORDER": 0},
    "M2 with M4's recipe": {"train_M4.MNIST_CNN_M4": models.MNIST_CNN_M2, "train_M4.BORDER": 0},
    "M3 with M4's recipe": {"train_M4.MNIST_CNN_M4": models.MNIST_CNN_M3},
}
LENGTHS = {f"{epochs} epochs": {"--epochs": epochs} for epochs in (6, 8, 10, 12)}
ROWS = PARTS | NETWORKS | LENGTHS


def directory(row):
    """Return the name of the row's directory."""
    return row.replace(" ", "-").replace("'", "")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", nargs="+", metavar="ROW", choices=ROWS, default=ROWS, help=f"of {', '.join(ROWS)}")
    parser.add_argument("--seeds", nargs="+", default=range(31, 36), help="31 to 35, if none are named")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    args, others = parser.parse_known_args()
    for seed in args.seeds:
        for row in args.rows:
            output = args.runs / "ablation" / directory(row) / f"seed-{seed}"
            options = ["--holdout", 10000, "--resume", "--seeds", seed, "--output-dir", output, "--images-dir", output]
            options += others
            with contextlib.ExitStack() as stack:
                for name, value in ROWS[row].items():
                    if name.startswith("--"):
                        options += [name, value]
                    else:
                        stack.enter_context(patch(name, value))
                stack.enter_context(patch.object(sys, "argv", ["train_M4.py", *map(str, options)]))
                train_M4.main()


if __name__ == "__main__":
    utils.run(main)

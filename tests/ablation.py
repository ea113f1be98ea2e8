"""`python tests/ablation.py [--rows ROW ...] [--seeds SEED ...]` trains variants of M4.

Those with one part changed are evaluated on held-out images, seeds 31 to 36; the others on the test
set, seeds 1 to 5, and M4 plain, which is a rung of the ladder, 1 to 20. Each row and seed goes into
a directory of its own below runs/ablation, and what is finished there is not repeated: remove it
after a change of the code. tests/figures.py makes tables from these runs. Further options go to
train_M4.py.
"""

import argparse
import contextlib
import sys
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torch.optim.lr_scheduler import ConstantLR

import models
import train_M4
import utils


def constant(optimizer, *_):
    """Return a schedule that leaves the rate as it is."""
    return ConstantLR(optimizer, 1.0)


# For each row, what stands in the place of which name, and options of train_M4.py.
WHOLE = "whole recipe"
PARTS = {
    WHOLE: {},
    # With the augmentation of straightened digits: plain ones may want a stronger one.
    "without straightening": {"train_M4.STRAIGHTEN": False},
    "without dropout": {"train_M4.DROPOUT": 0.0},
    "without augmentation": {"train_M4.AUGMENT": dict.fromkeys(train_M4.AUGMENT, 0)},
    # An eighth, a quarter and half of the peak did equally well (tests/TRIALS.md).
    "without OneCycle": {"utils.one_cycle": constant, "--max-lr": train_M4.MAX_LR / 8},
    "without averaging": {"train_M4.AVERAGE_DECAY": 0.0},
}
PLAIN = "M4 plain"
# These are compared with the M4 of the ladder, on its first five seeds.
FEWER = {
    # M1 has no dropout.
    "M1's network": {"train_M4.MNIST_CNN_M4": lambda *_: models.MNIST_CNN_M1()},
    "M2's network": {"train_M4.MNIST_CNN_M4": models.MNIST_CNN_M2},
    "M3's network": {"train_M4.MNIST_CNN_M4": models.MNIST_CNN_M3},
}
FEWER |= {f"{epochs} epochs": {"--epochs": epochs} for epochs in (6, 8, 10, 12)}
ROWS = PARTS | {PLAIN: {"train_M4.STRAIGHTEN": False}} | FEWER


def directory(row):
    """Return the name of the row's directory."""
    return row.replace(" ", "-").replace("'", "")


def train(row, options):
    """Run train_M4.py with the `options` and with what the row changes."""
    command = ["train_M4.py", *options]
    with contextlib.ExitStack() as stack:
        for name, value in ROWS[row].items():
            if name.startswith("--"):
                command += [name, str(value)]
            else:
                stack.enter_context(patch(name, value))
        stack.enter_context(patch.object(sys, "argv", command))
        train_M4.main()


def default_seeds(row):
    if row in PARTS:
        return range(31, 37)
    return range(1, 21 if row == PLAIN else 6)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--rows", nargs="+", metavar="ROW", choices=ROWS, default=ROWS, help=", ".join(ROWS))
    add("--seeds", nargs="+", help="default: see above")
    add("--runs", type=Path, default=Path("runs"))
    args, others = parser.parse_known_args()
    for row in args.rows:
        for seed in args.seeds or default_seeds(row):
            output = args.runs / "ablation" / directory(row) / f"seed-{seed}"
            options = ["--resume", "--seeds", str(seed), "--output-dir", str(output)]
            if row in PARTS:
                options += ["--holdout", "10000"]
            train(row, [*options, *others])


if __name__ == "__main__":
    utils.launch(main)

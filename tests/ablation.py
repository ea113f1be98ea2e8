"""Train M4 without one of its parts at a time: python tests/ablation.py [ROW ...]

Each row (all of them, if none is named) runs on seeds 11 to 14 with `--holdout 10000`, and goes into a directory of its
own below runs/ablation, from which tests/figures.py makes the table and the picture.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import train_M4
import utils

ROWS = {
    "1-whole-recipe": {},
    "2-without-dropout": {"DROPOUT": 0.0},
    "3-without-augmentation": {"AUGMENT": None},
    # The peak would be far too high a rate to stay at: a quarter of it, untuned.
    "4-without-OneCycle": {"MAX_LR": 0.0125},
    "5-without-averaging": {"AVERAGE_DECAY": 0.0},
    "6-without-leaving-out-the-border": {"BORDER": 0},
    "7-in-bfloat16": {},
}


def constant(optimizer, *_):
    """Return a schedule that leaves the rate as it is."""
    return torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}")
    rows = parser.parse_args().rows or list(ROWS)
    if set(rows) - set(ROWS):
        parser.error(f"the rows are {', '.join(ROWS)}")
    recipe, one_cycle = {key: getattr(train_M4, key) for row in ROWS.values() for key in row}, utils.one_cycle
    for row in rows:
        vars(train_M4).update(recipe | ROWS[row])
        utils.one_cycle = constant if "OneCycle" in row else one_cycle
        directory = f"runs/ablation/{row}"
        options = ["--holdout", "10000", "--seeds", "11", "12", "13", "14", "--resume"]
        options += ["--output-dir", directory, "--images-dir", directory]
        sys.argv[1:] = [*options, "--precision", "bfloat16" if "bfloat16" in row else "float32"]
        train_M4.main()


if __name__ == "__main__":
    utils.run(main)

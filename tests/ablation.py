"""Train M4 without one of its helpers at a time: python tests/ablation.py [ROW …]

Each row (all of them, where none is named) runs on the seeds 11 to 14 with `--holdout 10000` and goes into a
directory of its own below runs/ablation, from which tests/figures.py makes the table and the picture.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_M4
import utils

ROWS = {
    "1-whole-recipe": {},
    "2-without-dropout": {"DROPOUT": 0.0},
    "3-without-augmentation": {"AUGMENT": None},
    # The peak would be far too high a rate to stay at; a quarter of it, untuned.
    "4-without-OneCycle": {"MAX_LR": 0.0125},
    "5-without-averaging": {"AVERAGE_DECAY": 0.0},
    "6-without-cropping": {"CROP": None},
    "7-in-float32": {},  # the others are in bfloat16, on a CPU that multiplies it
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}")
    rows = parser.parse_args().rows or list(ROWS)
    wrong = set(rows) - set(ROWS)
    if wrong:
        parser.error(f"there is no row {min(wrong)}; there are {', '.join(ROWS)}")
    recipe, one_cycle = {key: getattr(train_M4, key) for row in ROWS.values() for key in row}, utils.one_cycle
    if utils.precision("auto", utils.device("auto")) == "float32":
        rows = [row for row in rows if "float32" not in row]  # it would be the first row again
    for row in rows:
        vars(train_M4).update(recipe | ROWS[row])
        utils.one_cycle = (lambda *_: None) if "OneCycle" in row else one_cycle
        directory = f"runs/ablation/{row}"
        options = (
            f"--holdout 10000 --seeds 11 12 13 14 --output-dir {directory} --images-dir {directory}".split()
        )
        sys.argv[1:] = [*options, "--precision", "float32" if "float32" in row else "auto", "--resume"]
        train_M4.main()


if __name__ == "__main__":
    utils.run(main)

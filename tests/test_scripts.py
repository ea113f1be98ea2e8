"""The four scripts as processes of their own, on the generated digits, and the command line."""

import functools
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import ablation
import figures
import pytest
import torch
from conftest import NETWORKS, ROOT, data_args, draw_digits, history, same_weights
from matplotlib.image import imread
from PIL import Image

import utils

LINE = r"epoch=\d+ lr=[0-9.e-]+ train_loss=[0-9.]+ train_acc=[0-9.]+ test_loss=[0-9.]+ "
LINE += r"test_acc=[0-9.]+ seconds=[0-9.]+"
PICTURES = ("training", "misclassified", "confusion")


@pytest.mark.parametrize("name", NETWORKS)
def test_script_learns_and_leaves_what_it_should(name, run_script, small_md5, data_dir, tmp_path):
    settings = {}
    if name == "M4":
        # One of them from scratch: what a fork has imported already may hide a missing import. The
        # backend that notebooks hand down, and a user's style that needs TeX, must not disturb it.
        (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.family: NoSuchFont\n")
        settings["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
        settings["MATPLOTLIBRC"] = str(tmp_path / "matplotlibrc")
        settings["start"] = subprocess.run
    done = run_script(
        f"train_{name}.py", "--epochs", "5", "--batch_size", "10", pictures=True, **settings
    )
    assert done.returncode == 0 and done.stderr == ""
    epochs = [line for line in done.stdout.splitlines() if "epoch=" in line]
    assert len(epochs) == 5 and all(re.fullmatch(LINE, line) for line in epochs)
    out = tmp_path / "out"
    files = [path.name for path in out.rglob("*") if path.is_file()]
    pictures = [f"{name}_{what}.png" for what in PICTURES]
    assert sorted(files) == sorted(["checkpoint.pt", "metrics.json", "model.pt", *pictures])
    for picture in pictures:
        pixels = imread(out / "images" / picture)
        assert min(pixels.shape[:2]) > 100 and pixels[..., :3].std() > 0.02
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["model"] == name and metrics["config"]["batch_size"] == 10
    accuracies = [epoch["test_acc"] for epoch in metrics["history"]]
    assert metrics["summary"]["final_test_acc"] == accuracies[-1] >= 98
    assert metrics["summary"]["last5_min"] == min(accuracies)
    # What the saved weights score is what the last epoch says.
    model, straightened = utils.load_model(out / "model.pt", NETWORKS[name])
    data = utils.load_data(data_args(data_dir), straightened)
    assert utils.evaluate(model, data).accuracy == pytest.approx(accuracies[-1])
    # The run says on what it trains, how many parameters it has, and where the model is.
    assert f"Total params: {metrics['parameters']:,}" in done.stdout
    assert "device: cpu" in done.stdout and str(out / "model.pt") in done.stdout
    script = (ROOT / f"train_{name}.py").as_posix()
    last = f"next: python {script} --output-dir {out.as_posix()} --predict PICTURE"
    assert done.stdout.splitlines()[-1] == last


def own_code(directory):
    """Return the README's lines that use M4, for the images in `directory`."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = readme.partition("```python\n")[2].partition("```")[0]
    assert "utils.straighten" in lines
    return lines.replace('"data"', repr(str(directory)))


def test_the_readme_shows_how_to_use_m4_in_ones_own_code(
    small_md5, data_dir, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(ROOT)
    code = tmp_path / "own.py"
    code.write_text(own_code(data_dir))
    runpy.run_path(code)
    printed = capsys.readouterr().out
    model, straightened = utils.load_model(utils.PUBLISHED, NETWORKS["M4"])
    data = utils.load_data(data_args(data_dir), straightened)
    accuracy = utils.evaluate(model, data).accuracy
    assert printed == f"{accuracy:.2f}%\n"


@pytest.mark.slow
def test_m4_learns_mnist_and_the_published_model_scores_what_the_results_say(tmp_path):
    data = ROOT / "data" if (ROOT / "data").is_dir() else tmp_path / "data"
    options = ["--epochs", "2", "--data-dir", data, "--output-dir", tmp_path, "--device", "cpu"]
    subprocess.run([sys.executable, ROOT / "train_M4.py", *options], check=True, cwd=tmp_path)
    assert history(tmp_path)[-1]["test_acc"] >= 98.5
    run = figures.read_results(figures.RESULTS)["M4"][1]
    printed = subprocess.check_output([sys.executable, "-c", own_code(data)], cwd=ROOT, text=True)
    assert printed == f"{run[-1]['test_acc']:.2f}%\n"


def test_several_seeds_same_seed_same_figures(run_script, tmp_path):
    options = ("--epochs", "1", "--batch-size", "30", "--seeds")
    done = run_script("train_M4.py", *options, "[3, 4]")
    assert done.returncode == 0
    epochs = [line.split()[0] for line in done.stdout.splitlines() if "epoch=" in line]
    assert epochs == ["seed=3", "seed=4"]
    # A run of one epoch does not speak of the last five.
    assert "last" not in done.stdout
    assert run_script("train_M4.py", *options, "3", output="again").returncode == 0
    again, three, four = tmp_path / "again", tmp_path / "out/seed-3", tmp_path / "out/seed-4"
    assert history(again) == history(three) != history(four)
    assert same_weights(again, three) and not same_weights(again, four)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert list(summary["seeds"]) == ["3", "4"]
    finals = [history(directory)[-1]["test_acc"] for directory in (three, four)]
    assert summary["final_test_acc"]["mean"] == pytest.approx(sum(finals) / 2)
    assert summary["final_test_acc"]["min"] == min(finals)


def test_on_a_terminal_a_bar_counts_the_batches(run_script):
    terminal = "sys.stderr.isatty = lambda: True"
    done = run_script("train_M1.py", "--epochs", "1", "--batch-size", "60", before=terminal)
    assert done.returncode == 0 and "epoch 1: " in done.stderr and "/10 [" in done.stderr


MISTAKES = """
--epochs 0
--batch-size -1
--limit 0
--holdout -1
--max-lr nan
--max-lr -1
--target 101
--target 0.994
--target 99 --epochs 4
--seeds -1
--seeds []
--seeds 1 01
--device cuda:99
--device meta
--device toaster
--resume perhaps
--lernrate 3
"""


@pytest.mark.parametrize("options", MISTAKES.strip().splitlines())
def test_a_mistake_is_told_in_one_line(options, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = options.split()
    with pytest.raises(SystemExit) as stop:
        utils.launch(lambda: utils.parse_args("M4", "", 128, 0.01, options))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and options[0] in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given, expected", [(None, 3), ("2", 6)])
def test_half_of_the_threads_once(given, expected, monkeypatch):
    """torch is told of six threads, as it would find them on six cores."""
    code = "import torch; torch.set_num_threads(6); import utils\n"
    code += "for _ in range(2):\n    utils.parse_args('M4', '', 128, 0.01, ['--predict', 'x'])\n"
    code += "print(torch.get_num_threads())"
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert int(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT)) == expected


def parsed(*options):
    """Return the settings of a `--predict`, which makes no directories."""
    return utils.parse_args("M4", "", 128, 0.01, [*options, "--predict", "x.png"])


def test_sagemaker_sets_the_defaults(monkeypatch, tmp_path):
    assert parsed().output_dir == Path("runs/M4")
    for name in ("MODEL_DIR", "OUTPUT_DATA_DIR", "CHANNEL_TRAIN"):
        monkeypatch.setenv(f"SM_{name}", str(tmp_path / name))
    args = parsed("--batch_size", "64", "--resume", "True", "--_tuning_objective_metric", "acc")
    assert (args.batch_size, args.resume, args.read_only_data) == (64, True, True)
    assert args.output_dir == tmp_path / "MODEL_DIR"
    assert args.images_dir == tmp_path / "OUTPUT_DATA_DIR"
    assert args.data_dir == tmp_path / "CHANNEL_TRAIN" and not args.data_dir.exists()
    assert parsed("--data-dir", f"{tmp_path}/CHANNEL_TRAIN").read_only_data
    assert not parsed("--data_dir", f"{tmp_path}/x").read_only_data
    monkeypatch.setenv("SM_CHANNEL_TRAINING", str(tmp_path / "first"))
    assert parsed().data_dir == tmp_path / "first"


def test_the_reason_of_a_failure_is_left_for_sagemaker(monkeypatch, tmp_path):
    monkeypatch.setattr(utils, "SAGEMAKER", tmp_path)
    (tmp_path / "output").mkdir()
    (tmp_path / "checkpoints").mkdir()
    args = parsed()
    assert args.resume and args.checkpoint_dir == tmp_path / "checkpoints"
    assert utils.fail("no\nroom " + "x" * 2000) == 2
    reason = (tmp_path / "output" / "failure").read_text()
    assert reason.startswith("error: no room x") and len(reason) == 1024


def test_only_the_first_of_several_processes_trains(run_script, tmp_path):
    done = run_script("train_M1.py", RANK="1")
    assert done.returncode == 0 and "rank 0" in done.stdout and not (tmp_path / "out").exists()


def test_target_is_held_by_each_of_the_last_five_epochs(run_script, tmp_path):
    options = ("train_M2.py", "--epochs", "6", "--batch-size", "30", "--resume")
    assert "target, " not in run_script(*options).stdout
    first, *last = [epoch["test_acc"] for epoch in history(tmp_path / "out")]
    assert first < min(last) < last[-1]
    for target, status, word in ((min(last), 0, "met"), (min(last) + 0.1, 3, "missed")):
        done = run_script(*options, "--target", str(target))
        assert done.returncode == status and word in done.stdout


def test_the_figures_are_those_of_the_results(capsys, monkeypatch):
    runs = figures.read_results(figures.RESULTS)
    monkeypatch.setattr(utils, "save_picture", lambda *args: None)
    monkeypatch.setattr(sys, "argv", ["figures.py", "--data-dir", "nowhere"])
    figures.main()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) > 10 and all(row in readme for row in rows)
    for name in figures.LADDER:
        final = figures.last(runs[name])
        lowest = figures.lowest(runs[name])
        words = f"{final.mean():.2f}% on average over seeds 1 to {len(final)}, "
        words += f"lowest {final.min():.2f}; never below {lowest} in the last"
        assert words in " ".join((ROOT / f"train_{name}.py").read_text().split())
        section = readme.partition(f"## {name}: ")[2].partition("<details>")[0]
        section = " ".join(section.split())
        assert f"**Result**: {final.mean():.2f}% over {len(final)} seeds" in section
        assert f"never below {lowest} in the last five epochs" in section
    assert len(figures.draw_ladder(runs).axes) == 2
    plain, straightened = figures.last(runs["M4 plain"]), figures.last(runs["M4"])
    ends = f"ends at {plain.mean():.2f}% on plain images, and at {straightened.mean():.2f}% with"
    assert ends in " ".join(readme.split())
    assert f"It prints {straightened[0]:.2f}%." in readme


PARTS = [figures.WHOLE, "without straightening", "without augmentation"]
FEWER = ["M1's network", "6 epochs"]


def test_evidence_is_made_from_runs(small_md5, data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(utils, "save_picture", lambda *args: None)
    for rows, holdout in ((PARTS, "100"), (FEWER, "0")):
        command = ["ablation.py", "--rows", *rows, "--seeds", "1", "2", "--runs", str(tmp_path)]
        command += ["--holdout", holdout, "--batch-size", "100", "--epochs", "2"]
        command += ["--data-dir", str(data_dir), "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", command)
        ablation.main()
        utils.lock()
    figures.write_results(tmp_path, tmp_path / "results.csv")
    head, _, comments = (tmp_path / "results.csv").read_text().partition("\n")
    assert head.startswith("# cpu, ") and head.endswith(f": {', '.join(PARTS + FEWER)}")
    assert "of 100 held-out" in comments
    runs = figures.read_results(tmp_path / "results.csv")
    assert list(runs) == PARTS + FEWER
    assert all(list(run) == [1, 2] for run in runs.values())
    assert len(runs[figures.WHOLE][1]) == 2 and len(runs["6 epochs"][1]) == 6
    assert len({run[1][-1]["test_loss"] for run in runs.values()}) == len(runs)
    plain = tmp_path / "ablation" / "without-straightening" / "seed-1" / "metrics.json"
    assert json.loads(plain.read_text())["config"]["straighten"] is False
    figures.print_ablation(runs)
    figures.print_fewer(runs)
    change = figures.last(runs[PARTS[1]]).mean() - figures.last(runs[PARTS[0]]).mean()
    low = min(epoch["test_acc"] for run in runs["6 epochs"].values() for epoch in run[-5:])
    said = capsys.readouterr().out
    assert f"| {PARTS[1]} | 2 | {change:+.2f} ± " in said
    mean = figures.last(runs["6 epochs"]).mean()
    assert f"| 6 epochs | 7,600 | 2 | {mean:.2f} | {low:.2f} | " in said
    assert "| M1's network | 6,590 | 2 | " in said
    mixed = [
        ("ablation/without-dropout", {"limit": 50}, "another --holdout or --limit"),
        ("M4", {"holdout": 0, "limit": 50}, "not with all of MNIST"),
    ]
    for run, images, message in mixed:
        record = json.loads(plain.read_text())
        record["config"] |= images
        folder = tmp_path / run / "seed-1"
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps(record))
        with pytest.raises(utils.UserError, match=message):
            figures.write_results(tmp_path, tmp_path / "results.csv")


def test_digits_are_drawn_and_read_in_each_kind_of_picture():
    images, labels = draw_digits(6, 5)
    assert len(figures.draw_augmentation(images[1:]).axes) == 50
    digits = [Image.fromarray(image[0].numpy()) for image in images[1:3]]
    # A model that sees the first digit everywhere. A 0 of seven segments is a frame.
    first = 20 * torch.eye(10)[labels[1:2]]
    read = functools.partial(figures.read_kind, lambda _: first, True, digits, labels[1:3])
    shares = {kind: read(kind) for kind in figures.KINDS}
    assert shares["28x28"] == [50, 0, 50]
    assert shares["two digits"] == [0, 100, 0]
    for kind, row in shares.items():
        assert sum(row) == 100
        assert row[0] == 0 or kind not in figures.NO_DIGIT


def test_m4_adds_straightening_to_m3_and_nothing_else():
    m3, m4 = ((ROOT / f"train_{name}.py").read_text() for name in ("M3", "M4"))
    assert m4.partition("def main")[2].count("STRAIGHTEN") == 2
    less = m4.replace('        "straighten": STRAIGHTEN,\n', "").replace(", STRAIGHTEN)", ")")
    assert less.partition("def main")[2] == m3.replace("M3", "M4").partition("def main")[2]


def test_names_that_cannot_be_shown_are_shown_otherwise(run_script):
    narrow = "sys.stdout.reconfigure(encoding='cp1252', errors='strict')"
    options = ("train_M1.py", "--epochs", "1", "--batch-size", "60")
    done = run_script(*options, output="\u6570\u5b57", before=narrow, pictures=True)
    assert done.returncode == 0 and done.stderr == "" and r"\u6570\u5b57" in done.stdout

"""The four scripts as processes of their own, on the generated digits, and the command line."""

import contextlib
import json
import os
import re
import subprocess
import sys

import ablation
import figures
import pytest
import torch
from conftest import NETWORKS, ROOT, draw_digits, history, same_weights
from matplotlib.image import imread

import utils

LINE = r"epoch=\d+ lr=[0-9.e-]+ train_loss=[0-9.]+ train_acc=[0-9.]+ test_loss=[0-9.]+ test_acc=[0-9.]+ seconds=[0-9.]+"


@pytest.mark.parametrize("name", NETWORKS)
def test_script_learns_and_leaves_what_it_should(name, run_script, tmp_path):
    settings = {}
    if name == "M4":
        # One of them from scratch: what a fork has imported already may hide a missing import. A notebook's backend
        # that is not there, and a user's style that needs TeX, must not disturb it.
        (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.family: NoSuchFont\n")
        settings = {"MPLBACKEND": "module://not_there.backend_inline", "MATPLOTLIBRC": str(tmp_path / "matplotlibrc")}
        settings["start"] = subprocess.run
    done = run_script(f"train_{name}.py", "--epochs", "5", "--batch_size", "10", pictures=True, **settings)
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert [bool(re.fullmatch(LINE, line)) for line in lines if "epoch=" in line] == [True] * 5
    assert done.stdout.count(f"Total params: {sum(p.numel() for p in NETWORKS[name]().parameters()):,}") == 1
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == ["checkpoint.pt", "images", "metrics.json", "model.pt"]
    model = NETWORKS[name]()
    model.load_state_dict(torch.load(out / "model.pt", weights_only=True))
    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics) == {"model", "seed", "config", "environment", "history", "parameters", "summary"}
    assert metrics["parameters"] == sum(p.numel() for p in model.parameters())
    assert metrics["config"]["batch_size"] == 10 and metrics["config"]["model"] == name
    accuracies = [epoch["test_acc"] for epoch in metrics["history"]]
    assert metrics["summary"]["final_test_acc"] == accuracies[-1] >= 98
    assert metrics["summary"]["last5_min"] == min(accuracies)
    for what in ("training", "misclassified", "confusion"):
        picture = imread(out / "images" / f"{name}_{what}.png")
        assert min(picture.shape[:2]) > 100 and picture[..., :3].std() > 0.02
    # What the saved weights score is what the last epoch says.
    images, labels = draw_digits(200, 2)
    assert utils.evaluate(model, utils.straighten(images), labels)[1] == pytest.approx(accuracies[-1])
    # Where the user stands, the last line works: the path of the script is what was typed.
    paths = (ROOT / f"train_{name}.py").as_posix(), out.as_posix()
    assert lines[-1].startswith("next: python {} --output-dir {} ".format(*paths))


@pytest.mark.slow
def test_m4_learns_mnist(tmp_path):
    data = ROOT / "data" if (ROOT / "data").is_dir() else tmp_path / "data"
    options = ["--epochs", "2", "--data-dir", data, "--output-dir", tmp_path, "--images-dir", tmp_path]
    subprocess.run([sys.executable, ROOT / "train_M4.py", "--device", "cpu", *options], check=True, cwd=tmp_path)
    assert history(tmp_path)[-1]["test_acc"] >= 98.5


def test_several_seeds_same_seed_same_figures(run_script, tmp_path):
    options = ("--epochs", "1", "--target", "99.9", "--seeds")
    done = run_script("train_M4.py", *options, "[3, 4]")
    assert done.returncode == 3 and "not judged, the run is shorter" in done.stdout
    assert [line.split()[0] for line in done.stdout.splitlines() if "epoch=" in line] == ["seed=3", "seed=4"]
    assert run_script("train_M4.py", *options, "3", output="again").returncode == 3
    again, three, four = tmp_path / "again", tmp_path / "out" / "seed-3", tmp_path / "out" / "seed-4"
    assert history(again) == history(three) != history(four)
    assert same_weights(again, three) and not same_weights(again, four)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert list(summary["seeds"]) == ["3", "4"]
    finals = [history(directory)[-1]["test_acc"] for directory in (three, four)]
    assert summary["final_test_acc"]["mean"] == pytest.approx(sum(finals) / 2)
    assert summary["final_test_acc"]["min"] == min(finals)


def test_on_a_terminal_there_is_a_bar(run_script):
    done = run_script("train_M1.py", "--epochs", "1", before="sys.stderr.isatty = lambda: True")
    assert done.returncode == 0 and "epoch 1: " in done.stderr


MISTAKES = [
    ("--epochs 0", "from 1"),
    ("--max-lr nan", "nan"),
    ("--target 101", "from 1 to 100,"),
    ("--seeds -1", "--seeds"),
    ("--seeds []", "--seeds"),
    ("--device cuda:99", "--device"),
    ("--precision float16", "bfloat16"),
    ("--device meta", "--device"),
    ("--seeds 1 01", "--seeds"),
    ("--resume perhaps", "perhaps"),
    ("--lernrate 3", "--lernrate"),
]


@pytest.mark.parametrize("options, word", MISTAKES)
def test_a_mistake_is_told_in_one_line(options, word, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        utils.run(lambda: utils.parse_args("M4", "", 128, 0.01, options.split()))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and word in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_sagemaker_sets_the_defaults(monkeypatch, tmp_path):
    for name in ("MODEL_DIR", "OUTPUT_DATA_DIR", "CHANNEL_TRAIN"):
        monkeypatch.setenv(f"SM_{name}", str(tmp_path / name))
    argv = ["--batch_size", "64", "--resume", "True", "--_tuning_objective_metric", "test:accuracy", "--predict", "x"]
    args = utils.parse_args("M4", "", 128, 0.01, argv)
    assert (args.batch_size, args.resume, args.read_only_data) == (64, True, True)
    assert args.output_dir == tmp_path / "MODEL_DIR" and args.images_dir == tmp_path / "OUTPUT_DATA_DIR"
    assert args.data_dir == tmp_path / "CHANNEL_TRAIN" and not args.data_dir.exists()
    args = utils.parse_args("M4", "", 128, 0.01, [*argv, "--data-dir", f"{tmp_path}/x/../CHANNEL_TRAIN"])
    assert args.read_only_data
    assert not utils.parse_args("M4", "", 128, 0.01, [*argv, "--data-dir", f"{tmp_path}/x"]).read_only_data
    monkeypatch.setenv("SM_CHANNEL_TRAINING", str(tmp_path / "first"))
    assert utils.parse_args("M4", "", 128, 0.01, argv).data_dir == tmp_path / "first"


def test_the_reason_of_a_failure_is_left_for_sagemaker(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(utils, "SAGEMAKER", tmp_path)
    (tmp_path / "output").mkdir()
    (tmp_path / "checkpoints").mkdir()
    args = utils.parse_args("M4", "", 128, 0.01, ["--predict", "x.png"])
    assert args.resume and args.checkpoint_dir == tmp_path / "checkpoints"
    monkeypatch.setattr(sys.stderr, "write", lambda text: os.close(-1))  # as a closed stderr does: OSError
    assert utils.fail("no\nroom " + "x" * 2000) == 2
    reason = (tmp_path / "output" / "failure").read_text()
    assert reason.startswith("error: no room x") and len(reason) == 1024


def test_only_the_first_of_several_processes_trains(run_script, tmp_path):
    done = run_script("train_M1.py", RANK="1")
    assert done.returncode == 0 and "rank 0" in done.stdout and not (tmp_path / "out").exists()


@pytest.mark.parametrize("target, status", [("99.5", 0), ("99.51", 3), (None, 0)])
def test_target_is_held_by_each_of_the_last_five_epochs(target, status, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = utils.parse_args("M4", "", 128, 0.01, ["--epochs", "7", *([] if target is None else ["--target", target])])
    average = utils.weight_average(NETWORKS["M4"](), 0.9)
    record = {"seed": 1, "history": []}
    for epoch, score in enumerate([90.0, 99.9, 99.5, 99.6, 99.7, 99.5, 99.8], 1):
        others = dict.fromkeys(("train_loss", "train_acc", "test_loss", "seconds"), 1.0)
        record["history"].append({"epoch": epoch, "test_acc": score, **others})
    utils.save_outputs(args, record, average)
    data = utils.Data(None, None, *draw_digits(20, 1))
    assert utils.finish(args, average, data, [record]) == status
    assert ("missed" in capsys.readouterr().out) == (status == 3)
    utils.lock()


def test_only_plain_constants_are_part_of_the_recipe(tmp_path):
    args = utils.parse_args("M4", "", 128, 0.01, ["--output-dir", str(tmp_path), "--predict", "x"])
    constants = {"RATE": 0.1, "NONE": None, "NET": NETWORKS["M4"], "T": torch.ones(1), "OS": os, "lower": 1}
    config = utils.begin(args, 1, constants, {})["config"]
    assert config["rate"] == 0.1 and config["none"] is None and not {"net", "t", "os", "lower"} & set(config)


def test_the_figures_are_those_of_the_results(capsys):
    runs = figures.read_results(figures.RESULTS)
    figures.print_ladder(runs)
    readme, tables = (ROOT / "README.md").read_text(encoding="utf-8"), capsys.readouterr().out
    assert all(line in readme for line in tables.splitlines()) and tables.count("\n") == 7
    for name in figures.LADDER:
        final = figures.last(runs[name])
        words = f"{final.mean():.2f}% on average over seeds 1 to {len(final)}, lowest {final.min():.2f}; never below "
        script = " ".join((ROOT / f"train_{name}.py").read_text().split())
        assert f"{words}{figures.lowest(runs[name])} in the" in script
        section = " ".join(readme.partition(f"## {name}: ")[2].partition("<details>")[0].split())
        assert f"**Result**: {final.mean():.2f}% over" in section
        assert f"never below {figures.lowest(runs[name])} in the last five epochs" in section
    figures.print_ablation(runs)
    tables = capsys.readouterr().out
    assert all(line in readme for line in tables.splitlines()) and tables.count("\n") == 24
    assert len(figures.draw_ladder(runs).axes) == 2
    points = figures.draw_ablation(runs).axes[0].get_lines()[0].get_xdata()
    assert points == pytest.approx(figures.differences(runs, "without straightening")) and len(points) == 5


def test_evidence_is_made_from_runs(small_md5, data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(utils, "save_picture", lambda *args: None)
    rows = [figures.WHOLE, "without straightening", "AdamW instead of Muon", "emulated bfloat16", "M1 with M4's recipe"]
    options = ["--holdout", "100", "--batch-size", "50", "--data-dir", str(data_dir), "--device", "cpu"]
    command = ["ablation.py", "--rows", *rows, "--seeds", "1", "2", "--runs", str(tmp_path), *options, "--epochs", "2"]
    monkeypatch.setattr(sys, "argv", command)
    ablation.main()
    figures.write_results(tmp_path, tmp_path / "results.csv")
    assert "of 100 held-out" in (tmp_path / "results.csv").read_text()
    runs = figures.read_results(tmp_path / "results.csv")
    assert list(runs) == rows and all(list(run) == [1, 2] and len(run[1]) == 2 for run in runs.values())
    assert len({runs[row][1][1]["test_loss"] for row in rows}) == len(rows)
    plain = tmp_path / "ablation" / "without-straightening" / "seed-1" / "metrics.json"
    assert json.loads(plain.read_text())["config"]["straighten"] == [None, None]
    figures.print_ablation(runs)
    difference = figures.last(runs[rows[-1]]).mean() - figures.last(runs[rows[0]]).mean()
    assert f"| accuracy | {difference:+.2f} ± " in capsys.readouterr().out
    for run, seed, images, message in (
        ("M4", 1, {"holdout": 0}, None),
        ("ablation/6-epochs", 1, {"limit": 50}, "another --holdout or --limit"),
        ("M4", 1, {"holdout": 0, "limit": 50}, "not with all of MNIST"),
        ("M4", 2, {"holdout": 0}, "different settings"),
    ):
        record = json.loads(plain.read_text())
        record["config"] |= images
        folder = tmp_path / run / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.json").write_text(json.dumps(record))
        with pytest.raises(utils.UserError, match=message) if message else contextlib.nullcontext():
            figures.write_results(tmp_path, tmp_path / "results.csv")
    utils.lock()


def test_bfloat16_is_rounded_as_torch_rounds_it():
    pixels, weight = torch.randn(2, 4, 9, 9), torch.randn(3, 4, 3, 3)
    assert torch.equal(ablation.bfloat16_conv2d(pixels, weight), torch.conv2d(pixels, weight))
    with torch.autocast("cpu", torch.bfloat16):
        ours, native = ablation.bfloat16_conv2d(pixels, weight), torch.conv2d(pixels, weight)
    torch.testing.assert_close(ours, native, rtol=0.01, atol=0.01)  # also the type; one step of bfloat16 is 0.8%


def test_digits_are_drawn_in_each_kind_of_picture(tmp_path, monkeypatch, capsys):
    torch.save(NETWORKS["M4"]().state_dict(), tmp_path / "model.pt")
    images, labels = draw_digits(6, 5)
    assert len(figures.draw_augmentation(images[1:]).axes) == 50
    # An M4 that sees the first digit everywhere. A 0 of seven segments is a frame, so a 1 is the first.
    monkeypatch.setattr(NETWORKS["M4"], "forward", lambda self, pixels: 20 * torch.eye(10)[labels[1:2]])
    figures.print_digits(tmp_path / "model.pt", images[1:], labels[1:], 2)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[3:]]
    assert [row[1] for row in rows] == ["50.00%", "0.00%", "50.00%"]
    assert [row[-1] for row in rows] == ["0.00% |", "100.00% |", "0.00% |"] and len(rows[0]) == 9


def test_two_scripts_differ_in_model_recipe_and_docstring_only():
    bodies = [(ROOT / f"train_{name}.py").read_text().partition("def main")[2] for name in ("M3", "M4")]
    assert bodies[0].replace("M3", "M4") == bodies[1] and "for epoch in" in bodies[0]


def test_names_that_cannot_be_shown_are_shown_otherwise(run_script, tmp_path):
    narrow = "sys.stdout.reconfigure(encoding='cp1252', errors='strict')"
    done = run_script("train_M1.py", "--epochs", "1", output="\u6570\u5b57", before=narrow, pictures=True)
    assert done.returncode == 0 and done.stderr == "" and r"\u6570\u5b57" in done.stdout

"""The four scripts as processes of their own, on the generated digits, and the command line."""

import contextlib
import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import draw_digits
from matplotlib.image import imread

import models
import utils

LINE = r"epoch=\d+ lr=[0-9.]+ train_loss=[0-9.]+ train_acc=[0-9.]+ test_loss=[0-9.]+ test_acc=[0-9.]+ seconds=[0-9.]+"


def history(directory):
    epochs = json.loads((directory / "metrics.json").read_text())["history"]
    return [{key: value for key, value in epoch.items() if key != "seconds"} for epoch in epochs]


def same_weights(one, other):
    one, other = (torch.load(d / "model.pt", weights_only=True) for d in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", ["M1", "M2", "M3", "M4"])
def test_script_runs_to_the_end(name, run_script, tmp_path):
    # The first of three epochs is trained on cropped images, where a recipe says so.
    # One of them from scratch: what a fork has imported already may hide a missing import.
    start = subprocess.run if name == "M4" else None
    done = run_script(f"train_{name}.py", "--epochs", "3", "--batch_size", "32", start=start)
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert [bool(re.fullmatch(LINE, line)) for line in lines[:4]] == [True, True, True, False]
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == ["checkpoint.pt", "images", "metrics.json", "model.pt"]
    model = getattr(models, f"MNIST_CNN_{name}")()
    model.load_state_dict(torch.load(out / "model.pt", weights_only=True))
    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics) == {"model", "parameters", "seed", "config", "environment", "history", "summary"}
    assert metrics["parameters"] == sum(p.numel() for p in model.parameters())
    assert metrics["config"]["batch_size"] == 32 and metrics["model"] == name and metrics["seed"] == 1
    keys = ["epoch", "lr", "train_loss", "train_acc", "test_loss", "test_acc", "seconds"]
    assert [list(epoch) for epoch in metrics["history"]] == [keys] * 3
    accuracies = [epoch["test_acc"] for epoch in metrics["history"]]
    assert metrics["summary"]["best_test_acc"] == max(accuracies)
    assert metrics["summary"]["last5_min"] == min(accuracies)
    assert metrics["summary"]["final_test_acc"] == accuracies[-1]
    for what in ("training", "misclassified", "confusion"):
        picture = imread(out / "images" / f"{name}_{what}.png")
        assert min(picture.shape[:2]) > 100 and picture[..., :3].std() > 0.02
    # What the saved weights score is what the last epoch says.
    images, labels = draw_digits(200, 2)
    scored = utils.evaluate(model, images.unsqueeze(1), labels.long())[1]
    assert scored == pytest.approx(accuracies[-1])


def test_several_seeds_same_seed_same_figures(run_script, tmp_path):
    options = ("--epochs", "1", "--target", "99.9", "--seeds")
    done = run_script("train_M4.py", *options, "[3, 4]")
    assert done.returncode == 3 and "missed" in done.stdout
    assert run_script("train_M4.py", *options, "3", output="again").returncode == 3
    again, three, four = tmp_path / "again", tmp_path / "out" / "seed-3", tmp_path / "out" / "seed-4"
    assert history(again) == history(three) != history(four)
    assert same_weights(again, three) and not same_weights(again, four)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [row["seed"] for row in summary["seeds"]] == [3, 4]
    finals = [history(directory)[-1]["test_acc"] for directory in (three, four)]
    assert summary["final_test_acc"]["mean"] == pytest.approx(sum(finals) / 2)
    assert summary["final_test_acc"]["min"] == min(finals)


def test_killed_and_resumed_is_bit_for_bit_the_same(run_script, tmp_path):
    options = ("--epochs", "8", "--batch-size", "32")  # of which three are trained on cropped images
    assert run_script("train_M4.py", *options, output="whole").returncode == 0
    # On two threads, where the whole run had one: that must make no difference either.
    two = {"output": "killed", "OMP_NUM_THREADS": "2"}
    process = run_script("train_M4.py", *options, **two, start=subprocess.Popen)
    process.stdout.readline(), process.stdout.readline()
    process.kill()
    process.communicate()
    done = run_script("train_M4.py", *options, "--resume", **two)
    assert done.returncode == 0 and "epoch=1 " not in done.stdout and "epoch=8 " in done.stdout
    assert history(tmp_path / "killed") == history(tmp_path / "whole")
    assert same_weights(tmp_path / "killed", tmp_path / "whole")
    done = run_script("train_M4.py", *options, "--max-lr", "0.5", "--resume", output="killed")
    assert done.returncode == 2 and "max_lr" in done.stderr and len(done.stderr.splitlines()) == 1
    done = run_script("train_M3.py", *options, "--resume", output="killed")
    assert done.returncode == 2 and "M4" in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="no SIGTERM there")
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_with_the_command_that_resumes(run_script, number, status):
    # A shell's background job, which the tests may be, ignores SIGINT from the start.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    two = {"OMP_NUM_THREADS": "2"}
    process = run_script("train_M2.py", "--epochs", "500", **two, start=subprocess.Popen, before=heed)
    process.stdout.readline()
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == status and "--resume" in err and "Traceback" not in err


def test_damaged_channel_and_checkpoint_exit_with_2(run_script, tmp_path):
    done = run_script("train_M1.py", "--output-dir", str(tmp_path / "file" / "x"), "--limit", "9999")
    assert done.returncode == 2 and "--limit" in done.stderr and len(done.stderr.splitlines()) == 1
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "checkpoint.pt").write_bytes(b"not a checkpoint")
    done = run_script("train_M1.py", "--resume")
    assert done.returncode == 2 and "checkpoint" in done.stderr and len(done.stderr.splitlines()) == 1


MISTAKES = [
    ("--epochs 0", "1 to 100,000"),
    ("--epochs 3.0", "3.0"),
    (f"--epochs 1{'0' * 400}", "whole number"),
    ("--batch-size 1", "2 to 60,000"),
    ("--max-lr nan", "nan"),
    ("--max-lr -1", "--max-lr"),
    ("--max-lr inf", "inf"),
    ("--seeds -1", "--seeds"),
    ("--seeds 1 1", "--seeds"),
    ("--seeds x", "x"),
    ("--seeds []", "--seeds"),
    ("--device tpu", "tpu"),
    ("--precision float16", "bfloat16"),
    ("--cuda-graph perhaps", "perhaps"),
    ("--device cuda:99", "cuda:99"),
    ("--holdout 59001", "59,000"),
    ("--limit 0", "--limit"),
    ("--target 101", "101"),
    ("--resume perhaps", "perhaps"),
    ("--epoch 3", "--epochs"),
    ("--lernrate 3", "--help"),
]


@pytest.mark.parametrize("options, word", MISTAKES)
def test_a_mistake_is_told_in_one_line(options, word, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        utils.parse_args("M4", "", 128, 0.01, options.split())
    err = capsys.readouterr().err
    assert stop.value.code == 2 and word in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("capable", [True, False, None])
def test_auto_precision_goes_by_device_and_processor(capable, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": capable}, raising=False)
    if capable is None:  # an older release of torch
        monkeypatch.delattr(torch.cpu, "get_capabilities")
    args = utils.parse_args("M4", "", 128, 0.01, ["--device", "cpu"])
    assert args.precision == ("bfloat16" if capable else "float32")
    assert utils.recipe_config(args, {})["precision"] == args.precision
    assert utils.precision("auto", torch.device("cuda")) == "float32"


def test_bfloat16_needs_a_gpu_that_has_it(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name, answer in (("is_available", True), ("device_count", 1)):
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    # What torch says of an older GPU, which emulates it.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert (
        utils.parse_args("M4", "", 128, 0.01, ["--device", "cuda", "--output-dir", "a"]).precision
        == "float32"
    )
    with pytest.raises(SystemExit) as stop:
        utils.parse_args("M4", "", 128, 0.01, ["--device", "cuda", "--precision", "bfloat16"])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "no bfloat16" in err and len(err.splitlines()) == 1


def test_a_run_goes_on_in_its_own_precision_only(run_script):
    assert run_script("train_M1.py", "--epochs", "1", "--precision", "bfloat16").returncode == 0
    done = run_script("train_M1.py", "--epochs", "1", "--precision", "float32", "--resume")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "precision bfloat16, not float32" in done.stderr and "--precision" in done.stderr


def test_sagemaker_sets_the_defaults(monkeypatch, tmp_path):
    for name in ("MODEL_DIR", "OUTPUT_DATA_DIR", "CHANNEL_TRAIN"):
        monkeypatch.setenv(f"SM_{name}", str(tmp_path / name))
    argv = ["--batch_size", "64", "--resume", "true", "--_tuning_objective_metric", "test:accuracy"]
    args = utils.parse_args("M4", "", 128, 0.01, argv)
    assert (args.batch_size, args.resume, args.read_only_data) == (64, True, True)
    assert args.output_dir == tmp_path / "MODEL_DIR" and args.images_dir == tmp_path / "OUTPUT_DATA_DIR"
    assert args.data_dir == tmp_path / "CHANNEL_TRAIN" and not args.data_dir.exists()
    monkeypatch.setenv("SM_CHANNEL_TRAINING", str(tmp_path / "first"))
    monkeypatch.setenv("SM_MODEL_DIR", str(tmp_path / "other"))
    assert utils.parse_args("M4", "", 128, 0.01, []).data_dir == tmp_path / "first"


@pytest.mark.parametrize("target, status", [("99.5", 0), ("99.51", 3), (None, 0)])
def test_target_is_held_by_each_of_the_last_five_epochs(target, status, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = utils.parse_args("M4", "", 128, 0.01, [] if target is None else ["--target", target])
    args.device = torch.device("cpu")
    scores = [90.0, 99.9, 99.5, 99.6, 99.7, 99.5, 99.8]
    keys = ("train_loss", "train_acc", "test_loss", "seconds")
    epochs = [
        {"epoch": n + 1, "test_acc": score, **dict.fromkeys(keys, 1.0)} for n, score in enumerate(scores)
    ]
    images, labels = draw_digits(20, 1)
    data = utils.Data(None, None, images.unsqueeze(1), labels.long())
    model = models.MNIST_CNN_M4()
    assert utils.finish(args, model, [utils.summarize(epochs)], [epochs], data) == status
    assert ("missed" in capsys.readouterr().out) == (status == 3)


def test_only_the_first_of_several_processes_trains(run_script, tmp_path):
    done = run_script("train_M1.py", RANK="1")
    assert done.returncode == 0 and "rank 0" in done.stdout and not (tmp_path / "out").exists()


def test_the_reason_of_a_failure_is_left_for_sagemaker(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(utils, "SAGEMAKER", tmp_path)
    (tmp_path / "output").mkdir()
    (tmp_path / "checkpoints").mkdir()
    args = utils.parse_args("M4", "", 128, 0.01, ["--predict", "x.png"])
    assert args.resume and args.checkpoint_dir == tmp_path / "checkpoints"
    with pytest.raises(SystemExit) as stop:
        utils.fail("no\nroom " + "x" * 2000)
    reason = (tmp_path / "output" / "failure").read_text()
    assert stop.value.code == 2 and reason.startswith("error: no room x") and len(reason) == 1024


def test_a_named_channel_is_read_only_too(monkeypatch, tmp_path):
    monkeypatch.setenv("SM_CHANNEL_TRAIN", str(tmp_path))
    args = utils.parse_args("M4", "", 128, 0.01, ["--predict", "x", "--data-dir", f"{tmp_path}/x/.."])
    assert args.read_only_data
    args = utils.parse_args("M4", "", 128, 0.01, ["--predict", "x", "--data-dir", f"{tmp_path}/x"])
    assert not args.read_only_data


def test_two_scripts_differ_in_model_recipe_and_docstring_only():
    root = Path(utils.__file__).parent
    bodies = []
    for name in ("M3", "M4"):
        body = (root / f"train_{name}.py").read_text().partition("def main")[2]
        bodies.append(body.replace(name, "Mx"))
    assert bodies[0] == bodies[1] and "for epoch in" in bodies[0]

"""Interruption, full disks, other people's files and other people's settings."""

import json
import os
import random
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, history, posix, refused, same_weights

import models
import utils

# Ctrl-C at the end of epoch $STOP. A shell's background job ignores SIGINT from the start.
CTRL_C = """
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
evaluate, calls = utils.evaluate, []
def stop(*args):
    calls.append(1)
    if len(calls) == int(os.environ["STOP"]):
        os.kill(os.getpid(), signal.SIGINT)
    return evaluate(*args)
utils.evaluate = stop
"""


def files(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.slow
@posix
def test_25_kills_at_any_moment_change_nothing(run_script, tmp_path):
    options = ("--epochs", "6", "--batch-size", "16", "--seeds", "1", "2", "--resume")
    start = time.perf_counter()
    assert run_script("train_M4.py", *options, output="whole", start=subprocess.run).returncode == 0
    whole = time.perf_counter() - start
    chance = random.Random(0)
    kills = 0
    while kills < 25:
        output = f"killed-{kills}"
        for _ in range(8):
            process = run_script("train_M4.py", *options, output=output, start=subprocess.Popen)
            try:
                process.communicate(timeout=chance.uniform(0, whole))
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                kills += 1
        assert run_script("train_M4.py", *options, output=output).returncode == 0
        for seed in ("seed-1", "seed-2"):
            assert history(tmp_path / output / seed) == history(tmp_path / "whole" / seed)
            assert same_weights(tmp_path / output / seed, tmp_path / "whole" / seed)


def test_killed_and_resumed_is_bit_for_bit_the_same(run_script, tmp_path):
    options = ("--epochs", "5", "--batch-size", "32")
    assert run_script("train_M4.py", *options, output="whole").returncode == 0
    process = run_script("train_M4.py", *options, output="killed", start=subprocess.Popen)
    assert any("epoch=1 " in line for line in process.stdout)
    process.kill()
    process.communicate()
    done = run_script("train_M4.py", *options, "--resume", output="killed")
    assert done.returncode == 0 and "epoch=1 " not in done.stdout and "epoch=5 " in done.stdout
    assert history(tmp_path / "killed") == history(tmp_path / "whole")
    assert same_weights(tmp_path / "killed", tmp_path / "whole")


def test_resuming_a_finished_run_writes_what_is_missing_and_another_recipe_is_refused(
    run_script, tmp_path
):
    options = ("--epochs", "2", "--resume")
    done = run_script("train_M4.py", *options)
    assert done.returncode == 0 and "epoch=1 " in done.stdout
    assert f"nothing to resume: there is no {tmp_path / 'out' / 'checkpoint.pt'}" in done.stdout
    refused(run_script("train_M4.py", *options, "--max-lr", "0.5"), "max_lr", "not 0.5")
    refused(run_script("train_M4.py", "--resume", "--epochs", "6"), "epochs 2, not 6")
    refused(run_script("train_M3.py", *options), "model M4, not M3")
    plain = "import train_M4\ntrain_M4.STRAIGHTEN = False\ntrain_M4.utils.launch(train_M4.main)"
    refused(run_script("train_M4.py", *options, before=plain), "straighten True, not False")
    (tmp_path / "out" / "model.pt").unlink()
    done = run_script("train_M4.py", *options)
    assert "2 of 2 epochs are done" in done.stdout and "epoch=" not in done.stdout
    assert done.returncode == 0 and (tmp_path / "out" / "model.pt").exists()
    assert not (tmp_path / "out" / "earlier").exists()


def test_each_epoch_says_on_what_it_was_trained(run_script, tmp_path):
    options = ("train_M1.py", "--epochs", "3", "--resume")
    assert run_script(*options, before=CTRL_C, STOP="2", OMP_NUM_THREADS="1").returncode == 130
    assert run_script(*options, OMP_NUM_THREADS="2").returncode == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    first, second, third = (row["environment"] for row in metrics["history"])
    assert first != second == third
    assert first.startswith("cpu, ") and f"torch {torch.__version__}" in first


def test_no_run_loses_the_files_of_an_earlier_one_and_ctrl_c_says_how_to_resume(
    run_script, tmp_path
):
    out = tmp_path / "out"
    one = ("train_M1.py", "--epochs", "1", "--images-dir", str(out))
    assert run_script(*one, pictures=True).returncode == 0
    first = sorted(files(out).values())
    assert len(first) == 6
    # A run that is stopped in its first epoch changes nothing, and does not offer to resume it.
    done = run_script(*one, before=CTRL_C, STOP="1")
    assert done.returncode == 130 and not done.stderr
    assert sorted(files(out).values()) == first
    # Another one of two seeds says where the files are, and no pattern for runs finds them there.
    two = (*one, "--seeds", "1", "2")
    done = run_script(*two, pictures=True)
    assert f"the files of an earlier run are now in {out / 'earlier'}" in done.stdout
    assert sorted(files(out / "earlier").values()) == first
    assert len(list(out.glob("*/metrics.json"))) == 2
    # One that is stopped in its first seed goes on with its own second seed, not with the old one.
    seeds = sorted([*files(out / "seed-1").values(), *files(out / "seed-2").values()])
    done = run_script(*two, "--max-lr", "0.001", before=CTRL_C, STOP="2")
    assert done.returncode == 130 and "--resume true" in done.stderr
    assert "Traceback" not in done.stderr
    moved = [*files(out / "seed-1" / "earlier").values(), *files(out / "seed-2").values()]
    assert sorted(moved) == seeds
    assert run_script(*two, "--max-lr", "0.001", "--resume").returncode == 0


def test_a_folder_for_pictures_may_hold_other_models(run_script, tmp_path):
    assert run_script("train_M2.py", "--epochs", "1", output="other").returncode == 0
    before = files(tmp_path / "other")
    options = ("--epochs", "1", "--images-dir", str(tmp_path / "other"))
    assert run_script("train_M1.py", *options).returncode == 0
    assert files(tmp_path / "other") == before


@posix
def test_a_closed_pipe_costs_no_epoch(run_script, tmp_path):
    process = run_script("train_M1.py", "--epochs", "50", start=subprocess.Popen)
    assert any("epoch=1 " in line for line in process.stdout)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=60) == 2
    assert "Broken pipe" in err and len(err.splitlines()) == 1
    kept = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["history"]
    assert 1 < len(kept) < 50  # with the epoch whose line nobody read


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is of Linux")
@pytest.mark.parametrize("streams, status", [("2>&-", 0), (">&- 2>&-", 0), (">/dev/full", 2)])
def test_closed_and_full_streams(run_script, tmp_path, streams, status):
    def start(command, **settings):
        shell = ["sh", "-c", f'exec "$@" {streams}', "sh", *command]
        return subprocess.run(shell, check=False, **settings)

    done = run_script("train_M1.py", "--epochs", "1", start=start)
    assert done.returncode == status and "Traceback" not in done.stderr
    assert (tmp_path / "out" / "model.pt").exists() == (status == 0)


@posix
def test_the_directory_is_locked_while_a_run_lasts_and_no_longer(run_script):
    first = run_script("train_M1.py", "--epochs", "500", start=subprocess.Popen)
    assert any("epoch=1 " in line for line in first.stdout)
    refused(run_script("train_M1.py", "--epochs", "1"), "another run is writing into")
    first.kill()
    first.communicate()
    # As in IPython, where the process goes on: one that is interrupted, and another.
    twice = CTRL_C + "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
    twice += "except SystemExit as end:\n    print('status', end.code)\n"
    done = run_script("train_M1.py", "--epochs", "1", before=twice, STOP="1")
    assert done.returncode == 0 and "status 130" in done.stdout


@posix
def test_full_disk_keeps_what_was_there(run_script, tmp_path):
    assert run_script("train_M4.py", "--epochs", "1").returncode == 0
    before = sorted(files(tmp_path / "out").values())
    full = "import resource\n"
    full += "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))"
    done = run_script("train_M4.py", "--epochs", "1", "--max-lr", "0.001", before=full)
    refused(done, "checkpoint.pt could not be written", "File too large")
    assert sorted(files(tmp_path / "out").values()) == before


@pytest.mark.parametrize("code", [22, 95])
def test_a_drive_without_fsync_and_a_file_that_is_held_for_a_moment(tmp_path, monkeypatch, code):
    def no_fsync(descriptor):
        raise OSError(code, "not supported")

    def held(source, target):
        monkeypatch.setattr(os, "replace", replace)
        raise PermissionError(13, "used by another process")

    replace = os.replace
    monkeypatch.setattr(os, "fsync", no_fsync)
    monkeypatch.setattr(os, "replace", held)
    utils.write_file(tmp_path / "file", lambda file: file.write(b"content"))
    assert files(tmp_path) == {tmp_path / "file": b"content"}


def test_a_file_that_cannot_be_written_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    def broken(descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(utils.UserError, match="file could not be written.*Input/output"):
        utils.write_file(tmp_path / "file", lambda file: file.write(b"content"))
    assert not files(tmp_path)


def test_a_picture_that_fails_costs_a_message_and_not_the_results(run_script, tmp_path):
    broken = "def fail(*args): raise ValueError('no ink')\nutils.plot_confusion = fail"
    done = run_script("train_M1.py", "--epochs", "1", before=broken, pictures=True)
    assert done.returncode == 0 and "M1_confusion.png could not be drawn: no ink" in done.stderr
    assert (tmp_path / "out" / "images" / "M1_misclassified.png").exists()


MEMORY = [
    (MemoryError(), "not enough memory"),
    (torch.OutOfMemoryError("CUDA out of memory. GPU 0 has 1 GiB"), "GPU 0"),
    (RuntimeError("CUDA error: out of memory\nCUDA kernel errors"), "CUDA error"),
    (
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),
        "9 bytes",
    ),
]


@pytest.mark.parametrize("error, words", MEMORY)
def test_memory_that_runs_out_is_told_in_one_line(capsys, error, words):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        utils.launch(main)
    line = capsys.readouterr().err
    assert stop.value.code == 2 and words in line and line.count("\n") == 1
    # Another device keeps the recipe, a smaller batch does not.
    assert line.index("--device") < line.index("--batch-size")


BUGS = [TypeError("augment() got 3"), FileNotFoundError("recipe.txt"), RuntimeError("allocated")]


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_keeps_its_traceback(bug):
    def main():
        raise bug

    with pytest.raises(type(bug)):
        utils.launch(main)


@posix
def test_output_that_cannot_be_a_directory(run_script, tmp_path):
    (tmp_path / "file").write_text("")
    refused(run_script("train_M4.py", output="file"), "file", "File exists")
    refused(run_script("train_M4.py", output="file/below"), "file", "Not a directory")


def test_loss_that_is_no_number_keeps_the_checkpoint(run_script, tmp_path):
    # Its rate is no number from the second epoch on.
    poison = "import torch\nstep = torch.optim.AdamW.step\ncalls = []\n"
    poison += "def broken(self, *args):\n    calls.append(1)\n    if len(calls) > 15:\n"
    poison += "        self.param_groups[0]['lr'] = float('nan')\n    return step(self, *args)\n"
    poison += "torch.optim.AdamW.step = broken"
    options = ("train_M1.py", "--epochs", "3", "--batch-size", "60")
    refused(run_script(*options, before=poison), "no finite loss in epoch 2", "--max-lr")
    assert [path.name for path in files(tmp_path / "out")] == ["checkpoint.pt"]
    done = run_script(*options, "--resume")
    assert done.returncode == 0 and "epoch=1 " not in done.stdout and "epoch=2 " in done.stdout


def test_files_with_code_are_refused(run_script, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    torch.save({"state_dict": {}}, out / "checkpoint.pt")  # somebody else's
    refused(run_script("train_M2.py", "--resume"), "cannot resume from", "checkpoint.pt")
    torch.save({"model": os.mkdir}, out / "model.pt")
    with pytest.raises(utils.UserError, match="model.pt cannot be used"):
        utils.load_file(out / "model.pt")


def test_a_flipped_bit_in_a_model_is_found(tmp_path):
    path = tmp_path / "model.pt"
    model = models.MNIST_CNN_M4()
    torch.save(model.state_dict(), path)
    content = bytearray(path.read_bytes())
    weights = model.layers[0].weight.detach().numpy().tobytes()
    content[content.index(weights)] ^= 1
    path.write_bytes(content)
    with pytest.raises(utils.UserError, match="model.pt cannot be used.*checksum"):
        utils.load_file(path)


def test_an_old_python_is_told_at_once(tmp_path):
    # The version that utils sees; Python 3.9 itself may not be here.
    code = "import sys, tarfile, tempfile, PIL.Image, torch.optim.swa_utils, tqdm\n"
    code += "sys.version_info = (3, 9)\nimport utils"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    refused(done, "Python 3.10")

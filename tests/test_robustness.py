"""Interruption, full disks, other people's files and other people's settings."""

import os
import random
import subprocess
import time

import pytest
import torch
from conftest import history, posix, refused, same_weights

import models
import utils


def files(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.slow
@posix
def test_25_kills_at_any_moment_change_nothing(run_script, tmp_path):
    options = ("--epochs", "6", "--batch-size", "16", "--seeds", "1", "2", "--resume")
    start = time.perf_counter()
    assert run_script("train_M4.py", *options, output="whole", start=subprocess.run).returncode == 0
    whole = time.perf_counter() - start
    chance, kills = random.Random(0), 0
    while kills < 25:
        output = f"killed-{kills}"
        for _ in range(8):
            # The whole run had one thread: the bits are the same.
            process = run_script("train_M4.py", *options, output=output, OMP_NUM_THREADS="2", start=subprocess.Popen)
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
    options = ("--epochs", "5", "--batch-size", "32")  # of which two leave out the border
    assert run_script("train_M4.py", *options, output="whole").returncode == 0
    two = {"output": "killed", "OMP_NUM_THREADS": "2"}
    process = run_script("train_M4.py", *options, **two, start=subprocess.Popen)
    assert any("epoch=1 " in line for line in process.stdout)
    process.kill()
    process.communicate()
    done = run_script("train_M4.py", *options, "--resume", **two)
    assert done.returncode == 0 and "epoch=1 " not in done.stdout and "epoch=5 " in done.stdout
    assert history(tmp_path / "killed") == history(tmp_path / "whole")
    assert same_weights(tmp_path / "killed", tmp_path / "whole")
    # Another recipe's and another model's checkpoint are refused by name; a finished run is not repeated.
    again = (*options, "--resume")
    refused(run_script("train_M4.py", *again, "--max-lr", "0.5", output="killed"), "max_lr 0.0085, not 0.5")
    refused(run_script("train_M4.py", *again, "--epochs", "6", output="killed"), "epochs 5, not 6")
    refused(run_script("train_M4.py", *again, "--precision", "bfloat16", output="killed"), "precision float32")
    refused(run_script("train_M3.py", *again, output="killed"), "model M4, not M3")
    (tmp_path / "killed" / "model.pt").unlink()
    done = run_script("train_M4.py", *again, output="killed")
    assert f"{tmp_path / 'killed' / 'checkpoint.pt'}: 5 of 5 epochs are done" in done.stdout
    assert done.returncode == 0 and "epoch=" not in done.stdout and (tmp_path / "killed" / "model.pt").exists()
    done = run_script("train_M1.py", "--epochs", "1", "--resume", output="new")
    assert done.returncode == 0 and "epoch=1 " in done.stdout
    assert f"There is no {tmp_path / 'new' / 'checkpoint.pt'} to resume from: training from the first" in done.stdout


@posix
@pytest.mark.parametrize("number, status", [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_ends_the_run_with_the_command_that_resumes(run_script, tmp_path, number, status):
    # A shell's background job, which the tests may be, ignores SIGINT from the start.
    stop = "import os, signal; signal.signal(signal.SIGINT, signal.default_int_handler); real = utils.train\n"
    stop += f"def train(*args): return os.kill(os.getpid(), signal.{number}) if args[-1] == 3 else real(*args)\n"
    done = run_script("train_M2.py", "--epochs", "4", before=stop + "utils.train = train")
    assert done.returncode == status and "--resume true" in done.stderr and "Traceback" not in done.stderr
    # A run that is stopped before it has saved anything must not name what an older run has left.
    done = run_script("train_M2.py", "--epochs", "4", before=f"{stop.replace('== 3', '== 1')}utils.train = train")
    assert done.returncode == status and not done.stderr
    done = run_script("train_M2.py", "--epochs", "4", "--resume")
    assert done.returncode == 0 and "epoch=2 " not in done.stdout and "epoch=3 " in done.stdout


@posix
def test_a_closed_pipe_costs_no_epoch(run_script, tmp_path):
    process = run_script("train_M1.py", "--epochs", "50", start=subprocess.Popen)
    assert any("epoch=1 " in line for line in process.stdout)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=60) == 2 and "Broken pipe" in err and len(err.splitlines()) == 1
    kept = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["record"]["history"]
    assert 1 < len(kept) < 50  # with the epoch whose line nobody read


@posix
def test_the_directory_is_locked_while_a_run_lasts_and_no_longer(run_script, tmp_path):
    first = run_script("train_M1.py", "--epochs", "500", start=subprocess.Popen)
    first.stdout.readline()
    refused(run_script("train_M1.py", "--epochs", "1"), "another run is writing into")
    first.kill()
    first.communicate()
    # As in IPython, where the process goes on: a run, one that is interrupted, and another.
    script = "for stop in (False, True, False):\n    real = utils.evaluate\n    if stop:\n"
    script += "        def evaluate(*args): raise KeyboardInterrupt\n        utils.evaluate = evaluate\n"
    script += "    try:\n        runpy.run_path(sys.argv[0], run_name='__main__')\n"
    script += "    except SystemExit as end:\n        print('status', end.code)\n    utils.evaluate = real\n"
    done = run_script("train_M1.py", "--epochs", "1", before=script)
    assert [line for line in done.stdout.splitlines() if "status" in line] == ["status 0", "status 130", "status 0"]


@posix
def test_full_disk_keeps_what_was_there(run_script, tmp_path):
    assert run_script("train_M4.py", "--epochs", "1").returncode == 0
    before = files(tmp_path / "out")
    for limit in (20_000, 60_000):
        full = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))"
        done = run_script("train_M4.py", "--epochs", "1", "--max-lr", "0.001", before=full)
        refused(done, "checkpoint.pt could not be written", "File too large")
        assert files(tmp_path / "out") == before


def test_a_picture_that_fails_costs_a_message_and_not_the_results(run_script, tmp_path):
    broken = "def fail(*args): raise ValueError('no ink')\nutils.plot_confusion = fail"
    done = run_script("train_M1.py", "--epochs", "1", before=broken, pictures=True)
    assert done.returncode == 0 and "M1_confusion.png could not be drawn: no ink" in done.stderr
    assert "next: python" in done.stdout and (tmp_path / "out" / "images" / "M1_misclassified.png").exists()


def test_memory_that_runs_out(capsys):
    with pytest.raises(SystemExit) as stop:
        utils.run(lambda: torch.empty(1 << 50))
    assert stop.value.code == 2 and "memory" in capsys.readouterr().err


@posix
def test_output_that_cannot_be_a_directory(run_script, tmp_path):
    (tmp_path / "file").write_text("")
    refused(run_script("train_M4.py", output="file"), "file", "File exists")
    refused(run_script("train_M4.py", output="file/below"), "file", "Not a directory")


def test_loss_that_is_no_number_keeps_the_checkpoint(run_script, tmp_path):
    # Ten steps and one evaluation an epoch: the 25th loss is one of epoch 3.
    poison = "import torch.nn.functional as F; real, calls = F.cross_entropy, []; "
    poison += "F.cross_entropy = lambda *a: calls.append(1) or real(*a) * (float('nan') if len(calls) > 24 else 1)"
    options = ("--epochs", "4", "--batch-size", "60")
    refused(run_script("train_M1.py", *options, before=poison), "not finite in epoch 3", "--max-lr")
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_file()] == ["checkpoint.pt"]
    done = run_script("train_M1.py", *options, "--resume")
    assert done.returncode == 0 and "epoch=2 " not in done.stdout and "epoch=3 " in done.stdout


def test_files_with_code_are_refused(run_script, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    torch.save({"state_dict": {}}, out / "checkpoint.pt")  # somebody else's
    refused(run_script("train_M2.py", "--resume"), "cannot resume from", "checkpoint.pt")
    torch.save({"model": os.mkdir}, out / "model.pt")
    with pytest.raises(utils.UserError, match="model.pt cannot be used"):
        utils.load_file(out / "model.pt")


def test_a_flipped_bit_in_a_model_is_found(tmp_path):
    path, model = tmp_path / "model.pt", models.MNIST_CNN_M4()
    torch.save(model.state_dict(), path)
    content = bytearray(path.read_bytes())
    content[content.index(model.conv6.weight.detach().numpy().tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(utils.UserError, match="model.pt cannot be used.*checksum"):
        utils.load_file(path)

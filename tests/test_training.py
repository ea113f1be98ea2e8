"""Augmentation, optimizer, schedule, average, and what an epoch of training and an evaluation do."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import draw_digits
from torch import nn

import models
import utils

NONE = {"rotation": 0, "shear": 0, "scale": 0, "shift": 0}


@pytest.fixture
def dot():
    """A (1, 1, 28, 28) image with one soft dot above the center."""
    image = torch.zeros(1, 1, 28, 28)
    image[0, 0, 6, 14] = 1
    return nn.functional.avg_pool2d(image, 3, 1, 1) * 9


def fixed_draw(monkeypatch, *values):
    """Let the five random numbers of an image be `values`, each from -1 to 1."""
    fixed = (torch.tensor(values) + 1).div(2).view(5, 1)
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: fixed.expand(shape))


@pytest.mark.parametrize("limit", [{"rotation": 20}, {"shear": 20}, {"scale": 0.3}, {"shift": 0.2}])
def test_each_image_gets_its_own_draw(limit, dot):
    torch.manual_seed(0)
    out = utils.augment_batch(dot.expand(16, 1, 28, 28), **(NONE | limit))
    assert out.shape == (16, 1, 28, 28) and out.min() >= 0 and out.max() <= 1.0001
    assert all(not torch.allclose(out[i], out[j], atol=1e-3) for i in range(16) for j in range(i))


def test_known_rotation_shift_and_scale(monkeypatch, dot):
    fixed_draw(monkeypatch, 1.0, 0, 0, 0, 0)
    out = utils.augment_batch(dot, **(NONE | {"rotation": 90}))
    assert any(torch.allclose(out, torch.rot90(dot, turns, (2, 3)), atol=1e-4) for turns in (1, -1))
    fixed_draw(monkeypatch, 0, 0, 0, 1.0, 0)
    out = utils.augment_batch(dot, **(NONE | {"shift": 0.25}))
    assert torch.allclose(out, torch.roll(dot, -7, 3), atol=1e-4)
    fixed_draw(monkeypatch, 0, 0, 1.0, 0, 0)
    square = torch.zeros(1, 1, 28, 28)
    square[..., 9:19, 9:19] = 1
    assert utils.augment_batch(square, **(NONE | {"scale": 0.5})).sum().item() == pytest.approx(225, rel=0.05)


def test_known_shear(monkeypatch):
    fixed_draw(monkeypatch, 0, 1.0, 0, 0, 0)
    line = torch.zeros(1, 1, 28, 28)
    line[..., 13:15] = 1
    out = utils.augment_batch(line, **(NONE | {"shear": 45}))[0, 0]
    # At 45 degrees a row moves by as many pixels as it lies from the middle.
    middles = (out * torch.arange(28)).sum(1)[7:21] / out.sum(1)[7:21]
    assert torch.allclose((middles[1:] - middles[:-1]).abs(), torch.ones(13), atol=0.01)


def test_one_cycle_goes_up_and_down_and_may_be_stepped_after_the_last_batch():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
    schedule, rates = utils.one_cycle(optimizer, 0.02, 24, 0.25), []
    for _ in range(24):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.02 / 25) and rates[-1] == pytest.approx(0.02 / 25 / 1e4)
    assert rates.index(max(rates)) == 5 and max(rates) == pytest.approx(0.02)
    utils.one_cycle(optimizer, 0.02, 1, 0.2).step()


def test_orthogonalize_evens_out_singular_values_and_keeps_directions():
    torch.manual_seed(0)
    left, right = torch.linalg.qr(torch.randn(6, 6))[0], torch.linalg.qr(torch.randn(20, 20))[0][:6]
    for scale in (0.01, 1, 100):
        matrix = scale * left @ torch.diag(torch.tensor([1, 0.3, 0.1, 0.03, 0.01, 0.005])) @ right
        brought = left.T @ utils.orthogonalize(matrix) @ right.T
        diagonal = brought.diagonal()
        assert torch.allclose(brought, torch.diag(diagonal), atol=1e-3)
        assert 0.65 < diagonal.min() and diagonal.max() < 1.25


def test_muon_steps_as_its_definition_says():
    torch.manual_seed(0)
    model = models.MNIST_CNN_M4().to(memory_format=torch.channels_last)
    optimizer = utils.Muon(model, 0.1, momentum=0.9)
    weights = [p.detach().clone() for p in model.parameters()]
    momenta = [torch.zeros_like(p) for p in model.parameters()]
    for _ in range(3):
        for weight, momentum, p in zip(weights, momenta, model.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            momentum.mul_(0.9).add_(p.grad)
            update = p.grad + 0.9 * momentum
            if p.dim() == 4:
                update = utils.orthogonalize(update.flatten(1)).view_as(p)
            weight.sub_(0.1 * update)
            if p.dim() == 4 and p is not model.conv7.weight:  # as many rows as channels, of norm 1 in the mean
                weight.mul_(len(weight) ** 0.5 / weight.norm())
        optimizer.step()
    for weight, p in zip(weights, model.parameters(), strict=True):
        assert torch.allclose(weight, p, atol=1e-5)


def test_average_is_that_of_weights_and_statistics():
    model = models.MNIST_CNN_M4()
    average, expected = utils.weight_average(model, 0.25), {}
    for step in range(5):
        for tensor in model.state_dict().values():
            tensor.add_(1)
        average.update_parameters(model)
        now = {key: value.clone() for key, value in model.state_dict().items() if value.is_floating_point()}
        decay = min(0.25, (1 + step) / (10 + step)) if step else 0
        expected = {key: decay * expected.get(key, 0) + (1 - decay) * value for key, value in now.items()}
    averages = average.module.state_dict()
    assert "norm1.running_var" in expected
    for key, value in expected.items():
        assert torch.allclose(averages[key], value, atol=1e-6) and not torch.equal(value, now[key]), key


def small_run(network=models.MNIST_CNN_M4, dropout=0.1, images=150, optimizer=None):
    """Return a new model, its average, random data and an optimizer, and `epoch(batch_size, ...)` to train it with."""
    arguments = () if network is models.MNIST_CNN_M1 else (dropout,)
    model = utils.build(network, 1, torch.device("cpu"), *arguments)
    pixels = torch.randint(0, 256, (images, 1, 28, 28), dtype=torch.uint8)
    run = SimpleNamespace(model=model, average=utils.weight_average(model, 0.998))
    run.data = utils.Data(pixels, torch.arange(images) % 10, None, None)
    run.optimizer = optimizer(model) if optimizer else utils.Muon(model, 0.02, 0.9)

    def epoch(batch_size, schedule=None, augment=None, border=0, precision="float32"):
        parts = (run.model, run.average, run.data, run.optimizer, schedule)
        return utils.train(*parts, batch_size, augment, border, precision)

    run.epoch = epoch
    return run


def plain_sgd(model):
    return torch.optim.SGD(model.parameters(), 0.1)


def figures_and_tensors(threads, batch_size, precision):
    """Train M4 for two epochs with everything on, on `threads` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        run, augment = small_run(), {"rotation": 8, "shear": 8, "scale": 0.1, "shift": 0.1}
        figures = [run.epoch(batch_size, None, augment, border, precision) for border in (2, 0)]
        figures.append(utils.evaluate(run.average, *run.data[:2], batch_size=40)[:2])
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    return figures, [*run.model.state_dict().values(), *run.average.state_dict().values()]


@pytest.mark.parametrize("batch_size, precision", [(32, "float32"), (3, "float32"), (32, "bfloat16")])
def test_one_thread_and_two_give_the_same_figures_bit_for_bit(batch_size, precision):
    figures, tensors = figures_and_tensors(1, batch_size, precision)
    for _ in range(3):  # whichever thread happens to be first
        again, others = figures_and_tensors(2, batch_size, precision)
        assert again == figures
        assert all(torch.equal(one, other) for one, other in zip(tensors, others, strict=True))


def test_two_batches_take_their_gradients_at_the_same_weights():
    run = small_run(models.MNIST_CNN_M1, images=20, optimizer=plain_sgd)
    whole = copy.deepcopy(run.model)
    loss = nn.functional.cross_entropy(whole(utils.normalize(run.data.train_images / 255)), run.data.train_labels)
    loss.backward()
    assert run.epoch(10)[0] == pytest.approx(loss.item(), rel=1e-5)
    # M1 has no batch norm: two steps from one point go twice as far as one step for both batches.
    for old, new in zip(whole.parameters(), run.model.parameters(), strict=True):
        assert torch.allclose(new, old - 0.1 * 2 * old.grad, atol=1e-6) and not torch.equal(new, old)


def test_only_whole_batches_are_trained_and_each_gets_its_step():
    run = small_run(images=47, optimizer=plain_sgd)
    schedule = utils.one_cycle(run.optimizer, 0.01, 10, 0.3)
    rates = []
    run.optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    _, accuracy, rate = run.epoch(8, schedule)
    assert schedule.last_epoch == len(rates) == 5 == int(run.average.n_averaged)
    assert rate == rates[-1] != run.optimizer.param_groups[0]["lr"]
    assert (accuracy * 40 / 100) % 1 == pytest.approx(0, abs=1e-9)


def test_the_two_networks_share_their_weights_but_not_their_dropout_and_statistics():
    run, seen = small_run(dropout=0.5, images=16), []
    run.model.register_forward_pre_hook(lambda network, inputs: seen.append(network))
    run.epoch(8)
    one, other = sorted(seen, key=lambda network: network is not run.model)
    assert [p.data_ptr() for p in one.parameters()] == [p.data_ptr() for p in other.parameters()]
    assert one is run.model is not other
    assert not torch.equal(one.norm1.running_mean, other.norm1.running_mean)
    assert not torch.equal(one.drop1.pool, other.drop1.pool)


def test_a_border_leaves_the_middle_of_the_augmented_image(monkeypatch):
    monkeypatch.setattr(utils, "augment_batch", lambda pixels, **_: pixels + 1)
    monkeypatch.setattr(torch, "randperm", torch.arange)
    run, seen = small_run(images=8), []
    run.model.register_forward_pre_hook(lambda network, inputs: seen.append(inputs[0].detach().clone()))
    for border in (2, 0):
        run.epoch(8, augment={"some": 1}, border=border)
    whole = utils.normalize(run.data.train_images / 255 + 1)
    assert torch.equal(seen[0], whole[..., 2:26, 2:26]) and torch.equal(seen[1], whole)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_precision_is_that_of_activations_in_training_alone(precision):
    dtypes, run = set(), small_run(images=8)
    before = [p.detach().clone() for p in run.model.parameters()]
    for layer in (run.model.conv2, run.model.relu4, run.model.norm5, run.model.drop6, run.model.conv7):
        layer.register_forward_hook(lambda layer, inputs, output: dtypes.add((inputs[0].dtype, output.dtype)))
    run.epoch(8, precision=precision)
    assert dtypes == {(getattr(torch, precision),) * 2}
    # What moves by less than bfloat16 can tell must still move.
    changes = zip(before, run.model.parameters(), strict=True)
    assert any(((old != p) & (old.bfloat16() == p.bfloat16()) & (p != p.bfloat16())).any() for old, p in changes)
    logits = utils.evaluate(run.average, *run.data[:2])[2]
    assert not torch.equal(logits, logits.bfloat16().float())


def test_evaluation_is_exact():
    torch.manual_seed(0)
    model = models.MNIST_CNN_M4(0.5)
    images, labels = draw_digits(37, 1)
    loss, accuracy, logits = utils.evaluate(model, images, labels, batch_size=10)
    whole = model.eval()(utils.normalize(images / 255)).detach()
    assert torch.allclose(logits, whole, atol=1e-5)
    assert loss == pytest.approx(nn.functional.cross_entropy(whole, labels).item(), rel=1e-5)
    assert accuracy == pytest.approx(100 * (whole.argmax(1) == labels).double().mean().item())

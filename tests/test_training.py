"""Augmentation, weight average, schedule, evaluation."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import models
import utils

NONE = {"rotation": 0, "shear": 0, "scale": 0, "shift": 0}


def settings(**changes):
    """Return what `utils.train` reads of the command line."""
    return SimpleNamespace(**{"device": torch.device("cpu"), "precision": "float32"} | changes)


def test_no_strength_is_the_identity():
    pixels = torch.rand(5, 1, 28, 28)
    assert torch.allclose(utils.augment_batch(pixels, **NONE), pixels, atol=1e-5)


@pytest.mark.parametrize("limit", [{"rotation": 20}, {"shear": 20}, {"scale": 0.3}, {"shift": 0.2}])
def test_each_image_gets_its_own_draw(limit, blob):
    torch.manual_seed(0)
    out = utils.augment_batch(blob.expand(16, 1, 28, 28), **(NONE | limit))
    assert out.shape == (16, 1, 28, 28) and out.min() >= 0 and out.max() <= 1.0001
    assert all(not torch.allclose(out[i], out[j], atol=1e-3) for i in range(16) for j in range(i))


def fixed_draw(monkeypatch, *values):
    """Let the five draws be `values`, each from -1 to 1."""
    monkeypatch.setattr(
        torch, "rand", lambda *shape, **_: (torch.tensor(values) + 1).div(2).view(5, 1).expand(shape)
    )


def test_known_rotation_lands_where_it_should(monkeypatch, blob, rotate):
    fixed_draw(monkeypatch, 1.0, 0, 0, 0, 0)
    out = utils.augment_batch(blob, **(NONE | {"rotation": 90}))
    assert torch.allclose(out, rotate(blob, 1), atol=1e-4) or torch.allclose(out, rotate(blob, -1), atol=1e-4)
    assert not torch.allclose(out, blob, atol=0.1)


def test_known_shift_and_scale(monkeypatch, blob):
    fixed_draw(monkeypatch, 0, 0, 0, 1.0, 0)
    out = utils.augment_batch(blob, **(NONE | {"shift": 0.25}))
    assert torch.allclose(out, torch.roll(blob, -7, 3), atol=1e-4)
    fixed_draw(monkeypatch, 0, 0, 1.0, 0, 0)
    square = torch.zeros(1, 1, 28, 28)
    square[..., 9:19, 9:19] = 1
    assert utils.augment_batch(square, **(NONE | {"scale": 0.5})).sum().item() == pytest.approx(225, rel=0.05)


def test_known_shear_lands_where_it_should(monkeypatch):
    fixed_draw(monkeypatch, 0, 1.0, 0, 0, 0)
    line = torch.zeros(1, 1, 28, 28)
    line[..., 13:15] = 1
    out = utils.augment_batch(line, **(NONE | {"shear": 45}))[0, 0]
    # At 45 degrees a row moves by as many pixels as it lies from the middle.
    middles = (out * torch.arange(28)).sum(1)[7:21] / out.sum(1)[7:21]
    assert torch.allclose((middles[1:] - middles[:-1]).abs(), torch.ones(13), atol=0.01)


def test_draws_keep_to_their_limits(blob):
    torch.manual_seed(0)
    out = utils.augment_batch(blob.expand(500, 1, 28, 28), **(NONE | {"shift": 0.1}))
    columns = (out.sum((1, 2)) * torch.arange(28)).sum(1) / out.sum((1, 2, 3))
    assert columns.min() > 14 - 2.9 and columns.max() < 14 + 2.9 and columns.std() > 1.2


def test_one_cycle_follows_torch():
    weight = nn.Parameter(torch.zeros(1))
    ours, theirs = (torch.optim.SGD([weight], 0.1) for _ in range(2))
    schedule = utils.one_cycle(ours, 0.02, 3, 1000, 128, 0.25)
    reference = torch.optim.lr_scheduler.OneCycleLR(theirs, 0.02, epochs=3, steps_per_epoch=8, pct_start=0.25)
    rates = []
    for step in range(24):
        rates.append(ours.param_groups[0]["lr"])
        assert rates[-1] == pytest.approx(theirs.param_groups[0]["lr"])
        ours.step()
        theirs.step()
        if step < 23:
            schedule.step()
            reference.step()
    assert rates[0] == pytest.approx(0.02 / 25) and max(rates) == pytest.approx(0.02)
    assert rates[-1] == pytest.approx(0.02 / 25 / 1e4)


def test_orthogonalize_evens_out_singular_values_and_keeps_directions():
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(3, n, n))[0] for n in (6, 20))
    singular_values = torch.tensor([1, 0.3, 0.1, 0.03, 0.01, 0.005])
    scale = torch.tensor([0.01, 1, 100]).view(3, 1, 1)
    matrices = scale * left @ torch.diag_embed(singular_values) @ right[:, :6]
    brought = left.mT @ utils.orthogonalize(matrices) @ right[:, :6].mT
    diagonal = brought.diagonal(dim1=1, dim2=2)
    assert torch.allclose(brought, torch.diag_embed(diagonal), atol=1e-3)
    assert 0.65 < diagonal.min() and diagonal.max() < 1.25


def test_muon_steps_as_its_definition_says():
    torch.manual_seed(0)
    model = models.MNIST_CNN_M4().to(memory_format=torch.channels_last)
    optimizer = utils.Muon(model, 0.1, momentum=0.9)
    weights = [p.detach().clone() for p in model.parameters()]
    momenta = [torch.zeros_like(p) for p in model.parameters()]
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        for weight, momentum, p in zip(weights, momenta, model.parameters(), strict=True):
            momentum.mul_(0.9).add_(p.grad)
            update = p.grad + 0.9 * momentum
            if p.dim() == 4:
                update = utils.orthogonalize(update.flatten(1).unsqueeze(0)).view_as(p)
            weight.sub_(0.1 * update)
        optimizer.step()
    for weight, p in zip(weights, model.parameters(), strict=True):
        assert torch.allclose(weight, p, atol=1e-4)


def test_average_follows_the_weights():
    averages, tensors = [torch.ones(2), torch.zeros(3)], [torch.full((2,), 3.0), torch.full((3,), 5.0)]
    utils.update_average(averages, tensors, 0.9, 10_000)
    assert averages[0].tolist() == pytest.approx([1.2] * 2) and averages[1].tolist() == pytest.approx(
        [0.5] * 3
    )
    utils.update_average(averages, tensors, 0.9, 0)
    assert averages[0].tolist() == pytest.approx([0.1 * 1.2 + 0.9 * 3] * 2)


def small_run(threads, batch_size, precision):
    """Train M4 with everything on, on `threads` threads; return the figures and all tensors."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        args = settings(batch_size=batch_size, epochs=2, max_lr=0.02, precision=precision)
        model, average = utils.build(models.MNIST_CNN_M4, args, 1, 0.1)
        optimizer = utils.Muon(model, 0.02, 0.9)
        images = torch.randint(0, 256, (150, 1, 28, 28), dtype=torch.uint8)
        data = utils.Data(images, torch.arange(150) % 10, None, None)
        recipe = ({"rotation": 8, "shear": 8, "scale": 0.1, "shift": 0.1}, 0.998, (24, 0.5))
        figures = [
            utils.train(model, average, data, optimizer, None, args, epoch, *recipe) for epoch in (1, 2)
        ]
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    return figures, [*model.state_dict().values(), *average.state_dict().values()]


@pytest.mark.parametrize("batch_size, precision", [(32, "float32"), (3, "float32"), (32, "bfloat16")])
def test_one_thread_and_two_give_the_same_figures_bit_for_bit(batch_size, precision):
    figures, tensors = small_run(1, batch_size, precision)
    for _ in range(3):  # whichever thread happens to come first
        again, others = small_run(2, batch_size, precision)
        assert again == figures
        assert all(torch.equal(one, other) for one, other in zip(tensors, others, strict=True))


def test_two_batches_take_their_gradients_at_the_same_weights():
    args = settings(batch_size=10, epochs=1, max_lr=0.1)
    model, average = utils.build(models.MNIST_CNN_M1, args, 1)
    images, labels = torch.randint(0, 256, (20, 1, 28, 28), dtype=torch.uint8), torch.arange(20) % 10
    whole = copy.deepcopy(model)
    loss = nn.functional.cross_entropy(whole(utils.normalize(images / 255.0)), labels)
    loss.backward()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    data = utils.Data(images, labels, None, None)
    mean_loss, _ = utils.train(model, average, data, optimizer, None, args, 1)
    # M1 has no batch norm: two plain steps from one point go twice as far as one step for both batches.
    assert mean_loss == pytest.approx(loss.item(), rel=1e-5)
    for old, new, p in zip(before, model.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(new, old - 0.1 * 2 * p.grad, atol=1e-6) and not torch.equal(new, old)


def test_every_batch_gets_its_step():
    args = settings(batch_size=8, epochs=1, max_lr=0.01)
    model, average = utils.build(models.MNIST_CNN_M4, args, 1, 0.1)
    data = utils.Data(torch.zeros(41, 1, 28, 28, dtype=torch.uint8), torch.arange(41) % 10, None, None)
    optimizer = utils.Muon(model, 0.01, 0.9)
    schedule = utils.one_cycle(optimizer, 0.01, 2, 41, 8, 0.3)
    utils.train(model, average, data, optimizer, schedule, args, 1)
    assert schedule.last_epoch == 5  # a tail of one image is left out


def test_the_two_networks_share_their_weights_but_not_their_dropout():
    seen = {}

    class Spy(models.MNIST_CNN_M4):
        def forward(self, x):
            seen[id(self)] = ([p.data_ptr() for p in self.parameters()], self.norm1.running_mean, self.drop1)
            return super().forward(x)

    args = settings(batch_size=8, epochs=1, max_lr=0.01)
    model, average = utils.build(Spy, args, 1, 0.5)
    images = torch.randint(0, 256, (16, 1, 28, 28), dtype=torch.uint8)
    data = utils.Data(images, torch.arange(16) % 10, None, None)
    utils.train(model, average, data, torch.optim.SGD(model.parameters(), 0.1), None, args, 1)
    (weights, statistics, dropout), (others, other_statistics, other_dropout) = seen.values()
    assert weights == others == [p.data_ptr() for p in model.parameters()]
    assert not torch.equal(statistics, other_statistics)
    assert not torch.equal(dropout.pool, other_dropout.pool)


def test_the_first_epochs_see_the_middle_of_the_augmented_image(monkeypatch):
    seen = []

    class Spy(models.MNIST_CNN_M4):
        def forward(self, x):
            seen.append(x.detach().clone())
            return super().forward(x)

    args = settings(batch_size=8, epochs=5, max_lr=0.01)
    model, average = utils.build(Spy, args, 1, 0.1)
    images = torch.randint(0, 256, (8, 1, 28, 28), dtype=torch.uint8)
    data = utils.Data(images, torch.arange(8), None, None)
    monkeypatch.setattr(utils, "augment_batch", lambda pixels, **_: pixels + 1)
    monkeypatch.setattr(torch, "randperm", torch.arange)
    for epoch in range(1, 6):
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        utils.train(model, average, data, optimizer, None, args, epoch, {"some": 1}, 0.9, (24, 0.4))
    whole = utils.normalize(images / 255.0 + 1)
    assert [len(x[0, 0]) for x in seen] == [24, 24, 28, 28, 28]
    assert torch.equal(seen[0], whole[..., 2:26, 2:26]) and torch.equal(seen[-1], whole)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_precision_is_that_of_activations_in_training_alone(precision):
    dtypes = set()
    model, average = utils.build(models.MNIST_CNN_M4, settings(), 1, 0.1)
    for layer in (model.conv2, model.relu4, model.norm5, model.drop6, model.conv7):
        layer.register_forward_hook(lambda layer, inputs, output: dtypes.add((inputs[0].dtype, output.dtype)))
    images = torch.randint(0, 256, (8, 1, 28, 28), dtype=torch.uint8)
    data = utils.Data(images, torch.arange(8), None, None)
    args = settings(batch_size=8, epochs=1, max_lr=0.01, precision=precision)
    utils.train(model, average, data, utils.Muon(model, 0.01, 0.9), None, args, 1)
    assert dtypes == {(getattr(torch, precision),) * 2}
    # What moves by less than bfloat16 can tell must still move.
    assert any(not torch.equal(p, p.bfloat16().float()) for p in model.parameters())
    logits = utils.evaluate(average, images, torch.arange(8))[2]
    assert not torch.equal(logits, logits.bfloat16().float())


def test_training_averages_weights_and_batch_norm_statistics():
    args = settings(batch_size=8, epochs=1, max_lr=0.01)
    model, average = utils.build(models.MNIST_CNN_M4, args, 1, 0.0)
    images = torch.randint(0, 256, (8, 1, 28, 28), dtype=torch.uint8)
    data = utils.Data(images, torch.arange(8), None, None)
    before = {key: value.clone() for key, value in average.state_dict().items()}
    utils.train(model, average, data, torch.optim.AdamW(model.parameters(), 0.01), None, args, 1)
    after = model.state_dict()
    for key, value in average.state_dict().items():
        if value.is_floating_point():  # the first step's decay is 0.1
            assert torch.allclose(value, 0.1 * before[key] + 0.9 * after[key], atol=1e-6), key
            assert not torch.equal(value, before[key]), key


def test_evaluation_is_exact_and_never_augmented(monkeypatch):
    monkeypatch.setattr(utils, "augment_batch", lambda *_, **__: pytest.fail("augmented"))
    torch.manual_seed(0)
    model = models.MNIST_CNN_M4(0.5)
    images, labels = (torch.randint(0, 256, (37, 1, 28, 28), dtype=torch.uint8), torch.arange(37) % 10)
    loss, accuracy, logits = utils.evaluate(model, images, labels, batch_size=10)
    whole = model.eval()(utils.normalize(images / 255.0)).detach()
    assert torch.allclose(logits, whole, atol=1e-5)
    assert loss == pytest.approx(nn.functional.cross_entropy(whole, labels).item(), rel=1e-5)
    assert accuracy == pytest.approx(100 * (whole.argmax(1) == labels).double().mean().item())


def test_a_loss_that_is_no_number_stops_the_run():
    args = settings(batch_size=8, epochs=3, max_lr=0.1)
    model, average = utils.build(models.MNIST_CNN_M1, args, 1)
    images = torch.randint(0, 256, (32, 1, 28, 28), dtype=torch.uint8)
    data = utils.Data(images, torch.arange(32) % 10, None, None)
    # The first two steps are sound and throw the weights away: the third finds no number.
    optimizer = torch.optim.SGD(model.parameters(), float("inf"))
    with pytest.raises(utils.UserError, match="epoch 2, step 3"):
        utils.train(model, average, data, optimizer, None, args, 2)

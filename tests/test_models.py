"""The networks: tables, counts, dropout, and M1's last ReLU."""

import pytest
import torch
from tables import TABLES
from torchsummary import summary

import models

NETWORKS = {name: getattr(models, f"MNIST_CNN_{name}") for name in TABLES}
COUNTS = {"M1": 6590, "M2": 3944, "M3": 7676, "M4": 7600}


@pytest.mark.parametrize("name", TABLES)
def test_table_is_printed_line_for_line(name, capsys):
    summary(NETWORKS[name](), (1, 28, 28), device="cpu")
    assert capsys.readouterr().out.splitlines() == TABLES[name].splitlines()


@pytest.mark.parametrize("name", TABLES)
def test_count_is_below_the_budget(name):
    count = sum(p.numel() for p in NETWORKS[name]().parameters())
    assert count == COUNTS[name] < 8000


@pytest.mark.parametrize("name", TABLES)
def test_every_parameter_gets_a_gradient(name):
    torch.manual_seed(0)
    model = NETWORKS[name]()
    logits = model(torch.randn(16, 1, 28, 28))
    assert logits.shape == (16, 10)
    logits.logsumexp(1).sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("seed", range(20))
def test_no_class_of_m1_starts_dead(seed):
    torch.manual_seed(seed)
    logits = models.MNIST_CNN_M1()(torch.randn(64, 1, 28, 28))
    assert (logits > 0).float().mean(0).min() > 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dropout_statistics(layout, dtype):
    torch.manual_seed(0)
    layer = models.Dropout(0.2)
    x = torch.ones(64, 8, 26, 26, dtype=dtype).contiguous(memory_format=layout)
    masks = torch.stack([layer(x) for _ in range(30)])
    assert masks.dtype == dtype and torch.allclose(masks.unique().float(), torch.tensor([0.0, 1.25]))
    assert (masks == 0).float().mean().item() == pytest.approx(0.2, abs=0.002)
    # Over steps each place is dropped about 20% of the time, and no two steps share a mask.
    per_place = (masks == 0).float().mean(0)
    assert per_place.std().item() == pytest.approx((0.2 * 0.8 / 30) ** 0.5, rel=0.15)
    agree = (masks[0] == masks[1]).float().mean().item()
    assert agree == pytest.approx(0.2**2 + 0.8**2, abs=0.01)


def test_dropout_in_place_is_the_same_dropout():
    one, other = models.Dropout(0.3), models.Dropout(0.3, inplace=True)
    for layer in (one, other):
        layer.generator = torch.Generator().manual_seed(1)
    x = torch.rand(8, 8, 26, 26)
    dropped, copy = one(x), x.clone()
    assert torch.equal(other(copy), dropped) and torch.equal(copy, dropped) and not torch.equal(x, dropped)


def test_dropout_rests_in_evaluation_and_redraws():
    model = models.MNIST_CNN_M4(0.1)
    x = torch.randn(8, 1, 28, 28)
    model(x)
    pool = model.drop1.pool
    model(x)
    assert model.drop1.pool is pool
    models.redraw_dropout_masks(model)
    model(x)
    assert model.drop1.pool is not pool and not torch.equal(model.drop1.pool, pool)
    layer = model.drop1.eval()
    activations = torch.randn(4, 8, 26, 26)
    assert torch.equal(layer(activations), activations)

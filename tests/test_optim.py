"""Parameter groups and the learning-rate schedule."""

import math

import pytest
import torch
from conftest import close, tiny_config

from minirlhf.model import GPT, ScalarModel
from minirlhf.plumbing.optim import lr_at, make_optimizer, set_lr


def test_only_matrices_decay_and_every_parameter_is_there_once():
    model = GPT(tiny_config())  # its tied head is the embedding: one tensor
    decayed, plain = make_optimizer(model, 1e-3, weight_decay=0.1).param_groups
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0.0
    assert all(p.dim() == 2 for p in decayed["params"])
    assert all(p.dim() == 1 for p in plain["params"])
    ids = [id(p) for p in decayed["params"] + plain["params"]]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in model.parameters()}


def test_frozen_parameters_are_left_out():
    model = ScalarModel(tiny_config())
    model.trunk.requires_grad_(False)
    groups = make_optimizer(model, 1e-3).param_groups
    assert [p is q for group, q in zip(groups, (model.head.weight, model.head.bias))
            for p in group["params"]] == [True, True]


def test_set_lr_sets_it_in_every_group():
    optimizer = make_optimizer(GPT(tiny_config()), 1e-3)
    set_lr(optimizer, 5e-4)
    assert [group["lr"] for group in optimizer.param_groups] == [5e-4, 5e-4]


def test_the_warmup_ends_at_lr_and_wastes_no_step():
    assert [lr_at(s, 100, 1.0, warmup=4) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("shape, last", [("cosine", 0.2 + 1.8 * math.sin(math.pi / 200) ** 2),
                                         ("linear", 0.2 + 1.8 / 100)])
def test_the_fall_starts_at_lr_and_ends_within_a_step_of_final(shape, last):
    """Of the steps that a run makes: the one that would reach the final rate is one too many."""
    lrs = [lr_at(s, 100, 2.0, warmup=0, final=0.1, shape=shape) for s in range(100)]
    assert lrs[0] == 2.0 and lrs[99] == pytest.approx(last, rel=1e-9)
    assert lrs[50] == pytest.approx(1.1, rel=1e-9)  # both are halfway down halfway through
    assert all(a > b for a, b in zip(lrs, lrs[1:])) and lrs[99] - 0.2 < lrs[0] - lrs[1] + 1e-12


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("num_steps, warmup", [(1, 0), (1, 1), (2, 1), (3, 10), (5, 5), (7, 0)])
def test_every_step_that_a_run_makes_has_a_rate_above_0_and_no_higher_than_lr(num_steps, warmup,
                                                                              shape):
    """However short: a warmup that fills the run, or is longer than it."""
    lrs = [lr_at(s, num_steps, 2.0, warmup, 0.1, shape) for s in range(num_steps)]
    assert all(0.1 * 2.0 <= lr <= 2.0 for lr in lrs)
    assert lrs[:warmup] == sorted(lrs[:warmup]) and lrs[warmup:] == sorted(lrs[warmup:])[::-1]
    assert lrs[warmup : warmup + 1] in ([], [2.0])  # the first after the warmup has the peak


def test_cosine_by_hand_and_constant():
    assert lr_at(25, 100, 1.0) == pytest.approx((1 + math.sqrt(0.5)) / 2, rel=1e-9)
    assert {lr_at(s, 100, 3.0, shape="constant") for s in range(100)} == {3.0}
    with pytest.raises(ValueError, match="'cosin'.*'cosine'"):
        lr_at(0, 100, 1.0, shape="cosin")


def test_check_21_adamws_second_step_by_hand():
    """Bug: the betas exchanged or equal, which the first step, sign(g), cannot show."""
    layer = torch.nn.Linear(1, 1, bias=False).double()
    weight = layer.weight.item()
    optimizer = make_optimizer(layer, lr=0.1, eps=1e-3)
    m = v = 0.0
    for step, gradient in enumerate((2.0, -0.5), start=1):
        layer.weight.grad = torch.tensor([[gradient]]).double()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
        weight -= 0.1 * m / (1 - 0.9**step) / (math.sqrt(v / (1 - 0.95**step)) + 1e-3)
        close(layer.weight, [[weight]])

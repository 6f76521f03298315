"""Steps that claim something else than they do get the verdict of what they do."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from scipy import stats
from steps import BATCH, HIDDEN, LAST, audited, backprop, loss, model, verdicts
from torch import Tensor, nn

import altprop as ap
from altprop import Read, Verdict

V = Verdict


def local_in_name(m: nn.Module, batch: Any) -> None:
    """Losses of every layer, and one `backward` over everything."""
    h, total = batch[0], torch.zeros(())
    for layer in m.children():
        h = layer(h)
        total = total + 0 * h.square().mean()
    (total + nnf.cross_entropy(h, batch[1])).backward()


def error_optimised(m: nn.Module, batch: Any, rate: float = 0.05) -> None:
    """Predictive coding by its errors, one step of inference from zero: backprop, scaled."""
    layers = [m[:2], m[2:4], m[4:]]
    inputs, errors, h = [], [], batch[0]
    for layer in layers:
        inputs.append(h.detach())
        errors.append(torch.zeros_like(layer(h), requires_grad=True))
        h = layer(h) + errors[-1]
    grads = torch.autograd.grad(nnf.cross_entropy(h, batch[1]), errors)
    for layer, given, g in zip(layers, inputs, grads, strict=True):
        (layer(given) * (rate * g)).sum().backward()


def detached_below(m: nn.Module, batch: Any) -> None:
    nnf.cross_entropy(m[4:](m[:4](batch[0]).detach()), batch[1]).backward()


def by_hand(m: nn.Module, batch: Any) -> None:
    with torch.no_grad():
        h = [batch[0]]
        for layer in m.children():
            h.append(layer(h[-1]))
        e = (h[-1].softmax(1) - nnf.one_hot(batch[1], 10)) / len(h[-1])
        for i in (4, 2, 0):
            m[i].weight.grad, m[i].bias.grad = e.T @ h[i], e.sum(0)
            if i:
                e = (e @ m[i].weight) * (1 - h[i] ** 2)


def random_direction(m: nn.Module, batch: Any) -> None:
    for p in m.parameters():
        p.grad = torch.randn_like(p)


def updating(make: Any, clip: float = math.inf, **how: Any) -> Any:
    """Return a step of backprop with its optimiser, in the usual order."""

    def step(m: nn.Module, batch: Any) -> None:
        optimiser = make(m.parameters())
        backprop(m, batch)
        nn.utils.clip_grad_norm_(m.parameters(), clip)
        optimiser.step()
        optimiser.zero_grad(**how)

    return step


sgd = updating(partial(torch.optim.SGD, lr=0.25), set_to_none=False)
adamw = updating(partial(torch.optim.AdamW, lr=1e-3))
clipped = updating(partial(torch.optim.SGD, lr=1e-6), clip=1e-3)


def lbfgs(m: nn.Module, batch: Any) -> None:
    optimiser = torch.optim.LBFGS(m.parameters(), max_iter=3)

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss(m, batch)
        value.backward()
        return value

    optimiser.step(closure)  # type: ignore[no-untyped-call]


def by_change(m: nn.Module, batch: Any, rate: float = 0.25) -> None:
    gradients = torch.autograd.grad(loss(m, batch), list(m.parameters()))
    for p, g in zip(m.parameters(), gradients, strict=True):
        p.data = p.data - rate * g


def slightly(m: nn.Module, batch: Any) -> None:
    """A change of the weight that keeps few digits of the gradient."""
    by_change(m, batch, 1e-5)


def lost(m: nn.Module, batch: Any) -> None:
    (loss(m, batch) * math.nan).backward()


@pytest.mark.parametrize(
    ("step", "hidden", "last"),
    [
        (backprop, V.EXACT, V.EXACT),
        (local_in_name, V.EXACT, V.EXACT),
        (error_optimised, V.SCALED, V.SCALED),
        (detached_below, V.UNTOUCHED, V.EXACT),
        (by_hand, V.EXACT, V.EXACT),
        (random_direction, V.UNCORRELATED, V.UNCORRELATED),
        (sgd, V.EXACT, V.EXACT),
        (adamw, V.EXACT, V.EXACT),
        (clipped, V.SCALED, V.SCALED),
        (lbfgs, V.EXACT, V.EXACT),
        (by_change, V.SCALED, V.SCALED),
        (slightly, V.SCALED, V.SCALED),
        (lost, V.LOST, V.LOST),
    ],
)
def test_a_step_is_what_it_does(step: Any, hidden: Verdict, last: Verdict) -> None:
    assert verdicts(audited(step)) == [hidden, hidden, last]


def test_a_length_is_told() -> None:
    for step, scale in ((error_optimised, 0.05), (by_change, 0.25)):
        row = audited(step)["0.weight"]
        assert row.agreement is not None
        assert row.agreement.norm_ratio == pytest.approx(scale, rel=1e-3)
        assert f"exact but for its length, times {scale}" in str(row)
    assert "judged by its change of the weight" in str(audited(by_change)["0.weight"])
    assert audited(sgd)["0.weight"].moved is not None
    assert audited(backprop)["0.weight"].moved is None


@pytest.mark.parametrize(
    ("rule", "hidden", "how"),
    [
        (ap.FeedbackAlignment(), {V.UNCORRELATED, V.BIASED}, Read.NOT),
        (ap.SignSymmetry(), {V.BIASED}, Read.SIGN),
        (ap.Backprop(), {V.EXACT}, Read.MATRIX),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_rule_is_measured_as_it_is(rule: Any, hidden: set[Verdict], how: Read) -> None:
    found = audited(backprop, ap.convert(model(), rule))
    assert {found[name].verdict for name in HIDDEN} <= hidden
    assert found[LAST].verdict is V.EXACT and found[LAST].reading.how is how


def test_a_rule_that_is_silently_backprop_is_found_out() -> None:
    """Feedback alignment whose feedback is set to the weight before each step."""

    def step(m: nn.Module, batch: Any) -> None:
        with torch.no_grad():
            for i in (2, 4):
                m[i].B.copy_(m[i].weight)
        backprop(m, batch)

    found = audited(step, ap.convert(model(), ap.FeedbackAlignment()))
    assert verdicts(found) == [V.EXACT] * 3
    assert found[LAST].reading.how is Read.MATRIX


def test_direct_feedback_carries_no_weight_to_a_layer_below() -> None:
    rule = ap.DirectFeedback(pass_through="pure")
    found = audited(backprop, ap.convert(model(), rule, output="4"))
    assert found["0.weight"].verdict in (V.UNCORRELATED, V.BIASED)
    assert found[LAST].verdict is V.EXACT


def test_nothing_of_the_callers_changes_and_random_draws_are_alike() -> None:
    torch.manual_seed(3)
    m = nn.Sequential(nn.Linear(40, 30), nn.Dropout(0.5), nn.Linear(30, 10))
    before = {name: p.clone() for name, p in m.named_parameters()}
    state = torch.get_rng_state()
    found = ap.audit_step(sgd, m, loss, BATCH)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in m.named_parameters())
    assert {row.verdict for row in found.values()} == {V.EXACT}


def test_a_batch_that_is_changed_serves_both_runs_and_stays_the_callers() -> None:
    given = {"x": BATCH[0].clone(), "labels": BATCH[1]}

    def popping(m: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        labels = batch.pop("labels")
        return nnf.cross_entropy(m(batch["x"].sub_(20.0).div_(50.0)), labels)

    found = ap.audit_step(lambda m, b: popping(m, b).backward(), model(), popping, given)
    assert {row.verdict for row in found.values()} == {V.EXACT}
    assert torch.equal(given["x"], BATCH[0]) and "labels" in given


def test_a_step_that_trains_the_model_it_holds_is_refused() -> None:
    held = model()

    def bound(m: nn.Module, batch: Any) -> None:
        backprop(held, batch)

    with pytest.raises(ap.ConfigError, match="trained the model that it holds"):
        ap.audit_step(bound, held, loss, BATCH)


def test_sparse_gradients_are_judged() -> None:
    bag = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(), nn.Linear(8, 10))
    batch = torch.randint(9, (6, 2)), torch.randint(10, (6,))
    found = ap.audit_step(backprop, bag, loss, batch)
    assert {row.verdict for row in found.values()} == {V.EXACT}


def turned(cosine: float, count: int) -> Verdict:
    """Return the verdict on a gradient of so many numbers at a cosine to the exact one."""
    exact = torch.zeros(count, dtype=torch.float64)
    exact[0] = 1.0
    other = torch.zeros_like(exact)
    other[-1] = math.sqrt(1 - cosine**2) if count > 1 else 0.0
    one = nn.Module()
    one.w = nn.Parameter(torch.ones(count, dtype=torch.float64))

    def step(m: Any, _: Any) -> None:
        m.w.grad = (cosine * exact + other) * 0.5

    return ap.audit_step(step, one, lambda m, _: (m.w * exact).sum(), ())["w"].verdict  # type: ignore[operator]


@pytest.mark.parametrize("count", [3, 9, 10, 40])
def test_what_a_random_direction_hardly_reaches_is_no_random_direction(count: int) -> None:
    t = stats.t.ppf(1 - 0.0027 / 2, count - 1)
    bound = float(t / math.sqrt(count - 1 + t * t))
    for sign in (1, -1):
        assert turned(sign * bound * 0.999, count) is V.UNCORRELATED
        assert turned(sign * (bound + 0.001 * (1 - bound)), count) is V.BIASED


def test_a_single_number_is_judged_by_its_sign() -> None:
    assert (turned(1.0, 1), turned(-1.0, 1)) == (V.SCALED, V.BIASED)


@pytest.mark.parametrize(("estimator", "verdict"), [(ap.AEP(), V.EXACT), (ap.EP(), V.BIASED)])
def test_an_equilibrium_is_judged_by_its_exact_adjoint(
    estimator: ap.AbstractEstimator, verdict: Verdict
) -> None:
    torch.manual_seed(0)
    block = ap.Equilibrium(ap.DampedAttention(8, heads=2), ap.Anderson(tol=1e-5), estimator)

    def objective(m: nn.Module, batch: Tensor) -> Tensor:
        return (m(batch) * batch.cos()).sum()

    found = ap.audit_step(
        lambda m, b: objective(m, b).backward(), block, objective, torch.randn(3, 6, 8)
    )
    assert {row.verdict for row in found.values()} == {verdict}


def test_explain_sets_what_was_measured_beside_what_should_be() -> None:
    m = ap.convert(model(), ap.SignSymmetry())
    assert "measured" not in str(ap.explain(m))
    table = ap.explain(m, measured=audited(backprop, m))
    rows = {row.parameter: row.measured for row in table.rows}
    assert rows["2.weight"].startswith("biased: cosine") and "its sign read" in rows["2.weight"]
    assert rows["4.bias"] == "exact; not read" and "measured" in str(table)


def test_a_loss_that_is_none_is_refused() -> None:
    with pytest.raises(ap.ConfigError, match="loss_fn returned a tensor .64, 10., expected a scal"):
        ap.audit_step(backprop, model(), lambda m, batch: m(batch[0]), BATCH)


@pytest.mark.parametrize("kind", ["gpt2", "encoder", "convolutions"])
def test_other_peoples_models_are_audited_alike(kind: str) -> None:
    torch.manual_seed(0)
    if kind == "gpt2":
        transformers = pytest.importorskip("transformers")
        config = transformers.GPT2Config(
            vocab_size=11, n_positions=8, n_embd=16, n_layer=2, n_head=2
        )
        m = transformers.GPT2LMHeadModel(config)
        batch: Any = torch.randint(11, (3, 8))
        last = "transformer.h.1.mlp.c_proj.weight"

        def objective(m: Any, batch: Any) -> Tensor:
            return m(batch, labels=batch).loss
    elif kind == "encoder":
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        m, batch = (
            nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
            torch.randn(3, 5, 16),
        )
        last = "layers.1.linear2.weight"

        def objective(m: Any, batch: Any) -> Tensor:
            return (m(batch) * batch.cos()).sum()
    else:
        m = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten())
        batch, last = torch.randn(2, 3, 8, 8), "2.weight"

        def objective(m: Any, batch: Any) -> Tensor:
            return m(batch).square().mean()

    m.eval()  # dropout aside
    found = ap.audit_step(lambda m, b: objective(m, b).backward(), m, objective, batch)
    judged = {row.verdict for row in found.values() if row.verdict is not V.UNKNOWN}
    assert judged == {V.EXACT} and found[last].reading.how is Read.MATRIX
    frozen = {n for n, _ in m.named_parameters() if n != last}

    def only_last(m: Any, batch: Any) -> None:
        for name, p in m.named_parameters():
            p.requires_grad_(name not in frozen)
        objective(m, batch).backward()

    one = ap.audit_step(only_last, m, objective, batch)
    assert one[last].verdict is V.EXACT
    assert {one[name].verdict for name in frozen} == {V.UNTOUCHED}

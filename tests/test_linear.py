"""The drop-in layer: gradients against hand-written formulas in float64, and its error messages."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import altprop as ap

X = (3, 4, 6)  # (batch, tokens, in)


def data(out: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(X, generator=generator, dtype=torch.float64, requires_grad=True)
    return x, torch.randn(*X[:2], out, generator=generator, dtype=torch.float64)


def layer(method: str, **options: object) -> ap.LocalLinear:
    torch.manual_seed(1)
    return ap.LocalLinear(6, 5, True, method, 0.3, dtype=torch.float64, seed=2, **options)  # type: ignore[arg-type]


def close(got: Tensor | None, want: Tensor, tolerance: float = 1e-12) -> None:
    assert got is not None and got.shape == want.shape
    assert float((got - want).abs().max()) <= tolerance


@pytest.mark.parametrize("method", ["bp", "fa", "sign_sym", "dfa", "dfa_block"])
def test_each_method_sends_its_own_matrix_and_keeps_the_weights_gradient(method: str) -> None:
    m, (x, g) = layer(method), data()
    m(x).backward(g)
    W = m.weight.detach()
    M = {"fa": m.B, "sign_sym": W.sign() * W.norm() / math.sqrt(W.numel())}.get(method, W)
    close(x.grad, g @ M)
    close(m.weight.grad, torch.einsum("bto,bti->oi", g, x.detach()))
    close(m.bias.grad, g.sum((0, 1)))


def test_the_autograd_functions_themselves_equal_the_formulas() -> None:
    x, g = data()
    W, B = (torch.randn(5, 6, dtype=torch.float64) for _ in range(2))
    ap.LinearFA.apply(x, W, B, None).backward(g)
    close(x.grad, g @ B)
    x.grad = None
    ap.LinearSignSym.apply(x, W).backward(g)
    close(x.grad, g @ (W.sign() * W.norm() / 30**0.5))
    with pytest.raises(ap.ConfigError, match=r"B has shape \(6, 5\)"):
        ap.LinearFA.apply(x, W, B.t())


def test_feedback_equal_to_the_weight_is_backprop() -> None:
    m, (x, g) = layer("fa"), data()
    m.B.copy_(m.weight.detach())
    m(x).backward(g)
    close(x.grad, g @ m.weight.detach(), 1e-10)


@pytest.mark.parametrize("tokens", [True, False])
def test_dfa_update_is_the_projected_error_summed_over_tokens(tokens: bool) -> None:
    model = nn.Sequential(layer("dfa"), nn.Tanh(), nn.Linear(5, 3).double())
    ap.initialize_dfa_targets(model, 3)
    x, _ = data()
    model(x).square().sum().backward()
    head = model[2].weight.grad.clone()
    e = torch.randn(*(X[:2] if tokens else X[:1]), 3, dtype=torch.float64, requires_grad=True)
    ap.apply_dfa_update(model, e)
    signal = (e.detach() if tokens else e.detach()[:, None].expand(-1, 4, -1)) @ model[0].B_dfa.T
    close(model[0].weight.grad, torch.einsum("bto,bti->oi", signal, x.detach()))
    close(model[0].bias.grad, signal.sum((0, 1)))
    assert torch.equal(model[2].weight.grad, head) and e.grad is None
    with pytest.raises(ap.RuleError, match="remembers no input"):
        ap.apply_dfa_update(model, e)  # it was forgotten after use


def test_dfa_block_update_divides_by_the_number_of_tokens() -> None:
    block = nn.Sequential(layer("dfa_block"))
    ap.initialize_dfa_block_targets(block, 7, init_std=0.5)
    x, _ = data()
    block(x)
    e = torch.randn(*X[:2], 7, dtype=torch.float64)
    ap.apply_dfa_block_update(block, e)
    signal = e @ block[0].B_dfa_block.T / 12
    close(block[0].weight.grad, torch.einsum("bto,bti->oi", signal, x.detach()))


def test_calls_out_of_order_say_which_call_is_missing() -> None:
    model = nn.Sequential(layer("dfa"))
    with pytest.raises(ap.RuleError, match="initialize_dfa_targets"):
        ap.apply_dfa_update(model, torch.zeros(3))
    ap.initialize_dfa_targets(model, 3)
    with pytest.raises(ap.RuleError, match="call the model"):
        ap.apply_dfa_update(model, torch.zeros(3))
    model(data()[0])
    with pytest.raises(ap.RuleError, match="4 features but .* 3"):
        ap.apply_dfa_update(model, torch.zeros(12, 4))
    with pytest.raises(ap.RuleError, match="no LocalLinear"):
        ap.apply_dfa_block_update(model, torch.zeros(3))


def test_grape_steps_turn_the_feedback_towards_the_weight() -> None:
    m = layer("fa", fa_grape=True)
    assert isinstance(m.B, nn.Parameter) and not m.B.requires_grad

    def cosine() -> float:
        W = m.weight.detach()
        return float(torch.cosine_similarity(m.B.flatten(), W.flatten(), dim=0))

    before = cosine()
    for _ in range(200):
        m.grape_align_step(lr_b=0.5)
    assert before < 0.5 and cosine() > 0.95
    m.grape_align_step(normalize_columns=True)
    close(m.B.norm(dim=0), torch.ones(6, dtype=torch.float64))
    plain = layer("fa")
    old = plain.B.clone()
    plain.grape_align_step()
    assert torch.equal(plain.B, old)


def test_a_fixed_feedback_that_is_a_parameter_is_used_and_gets_no_gradient() -> None:
    m, (x, g) = layer("fa", fa_grape=True), data()
    m.requires_grad_()  # as for a whole model, whatever is in it
    m(x).backward(g)
    close(x.grad, g @ m.B.detach())
    assert m.B.grad is None and m.weight.grad is not None
    W, B = (nn.Parameter(torch.randn(5, 6, dtype=torch.float64)) for _ in range(2))
    x.grad = None
    ap.LinearFA.apply(x, W, B).backward(g)
    close(x.grad, g @ B.detach())
    assert B.grad is None and W.grad is not None


def once(m: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(m, x, use_reentrant=False)


@pytest.mark.parametrize("method", ["dfa", "dfa_block"])
def test_one_error_for_several_calls_is_refused_and_a_recomputation_is_no_call(method: str) -> None:
    m, (x, g) = layer(method), data()
    ap.initialize_dfa_targets(m, 5) if method == "dfa" else m._target("B_dfa_block", 5, 0.1)
    update = ap.apply_dfa_update if method == "dfa" else ap.apply_dfa_block_update
    (m(x) + m(2 * x)).backward(g)
    exact = m.weight.grad.clone()
    with pytest.raises(ap.RuleError, match="called more than once since the last update") as caught:
        update(m, g)
    assert "\n" not in str(caught.value) and torch.equal(m.weight.grad, exact)
    found = []
    for run in (m, partial(once, m)):  # and the refusal is over
        with torch.no_grad():
            m(2 * x)
        run(x).backward(g)
        update(m, g)
        found.append(m.weight.grad.clone())
    assert torch.equal(*found) and not torch.allclose(found[0], exact)


@pytest.mark.parametrize("method", ["dfa", "dfa_block"])
def test_an_update_in_one_of_several_processes_is_refused(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    m, (x, g) = layer(method), data()
    ap.initialize_dfa_targets(m, 5) if method == "dfa" else m._target("B_dfa_block", 5, 0.1)
    update = ap.apply_dfa_update if method == "dfa" else ap.apply_dfa_block_update
    m(x).backward(g)
    exact = m.weight.grad.clone()
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    with pytest.raises(ap.RuleError, match=r"group of 2.*use convert\(model, Direct") as caught:
        update(m, g)
    assert "\n" not in str(caught.value) and torch.equal(m.weight.grad, exact)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    update(m, g)
    assert not torch.allclose(m.weight.grad, exact)


def test_feedback_follows_its_seed_and_survives_a_state_dict() -> None:
    one, other = nn.Sequential(layer("dfa")), nn.Sequential(ap.LocalLinear(6, 5, True, "dfa"))
    ap.initialize_dfa_targets(one, 3)
    other.load_state_dict(one.state_dict())  # its targets were never initialised
    assert torch.equal(other[0].B_dfa.double(), one[0].B_dfa.float().double())
    assert torch.equal(layer("fa").B, layer("fa").B)
    torch.manual_seed(0)
    a, b = ap.LocalLinear(6, 5, method="fa"), ap.LocalLinear(6, 5, method="fa")
    assert not torch.equal(a.B, b.B), "layers of equal shape share one feedback"
    torch.manual_seed(0)
    assert torch.equal(ap.LocalLinear(6, 5, method="fa").B, a.B)
    generators = [torch.Generator().manual_seed(9) for _ in range(2)]
    c, d = (ap.LocalLinear(6, 5, method="fa", generator=g) for g in generators)
    assert torch.equal(c.B, d.B)
    assert set(layer("fa").state_dict()) == {"weight", "bias", "B"}
    layer("fa").load_state_dict(nn.Linear(6, 5).double().state_dict())


@pytest.mark.parametrize(
    ("init", "check"),
    [
        ("gaussian", lambda B: abs(float(B.std()) - 0.02) < 2e-3),
        ("orthogonal", lambda B: torch.allclose(B.T @ B, torch.eye(32) * 32 * 0.02**2, atol=1e-6)),
        ("ortho_he", lambda B: torch.allclose(B.T @ B, torch.eye(32) * 2 / 48, atol=1e-6)),
        ("sparse", lambda B: bool(((B != 0).sum(1) == 2).all())),
    ],
)
def test_each_initialisation_has_its_scale(init: str, check: object) -> None:
    B = ap.LocalLinear(32, 48, method="fa", fa_init_mode=init, seed=0).B
    assert check(B)  # type: ignore[operator]
    if init == "sparse":
        sizes = B[B != 0].abs()
        assert torch.allclose(sizes, torch.full_like(sizes, 0.02 * 4))


def test_evaluation_remembers_nothing() -> None:
    m = layer("dfa")
    with torch.no_grad():
        m(data()[0])
    assert m._input is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "sing_sym"}, "did you mean sign_sym"),
        ({"method": "fa", "fa_init_mode": "orthogonl"}, "did you mean orthogonal"),
        ({"method": "fa", "fa_sparse_k": 0}, "must be >= 1"),
        ({"fa_grape_n_probe": 0}, "at least 1"),
        ({"seed": 1, "generator": torch.Generator()}, "not both"),
    ],
)
def test_bad_options_name_what_to_write(options: dict[str, object], message: str) -> None:
    with pytest.raises(ap.ConfigError, match=message):
        ap.LocalLinear(3, 2, **options)  # type: ignore[arg-type]

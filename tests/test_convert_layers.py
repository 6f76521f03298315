"""Layers of a user's own, which `register_layer` names: one linear map, kept in any way.

The oracle is the same map as an `nn.Linear`.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import altprop as ap
from conversions import assert_equal, assert_same_model, gradients

RULES = [
    ap.FeedbackAlignment(std=0.5),
    ap.SignSymmetry(variant="brsf"),
    ap.KolenPollack(),
    ap.DirectFeedback(std=0.5),
    ap.DirectFeedback(pass_through="pure", feedback="independent", std=0.5),
]


class Kernel(nn.Module):
    """A map that keeps its weight as (in, out), and its bias under a name of its own."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.kernel = nn.Parameter(linear.weight.detach().t().clone())
        self.shift = nn.Parameter(linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kernel + self.shift


class Narrow(nn.Linear):
    """A subclass that computes what its base does."""


ap.register_layer(Kernel, weight="kernel", bias="shift", transposed=True)
ap.register_layer(Narrow)


def pair() -> tuple[nn.Sequential, nn.Sequential]:
    """Return a model of a user's layers, and the same of torch's."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Linear(5, 4)).double()
    narrow = Narrow(8, 5).double()
    narrow.load_state_dict(plain[2].state_dict())
    return nn.Sequential(Kernel(plain[0]), nn.Tanh(), narrow, plain[3]), copy.deepcopy(plain)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_registered_layer_learns_as_the_linear_layer_that_it_is(rule: ap.AbstractRule) -> None:
    own, plain = pair()
    before, x = copy.deepcopy(own), torch.randn(3, 6).double()
    for model in (own, plain):
        ap.convert(model, rule, output="3")
    assert torch.allclose(own(x), plain(x))
    for model in (own, copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        got, want = gradients(model, x), gradients(copy.deepcopy(plain), x)
        got["0.weight"], got["0.bias"] = got.pop("0.kernel").t(), got.pop("0.shift")
        assert_equal(got, want)
    told = [(r.rule, r.signal, r.feedback, r.transports) for r in ap.explain(own).rows]
    assert told == [(r.rule, r.signal, r.feedback, r.transports) for r in ap.explain(plain).rows]
    assert_same_model(ap.revert(own), before)


class Gated(Kernel):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ({"weight": "kernel", "bias": "shift", "transposed": True}, "its forward is another"),
        ({"weight": "kernal"}, "it has no matrix of that name"),
        ({"weight": "shift"}, "it has no matrix of that name"),
    ],
)
def test_a_layer_that_is_not_what_it_was_registered_as_is_refused(
    names: dict[str, Any], says: str
) -> None:
    model = nn.Sequential(Gated(nn.Linear(6, 8)))
    with pytest.raises(ap.RuleError, match="Gated is a subclass of Kernel whose forward is not"):
        ap.convert(model, RULES[0])

    class Here(Gated):
        pass

    ap.register_layer(Here, **names)
    model[0].__class__ = Here
    with pytest.raises(ap.RuleError, match=rf"0: register_layer\(Here, .*\): {says}"):
        ap.convert(model, RULES[0])


def test_a_forgotten_bias_is_no_bias_and_so_another_forward() -> None:
    class Here(Kernel):
        pass

    ap.register_layer(Here, weight="kernel", transposed=True)
    with pytest.raises(ap.RuleError, match=r"its forward is another than .* bias='bias'"):
        ap.convert(nn.Sequential(Here(nn.Linear(6, 8))), RULES[0])


class Channels(nn.Module):
    """A map of the second axis, which two axes cannot be told from one of the last."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nc...,oc->no...", x, self.weight)


@pytest.mark.parametrize("n_in", [3, 4])
@pytest.mark.parametrize("n_out", [3, 4])
def test_a_map_of_another_axis_is_another_forward(n_in: int, n_out: int) -> None:
    class Here(Channels):
        pass

    ap.register_layer(Here)
    with pytest.raises(ap.RuleError, match=r"0: register_layer.* its forward is another than "):
        ap.convert(nn.Sequential(Here(n_in, n_out)), RULES[0])


def test_a_layer_for_vectors_alone_is_taken_and_one_that_takes_none_is_refused() -> None:
    class Flat(Kernel):
        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.shift, x, self.kernel)

    class Nothing(Kernel):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[:, 0])

    for kind in (Flat, Nothing):
        ap.register_layer(kind, weight="kernel", bias="shift", transposed=True)
    ap.convert(nn.Sequential(Flat(nn.Linear(6, 8))), RULES[0])
    with pytest.raises(ap.RuleError, match=r"it does not take two vectors \("):
        ap.convert(nn.Sequential(Nothing(nn.Linear(6, 8))), RULES[0])


@pytest.mark.parametrize("flag", [False, True])
def test_a_flag_named_as_the_bias_is_no_bias(flag: bool) -> None:
    class Here(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(3, 4)), flag

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.t()

    ap.register_layer(Here)
    model = ap.convert(Here(), RULES[0])
    model(torch.randn(2, 4)).sum().backward()
    assert model.weight.grad is not None


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_layer_is_called_by_its_arguments_own_name(rule: ap.AbstractRule) -> None:
    class Named(nn.Module):
        def __init__(self, by_name: bool) -> None:
            super().__init__()
            self.maps, self.by_name = pair()[0], by_name

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.maps:
                name = "input" if isinstance(layer, nn.Linear | nn.Tanh) else "x"
                x = layer(**{name: x}) if self.by_name else layer(x)
            return x

    x = torch.randn(3, 6).double()
    named, plain = (ap.convert(Named(by_name), rule, output="maps.3") for by_name in (True, False))
    assert_equal(gradients(named, x), gradients(plain, x))
    for given, names in (((), {"y": x}), ((x, x), {}), ((), {}), ((x,), {"x": x})):
        with pytest.raises(TypeError, match="Kernel is one linear map and takes one argument, x, "):
            named.maps[0](*given, **names)


@pytest.mark.parametrize("kind", [nn.Linear(2, 2), dict, "Linear"], ids=str)
def test_only_a_type_of_module_can_be_registered(kind: Any) -> None:
    with pytest.raises(ap.ConfigError, match="takes a subclass of nn.Module, not "):
        ap.register_layer(kind)

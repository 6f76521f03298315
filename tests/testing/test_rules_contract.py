"""The contract of rules tells a broken rule from a right one, each by the fault that it has."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import altprop as ap
from altprop.feedback import generator_for
from altprop.rule import Scope, Site
from altprop.testing import check_rule


@dataclass(frozen=True)
class Plain(ap.FeedbackAlignment):
    """Feedback alignment; the base of the broken rules below."""

    std: float = 0.3


class MovesTheWeight(Plain):
    def plan(self, scope: Scope) -> None:
        for place in scope.maps():
            with torch.no_grad():
                place.weight.mul_(1.01)
            scope.transport(place)


class IsLost(Plain):
    def matrix(self, W: Tensor, B: Tensor | None, noise: Tensor | None) -> Tensor:
        return W / 0


class Drifts(Plain):
    """Sends another multiple at every call."""

    calls = 0

    def matrix(self, W: Tensor, B: Tensor | None, noise: Tensor | None) -> Tensor:
        Drifts.calls += 1
        return super().matrix(W, B, noise) * (1 + 1e-3 * Drifts.calls)


@dataclass(frozen=True)
class MixesSamples(ap.DirectFeedback):
    def cotangent(self, e: Tensor, B: Tensor, shape: torch.Size) -> Tensor:
        sent = super().cotangent(e, B, shape)
        return sent + 1e-3 * sent.flip(0)


class Coarse(Plain):
    """Sends a quarter more in half precision."""

    def matrix(self, W: Tensor, B: Tensor | None, noise: Tensor | None) -> Tensor:
        return super().matrix(W, B, noise) * (1.25 if W.dtype == torch.bfloat16 else 1)


class IgnoresTheSeed(Plain):
    def draw(self, site: Site, generator: torch.Generator) -> Tensor:
        return super().draw(site, generator_for(0, site.path))


class LeavesANote(Plain):
    def plan(self, scope: Scope) -> None:
        for place in scope.maps():
            place.module.note = "converted"
            scope.transport(place)


class OtherwiseCompiled(Plain):
    def matrix(self, W: Tensor, B: Tensor | None, noise: Tensor | None) -> Tensor:
        sent = super().matrix(W, B, noise)
        return 1.01 * sent if torch.compiler.is_compiling() else sent


class NotTheWeight(Plain):
    """Claims, and only where it is asked for the matrix itself, to be backprop for `B = W`."""

    def matrix(self, W: Tensor, B: Tensor | None, noise: Tensor | None) -> Tensor:
        assert B is not None
        return B if B is W else 1.001 * B


FAULTS: dict[Any, str] = {
    MovesTheWeight: "changed the logits",
    IsLost: "not finite",
    Drifts: "accumulation over two passes",
    MixesSamples: "sum of its samples'",
    Coarse: "autocast: .* is off",
    IgnoresTheSeed: "does not depend on the seed",
    LeavesANote: "revert left an attribute",
    OtherwiseCompiled: "compiled against eager",
    NotTheWeight: "feedback := weight against backprop",
}


@pytest.mark.parametrize("kind", FAULTS, ids=lambda kind: kind.__name__)
def test_the_contract_of_rules_catches(kind: Any) -> None:
    with pytest.raises(AssertionError, match=FAULTS[kind]):
        check_rule(kind(), compiled=kind is OtherwiseCompiled, distributed=False)


def test_the_contract_of_rules_catches_a_second_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("altprop.assign.once_only", lambda grads, *sources: grads)
    with pytest.raises(AssertionError, match="differentiating twice did not raise"):
        check_rule(Plain(), compiled=False, distributed=False)


def test_the_contract_of_rules_catches_a_map_that_is_off_its_closed_form(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("altprop.assign._matrix", lambda t: 1.001 * t.reshape(-1, t.shape[-1]))
    monkeypatch.setattr("altprop.testing.rules._check_gradients", lambda rule: None)
    with pytest.raises(AssertionError, match="off its closed form"):
        check_rule(Plain(), compiled=False, distributed=False)


def test_without_assertions_a_broken_rule_is_still_found() -> None:
    code = """
import altprop as ap
from altprop.testing import check_rule

class Lost(ap.FeedbackAlignment):
    def matrix(self, W, B, noise):
        return W / 0

assert False, "assertions are on"
try:
    check_rule(Lost())
except AssertionError as error:
    print("found:", error)
"""
    done = subprocess.run(
        [sys.executable, "-O", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("found: ")

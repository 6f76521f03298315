"""What a force uses of its surroundings is found wherever it is kept, and nothing else is."""

from __future__ import annotations

import functools
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import altprop as ap

Force = Callable[..., Tensor]
lin = nn.Linear(4, 4)
head = nn.Linear(3, 3)  # as a notebook has them: an attribute of the same name is none of them
norm = nn.BatchNorm1d(4)
X = torch.randn(3, 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.norm, self.other = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)
        self.last = torch.empty(0)
        self.evaluations = 0

    def force(self, z: Tensor, x: Tensor) -> Tensor:
        self.last = z.detach()
        self.evaluations += 1
        return x - z + self.scaled(z)

    def scaled(self, z: Tensor) -> Tensor:
        return 0.1 * self.norm(torch.stack([self.head(row) for row in z]))


@dataclass(slots=True)
class Slotted:
    lin: nn.Module


class Holder:
    def __init__(self) -> None:
        self.lin, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)
        self.asked = 0

    def force(self, z: Tensor, x: Tensor) -> Tensor:
        return x - z + 0.1 * self.lin(z)

    @property
    def part(self) -> nn.Module:
        self.asked += 1
        return self.lin

    @torch.enable_grad()
    def decorated(self, z: Tensor, x: Tensor) -> Tensor:
        return self.force(z, x)

    __call__ = force


def use(held: Any, z: Tensor) -> Tensor:
    return 0.1 * held.a(held.b[0](z))


def helper(z: Tensor) -> Tensor:
    return 0.1 * lin(z)


def through(part: Callable[[Tensor], Tensor]) -> Force:
    return lambda z, x: x - z + 0.1 * part(z)


def method() -> tuple[Force, str, list[nn.Module]]:
    net = Net()
    return net.force, "force.__self__.norm, force.__self__.head", [net.norm, net.head]


def of_an_object() -> tuple[Force, str, list[nn.Module]]:
    holder = Holder()
    return holder.force, "force.__self__.lin", [holder.lin]


def callable_object() -> tuple[Force, str, list[nn.Module]]:
    holder = Holder()
    return holder, "force.lin", [holder.lin]


def decorated() -> tuple[Force, str, list[nn.Module]]:
    holder = Holder()
    return holder.decorated, "force.__self__.lin", [holder.lin]


def by_a_property() -> tuple[Force, str, list[nn.Module]]:
    holder = Holder()
    return lambda z, x: x - z + 0.1 * holder.part(z), "holder.lin", [holder.lin]


def in_slots() -> tuple[Force, str, list[nn.Module]]:
    slotted = Slotted(nn.Linear(4, 4))
    return lambda z, x: x - z + 0.1 * slotted.lin(z), "slotted.lin", [slotted.lin]


def handed_over() -> tuple[Force, str, list[nn.Module]]:
    held = SimpleNamespace(a=nn.Linear(4, 4), b=[nn.Linear(4, 4)], c=SimpleNamespace(d=lin))
    force = lambda z, x: x - z + use(held, z)  # noqa: E731
    return force, r"held.a, held.b\[0\]", [held.a, *held.b]


def given_first() -> tuple[Force, str, list[nn.Module]]:
    own = nn.Linear(4, 4)
    force = functools.partial(lambda own, z, x: x - z + 0.1 * own(z), own)
    return force, r"force.args\[0\]", [own]


def given_by_name() -> tuple[Force, str, list[nn.Module]]:
    own = nn.Linear(4, 4)
    force = functools.partial(lambda z, x, own: x - z + 0.1 * own(z), own=own)
    return force, r"force.keywords\['own'\]", [own]


def by_default() -> tuple[Force, str, list[nn.Module]]:
    own = nn.Linear(4, 4)
    return lambda z, x, a=own, *, b=own: x - z + 0.1 * a(b(z)), "a", [own]


def in_a_list() -> tuple[Force, str, list[nn.Module]]:
    parts = [nn.Linear(4, 4), nn.Linear(4, 4)]
    return lambda z, x: x - z + 0.1 * parts[1](parts[0](z)), r"parts\[0\], parts\[1\]", parts


def in_a_mapping() -> tuple[Force, str, list[nn.Module]]:
    Pair = namedtuple("Pair", "a b")
    own = nn.Linear(4, 4)
    parts = OrderedDict(deep=Pair(None, {"one": own}))
    return (
        lambda z, x: x - z + sum(0.1 * p.b["one"](z) for p in parts.values()),
        r"parts\['deep'\]\[1\]\['one'\]",
        [own],
    )


def in_a_helpers_closure() -> tuple[Force, str, list[nn.Module]]:
    own = nn.Linear(4, 4)
    return through(through_one(own)), "own", [own]


def through_one(own: nn.Module) -> Callable[[Tensor], Tensor]:
    @functools.wraps(own.forward)
    def call(*args: Any) -> Any:
        return own(*args)

    return call


def in_a_function_made_inside() -> tuple[Force, str, list[nn.Module]]:
    net = Net()

    def force(z: Tensor, x: Tensor) -> Tensor:
        def inner(y: Tensor) -> Tensor:
            return lin(net.head(y))

        return x - z + 0.1 * inner(z)

    return force, "lin, net.head", [lin, net.head]


def beside_a_module() -> tuple[Force, str, list[nn.Module]]:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 4)

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return x - z + 0.1 * self.head(z) + helper(z)

    return Own(), "lin", [lin]


KEPT = [
    method,
    of_an_object,
    callable_object,
    decorated,
    by_a_property,
    in_slots,
    handed_over,
    given_first,
    given_by_name,
    by_default,
    in_a_list,
    in_a_mapping,
    in_a_helpers_closure,
    in_a_function_made_inside,
    beside_a_module,
    lambda: (lambda z, x: x - z + helper(z), "lin", [lin]),
    lambda: (torch.no_grad()(through(lin)), "part", [lin]),
    lambda: (lin.forward, "force.__self__", [lin]),
    lambda: (through(lin.forward), "part.__self__", [lin]),
]


@pytest.mark.parametrize("make", KEPT, ids=lambda make: make.__name__)
def test_what_a_force_uses_is_refused_by_the_name_that_helps_and_taken_once_it_is_given(
    make: Callable[[], tuple[Force, str, list[nn.Module]]],
) -> None:
    force, names, parts = make()
    message = rf"closes over {names}.*write from_function\(force, {names.partition(',')[0]}"
    with pytest.raises(ap.ConfigError, match=message) as refused:
        ap.from_function(force)
    assert "\n" not in str(refused.value)
    ap.from_function(force, *parts)
    for part in parts:
        part.requires_grad_(False)
    try:
        ap.from_function(force)  # what does not learn needs not be given
    finally:
        for part in parts:
            part.requires_grad_(True)


def test_a_parameter_is_refused_with_both_ways_to_give_it() -> None:
    weights = [nn.Parameter(torch.eye(4))]
    ways = r"closes over weights\[0\].*from_function\(force, W=weights\[0\]\).*takes W by name, or"
    with pytest.raises(ap.ConfigError, match=ways):
        ap.from_function(lambda z, x: x - z + 0.1 * z @ weights[0])
    own = nn.Linear(4, 4)
    ap.from_function(lambda z, x: x - z + 0.1 * z @ own.weight, own)
    with pytest.raises(ap.ConfigError, match=r"W=own\.weight\)"):
        ap.from_function(lambda z, x: x - z + 0.1 * z @ own.weight)


def test_an_attribute_is_no_global_of_the_same_name() -> None:
    net = Net()
    force = lambda z, x: x - z + 0.1 * net.norm(net.head(z))  # noqa: E731
    dynamics = ap.from_function(force, net.head, net.norm)
    assert {id(m) for m in dynamics.uses()}.isdisjoint({id(head), id(norm), id(net.other)})
    ap.Equilibrium(dynamics)(X).sum().backward()
    assert net.head.weight.grad is not None and net.other.weight.grad is None


def test_of_a_larger_model_only_what_the_force_reads_is_asked_for() -> None:
    net = Net()
    dynamics = ap.from_function(net.force, net.head, net.norm)
    ap.Equilibrium(dynamics)(X).sum().backward()
    assert net.evaluations and net.last.shape == X.shape
    assert {id(p) for p in dynamics.parameters()}.isdisjoint(map(id, net.other.parameters()))


def test_batch_norm_is_refused_wherever_it_is_kept() -> None:
    parts = {"norm": nn.BatchNorm1d(4, affine=False)}
    with pytest.raises(ap.RuleError, match="BatchNorm1d"):
        ap.Equilibrium(ap.from_function(lambda z, x: x - z + 0.1 * parts["norm"](z)))(X)


def test_what_holds_itself_or_much_is_looked_at_once_and_within_bounds() -> None:
    own = nn.Linear(4, 4)
    ring: list[Any] = [own]
    ring.append({"ring": ring})
    many = [list(range(100)) for _ in range(3_000)] + [own]

    def again(z: Tensor, x: Tensor, depth: int = 0) -> Tensor:
        return x - z + 0.1 * ring[0](z) if depth else again(z, x, 1)

    with pytest.raises(ap.ConfigError, match=r"closes over ring\[0\]"):
        ap.from_function(again)
    ap.from_function(lambda z, x: x - z + 0.1 * len(many) * z)  # more than is looked at


class Trap:
    """Something that notices when it is asked."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} was asked for")

    def __iter__(self) -> Any:
        raise AssertionError("it was iterated")

    __len__ = __bool__ = __hash__ = __eq__ = __iter__


def test_nothing_is_executed() -> None:
    trap, held, holder = Trap(), [Trap()], Holder()
    force = lambda z, x: x - z + trap.weight * z + held[0](z) + len(trap) + holder.part(z)  # noqa: E731
    ap.from_function(force, holder.lin)
    assert not holder.asked

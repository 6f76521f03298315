"""FSDP2 around an equilibrium is exact, and around a part of one it is refused with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import altprop as ap

AEP = ap.AEP(tol=1e-7, response=1e-4)
TIGHT = ap.Anderson(tol=1e-10, max_steps=300)
X = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    store = distributed.FileStore(str(Path(tmp_path_factory.mktemp("ranks")) / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def model(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    if kind == "stack":
        layers = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)]
        middle: nn.Module = nn.Sequential(*layers)
    elif kind == "own":
        W = nn.Linear(8, 8)
        dynamics = ap.from_function(lambda z, x: x - z + 0.4 * torch.tanh(W(z)), W)
        middle = ap.Equilibrium(dynamics, TIGHT, AEP)
    else:
        gated = ap.GatedBlock(8, heads=2, init_std=0.3)
        nn.init.uniform_(gated.alpha, -0.4, 0.4)
        middle = ap.Equilibrium(gated, TIGHT, AEP)
    whole = nn.Sequential(nn.Linear(8, 8), middle, nn.Linear(8, 8), nn.Tanh()).double()
    return ap.convert(whole, {"1": AEP}) if kind == "stack" else whole


def gradients(of: nn.Module) -> dict[str, Tensor]:
    of(X).square().sum().backward()
    grads = {name: p.grad for name, p in of.named_parameters()}
    return {name: getattr(g, "full_tensor", lambda g=g: g)() for name, g in grads.items()}


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view:UserWarning")
@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("where", ["model", "equilibrium"])
@pytest.mark.parametrize("kind", ["gated", "own", "stack"])
def test_sharding_what_holds_it_changes_no_gradient(
    kind: str, where: str, reshard: bool, mesh: Any
) -> None:
    wanted, sharded = gradients(model(kind)), model(kind)
    if where == "equilibrium":
        fully_shard(sharded[1], mesh=mesh, reshard_after_forward=reshard)
    fully_shard(sharded, mesh=mesh, reshard_after_forward=reshard)
    for name, own in gradients(sharded).items():
        assert torch.allclose(own, wanted[name], rtol=1e-10, atol=1e-14), name


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("kind", ["gated", "own", "stack"])
def test_sharding_a_part_of_it_is_refused(kind: str, reshard: bool, mesh: Any) -> None:
    sharded = model(kind)
    for part in sharded[1] if kind == "stack" else [sharded[1].dynamics]:
        fully_shard(part, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(sharded, mesh=mesh, reshard_after_forward=reshard)
    with pytest.raises(ap.RuleError, match=r"every rank makes another number.*fully_shard\(block"):
        sharded(X)


def test_a_hinge_on_sharded_parameters_is_refused_before_it_adds_anything(mesh: Any) -> None:
    sharded, hinge = model("gated"), ap.JacobianHinge(every=1)
    fully_shard(sharded, mesh=mesh)
    before = gradients(sharded)
    state = hinge.init(torch.Generator().manual_seed(0))
    with pytest.raises(ap.RuleError, match="JacobianHinge evaluates the force between backward"):
        hinge.apply(sharded, state, 0)
    for name, p in sharded.named_parameters():
        assert torch.equal(p.grad.full_tensor(), before[name])

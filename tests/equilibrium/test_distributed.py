"""Equilibria on several ranks: FSDP2 around one is exact, inside one refused; hinges are shared."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import altprop as ap
from systems import EXACT, TIGHT, gated

AEP = ap.AEP(tol=1e-7, response=1e-4)
X = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    store = distributed.FileStore(str(tmp_path / "store"), 1)
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
        middle = gated().block(AEP)
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


def rank_push(rank: int, store: str) -> None:
    """Take part as one of two ranks, of which only the first is past the margin."""
    distributed.init_process_group(
        "gloo",
        store=distributed.FileStore(store, 2),
        rank=rank,
        world_size=2,
        timeout=timedelta(minutes=1),
    )
    try:
        check_push(rank)  # its wrapper is gone before the group: the wrapper's end holds the GIL
    finally:  # while it joins the group's thread, which may be waiting for the GIL
        distributed.destroy_process_group()


def check_push(rank: int) -> None:
    def push(module: nn.Module, target: float) -> dict[str, Tensor]:
        hinge = ap.JacobianHinge(target=target)
        module.zero_grad()
        hinge.apply(module, hinge.init(torch.Generator().manual_seed(0)), step=0)
        return {n: p.grad.clone() for n, p in block.named_parameters() if p.grad is not None}

    this = gated()
    block = this.block(EXACT)
    this.cost(block(this.x)).backward()
    alone = push(block, 0.01)
    parallel = nn.parallel.DistributedDataParallel(block)
    shared = push(parallel, 0.01 if rank == 0 else 1e3)
    assert shared.keys() == dict(block.named_parameters()).keys()
    for name, found in shared.items():
        wanted = alone.get(name, torch.zeros_like(found)) / 2
        # a difference over a step of 6e-6 magnifies what rounding differs by between processes
        assert (found - wanted).norm() <= 1e-8 * wanted.norm(), name


def test_ranks_of_a_data_parallel_run_share_the_push(tmp_path: Path) -> None:
    # two fresh processes: a second process group of one process counts its keys differently
    code = f"from {__name__} import rank_push; rank_push(int(sys.argv[1]), sys.argv[2])"
    surroundings = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    words = [sys.executable, "-c", f"import sys; {code}"]
    ranks = [
        subprocess.Popen([*words, str(rank), str(tmp_path / "store")], env=surroundings)
        for rank in range(2)
    ]
    try:
        assert [rank.wait(timeout=100) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()

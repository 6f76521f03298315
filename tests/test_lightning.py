"""Lightning's checkpoints of converted modules, wherever convert stands."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import altprop as ap

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs, not ours
RULE = ap.KolenPollack()


def lightning() -> Any:
    """Import Lightning, which may raise anything where its own dependencies do not fit."""
    try:
        return importlib.import_module("lightning")
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"lightning cannot be imported: {error}")


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def kinds() -> dict[str, Any]:
    L = lightning()

    class Base(L.LightningModule):
        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return (self.net(batch[0]) - batch[1]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.1)

    class InInit(Base):
        def __init__(self) -> None:
            super().__init__()
            self.net = ap.convert(net(), RULE)

    class InConfigure(Base):
        def __init__(self) -> None:
            super().__init__()
            self.net = None

        def configure_model(self) -> None:
            if self.net is None:  # Lightning calls this again
                self.net = ap.convert(net(), RULE)

    class Outside(Base):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

    return {"init": InInit, "configure_model": InConfigure, "outside": Outside}


def trained(module: Any, folder: Path) -> Path:
    L = lightning()
    data = torch.utils.data.TensorDataset(torch.randn(8, 4), torch.randn(8, 2))
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("where", ["init", "configure_model"])
def test_a_module_that_converts_itself_loads_with_its_feedback(where: str, tmp_path: Path) -> None:
    kind = kinds()[where]
    module = kind()
    path = trained(module, tmp_path)
    loaded = kind.load_from_checkpoint(path)
    assert same(loaded, module) and type(loaded.net[0]) is type(module.net[0])


def test_a_module_converted_from_outside_is_converted_again_and_then_loaded(tmp_path: Path) -> None:
    kind = kinds()["outside"]
    module = kind()
    ap.convert(module.net, RULE)
    path = trained(module, tmp_path)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"net.0.B", "net.2.B"'):
        kind.load_from_checkpoint(path)
    loaded = kind.load_from_checkpoint(path, strict=False)
    assert type(loaded.net[0]) is nn.Linear
    assert torch.equal(loaded.net[0].weight, module.net[0].weight)
    ap.convert(loaded.net, RULE)
    loaded.load_state_dict(torch.load(path)["state_dict"])
    assert same(loaded, module)

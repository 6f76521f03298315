"""Rules learn scikit-learn's digits, and an encoder classifies them: end to end, in seconds."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import altprop as ap

datasets = pytest.importorskip("sklearn.datasets")
pytestmark = pytest.mark.filterwarnings("ignore")


def digits() -> tuple[Tensor, Tensor]:
    found = datasets.load_digits()
    return torch.tensor(found.data, dtype=torch.float32) / 16, torch.tensor(found.target)


class Rows(nn.Module):
    """Each image as eight tokens, its rows, through a post-norm encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.where = nn.Parameter(torch.randn(8, 16))
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x.view(-1, 8, 8)) + self.where).mean(1))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)
    )


@pytest.mark.parametrize(
    ("make", "rule", "output"),
    [
        (mlp, ap.FeedbackAlignment(std=0.1), "4"),
        (mlp, ap.SignSymmetry(), "4"),
        (mlp, ap.KolenPollack(), "4"),
        (mlp, ap.DirectFeedback(std=0.1), "4"),
        (Rows, ap.SignSymmetry(), "head"),
        (Rows, ap.KolenPollack(), "head"),
        (Rows, ap.DirectFeedback(granularity="sublayer"), "head"),
        (Rows, ap.DirectFeedback(granularity="block"), "head"),
        (Rows, ap.GrAPE(every=4), "head"),
    ],
)
def test_rule_learns_digits(make: type[nn.Module], rule: ap.AbstractRule, output: str) -> None:
    torch.manual_seed(0)
    x, y = digits()
    model = ap.convert(make(), rule, output=output)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        rows = torch.randint(1300, (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        accuracy = float((model(x[1300:]).argmax(-1) == y[1300:]).float().mean())
    assert accuracy > 0.45, accuracy  # guessing gives 0.10

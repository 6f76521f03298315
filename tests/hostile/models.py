"""Malformed checkpoints, and malformed folders of models that are shared."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import altprop as ap
from altprop.conversion.record import record_of
from altprop.lab import checkpoint as saved
from altprop.lab.choices import choices, types_of
from altprop.sharing import pretrained
from altprop.terminal import printable
from conversions import mlp, tiny
from hostile.files import another, changed, put_something_else, spoil, spoil_json
from hostile.values import RESUME, SAMPLE


def checkpoint(draw: Random, here: Path, train: Sequence[str]) -> list[str]:
    """A checkpoint of a run: its bytes, its tensors, its notes."""
    which = draw.choice(["best", "last"])
    path = here / "run" / f"{which}.safetensors"
    if draw.random() < 0.25:
        spoil(draw, path)
    elif draw.random() < 0.05:
        put_something_else(draw, path)
    else:
        with safe_open(path, framework="pt") as file:
            held = {name: file.get_tensor(name).clone() for name in file.keys()}
            header = dict(file.metadata())
        notes = json.loads(header["notes"])
        for _ in range(draw.choice([1, 1, 2])):
            name = draw.choice(sorted(held))
            tensor = held[name]
            changed: list[Any] = [
                None, tensor.flatten(), tensor.double(), tensor.to(torch.bfloat16), tensor.long(),
                torch.empty(0), torch.zeros(3, 3), tensor.unsqueeze(0), torch.full_like(tensor, 7),
                tensor.to(torch.uint8),
            ]  # fmt: skip
            if tensor.dim() == 2:
                changed.append(tensor.t().contiguous())
            values: list[Any] = [
                None,
                -1,
                "x",
                10**400,
                1e308,
                [],
                {},
                [[[]]],
                True,
                [10**30],
                2**62,
            ]
            match draw.randrange(6):
                case 0 | 1 | 2:
                    new = draw.choice(changed)
                    held.pop(name) if new is None else held.update({name: new})
                case 3:
                    names = ["model.x", "extra.x", "x", ".", "optimiser.x.exp_avg", "training.y"]
                    held[draw.choice(names)] = tensor.clone()
                case 4:
                    header[draw.choice(["format", "notes"])] = draw.choice(
                        [
                            "",
                            "[" * 100_000,
                            "{}",
                            "[]",
                            "7",
                            "{",
                            '{"a":' * 9000,
                            "\x1b[2J",
                            "altprop/9",
                        ]
                    )
                case _:
                    part = draw.choice([notes, notes.get("progress", notes)])
                    if isinstance(part, dict):
                        part[draw.choice([*part, "x"])] = draw.choice(values)
                    header["notes"] = json.dumps(notes)
        if "sums" in header and draw.random() < 0.8:  # by somebody who knows the checksums
            sums = {name: saved._sum(tensor) for name, tensor in held.items()}
            header["sums"] = json.dumps(sums)
            header["digest"] = saved._digest(header)
        save_file(held, path, header)
    return list(SAMPLE if which == "best" else draw.choice([RESUME, [*SAMPLE, "--which", "last"]]))


RULES: dict[str, Any] = {
    "fa": ap.FeedbackAlignment(init="orthogonal", std=0.1),
    "kp": ap.KolenPollack(),
    "dfa": ap.DirectFeedback(calibrate_every=3),
    "aep": {"blocks": ap.AEP(tol=1e-4)},
    "mixed": {"blocks.0": ap.BlockDirectFeedback(), "head": ap.SignSymmetry(), "*": ap.Backprop()},
}


def good_shared(train: Sequence[str]) -> None:
    """Share a model by each of a few rules."""
    for name, rule in RULES.items():
        rules = rule.values() if isinstance(rule, dict) else [rule]
        axis = 0 if any(isinstance(each, ap.AbstractBroadcast) for each in rules) else None
        model = ap.convert(tiny(), rule, output="head", seed=3, batch_axis=axis)
        ap.save_pretrained(model, Path("shared") / name)


def _spoil_weights(draw: Random, path: Path) -> dict[str, torch.Tensor]:
    """Spoil the tensors, the names or the header of weights; return what they are then."""
    with safe_open(path, framework="pt") as file:
        held = {name: file.get_tensor(name).clone() for name in file.keys()}
        header = dict(file.metadata())
    name = draw.choice(sorted(held))
    tensor = held[name]
    kinds = (torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64)
    match draw.randrange(6):
        case 0:
            held[name] = tensor.to(draw.choice(kinds))
        case 1:
            held[name] = draw.choice(
                [tensor * float("nan"), torch.empty(0), tensor.flatten(), torch.tensor(7.0),
                 tensor.flatten()[:1].clone(), tensor.unsqueeze(0)]
            )  # fmt: skip
        case 2:
            held[draw.choice(["x", "", "\x1b[2J", "a.b", f"{name}.x"])] = held.pop(name)
        case 3:
            aliases: list[Any] = [
                {name: name}, {"x": name}, {name: "x"}, {"x": []}, {"x": {}}, {"x": None}, [], "x",
                [["x", name]], 7, None, {"\ud800": name}, {name: sorted(held)[0]}, {"a": "x" * 999},
                {f"x{i}": name for i in range(3000)},
            ]  # fmt: skip
            texts = ["[" * 100_000, '{"a":' * 9000, "", "{", "9" * 5000]
            header["aliases"] = draw.choice([json.dumps(draw.choice(aliases)), draw.choice(texts)])
        case 4:
            header = {draw.choice(["x", "aliases", "format"]): draw.choice(["", "x", "{}"])}
        case _:
            del held[name]
    save_file(held, path, header)
    return held


def shared(draw: Random, here: Path, train: Sequence[str]) -> Callable[[], int]:
    """A folder of a model that somebody shares: its rules, its weights, its feedback."""
    name = draw.choice(list(RULES))
    folder = here / "shared" / name
    path = folder / draw.choice(["rules.json"] * 4 + ["model.safetensors", "feedback.safetensors"])
    if not path.exists():  # of a rule without feedback
        path = folder / "model.safetensors"
    if draw.random() < 0.1:
        put_something_else(draw, path)
    elif path.name == "rules.json":
        _spoil_rules(draw, path)
    elif draw.random() < 0.3:
        spoil(draw, path)
    else:
        held = _spoil_weights(draw, path)
        if draw.random() < 0.7:  # by somebody who knows the digests
            said = json.loads((folder / "rules.json").read_text(encoding="utf-8"))
            if path.name == "model.safetensors":
                said["weights"] = pretrained.digest(held)
            else:
                said["feedback"] = {n: pretrained.digest({"": v}) for n, v in held.items()}
            (folder / "rules.json").write_text(json.dumps(said), encoding="utf-8")
    other = draw.random() < 0.1
    return lambda: _read(folder, mlp() if other else tiny())


def _spoil_rules(draw: Random, path: Path) -> None:
    """Spoil how a model was converted: any of it, or the values of its rules."""
    said = json.loads(path.read_text(encoding="utf-8"))
    if draw.random() < 0.4:
        spoil_json(draw, path)
        return
    call = said["calls"][0]
    match draw.randrange(4):
        case 0:
            classes = [*choices(ap.AbstractRule), *choices(ap.AbstractSolver), "Tensor", "object"]
            cls = draw.choice(classes)
            known = {**choices(ap.AbstractRule), **choices(ap.AbstractSolver)}
            fields = list(types_of(known[cls])) if cls in known else ["x"]
            value = another(draw, {"class": draw.choice(classes), "values": {}})
            rule = {"class": cls, "values": {draw.choice(fields): value} if fields else {}}
            where = draw.choice(["blocks", "*", "head", "blocks.0", "", "[", "\ud800", "*" * 999])
            call["rule"] = draw.choice([rule, {"mapping": {where: rule}}])
        case 1:
            name = draw.choice([*call, "x"])
            call[name] = another(draw, call.get(name))
        case 2:
            said["calls"] = draw.choice([said["calls"] * 2, [{**call, "path": "blocks.0"}, call]])
            said["places"] = draw.choice([said["places"], said["places"][::-1], [], ["x"], [""]])
        case _:
            rule = call["rule"]
            if "mapping" in rule:
                rule = rule["mapping"][draw.choice(list(rule["mapping"]))]
            rule["values"] = changed(draw, rule["values"])
    path.write_text(json.dumps(said), encoding="utf-8")


def _read(folder: Path, model: nn.Module) -> int:
    """Read a shared model as the command line would, and make sure what a refusal leaves."""
    try:
        ap.from_pretrained(folder, model)
    except ap.AltpropError as error:
        assert not any(record_of(module) for module in model.modules()), "rules are left"
        assert not list(ap.feedback_parameters(model)), "feedback is left"
        print("altprop: error:", printable(str(error), keep="\n"), file=sys.stderr)
        return 2
    return 0

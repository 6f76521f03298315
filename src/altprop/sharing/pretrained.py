"""A converted model in a folder that others can use: plain weights, and the rules beside them.

The weights are those of the model as it was before `convert`, so that whoever has no altprop reads
them too. `rules.json` says how to convert it again; it is data, and reading it runs nothing.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from altprop.auditing.report import AuditReport
from altprop.conversion.convert import convert
from altprop.conversion.convert import revert as _revert  # beside the argument of that name
from altprop.conversion.record import Conversion, record_of
from altprop.errors import (
    CheckpointError,
    ConfigError,
    RuleError,
    RuleWarning,
    in_a_line,
    listed,
    refusing,
    unknown,
)
from altprop.files import replacing, write_whole
from altprop.reading import open_regular, parse_json, place, read_bytes
from altprop.shape import check_shape
from altprop.sharing.card import check_card, write_card
from altprop.sharing.values import read, written
from altprop.terminal import printable

M = TypeVar("M", bound=nn.Module)
Kept = Literal["stored", "drawn"]

FORMAT = "altprop-rules/1"
RULES, WEIGHTS, FEEDBACK = "rules.json", "model.safetensors", "feedback.safetensors"
LARGEST = 32 << 20  # bytes of rules.json
LARGEST_WEIGHTS = 1 << 50  # bytes
LONGEST = 1500  # characters of an error
_CONTENT = {
    "format": str, "calls": [{}], "places": [str], "weights": str, "feedback": {str: str},
    "own": bool,
}  # fmt: skip
_CALL = {
    "path": str,
    "output": (str, None),
    "on_failure": (str, None),
    "batch_axis": (int, [int, int], None),
}
_ALIASES = "aliases"  # in the header of the weights: what is tied to what


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    feedback: Kept = "stored",
    revert: bool = False,
    audit: AuditReport | None = None,
    card: bool = True,
) -> Path:
    """Write a converted model, with its rules, as a folder to hand on; return the folder.

    `model.safetensors` holds the plain model's weights, `rules.json` the rules, their seeds and
    digests of all tensors, `feedback.safetensors` the feedback, `README.md` a model card. A model
    with a `save_pretrained` of its own (of transformers) writes its weights by that, and its own
    `from_pretrained` reads them. What lies in the folder under these names is replaced;
    `rules.json` comes last, so that what a crash has left is refused. The model is not changed.

    **Arguments:** `feedback`: `stored`, or `drawn` to leave out what its seed gives again, bit for
    bit (what has learned is stored in either case; this converts a copy of the model). `revert`:
    write the plain model alone, without rules and feedback. `audit`, whose figures the card shows;
    `card`, whether to write one.

    **Raises:** `RuleError` for a model that was not converted, or of which a part was converted
    again; `ConfigError` for a rule that JSON cannot hold; `CheckpointError` where nothing can be
    written, or where another README.md lies.
    """
    if feedback not in get_args(Kept):
        raise unknown("feedback", str(feedback), get_args(Kept))
    target = place(folder, CheckpointError)
    content = _content(model)
    names = set(feedback_names(model))
    state = _tensors(model)
    plain = {name: value for name, value in state.items() if name not in names}
    kept = {name: value for name, value in state.items() if name in names}
    content["weights"] = digest(plain)
    content["feedback"] = {name: digest({"": value}) for name, value in kept.items()}
    if feedback == "drawn" and not revert:
        again = _redrawn(model, content)
        kept = {n: B for n, B in kept.items() if digest({"": again[n]}) != content["feedback"][n]}
    own = getattr(model, "save_pretrained", None)
    content["own"] = own is not None
    if card:
        check_card(target)
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name in (RULES, FEEDBACK):
            (target / name).unlink(missing_ok=True)
        if own is not None:
            own(str(target), state_dict=plain)
        else:
            _save(plain, target / WEIGHTS)
        if kept and not revert:
            _save(kept, target / FEEDBACK)
        if card:
            size = sum(p.numel() for n, p in model.named_parameters() if n not in names)
            write_card(target, type(model).__name__, size, content, audit, reverted=revert)
        if not revert:
            write_whole(target / RULES, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{folder}: cannot be written ({why})") from error
    return target


def from_pretrained(folder: str | Path, model: M | type[M]) -> M:
    """Give a model the weights, rules and feedback that `save_pretrained` wrote; return it.

    **Arguments:** `model`, the untouched model, which gets the weights in place. Where a model's
    own `save_pretrained` wrote them, what its own `from_pretrained` returned, or the class, such
    as `AutoModelForCausalLM`, whose it is.

    **Raises:** `CheckpointError` for a folder that is not whole or of another model; what
    `convert` raises for a model that the rules do not fit. The model then has no rules, and its
    own weights unless they fitted.
    """
    path = place(folder, CheckpointError)
    content = _read_content(path)
    if isinstance(model, type):
        maker = getattr(model, "from_pretrained", None)
        if maker is None:
            raise ConfigError(f"{model.__name__} has no from_pretrained: give an untouched model")
        model = maker(str(path))
    assert isinstance(model, nn.Module)
    if any(record_of(module) is not None for module in model.modules()):
        raise RuleError("the model is converted already: give an untouched one, or revert it")
    kept = _load(path / FEEDBACK) if (path / FEEDBACK).exists() else {}
    if not content["own"]:
        _load_weights(model, path / WEIGHTS, content["weights"])
    elif digest(_tensors(model)) != content["weights"]:
        raise CheckpointError(
            f"{path}: its rules are of other weights than this model has: load it by its own "
            f"from_pretrained({str(path)!r})"
        )
    try:
        _convert(model, content)
        _give_feedback(model, kept, content, path)
    except BaseException:
        if any(record_of(module) is not None for module in model.modules()):
            _revert(model)
        raise
    return model


def feedback_names(model: nn.Module) -> Iterator[str]:
    """Yield the names in a state dict of what `convert` has added: feedback, counts of passes."""
    for path, module in model.named_modules(remove_duplicate=False):
        if (record := record_of(module)) is not None:
            yield from (f"{path}.{name}".lstrip(".") for name in record.names)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's parameters and buffers by name, as a state dict has them."""
    state = {name: v for name, v in model.state_dict().items() if isinstance(v, Tensor)}
    if any(hasattr(value, "full_tensor") for value in state.values()):
        raise RuleError(
            "the model is sharded: gather its state into an unsharded copy, and save that"
        )
    return state


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors by name: their dtypes, shapes and bytes."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        found.update(f"{name}:{value.dtype}:{tuple(value.shape)}:".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _content(model: nn.Module) -> dict[str, Any]:
    """Return by which calls a model was converted, and where its rules are now."""
    calls: list[dict[str, Any]] = []
    roots: list[str] = []
    for path, module in model.named_modules():
        record = record_of(module)
        if record is None or record.call is None:
            continue
        if roots and path.startswith(tuple(roots)):
            raise RuleError(
                f"{path} was converted again inside a converted model: revert the whole, and "
                "convert it once, with a rule for each place"
            )
        roots.append(f"{path}." if path else "")
        values = {name: written(value) for name, value in vars(record.call).items()}
        calls.append({"path": path, **values})
    if not calls:
        raise RuleError(
            f"this {type(model).__name__} was not converted: call convert(model, rule) first, or "
            "save the whole model that it is a part of"
        )
    return {"format": FORMAT, "calls": calls, "places": _places(model)}


def _places(model: nn.Module) -> list[str]:
    """Return the paths of the modules that a rule has made others."""
    return [path for path, module in model.named_modules() if record_of(module) is not None]


def _convert(model: nn.Module, content: Mapping[str, Any]) -> None:
    """Convert a plain model as another one was, without what was reverted of it since."""
    for given in content["calls"]:
        with refusing(CheckpointError, "a call of convert is damaged"):
            check_shape(given, _CALL)
            part = model.get_submodule(given["path"])
            call = Conversion(**{name: read(v) for name, v in given.items() if name != "path"})
        with warnings.catch_warnings():  # of what a rule leaves: whoever converted has read it
            warnings.simplefilter("ignore", RuleWarning)
            try:
                convert(part, **vars(call))
            except (RuleError, ConfigError) as error:
                raise type(error)(in_a_line(error, LONGEST)) from error
    places = set(content["places"])
    for path, module in model.named_modules():
        if record_of(module) is not None and path not in places:
            _revert(module)
    if _places(model) != content["places"]:
        there, here = (
            listed(printable(path[:80]) for path in paths)
            for paths in (content["places"], _places(model))
        )
        raise CheckpointError(f"its rules stand at {there}, and here at {here}")


def _redrawn(model: nn.Module, content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the state of a copy of the model that is converted anew."""
    twin = copy.deepcopy(model)
    _revert(twin)
    _convert(twin, content)
    return _tensors(twin)


def _give_feedback(
    model: nn.Module, kept: Mapping[str, Tensor], content: Mapping[str, Any], path: Path
) -> None:
    """Put stored feedback into its places, and check what was drawn."""
    state = _tensors(model)
    names = set(feedback_names(model))
    if names != set(content["feedback"]) or not names >= kept.keys():
        raise CheckpointError(f"{path}: its feedback is of another model")
    for name in names:
        value = kept.get(name, state[name])
        if value.shape != state[name].shape or digest({"": value}) != content["feedback"][name]:
            raise CheckpointError(
                f"{path}: the feedback {name} is not what it was"
                + ("; save the model with feedback='stored'" * (name not in kept))
            )
    with torch.no_grad():
        for name, value in kept.items():
            state[name].copy_(value)


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors as safetensors; of tied ones the first, and in the header which are tied."""
    first: dict[tuple[Any, ...], str] = {}
    aliases: dict[str, str] = {}
    whole: dict[str, Tensor] = {}
    for name, value in tensors.items():
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype)
        if value.numel() and first.setdefault(key, name) != name:
            aliases[name] = first[key]
        else:
            whole[name] = value.detach().cpu().contiguous().clone()
    header = {"format": "pt", _ALIASES: json.dumps(aliases)}
    with replacing(path) as fresh:
        save_file(whole, fresh, header)


def _load(path: Path) -> dict[str, Tensor]:
    """Read what `_save` wrote."""
    try:
        os.close(open_regular(path, LARGEST_WEIGHTS))
        with safe_open(path, framework="pt") as file:
            aliases = parse_json((file.metadata() or {}).get(_ALIASES, "{}"))
        check_shape(aliases, {str: str}, _ALIASES)
        "".join((*aliases, *aliases.values())).encode()  # which half a character cannot be
        tensors = load_file(path)
        return tensors | {name: tensors[first] for name, first in aliases.items()}
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: truncated, or no weights ({error})") from error


def _load_weights(model: nn.Module, path: Path, wanted: str) -> None:
    """Give a model its weights, or say in what they are another's."""
    tensors, state = _load(path), _tensors(model)
    if digest(tensors) != wanted:
        raise CheckpointError(f"{path} is not what was written there: get the folder again")
    kinds, own = ({n: (v.shape, v.dtype) for n, v in of.items()} for of in (tensors, state))
    if wrong := sorted(name for name in kinds.keys() | own if kinds.get(name) != own.get(name)):
        raise CheckpointError(f"{path} is of another model: it differs in {listed(wrong)}")
    model.load_state_dict(tensors, strict=False)  # all tensors are there, as was just seen


def _read_content(folder: Path) -> dict[str, Any]:
    path = folder / RULES
    if not path.is_file():
        raise CheckpointError(
            f"{folder} holds no {RULES}: it is not whole, or of a plain model, whose weights are "
            f"read by safetensors.torch.load_model(model, {str(folder / WEIGHTS)!r})"
        )
    with refusing(CheckpointError, f"{path} is damaged or not altprop's"):
        try:
            content = parse_json(read_bytes(path, LARGEST))
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
        check_shape(content, _CONTENT)
        if content.keys() != _CONTENT.keys() or content["format"] != FORMAT:
            raise ValueError(f"expected {', '.join(_CONTENT)}, of {FORMAT}")
        json.dumps(content, ensure_ascii=False).encode()  # which half a character cannot be
        return dict(content)

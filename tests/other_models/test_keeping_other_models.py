"""What converting leaves behind: nothing after `revert`, and a state that saves and loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import Case, distance, in_double, without_noise
from zoo import ALL, BROADCASTS, BY_NAME, CASES, RULES, named

import altprop as ap


@ALL
@pytest.mark.parametrize("rule", RULES, ids=named)
def test_revert_leaves_no_trace(case: Case, rule: ap.AbstractRule) -> None:
    model = case.convert(rule)
    case.gradients(model)
    ap.revert(model)
    case.assert_plain(model)


# with buffers, with parameters, with counts of passes, with taps
KINDS = [RULES[1], ap.KolenPollack(), ap.WeightMirror(probes=4), *BROADCASTS]


@ALL
@pytest.mark.parametrize("rule", KINDS, ids=named)
def test_a_state_dict_carries_feedback_into_a_model_of_another_seed(
    case: Case, rule: ap.AbstractRule, tmp_path: Path
) -> None:
    (model, _), other = case.trained(rule), case.convert(rule, seed=1)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    wanted = without_noise(model, rule, case.gradients(model))
    assert distance(case.gradients(other), wanted) == 0.0


PRETRAINED = [case for case in CASES if case.pretrained]


@pytest.mark.parametrize("case", PRETRAINED, ids=lambda case: case.name)
@pytest.mark.parametrize("rule", KINDS, ids=named)
@pytest.mark.filterwarnings("ignore")  # theirs: of keys that a plain model does not know
def test_a_pretrained_folder_gives_the_plain_model_back(
    case: Case, rule: ap.AbstractRule, tmp_path: Path
) -> None:
    model, plain = case.convert(rule), case.plain()
    model.save_pretrained(tmp_path)
    for kind in dict.fromkeys((type(plain), type(model))):
        loaded = in_double(kind.from_pretrained(tmp_path, dtype=torch.float64))
        for p in loaded.parameters():  # where a file's bytes lie decides how kernels round
            p.data = p.data.clone()
        assert distance(case.gradients(loaded), case.backprop) <= 1e-12
    patterns = case.patterns(rule)
    ap.convert(loaded, rule if list(patterns) == ["*"] else patterns, output=case.output)
    assert distance(case.gradients(loaded), case.gradients(model)) <= 1e-12


ADAPTED = [case for case in CASES if "lora" in case.name]


@pytest.mark.parametrize("case", ADAPTED, ids=lambda case: case.name)
@pytest.mark.parametrize("rule", KINDS, ids=named)
@pytest.mark.filterwarnings("ignore")  # theirs
def test_saved_adapters_belong_to_a_plain_model(
    case: Case, rule: ap.AbstractRule, tmp_path: Path
) -> None:
    from peft import PeftModel

    model, batch = case.convert(rule), case.batch()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora" in name:
                p.mul_(1.5)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(BY_NAME["gpt2"].base(), tmp_path)
    with torch.no_grad():
        assert torch.equal(case.logits(loaded, batch), case.logits(model, batch))

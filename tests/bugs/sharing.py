"""Bugs of texts as people have them, and of models to hand on."""

from __future__ import annotations

from bugs.bug import Bug

_TEXT = "lm/text/"
_TOKENS = "lm/test_tokenizers.py"
_SOURCES = "lm/test_sources.py"
_SHARING = "test_sharing.py"

BUGS = [
    Bug(
        _TEXT + "subword.py",
        '_LINE = re.compile(r"(?<=\\n)(?=\\S)")',
        '_LINE = re.compile(r"(?<=\\n)")',
        _TOKENS,
    ),
    Bug(
        _TEXT + "subword.py",
        "self._model.encode(piece, add_special_tokens=False).ids",
        "self._model.encode(piece, add_special_tokens=True).ids",
        _TOKENS,
    ),
    Bug(
        _TEXT + "subword.py",
        "            model.no_truncation()\n",
        "",
        _TOKENS,
    ),
    Bug(
        _TEXT + "choice.py",
        "return train_bpe(train, _number(spec, size))",
        "return train_bpe(train + validation, _number(spec, size))",
        _TOKENS,
    ),
    Bug(
        _TEXT + "sources.py",
        "held = other.train if other.validation is None else other.validation",
        "held = other.train",
        _SOURCES,
    ),
    Bug(
        "lab/identity.py",
        "return _FILE if a_file else value",
        "return value",
        "test_tokenizer_runs.py",
    ),
    Bug(
        "lab/corpus.py",
        'if (said.startswith("bpe:") or gone) and kept.is_file():',
        "if gone and kept.is_file():",
        "test_tokenizer_runs.py",
    ),
    Bug(
        "sharing/pretrained.py",
        "if record_of(module) is not None and path not in places:",
        "if record_of(module) is not None and path in ():",
        _SHARING,
    ),
    Bug(
        "sharing/pretrained.py",
        'if names != set(content["feedback"]) or not names >= kept.keys():',
        "if not names >= kept.keys():",
        _SHARING,
    ),
    Bug(
        "sharing/pretrained.py",
        "            state[name].copy_(value)\n",
        "            state[name].clone().copy_(value)\n",
        _SHARING,
    ),
    Bug(
        "conversion/targets.py",
        "wholes = {path: name for (path, is_map), (name, _) in taken.items() if not is_map}",
        "wholes = {path: name for (path, is_map), (name, _) in taken.items() if is_map}",
        "test_targets.py",
    ),
]

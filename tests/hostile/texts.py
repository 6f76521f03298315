"""Malformed texts, token folders, vocabularies and tokenizers."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import tokenizers

from altprop.lab.cli import main
from hostile.files import changed, put_something_else, spoil, spoil_json
from hostile.values import NUMBERS, PATHS, RESUME, SAMPLE, TEXTS


def corpus(draw: Random, here: Path, train: Sequence[str]) -> list[str]:
    """A text, or a folder of texts."""
    path = here / "text.txt"
    if draw.random() < 0.3:
        (here / "texts").mkdir()
        for name in draw.sample(
            ["a.txt", "b.md", "\udcff.txt", "\x1b[2J.txt", "c.TXT", ".d.txt"], 3
        ):
            (here / "texts" / name).write_bytes(path.read_bytes()[: draw.choice([0, 1, 500, 9999])])
        target = draw.choice(sorted((here / "texts").iterdir()))
        path.unlink()
        path.symlink_to("texts")
    else:
        target = path
    match draw.randrange(6):
        case 0:
            put_something_else(draw, target)
        case 1:
            target.write_text("".join(draw.choices(TEXTS, k=draw.choice([1, 30, 90]))), "utf-8",
                              "surrogatepass")  # fmt: skip
        case 2:
            target.write_bytes(draw.randbytes(draw.choice([0, 1, 2, 30, 5000])))
        case 3:
            points = (chr(draw.randrange(0x110000)) for _ in range(draw.choice([2, 40, 3000])))
            target.write_text("".join(points), "utf-8", "surrogatepass")
        case _:
            spoil(draw, target)
    out = ["--out", "new"] * (draw.random() < 0.5)
    explain = ["explain", *train[1:], "--model", "gpt", "--rule", "SignSymmetry"]
    return draw.choice([[*train], ["data", "text.txt", *out], explain])


def tokens(draw: Random, here: Path, train: Sequence[str]) -> list[str]:
    """A prepared folder: its tokens, its vocabulary, its pickle."""
    folder = here / "tokens"
    for name in draw.sample(sorted(os.listdir(folder)), draw.choice([1, 1, 2])):
        path = folder / name
        size = path.stat().st_size
        match draw.randrange(8):
            case 0:
                put_something_else(draw, path)
            case 1 | 2 if name.endswith(".bin"):
                ids = np.fromfile(path, "<u2")
                ids[draw.randrange(len(ids))] = draw.choice([65535, 1000, 27])
                ids.tofile(path)
            case 3:
                os.truncate(
                    path, draw.choice([0, 1, 2, 15, 16, 18, size // 2, size + 1, size + 4096])
                )
            case 4 if name == "meta.pkl":
                meta = draw.choice(
                    [{"itos": {}}, {"itos": 7, "stoi": {}, "vocab_size": 0}, [], os.system]
                )
                path.write_bytes(pickle.dumps(meta))
            case 5:
                path.unlink()
            case _:
                spoil(draw, path)
    if draw.random() < 0.3:
        for name in ("vocab.json", "digest.json"):
            (folder / name).unlink(missing_ok=True) if not (folder / name).is_dir() else None
    argv = list(train)
    argv[2] = "tokens"
    replace = ["--out", "tokens", "--overwrite"]
    data = [["data", "tokens"], ["data", "tokens", *replace], ["data", "text.txt", *replace]]
    return draw.choice([argv, *data])


def vocabulary(draw: Random, here: Path, train: Sequence[str]) -> list[str]:
    """The vocabulary of a run or of a prepared folder."""
    path = here / draw.choice(["run", "tokens"]) / "vocab.json"
    content: dict[str, Any] = json.loads(path.read_text())
    characters: list[Any] = content["characters"]
    match draw.randrange(8):
        case 0 | 1:
            spoil(draw, path)
        case 2:
            put_something_else(draw, path)
        case 3:
            path.write_text(
                draw.choice(["[" * 100_000, '{"a":' * 50_000, "9" * 5000, "1e999", "NaN"])
            )
        case _:
            bad: list[Any] = [*TEXTS, 7, None, [], {}, 10**400, "\ud800", "ab", characters[0]]
            for _ in range(draw.choice([1, 3])):
                match draw.randrange(5):
                    case 0:
                        characters.insert(draw.randrange(len(characters)), draw.choice(bad))
                    case 1:
                        characters.pop(draw.randrange(len(characters)))
                    case 2:
                        content[draw.choice(list(content))] = draw.choice(bad)
                    case 3:
                        characters[draw.randrange(len(characters))] = chr(draw.randrange(0x110000))
                    case _:
                        draw.shuffle(characters)
                if not isinstance(content.get("characters"), list) or len(characters) < 2:
                    break
            path.write_text(json.dumps(content), encoding="utf-8")
    argv = list(train)
    argv[2] = "tokens"
    return draw.choice([list(SAMPLE), argv, ["data", "tokens"], list(RESUME)])


def good_tokenizers(train: Sequence[str]) -> None:
    """Make a run on subwords, a token folder of them, one of bare ids, and tokenizers of kinds."""
    assert main([*train, "--tokenizer", "bpe:270", "--out", "subword"]) == 0
    assert main(["data", "text.txt", "--tokenizer", "bpe:270", "--out", "pieces"]) == 0
    os.mkdir("ids")
    for name in ("train.bin", "val.bin"):
        os.link(f"tokens/{name}", f"ids/{name}")
    os.mkdir("kinds")
    words = ["[UNK]", *sorted({*Path("text.txt").read_text().split(), "\n", *"adeghiklmnostw"})]
    vocab = {word: index for index, word in enumerate(words)}
    models = tokenizers.models
    for name, model in {
        "level": models.WordLevel(vocab, unk_token="[UNK]"),
        "piece": models.WordPiece(vocab, unk_token="[UNK]"),
        "unigram": models.Unigram([(word, -1.0 - i) for word, i in vocab.items()], unk_id=0),
        "bpe": models.BPE(
            {c: i for i, c in enumerate(["a", "b", "ab", "[UNK]"])}, [("a", "b")],
            unk_token="[UNK]", byte_fallback=True,
        ),
    }.items():  # fmt: skip
        made = tokenizers.Tokenizer(model)
        made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        made.normalizer = tokenizers.normalizers.Sequence(
            [tokenizers.normalizers.NFKC(), tokenizers.normalizers.Replace("x", "y")]
        )
        made.save(f"kinds/{name}.json")


# Parts of a tokenizer.json that the library reads, or that look as if it did, and are odd.
REGEXES = [
    *("(a+)+$", "(.*)*\n", "(\\w+\\s*)+x", "(", "", ".", "(?=a)*", "\\", "a{99999999}", "(?<=a+)b"),
    *("(" * 500 + ")" * 500, "[" * 300, "(?i)\u017f", "\\p{L}+", "^|$", "\\G", "(?<n>a)\\g<n>"),
]
PATTERNS: list[Any] = [{"Regex": regex} for regex in REGEXES] + [{"String": s} for s in ("", "t")]
REPLACE = [
    {"type": "Replace", "pattern": pattern, "content": content}
    for pattern in PATTERNS
    for content in ("", "xy", "x" * 10_000)
]
STRIP = {"type": "Strip", "content": "t", "start": 9, "stop": 9}
PARTS: dict[str, list[Any]] = {
    "normalizer": [
        *REPLACE,
        {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581" * 5000}] * 9},
        {"type": "Sequence", "normalizers": REPLACE[2::3]},
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
        {"type": "Precompiled", "precompiled_charsmap": "/////wAAAAA="},
        {"type": "Precompiled", "precompiled_charsmap": "BAAAAAAAAAAA"},
        {"type": "Prepend", "prepend": ""},
        {"type": "Strip", "strip_left": True, "strip_right": True},
        {"type": "ByteLevel"}, {"type": "Nmt"}, {"type": "StripAccents"}, {"type": "NFKD"},
    ],
    "pre_tokenizer": [
        *(
            {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": invert}
            for pattern in PATTERNS
            for behavior in ("Isolated", "Removed", "MergedWithPrevious", "Contiguous")
            for invert in (True, False)
        ),
        {"type": "Metaspace", "replacement": "\u2581\u2581"},
        {"type": "Metaspace", "replacement": "t", "prepend_scheme": "always", "split": True},
        {"type": "FixedLength", "length": 0}, {"type": "FixedLength", "length": 2**62},
        {"type": "Digits", "individual_digits": True},
        {"type": "Punctuation", "behavior": "Removed"}, {"type": "UnicodeScripts"},
        {"type": "CharDelimiterSplit", "delimiter": "t"}, {"type": "BertPreTokenizer"},
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False},
        {"type": "Sequence", "pretokenizers": []},
    ],
    "decoder": [
        *REPLACE,
        STRIP, {**STRIP, "content": "th"}, {**STRIP, "start": 2**62, "stop": 2**62},
        {"type": "Sequence", "decoders": []}, {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True},
        {"type": "WordPiece", "prefix": "", "cleanup": True}, {"type": "BPEDecoder", "suffix": ""},
        {"type": "Metaspace", "replacement": "t", "prepend_scheme": "always", "split": True},
    ],
    "truncation": [
        {"direction": "Right", "max_length": size, "strategy": "LongestFirst", "stride": 5}
        for size in (0, 1, 5, 2**62)
    ],
    "padding": [
        {"strategy": strategy, "direction": "Left", "pad_to_multiple_of": 0, "pad_id": 0,
         "pad_type_id": 0, "pad_token": "[PAD]"}
        for strategy in ("BatchLongest", {"Fixed": 2**60}, {"Fixed": 0})
    ],
}  # fmt: skip
ADDED = {"id": 0, "content": "a", "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": True, "special": False}  # fmt: skip


def _spoil_tokenizer(draw: Random, path: Path) -> None:
    """Spoil a tokenizer.json: its bytes, its values, its parts, its tokens."""
    if draw.random() < 0.4:
        spoil_json(draw, path)
        return
    said = json.loads(path.read_text(encoding="utf-8"))
    vocab = said["model"]["vocab"]
    for _ in range(draw.choice([1, 1, 2])):
        match draw.randrange(6):
            case 0 | 1:
                slot = draw.choice(list(PARTS))
                said[slot] = draw.choice(PARTS[slot])
            case 2:
                number = draw.choice([0, 3, 269, 5000, 65_536, 2**31, 2**32 - 1, 2**40])
                text = draw.choice([*TEXTS, "th", "\n", "a"])
                said["added_tokens"] = [*said.get("added_tokens", []), {
                    **ADDED, "id": number, "content": text, "special": draw.random() < 0.5,
                }]  # fmt: skip
            case 3 if isinstance(vocab, dict) and vocab:
                key = draw.choice(list(vocab))
                vocab[draw.choice([key, *TEXTS[:-4]])] = draw.choice(
                    [vocab.pop(key), 0, 2**16, 2**20, 2**31 - 1, 2**31 - 2, 2**32 - 1, 2**32]
                )
            case 4:
                said["model"] = draw.choice([
                    {"type": "BPE", "vocab": {}, "merges": []},
                    {"type": "Unigram", "vocab": [], "unk_id": 0},
                    {"type": "Unigram", "vocab": [["a", 1e308], ["b", -1e308]], "unk_id": 7},
                    {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"},
                    {"type": "WordPiece", "vocab": {"a": 2**31 - 2}, "unk_token": "a",
                     "continuing_subword_prefix": "", "max_input_chars_per_word": 0},
                    {**said["model"], "dropout": draw.choice([0.5, 1.0, 1.5, -1])},
                    {**said["model"], "unk_token": draw.choice(TEXTS)},
                ])  # fmt: skip
            case _:
                said = changed(draw, said)
                if not isinstance(said, dict) or not isinstance(said.get("model"), dict):
                    break
                vocab = said["model"].get("vocab")
    text = json.dumps(said)
    path.write_text(text, encoding="utf-8")


def tokenizer(draw: Random, here: Path, train: Sequence[str]) -> list[str]:
    """A tokenizer that is kept or stated, a number of ids, a text to validate on, patterns."""
    os.mkfifo(here / "fifo")
    (here / "loop").symlink_to("loop")
    kept = draw.choice(["subword/tokenizer.json", "pieces/tokenizer.json"])
    stated = f"kinds/{draw.choice(['level', 'piece', 'unigram', 'bpe'])}.json"
    if draw.random() < 0.3:
        stated = kept
    data, tokenize = [*train[:2], "text.txt", *train[3:]], ["data", "text.txt"]
    match draw.randrange(8):
        case 0 | 1:
            path = here / kept
            other = [here / "pieces" / "train.bin", *(here / "kinds").iterdir()]
            if draw.random() < 0.2:
                os.replace(draw.choice(other), path)
            elif draw.random() < 0.1:
                put_something_else(draw, path)
            else:
                _spoil_tokenizer(draw, path)
            if kept.startswith("pieces"):
                if draw.random() < 0.5:
                    (here / "pieces" / "digest.json").unlink()
                return draw.choice([[*train[:2], "pieces", *train[3:]], ["data", "pieces"]])
            resume = ["train", "--config", "subword/config.yaml", "--resume", "--steps", "2"]
            return draw.choice([["sample", "subword", "--tokens", "9"], resume])
        case 2:
            count = draw.choice([*NUMBERS, "27", "28", "21", "65535", "65536", "100000", "\u0663"])
            said = f"{draw.choice(['ids', 'ids', 'bpe', 'char', 'hf', ''])}:{count}"
            folder = draw.choice(["ids", "ids", "tokens", "pieces", "text.txt"])
            words = ["--tokenizer", draw.choice([said, *TEXTS, "ids", "bpe:255", "bpe:256"])]
            return draw.choice([["data", folder, *words], [*train[:2], folder, *train[3:], *words]])
        case 3:
            words = ["--validation", draw.choice([*PATHS, *TEXTS, "ids", "hf:", "hf::::"])]
            if draw.random() < 0.3:
                words += ["--pattern", draw.choice([*TEXTS, "*.txt", "[", "*" * 3000])]
            return draw.choice([data, tokenize]) + words
        case 4:
            odd = ["[", "]", "[!", "[a-", "*" * 5000, "**", "?" * 500, "/", "../*", "[]", "{a: b}",
                   "[[a]]", "*.txt,", ",,,", "*a" * 40, "[z-a]"]  # fmt: skip
            folder = draw.choice([".", "..", "tokens", "kinds", "/dev", "text.txt", "run"])
            words = ["--pattern", draw.choice([*odd, *TEXTS])]
            return draw.choice([["data", folder, *words], [*train[:2], folder, *train[3:], *words]])
        case _:
            path = here / stated
            if draw.random() < 0.1:
                put_something_else(draw, path)
            elif draw.random() < 0.9:
                _spoil_tokenizer(draw, path)
            words = ["--tokenizer", stated]
            if draw.random() < 0.05:
                words = ["--tokenizer", draw.choice(PATHS)]
            out = ["--out", "new"] * (draw.random() < 0.3)
            return draw.choice([
                [*data, *words], [*tokenize, *words, *out], [*tokenize, *words, *out],
                ["data", "ids", *words], ["explain", *data[1:], *words],
            ])  # fmt: skip

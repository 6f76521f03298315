"""Every `altprop …` on the pages does what it is there for: short ones run, in tiny sizes."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
from pathlib import Path

import pytest

from altprop.lab.cli import main
from lm_runs import SMALL, sentences

pytestmark = pytest.mark.usefixtures("no_curves")

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
IN_QUOTES = re.compile(r"\n(?= {4})")  # a value that goes on over lines, which are indented
TINY = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
STANDS_FOR = {
    "COMMAND": "data",
    "TASK": "parity",
    "RUN": "runs/old",
    "SPEC": "sweep.yaml",
    "NAME": "teacher",
    "N": "0",
    "[CORPUS]": "mytext.txt",
}


def commands(page: Path) -> list[list[str]]:
    """Return the commands on a page in the order in which they are read, as a shell splits them."""
    text = page.read_text(encoding="utf-8")
    lines = [
        line
        for _, block in FENCED.findall(text)  # in any language
        for line in IN_QUOTES.sub(" ", block.replace("\\\n", " ")).splitlines()
        if line.startswith("altprop ")
    ]
    lines += re.findall(r"`(altprop [^`]*)`", FENCED.sub("", text))
    found = [shlex.split(line, comments=True)[1:] for line in lines]
    return [[STANDS_FOR.get(word, word) for word in words] for words in found]


class ReachedError(Exception):
    """Every option was understood and checked: from here on it computes."""


def understood(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Go as far as a command goes before what takes long: a text of its sizes, the trials."""

    def reached(*_: object) -> None:
        raise ReachedError

    with monkeypatch.context() as patch:
        for place in (
            "audit_command.load_corpus",
            "audit_gpt.corpus_of",
            "compare.comparison.run_jobs",
            "reproduce.command.measured",
            "sweep.workers.work",
        ):
            patch.setattr(f"altprop.lab.{place}", reached)
        with pytest.raises(ReachedError):
            main(words)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder: texts, the sweep of its page, and a run."""
    folder = tmp_path_factory.mktemp("template")
    sweeps = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")
    ((_, yaml),) = [block for block in FENCED.findall(sweeps) if block[0] == "yaml"]
    (folder / "sweep.yaml").write_text(yaml, encoding="utf-8")
    for name in ("mytext.txt", "tinyshakespeare.txt"):
        (folder / name).write_text(sentences(), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "--data", "mytext.txt", "--out", "runs/old", *TINY]) == 0
    return folder


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=lambda page: page.name)
def test_every_command_on_the_page_works(
    page: Path, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shutil.copytree(template, tmp_path / "here"))
    play = sentences().replace("\n", "\n\n")  # for the plays, which take seconds to tokenize
    monkeypatch.setattr("altprop.lm.text.plays.cleaned_plays", lambda: iter([play] * 3))
    data = ["--data", "mytext.txt"]  # what a command says of its own wins
    for words in commands(page):
        command, *rest = words
        named = bool(rest) and not rest[0].startswith("--")
        takes_long = command in ("audit", "compare") or (command == "reproduce" and named)
        takes_long |= command == "sweep" and "--trials" not in words
        if takes_long and "--task.help" not in words:
            understood(words, monkeypatch)
        elif "--print_config" in words:  # > FILE
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                assert main(words[:-2]) == 0
            Path(words[-1]).write_text(printed.getvalue(), encoding="utf-8")
        elif command == "explain":
            training = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
            ((_, yaml),) = [block for block in FENCED.findall(training) if block[0] == "yaml"]
            Path("run.yaml").write_text(yaml, encoding="utf-8")
            assert main([command, *data, *(rest or ["--config", "run.yaml"])]) == 0
        elif command == "sweep":
            alone = ["1" if before == "--workers" else word
                     for before, word in zip(words, rest, strict=False)]  # fmt: skip
            assert main([command, *alone]) == 0, words
        elif command == "train":
            rest = ["runs/old/config.yaml" if "…" in word else word for word in rest]
            assert main([command, *data, *rest, *TINY]) == 0, words
        else:
            assert main([*words, *(["--tokens", "9"] if command == "sample" else [])]) == 0, words

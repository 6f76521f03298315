"""What jsonargparse reports, in words for somebody who only wrote an option."""

from __future__ import annotations

import re

_UNION = re.compile(
    r"Does not validate.*?\n( *)Errors:\n(.*?)\n\1Given value type: .*?\n\1Given value: (.*)", re.S
)
_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "NoneType": "null",
    "tuple": "a list",
}


def meant(message: str) -> str:
    """Return the message without the alternatives of a union that were not meant."""
    if not (union := _UNION.search(message)):
        return message
    indent, errors, given = union.groups()
    items = [i.strip() for i in re.split(rf"^{indent}  - ", errors, flags=re.M)[1:]]
    telling = [i for i in items if not re.fullmatch(r"Expected a <class '\S+'>", i)]
    if telling:
        item = telling[0 if given.startswith(("{'class_path'", "Namespace(class_path")) else -1]
    else:
        item = f"{' or '.join(items).replace('or Expected', 'or')}. Got value: {given}"
    return meant(message[: union.start()] + item)


def plain_words(text: str) -> str:
    """Return what jsonargparse says of a type in words that need no Python."""
    abstract = r"an instantiatable class, but \S+ is abstract"
    text = re.sub(r"a <class '[\w.]*?(\w+)'>", lambda m: _TYPES.get(m[1], f"a {m[1]}"), text)
    text = re.sub(r"a (?:choice of |typing.Literal|member of <enum .*?>: )", "one of ", text)
    text = re.sub(abstract, "a class to be named first", text)
    text = text.replace("Expected", "expected").replace(". Got value: ", ", got ")
    return text.replace(", got None", ", got null")

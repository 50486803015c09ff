"""Lists of one's own classes: their names, numbers and colours in label PNGs, and which are void.

The first class of a list is number 0 in the label PNGs, and so on, void ones counted:

* classes.txt: a class a line, behind it its colour (#rrggbb) and the word "ignore", both optional; lines that start
  with # are remarks.
* classes.json: a list of names or of {"name", "colour" (or "color"; #rrggbb or [r, g, b]), "value" (or "id"; the number
  in the PNGs), "ignore"}; or an object with such a list under "classes" or "categories".
* labelmap.txt: name:r,g,b:: a line, as CVAT writes it.

Void, which is neither learned nor scored: 255, and classes marked "ignore" or called void, ignore, ignored, unlabelled
or unlabeled. A class called background is a class like others, since a network that is never told what background is
sees objects everywhere; mark it "ignore" where it means "not annotated".
"""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from enfilade import labels
from enfilade.errors import UserError
from enfilade.labels import LabelSpace

VOID_NAMES = ("void", "ignore", "ignored", "unlabelled", "unlabeled")
CLASS_LISTS = ("classes.txt", "classes.json", "labelmap.txt")


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of a class list: the class's name, its number in label PNGs, its colour (RGB) if it has one, and whether
    it is void."""

    name: str
    value: int
    colour: tuple[int, int, int] | None
    void: bool


def find_list(root: Path) -> Path:
    """The first of `CLASS_LISTS` in a folder; FileNotFoundError where there is none."""
    found = next((root / name for name in CLASS_LISTS if (root / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"{root} holds no class list: write {CLASS_LISTS[0]}, a class name a line in the order of the numbers in "
            "the label PNGs, from 0"
        )
    return found


def read_classes(path: str | os.PathLike) -> tuple[Entry, ...]:
    """The lines of a class list in one of the three forms.

    Raises:
        UserError: nothing in it, a line that cannot be understood, a number twice or beyond 65534.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no class list {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text in UTF-8 ({error})") from error
    if path.suffix == ".json":
        entries = _from_json(text, path)
    else:
        lines = [line.strip() for line in text.splitlines()]
        lines = [line for line in lines if line and not line.startswith("#")]
        parse = _labelmap_line if path.name == "labelmap.txt" else _line
        entries = [parse(line, i, path) for i, line in enumerate(lines)]
    if not entries:
        raise UserError(f"{path} lists no class: write one name a line")
    values = [e.value for e in entries]
    if twice := [v for v in values if values.count(v) > 1]:
        raise UserError(f"{path} gives the number {twice[0]} to two classes: give each its own")
    if wrong := [v for v in values if not 0 <= v < 65535]:
        raise UserError(f"{path} gives a class the number {wrong[0]}: numbers lie between 0 and 65534")
    return tuple(entries)


def space_of(entries: Iterable[Entry], path: Path) -> LabelSpace:
    """The label space of the entries that are not void.

    Raises:
        UserError: all are void, a name or a colour twice, more than 254 classes.
    """
    entries = list(entries)
    kept = [e for e in entries if not e.void]
    if not kept:
        raise UserError(f"{path} lists only void classes: there is nothing to learn")
    colours = [None if e.colour is None else "#" + bytes(e.colour).hex() for e in kept]
    taken = [e.colour for e in entries if e.colour is not None]
    for entry in entries:
        if entry.void and entry.colour is not None and taken.count(entry.colour) > 1:
            raise UserError(f"{path}: {entry.name!r} has the colour of another class: change one")
    try:
        return labels.own([e.name for e in kept], colours)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _entry(name: str, value: int, colour: tuple[int, int, int] | None, void: bool) -> Entry:
    return Entry(name, value, colour, void or labels.plain(name) in VOID_NAMES)


def _line(line: str, number: int, path: Path) -> Entry:
    words, colour, void = line.split(), None, False
    while len(words) > 1 and (words[-1] == "ignore" or words[-1].startswith("#")):
        word = words.pop()
        if word == "ignore":
            void = True
        else:
            colour = _hex(word, f"{path}: line {line!r}")
    return _entry(" ".join(words), number, colour, void)


def _labelmap_line(line: str, number: int, path: Path) -> Entry:
    name, colon, rest = line.partition(":")
    triple = rest.split(":")[0].split(",")
    if not colon or len(triple) != 3 or not all(re.fullmatch(r"\s*\d{1,3}\s*", v) and int(v) < 256 for v in triple):
        raise UserError(f"{path}: line {line!r} is not of the form name:r,g,b::")
    red, green, blue = map(int, triple)
    return _entry(name.strip(), number, (red, green, blue), False)


def _from_json(text: str, path: Path) -> list[Entry]:
    form = 'expected a list of names or of {"name", "colour", "value", "ignore"}'
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error})") from error
    if isinstance(content, dict):
        content = content.get("classes", content.get("categories"))
    if not isinstance(content, list):
        raise UserError(f"{path}: {form}")
    entries = []
    for i, item in enumerate(content):
        item = {"name": item} if isinstance(item, str) else item
        if not isinstance(item, dict) or not isinstance(item.get("name"), str):
            raise UserError(f"{path}: {form}, not {item!r}")
        colour, value = item.get("colour", item.get("color")), item.get("value", item.get("id", i))
        if isinstance(colour, str):
            colour = _hex(colour, f"{path}: class {item['name']!r}")
        elif colour is not None:
            if not (isinstance(colour, list) and len(colour) == 3 and all(c in range(256) for c in colour)):
                raise UserError(f"{path}: class {item['name']!r} has the colour {colour!r}: write #rrggbb or [r, g, b]")
            colour = int(colour[0]), int(colour[1]), int(colour[2])
        if not isinstance(value, int):
            raise UserError(f"{path}: class {item['name']!r} has the number {value!r}: expected a whole number")
        entries.append(_entry(item["name"], value, colour, bool(item.get("ignore", False))))
    return entries


def _hex(word: str, where: str) -> tuple[int, int, int]:
    if not re.fullmatch("#[0-9a-fA-F]{6}", word):
        raise UserError(f"{where} has the colour {word!r}: write it as #rrggbb, for example #ff8000")
    red, green, blue = bytes.fromhex(word[1:])
    return red, green, blue

"""Seeded damage of files: bytes of any file, values in JSON, words in text, entries of folders."""

import json
import os
import re
import socket
from pathlib import Path
from random import Random
from typing import Any

VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, -0.0, 0.5, 1e308, -1e308, float("nan"), float("inf")),
    *("", "x", "0", "é\u0301\u202e", "\0", "a\nb", "\ud800", "../../etc/passwd", "/etc/passwd", "x" * 5000),
    *([], [[]], {}, {"": None}, [None] * 3, [1, 2, 3, 4], ["a"], [0] * 1000),
]
WORDS = [
    *("", "-1", "0", "00", "1e400", "nan", "inf", "-inf", "1e-320", "9" * 30, "0x10", "1_000", "\uff11", "½", "²", "é"),
    *("\u202e", "x", "../../x", "/etc/passwd", "a" * 5000, "<", ">", "&lol;", "<!DOCTYPE a>", "{", "]", '"', "'", "\\"),
    *(",", ":", "- ", "&a [*a]", "!!python/object:os.system x", "\t", "\n\n", "\r", "\0", "\x1b[31m", "null", "true"),
]
MAGIC = [
    b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"BM", b"II*\0", b"MM\0*", b"RIFF\0\0\0\0WEBP", b"%!PS-Adobe",
    b"8BPS", b"P6\n9 9\n255\n", b"\0\0\x01\0", b"PK\x03\x04", b"icns", b"SIMPLE  =", b"\x1f\x8b", b"<svg", b"\x80\x04",
]  # fmt: skip


def damage(rng: Random, content: bytes) -> tuple[str, bytes]:
    """Name of the damage, and the content with it."""
    size, data = len(content), bytearray(content)
    place = rng.randrange(size) if size else 0
    length = rng.randrange(1, max(2, min(size, 400)))
    kind = rng.choice(
        ["truncated", "bits", "header bits", "zeros", "noise", "cut", "repeated", "magic", "huge", "empty", "longer"]
    )
    if kind == "truncated":
        data = data[:place]
    elif kind in ("bits", "header bits") and size:
        for _ in range(rng.choice([1, 1, 3, 20])):
            data[rng.randrange(min(size, 100) if kind == "header bits" else size)] ^= 1 << rng.randrange(8)
    elif kind == "zeros":
        data[place : place + length] = bytes(len(data[place : place + length]))
    elif kind == "noise":
        data[place : place + length] = rng.randbytes(len(data[place : place + length]))
    elif kind == "cut":
        del data[place : place + length]
    elif kind == "repeated":
        data[place:place] = data[place : place + length] * rng.choice([1, 5])
    elif kind == "magic":
        magic = rng.choice(MAGIC)
        data[: len(magic)] = magic
    elif kind == "huge" and size:  # sizes stand in the first bytes of most formats
        value = rng.choice(
            [b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\xff\xff", b"\x00\x00\x40\x00", b"\x00\x20"]
        )
        place = rng.randrange(min(size, 64))
        data[place : place + len(value)] = value
    elif kind == "empty":
        data.clear()
    else:
        data += rng.randbytes(length)
    return kind, bytes(data)


def _paths(value: Any, path: tuple = ()) -> list[tuple]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(each for key, child in children for each in _paths(child, (*path, key)))]


def change(rng: Random, value: Any) -> tuple[str, Any]:
    """Name of the change, and plain data with one value changed, removed, doubled or nested too deeply."""
    value = json.loads(json.dumps(value))
    path = rng.choice(_paths(value)[1:] or [()])
    if not path:
        return "all of it", rng.choice(VALUES)
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    key, kind = path[-1], rng.choice(["set"] * 5 + ["removed", "doubled", "renamed", "nested"])
    if kind == "removed":
        del holder[key]
    elif kind == "doubled" and isinstance(holder, list):
        holder.append(holder[key])
    elif kind == "renamed" and isinstance(holder, dict):
        holder[rng.choice(["", "x", key + " ", key.upper()])] = holder.pop(key)
    elif kind == "nested":
        for _ in range(rng.choice([1, 50])):
            holder[key] = [holder[key]] if rng.random() < 0.5 else {"a": holder[key]}
    else:
        kind, holder[key] = "set", rng.choice(VALUES)
    return f"{kind} {'.'.join(map(str, path))}", value


def dump(rng: Random, value: Any) -> bytes:
    """JSON as some program may write it."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 1]))
    return text.encode(rng.choice(["utf-8"] * 6 + ["utf-8-sig", "utf-16"]), "surrogatepass")


def spoil(rng: Random, text: str) -> tuple[str, str]:
    """Name of the change, and a text with a word or line changed, removed, doubled or moved."""
    kind = rng.choice(["word"] * 4 + ["line removed", "line doubled", "lines swapped", "separator"])
    lines = text.splitlines(keepends=True)
    if kind == "word" and (found := list(re.finditer(r"[^\s,<>/:]+", text))):
        word, new = rng.choice(found), rng.choice(WORDS)
        return f"word {word[0][:20]!r} is {new[:20]!r}", text[: word.start()] + new + text[word.end() :]
    if kind == "separator" and (found := list(re.finditer(r"[\s,<>/:]", text))):
        one, new = rng.choice(found), rng.choice(WORDS)
        return f"{one[0]!r} is {new[:20]!r}", text[: one.start()] + new + text[one.end() :]
    if not lines:
        return "empty", text
    place, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    if kind == "line doubled":
        lines.insert(other, lines[place])
    elif kind == "lines swapped":
        lines[place], lines[other] = lines[other], lines[place]
    else:
        kind, _ = "line removed", lines.pop(place)
    return f"{kind} {place}", "".join(lines)


NAMES = [
    *(b"a b.png", b"\xff\xfe.png", "é.png".encode(), "e\u0301.png".encode(), b"-x.png", b"--out.png", b"a\nb.png"),
    *(
        b"[red].png",
        b"x" * 240 + b".png",
        b"%s{0}.png",
        "\u202egnp.png".encode(),
        b"\x1b[31m.png",
        b"0.PNG",
        b"0.png.png",
    ),
    *(b"CON.png", b"~.png", b"$HOME.png", b"*.png", b"'.png", b'".png', b" .png", b"..png"),
]


def litter(rng: Random, folder: Path) -> str:
    """Name of an oddity that was put into a folder with images."""
    kind = rng.choice(ODDITIES)
    base = os.fsencode(folder)
    name = os.path.join(base, rng.choice(NAMES))
    images = sorted(folder.glob("*.png"))
    source = os.fsencode(rng.choice(images)) if images else b"/nowhere"
    if os.path.lexists(name):
        return "nothing"
    if kind == "name":
        _copy(source, name)
    elif kind == "hidden":
        _copy(source, os.path.join(base, b".hidden.png"))
    elif kind == "hidden folder":
        _folder(base, b".git", source)
    elif kind == "folder named as an image":
        _folder(base, rng.choice([b"x.png", b"x.jpg"]), source)
    elif kind == "deep":
        _folder(base, b"/".join([b"d" * 20] * 20), source)
    elif kind == "link":
        os.symlink(source, name)
    elif kind == "dangling link":
        os.symlink(b"nowhere.png", name)
    elif kind == "link to itself":
        os.symlink(os.path.basename(name), name)
    elif kind == "loop":
        target, loop = rng.choice([b".", b"..", base]), os.path.join(base, b"loop")
        if os.path.lexists(loop):
            return "nothing"
        os.symlink(target, loop)
    elif kind == "pipe":
        os.mkfifo(name)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            here = os.getcwd()
            os.chdir(base)
            server.bind("socket.png")
            os.chdir(here)
    elif kind == "device":
        os.symlink(rng.choice([b"/dev/zero", b"/dev/null", b"/dev/tty", b"/proc/self/mem"]), name)
    elif kind == "empty file":
        open(name, "wb").close()
    elif kind == "case":
        _copy(source, os.path.join(base, b"Case.png"))
        _copy(source, os.path.join(base, b"CASE.png"))
    elif kind == "other files":
        for other in (b"notes.txt", b"Thumbs.db", b"x.png.part", b"archive.zip"):
            with open(os.path.join(base, other), "wb") as file:
                file.write(b"x")
    elif kind == "text as an image":
        with open(name, "wb") as file:
            file.write(b"hello")
    elif kind == "empty folder":
        os.mkdir(os.path.join(base, b"empty"))
    elif kind == "hard link" and images:
        os.link(source, name)
    return kind


ODDITIES = [
    "name", "name", "hidden", "hidden folder", "folder named as an image", "deep", "link", "dangling link",
    "link to itself", "loop", "pipe", "socket", "device", "empty file", "case", "other files", "text as an image",
    "empty folder", "hard link",
]  # fmt: skip


def _copy(source: bytes, target: bytes) -> None:
    if os.path.isfile(source) and not os.path.lexists(target):
        with open(source, "rb") as file, open(target, "wb") as copy:
            copy.write(file.read())


def _folder(base: bytes, name: bytes, source: bytes) -> None:
    os.makedirs(os.path.join(base, name), exist_ok=True)
    _copy(source, os.path.join(base, name, b"inside.png"))

"""Text in drawings: shown literally, in a font that has its characters."""

from collections.abc import Callable, Sequence
from functools import cache
from math import inf
from pathlib import Path
from typing import Any

from PIL import ImageFont

from dualtoken_vit.files import printable

try:
    import matplotlib
    from matplotlib.font_manager import fontManager
    from matplotlib.ft2font import FaceFlags, FT2Font

    _BUNDLED = Path(matplotlib.get_data_path(), "fonts", "ttf")
    REGULAR, BOLD = (str(_BUNDLED / f"DejaVuSans{style}.ttf") for style in ("", "-Bold"))
except ModuleNotFoundError:  # without the train extra: Pillow's own font
    REGULAR = BOLD = ""
_ASCII = frozenset(range(32, 127))


@cache
def _characters(file: str) -> frozenset[int]:
    """The code points that a font file can draw; none if it cannot be read."""
    try:
        font = FT2Font(file)
        # Neither PIL nor matplotlib draws colour glyphs in the colour of the text, if at all.
        return frozenset(() if FaceFlags.COLOR in font.face_flags else font.get_charmap())
    except (OSError, RuntimeError):  # removed since matplotlib listed it, or damaged
        return frozenset()


@cache
def _system_fonts() -> tuple[str, ...]:
    """The font files installed on this machine, upright and of normal weight."""
    fonts = [font for font in fontManager.ttflist if font.style == "normal" and font.weight in (400, "normal")]
    files = {font.fname for font in fonts if "LastResort" not in font.name.replace(" ", "")}  # which has only boxes
    # matplotlib's own are for formulas, with symbols in place of letters.
    return tuple(sorted(file for file in files if _BUNDLED not in Path(file).parents))


def literal(text: str, bold: bool = False) -> tuple[str, str]:
    r"""Prepare a text to be drawn: as it is, or with code points (`\u4e2d`) for characters that no font has.

    Line breaks are kept. Install a font for a script, for example one of Noto Sans, to see its letters.

    Returns:
        The text, and the font file to draw it with: DejaVu Sans, which comes with matplotlib, or the installed font
        that has the most of the characters. "" without matplotlib: Pillow's own font, which has ASCII.
    """
    if not REGULAR:
        return text.encode("ascii", "backslashreplace").decode(), ""
    wanted = frozenset(map(ord, text)) - {ord("\n")}

    def known(file: str) -> int:
        characters = _characters(file)  # a font without ASCII cannot draw the code points either
        return len(wanted & characters) if wanted <= characters or characters >= _ASCII else -1

    file = max((BOLD, REGULAR) if bold else (REGULAR,), key=known)
    if known(file) < len(wanted):
        file = max((file, *_system_fonts()), key=known)
    drawn = _characters(file) | {ord("\n")}
    escaped = (char if ord(char) in drawn else char.encode("unicode_escape").decode() for char in text)
    return "".join(escaped), file


def shorten(text: str, width: float, measure: Callable[[str], float] = len) -> str:
    """The text, cut in the middle to at most `width` (and 200 characters): names often differ in their ends."""

    def cut(keep: int) -> str:
        return text if keep == len(text) else f"{text[: (keep + 1) // 2]}...{text[len(text) - keep // 2 :]}"

    keep = min(len(text), 200)
    while measure(cut(keep)) > width and keep > 2:
        keep -= 1
    return cut(keep)


@cache
def _font(file: str, size: int) -> Any:
    return ImageFont.truetype(file, size) if file else ImageFont.load_default(size)


def fit_text(text: str, size: int, width: float = inf, bold: bool = False) -> tuple[str, ImageFont.FreeTypeFont]:
    """The text as one line at most `width` pixels wide, and the font of `size` pixels to draw it with."""
    shown, file = literal(printable(text), bold)
    font = _font(file, size)
    return shorten(shown, width, font.getlength), font


def fit_names(
    names: Sequence[str], size: int, width: float = inf, bold: bool = False
) -> tuple[str, ImageFont.FreeTypeFont]:
    """As `fit_text`, for a list of names: the first ones that fit, and the number of the others ("cat, dog +4")."""
    for count in range(len(names), 0, -1):
        rest = f" +{len(names) - count}" if count < len(names) else ""
        text, font = fit_text(", ".join(names[:count]) + rest, size, bold=bold)
        if font.getlength(text) <= width:
            return text, font
    text, font = fit_text(names[0], size, width - font.getlength(rest), bold)
    return text + rest, font

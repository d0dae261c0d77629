"""Draws images/network-light.svg and network-dark.svg, the figure of the network: `python docs/network_figure.py`."""

from html import escape
from pathlib import Path

INK = {"light": "#1f2328", "dark": "#e6edf3"}
GREY = {"light": "#57606a", "dark": "#b6bec8"}
PANEL = {"light": "#f6f8fa", "dark": "#161b22"}
IMAGE = {"light": ("#ddf4ff", "#0969da"), "dark": ("#0c2d6b", "#58a6ff")}  # fill and line of the image stream
TOKEN = {"light": ("#fff1e5", "#bc4c00"), "dark": ("#5a1e02", "#f0883e")}  # and of the global tokens
PLAIN = {"light": ("#ffffff", "#8c959f"), "dark": ("#21262d", "#7d8590")}
WIDTH, HEIGHT = 960, 560
FONT = "font-family='Helvetica, Arial, DejaVu Sans, sans-serif'"


class Figure:
    """An SVG file that is written piece by piece, in the colours of one theme."""

    def __init__(self, theme: str):
        self.theme = theme
        self.parts: list[str] = []

    def text(self, x: float, y: float, text: str, size: int = 14, grey: bool = False, anchor: str = "middle") -> None:
        """Text whose `A_b` has a subscript b."""
        colour = (GREY if grey else INK)[self.theme]
        head, *tails = escape(text).split("_")
        for tail in tails:
            low, space, rest = tail.partition(" ")
            head += f"<tspan dy='4' font-size='{size - 3}'>{low}</tspan><tspan dy='-4'>{space}{rest}</tspan>"
        self.parts.append(
            f"<text x='{x}' y='{y}' font-size='{size}' fill='{colour}' text-anchor='{anchor}' {FONT}>{head}</text>"
        )

    def box(self, x: float, y: float, width: float, height: float, colours: dict, *lines: str) -> None:
        """A box around (x, y) with lines of text; the lines after the first are small."""
        fill, line = colours[self.theme]
        self.parts.append(
            f"<rect x='{x - width / 2}' y='{y - height / 2}' width='{width}' height='{height}' rx='7' fill='{fill}' "
            f"stroke='{line}' stroke-width='1.5'/>"
        )
        top = y + 5 - 8.5 * (len(lines) - 1)
        for number, text in enumerate(lines):
            self.text(x, top + 17 * number, text, 14 if number == 0 else 12, number > 0)

    def arrow(self, colours: dict, *points: tuple[float, float]) -> None:
        """A line through the points, with a head at the last."""
        path = " L".join(f"{x} {y}" for x, y in points)
        line = colours[self.theme][1]
        head = {id(IMAGE): "image", id(TOKEN): "token"}.get(id(colours), "plain")
        self.parts.append(f"<path d='M{path}' fill='none' stroke='{line}' stroke-width='2' marker-end='url(#{head})'/>")

    def plus(self, x: float, y: float, colours: dict) -> None:
        fill, line = PLAIN[self.theme][0], colours[self.theme][1]
        self.parts.append(f"<circle cx='{x}' cy='{y}' r='10' fill='{fill}' stroke='{line}' stroke-width='1.5'/>")
        self.parts.append(f"<path d='M{x - 5} {y}h10M{x} {y - 5}v10' stroke='{line}' stroke-width='1.5'/>")

    def grid(self, x: float, y: float, side: float, cells: int, colours: dict) -> None:
        """A square grid around (x, y)."""
        fill, line = colours[self.theme]
        left, top = x - side / 2, y - side / 2
        self.parts.append(f"<rect x='{left}' y='{top}' width='{side}' height='{side}' fill='{fill}' stroke='{line}'/>")
        for step in range(1, cells):
            at = step * side / cells
            lines = f"M{left + at} {top}v{side}M{left} {top + at}h{side}"
            self.parts.append(f"<path d='{lines}' stroke='{line}' stroke-width='0.7'/>")

    def svg(self) -> str:
        heads = "".join(
            f"<marker id='{name}' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='5.5' markerHeight='5.5' "
            f"orient='auto'><path d='M0 0L8 4L0 8z' fill='{colours[self.theme][1]}'/></marker>"
            for name, colours in (("image", IMAGE), ("token", TOKEN), ("plain", PLAIN))
        )
        title = "DualToken-ViT: image tokens and a 7x7 grid of global tokens pass through three stages of blocks"
        return (
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='{title}'>\n"
            f"<title>{title}</title><defs>{heads}</defs>\n" + "\n".join(self.parts) + "\n</svg>\n"
        )


def network(figure: Figure) -> None:
    """The upper half: two streams through three stages."""
    x_row, g_row = 66, 162
    figure.text(24, 24, "DualToken-ViT-S, 224x224 pixels", 15, anchor="start")
    figure.grid(50, x_row, 52, 2, PLAIN)
    figure.text(50, x_row + 44, "image", 12, True)
    figure.box(142, x_row, 84, 54, IMAGE, "Stem", "stride 8")
    figure.arrow(IMAGE, (77, x_row), (98, x_row))
    figure.grid(142, g_row, 52, 7, TOKEN)
    figure.text(142, g_row + 44, "learnable global tokens", 12, True)
    before_x, before_g = 185, 170
    for x, blocks, dim, side in ((300, 2, 64, 28), (490, 6, 128, 14), (680, 6, 256, 7)):
        figure.parts.append(
            f"<rect x='{x - 70}' y='{x_row - 36}' width='140' height='{g_row - x_row + 72}' rx='10' "
            f"fill='{PANEL[figure.theme]}' stroke='{PLAIN[figure.theme][1]}'/>"
        )
        figure.text(x, (x_row + g_row) / 2 + 1, f"{blocks} blocks", 15)
        figure.text(x, (x_row + g_row) / 2 + 19, f"{dim} channels", 12, True)
        figure.arrow(IMAGE, (before_x, x_row), (x - 71, x_row))
        figure.arrow(TOKEN, (before_g, g_row), (x - 71, g_row))
        figure.text(x, x_row - 8, f"X: {side}x{side}", 13)
        figure.text(x, g_row + 16, "G: 7x7", 13)
        before_x = before_g = x + 71
    for x in (395, 585):
        figure.text(x, x_row - 12, "merge", 12, True)
        figure.text(x, g_row + 20, "project", 12, True)
    figure.box(856, (x_row + g_row) / 2, 128, 66, PLAIN, "Head", "mean of X and G,", "classes")
    figure.arrow(IMAGE, (751, x_row), (772, x_row), (791, 100))
    figure.arrow(TOKEN, (751, g_row), (772, g_row), (791, 128))


def block(figure: Figure) -> None:
    """The lower half: one block."""
    figure.parts.append(
        f"<rect x='14' y='232' width='{WIDTH - 28}' height='314' rx='12' fill='{PANEL[figure.theme]}' "
        f"stroke='{PLAIN[figure.theme][1]}'/>"
    )
    figure.text(34, 258, "One block", 15, anchor="start")
    x_row, mid, g_row = 300, 408, 500
    figure.text(42, x_row + 5, "X", 16)
    figure.box(150, x_row, 130, 54, IMAGE, "Conv Encoder", "local information")
    figure.arrow(IMAGE, (58, x_row), (84, x_row))
    figure.text(254, x_row - 12, "X_local", 13)
    figure.arrow(IMAGE, (215, x_row), (633, x_row))
    figure.plus(645, x_row, IMAGE)
    figure.box(775, x_row, 132, 54, IMAGE, "FFN", "BiDim attention")
    figure.arrow(IMAGE, (656, x_row), (708, x_row))
    figure.plus(876, x_row, IMAGE)
    figure.arrow(IMAGE, (841, x_row), (864, x_row))
    figure.arrow(IMAGE, (678, x_row), (678, 258), (876, 258), (876, x_row - 12))
    figure.arrow(IMAGE, (887, x_row), (914, x_row))
    figure.text(928, x_row + 5, "X", 16)

    figure.box(150, mid, 130, 54, IMAGE, "Downsampling", "step-wise, to 7x7")
    figure.arrow(IMAGE, (254, x_row), (254, 350), (150, 350), (150, mid - 29))
    figure.box(319, mid, 130, 54, IMAGE, "Self-attention", "on 7x7 positions")
    figure.arrow(IMAGE, (215, mid), (253, mid))
    figure.text(233, mid - 10, "X_ds", 13)
    figure.box(496, mid, 142, 54, TOKEN, "Fusion", "0.1 MLP(G) + 0.9 X_ga")
    figure.arrow(IMAGE, (384, mid), (424, mid))
    figure.text(403, mid - 10, "X_ga", 13)
    figure.box(676, mid, 124, 54, IMAGE, "Broadcast", "X attends to G_new")
    figure.arrow(TOKEN, (567, mid), (613, mid))
    figure.text(589, mid - 10, "G_new", 13)
    figure.arrow(IMAGE, (254, 350), (676, 350), (676, mid - 29))
    figure.text(450, 343, "queries", 12, True)
    figure.arrow(IMAGE, (738, mid), (756, mid), (756, 340), (645, 340), (645, x_row + 12))

    figure.text(42, g_row + 5, "G", 16)
    figure.arrow(TOKEN, (58, g_row), (633, g_row))
    figure.arrow(TOKEN, (496, g_row), (496, mid + 29))
    figure.plus(645, g_row, TOKEN)
    figure.arrow(TOKEN, (588, mid), (588, 462), (645, 462), (645, g_row - 12))
    figure.arrow(TOKEN, (656, g_row), (914, g_row))
    figure.text(928, g_row + 5, "G", 16)
    figure.text(785, g_row + 24, "to the next block", 12, True)


def draw(theme: str) -> str:
    """The figure as SVG in the colours of a theme, light or dark."""
    figure = Figure(theme)
    network(figure)
    block(figure)
    return figure.svg()


if __name__ == "__main__":
    for name in INK:
        Path(__file__).with_name("images").joinpath(f"network-{name}.svg").write_text(draw(name), encoding="utf-8")

"""Draws the pictures of README.md and docs/design.md into docs/images, as SVG and with the standard library alone.

python docs/pictures.py
"""

from __future__ import annotations

from pathlib import Path

IMAGES = Path(__file__).resolve().parent / "images"
INK, GREY, PALE = "#263238", "#78909c", "#eceff1"
WAYS = {"q": "#1e88e5", "k": "#8e24aa", "v": "#fb8c00", "r": "#2e7d32"}
PASSES = {1: "#c8e6c9", 2: "#a5d6a7", 3: "#fff59d", 5: "#ef9a9a"}  # colour by how often a tensor moves


class Picture:
    """Shapes on a white sheet."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.parts = [f'<rect width="{width}" height="{height}" fill="white"/>']

    def box(self, x: float, y: float, w: float, h: float, fill: str = PALE, text: str = "", size: int = 13) -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="4" fill="{fill}" stroke="{GREY}"/>'
        )
        if text:
            self.text(x + w / 2, y + h / 2 + size / 3, text, size)

    def text(self, x: float, y: float, text: str, size: int = 13, anchor: str = "middle", fill: str = INK) -> None:
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{fill}">{text}</text>'
        )

    def line(self, *points: tuple[float, float], colour: str = GREY, width: float = 1.5, arrow: bool = True) -> None:
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        end = ' marker-end="url(#end)"' if arrow else ""
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"{end}/>')

    def save(self, name: str) -> None:
        marker = (
            '<marker id="end" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="6" markerHeight="6" orient="auto">'
            '<path d="M0 0 L10 5 L0 10 z" fill="context-stroke"/></marker>'
        )
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" font-family="sans-serif"><defs>{marker}</defs>'
        )
        IMAGES.mkdir(exist_ok=True)
        (IMAGES / f"{name}.svg").write_text("\n".join([head, *self.parts, "</svg>\n"]))


def connections() -> None:
    """Four streams for block 3, each its own weighted sum of all hidden states so far."""
    p = Picture(760, 250)
    names = ("X\u2080", "X\u2081", "X\u2082")
    for i, name in enumerate(names):
        y = 190 - 70 * i
        p.box(40, y, 70, 30, "#e3f2fd", name)
        if i:
            p.box(40, y + 38, 70, 24, PALE, f"block {i}", 11)
        for c, colour in enumerate(WAYS.values()):
            p.line((110, y + 6 + 6 * c), (330, 48 + 46 * c), colour=colour, width=0.6 + 0.7 * ((i + c) % 3))
    p.text(75, 240, "embedding", 11, fill=GREY)
    for c, (way, colour) in enumerate(WAYS.items()):
        y = 34 + 46 * c
        p.box(330, y, 150, 28, "white", f"Y\u2009{way} = \u03a3 w\u2009{way}\u2c7c X\u2c7c", 13)
        p.line((480, y + 14), (570, y + 14), colour=colour, width=2)
    p.box(570, 24, 130, 178, PALE, "")
    p.text(635, 108, "block 3", 14)
    for c, word in enumerate(("queries", "keys", "values", "residual")):
        p.text(578, 52 + 46 * c, word, 10, "start", GREY)
    p.line((700, 113), (745, 113))
    p.text(728, 104, "X\u2083", 13)
    p.text(405, 236, "w: for each token, from the newest hidden state", 12, fill=GREY)
    p.save("connections")


class Grid:
    """Layers over hidden states, with how often a hidden state's worth of memory moves; the backward runs downwards."""

    def __init__(self, picture: Picture, left: float, layers: int, title: str, note: str, skip_after: int = 0) -> None:
        self.p, self.left, self.layers, self.skip_after = picture, left, layers, skip_after
        picture.text(left + 20, 22, title, 14, "start")
        picture.text(left + 20, picture.height - 12, note, 12, "start", GREY)
        for j in range(layers + 1):
            picture.text(self.x(j) + 16, 46, f"X{chr(0x2080 + j)}", 12)

    def x(self, source: int) -> float:
        return self.left + 52 + 36 * source

    def y(self, layer: int) -> float:
        """The top of a layer's row; after the layer skip_after a row is left free."""
        return 54 + 34 * (self.layers - layer + (layer < self.skip_after))

    def row(self, y: float, name: str, passes: list[int]) -> None:
        self.p.text(self.left + 44, y + 20, name, 12, "end")
        for j, count in enumerate(passes):
            self.p.box(self.x(j), y, 32, 28, PASSES[count], str(count))

    def layer(self, i: int, passes: list[int]) -> None:
        self.row(self.y(i), f"DA{chr(0x2080 + i)}", passes)


def chaining() -> None:
    """What the backward of each layer moves when autograd adds, and when gradients are chained."""
    layers = 5
    p = Picture(620, 272)
    added = Grid(p, 0, layers, "autograd adds", "read X, write dX; to add: read two, write one")
    chained = Grid(p, 310, layers, "chained", "read X and G, write G + the layer's own term")
    for i in range(1, layers + 1):
        added.layer(i, [5] * (i + 1))
        chained.layer(i, [3] * (i + 1))
    for j in range(layers + 1):
        x = chained.x(j) + 27
        p.line((x, 38), (x, chained.y(max(j, 1)) + 38), colour=INK, width=1)
    p.save("chaining")


def deferring() -> None:
    """What a group of three layers moves when its terms of the older gradients are added in one pass."""
    layers, first = 5, 3
    p = Picture(620, 306)
    chained = Grid(p, 0, layers, "chained", "every layer reads and writes every gradient")
    group = Grid(p, 310, layers, "deferred, a group of three", "flush, once: read G and the factors, write dX", first)
    for i in range(1, layers + 1):
        chained.layer(i, [3] * (i + 1))
        group.layer(i, [1] * first + [3] * (i + 1 - first) if i >= first else [3] * (i + 1))
    flush = group.y(first) + 34
    group.row(flush, "flush", [2] * first)
    for n, i in enumerate(range(layers, first - 1, -1)):
        y, right, to = group.y(i) + 14, group.x(layers) + 42 + 8 * n, flush + 8 + 6 * n
        p.line((group.x(i) + 34, y), (right, y), (right, to), (group.x(first), to), colour=WAYS["q"], width=1)
    p.text(group.x(layers), flush + 36, "dY and w of each layer", 11, fill=WAYS["q"])
    p.save("deferring")


def floors() -> None:
    """The floors of the library; includes and imports go down only."""
    p = Picture(620, 250)
    rows = {
        "inference": "generation, text", "models": "MUDDFormer, families, checkpoints",
        "nn": "MUDDStack, Connections, History, DepthAggregation",
        "ops": "torch.ops.muddformer.*: schema, autograd, autocast, meta, CPU, CUDA",
        "kernels": "CUDA, no torch header",
    }  # fmt: skip
    for i, (name, what) in enumerate(rows.items()):
        y = 14 + 46 * i
        p.box(20, y, 120, 32, "#e3f2fd", name, 14)
        p.text(156, y + 21, what, 12, "start", GREY)
        if i:
            p.line((80, y - 14), (80, y))
    p.save("floors")


if __name__ == "__main__":
    for draw in (connections, chaining, deferring, floors):
        draw()

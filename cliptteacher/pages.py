"""Pages in HTML that are one file each: no network, no script or style from elsewhere.

    page(title, body)                      head, style and body
    picture(image)                         a PIL image inside the page, as JPEG
    line_chart({"val": [(x, y), ...]})     curves as inline SVG
    table(heads, rows)                     cells are HTML: escape words with `text`
    gallery(title, items, names, colours)  photographs under label maps that can be switched

The standard library and Pillow. Cost: milliseconds per picture.
"""

import base64
import html
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from PIL import Image

from .palette import Pixels, class_palette

Points = Sequence[tuple[float, float]]

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 0 auto; max-width: 1100px;
  padding: 16px 20px 60px; }
h1 { font-size: 24px; margin: 12px 0 2px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 36px 0 8px; border-bottom: 1px solid #ddd; }
p.note, figcaption { color: #555; margin: 4px 0 10px; overflow-wrap: anywhere; }
img, svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; } td, th { padding: 2px 12px 2px 0; text-align: left; }
td:first-child, td.group { white-space: nowrap; }
pre { background: #f4f4f4; padding: 10px; overflow-x: auto; white-space: pre-wrap; }
.row { display: flex; flex-wrap: wrap; gap: 14px; align-items: flex-start; }
.tile { background: #f4f6f8; border-radius: 8px; padding: 8px 16px; min-width: 110px; }
.tile b { display: block; font-size: 26px; } figure { margin: 0 0 14px; }
.bar { display: inline-block; height: 11px; background: #4878a8; } .unseen .bar { background: #c83020; }
.unseen td.group { color: #c83020; } .swatch { display: inline-block; width: 12px; height: 12px;
  margin-right: 5px; vertical-align: -1px; border: 1px solid #0003; }
.legend span { margin-right: 14px; white-space: nowrap; } .legend { margin: 4px 0 10px; }
""".strip()  # noqa: E501


def page(title: str, body: str, script: str = "") -> str:
    """Return a whole page; `body` and `script` are taken as they are."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>\n{_STYLE}\n</style>\n</head>\n"
        f"<body>\n<h1>{text(title)}</h1>\n{body}\n"
        + (f"<script>\n{script}\n</script>\n" if script else "")
        + "</body>\n</html>\n"
    )


def text(words: object) -> str:
    """Escape words for HTML."""
    return html.escape(str(words))


def picture(image: Image.Image, caption: str = "", side: int = 1100) -> str:
    """Return an image as JPEG inside the page, shrunk to a long side; the caption is escaped."""
    image = image.convert("RGB")
    image.thumbnail((side, side))
    size = f'width="{image.width}" height="{image.height}"'
    tag = f'<img {size} alt="{text(caption)}" src="{data_uri(image, "JPEG", quality=82)}">'
    return f"<figure>{tag}<figcaption>{text(caption)}</figcaption></figure>" if caption else tag


def data_uri(image: Image.Image, form: str, **options: object) -> str:
    """Encode an image as an address that holds the image itself."""
    file = io.BytesIO()
    image.save(file, form, **options)
    kind = form.lower()
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], classes: Sequence[str] = ()) -> str:
    """Return a table; heads are escaped, cells are HTML, classes are those of the rows."""
    lines = ["<table>", "<tr>" + "".join(f"<th>{text(head)}</th>" for head in heads) + "</tr>"]
    for number, row in enumerate(rows):
        name = f' class="{classes[number]}"' if classes else ""
        lines.append(f"<tr{name}>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>")
    return "\n".join([*lines, "</table>"])


def legend(names: Sequence[str], colours: Pixels, marks: Mapping[str, str] | None = None) -> str:
    """Return swatches and names, each with its mark behind, such as "unseen"."""
    marks = marks or {}
    spans = (
        f'<span><i class="swatch" style="background:{css(colour)}"></i>{text(name)}'
        + (f' <small style="color:#c83020">{text(marks[name])}</small>' if name in marks else "")
        + "</span>"
        for name, colour in zip(names, colours, strict=True)
    )
    return f'<div class="legend">{" ".join(spans)}</div>'


def css(colour: Sequence[int]) -> str:
    """Write a colour as CSS does."""
    return "#" + "".join(f"{int(value):02x}" for value in colour)


def line_chart(series: Mapping[str, Points], title: str, size: tuple[int, int] = (330, 200)) -> str:
    """Draw curves as SVG, the vertical axis from 0 or the smallest value to the largest.

    Args:
        series: name of each curve -> (x, y) of its points; values that are not finite are left out.
        title: written above.
        size: width and height in pixels.
    """
    curves = {
        name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in series.items()
    }
    everything = [point for points in curves.values() for point in points]
    if not everything:
        return ""
    (width, height), (left, top, right, bottom) = size, (46, 24, 10, 22)
    lows, highs = (tuple(map(f, zip(*everything, strict=True))) for f in (min, max))
    x0, x1 = lows[0], max(highs[0], lows[0] + 1e-9)
    y0 = min(0.0, lows[1])
    y1 = max(highs[1], y0 + 1e-9)

    def at(x: float, y: float) -> str:
        across = left + (x - x0) / (x1 - x0) * (width - left - right)
        return f"{across:.1f},{top + (y1 - y) / (y1 - y0) * (height - top - bottom):.1f}"

    parts = [f'<text x="{left}" y="15" font-weight="600">{text(title)}</text>']
    for k in range(5):
        value = y0 + k / 4 * (y1 - y0)
        (xa, y), (xb, _) = (at(x, value).split(",") for x in (x0, x1))
        parts.append(f'<line x1="{xa}" x2="{xb}" y1="{y}" y2="{y}" stroke="#e2e2e2"/>')
        parts.append(
            f'<text x="{left - 5}" y="{float(y) + 4}" text-anchor="end">{_short(value)}</text>'
        )
    ends = (("start", x0), ("end", x1))
    for anchor, x in ends:
        across = at(x, y0).split(",")[0]
        label = f'<text x="{across}" y="{height - 5}" text-anchor="{anchor}">{x:.0f}</text>'
        parts.append(label)
    colours = [colour for colour in class_palette(40) if colour @ (0.3, 0.6, 0.1) < 150]
    behind = 0.0
    for (name, points), colour in zip(curves.items(), colours, strict=False):
        line = " ".join(at(x, y) for x, y in points)
        if len(points) > 1:
            parts.append(f'<polyline points="{line}" fill="none" stroke="{css(colour)}" '
                         f'stroke-width="1.8"><title>{text(name)}</title></polyline>')  # fmt: skip
        if len(points) < 20:
            parts += [
                f'<circle cx="{point[0]}" cy="{point[1]}" r="2.6" fill="{css(colour)}"/>'
                for point in (at(x, y).split(",") for x, y in points)
            ]
        if len(curves) > 1:
            x = width - right - behind
            parts.append(f'<text x="{x}" y="15" text-anchor="end" fill="{css(colour)}">{text(name)}</text>')  # noqa: E501  # fmt: skip
            behind += 7.0 * len(name) + 8
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">'
        + "".join(parts)
        + "</svg>"
    )


def _short(value: float) -> str:
    return f"{value:.1e}" if 0 < abs(value) < 0.01 else f"{value:.3g}"


def gallery(
    title: str,
    items: Sequence[tuple[str, Image.Image, Image.Image]],
    names: Sequence[str],
    colours: Pixels,
) -> str:
    """Return a page of photographs under their label maps.

    A slider sets the opacity of the colours, and an entry of the legend switches its class.

    Args:
        title: of the page.
        items: caption, photograph and label map of each; the map has one class index a pixel.
        names: names of the A classes.
        colours: (A, 3).
    """
    figures = [
        f"<figure><div class=stack>{picture(image)}"
        f'<canvas data-map="{data_uri(labels, "PNG", optimize=True)}"></canvas></div>'
        f"<figcaption>{text(caption)}</figcaption></figure>"
        for caption, image, labels in items
    ]
    present = sorted({int(k) for _, _, labels in items for k in np.unique(np.asarray(labels))})
    buttons = [
        f'<button data-class="{k}" aria-pressed="true"><i class="swatch" '
        f'style="background:{css(colours[k])}"></i>{text(names[k])}</button>'
        for k in present
        if k < len(names)
    ]
    body = (
        "<style>.stack { position: relative; display: inline-block; line-height: 0; } "
        ".stack canvas { position: absolute; left: 0; top: 0; width: 100%; height: 100%; "
        "image-rendering: pixelated; } .controls { position: sticky; top: 0; background: #fffe; "
        "padding: 8px 0; z-index: 1; } button { font: inherit; background: #f4f6f8; border: 1px "
        "solid #ccc; border-radius: 6px; margin: 2px; padding: 2px 8px; cursor: pointer; } "
        'button[aria-pressed="false"] { opacity: 0.45; text-decoration: line-through; }</style>'
        "<div class=controls><label>opacity <input type=range min=0 max=100 value=55 id=opacity>"
        f"</label> <button id=all>all</button><button id=none>none</button><br>{''.join(buttons)}"
        f"</div>\n<div class=row>{''.join(figures)}</div>"
    )
    script = _GALLERY.replace("COLOURS", json.dumps(colours.tolist()))
    return page(title, body, script)


_GALLERY = """
const colours = COLOURS, hidden = new Set();
const buttons = [...document.querySelectorAll("button[data-class]")];
const maps = [...document.querySelectorAll("canvas")].map(canvas => {
  const entry = {canvas, labels: null}, image = new Image();
  image.onload = () => {
    canvas.width = image.width; canvas.height = image.height;
    const pen = canvas.getContext("2d");
    pen.drawImage(image, 0, 0);
    const data = pen.getImageData(0, 0, image.width, image.height).data;
    entry.labels = data.filter((_, k) => k % 4 === 0);
    paint(entry);
  };
  image.src = canvas.dataset.map;
  return entry;
});
function paint({canvas, labels}) {
  if (!labels) return;
  const pen = canvas.getContext("2d"), out = pen.createImageData(canvas.width, canvas.height);
  labels.forEach((label, k) => {
    if (label < colours.length && !hidden.has(label)) out.data.set([...colours[label], 255], 4 * k);
  });
  pen.putImageData(out, 0, 0);
}
function show(visible, chosen) {
  chosen.forEach(button => {
    hidden[visible ? "delete" : "add"](Number(button.dataset.class));
    button.setAttribute("aria-pressed", visible);
  });
  maps.forEach(paint);
}
buttons.forEach(button =>
  button.onclick = () => show(button.getAttribute("aria-pressed") !== "true", [button]));
document.getElementById("all").onclick = () => show(true, buttons);
document.getElementById("none").onclick = () => show(false, buttons);
const slider = document.getElementById("opacity");
slider.oninput = () => maps.forEach(({canvas}) => canvas.style.opacity = slider.value / 100);
slider.oninput();
"""

"""One picture: accuracy against the tokens that it cost, as SVG text.

A series is a method, a point is that method at one N: a marker at (tokens, accuracy), a whisker over its 95% interval,
N beside it, a line through the series. The tokens are on a logarithmic axis, as each doubling of N doubles them. The
picture brings its own white ground, so that it reads on a dark page too, and the same points give the same text.
Left out: every other kind of picture. Colours: Okabe and Ito, "Color Universal Design" (2008), which the colour-blind
can tell apart; their yellow is left out, as it is too faint on white.
"""

import math
import xml.etree.ElementTree as ET
from bisect import bisect_left, bisect_right
from dataclasses import dataclass

COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7")
SHAPES = (  # 6, which shares no factor with the 7 colours: 42 series are told apart by the two
    "M-4.5 0A4.5 4.5 0 1 1 4.5 0A4.5 4.5 0 1 1 -4.5 0Z",  # circle
    "M-4 -4H4V4H-4Z",  # square
    "M0 -5.5L5 4H-5Z",  # triangle
    "M0 -6L5 0L0 6L-5 0Z",  # diamond
    "M0 5.5L5 -4H-5Z",  # triangle on its tip
    "M-1.8 -5.5H1.8V-1.8H5.5V1.8H1.8V5.5H-1.8V1.8H-5.5V-1.8H-1.8Z",  # cross
)
FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
INK, FAINT, GRID, GROUND = "#1f2328", "#59636e", "#e4e7eb", "#ffffff"
WIDTH, HEIGHT = 960, 560  # wider where a name in the legend needs it
LEFT, RIGHT, TOP, BOTTOM = 90, 690, 80, 480  # where the outermost ticks lie
MARGIN = 16  # from the outermost ticks to the edge of the plot area, for the markers on them
LEGEND = RIGHT + MARGIN + 24
ROUNDING = 1e-9  # by which an interval may miss its own end: Wilson's of 1 of 1 ends at 1 but for the last bit
REACH = 5  # from the middle of a marker to its edge, more or less
SIDES = ((0, -1), (0, 1), (1, 0), (-1, 0), (1, -1), (-1, -1), (1, 1), (-1, 1))  # where N goes: the first that is free


@dataclass(frozen=True)
class Point:
    """One method at one N."""

    x: float  # tokens a problem, above 0
    y: float  # accuracy, 0..1
    low: float  # 95% interval
    high: float
    label: str  # what N is here: "4"


def scatter(series: dict[str, list[Point]], *, title: str, x_label: str, y_label: str) -> str:
    """The SVG text of all series, named in the order given; a line runs through a series' points in their order."""
    points = [point for line in series.values() for point in line]
    for p in points:
        is_around = -ROUNDING <= p.low <= p.y + ROUNDING and p.y - ROUNDING <= p.high <= 1 + ROUNDING
        assert 0 < p.x < math.inf and is_around, f"cannot show {p}: want x > 0 and 0 <= low <= y <= high <= 1"
    x_ticks = logarithmic_ticks(min(p.x for p in points), max(p.x for p in points))
    y_ticks = linear_ticks(min(p.low for p in points), max(p.high for p in points))
    marks = [  # in pixels, of which y grows downwards
        (i, Point(x_pixel(p.x, x_ticks), *(y_pixel(y, y_ticks) for y in (p.y, p.low, p.high)), p.label))
        for i, line in enumerate(series.values())
        for p in line
    ]
    svg = blank(max(WIDTH, LEGEND + 50 + 7 * max(map(len, series))), title)
    draw_axes(svg, x_ticks, y_ticks, x_label, y_label)
    draw_whiskers(svg, marks)
    for i in range(len(series)):
        draw_line(svg, i, [(p.x, p.y) for j, p in marks if j == i])
    for i, p in marks:
        draw_marker(svg, i, p.x, p.y)
    draw_labels(svg, [p for _, p in marks])
    draw_legend(svg, list(series))
    ET.indent(svg)
    return ET.tostring(svg, encoding="unicode") + "\n"


def logarithmic_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten: from the last that is not above low to the first that is not below high.

    >>> logarithmic_ticks(70, 1000)
    [50.0, 100.0, 200.0, 500.0, 1000.0]
    """
    exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    ticks = [float(f"{digit}e{exponent}") for exponent in exponents for digit in (1, 2, 5)]
    first, last = bisect_right(ticks, low) - 1, bisect_left(ticks, high)
    if first == last:
        first, last = first - 1, last + 1
    return ticks[first : last + 1]


def linear_ticks(low: float, high: float) -> list[float]:
    """Multiples of the smallest round step that gets from low to high, both in 0..1, in at most ten steps.

    >>> linear_ticks(0.12, 0.31)
    [0.12, 0.14, 0.16, 0.18, 0.2, 0.22, 0.24, 0.26, 0.28, 0.3, 0.32]
    """
    for step in (0.01, 0.02, 0.05, 0.1):
        # Rounded, as 0.3 / 0.1 and the ends of an interval may miss a tick by the last bit.
        first, last = math.floor(round(low / step, 6)), math.ceil(round(high / step, 6))
        if last - first <= 10:
            break
    if first == last:
        first, last = (first - 1, last) if first else (0, 1)
    return [round(i * step, 2) for i in range(first, last + 1)]


def x_pixel(x: float, ticks: list[float]) -> float:
    return LEFT + (RIGHT - LEFT) * math.log2(x / ticks[0]) / math.log2(ticks[-1] / ticks[0])


def y_pixel(y: float, ticks: list[float]) -> float:
    return BOTTOM - (BOTTOM - TOP) * (y - ticks[0]) / (ticks[-1] - ticks[0])


def add(parent: ET.Element, tag: str, text: str | None = None, **attributes: str | float) -> None:
    """Append an element; numbers are rounded to a tenth of a pixel, `font_size` is written font-size."""
    written = {
        name.replace("_", "-"): value if isinstance(value, str) else f"{round(value, 1) + 0:g}"  # + 0: no -0
        for name, value in attributes.items()
    }
    ET.SubElement(parent, tag, written).text = text


def blank(width: int, title: str) -> ET.Element:
    """A picture with its ground and its title."""
    size = {"width": str(width), "height": str(HEIGHT), "viewBox": f"0 0 {width} {HEIGHT}"}
    svg = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "role": "img", "font-family": FONT} | size)
    add(svg, "title", title)
    add(svg, "rect", width=width, height=HEIGHT, rx=8, fill=GROUND)
    add(svg, "text", title, x=LEFT - MARGIN, y=38, fill=INK, font_size=17, font_weight="600")
    return svg


def draw_axes(svg: ET.Element, x_ticks: list[float], y_ticks: list[float], x_label: str, y_label: str) -> None:
    left, right, top, bottom = LEFT - MARGIN, RIGHT + MARGIN, TOP - MARGIN, BOTTOM + MARGIN
    for tick in x_ticks:
        x = x_pixel(tick, x_ticks)
        add(svg, "line", x1=x, x2=x, y1=top, y2=bottom, stroke=GRID)
        text = f"{tick / 1e6:g}M" if tick >= 1e6 else f"{tick / 1e3:g}k" if tick >= 1e3 else f"{tick:g}"
        add(svg, "text", text, x=x, y=bottom + 18, fill=FAINT, font_size=12, text_anchor="middle")
    decimals = 1 if all(tick == round(tick, 1) for tick in y_ticks) else 2
    for tick in y_ticks:
        y = y_pixel(tick, y_ticks)
        add(svg, "line", x1=left, x2=right, y1=y, y2=y, stroke=GRID)
        text = f"{tick:.{decimals}f}"
        add(svg, "text", text, x=left - 8, y=y + 4, fill=FAINT, font_size=12, text_anchor="end")
    add(svg, "rect", x=left, y=top, width=right - left, height=bottom - top, fill="none", stroke="#c5ccd3")
    label = {"fill": INK, "font_size": 13, "text_anchor": "middle"}
    add(svg, "text", x_label, x=(left + right) / 2, y=bottom + 46, **label)
    add(svg, "text", y_label, transform=f"translate(26 {(top + bottom) / 2:g}) rotate(-90)", **label)


def draw_whiskers(svg: ET.Element, marks: list[tuple[int, Point]]) -> None:
    """Intervals that would lie on one another stand side by side, two pixels apart, around the place they share."""
    for i, (series, p) in enumerate(marks):
        is_beside = [abs(q.x - p.x) < 3 and q.low >= p.high and p.low >= q.high for _, q in marks]
        x = p.x + sum(is_beside[:i]) - sum(is_beside[i + 1 :])
        add(svg, "line", x1=x, x2=x, y1=p.low, y2=p.high, stroke=look(series)[0], stroke_opacity="0.4")


def look(series: int) -> tuple[str, bool]:
    """Its colour, and whether it is of the second round through the colours: hollow, its line dashed."""
    return COLOURS[series % len(COLOURS)], series // len(COLOURS) % 2 == 1


def draw_line(svg: ET.Element, series: int, spots: list[tuple[float, float]]) -> None:
    stroke, is_hollow = look(series)
    points, dashes = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots), "5 3" if is_hollow else "none"
    add(svg, "polyline", points=points, fill="none", stroke=stroke, stroke_opacity="0.8", stroke_dasharray=dashes)


def draw_marker(svg: ET.Element, series: int, x: float, y: float) -> None:
    colour, is_hollow = look(series)
    fill, stroke = (GROUND, colour) if is_hollow else (colour, GROUND)
    shape, place = SHAPES[series % len(SHAPES)], f"translate({x:.1f} {y:.1f})"
    add(svg, "path", d=shape, transform=place, fill=fill, stroke=stroke, stroke_width=1.2)


def draw_labels(svg: ET.Element, marks: list[Point]) -> None:
    """N beside each marker, on the first side that is free; once for markers that lie together and have the same N.

    A digit is 5.6 wide and 7.2 high at its size.
    """
    taken = [(m.x - REACH, m.y - REACH, m.x + REACH, m.y + REACH) for m in marks]
    written: list[Point] = []
    for mark in marks:
        is_said = any(m.label == mark.label and math.dist((m.x, m.y), (mark.x, mark.y)) < 14 for m in written)
        if not mark.label or is_said:
            continue
        w, h = 2.8 * len(mark.label), 3.6  # half of its width and height
        middles = [(mark.x + x * (REACH + 2 + w), mark.y + y * (REACH + 2 + h)) for x, y in SIDES]
        boxes = [(x - w, y - h, x + w, y + h) for x, y in middles]
        free = (a for a in boxes if not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in taken))
        left, top, right, bottom = box = next(free, boxes[0])
        taken.append(box)
        written.append(mark)
        add(svg, "rect", x=left, y=top, width=right - left, height=bottom - top, fill=GROUND, fill_opacity="0.7")
        add(svg, "text", mark.label, x=(left + right) / 2, y=bottom, fill=INK, font_size=10, text_anchor="middle")


def draw_legend(svg: ET.Element, names: list[str]) -> None:
    row = min(25, (BOTTOM - TOP) / len(names))
    for i, name in enumerate(names):
        y = TOP + i * row
        draw_line(svg, i, [(LEGEND, y), (LEGEND + 28, y)])
        draw_marker(svg, i, LEGEND + 14, y)
        add(svg, "text", name, x=LEGEND + 38, y=y + 4, fill=INK, font_size=12.5)
    add(svg, "text", "bars: 95% intervals; numbers: N", x=LEGEND, y=BOTTOM + MARGIN, fill=FAINT, font_size=11)

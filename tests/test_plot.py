"""The picture of accuracy against tokens: where its points lie, its ticks, its text, and what it refuses."""

import itertools
import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanor1.evaluation.accuracy import wilson_interval
from nanor1.evaluation.plot import COLOURS, SHAPES, Point, linear_ticks, logarithmic_ticks, scatter

LABELS = {"title": "a title", "x_label": "tokens a problem", "y_label": "accuracy"}


def point(x, y, label="", half=0.0) -> Point:
    return Point(x, y, max(0.0, y - half), min(1.0, y + half), label)


def draw(series) -> ET.Element:
    root = ET.fromstring(scatter(series, **LABELS))
    for element in root.iter():
        element.tag = element.tag.removeprefix("{http://www.w3.org/2000/svg}")
    return root


def texts(root) -> list[str]:
    return [element.text for element in root.iter("text")]


def markers(root, n_points) -> list[tuple[float, float]]:
    """The places of the markers of points; one more a series stands in the legend, drawn last."""
    places = [re.fullmatch(r"translate\((\S+) (\S+)\)", e.get("transform")).groups() for e in root.iter("path")]
    return [(float(x), float(y)) for x, y in places[:n_points]]


def whiskers(root) -> list[tuple[float, float, float]]:
    lines = [e for e in root.iter("line") if e.get("stroke-opacity")]
    assert all(e.get("x1") == e.get("x2") for e in lines)
    return [(float(e.get("x1")), float(e.get("y1")), float(e.get("y2"))) for e in lines]


def polylines(root) -> list[list[tuple[float, float]]]:
    return [[tuple(map(float, pair.split(","))) for pair in e.get("points").split()] for e in root.iter("polyline")]


def test_points_lie_where_a_ruler_puts_them():
    # The ticks are 100, 200, 500, 1k at pixels 90 to 690, and 0.0 to 1.0 at pixels 480 to 80. So 100 lies at 90,
    # 10^2.5 halfway, at 390, and 200 at 90 + 600 log10(2) = 270.6; an accuracy of 0.25 at 480 - 0.25 * 400 = 380.
    line = [Point(100, 0, 0, 0.5, "1"), Point(200, 0.25, 0.125, 0.5, "2"), Point(10**2.5, 0.5, 0.25, 0.75, "4")]
    root = draw({"vote": line, "greedy": [Point(1000, 1, 0.5, 1, "")]})
    spots = [(90, 480), (270.6, 380), (390, 280), (690, 80)]
    assert markers(root, 4) == spots
    assert polylines(root)[:2] == [spots[:3], spots[3:]]
    assert whiskers(root) == [(90, 480, 280), (270.6, 430, 280), (390, 380, 180), (690, 280, 80)]
    assert len(list(root.iter("path"))) == 4 + 2  # each point once, and the legend's


def test_a_series_keeps_its_order_whatever_its_tokens():
    xs = [400, 100, 200]
    (line, _) = polylines(draw({"a": [point(x, 0.5) for x in xs]}))
    assert [sorted(x for x, _ in line).index(x) for x, _ in line] == [2, 0, 1]


def test_a_picture_names_its_axes_ticks_series_and_n():
    written = texts(draw({"vote": [point(150, 0.1, "7"), point(6000, 0.5, "11")], "direct": [point(160, 0.3)]}))
    assert written[:1] == ["a title"]
    ticks = ["100", "200", "500", "1k", "2k", "5k", "10k", "0.10", "0.15", "0.20", "0.25", "0.30", "0.35", "0.40"]
    assert written[1:17] == [*ticks, "0.45", "0.50"]
    assert {"tokens a problem", "accuracy", "7", "11", "vote", "direct"} <= set(written)


def test_ticks_by_hand():
    assert logarithmic_ticks(20, 5000) == [20, 50, 100, 200, 500, 1000, 2000, 5000]
    assert logarithmic_ticks(19.9, 20.1) == [10, 20, 50]
    assert logarithmic_ticks(100, 100) == [50, 100, 200]
    assert logarithmic_ticks(0.3, 1) == [0.2, 0.5, 1]
    assert linear_ticks(0.3, 0.3 + 1e-12) == [0.29, 0.3]
    assert linear_ticks(0.3, 0.9) == [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]  # though 0.3 / 0.1 is below 3
    assert linear_ticks(0, 0) == [0, 0.01] and linear_ticks(1, 1) == [0.99, 1]
    assert linear_ticks(0, 1 - 1e-16) == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]


@given(st.floats(0.01, 1e7), st.floats(1, 1e4))
def test_token_ticks_are_round_and_no_more_than_cover_the_data(low, ratio):
    ticks = logarithmic_ticks(low, low * ratio)
    assert {f"{tick:.0e}"[0] for tick in ticks} <= set("125") and all(float(f"{t:.0e}") == t for t in ticks)
    assert ticks[0] <= low and low * ratio <= ticks[-1] and len(ticks) >= 2
    assert len(ticks) == 3 or (low < ticks[1] and ticks[-2] < low * ratio)
    assert all(2 <= b / a <= 2.5 + 1e-9 for a, b in itertools.pairwise(ticks))


@given(st.floats(0, 1), st.floats(0, 1))
def test_accuracy_ticks_are_evenly_spaced_hundredths_within_0_and_1_that_cover_the_data(one, other):
    low, high = sorted((one, other))
    ticks = linear_ticks(low, high)
    assert 2 <= len(ticks) <= 11 and ticks[0] >= 0 and ticks[-1] <= 1
    assert ticks[0] <= low + 1e-6 and high - 1e-6 <= ticks[-1]
    steps = {round(100 * (b - a), 6) for a, b in itertools.pairwise(ticks)}
    assert len(steps) == 1 and steps <= {1, 2, 5, 10}


@settings(max_examples=40)
@given(st.lists(st.tuples(st.floats(1, 1e5), st.floats(0, 1), st.floats(0, 0.2)), min_size=1, max_size=8))
def test_more_tokens_lie_further_right_and_more_accuracy_higher_and_all_within_the_axes(rows):
    root = draw({"a": [point(x, y, "1", half) for x, y, half in rows]})
    spots = markers(root, len(rows))
    for ((x, y, _), (px, py)), ((x2, y2, _), (px2, py2)) in itertools.permutations(zip(rows, spots, strict=True), 2):
        assert (x > x2 or px <= px2) and (y > y2 or py >= py2)
    ends = [(x, y) for x, low, high in whiskers(root) for y in (low, high)]
    assert all(90 <= x <= 690 and 80 <= y <= 480 for x, y in spots)
    assert all(74 <= x <= 706 and 80 <= y <= 480 for x, y in ends)


def test_intervals_that_would_hide_one_another_stand_side_by_side_around_their_markers():
    together = {name: [point(100, y, half=0.1)] for name, y in (("a", 0.30), ("b", 0.32), ("c", 0.34), ("far", 0.9))}
    root = draw(together)
    (at,) = {x for x, _ in markers(root, 4)}
    assert [x - at for x, _, _ in whiskers(root)] == [-2, 0, 2, 0]


def label_boxes(root):
    """(left, top, right, bottom) of the N's, of which a digit is about 5 by 7 pixels."""
    found = [e for e in root.iter("text") if e.get("font-size") == "10"]
    corners = [(float(e.get("x")), float(e.get("y")), 2.5 * len(e.text)) for e in found]
    return [(x - half, y - 7, x + half, y) for x, y, half in corners]


def test_the_ns_of_neighbours_cover_neither_each_other_nor_a_marker():
    root = draw(
        {str(i): [point(1000 * 1.02**i, 0.5 + 0.002 * i, str(10 + i))] for i in range(5)} | {"w": [point(9, 0)]}
    )
    boxes, spots = label_boxes(root), markers(root, 6)
    assert len(boxes) == 5
    for i, a in enumerate(boxes):
        for b in boxes[:i] + [(x - 4, y - 4, x + 4, y + 4) for x, y in spots]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (a, b)


def test_markers_that_coincide_share_their_n_if_it_is_the_same():
    same = {"a": [point(100, 0.5, "4")], "b": [point(100, 0.5, "4")], "c": [point(100, 0.5, "8")]}
    root = draw(same)
    assert len(label_boxes(root)) == 2 and texts(root).count("4") == texts(root).count("8") == 1


def test_each_of_42_series_has_its_own_colour_and_shape_and_no_legend_entry_leaves_the_picture():
    assert math.gcd(len(COLOURS), len(SHAPES)) == 1
    root = draw({f"method {i}": [point(100, 0.5)] for i in range(42)})
    paths = list(root.iter("path"))[42:]
    assert len({(frozenset({e.get("fill"), e.get("stroke")}), e.get("d")) for e in paths}) == 42
    names = [e for e in root.iter("text") if (e.text or "").startswith("method ")]
    assert [e.text for e in names] == [f"method {i}" for i in range(42)]
    assert all(706 < float(e.get("x")) and 60 < float(e.get("y")) < 500 for e in names)


def test_a_long_name_widens_the_picture():
    narrow, wide = (int(draw({name: [point(9, 0.5)]}).get("width")) for name in ("short", "a long name " * 8))
    assert narrow == 960 and wide > 960 + 300


def test_text_is_escaped():
    hostile = '</text><script>x</script> & "it\'s" ]]>'
    text = scatter({hostile: [point(9, 0.5, "<&>")]}, title=hostile, x_label=hostile, y_label=hostile)
    assert "<script" not in text
    root = ET.fromstring(text)
    found = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert found.count(hostile) == 4 and "<&>" in found


def test_a_picture_stands_alone_on_its_own_ground_and_is_the_same_each_time():
    series = {"a": [point(100 / 3, 1 / 3, "1", 0.1), point(200 / 3, 2 / 3, "2", 0.1)]}
    text = scatter(series, **LABELS)
    assert text == scatter(series, **LABELS) and text.endswith("</svg>\n")
    assert not re.search(r"href|url\(|<script|<style|<image|on\w+=", text)
    assert re.findall(r"https?://[^\"]*", text) == ["http://www.w3.org/2000/svg"]
    assert not re.search(r"\d\.\d\d", re.sub(r">[^<]*<", "", text))  # tenths of a pixel, so that a diff is small
    ground = draw(series)[1]
    assert (ground.tag, ground.get("width"), ground.get("height")) == ("rect", "960", "560")


def test_one_point_and_points_of_one_x_have_a_place():
    assert markers(draw({"a": [point(100, 0.5)]}), 1) == [(390, 80)]  # of 50, 100, 200, and of 0.49, 0.50
    column = markers(draw({"a": [point(100, 0.2), point(100, 0.4)], "b": [point(100, 0.3)]}), 3)
    assert column == [(390, 480), (390, 80), (390, 280)]


def test_wilson_intervals_of_all_right_and_all_wrong_are_accepted():
    ends = [(right // n, *wilson_interval(right, n)) for n in range(1, 100) for right in (0, n)]
    assert any(high < 1 for y, _, high in ends if y), "no interval here misses its own end"
    root = draw({"a": [Point(5, y, low, high, "") for y, low, high in ends]})
    assert texts(root)[4:15] == [f"{i / 10:.1f}" for i in range(11)]


GOOD = {"x": 10.0, "y": 0.5, "low": 0.4, "high": 0.6}
NAN, INFINITY = math.nan, math.inf
BAD = [{name: NAN} for name in GOOD] + [{name: INFINITY} for name in GOOD] + [{"x": 0.0}, {"x": -5.0}]
BAD += [{"y": 0.7}, {"y": 0.3}, {"y": 50.0, "low": 40.0, "high": 60.0}, {"low": -0.1}, {"high": 1.1}]


@pytest.mark.parametrize("wrong", BAD, ids=str)
def test_a_point_without_a_place_is_refused_with_its_values(wrong):
    scatter({"a": [Point(**GOOD, label="")]}, **LABELS)
    with pytest.raises(AssertionError, match=f"cannot show .*{next(iter(wrong))}={next(iter(wrong.values()))}"):
        scatter({"beam": [Point(**GOOD | wrong, label="4")]}, **LABELS)

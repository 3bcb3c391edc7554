"""Grading: what is extracted, what is equal, what is not, and that no text raises or takes long."""

import json
import os
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanor1.grading import extract_answer, last_boxed, math_equal

ONE_WAY = ("1011", "1011_2")  # a gold's base may be left out; a base too many is a mistake
EQUAL = [
    # integers and decimals
    ("042", "42"),
    ("-17", "\\left(-17\\right)"),
    ("+6", "6"),
    ("2.50", "2.5"),
    (".75", "0.75"),
    ("-0", "0"),
    ("-(+3)", "-3"),
    ("2 - -+3", "5"),
    ("2^{3^2}", "512"),
    ("2^3^2", "512"),
    ("-(+3)^2", "-9"),
    ("x^-1", "1/x"),
    ("5.", "5"),
    ("1.2e3", "1200"),
    ("4.7 \\times 10^{-3}", "0.0047"),
    ("6 * 10^5", "600000"),
    ("−8", "-8"),
    # thousands separators
    ("12,345,678", "12345678"),
    ("1{,}024", "1024"),
    ("9,\\!999", "9999"),
    ("-3,500.25", "-3500.25"),
    ("2,048", "2,048"),
    ("1,000, 2,000", "1000, 2000"),
    ("100, 200, 300", "100,200,300"),
    # fractions and mixed numbers
    ("-\\frac{7}{3}", "\\frac{-7}{3}"),
    ("\\frac{-7}{-3}", "7/3"),
    ("\\dfrac{18}{24}", "0.75"),
    ("\\frac38", "3/8"),
    ("\\frac 5 {12}", "5/12"),
    ("2\\frac{3}{4}", "\\frac{11}{4}"),
    ("2 3/4", "2.75"),
    ("-1\\frac{1}{2}", "-1.5"),
    ("\\frac{\\frac{1}{2}}{\\frac{3}{4}}", "\\frac{2}{3}"),
    ("7½", "7.5"),
    ("\\cfrac{1}{8}", "0.125"),
    # percent, currency, units
    ("62.5\\%", "62.5%"),
    ("45 percent", "45\\%"),
    ("45", "45\\%"),
    ("0.45", "45\\%"),
    ("12%", "12"),
    ("12.5\\%", "\\frac{1}{8}"),
    ("\\$7.25", "7.25"),
    ("$1,299", "1299"),
    ("£40", "40"),
    ("€2.50", "2.5 \\text{ euros}"),
    ("-\\$5", "\\$-5"),
    ("\\$32.50", "-(-32.5)"),
    ("19 dollars", "\\$19"),
    ("12\\text{ cm}", "12"),
    ("12 cm", "12 \\text{ centimeters}"),
    ("48\\text{ cm}^2", "48"),
    ("48\\mbox{ cm}^{2}", "48\\text{ cm}^2"),
    ("60 \\text{ km/h}", "60"),
    ("35^{\\circ}", "35^\\circ"),
    ("35°", "35"),
    ("35 \\text{ degrees}", "35^\\circ"),
    ("\\frac{7}{2} \\text{ hours}", "3.5"),
    ("24 square units", "24"),
    ("9 apples", "9"),
    # roots, powers, constants
    ("\\sqrt{50}", "5\\sqrt{2}"),
    ("\\frac{1}{\\sqrt{3}}", "\\frac{\\sqrt{3}}{3}"),
    ("\\sqrt[3]{54}", "3\\sqrt[3]{2}"),
    ("\\sqrt[3]{-27}", "-3"),
    ("\\sqrt{3+2\\sqrt{2}}", "1+\\sqrt2"),
    ("2^{10}", "1024"),
    ("16^{3/4}", "8"),
    ("4\\pi/6", "\\frac{2\\pi}{3}"),
    ("3π", "3\\pi"),
    ("π/4", "\\frac{\\pi}{4}"),
    ("e^{2}", "e^2"),
    ("e^{i\\pi}", "-1"),
    ("\\ln 8", "3\\ln 2"),
    ("\\log_2 32", "5"),
    ("\\sin 30^\\circ", "\\frac12"),
    ("\\cos\\frac{\\pi}{3}", "0.5"),
    ("\\tan^{-1}(1)", "\\frac{\\pi}{4}"),
    ("6!", "720"),
    ("|-4|", "4"),
    ("√7", "\\sqrt{7}"),
    ("x²", "x^2"),
    ("(2+i)(2-i)", "5"),
    ("4i+3", "3+4i"),
    ("\\frac{1}{i}", "-i"),
    # expressions
    ("(n+1)^2", "n^2+2n+1"),
    ("2(a+b)", "2a + 2b"),
    ("\\frac{x^2-9}{x-3}", "x+3"),
    ("yx", "xy"),
    ("3\\cdot x", "3x"),
    ("\\frac{a}{2}+\\frac{b}{2}", "\\frac{a+b}{2}"),
    ("\\sin 2t", "2\\sin t\\cos t"),
    ("\\sin^2 x + \\cos^2 x", "1"),
    ("x^{-1}", "\\frac{1}{x}"),
    ("2^{n+1}", "2 \\cdot 2^n"),
    ("a_{1} + d", "d + a_1"),
    ("\\frac{1}{2}gt^2", "\\frac{gt^2}{2}"),
    ("\\alpha\\beta", "\\beta\\alpha"),
    ("(x-1)(x+1)(x^2+1)", "x^4-1"),
    ("\\sqrt{x}^2", "x"),
    ("f(x)=3x", "3x"),
    # tuples, intervals, sets, lists
    ("(1, 2, 3)", "(1,2,3)"),
    ("\\left(\\frac12, -3\\right)", "(0.5,-3)"),
    ("\\langle 1, 4 \\rangle", "(1,4)"),
    ("(10,200)", "(10, 200)"),
    ("\\{3, 1, 2\\}", "\\{1,2,3\\}"),
    ("1, 2", "\\{2, 1\\}"),
    ("4 \\text{ and } -4", "-4, 4"),
    ("\\pm 4", "4, -4"),
    ("x = 2 \\pm \\sqrt{3}", "2+\\sqrt{3}, 2-\\sqrt{3}"),
    ("x = 1 \\text{ or } x = 5", "1, 5"),
    ("5, 6, and 7", "7, 6, 5"),
    ("[2, \\infty)", "\\left[2,\\infty\\right)"),
    ("(-\\infty,1)\\cup(4,+\\infty)", "(4,\\infty) \\cup (-\\infty,1)"),
    ("(-∞, 0] ∪ {5}", "(-\\infty,0]\\cup\\{5\\}"),
    ("\\varnothing", "\\emptyset"),
    ("(x, y) = (7, -2)", "(7,-2)"),
    ("x = 7, y = -2", "(7,-2)"),
    ("3:4", "3 : 4"),
    ("\\mathbb{R}", "(-\\infty, \\infty)"),
    # matrices
    (
        "\\begin{bmatrix} 1 & 2 \\\\ 3 & 4 \\end{bmatrix}",
        "\\begin{pmatrix} 1&2\\\\3&4\\end{pmatrix}",
    ),
    ("\\begin{pmatrix} 1/2 \\\\ 3 \\end{pmatrix}", "\\begin{pmatrix} 0.5 \\\\ 3 \\\\ \\end{pmatrix}"),
    ("\\left[\\begin{array}{cc} a & b \\\\ c & d \\end{array}\\right]", "\\begin{pmatrix}a & b\\\\c & d\\end{pmatrix}"),
    # equations and inequalities
    ("x = 9", "9"),
    ("9 = x", "x=9"),
    ("1 + 2 = 3", "2 + 1 = 3"),
    ("y = 3x - 1", "3x - y = 1"),
    ("2x + 4y = 6", "x + 2y - 3 = 0"),
    ("(x-1)^2 + y^2 = 4", "x^2 - 2x + y^2 = 3"),
    ("x > 3", "3 < x"),
    ("x \\ge 3", "[3, \\infty)"),
    ("2 < x \\leq 8", "(2,8]"),
    ("-2x < -6", "x > 3"),
    ("|x| < 2", "(-2, 2)"),
    ("-3<x<3", "|x|<3"),
    ("(-\\infty,-1]\\cup[1,\\infty)", "|x| \\ge 1"),
    ("1 < |x| \\le 2", "[-2,-1) \\cup (1,2]"),
    ("x<1 \\text{ or } x>4", "(-\\infty,1)\\cup(4,\\infty)"),
    ("x \\in [0, 5)", "[0,5)"),
    ("x ≤ 4", "x \\le 4"),
    ("\\angle ABC = 40^\\circ", "40"),
    ("AB = 12", "12"),
    ("\\text{Area} = 25\\pi", "25\\pi"),
    ("n = 2k + 1", "2k+1"),
    # multiple choice, text, bases, wrappers
    ("(C)", "C"),
    ("\\text{(D)}", "D"),
    ("b", "B"),
    ("\\textbf{(E)}", "(E)"),
    ("Option A", "A"),
    ("\\text{Tuesday}", "tuesday"),
    ("parabola.", "\\text{parabola}"),
    ("No", "\\text{no}"),
    ("\\text{no solution}", "No solution"),
    ("1011_2", "1011_{2}"),
    ONE_WAY,
    ("$\\frac{2}{3}$", "\\(\\frac{2}{3}\\)"),
    ("\\boxed{11}", "$11$"),
    ("72", "He sold 48/2 = <<48/2=24>>24 clips.\n#### 72"),
    ("**36**", "36"),
    ("\\dfrac{1}{2}\\,\\text{cm}", "0.5"),
    ("\\frac{3\\pi}{2} \\text{ radians}", "\\frac{3}{2}\\pi"),
    ("\\frac{x+1}{x-1}", "1+\\frac{2}{x-1}"),
    ("(x+2)(x-5)=0", "x^2-3x-10=0"),
    ("\\{x=1,x=2\\}", "\\{1,2\\}"),
    ("(-3, \\frac{\\sqrt{5}}{2})", "\\left(-3,\\frac{1}{2}\\sqrt5\\right)"),
    ("120\\%", "1.2"),
    ("\\$1{,}500.00", "1500"),
    ("1500 dollars", "1500"),
    ("\\frac{\\sqrt{2}-\\sqrt{6}}{4}", "-\\frac{\\sqrt6-\\sqrt2}{4}"),
    ("\\sqrt[4]{16}", "2"),
    ("0.125", "2^{-3}"),
    ("10^{-2}", "0.01"),
    ("x\\geq-1", "[-1,\\infty)"),
    ("\\text{(A) } 5", "\\text{(A) }5"),
    ("\\ln\\left(\\frac{a}{b}\\right)", "\\ln(a/b)"),
    ("k(k+1)/2", "\\frac{k^2+k}{2}"),
    ("a^2 - b^2", "(a-b)(a+b)"),
    ("\\cos(2\\theta)", "1-2\\sin^2\\theta"),
    ("\\sec x", "\\frac{1}{\\cos x}"),
    ("e^{x+y}", "e^x e^y"),
    ("-\\frac{1}{2} + \\frac{\\sqrt{3}}{2}i", "\\frac{-1+i\\sqrt{3}}{2}"),
    ("3 \\text{ and } 5", "5,3"),
    ("a=1,b=2", "b=2,a=1"),
    ("\\overline{AB} = 5", "5"),
    ("8\\sqrt{3}\\text{ square units}", "8\\sqrt3"),
    ("5:00 \\text{ PM}", "5:00 \\text{ PM}"),
    ("t = \\frac{5}{2}\\text{ seconds}", "2.5"),
    ("100^\\circ", "100 \\text{ degrees}"),
    ("2\\,000", "2 000"),
]

UNEQUAL = [
    ("41", "42"),
    ("-5", "5"),
    ("100", "1000"),
    ("0.33", "\\frac13"),
    ("3.14", "\\pi"),
    ("1.414", "\\sqrt{2}"),
    ("12345678901234567890", "12345678901234567891"),
    ("0.1000000000000000000001", "0.1"),
    ("1.23", "123"),
    ("1,234", "1.234"),
    ("12, 345", "12345"),
    ("2,48", "2,048"),
    ("1,0", "1,000"),
    ("3/4", "4/3"),
    ("2\\frac{3}{4}", "\\frac{6}{4}"),
    ("23/4", "2 3/4"),
    ("\\frac12", "12"),
    ("\\frac{1}{23}", "\\frac{12}{3}"),
    ("0.45", "45"),
    ("4.5\\%", "45\\%"),
    ("0.0045", "45\\%"),
    ("4500\\%", "0.45"),
    ("5 km", "5 m"),
    ("5 \\text{ cm}^2", "5 \\text{ cm}^3"),
    ("5 cents", "\\$5"),
    ("5 \\text{ euros}", "\\$5"),
    ("£40", "\\$40"),
    ("40 pounds", "40 dollars"),
    ("45 cm", "45\\%"),
    ("30 minutes", "30 \\text{ hours}"),
    ("30 minutes", "0.5"),
    ("35^\\circ", "36^\\circ"),
    ("\\sqrt{3}", "3"),
    ("2\\sqrt{3}", "3\\sqrt{2}"),
    ("\\sqrt[3]{4}", "\\sqrt{4}"),
    ("\\sqrt{4}", "-2"),
    ("\\pi^2", "2\\pi"),
    ("2^{10}", "2^{11}"),
    ("-2^2", "4"),
    ("e", "2.718281828"),
    ("\\sin 2x", "2\\sin x"),
    ("\\ln 6", "\\ln 2 \\cdot \\ln 3"),
    ("1+2i", "1-2i"),
    ("2i", "2"),
    ("x", "y"),
    ("2x", "x^2"),
    ("x+1", "x-1"),
    ("\\sqrt{x^2}", "x"),
    ("|x|", "x"),
    ("(x+1)^2", "x^2+1"),
    ("\\frac{a+b}{2}", "a+\\frac{b}{2}"),
    ("a_1", "a_2"),
    ("x", "x'"),
    ("f(1)", "f(2)"),
    ("x^2 - 4", "(x-2)^2"),
    ("2^n", "n^2"),
    ("3x+2y", "2x+3y"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "[1,2]"),
    ("(1,2]", "[1,2)"),
    ("(1,2)", "(1,2,3)"),
    ("(1,2)", "12"),
    ("(0, \\infty)", "[0, \\infty)"),
    ("(-\\infty, 2)", "(2, \\infty)"),
    ("(0,1) \\cup (2,3)", "(0,3)"),
    ("(0,1)", "(0,1) \\cup (2,3)"),
    ("\\{1,2\\}", "\\{1,2,3\\}"),
    ("\\{1,1,2\\}", "\\{1,2,2\\}"),
    ("3", "3, 4"),
    ("3 or 4", "4"),
    ("1, 2, 3, 4, 5, 6, 7, 8, 9", "7"),
    ("\\pm 3", "3"),
    ("2 \\pm \\sqrt{3}", "2 + \\sqrt{3}"),
    ("\\{0\\}", "\\emptyset"),
    ("3:4", "4:3"),
    ("3:4", "34"),
    ("12:30", "6:15"),
    ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\begin{pmatrix}1&3\\\\2&4\\end{pmatrix}"),
    ("\\begin{pmatrix}1&2\\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
    ("\\begin{pmatrix}1\\end{pmatrix}", "\\begin{pmatrix}1&0\\\\0&1\\end{pmatrix}"),
    ("x = 9", "8"),
    ("x = 9", "y = 9"),
    ("3x = 9", "9"),
    ("x + y = 9", "9"),
    ("y = 2x", "y = 2x + 1"),
    ("x^2 + y^2 = 4", "x^2 - y^2 = 4"),
    ("x = x", "y = y"),
    ("0 = 0", "x = 3"),
    ("0 = 0", "20 = 0"),
    ("1 + 2 = 3", "3 = 4"),
    ("x < 3", "x \\le 3"),
    ("x < 3", "x > 3"),
    ("-x < 3", "x < -3"),
    ("x \\ne 3", "x = 3"),
    ("x > 3", "3"),
    ("2 < x < 8", "2 < x \\le 8"),
    ("|x| < 2", "(0, 2)"),
    ("|x| > 2", "(2, \\infty)"),
    ("A", "B"),
    ("(A)", "(AB)"),
    ("A, B", "A"),
    ("A or B or C or D", "C"),
    ("yes", "no"),
    ("no", "on"),
    ("east", "seat"),
    ("odd", "even"),
    ("not prime", "prime"),
    ("Monday", "Tuesday"),
    ("yes", "7"),
    ("", ""),
    ("", "5"),
    ("   ", "5"),
    ("$$", "5"),
    ("7", "12_5"),
    ("12_5", "7"),
    ("12_5", "12_6"),
    ("12_5", "12"),
    ("nan", "5"),
    ("\\infty", "-\\infty"),
    ("\\frac{0}{0}", "\\frac{1}{0}"),
    ("1/0", "\\infty"),
    ("\\tan(\\pi/2)", "\\tan(5\\pi/2)"),
    ("\\tan(\\pi/2)", "-\\cot(\\pi)"),
    ("\\frac{1}{\\sin\\pi}", "\\frac{1}{\\sin(-\\pi)}"),
    ("0.1\\overline{6}", "0.6"),
    ("0^0", "5"),
    ("{}", "0"),
    ("5 6", "56"),
    ("5 + ", "5"),
    ("10", "1 0"),
    ("42 43", "42"),
    ("the answer is 42 or 43", "42"),
    ("3..5", "3.5"),
    ("__import__('os')", "5"),
    ("\\frac{x+1}{x-1}", "1+\\frac{1}{x-1}"),
    ("120\\%", "12"),
    ("\\frac{\\sqrt{2}+\\sqrt{6}}{4}", "\\frac{\\sqrt6-\\sqrt2}{4}"),
    ("10^{-2}", "10^2"),
    ("(x+2)(x-5)=0", "(x-2)(x+5)=0"),
    ("\\sec x", "\\csc x"),
    ("a=1,b=2", "a=2,b=1"),
    ("a=1,b=2", "(2,1)"),
    ("x=1,x=2", "x=1"),
    ("\\{1\\}", "\\{1, 2\\}"),
    ("5 \\text{ PM}", "6 \\text{ PM}"),
    ("16 hours", "16 days"),
    ("3^2", "2^3"),
    ("f(x) = 2x", "f(x) = x^2"),
    ("x^2 = 4", "2"),
    ("|x-1|", "x-1"),
    ("(3, 4)", "3+4i"),
    ("\\text{Tuesday}", "\\text{Thursday}"),
    ("\\text{north}", "\\text{thorn}"),
    ("0.999999999999999999999", "1"),
    ("2\\pi", "6.283185307179586"),
    ("10000000000000000000000000000000000000001\\pi", "10000000000000000000000000000000000000000\\pi"),
    ("1,2,3", "1,2,4"),
    ("100", "100, 200"),
    ("\\sqrt{2}, 3", "\\sqrt{3}, 2"),
    ("y \\ge x", "y \\le x"),
    ("y > 2x", "2y > x"),
    ("B and C", "B"),
    ("{A, B}", "A"),
    ("1\\frac{2}{3}", "\\frac{12}{3}"),
]

EXTRACTED = [
    ("\\boxed\\frac{1}{2} is 4", "4"),
    ("So the total is \\boxed{29}.", "29"),
    ("first \\boxed{3}, but no: \\boxed{4}", "4"),
    ("\\boxed{\\frac{a_{1}}{b}} ends it", "\\frac{a_{1}}{b}"),
    ("\\fbox{17}", "17"),
    ("It is $\\boxed 8$.", "8"),
    ("$\\boxed{2}$ or $\\boxed{-2}$", "2, -2"),
    ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
    ("\\boxed{5} and then \\boxed{6", "5"),
    ("<think>maybe \\boxed{1}</think>The answer is \\boxed{2}", "2"),
    ("<think>maybe \\boxed{1}</think> I do not know", None),
    ("<think>\\boxed{1} and still thinking", None),
    ("<think>a</think> <think> \\boxed{3}", None),
    ("<think>t</think>\n<answer>81</answer>", "81"),
    ("<answer> x = 3 </answer>", "x = 3"),
    ("<answer>The answer is 12.</answer>", "12"),
    ("<answer>1</answer> no, <answer>2</answer>", "2"),
    ("5 * 3 = <<5*3=15>>15\n#### 15", "15"),
    ("#### $18", "$18"),
    ("#### 18.", "18"),
    ("#### 1,250\nHope this helps 7", "1,250"),
    ("#### -3", "-3"),
    ("The final answer is 6.5.", "6.5"),
    ("**Answer:** 14", "14"),
    ("Answer: $\\frac{3}{7}$", "\\frac{3}{7}"),
    ("the answer is 42 because 6*7 = 42 and 5 is odd", "42"),
    ("The answer is (B).", "B"),
    ("The correct answer is **C**", "C"),
    ("I first thought the answer is 3. The answer is 5.", "5"),
    ("Therefore, the answer is $x=5$ since $y=2$.", "x=5"),
    ("Final Answer: The final answer is $\\sqrt{2}$. I hope it is correct.", "\\sqrt{2}"),
    ("She needs 3 more, so she has 12 apples.", "12"),
    ("So we get $a = 3$ and finally $b = 4$.", "b = 4"),
    ("Hence \\(n = 10\\).", "n = 10"),
    ("We spend $5 and then $6.", "$6"),
    ("\\[x^2 = 16\\] which gives \\[ x = \\pm 4. \\]", "x = \\pm 4."),
    ("I think (A) is wrong and (C) holds.", "C"),
    ("", None),
    ("I give up", None),
    ("<answer></answer>", None),
    ("\\boxed{}", None),
    ("Let me compute.\n\n2 + 2 = 4, and 4 * 3 = 12.\n\nThe final answer is:\n$$\\boxed{12}$$", "12"),
    ("**Final Answer**\n\nThe value is $\\frac{5}{6}$.", "\\frac{5}{6}"),
    ("Therefore Janet makes $18 every day.", "$18"),
    ("</think>\n\nThe answer is: 3/8", "3/8"),
    ("So there are 1,234 of them.", "1,234"),
    ("The answer is approximately 3.5 hours.", "3.5"),
    ("Thus x equals -7.", "-7"),
    ("**Answer: B**", "B"),
    ("Answer: (C) 24", "C"),
    ("The answer should be $[2, 5)$, as shown.", "[2, 5)"),
    ("We have 10 - 3 = 7.", "7"),
    ("A train leaves at 3 and arrives at 9.", "9"),
    ("\\boxed{\\text{no solution}}", "\\text{no solution}"),
    ("The answer is 50%.", "50%"),
]


@pytest.mark.parametrize(("answer", "gold"), EQUAL)
def test_the_same_answer_written_differently_is_equal(answer, gold):
    assert math_equal(answer, gold)


@pytest.mark.parametrize(("answer", "gold"), [pair for pair in EQUAL if pair != ONE_WAY])
def test_equality_is_symmetric(answer, gold):
    assert math_equal(gold, answer)


@pytest.mark.parametrize(("answer", "gold"), UNEQUAL)
def test_a_different_answer_is_not_equal(answer, gold):
    assert not math_equal(answer, gold)


@pytest.mark.parametrize(("text", "expected"), EXTRACTED)
def test_the_answer_extracted_is_the_final_one(text, expected):
    assert extract_answer(text) == expected


def test_the_last_boxes_joined_by_words_are_one_list_and_a_cut_off_box_is_ignored():
    assert last_boxed(r"\boxed{9}. So \boxed{1} and \boxed{2}") == "1, 2"
    assert last_boxed(r"\boxed{\{1\}} then \boxed{2") == r"\{1\}"
    assert last_boxed("no box") is None


def test_no_answer_equals_nothing():
    assert not math_equal(None, "5")


# ---------------------------------------------------------------- hostile text

HOSTILE = {
    "tower of powers": "99**98**97",
    "LaTeX tower of powers": "9^{9^{9}}",
    "exponential tower": "e^{e^{e^{e^{e}}}}",
    "huge factorial": "10000000!",
    "irrational power": "\\pi^{10^{400}}",
    "sum of many fractions": "+".join(f"1/{number}" for number in range(1001, 1130)),
    "repeated factorial": "9!!!!!!",
    "huge exponent": "1e999999999",
    "huge integer": "9" * 1_000_000,
    "huge boxed integer": "\\boxed{" + "9" * 1_000_000 + "}",
    "deep brackets": "(" * 5000 + "1" + ")" * 5000,
    "deep fractions": "\\frac{" * 300 + "1" + "}{2}" * 300,
    "deep sets": "\\{" * 29 + "1,2" + "\\}" * 29,
    "deep roots": "\\sqrt" * 150 + "2",
    "chain of powers": "2^" * 400 + "2",
    "nested functions": "\\sin(" * 28 + "10^{400}" + ")" * 28,
    "long sum": "+".join(["\\sin x"] * 140),
    "long product": "*".join(["(1/3+1/7)"] * 90),
    "long relation": "=".join(["x"] * 400),
    "powers of powers": "(((x+1)^{20}+1)^{20}+1)^{20}",
    "many signs": "-" * 900 + "1",
    "many bars": "|" * 900,
    "many plus-minus": "\\pm".join(["1"] * 200),
    "many pairs": ",".join(["(1,2)"] * 150),
    "many percents": "5" + "%" * 900,
    "many boxes": "\\boxed{" * 150_000,
    "many dollars": "$" * 1_000_000,
    "many delimiters": "\\(" * 300_000,
    "many markers": "####" * 200_000,
    "many tags": "<answer>" * 100_000 + "</answer>" * 100_000,
    "many phrases": "answer " * 150_000,
    "phrase and white space": "answer" + " " * 1_000_000,
    "white space": " " * 1_000_000,
    "one long word": "a" * 1_000_000,
    "unfinished matrix": "\\begin{pmatrix}1&2\\\\" * 40,
    "surrogate": "\ud800",
    "null characters": "\x00" * 100,
    "infinity less infinity": "\\infty-\\infty",
    "logarithm to base 1": "\\log_{1}5",
    "Python": "__import__('os').system('true')",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_text_is_unequal_at_once(text):
    start_s = time.thread_time()
    extract_answer(text)
    assert not math_equal(text, "7")
    assert not math_equal("7", text)
    assert not math_equal(text, r"\sqrt{3}x")
    assert time.thread_time() - start_s < 2.0  # milliseconds on a free core; unbounded work would take minutes


def test_limits_hold_in_any_thread():
    seen = []

    def grade():
        for _ in range(5):
            seen.append((math_equal(r"\sin(\pi/6)", "1/2"), math_equal(r"e^{\sqrt{2}}", r"e^{1.414}")))
            seen.append((not math_equal("9^{9^{9}}", "1"), math_equal("99**98**97", "2")))

    threads = [threading.Thread(target=grade) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert seen == [(True, False)] * 40


def test_an_integer_is_graded_in_under_50_microseconds():
    start_s = time.thread_time()
    for number in range(2000):
        math_equal(str(number), "1234")
    assert (time.thread_time() - start_s) / 2000 < 500e-6  # about 1 microsecond; a parse would be hundreds


# ---------------------------------------------------------------- properties

RATIONALS = st.fractions(min_value=-1000, max_value=1000, max_denominator=500)
MATH_CHARACTERS = st.text(alphabet="0123456789+-*/^_(){}[]\\|,.;:=<>!%$&' xyieabfrcsqtπ√°½²", max_size=60)


def latex(number: Fraction) -> str:
    sign = "-" if number < 0 else ""
    return f"{sign}\\frac{{{abs(number.numerator)}}}{{{number.denominator}}}"


@given(RATIONALS)
def test_a_fraction_equals_itself_in_latex_and_scaled(number):
    plain = f"{number.numerator}/{number.denominator}"
    assert math_equal(plain, latex(number))
    assert math_equal(latex(number), f"${7 * number.numerator}/{7 * number.denominator}$")


@given(st.integers(-(10**9), 10**9), st.integers(0, 6))
def test_a_decimal_equals_its_fraction_and_its_percentage(digits, places):
    number = Fraction(digits, 10**places)
    decimal = f"{'-' if digits < 0 else ''}{abs(digits) // 10**places}.{abs(digits) % 10**places:0{places}d}"
    assert math_equal(decimal, latex(number))
    assert math_equal(decimal.rstrip(".") + "\\%", latex(number / 100))


@given(st.integers(0, 10**12))
def test_separated_thousands_equal_the_plain_number(number):
    assert math_equal(f"{number:,}", str(number))
    assert math_equal(f"{number:,}".replace(",", "{,}"), str(number))


@given(RATIONALS, RATIONALS)
def test_different_rationals_are_never_equal(a, b):
    assert math_equal(latex(a), latex(b)) == (a == b)
    assert math_equal(latex(a), f"{b.numerator}/{b.denominator}") == (a == b)


@given(st.integers(-(10**30), 10**30), st.integers(-(10**30), 10**30))
def test_integers_are_equal_only_when_they_are(a, b):
    assert math_equal(str(a), str(b)) == (a == b)
    assert math_equal(f"{a}.0", f"{b}") == (a == b)
    assert math_equal(f"{a}\\pi", f"{b} \\pi") == (a == b)


@given(st.lists(st.integers(-50, 50), min_size=2, max_size=6), st.randoms(use_true_random=False))
def test_a_list_is_equal_in_any_order_and_a_tuple_only_in_its_own(numbers, dice):
    shuffled = dice.sample(numbers, len(numbers))
    assert math_equal(", ".join(map(str, shuffled)), ", ".join(map(str, numbers)))
    as_tuples = [f"({', '.join(map(str, items))})" for items in (shuffled, numbers)]
    assert math_equal(*as_tuples) == (shuffled == numbers)


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=5), st.lists(st.integers(-9, 9), min_size=1, max_size=5))
def test_polynomials_are_equal_when_their_coefficients_are(a, b):
    def polynomial(coefficients):
        return "+".join(f"({c})x^{{{power}}}" for power, c in enumerate(coefficients))

    longest = max(len(a), len(b))
    padded = [numbers + [0] * (longest - len(numbers)) for numbers in (a, b)]
    assert math_equal(polynomial(a), polynomial(b[::1])) == (padded[0] == padded[1])


@given(st.one_of(st.text(max_size=300), MATH_CHARACTERS))
@settings(max_examples=300)
def test_no_text_raises_or_takes_long_and_every_text_equals_itself(text):
    start_s = time.thread_time()
    answer = extract_answer(text)
    assert answer is None or answer
    is_reflexive = math_equal(text, text)
    for gold in ("5", r"\frac{x}{2}", "(1, 2)", "x > 3", text + "+1"):
        math_equal(text, gold)
    assert time.thread_time() - start_s < 5.0
    assert is_reflexive or not any(character.isalnum() for character in text)


@given(MATH_CHARACTERS, MATH_CHARACTERS)
@settings(max_examples=300)
def test_equality_of_any_two_texts_is_symmetric_but_for_bases(a, b):
    if "_" not in a + b:
        assert math_equal(a, b) == math_equal(b, a)


# ---------------------------------------------------------------- public sets


def shared_lines(name: str) -> list[dict]:
    folder = os.environ.get("NANOR1_SHARED")
    if not folder or not (Path(folder) / name).exists():
        pytest.skip(f"NANOR1_SHARED holds no {name}")
    return [json.loads(line) for line in (Path(folder) / name).read_text(encoding="utf-8").splitlines()]


def test_conformance_without_a_false_positive_and_95_percent_agreement():
    lines = [line for line in shared_lines("conformance/math_equiv.jsonl") if not line["dubious"]]
    wrong = []
    for line in lines:
        extracted = extract_answer(line["prediction"]) if line["mode"] == "extract" else line["prediction"]
        if math_equal(extracted, line["gold"]) != line["expected"]:
            wrong.append(line)
    print("disagree:", [line["id"] for line in wrong])
    assert [line["id"] for line in wrong if not line["expected"]] == []
    assert len(wrong) <= 0.05 * len(lines)


def test_math500_golds_equal_themselves_and_the_boxed_answers_of_their_solutions():
    for problem in shared_lines("data/math500_test.jsonl"):
        assert math_equal(problem["answer"], problem["answer"])
        assert math_equal(extract_answer(problem["solution"]), problem["answer"])


def test_different_math500_golds_are_unequal():
    answers = sorted({problem["answer"] for problem in shared_lines("data/math500_test.jsonl")})
    pairs = [pair for step in (7, 31) for pair in zip(answers, answers[step:], strict=False)]
    assert [pair for pair in pairs if math_equal(*pair)] == []


def test_gsm8k_golds_are_what_follows_the_marker():
    for problem in shared_lines("data/gsm8k_test.jsonl"):
        gold = problem["answer"].rpartition("####")[2].strip()
        assert extract_answer(problem["answer"]) == gold
        assert math_equal(gold.replace(",", ""), problem["answer"])
        assert not math_equal(gold + "1", problem["answer"])

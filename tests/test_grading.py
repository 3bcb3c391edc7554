"""Grading: what is extracted, what is equal, what is not, and that no text raises or takes long."""

import json
import os
import re
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanor1.grading import extract_answer, is_worked_out, math_equal
from nanor1.rewards import accuracy
from nanor1.tasks.problems import Problem

ONE_WAY = ("1011", "1011_2")  # a gold's base may be left out; a base too many is a mistake
EQUAL = [
    ("x > 0, x \\ne 1", "(0,1)\\cup(1,\\infty)"),
    ("1 < x < 2 \\text{ or } x > \\frac{\\sqrt{36}}{2}", "(1,2)\\cup(3,\\infty)"),
    ("||x|-1|", "|1-|x||"),
    ("t = 3 hours 20 minutes", "200 minutes"),
    ("4^{2\\frac{1}{2}}", "32"),
    ("\\frac{1}{3} \\approx 0.33", "0.33"),
    ("x = \\frac{3+\\sqrt{17}}{4} \\approx 1.78", "\\frac{3+\\sqrt{17}}{4}"),
    ("p(x) = x^2 - 7x + 12", "x^2 - 7x + 12"),
    ("T_3(x) = 4x^3 - 3x", "4x^3 - 3x"),
    ("10{:}45", "10:45"),
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
    ("\\tbinom72", "21"),
    ("\\binom72", "21"),
    ("\\mathrm{AB}", "AB"),
    ("3∶5", "3:5"),
    ("7C2", "21"),
    ("7 choose 2", "21"),
    ("C^2_7", "21"),
    ("0.(6)", "\\frac{2}{3}"),
    ("0.(45)", "\\frac{5}{11}"),
    ("243 \\text{ base } 5", "243_5"),
    ("243\\text{ (base 5)}", "243_5"),
    ("243 base 5", "243_5"),
    ("\\text{all real numbers except } 1", "(-\\infty,1)\\cup(1,\\infty)"),
    ("\\mathbf{R}\\setminus\\{-1,1\\}", "(-\\infty,-1)\\cup(-1,1)\\cup(1,\\infty)"),
    ("\\text{all real numbers}", "(-\\infty,\\infty)"),
]

UNEQUAL = [
    ("x > 2, x < 5", "(-\\infty,\\infty)"),
    ("a < b", "x < y"),
    ("3 < 5", "2 < 7"),
    ("x < 2, y < 2", "(-\\infty,2)"),
    ("5 \\approx 7", "5"),  # no two answers for one
    ("1.0 \\approx 1.01 \\approx 1.02", "1.01"),
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
    ("12:30", "6:15"),
    ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\begin{pmatrix}1&3\\\\2&4\\end{pmatrix}"),
    ("\\begin{pmatrix}1&2\\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
    ("\\begin{pmatrix}1\\end{pmatrix}", "\\begin{pmatrix}1&0\\\\0&1\\end{pmatrix}"),
    ("x = 9", "8"),
    ("x = 9", "y = 9"),
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


def chains(table: str) -> list[tuple[str, str]]:
    """The pairs of `a ~ b ~ c @ d ~ e`: b and c with a, and e with d."""
    found = [[text.strip() for text in chain.split(" ~ ")] for chain in table.strip().replace("\n", " @ ").split(" @ ")]
    return [(text, first) for first, *others in found for text in others]


EQUAL += [(f"48{space}600", "48600") for space in "\u202f\xa0\u2009\u2006"]
EQUAL += [("x₁ = 7, x₂ = 2", "x_1 = 7, x_2 = 2"), ("$60 an hour", "60"), ("Area: 5", "5")]
EQUAL += [("0.3\u0305", "1/3"), ("0.3\u0307", "1/3")]
EQUAL += chains(r"""
\frac{\pi(\pi-1)}{2} ~ \binom{\pi}{2} @ (-\infty,3)\cup(3,\pi)\cup(\pi,\infty) ~ \mathbb{R}\setminus\{\pi,3\}
B ~ B \text{ (heat flows)} ~ B (heat flows outward) ~ B — heat flows outward ~ B, heat flows ~ B: x ~ B. H2O ~ (B) 24
75 ~ 75 sq m ~ 75 cm3 ~ 75 dollars per person ~ \text{75 dollars} ~ \text{She makes \$75} ~ 75 (eggs) ~ 75 $
75 ~ 75\text{ ft}^3/\text{min} ~ 75\text{ K} ~ \text{The answer is 75} @ 2*3 ~ {{4}\choose{2}} @ 1/e ~ \mathrm{e}^{-1}
18 ~ \boldsymbol{18} ~ {\bf 18} ~ \mathsf{18} ~ \color{blue}{18} ~ \textcolor{red}{18} ~ {\large 18}
18 ~ \displaystyle 18 ~ \texttt{18} ~ \color[rgb]{1,0,0}{18} ~ 18\phantom{0} ~ \mathbf{x=18}
18 ~ \boldsymbol{18\text{ cm}} ~ \hbox{18} ~ \boldsymbol{\$18} ~ \mathrm{18} ~ \underline{~18~} ~ \pmb{18}
18 ~ {\color{blue}18} ~ \textbf{18 cm} ~ {\Large\bf 18} ~ \bf 18 ~ \text{\textbf{18}} ~ \mathstrut 18
18 ~ \color{blue}\boldsymbol{18} @ 0.5 ~ \boldsymbol{\frac{1}{2}} ~ \displaystyle\frac{1}{2}
B ~ \mathbf{B} ~ \boldsymbol{B} ~ \textcolor{blue}{\text{B}} ~ \underline{\text{(B)}} ~ \color{red}{\text{(B)}}
B ~ \underline{\textbf{B}} @ (1,2) ~ \boldsymbol{(1,2)} ~ \bigl(1,2\bigr) ~ \color{red}{(1,2)} ~ \textbf{(1,2)}
no ~ \emph{no} ~ \textsf{no} ~ \boldsymbol{\text{no}} @ \frac12 ~ \color{red}{\frac{1}{2}} @ x+1 ~ \color{green}{x+1}
2x ~ 2\boldsymbol{x} @ \frac{\sqrt3}{2} ~ \mathbf{\frac{\sqrt{3}}{2}} @ east ~ \underline{\text{east}}
\pi ~ \boldsymbol{\pi} @ (3,4) ~ \left(\color{red}{3},4\right) @ 2,3 ~ \boldsymbol{2, 3} @ a+b ~ \mathbf{a}+\mathbf{b}
0.75 ~ \textcolor{blue}{\dfrac{3}{4}} @ C ~ \mathbf{(C)} @ 3 ~ \mathbf{x}=\mathbf{3} @ Tuesday ~ \textbf{Tuesday}
x^2 ~ \color{blue} x^2 @ 3\sqrt2 ~ \mathbf{3}\sqrt{\mathbf{2}}
48600 ~ 48\,600 ~ 48\ 600 ~ 48~600 ~ 48\;600 ~ 48\:600 ~ 48 600 ~ 48{,}600 ~ \$48\,600 ~ 48\,600\text{ cm} ~ 48,600
48600 ~ 48{\,}600 ~ 48\thinspace600 ~ 48\,600\,\text{m} ~ \text{48\,600} @ 10000 ~ 10\,000\text{ people} ~ 10\,000 = n
1234567.5 ~ 1\,234\,567.5 @ (3600,2) ~ (3\,600, 2) @ 3600 ~ x = 3\,600 @ 2000000 ~ 2 000 000
1000, 2000 ~ 1\,000, 2\,000 @ 1000/3 ~ \frac{1\,000}{3} @ 1/1024 ~ \frac{1}{1\,024} @ 3000\pi ~ 3\,000\pi
1250 ~ \$1\,250 @ 48600.5 ~ 48\,600.50 @ 12000 ~ x=12\,000 @ 6789, 12345 ~ 12\,345, 6\,789
\{1000,2000\} ~ \{1\,000, 2\,000\} @ 12000/7 ~ \frac{12\,000}{7} @ (1000,2000) ~ (1 000, 2 000) @ 25 ~ 2\,500\%
B ~ \text{B: heat flows outward} ~ \textbf{(B) }17 ~ B: 17 ~ (B) 18 ~ (B)\,17 ~ B．17 ~ \text{B) }17 ~ (B) \sqrt{2}
B ~ \boxed{\textbf{(B) }17} ~ \textbf{(B)} ~17 ~ B: 5 cm ~ **B.** 17 ~ \text{Option B: heat flows}
B ~ b) heat flows outward ~ (B). ~ \text{B) heat flows outward} ~ B: increases by 20% ~ B: The ball accelerates.
(B) ~ \text{B: heat flows outward} ~ B. heat flows outward ~ \textbf{(B)}\ 17 ~ B: 17 ~ (B) 18 ~ (B)\ 17 ~ B. 17
(B) ~ B、17 ~ \text{B) }17 ~ (B) \sqrt{2} ~ (B) -3 ~ \boxed{\textbf{(B) }17} ~ (B)\quad 17 ~ (B) (3, 4)
(B) ~ \text{B}: 17 ~ **B.** 17 ~ \text{Option B: heat flows} ~ Choice (B) 17
17 ~ \textbf{(B) }17 ~ \textbf{(B)}\ 17 ~ B) 17 ~ B: 17 ~ \mathrm{(B)}\ 17 ~ B. 17 ~ \textbf{(B)}\quad 17
18 ~ (B) 18 ~ \text{(C) }\$18 @ 5 ~ (C) 5 cm ~ C) x = 5 ~ A. $x=5$
D ~ D. None of the above ~ D: not enough information ~ \text{D}.\ 17 @ A ~ (A) -5 ~ A. 3 hours
heat flows outward ~ \text{B: heat flows outward} @ \text{heat flows outward} ~ \text{B: heat flows outward}
-3 ~ (B) -3 @ \textbf{(B) }17 ~ (B) 17 @ (B) heat flows ~ B. heat flows @ \text{B: heat flows} ~ (B) 17
\frac12 ~ \text{(B)}\ \frac{1}{2} @ no solution ~ E) no solution @ 3,5 ~ C. 3, 5 @ [0,1) ~ (D) [0, 1)
5\sqrt2 ~ \textbf{(A)}\ 5\sqrt{2} @ E ~ (E)~\text{none} @ -5 ~ A: -5 @ 1:2 ~ \textbf{(D)}\: 1:2
45 ~ p+q = 45 ~ p+q=31+14=45 ~ 45 = p+q ~ 31+14=45 ~ m+n = 45.
12 ~ a+b+c=12 ~ \triangle ABC = 12 ~ [ABC] = 12 ~ k+m = 12 ~ S_{\triangle ABC} = 12 ~ AB + CD = 12 ~ a \times b = 12
12 ~ a^2b = 12 ~ k = m+n = 12 @ 3 ~ m - n = 3 ~ |\overrightarrow{AB}| = 3
5 ~ \overline{AB}=5 ~ |AB| = 5 ~ f(f(2)) = 5 ~ R+r=5 @ 0.5 ~ P(A)=1/2 ~ \cos A = \frac{1}{2} ~ a+b=\frac{1}{2}
7 ~ a_1+a_2 = 7 ~ AB+BC = 7 ~ r+s = 7 ~ p + q + r = 7
2 ~ \tan\alpha = 2 ~ |\vec{a}| = 2 ~ \log_a b = 2 ~ \frac{AB}{CD} = 2 @ 25 ~ m^2+n^2 = 25 ~ AC^2+BC^2 = 25
293 ~ m+n = 293 @ \sqrt{5} ~ |z| = \sqrt5 @ n+m=293 ~ m+n=293 @ 507 ~ 100m+n = 507 @ 3+4i ~ a+bi = 3+4i
345 ~ 100a+10b+c=345 @ -3 ~ m - n = -3 @ n^2 ~ S_n = n^2 @ 0.7 ~ P(A \cup B) = 0.7 @ 10 ~ f(2) + f(3) = 10
60 ~ 60 USD ~ US$60 ~ ₹60 ~ \$60/hour ~ 60 mL ~ 60 J ~ 60 sq cm ~ 60 mph ~ 60 s ~ 60 square feet ~ 60^\circ\text{C}
60 ~ 60 V ~ 60 GBP ~ 60\mathrm{~L} ~ \$60 \text{ per hour} ~ 60 INR ~ 60厘米 ~ 60 L/min ~ 60 degrees Celsius
60 ~ 60 \text{ g/mol} ~ 60 US dollars ~ Rs.60 ~ 60¢ ~ 60 m³ ~ 60 sq ft ~ 60 secs ~ 60 units
60 ~ 60 \text{ square units} ~ 60\,\text{N}\cdot\text{m} ~ 60\ \mathrm{m}^{3}/\mathrm{s} ~ 60平方厘米 ~ 60名学生
60 ~ 60 \text{ Ω} ~ 60 km/hr ~ 60 apples ~ 60/day ~ 60\text{ miles per hour} ~ 60\degree ~ 60 \text{ liters/minute}
60 ~ 60\mathrm{~kg} @ 25 cm^2 ~ 25 sq cm ~ 25 square centimeters @ $60 ~ 60 USD ~ \$60/hour
25\pi ~ 25\pi\text{ cm}^2 ~ 25\pi cm^2 @ 5\sqrt2 ~ 5\sqrt{2} cm ~ 5\sqrt{2}\ \text{m}
0.5 ~ \frac{1}{2} cm ~ \frac{1}{2}\text{ m} @ 9.8 ~ 9.8 \text{ m/s}^2 @ 9.8 \text{ m/s}^2 ~ 9.8 m/s^2
60 kilometers per hour ~ 60 km/h @ 60 miles per hour ~ 60 mph @ 60 milliliters ~ 60 mL @ 60 degrees Celsius ~ 60°C
60 yuan ~ 60元 @ 60 meters per second ~ 60 m/s @ 60m ~ 60 m @ 5s ~ 5 s @ x ~ x \text{ m} @ 2x ~ 2x\text{ cm}
60 cm² ~ 60 cm^2 @ 3 meters ~ 3 m @ 3\text{ m} ~ 3 m @ 12.5 ~ 12.5 m
1200000 ~ 1.2 million ~ 1.2 \text{ million} ~ 1.2 million dollars ~ 1.2 Million @ 24 ~ 2 dozen ~ 2 dozen eggs
2 ~ 2 dozen
12000 ~ 1.2万 ~ 1.2万元 ~ 12 thousand miles @ 18000000 ~ 18\text{ million people} ~ $18 million
500000 ~ \frac{1}{2} \text{ million} ~ 5 hundred thousand @ 200000 ~ 2 hundred thousand ~ 20万元 @ 3000 ~ 3 thousand
2000000000 ~ 2 billion @ 500 ~ 5 hundred @ 300000000 ~ 3亿 @ 3 billion dollars ~ \$3 \text{ billion}
18,000,000 ~ 18 million @ 2.5 \times 10^{12} ~ 2.5 trillion @ 36 ~ 3 dozen eggs @ 1.2 million ~ 1,200 thousand
2000000000000 ~ 2 trillion dollars @ 2500000000 ~ \$2.5\text{ billion} @ 7800000000 ~ 7.8 billion people
150000000 ~ 1.5亿元 @ 4000000 ~ 4\text{ million dollars} @ 3000000.0 ~ 3 million @ 600 ~ 6 hundred
200 ~ 3 hours 20 minutes ~ 3\text{ hours }20\text{ minutes} ~ 3 \text{ hours and } 20 \text{ minutes}
200 ~ 3 hrs 20 mins @ 200 minutes ~ 3 hours 20 minutes ~ \text{3 hours 20 minutes}
5.5 ~ 5 dollars and 50 cents ~ 5 ft 6 in ~ $5 and 50 cents @ 90 ~ 1 hr 30 min ~ 1小时30分钟
1.5 hours ~ 1 hr 30 min ~ 90 minutes @ 1.5 ~ 1 h 30 min ~ 1 year and 6 months
150 ~ 2 \text{ h } 30 \text{ min} ~ 2h 30min ~ \text{2 hours and 30 minutes} @ 3\frac{1}{3} ~ 3 hours 20 minutes
\$5.50 ~ 5 dollars and 50 cents @ 66 ~ 5 ft 6 in @ 230 cm ~ 2 m 30 cm @ 3 hours 20 minutes ~ 3 hours, 20 minutes
27 months ~ 2 years 3 months @ 20 oz ~ 1 lb 4 oz @ 75 ~ 1 \text{ hour } 15 \text{ minutes}
3661 seconds ~ 1 hour 1 minute 1 second @ 2.25 ~ 2 hours and 15 minutes @ 3.25 ~ $3 and 25 cents
18 ~ 1 year 6 months @ 2 hours 30 minutes ~ 2 hr 30 min @ 3.25 kg ~ 3 kg 250 g @ 520 ~ 5 meters 20 centimeters
36 inches ~ 3 feet
18 ~ \text{She makes } \$18 ~ \text{The answer is } 18 ~ \text{She has } 18 \text{ apples}
18 ~ \text{Total cost is } \$18 ~ \text{Total: } 18 ~ \text{John has }18 ~ \text{The total is }18
18 ~ \text{Janet makes }\$18\text{ every day} ~ \text{Ans: } 18 ~ \text{Profit} = \$18 ~ \text{Answer} = 18
18 ~ \text{Maria paid } \$18 ~ \text{perimeter: }18 ~ \text{Their sum is }18
5 ~ \text{Area} = 5 ~ x \text{ is } 5 ~ \text{The area is } 5 \text{ cm}^2 ~ \text{They need } 5 \text{ buses}
5 ~ \text{It takes } 5 \text{ hours} ~ \text{We have } x = 5 ~ \text{So the answer is } x=5
5 ~ \text{length} = 5\text{ cm} ~ \text{Each gets } 5 ~ \mathrm{Area} = 5
0.5 ~ \text{The sum equals } \frac{1}{2} ~ \text{The slope is } \frac{1}{2}
3,5 ~ \text{The solutions are } 3 \text{ and } 5 @ 7 ~ n \text{ equals } 7 @ 12 ~ \text{Volume} = 12\text{ cm}^3
120 ~ \text{The number of ways is } 120 @ 1:2 ~ \text{The ratio is } 2:4 @ 3 ~ \text{He needs } 3 \text{ more}
1/6 ~ \text{The probability is } \frac{1}{6} @ 2x ~ y \text{ is } 2x @ 3.5 ~ \text{Mean} = 3.5
origin ~ \text{the origin} ~ \text{the } \text{origin} @ \text{ellipse} ~ \text{An ellipse} @ circle ~ a circle
\text{parabola} ~ The parabola @ a Tuesday ~ Tuesday @ the ellipse ~ an ellipse @ triangle ~ A triangle
x-axis ~ the x-axis @ \text{right triangle} ~ \text{a right triangle} @ moon ~ The Moon @ Monday ~ a Monday
ellipse ~ \text{an}\ \text{ellipse}
120 ~ \binom{10}{3} ~ \dbinom{10}{3} ~ \tbinom{10}{3} ~ {10 \choose 3} ~ C(10,3) ~ {}_{10}C_3 ~ C_{10}^{3}
120 ~ ^{10}C_3 ~ 10 \choose 3 ~ \displaystyle\binom{10}{3} ~ _{10}C_{3}
20 ~ \binom{5}{2}+\binom{5}{3} ~ C_6^3 = 20 ~ 5!/3!
1 ~ \binom{6}{0} ~ \frac{{5 \choose 2}}{10} ~ \binom{n}{0} ~ \binom{n}{n} @ 10 ~ C_5^2 ~ C_{5}^{2} ~ \mathrm{C}_5^2
n ~ \frac{n!}{(n-1)!} ~ \binom{n}{1} @ \frac{n(n+1)}{2} ~ \binom{n+1}{2} @ \binom{n}{n-k} ~ \binom{n}{k}
\frac{n!}{k!(n-k)!} ~ \binom{n}{k} @ 12 ~ 2\binom{4}{2} @ \frac{2}{5} ~ \frac{\binom{4}{2}}{\binom{6}{2}}
\frac{(2n)!}{(n!)^2} ~ \binom{2n}{n} @ 0 ~ \binom{3}{5} @ 2598960 ~ \binom{52}{5} @ 112 ~ \binom{8}{3}\cdot 2
\frac{(n+1)(n+2)}{2} ~ \binom{n+2}{2} @ 21 ~ \binom{7}{2} = 21 @ 36 ~ \binom{4}{2}^2 @ 0.1 ~ \frac{1}{\binom{5}{2}}
\frac{15}{128} ~ \binom{10}{3}\left(\frac12\right)^{10} @ 2^n-1 ~ 2^n - \binom{n}{0} @ 184756 ~ \binom{20}{10}
1/3 ~ 0.\dot{3} ~ 0.\bar{3} ~ 0.333... ~ 0.333\ldots ~ 0.333… ~ .\overline{3} ~ 0.\dot3 ~ 0.\overline 3
1/3 ~ 33.\overline{3}\% ~ 0.\overline{3}\text{ cm} ~ $0.\overline{3}$ ~ 0.\overset{.}{3}
1/3 ~ \overline{AB} = 0.\overline{3} @ 1/6 ~ 0.1\overline{6} ~ 0.1666... ~ 0.1\dot{6}
1/7 ~ 0.\dot{1}4285\dot{7} ~ 0.\overline{142857} @ 4/33 ~ 0.\dot{1}\dot{2} ~ 0.121212\ldots
4/3 ~ 1.\overline{3} ~ 1.\dot{3}
2/3 ~ x = 0.\overline{6} ~ 0.\dot{6} ~ 0.\overline{6}\text{ hours} ~ 0.666\ldots ~ 0.666\dots ~ 0.666...
2/3 ~ 66.\overline{6}\% ~ 2\times 0.\overline{3} @ \frac13 ~ 0.\overline{3} @ \frac{24}{11}\% ~ 2.\overline{18}\%
-1/3 ~ -0.\overline{3} @ 1 ~ 0.\overline{9} @ 5/18 ~ 0.2\dot{7} @ 10/3 ~ 3+0.\overline{3}
0.\overline{123} ~ 0.\dot{1}2\dot{3} @ 0.\overline{3} ~ 0.3\overline{3} @ 3/11 ~ 0.\overline{27}
7/12 ~ 0.58\overline{3} @ 50/3 ~ 16.\overline{6} @ 41/333 ~ 0.\overline{123} @ 1/9 ~ 0.\overline{1}
(\frac13,1) ~ (0.\overline{3}, 1) @ 1/22 ~ 0.0\overline{45} @ 22/7 ~ 3.\overline{142857}
1:2 ~ 2:4 ~ 1.5:3 ~ 100:200 ~ A:B = 2:4 ~ \frac{1}{2}:1 ~ \text{2:4}
3:4 ~ 3：4 ~ 3 to 4 ~ 3 \text{ to } 4 ~ 3 \text{ : } 4 ~ 3\,:\,4 @ 2:3 ~ 6:9 ~ (2:3) @ 4:6 ~ a:b = 2:3 ~ 2:3 ~ x:y=2:3
1:2:3 ~ 2 : 4 : 6 @ 1:\sqrt2 ~ \sqrt2 : 2 @ 2:1 ~ 4:2 @ 3:2 ~ \frac12:\frac13 @ 2:5 ~ 12:30 @ 6:8 ~ 3\colon 4
1:-2 ~ -1:2 @ 3:1:2 ~ 9:3:6 @ a:b ~ 2a:2b @ 2:2\sqrt3:4 ~ 1:\sqrt{3}:2 @ 1:3 ~ 0.5:1.5 @ 2:3:4 ~ 10:15:20
1:4 ~ S_1:S_2 = 1:4 @ \sqrt3:2\sqrt3:3 ~ 1:2:\sqrt{3} @ 2\pi:4 ~ \pi:2 @ 2:2 ~ 1:1
1010_2 ~ (1010)_2 ~ 1010_{(2)} ~ x=1010_2 ~ 1010_{\text{base }2} ~ 1010_{2} ~ \text{1010}_2 ~ 1010\,_2
(1010)_{2} ~ 1010_{2} ~ 1010_{(2)} @ 1010_{\text{two}} ~ 1010_2 @ 1010_{\mathrm{two}} ~ 1010_{\text{two}}
2013_5 ~ 2013_{\text{five}} @ 421_{8} ~ 421_{\text{eight}} @ 2012_{\text{three}} ~ 2012_{3}
2012_3 ~ (2012)_{\text{three}} @ 110_{10} ~ 110_{\text{ten}} @ 1010_{\text{base two}} ~ 1010_2
e^2 ~ \mathrm{e}^2 ~ exp(2) @ \pi ~ pi ~ \mathrm{pi} ~ \text{pi} ~ \mathrm{\pi}
\ln 2 ~ \operatorname{ln} 2 ~ \mathrm{ln}2 ~ ln(2) @ \sin x ~ \mathrm{sin}\,x ~ sin x
5 ~ \mathrm{x}=5 ~ 5\mathrm{cm} @ 3 ~ \mathrm{log}_2 8 ~ \text{x}=3 @ \cos x ~ \text{cos}\,x ~ cos(x)
\frac{2n}{n+1} ~ \frac{2\mathrm{n}}{\mathrm{n}+1} @ x+1 ~ \mathit{x}+1 @ 2\pi ~ 2pi @ 3+2i ~ 3+2\mathrm{i}
\arctan 2 ~ \operatorname{arctan} 2 @ C ~ \mathrm{C} @ 2n+1 ~ 2\text{n}+1 @ \sqrt{\pi} ~ sqrt(pi)
a+b ~ \mathrm{a}+\mathrm{b} @ 2e ~ 2\mathrm{e} @ \frac{\pi}{4} ~ \operatorname{arctan}(1) @ 5\pi ~ 5pi
2\pi r ~ 2*pi*r @ e/2 ~ \frac{\mathrm{e}}{2} @ m^2+m ~ \mathrm{m}^2+\mathrm{m} @ \frac{\pi}{6} ~ arcsin(1/2)
(-\infty,0)\cup(0,\infty) ~ \mathbb{R}\setminus\{0\} ~ x \neq 0 @ \mathbb{R} ~ \mathbb R ~ ℝ ~ x\in\mathbb{R}
\mathbb{Z} ~ \mathbb Z ~ n \in \mathbb{Z} @ (0,\infty) ~ \mathbb{R}^+ ~ \mathbb{R}_{+}
\mathbb{R}\setminus\{0\} ~ \{x \in \mathbb{R} : x \ne 0\} ~ \mathbb{R}-\{0\} ~ x \in (-\infty,0)\cup(0,\infty)
\mathbb{R}\setminus\{0\} ~ x \in \mathbb{R}, x \neq 0 ~ (-\infty,\infty)\setminus\{0\}
[2,\infty) ~ \{x : x \ge 2\} ~ \{x \in \mathbb{R} \mid x \geq 2\}
\mathbb{R}\setminus\{-1,1\} ~ x \ne 1, x \ne -1 ~ \mathbb{R} \setminus \{\pm 1\}
(-\infty,-1)\cup(-1,1)\cup(1,\infty) ~ \mathbb{R} \backslash \{-1, 1\} @ \mathbb{R}^{+} ~ \mathbb{R}^+
(3,\infty) ~ \{x \mid x > 3\} @ (-1,2) ~ \{x | -1 < x < 2\}
\mathbb{R}\setminus\{0,1\} ~ \mathbb{R} \setminus \{1, 0\} @ x\ne 0 ~ x \in \mathbb{R}\setminus\{0\}
x \neq 2 ~ \mathbb{R}\smallsetminus\{2\}
(-\infty,\frac12)\cup(\frac12,\infty) ~ \mathbb{R}\setminus\left\{\frac{1}{2}\right\}
\{x\mid x\neq 0\} ~ (-\infty,0)\cup(0,\infty) @ (-\infty,2)\cup(2,\infty) ~ \mathbb{R} \setminus \{2\}
\mathbb{R}\backslash\{1\} ~ (-\infty, 1) \cup (1, \infty) @ [-1,3) ~ \left\{x \mid -1 \le x < 3\right\}
\mathbb{R}\setminus\{-2,2\} ~ x \ne \pm 2 @ (-1,0)\cup(0,1) ~ (-1,1)\setminus\{0\}
(-\infty,0)\cup(1,\infty) ~ \{x: x<0 \text{ or } x>1\} @ (-1,1) ~ [-1,1]\setminus\{-1,1\}
-5 ~ −5 ~ –5 ~ ﹣5 ~ －5 ~ ‐5 ~ ‑5 ~ ‒5 @ 18 ~ １８ ~ ＄18 @ (1,2) ~ （１，２） @ 12 ~ 3×4 ~ 3⋅4 @ 3:4 ~ 3：4
5 ~ ｘ＝5 @ 2.5 ~ ２．５ @ 3/4 ~ 3÷4 @ [0,1) ~ ［0，1） @ 2, 3 ~ 2、3 @ 60 ~ 60º @ 50% ~ 50％
""")

UNEQUAL += chains(r"""
n ~ \binom{x}{i} ~ \binom{i}{n} @ 1 ~ \sqrt2! ~ i! ~ \binom{\sqrt2}{n}
\mathbb{R} ~ \mathbb{R}\setminus\{i\} ~ \mathbb{R}\setminus\{a\}
A ~ A. 5 B. 6 ~ A - sin x ~ A - bc ~ A (or B) ~ A, unless B ~ A — B ~ a) 5 b) 6 ~ either A or B @ B ~ B' ~ B_1 ~ B17
75 ~ 75 to 80 ~ 75~80 ~ 75 and 80 ~ 75 st ~ 75 if x > 2 ~ 75 \text{ if } x>2 ~ 75\text{ and up} ~ \text{multiple of } 75
75 ~ 75 \text{ mod } 100 ~ 75\text{ hundred} ~ \text{The answer is } -75 ~ 75 \text{ out of 100}
18 ~ \underline{1}8x ~ \overline{18}+1 ~ \color{red} 1 8 ~ \cancel{18} ~ \sout{18} ~ \textcolor{18}{5} ~ \mathbb{18}
18 ~ \text{18} 5 @ x ~ \tilde{x} ~ \overline{x} ~ \hat{x} @ 5 ~ \underline{5}\,18 ~ \color{red}{5}+1
blue ~ \color{blue}{18} @ 18red ~ \color{red}{18} @ 81 ~ \boldsymbol{18} @ y ~ \bm{x} @ x+1 ~ \color{red}{x}
B ~ \mathbf{A} @ a ~ \colorbox{a}{b} @ 3+4i ~ \overline{3+4i} @ z ~ \overline{z} @ red ~ \color{red}{18}
12345 ~ 12 \quad 345 ~ 12;345 @ 100200 ~ 100, 200 ~ x 100 200 @ 4860 ~ 48\,60 @ 486000 ~ 48\,6000
4800600 ~ 4800\,600 @ 10 ~ 1 0 @ 4243 ~ 42 43 @ 314159 ~ 3 141 59 @ 15000 ~ 1.5 000 @ 0.5123 ~ 0.5 123
2100/200 ~ 2 100/200 @ 486 ~ 48\,6 @ 345 ~ 3 4 5 @ (1,0) ~ (1\,000) @ 10005 ~ 1 000, 5 @ 600 ~ 48\,600 @ 2021 ~ 20 21
0.500 ~ 0\,500
A ~ A = 5 ~ A man ~ (A or B) ~ A, B ~ (A) or (B) ~ (A) 5 (B) 6 ~ A: 5, B: 7 ~ A:B = 1:2 ~ (A) and (B) ~ (A)(B)
A ~ A) 5, B) 6 ~ A. or B. ~ (A) or B ~ A^2 ~ (A) + 5 ~ A. D. ~ AB: 5 ~ (A) - 3 ~ A - 3 ~ (a)(b+1) ~ A/B ~ (A) = 5
A ~ (A, 5) ~ A \cup B ~ (A) and B ~ A: (B) ~ A: yes; B: no ~ A = B ~ (A) is wrong ~ (A), (B) ~ A and B ~ AB ~ A-B
A ~ A+5 ~ (A) 5 or (B) 6 ~ A vs B ~ AC ~ Both A and B ~ (A) > (B) ~ A > B
B ~ B cm ~ A or B ~ not B ~ B1 ~ B: C ~ not (B) @ C ~ C 5 ~ (B) 17 ~ C 17 ~ A, C ~ B) @ I ~ I. e. ~ I think B
7 ~ B: 17 ~ (B) 17 @ 5 ~ A. 5 B. 6 ~ A. 5 or B. 6 @ N ~ None ~ I. Newton @ 18 ~ (B) 17 @ (C) 17 ~ (B) 17
(B) 18 ~ (B) 17 @ C. 17 ~ B. 17 @ K ~ K: 17 @ F ~ F(x) 3 @ 1.7 ~ B. 17 @ B. 5 ~ A. 5 @ (B) 17 ~ (C) 17
17 ~ B: 17 or 18 @ 5a ~ a @ G^2 ~ G: (x-1)^2 @ D: 6 m ~ D: 5 m @ A: 6 ~ A: 5 @ E ~ E = mc^2 @ 5 F x ~ F. 5
9 ~ 3n = 9 ~ 3x = 9 ~ x + y = 9 ~ x + 2y = 9 ~ 2n+1 = 9 @ 31 ~ m+n=45 ~ p+q=31+14=45
5 ~ |x| = 5 ~ a+x = 5 ~ z^2 = 5 ~ x+p=5 ~ |x-1| = 5 ~ |x+y| = 5 ~ 5 = 2n ~ \frac{1}{n} = 5 ~ m+n = 5, m-n = 1
5 ~ -n = 5 @ 4 ~ n^2 = 4 ~ n+1 = 4 ~ a+b=3 @ 24 ~ xyz = 24 ~ k! = 24 @ 3 ~ m/2 = 3 ~ \sqrt{n} = 3 ~ \log_2 n = 3
45 ~ p+q < 45 ~ p+q \ne 45 ~ p+q>45 @ 2 ~ \frac{x}{y} = 2 ~ y/x = 2 ~ n-3 = 2 @ 12 ~ x+y+z=12 ~ n(n+1) = 12 ~ xy=12
120 ~ n! = 120 @ 46 ~ p+q = 45 @ m+n=45 ~ p+q=45 @ \frac12 ~ \sin x = \frac12 @ 10 ~ 2a = 10 @ x = 9 ~ y = 9
0 ~ x-y=0 @ 16 ~ n^2 = 16 @ 20 ~ 4a = 20 @ a-b ~ a+b = 5 @ 1/2 ~ \cos x = 1/2 @ m=12 ~ m+n=12 @ CD=5 ~ AB=5
6 ~ 2x+3y=6 @ b=5 ~ a=5 @ -5 ~ n = 5
60 ~ 60 x ~ 60x ~ 60m ~ 60 y ~ 60 L x ~ 60 or more ~ 60 \text{ or more} ~ 60 \text{ at most} ~ 60以上 ~ 60/h
60 ~ \frac{60}{s} ~ 60 b ~ 60 p ~ 60z ~ 60 xy ~ 60 pi ~ 60 sqrt(2) ~ 60 m n ~ 60 dollars or 5 euros ~ 60 more than x
60 ~ 60 ln 2 ~ 60 m + 5 ~ 60 g(x) ~ 60/60 ~ 60 times 2 ~ 60 d ~ 60 r ~ 60/m ~ 60/s
2 ~ 2\pi ~ 2 m n ~ 2 \text{ and a half} ~ 2 \text{ thirds} ~ 2 t ~ 2 e ~ 2 i @ 3 ~ 3i ~ 3 s t ~ 3 ab ~ 3 N + 1
5 ~ 5e ~ 5n ~ 5 k ~ 5 a ~ 5 \text{ squared} ~ 5 A ~ 5 log 2 @ 60 cm ~ 60 m ~ 60 cm^2
60 km/h ~ 60 m/s ~ 60 km ~ 60 mph @ 61 ~ 60 USD ~ 60 m ~ 60 less @ 60 km ~ 60 m ~ 60 miles
60 dollars ~ 60 euros ~ 60 percent ~ 60 yuan @ 60 mL ~ 60 L @ 60 EUR ~ 60 USD @ 60 cm^3 ~ 60 cm^2 @ 60°F ~ 60°C
60 J ~ 60 N @ 60 yuan ~ $60 @ 60 lb ~ 60 kg @ 60 W ~ 60 L @ 60 ft^2 ~ 60 ft @ 60 cents ~ 60 dollars @ 60 g ~ 60 kg
60 minutes ~ 60 hours @ 60 s ~ 60 m @ 60 N ~ 60 L @ 5 m^2 ~ 5 m @ 60 m/s^2 ~ 60 m/s @ 60 m/s ~ 60 km/h @ 60% ~ 60°
60 inches ~ 60 feet @ 6 J ~ 6 L @ 60 days ~ 60 hours @ 60 m^3 ~ 60 m^2 @ 7 mm ~ 7 cm @ 60 V ~ 60 W
18 ~ 18 million ~ 18 \text{ million} ~ 18 \text{ thousand} ~ 18 M @ 1.2 ~ 1.2 million ~ 1.2万
3 ~ 3 thousand ~ 3 hundred @ 5000 ~ 5k ~ 5 million @ 18000000 ~ 18 millionaires ~ 18m @ 2 million ~ 2 billion
120000 ~ 1.2 million @ 18 thousand ~ 18 million @ 12 ~ 2 dozen @ 5000000 ~ 5M @ 1000000 ~ million @ 30000 ~ 3亿
$18 ~ $18 million @ 3 thousand ~ 3 hundred @ 12 ~ 12万 @ 2000000 ~ 2 billion @ 1 ~ 1 million @ $5 ~ $5 million
12 ~ 6 dozen @ 18,000 ~ 18 million @ 3.5 ~ 3.5亿
3 ~ 3 hours 20 minutes ~ 3 hours 20 dollars @ 5 ~ 5 dollars and 50 cents ~ 5 km 3 kg ~ 5 apples and 3 pears
2 ~ 2 m 30 cm ~ 2 hours 15 minutes ~ 2 minutes 15 hours @ 200 ~ 3 hours or 20 minutes ~ 3 apples and 20 minutes
8 ~ 6 feet 2 inches ~ 5 apples and 3 pears @ 20 ~ 3 hours 20 minutes @ 320 ~ 3 hours 20 minutes @ 5.6 ~ 5 ft 6 in
20 minutes ~ 3 hours 20 minutes @ 2 minutes ~ 2 hours @ 0.5 ~ 30 minutes @ 2.15 ~ 2 hours 15 minutes
135 hours ~ 2 hours 15 minutes @ 6.2 ~ 6 feet 2 inches @ 3.25 g ~ 3 kg 250 g @ 5.5 ~ 5 hours or 30 minutes
60 ~ 1 hour
18 ~ \text{more than } 18 ~ > 18 ~ \text{at least } 18 ~ \text{not } 18 ~ \text{She makes more than } 18
18 ~ \text{twice } 18 ~ \text{negative } 18 ~ \text{The answer is at least } 18 ~ 18 \text{ or } 20
18 ~ \text{The square root is of } 18 ~ \text{over } 18 ~ about 18 ~ \geq 18 ~ \text{All but } 18 ~ 18\text{ plus}
18 ~ \text{nearly } 18 ~ \text{greater than } 18 ~ \text{at most }18 ~ \text{no more than }18
18 ~ \text{She does not make } \$18 ~ \text{three times } 18 ~ \text{one third of } 18 ~ \text{It is more than } 18
18 ~ 18 \text{ or so} ~ 18 \text{ not } 20 ~ \text{18 to 20} ~ 18 \pm 2 ~ \sim 18 ~ \text{minus } 18
18 ~ \text{It could be } 18 ~ \text{may be } 18 ~ \text{The reciprocal is of } 18 ~ \text{wrong: } 18
18 ~ 18\text{ thousand} ~ 18 \text{ below zero} ~ 18 \text{ factorial} ~ 18\text{ minus } 2
18 ~ 18\text{ percent of } 50 ~ 18 \text{ over } 5 ~ \text{none of } 18
5 ~ x \text{ is not } 5 ~ x \text{ or } 5 ~ \text{if } x = 5 ~ \text{at least } 5 ~ \text{if } n \text{ is } 5
20 ~ 18 \text{ to } 20
an ellipse ~ a circle @ a ~ the @ the a ~ a @ the ~ A @ other ~ another @ ory ~ theory @ t ~ ant
circle ~ not a circle @ an ~ a @ a an ~ A @ then end ~ the end @ thens ~ Athens @ ode ~ anode @ ta ~ theta
b ~ (a, b)
1 ~ C(x,3) ~ \binom{10^{40}}{10^{39}} ~ C_1 @ 10 ~ (5,2) ~ A(5,2) ~ C_2^5 @ 720 ~ \binom{10}{3}
\frac{10}{3} ~ \binom{10}{3} @ (10,3) ~ \binom{10}{3} @ \binom{n}{k+1} ~ \binom{n}{k} @ 3 ~ {10 \choose 3}
n^2 ~ \binom{n}{2} @ \binom{k}{n} ~ \binom{n}{k} @ 120x ~ x^{10}C_3 @ 5/2 ~ \binom{5}{2} @ 25 ~ \binom{5}{2}
20 ~ \binom{5}{2} @ (5,2) ~ C(5,2) @ 2^n ~ \binom{2n}{n} @ \frac{n(n-1)}{2} ~ \binom{n+1}{2} @ (n+1)! ~ n!
n-1 ~ \frac{n!}{(n-1)!}
0.3 ~ 0.\overline{3} ~ 0.3... @ 0.12 ~ 0.\overline{12} ~ 0.12...
1/3 ~ 0.33 ~ 0.333 ~ 0.\overline{3}5 ~ 0\overline{3} ~ \overline{3} @ 0.6 ~ 0.1\overline{6} @ 3/10 ~ 0.\overline{3}
0.\overline{12} ~ 0.1\overline{2} @ \pi ~ 3.14... @ \sqrt2 ~ 1.414... @ AB5 ~ \overline{AB}
0.\overline{33}4 ~ 0.\overline{3} @ 0.33 ~ 0.\overline{3} @ 0.\overline{21} ~ 0.\overline{12}
0.1\dot{2} ~ 0.\dot{1}\dot{2} @ 0.1212 ~ 0.1212... @ e ~ 2.718... @ 0.667 ~ 0.666... @ 0.67 ~ 0.\overline{6}
0 ~ 0.\overline{} @ 1.3 ~ 1.\overline{3}
1:2 ~ 1:2:3 ~ 0:0 ~ 12:30 ~ 1-2 @ 5 ~ 2:30 ~ 2:3 @ 2 ~ 2:4 ~ 2:3 = x:y @ 4:3 ~ 3:4 @ 14:60 ~ 7:30 @ 2:4:5 ~ 1:2:3
34 ~ 3:4 @ 18:00 ~ 9:00 @ 3:2 ~ 2:3 @ 1:5 ~ 10:30 @ 4:9 ~ 2:3 @ b:a ~ a:b @ 24:00 ~ 12:00
x ~ x_2 ~ (x)_2 @ 1010_3 ~ 1010_2 @ 10 ~ 1010_2 @ 1010_2 ~ 10 @ 1010 ~ 1010_2
1010_{\text{three}} ~ 1010_{\text{two}} @ (1010)_3 ~ (1010)_2 @ 12_5 ~ 7 @ 1011_2 ~ 1010_2
1010_8 ~ 1010_{\text{two}} @ 20 ~ 1010_2 @ 7 ~ 12_{(5)} @ 12_6 ~ (12)_5 @ 1B_{16} ~ 1A_{16} @ 26 ~ 1A_{16}
\pi ~ pie ~ spin ~ spi @ 2 ~ 2pi ~ log 2 ~ tan @ m ~ \mathrm{n} @ x ~ \mathrm{e} @ 1 ~ \mathrm{i} @ n-1 ~ \mathrm{n}+1
p ~ pi @ 2p ~ 2pi @ no ~ \text{n} @ BA5 ~ \mathrm{AB} @ 3.14 ~ pi @ cm+1 ~ \mathrm{cm} @ n ~ \mathrm{m} @ 3.14159 ~ pi
2.718 ~ \mathrm{e} @ i ~ pi @ s ~ \mathrm{sin} @ E5 ~ e
\mathbb{R} ~ \mathbb{R}^+ ~ \mathbb{R}\setminus\{0\} ~ \mathbb{R}^2 ~ \mathbb{R}\setminus(0,1) ~ x \in \mathbb{Z}
\mathbb{R} ~ x \in \mathbb{R}, x \ne 0 @ \mathbb{R}\setminus\{1\} ~ \mathbb{R}\setminus\{0\} ~ x\ne 1, x\ne 2
(0,\infty) ~ \{x \in \mathbb{Z} : x > 0\} ~ \{x \mid x > y\} ~ \mathbb{R}\setminus\{0\}
\{0\} ~ \mathbb{R}\setminus\{0\} ~ \{x\mid x\ne 0\}
\mathbb{R}\setminus\{0\} ~ \mathbb{R}\setminus\{0,1\} ~ x \ne 0, y \ne 0 @ \mathbb{N} ~ \mathbb{Z} @ 0 ~ x\ne 0
(-\infty,0)\cup(0,1) ~ \mathbb{R}\setminus\{0\} @ Z5 ~ \mathbb{Z} @ \mathbb{Z} ~ \mathbb{Q}
\mathbb{R}\setminus\{1,3\} ~ \mathbb{R}\setminus\{1,2\} @ [0,1] ~ [0,1]\setminus\{0\} @ [0,\infty) ~ \mathbb{R}^+
\mathbb{R}^+ ~ \mathbb{R}^- @ x \neq 2 ~ x\neq 1
""")

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
    ("\\[x^2 = 16\\] which gives \\[ x = \\pm 4. \\]", "x = \\pm 4"),
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
    ("The answer is approximately 3.5 hours.", "3.5 hours"),
    ("Thus x equals -7.", "-7"),
    ("**Answer: B**", "B"),
    ("Answer: (C) 24", "(C) 24"),
    ("The answer should be $[2, 5)$, as shown.", "[2, 5)"),
    ("We have 10 - 3 = 7.", "7"),
    ("A train leaves at 3 and arrives at 9.", "9"),
    ("\\boxed{\\text{no solution}}", "\\text{no solution}"),
    ("The answer is 50%.", "50%"),
]

# How models end their answers: whether the response is paid for this gold answer.
PAID = [
    ("<answer>5 floors x 8 offices x 200 = $8,000/month.</answer>", "8000"),
    ("<answer>48 slices shared evenly: 12 slices for each of the 4.</answer>", "12"),
    ("The reciprocal would give $1/e$. The limit is $e$.", "e"),
    ("Therefore $f(x)=3+2x$ for all real $x$. $\\blacksquare$", "f(x)=2x+3"),
    ("The number is $72$; indeed $72-27=45$.", "72"),
    ("Therefore the probability is $\\frac{34}{100}$ (34%).", "\\frac{17}{50}"),
    ("So n = 0.41 mol, which matches option B (0.41 mol).", "B"),
    ("#### Step 1\nAdd.\n#### Step 2\nShe has 42 stamps.", "42"),
    ("#### 1. Understand\n5 cats\n\n#### 2. Solve\nSo there are 20 legs.", "20"),
    ("### Answer\n\n18", "18"),
    ("## Final answer:\n**18**", "18"),
    ("**Final Answer**\n18 dollars", "18"),
    ("#### Conclusion\nThe total is $18.", "18"),
    ("#### 18\n\n#### Explanation\n3 x 6 = 18, as 2 x 9.", "18"),
    ("#### The answer is 18", "18"),
    ("#### 18 dollars", "18"),
    ("#### $18.00", "18"),
    ("#### 18 (3 x 6)", "18"),
    ("#### 18 eggs, 5 more than yesterday", "18"),
    ("#### about 18", "18"),
    ("She has 42!", "42"),
    ("We get 42 eggs! Great.", "42"),
    ("The answer is $6!$.", "720"),
    ("So it is 12√3.", "12\\sqrt{3}"),
    ("The answer is 2^5.", "32"),
    ("The result is 3×10^8.", "300000000"),
    ("The point is (3, 4).", "(3,4)"),
    ("The ratio is 3:4.", "3:4"),
    ("The fraction is 3/4.", "3/4"),
    ("The slope is −3/4.", "-3/4"),
    ("The temperature is −6 degrees.", "-6"),
    ("The volume is 27 m^3.", "27"),
    ("The volume is 27 m³.", "27"),
    ("The speed is 9.8 m/s^2.", "9.8"),
    ("so f(2) = 7", "7"),
    ("Therefore x = 3, y = 4.", "(3,4)"),
    ("Thus a_2 = 9.", "9"),
    ("The polynomial is x^2 + 3.", "x^2+3"),
    ("The set is {1, 2, 3}.", "\\{1,2,3\\}"),
    ("So he pays 20% of it, i.e. 18.", "18"),
    ("It is 5 thousand.", "5000"),
    ("x = 5 or x = 18", "5, 18"),
    ("The roots are 5 and 18.", "5, 18"),
    ("【答案】B", "B"),
    ("【答案】 B", "B"),
    ("【答案】\nB", "B"),
    ("答案：B", "B"),
    ("答案是B。", "B"),
    ("正确答案是 B", "B"),
    ("因此选B。", "B"),
    ("故选：B。", "B"),
    ("故选:B", "B"),
    ("故选 B．", "B"),
    ("所以答案为18。", "18"),
    ("答案：18元", "18"),
    ("答案为$18$。", "18"),
    ("所以一共有18个苹果。", "18"),
    ("因此，总共需要 18 天。", "18"),
    ("故答案为：18．", "18"),
    ("故答案为：$2\\sqrt{3}$．", "2\\sqrt{3}"),
    ("【答案】-6", "-6"),
    ("故选：ABD．", "ABD"),
    ("A正确，B错误，C错误。故选A", "A"),
    ("选项A正确。", "A"),
    ("解得x=5。", "5"),
    ("面积为25平方厘米。", "25"),
    ("面积为25cm²。", "25"),
    ("面积为9π。", "9\\pi"),
    ("所以这个数是18，不是20。", "18"),
    ("本题选择B。", "B"),
    ("综上所述，正确选项为C。", "C"),
    ("综上，选C．", "C"),
    ("答案是：\n\\[\n7\n\\]", "7"),
    ("The final answer is\n\\[ \\frac{1}{2} \\]", "1/2"),
    ("The answer is:\n$$x = 7.$$", "7"),
    ("Therefore,\n$$\nx = 7\n$$", "7"),
    ("The answer is:\n18", "18"),
    ("The answer is:\n\n**18**", "18"),
    ("The answer is\n$$\\begin{pmatrix}1\\\\2\\end{pmatrix}$$", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
    ("Answer:\n\n(B)", "B"),
    ("Put it in \\boxed{}: the answer is 7", "7"),
    ("As asked, in \\boxed{ }: 7", "7"),
    ("\\boxed{7} and not \\boxed{}", "7"),
    ("I use \\boxed as the mark. \\boxed{7}", "7"),
    ("\\boxed{...}\n#### 18", "18"),
    ("\\boxed{}\n#### 18", "18"),
    ("\\boxed{x}\n#### 18", "18"),
    ("\\boxed{\\text{see below}}\n#### 18", "18"),
    ("\\boxed{18}\n#### Check\n3*6=18, 2*9", "18"),
    ("$x=\\boxed{3}$ or $x=\\boxed{5}$", "3, 5"),
    ("\\boxed{17}\n\nThe answer is in the box above.", "17"),
    ("So, x = 5.", "5"),
    ("Thus x=5", "5"),
    ("Hence y = 2x - 2.", "y=2x-2"),
    ("So n is 5.", "5"),
    ("We get n = 5 apples.", "5"),
    ("So it is on Friday.", "\\text{Friday}"),
    ("Therefore the winner is Evelyn.", "Evelyn"),
    ("The answer is 3 rather than 5.", "3"),
    ("It's not 5 but 3.", "3"),
    ("So we need 3 buses because 2 hold only 40.", "3"),
    ("<answer>She pays 18 dollars</answer>", "18"),
    ("<answer>$18</answer>", "18"),
    ("<answer>\n18\n</answer>", "18"),
    ("<answer>6 * 3 = 18</answer>", "18"),
    ('{"answer": 18}', "18"),
    ('{"answer": "18"}', "18"),
    ('{"reasoning": "3*6", "answer": "B"}', "B"),
    ("The answer is 18 dollars a day.", "18"),
    ("The answer is **18** dollars", "18"),
    ("The answer is $18 per hour.", "18"),
    ("Janet makes 18 dollars every day at the market.", "18"),
    ("Janet sells 9 eggs for $18.", "18"),
    ("He runs 18 miles in 3 hours.", "18"),
    ("There are 18 apples in the 3 boxes.", "18"),
    ("In 5 hours she earns 18 dollars.", "18"),
    ("It costs $18 for 3 of them.", "18"),
    ("There are 18 eggs left after 3 days.", "18"),
    ("The total is 10 + 8 = 18.", "18"),
    ("10 + 8 = 18 eggs", "18"),
    ("The total cost = 3 * 6 = $18", "18"),
    ("Answer: B) 18", "B"),
    ("Answer: B) 18", "18"),
    ("The correct option is (B) 18.", "18"),
    ("(B)", "B"),
    ("B. 18", "B"),
    ("I'd go with C.", "C"),
    ("I choose (C) here.", "C"),
    ("Option C is correct.", "C"),
    ("Answer: not A, so B", "B"),
    ("It cannot be A or C, leaving B.", "B"),
    ("We can exclude A, C and D, so B.", "B"),
    ("A is wrong, B is right.", "B"),
    ("Answer: eliminate A, B; C remains", "C"),
    ("A man has 5 dogs and so 20 legs.", "20"),
    ("I have 5 dogs.", "5"),
    ("So the answer is 18. Let me know if you have 2 more questions!", "18"),
    ("The answer is 18. This answer is correct.", "18"),
    ("The number of eggs is 18.", "18"),
    ("**18**", "18"),
    ("`18`", "18"),
    ("= 18", "18"),
    ("Total: 18", "18"),
    ("- Total: 18", "18"),
    ("Total = $18", "18"),
    ("=> 18", "18"),
    ("-> 18", "18"),
    ("∴ x = 18", "18"),
    ("18.", "18"),
    ("$18$", "18"),
    ("\\(18\\)", "18"),
    ("The answer is 60 CNY.", "60"),
    ("The answer is €60.", "60"),
    ("The answer is 60€.", "60"),
    ("The answer is 60 kg.", "60"),
    ("The answer is 60 km/h.", "60"),
    ("60 miles per hour", "60"),
    ("It moves at 60 miles per hour.", "60"),
    ("60 L of water", "60"),
    ("It is $\\boxed 5$. We used 7 sheets.", "5"),
    ("So 45 is the largest 2-digit number.", "45"),
    ("It is 18 (after 3 days).", "18"),
    ("He is sad :( but has 18.", "18"),
    ("The profit is Rs. 8,000/-.", "8000"),
    ("每盒3．5元．", "3.5"),
    ("I think the best of them is A", "A"),
    ("Ann scored 10 more points than Bob who got 90 so Ann got 10+90 = 100 on the test", "100"),
    ("She can't buy 3, so 2.", "2"),
    ("\\boxed{18}\n\nAnswer: C", "18"),
    ("\\boxed{18}\n\nAnswer: C", "C"),
    ("\\boxed{\\ldots}\n#### 18", "18"),
    ("\\boxed{∅}", "\\emptyset"),
    ("Friday", "Friday"),
    ("$\\sin x \\cos x$", "\\sin x \\cos x"),
    ("正确的有A、B、D。", "ABD"),
    ("答案是A、B、D", "ABD"),
    ("【答案】A,B,D", "ABD"),
    ("答：36", "36"),
    ("The answer is:\n\n- 11", "11"),
    ("The answer is:\n\n> 11", "11"),
    ("So there are 12 choose 3 ways.", "220"),
    ("5 and a half", "5.5"),
    (
        "Therefore, Eliza's total earnings for the week are $460, consisting of $400 regular pay and $60 overtime.",
        "460",
    ),
    ("So the result is 18.\n\nVerification: 18 + 5 = 23, which matches.", "18"),
    ("So the result is 18.\n\nThis matches the condition that 18 + 5 = 23.", "18"),
    ("**答案**：C", "C"),
    ("答：12天。", "12"),
    ("5+7=12（个）", "12"),
    ("$5+7=12$（元）", "12"),
    ("36÷3=12（个）", "12"),
    ("\\boxed{2}，\\boxed{3}", "2,3"),
    ("负6", "-6"),
    ("18 people, of which 5 are children, came.", "18"),
    ("He pays $18, down from $20.", "18"),
    ("The profit is $18 more than the $20 cost.", "18"),
    ("正确答案：B、C", "BC"),
    ("所以最小值为3，此时x=1", "3"),
    ("当x=1时，取得最小值3", "3"),
    ("所以最小值为3，当且仅当a=b=1时等号成立。", "3"),
    ("**Final Answer:** There are 42 fruits: 12 apples and 30 pears.", "42"),
    ("There are 42 fruits with 12 apples and 30 pears.", "42"),
    ("So the farmer has 42 fruits, 30 of which are pears.", "42"),
    ("He gets $42 for 6 hours at $7 per hour.", "42"),
    ("He gets $42: 6 hours at $7.", "42"),
    ("He gets $42 from 6 hours at $7.", "42"),
    ("The total amount Sam spent is $120, of which $40 was on shoes.", "120"),
    ("The bill comes to $60 with a $10 tip.", "60"),
    ("The bill comes to $60, including a $10 tip.", "60"),
    ("There are 3 bags with 8 marbles each.", "3"),
    ("He can buy 4 tickets with $30.", "4"),
    ("He has $2 left from the $30.", "2"),
    ("答:10个", "10"),
    ("共需10（元）", "10"),
    ("所以结果是负5。", "-5"),
    ("She saved 25% of her 80 dollars.", "25"),
    ("So x = 2 or -3.", "2,-3"),
    ("8×3=24（千米）", "24"),
    ("最小值为24，当x=2时取到", "24"),
    ("当x=2时，y有最小值24", "24"),
    ("当 $x=2$ 时，$y$ 取得最大值 $24$．", "24"),
    ("【解析】由题意知，A项错误，B项正确，C项错误，D项错误。", "B"),
    ("A、C", "AC"),
    ("A,C", "AC"),
    ("A and C", "AC"),
    ("\\boxed{\\text{C (Paris)}}", "C"),
    ("\\boxed{\\text{C - Paris}}", "C"),
    ("\\boxed{F = ma}\n\n答案：C", "C"),
    ("\\boxed{F = ma}\n\n故选：C", "C"),
    ("\\boxed{F = ma}\n\n【答案】C", "C"),
    ("The answer is 6, wait, no, 7.", "7"),
    ("The answer is 6. Wait, actually, it is 7.", "7"),
    ("She makes 9 * 2 = $<<9*2=18>>18 every day at the farmer’s market.", "18"),
    ("There are 12 integers between 3 and 16.", "12"),
    ("He needs 12 boxes: 11 full ones and 1 partial one.", "12"),
    ("#### 18<|endoftext|>", "18"),
    ("The answer is 18<|eot_id|>", "18"),
    ("#### <<9*2=18>>18", "18"),
    ("\\boxed{=18}", "18"),
    ("He has 18 on day 5.", "18"),
    ("There were 18 people, including 5 children.", "18"),
    ("So the farmer has 42 fruits. Indeed, 42 - 12 = 30.", "42"),
    ("So the farmer has 42 fruits. This makes sense, since 42 - 12 = 30.", "42"),
    ("So the farmer has 42 fruits. Of these, 12 are apples.", "42"),
    ("There are 2 primes between 10 and 14.", "2"),
    ("The final answer is \\boxed{9}, using \\boxed{your answer}.", "9"),
    ("I hope \\boxed{\\text{answer}} is fine: the answer is 9.", "9"),
    ("The answer is 75 CAD.", "75"),
    ("The answer is A$75.", "75"),
    ("The answer is 75 CHF.", "75"),
    ("\\boxed{\\square} The answer is 18.", "18"),
    ('\\boxed{"18"}', "18"),
]

UNPAID = [
    ("The reciprocal would give $1/e$. The limit is $e$.", "1/e"),
    ("The number is $72$; indeed $72-27=45$.", "45"),
    ("丽丽有18支笔。题目没有说明多多少支,请补充条件。", "18"),
    ("It is 3 dozen.", "12"),
    ("#### 1. Understand\n5 cats\n\n#### 2. Solve\nSo there are 20 legs.", "2"),
    ("#### Solution 2\nUnknown.", "2"),
    ("#### at least 18", "18"),
    ("#### 18 or more", "18"),
    ("#### 18-20", "18"),
    ("#### 18 or 20", "18"),
    ("#### 18 and 20", "20"),
    ("#### less than 18", "18"),
    ("#### 3 hours 20 minutes", "3"),
    ("#### 3 hours 20 minutes", "20"),
    ("#### 3 hours and 20 minutes", "20"),
    ("#### 6 feet 2 inches", "2"),
    ("#### 2.5k", "2.5"),
    ("#### 7:30", "30"),
    ("#### 7:30", "7"),
    ("#### 5!", "120"),
    ("The answer is 6!", "720"),
    ("The answer is 6!, that is 720", "6"),
    ("The area is 16π square units.", "16"),
    ("The volume is 12√3.", "3"),
    ("The volume is 12√3.", "12"),
    ("So the time is 3x.", "3"),
    ("The side is √2.", "2"),
    ("The answer is 2^5.", "5"),
    ("The result is 3×10^8.", "8"),
    ("The point is (3, 4).", "4"),
    ("Thus the interval is [2, 5).", "5"),
    ("The ratio is 3:4.", "4"),
    ("It ends at 10:45 am.", "45"),
    ("It ends at 10:45 am.", "10"),
    ("The fraction is 3/4.", "4"),
    ("The slope is -3/4.", "3/4"),
    ("The temperature is −6 degrees.", "6"),
    ("The change is –6.", "6"),
    ("The change is -$6.", "6"),
    ("The volume is 27 m^3.", "3"),
    ("The speed is 9.8 m/s^2.", "2"),
    ("so f(2) = 7", "2"),
    ("Therefore x = 3, y = 4.", "4"),
    ("Thus a_2 = 9.", "2"),
    ("The polynomial is x^2 + 3.", "3"),
    ("The matrix is [[1, 2], [3, 4]].", "4"),
    ("The set is {1, 2, 3}.", "3"),
    ("The log is log_2 8.", "8"),
    ("The date is May 5, 2021.", "2021"),
    ("It is 1.2 million.", "1.2"),
    ("It is 5 thousand.", "5"),
    ("The population is 2 billion people.", "2"),
    ("more than 18", "18"),
    ("It takes over 18 hours.", "18"),
    ("She needs at least 18 eggs.", "18"),
    ("18+", "18"),
    ("between 5 and 18", "18"),
    ("The answer is between 5 and 18.", "5"),
    ("Up to 18 people.", "18"),
    ("The cost is no more than 18.", "18"),
    ("It's 18 or fewer.", "18"),
    ("The answer is greater than 18.", "18"),
    ("It is not 18.", "18"),
    ("The answer is A or B.", "A"),
    ("The answer is either (A) or (C).", "C"),
    ("Answer: B/C", "B"),
    ("Answer: A and C", "A"),
    ("The answer could be 5 or 18.", "5"),
    ("Either 5 or 18", "5"),
    ("The answer is 5, 6, or 7.", "7"),
    ("The answer is 5 apples or 18 apples.", "5"),
    ("The answer is (B) or (C), I am not sure.", "B"),
    ("x = 5 or x = 18", "18"),
    ("The roots are 5 and 18.", "18"),
    ("The answer is both A and B", "B"),
    ("【答案】−6", "6"),
    ("【答案】A或B", "A"),
    ("故选：ABD．", "A"),
    ("答案是5或18", "18"),
    ("超过18", "18"),
    ("至少18个", "18"),
    ("【答案】至少18", "18"),
    ("所以 x=5 或 x=3。", "5"),
    ("共3小时20分钟", "20"),
    ("共1.2万元", "1.2"),
    ("所以这个数是18，不是20。", "20"),
    ("$x=\\boxed{3}$ and $y=\\boxed{5}$", "5"),
    ("$x=\\boxed{3}$ or $x=\\boxed{5}$", "5"),
    ("The answer is 3 instead of 5", "5"),
    ("It is 3, not 5.", "5"),
    ("So we need 3 buses because 2 hold only 40.", "40"),
    ("<answer>The ratio is 3:4</answer>", "4"),
    ("<answer>more than 18</answer>", "18"),
    ("<answer>5 or 18</answer>", "18"),
    ("<answer>3 hours 20 minutes</answer>", "20"),
    ("The box is 3 x 4.", "4"),
    ("It is 6尺2寸.", "2"),
    ("It takes 3 to 7 days.", "7"),
    ("So there are 12 choose 3 ways.", "3"),
    ("It equals 12 squared.", "12"),
    ("It equals the square root of 12.", "12"),
    ("5 and a half", "5"),
    ("It takes 5 and a half hours.", "5"),
    ("The ratio is 6 to 10.", "10"),
    ("<think>x</think>\nShe earns $18 per day by selling 9 eggs at $2 each.", "2"),
    ("Therefore, Eliza's total earnings for the week are $460, consisting of $400 regular pay and $60 overtime.", "60"),
    ("So the result is 18.\n\nVerification: 18 + 5 = 23, which matches.", "23"),
    ("故C项正确，A、B、D三项错误。", "D"),
    ("$\\boxed{2}$ as well as $\\boxed{3}$", "3"),
    ("\\boxed{2} \\\\ \\boxed{3}", "3"),
    ("\\boxed{2}、\\boxed{3}", "3"),
    ("答案是负6", "6"),
    ("He pays $18, down from $20.", "20"),
    ("【答案】3的倍数", "3"),
    ("所以最小值为3，此时x=1", "1"),
    ("当x=1时，取得最小值3", "1"),
    ("所以最小值为3，当且仅当a=b=1时等号成立。", "1"),
    ("It is 10 minutes to 5.", "5"),
    ("The final score was 5 to 10.", "10"),
    ("The odds are 3 to 10.", "10"),
    ("It holds 5 to the power of 7.", "5"),
    ("5 raised to 7", "7"),
    ("So the farmer has 42 fruits, 12 more than yesterday.", "12"),
    ("He gets $42 for 6 hours at $7 per hour.", "7"),
    ("He gets $42 by working 6 hours at $7 per hour.", "7"),
    ("He gets $42 if he works 6 hours at $7 per hour.", "7"),
    ("In total, he spends $49: $42 on books and $7 on pens.", "7"),
    ("The bill comes to $60 with a $10 tip.", "10"),
    ("There are 3 bags with 8 marbles each.", "8"),
    ("He can buy 4 tickets with $30.", "30"),
    ("He has $2 left from the $30.", "30"),
    ("He spends $28 of the $30.", "30"),
    ("所以结果是负5。", "5"),
    ("She saved 25% of her 80 dollars.", "80"),
    ("So x = 2 or -3.", "2"),
    ("至少有24个", "24"),
    ("最小值为24，当x=2时取到", "2"),
    ("【解析】由题意知，A项错误，B项正确，C项错误，D项错误。", "D"),
    ("至少需要36个", "36"),
    ("36多个", "36"),
    ("#### minimum 20", "20"),
    ("#### 20 at most", "20"),
    ("#### 20 at least", "20"),
    ("A, possibly B", "A"),
    ("Answer: A or possibly D", "A"),
    ("It's 6 (or 7 if you count him).", "6"),
    ("If x is even, 6; otherwise 7.", "7"),
    ("6 if x is even, 7 if x is odd", "7"),
    ("The answer is 6 if we exclude him and 7 if we include him.", "6"),
    ("The answer is 6, wait, no, 7.", "6"),
    ("The answer is 6. Wait, actually, it is 7.", "6"),
    ("Tom has 2 apples and Ann has 4 apples.", "4"),
    ("Tom gets 2, Ann gets 4.", "4"),
    ("The mean is 2 and the median is 4.", "4"),
    ("The answer is 5 less than 23.", "5"),
    ("He needs 12 boxes: 11 full ones and 1 partial one.", "1"),
    ("He has 18 on day 5.", "5"),
    ("There were 18 people, including 5 children.", "5"),
    ("It is 5 more than 7.", "5"),
    ("9 is a third of 27.", "27"),
    ("So 9 is the square root of 81.", "81"),
    ("答：每天至少要看10页。", "10"),
    ("Answer: anything but B", "B"),
    ("#### 20 percent of 50", "20"),
    ("It is no longer 7.", "7"),
    ("Their combined age is 19, with Ben being 12 and Al 7.", "7"),
    ("Add 12 to 60 to get 72.", "60"),
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


@pytest.mark.parametrize(("text", "gold"), PAID)
def test_an_answer_is_found_however_the_response_ends(text, gold):
    assert math_equal(extract_answer(text), gold)


@pytest.mark.parametrize(("text", "gold"), UNPAID)
def test_a_number_or_letter_that_is_not_the_answer_is_not_paid(text, gold):
    assert not math_equal(extract_answer(text), gold)


@pytest.mark.parametrize(
    ("answer", "is_number"),
    [
        ("18", True), ("-$18.50", True), ("x = 18", True), ("5 \\cdot 3 = 15", True), ("18 \\text{ cm}^2", True),
        ("2\\frac{1}{2}", True), ("2 1/2 hours", True), ("3/4", True), ("-3^\\circ", True), ("50\\%", True),
        ("1.2 million", True), ("$60/hour", True), ("60 L", True), ("3 hours 20 minutes", True), ("(B) 18", True),
        ("47 + 85", False), ("36/2", False), ("\\frac{36}{2}", False), ("2^5", False), ("6!", False),
        ("\\sqrt{16}", False), ("\\binom{6}{3}", False), ("-(3 - 4)", False), ("x = 7 - 2", False),
        ("2 \\cdot 3 cm", False), ("47 + 85, 47 + 85", False), ("\\{36/2, 36/2\\}", False), ("47 + 85 dozen", False),
        ("13 * 10", False), ("3 \\cdot 50", False), ("47 + 85 hours 0 minutes", False), ("18, 18", True),
        ("6 dozen", True), ("5 dollars and 50 cents", True), ("132 \\approx 47 + 85", False),
        ("47 + 85 \\approx 130", False), ("x \\approx 5", True), ("33.33 \\approx 33.3", True),
    ],
)  # fmt: skip
def test_a_number_is_worked_out_and_a_sum_is_not(answer, is_number):
    assert is_worked_out(answer) is is_number


def test_the_last_boxes_joined_by_words_are_one_list_and_a_cut_off_box_is_ignored():
    assert extract_answer(r"\boxed{9}. So \boxed{1} and \boxed{2}") == "1, 2"
    assert extract_answer(r"\boxed{\{1\}} then \boxed{2") == r"\{1\}"


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
    "many signs in brackets": ("-" * 28 + "(") * 29 + "5" + ")" * 29,
    "towers in brackets": ("2^" * 28 + "(") * 15 + "1" + ")" * 15,
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


def test_cases_of_the_field_without_a_false_positive_and_95_percent_agreement():
    cases = [case for case in shared_lines("field/answers.jsonl") if "gold" in case["input"]]
    wrong = []
    for case in cases:
        given = case["input"]
        if given["call"] == "rewards.accuracy":
            got = accuracy(Problem("", given["gold"], given["task"]), given["text"])
        else:
            got = math_equal(given["answer"] if "answer" in given else extract_answer(given["text"]), given["gold"])
        wrong += [case] if got != case["expected"] else []
    assert [case["input"] for case in wrong if not case["expected"]] == []
    assert len(cases) > 90 and len(wrong) <= 0.05 * len(cases), wrong


def test_most_answers_are_found_without_their_marker():
    """The last sentence of people's solutions: GSM8K's without the line of ####, MATH's without the box."""
    gsm8k = [problem["answer"].rpartition("####") for problem in shared_lines("data/gsm8k_test.jsonl")]
    found = [math_equal(extract_answer(re.sub("<<.*?>>", "", solution)), gold) for solution, _, gold in gsm8k]
    assert sum(found) >= 0.98 * len(found)
    math500 = shared_lines("data/math500_test.jsonl")
    unboxed = [re.sub(r"\\(?:boxed|fbox) ?", "", problem["solution"]) for problem in math500]
    found = [math_equal(extract_answer(text), math500[i]["answer"]) for i, text in enumerate(unboxed)]
    assert sum(found) >= 0.8 * len(found)


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

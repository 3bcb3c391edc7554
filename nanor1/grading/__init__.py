"""Find the answer in a response, and compare it with the gold one by its mathematics."""

from nanor1.grading.compare import is_worked_out, math_equal
from nanor1.grading.find import extract_answer

__all__ = ["extract_answer", "is_worked_out", "math_equal"]

"""Programs of a model run against tests, confined."""

from nanor1.sandbox.jobs import Tests, Verdict, isolation, run_many, run_tests

__all__ = ["Tests", "Verdict", "isolation", "run_many", "run_tests"]

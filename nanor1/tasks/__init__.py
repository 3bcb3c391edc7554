"""Problems, which of them are held out, how they are asked, and the tests of programs."""

from nanor1.tasks.countdown import check_countdown
from nanor1.tasks.problems import Problem, Task, make_task

__all__ = ["Problem", "Task", "check_countdown", "make_task"]

"""The rooms of the house and the direction of imports: read from the sources, so that nothing has to run."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A room, or a file of the ground floor, imports from its own room or an earlier line, and nothing comes back to itself.
# A new file of the ground floor takes its place here.
ORDER = [
    ["run", "tokenizer", "weights", "packing", "next_token", "logprobs", "optim", "grading", "sandbox"],
    ["kernels", "tasks", "gradient"],
    ["attention", "rewards", "grpo"],
    ["model"],
    ["slots", "miniature"],
    ["sampler", "options"],
    ["judge", "training"],
    ["stages"],
    ["search"],
    ["chat", "evaluation"],
]
LEVEL = {place: level for level, places in enumerate(ORDER) for place in places}
METHOD = {"model", "attention", "kernels", "packing", "logprobs", "sampler", "slots", "next_token", "judge", "grpo"}
METHOD |= {"optim", "training"}
TORCH_FREE = ("rewards", "tasks", "grading", "sandbox", "run.config")
RUN_TIME_PACKAGES = {"torch", "tiktoken", "numpy", "safetensors"}
INSTALLED_BY_THEM = {"sympy", "mpmath", "jinja2", "regex", "triton"}

SCRIPTS = {path.stem: ast.parse(path.read_text()) for path in ROOT.glob("*.py")}
MODULES = {
    ".".join(path.relative_to(ROOT / "nanor1").with_suffix("").parts).removesuffix(".__init__"): ast.parse(
        path.read_text()
    )
    for path in (ROOT / "nanor1").rglob("*.py")
    if path != ROOT / "nanor1" / "__init__.py"
}


def imported(tree):
    """The dotted names of all modules that a file imports, at its top or inside its functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            known = [name for name in names if name.removeprefix("nanor1.") in MODULES]
            yield from known if len(known) == len(names) else [node.module]


def own(tree):
    """The modules of nanor1 that a file imports."""
    return {name.removeprefix("nanor1.") for name in imported(tree) if name.startswith("nanor1.")}


def reached(module):
    """The modules of nanor1 that come with a module, itself included, and what their rooms hand on."""
    found, left = set(), {module}
    while left:
        found |= left
        rooms = {name.split(".")[0] for name in left if "." in name}
        left = ({other for name in left for other in own(MODULES[name])} | rooms) - found
    return found


def calls(tree):
    return [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def place(module):
    return module.split(".")[0]


def test_the_sources_are_found():
    assert {"grpo", "model", "tasks.problems", "run.config"} <= MODULES.keys() and "train_zero" in SCRIPTS
    assert {"logprobs", "packing"} <= own(MODULES["grpo"]) and "tasks.problems" in reached("judge")


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_from_its_own_room_or_an_earlier_place(module):
    assert place(module) in LEVEL, f"{module} is new: give it a place in ORDER"
    others = {other for other in own(MODULES[module]) if place(other) != place(module)}
    assert [other for other in sorted(others) if LEVEL[place(other)] >= LEVEL[place(module)]] == []


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_module_comes_back_to_itself(module):
    def ahead(name, seen):
        for other in own(MODULES[name]) - seen:
            seen.add(other)
            ahead(other, seen)
        return seen

    assert module not in ahead(module, set())


def test_the_method_is_read_without_search_evaluation_and_stages():
    assert METHOD <= MODULES.keys()
    for module in METHOD:
        assert not {place(other) for other in reached(module)} & {"search", "evaluation", "stages"}, module


def test_a_room_hands_on_its_public_names_and_nothing_else():
    for room in {place(module) for module in MODULES if "." in module}:
        nodes = MODULES[room].body
        assert all(isinstance(node, (ast.Expr, ast.ImportFrom, ast.Assign)) for node in nodes), room
        names = {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
        listed = [ast.literal_eval(node.value) for node in nodes if isinstance(node, ast.Assign)]
        assert names == {name for names in listed for name in names}


def test_names_that_others_rely_on_are_where_they_were():
    program = """if True:
        from nanor1.grading import extract_answer, math_equal
        from nanor1.grpo import group_advantages, policy_loss
        from nanor1.model import Transformer
        from nanor1.rewards import accuracy, format, language
        from nanor1.sampler import generate
        from nanor1.sandbox import Verdict, run_tests
        from nanor1.tasks import Problem, check_countdown, make_task
        from nanor1.tokenizer import Tokenizer
        """
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_nothing_imports_a_script():
    for name, tree in (MODULES | SCRIPTS).items():
        assert not {top.split(".")[0] for top in imported(tree)} & SCRIPTS.keys(), name


def test_the_loss_knows_neither_sampler_nor_tasks():
    assert not {place(other) for other in reached("grpo")} & {"sampler", "tasks", "rewards", "tokenizer"}


def test_judging_and_configuration_do_without_torch():
    modules = [name for name in MODULES if name in TORCH_FREE or place(name) in TORCH_FREE]
    assert len(modules) >= 15
    for module in modules:
        found = {name for name in reached(module) for other in imported(MODULES[name]) if other.startswith("torch")}
        assert not found, module


def test_judging_and_configuration_load_no_torch_when_they_run():
    modules = ", ".join(f"nanor1.{name}" for name in TORCH_FREE)
    program = f"import sys, {modules}; print('torch' in sys.modules, 'nanor1.rewards' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "True"]


@pytest.mark.parametrize("name", sorted(SCRIPTS))
@pytest.mark.parametrize(
    "given, expected", [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")]
)
def test_a_script_says_how_threads_wait_before_torch_reads_it(name, given, expected):
    program = """if True:
        import os, runpy, sys
        def hear(event, arguments):
            if event == "import" and arguments[0] == "torch":
                print(os.environ.get("GOMP_SPINCOUNT"), flush=True)
                os._exit(0)
        sys.addaudithook(hear)
        runpy.run_path(sys.argv[1])
        """
    kept = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-c", program, f"{name}.py"]
    result = subprocess.run(command, cwd=ROOT, env=kept | given, capture_output=True, text=True, check=True)
    assert result.stdout.split() == [expected]


@pytest.mark.parametrize("name", sorted(MODULES | SCRIPTS))
def test_only_the_run_time_packages_and_what_they_install_are_imported(name):
    packages = {other.split(".")[0] for other in imported((MODULES | SCRIPTS)[name])}
    assert packages - sys.stdlib_module_names - {"nanor1"} <= RUN_TIME_PACKAGES | INSTALLED_BY_THEM


@pytest.mark.parametrize("name", sorted(MODULES | SCRIPTS))
def test_nothing_is_pickled_and_no_text_is_run_as_code(name):
    tree = (MODULES | SCRIPTS)[name]
    packages = {other.split(".")[0] for other in imported(tree)}
    assert not packages & {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    assert not set(calls(tree)) & {"torch.load", "torch.save", "eval", "exec", "compile", "__import__"}

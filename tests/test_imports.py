"""The direction of imports, and what no module may do: read from the sources, so that nothing has to run."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A module imports from its own group or an earlier one, never in a circle. A new module takes its place here.
GROUPS = [
    {"config", "runlog", "tokenizer", "numeric", "latex", "answers", "grading", "jail", "confine", "sandbox"}
    | {"machine", "openmp"},
    {"rewards", "tasks", "prompts", "coding", "attention", "kernels", "packing", "pretrained", "draw"},
    {"model", "logprobs"},
    {"slots", "sampler", "grpo", "sft", "distillation", "preference", "optim", "parallel"} | {"checkpoint"},
    {"search", "token_beams", "budget", "voting", "evaluate", "ledger", "traces", "measure", "methods", "plot", "chat"}
    | {"miniature", "training", "paired", "options", "judge", "exam", "teacher", "sources"},
]
GROUP_OF = {module: i for i, group in enumerate(GROUPS) for module in group}
TORCH_FREE = {"rewards", "tasks", "prompts", "answers", "grading", "sandbox", "coding", "config"}
RUN_TIME_PACKAGES = {"torch", "tiktoken", "numpy", "safetensors"}
INSTALLED_BY_THEM = {"sympy", "mpmath", "jinja2", "regex", "triton"}

SCRIPTS = {path.stem: ast.parse(path.read_text()) for path in ROOT.glob("*.py")}
MODULES = {path.stem: ast.parse(path.read_text()) for path in (ROOT / "nanor1").glob("*.py") if path.stem != "__init__"}


def imported(tree):
    """The dotted names of all modules that a file imports, at its top or inside its functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            is_package = node.module == "nanor1"
            yield from ([f"nanor1.{alias.name}" for alias in node.names] if is_package else [node.module])


def own(tree):
    """The modules of nanor1 that a file imports."""
    return {name.split(".")[1] for name in imported(tree) if name.startswith("nanor1.")}


def reached(module):
    """The modules of nanor1 that come with a module, itself included."""
    found, left = set(), {module}
    while left:
        found |= left
        left = {other for name in left for other in own(MODULES[name])} - found
    return found


def calls(tree):
    return [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_the_sources_are_found():
    assert {"grpo", "model", "tasks"} <= MODULES.keys() and "train_zero" in SCRIPTS
    assert {"logprobs", "packing", "parallel"} == own(MODULES["grpo"]) and "tasks" in reached("evaluate")


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_from_its_own_group_or_an_earlier_one(module):
    assert module in GROUP_OF, f"{module}.py is new: give it a place in GROUPS"
    assert [other for other in sorted(own(MODULES[module])) if GROUP_OF[other] > GROUP_OF[module]] == []


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_module_comes_back_to_itself(module):
    assert all(module not in reached(other) for other in own(MODULES[module]))


def test_nothing_imports_a_script():
    for name, tree in (MODULES | SCRIPTS).items():
        assert not {top.split(".")[0] for top in imported(tree)} & SCRIPTS.keys(), name


def test_the_loss_knows_neither_sampler_nor_tasks():
    assert not reached("grpo") & {"sampler", "tasks", "rewards", "tokenizer"}


@pytest.mark.parametrize("module", sorted(TORCH_FREE & MODULES.keys()))
def test_judging_and_configuration_do_without_torch(module):
    assert not {name for name in reached(module) for other in imported(MODULES[name]) if other.startswith("torch")}


def test_judging_and_configuration_load_no_torch_when_they_run():
    modules = ", ".join(f"nanor1.{name}" for name in sorted(TORCH_FREE & MODULES.keys()))
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

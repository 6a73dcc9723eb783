"""The shape of the code: imports without a circle, files and functions that can be read in one sitting, a short README."""
import ast
import graphlib
import subprocess

import pytest
from conftest import ROOT

CODE = {str(path.relative_to(ROOT)): path.read_text() for pattern in ("*.py", "eval/*.py", "data/**/*.py", "records/**/*.py")
        for path in sorted(ROOT.glob(pattern))}
LONG_ON_PURPOSE = {"train.py": {"main"}}  # set-up, loop and end in the order in which they happen


def imported(source: str) -> set[str]:
    """The files of this repository that a source imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    paths = {name.replace(".", "/") + ".py" for name in names} | {f"data/{name}.py" for name in names}
    return paths & CODE.keys()


def test_the_import_graph_has_no_circle():
    graph = {name: imported(source) for name, source in CODE.items()}
    assert graph["train.py"] >= {"model.py", "evaluator.py"} and graph["serve.py"] >= {"sample.py"}  # the graph is read at all
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize("name", CODE)
def test_files_and_functions_are_short(name):
    assert CODE[name].count("\n") <= 450
    functions = [node for node in ast.walk(ast.parse(CODE[name])) if isinstance(node, ast.FunctionDef)]
    long = {f.name for f in functions if f.end_lineno - f.lineno + 1 > 60}
    assert long <= LONG_ON_PURPOSE.get(name, set())


def test_no_script_changes_the_import_path():
    assert not [name for name, source in CODE.items() if "sys.path" in source]


def test_train_and_readme_are_short():
    assert CODE["train.py"].count("\n") <= 250
    assert len((ROOT / "README.md").read_bytes()) <= 12 * 1024


def test_only_the_voice_is_large():
    """Wheels of 45 MB were once committed by mistake."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git clone")
    sizes = {name: (ROOT / name).lstat().st_size for name in listed.stdout.split("\0") if name and (ROOT / name).exists()}
    assert not {name for name, size in sizes.items() if size > 1e6 and not name.startswith("voices/")}
    assert sum(size for name, size in sizes.items() if name.startswith("voices/")) <= 16e6

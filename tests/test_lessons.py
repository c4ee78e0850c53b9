"""The course: notebooks equal their source, every check accepts its solution and refuses its kill list, and the cells
of every stub notebook run in this process, with training cut to a few steps. What a full run gives is for
`python lessons/build.py --run`."""

import importlib.util
import re
import sys
import textwrap
import types
import warnings
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch

from lessons import checks

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("lessons_build", ROOT / "lessons" / "build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)
LESSONS = list(build.sources())


@pytest.mark.parametrize("number", LESSONS)
def test_notebooks_are_what_the_source_makes(number):
    nbformat = pytest.importorskip("nbformat")
    cells = build.read(build.sources()[number].read_text(encoding="utf-8"))
    for path, form in zip(build.places(number), (build.stub, build.solved)):
        made, found = build.notebook(number, cells, form), build.load(path)
        assert build.without_outputs(found) == build.without_outputs(made), f"run python lessons/build.py {number}"
        nbformat.validate(found)
        assert path.stat().st_size < 400_000, f"{path.name} is too large: fewer or smaller pictures"
    stubs, solved = map(build.load, build.places(number))
    assert not any(cell.get("outputs") for cell in stubs["cells"])
    code = [cell for cell in solved["cells"] if cell["cell_type"] == "code"]
    assert any(cell["outputs"] for cell in code), f"run python lessons/build.py {number} --run"
    assert not any(out["output_type"] == "error" for cell in code for out in cell["outputs"])


@pytest.mark.parametrize("number", LESSONS)
def test_checks_accept_the_solution_and_refuse_the_kill_list(number):
    exercises = build.exercises(number)
    assert 4 <= len(exercises) <= 6
    for exercise in exercises:
        assert 3 <= len(exercise.kills) <= 10, f"{exercise.name}: {len(exercise.kills)} wrong solutions"
    torch.manual_seed(0)
    rows, faults = build.verify(number)
    assert not faults, "\n".join(faults)


def scripts():
    """Functions and classes of the modules that lessons import: a lesson must leave them as they were."""
    modules = [module for name, module in sys.modules.items() if name == "kernels" or name.startswith("nano_")]
    return {(module.__name__, name): thing for module in modules for name, thing in vars(module).items() if callable(thing)}


@pytest.mark.parametrize("number", LESSONS)
def test_stubs_run_through(number, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("NANO_LESSON_FEW", "1")
    monkeypatch.chdir(tmp_path)  # what a script writes goes there
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    monkeypatch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))
    matplotlib.use("Agg")
    before, threads, names = scripts(), torch.get_num_threads(), {"__name__": "__main__"}
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Agg is non-interactive": plt.show() draws nothing here
        for cell in build.load(build.places(number)[0])["cells"]:
            if cell["cell_type"] == "code":
                checks.run_cell("".join(cell["source"]), f"<lesson {number}, {cell['id']}>", names)
    plt.close("all")
    torch.set_num_threads(threads)
    changed = [key for key, thing in before.items() if vars(sys.modules[key[0]]).get(key[1]) is not thing]
    assert not changed, f"the lesson left changed: {changed}"
    said = capsys.readouterr().out
    for exercise in build.exercises(number):
        assert re.search(rf"^{exercise.name}: (not written yet|skipped)", said, re.M), f"{exercise.name} was not called"


# --- the framework itself ---------------------------------------------------------------------------------------------


def example():
    """The lesson and the checks in build.py's docstring."""
    blocks = re.findall(r"(?:^    .*\n|^\n)+", build.__doc__, re.M)
    lesson, check = (textwrap.dedent(block) for block in blocks if "check_rest" in block)
    return lesson, check


def test_the_example_of_the_docstring_works():
    lesson, check = example()
    exercise = checks.run_cell(check, "<example>", {})["check_rest"]
    source, names = build.solution("99", "rest", lesson.replace("lesson_99 as check, ", ""))
    assert "NotImplementedError" in build.stub(lesson) and "SOLUTION" not in build.solved(lesson)
    assert checks.examine(exercise.check, checks.run_cell(source, "<solution>", dict(names))["rest"]) == ("right", "right")
    verdicts = {why: checks.examine(exercise.check, wrong)[0] for why, wrong in checks.mutants(exercise, source, names)}
    assert list(verdicts) == ["only the sum", "the smallest", "all that are largest"]
    assert set(verdicts.values()) == {"wrong"}


def test_a_check_says_what_it_saw_and_does_not_raise(capsys):
    exercise = checks.run_cell(example()[1], "<example>", {})["check_rest"]

    def unwritten(x):
        raise NotImplementedError("about 1 line, 2 minutes")

    for function in (unwritten, torch.sum, torch.Tensor.numel, lambda x: x[:0], lambda x: 1 / 0):
        exercise(function)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "rest: not written yet"
    assert lines[1] == "rest: not yet. rest([5.0]): at [] 5, wanted 0"
    assert "not yet" in lines[2] and "shape (0,), wanted ()" in lines[3] and "ZeroDivisionError" in lines[4]


def test_nan_and_infinity_are_not_close():
    for ours, truth in ((float("nan"), 0.0), (float("nan"), float("nan")), (float("inf"), 1.0), (1.001, 1.0)):
        with pytest.raises(checks.Wrong):
            checks.close(torch.tensor([0.0, ours]), torch.tensor([0.0, truth]), "x")
    checks.close(torch.tensor([-float("inf"), 1.0]), [-float("inf"), 1.0], "x")


def test_an_edit_that_does_not_fit_is_an_error():
    exercise = checks.exercise(("typo", "no such text", ""))(lambda function: None)
    with pytest.raises(AssertionError, match="occurs 0 times"):
        list(checks.mutants(exercise, "x = 1\n", {}))


def test_put_gives_the_script_its_function_back(capsys):
    module = types.SimpleNamespace(f=abs)

    def unwritten():
        raise NotImplementedError("about 3 lines, 5 minutes")

    with checks.put(module, "f", unwritten):
        module.f()
    assert module.f is abs and "not written yet" in capsys.readouterr().out
    with pytest.raises(ZeroDivisionError):
        with checks.put(module, "f", len):
            assert module.f is len
            1 / 0
    assert module.f is abs


def test_steps_are_cut_only_in_the_tests(monkeypatch):
    monkeypatch.delenv("NANO_LESSON_FEW", raising=False)
    assert checks.steps(500) == 500
    monkeypatch.setenv("NANO_LESSON_FEW", "1")
    assert checks.steps(500) == 2 and checks.steps(500, few=8) == 8 and checks.steps(1) == 1

"""build: make the notebooks of the course from lessons/src, run the solved ones, try every wrong solution.

    python lessons/build.py                 all lessons: write notebooks, verify checks, print the table
    python lessons/build.py 60 61           only these
    python lessons/build.py 60 --run        also execute the solved notebook in full, and keep its outputs

One source, `src/NN_topic.py`, makes `NN_topic.ipynb` (stubs, no outputs) and `solutions/NN_topic.ipynb` (solved). The
table: minutes of the solved notebook when it was last run, exercises, wrong solutions refused, words, lines of code.

How to write a lesson. The source is in percent cells; the first code cell has at most five lines:

    # %% [markdown]
    # # 99 An example
    # How much is left of a sum when the largest number is taken away?

    # %%
    import sys
    sys.path[:0] = ["..", "../.."]  # the repository, seen from lessons/ and from lessons/solutions/
    import torch
    from lessons.checks import lesson_99 as check, steps
    torch.manual_seed(0)

    # %% [markdown]
    # **Exercise.** `rest(x)`, x (N,) -> the sum of x without its largest entry, once. `rest([3, 1, 3])` is 4.
    # *Hint:* the largest entry may occur twice.

    # %%
    def rest(x):
        # SOLUTION (about 1 line, 2 minutes)
        return x.sum() - x.max()
        # END
    check.check_rest(rest)

    # %%
    for _ in range(steps(1000)):  # 1000 for a reader, 2 in the tests
        x = torch.rand(8)
    print(f"left: {x.sum() - x.max():.2f} of {x.sum():.2f}")

Its checks, `checks/lesson_99.py`. A check must not share code with the solution, and looks at three shapes or more:

    from lessons.checks import close, exercise
    import torch

    @exercise(
        ("only the sum", " - x.max()", ""),
        ("the smallest", "x.max()", "x.min()"),
        ("all that are largest", "x.sum() - x.max()", "x[x < x.max()].sum()"),
    )
    def check_rest(rest):
        for values in ([5.0], [3.0, 1.0, 3.0], [-1.0, -2.0, -4.0, -8.0]):
            close(rest(torch.tensor(values)), sum(sorted(values)[:-1]), f"rest({values})")

The rules, which tests/test_lessons.py holds every lesson to:

* What lies between `# SOLUTION (about N lines, M minutes)` and `# END` becomes `raise NotImplementedError("about N
  lines, M minutes")` in the stub, at the same indentation. It is the body of a function or class NAME, or part of it.
* `check_NAME` examines NAME. It finds the solution in the source: the check sees the imports, the functions and classes
  of the cells above, and constants such as `V = 16`; nothing that a cell computed. Other things come in as arguments.
* The kill list has 3 to 10 wrong solutions, edits (why, old, new) of the solved cell where `old` occurs once, or (why,
  function). A wrong solution is killed by `need` or `close` alone: a crash of the check does not count.
* A cell runs when its exercise is unwritten: what follows an exercise uses the script's function, or `with put(nano_x,
  "f", f):`, which ends with one line if f is unwritten. `band(what, value, low, high)` says where a figure should land.
* Every number of training steps, samples, epochs goes through `steps(n)`, or `steps(n, few=8)`: the tests set
  NANO_LESSON_FEW and get at most `few`. A check runs in full in the tests: it takes a second or two, and trains nothing.
* No magics, no `!`, no downloads, no files; pictures by matplotlib, about 6 x 2.5 inches, `plt.show()` at the end.
"""

import argparse
import ast
import importlib
import json
import os
import re
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
SOLUTION = re.compile(r"^( *)# SOLUTION \((about .*?)\)\n(.*?)^ *# END\n", re.M | re.S)


# --- from source to notebook ------------------------------------------------------------------------------------------


def sources():
    """{"60": path of src/60_topic.py, ...}: the lessons there are."""
    return {path.name[:2]: path for path in sorted((HERE / "src").glob("[0-9][0-9]_*.py"))}


def read(text):
    """Percent cells -> list of (kind, source), kind "markdown" or "code"."""
    cells = []
    for part in re.split(r"^# %%", text, flags=re.M)[1:]:
        title, _, body = part.partition("\n")
        if "[markdown]" in title:
            lines = [line.removeprefix("#").removeprefix(" ") for line in body.strip().splitlines()]
            cells.append(("markdown", "\n".join(lines)))
        else:
            cells.append(("code", body.strip("\n") + "\n"))
    return cells


def stub(source):
    """A cell without its solutions: each becomes one `raise NotImplementedError`."""
    return SOLUTION.sub(r'\1raise NotImplementedError("\2")\n', source)


def solved(source):
    """A cell with its solutions, without the two lines that mark them."""
    return SOLUTION.sub(r"\3", source)


def notebook(number, cells, form):
    """nbformat 4.5 as plain dictionaries. Cell ids come from the position: the same source, the same file."""
    made = []
    for place, (kind, source) in enumerate(cells):
        source = form(source).rstrip("\n") if kind == "code" else source
        cell = {"id": f"{number}-{place:02}", "cell_type": kind, "metadata": {}, "source": source.splitlines(True)}
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        made.append(cell)
    return {"cells": made, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}


def without_outputs(book):
    """What must agree between a notebook on disk and its source: all but outputs, counters and metadata."""
    return [(cell["id"], cell["cell_type"], "".join(cell["source"])) for cell in book["cells"]]


def places(number):
    """Where the two notebooks of a lesson lie: stubs, solved."""
    name = sources()[number].with_suffix(".ipynb").name
    return HERE / name, HERE / "solutions" / name


def save(book, path):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(book, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def make(number):
    """Write both notebooks. A solved one whose code the source has not changed keeps its outputs."""
    cells = read(sources()[number].read_text(encoding="utf-8"))
    stubs_path, solved_path = places(number)
    save(notebook(number, cells, stub), stubs_path)
    book = notebook(number, cells, solved)
    if solved_path.exists():
        old = load(solved_path)
        before, after = ([cell for cell in b["cells"] if cell["cell_type"] == "code"] for b in (old, book))
        if ["".join(cell["source"]) for cell in before] == ["".join(cell["source"]) for cell in after]:
            for was, cell in zip(before, after):
                cell |= {"execution_count": was["execution_count"], "outputs": was["outputs"]}
            book["metadata"] = old["metadata"]
    save(book, solved_path)


def run(number):
    """Execute the solved notebook as a reader would, in its own folder, and write it back with outputs and minutes."""
    import nbclient
    import nbformat

    path = places(number)[1]
    book = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        book, timeout=600, record_timing=False, resources={"metadata": {"path": str(path.parent)}}
    )
    begin = time.time()
    client.execute()
    minutes = round((time.time() - begin) / 60, 2)
    book.metadata = METADATA | {"minutes": minutes}
    save(json.loads(nbformat.writes(book)), path)  # nbformat splits long texts into lines, as `notebook` does
    print(f"{path.name}: {minutes:.2f} minutes, {path.stat().st_size / 1e3:.0f} KB")


# --- the kill lists ---------------------------------------------------------------------------------------------------


def exercises(number):
    """The checks of a lesson, in the order of the file."""
    module = importlib.import_module(f"lessons.checks.lesson_{number}")
    return [thing for thing in vars(module).values() if hasattr(thing, "kills")]


def solution(number, name, text=None):
    """Solved cell that defines `name`, and the names it may use: imports, functions, constants of the cells above."""
    from lessons.checks import run_cell

    names = {"__name__": f"lesson_{number}"}
    for place, (kind, source) in enumerate(read(text or sources()[number].read_text(encoding="utf-8"))):
        if kind == "markdown":
            continue
        source, tree = solved(source), ast.parse(solved(source))
        defined = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        keep = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))] + defined
        keep += [node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)]
        lines = source.splitlines(True)
        parts = []
        for node in sorted(keep, key=lambda node: node.lineno):
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            parts.append("".join(lines[first - 1 : node.end_lineno]).rstrip("\n") + "\n")
        kept = "".join(parts)
        if any(node.name == name for node in defined):
            return kept, names
        run_cell(kept, f"<lesson {number}, cell {place}>", names)
    raise SystemExit(f"build: lesson {number} defines no {name}, but its checks examine it")


def verify(number):
    """Does each check accept its solution and refuse its kill list? -> rows (exercise, killed, total), and faults."""
    from lessons.checks import examine, mutants, run_cell

    rows, faults = [], []
    for exercise in exercises(number):
        source, names = solution(number, exercise.name)
        right = run_cell(source, f"<lesson {number}, {exercise.name}>", dict(names))[exercise.name]
        verdict, line = examine(exercise.check, right)
        if verdict == "skipped":
            print(f"{number} {exercise.name}: {line}")
            continue
        if verdict != "right":
            faults.append(f"{number} {exercise.name}: the solution is {verdict}: {line}")
        verdicts = {why: examine(exercise.check, wrong) for why, wrong in mutants(exercise, source, names)}
        killed = sum(verdict == "wrong" for verdict, _ in verdicts.values())
        rows.append((exercise.name, killed, len(exercise.kills)))
        for why, (verdict, line) in verdicts.items():
            if verdict != "wrong":
                faults.append(f"{number} {exercise.name}, {why!r} was not refused: {verdict} {line}")
    return rows, faults


# --- the table --------------------------------------------------------------------------------------------------------


def size(number):
    """Words of text and lines of code (no comments, no blank lines) of a solved lesson."""
    cells = read(sources()[number].read_text(encoding="utf-8"))
    words = sum(len(source.split()) for kind, source in cells if kind == "markdown")
    lines = [line.strip() for kind, source in cells if kind == "code" for line in source.splitlines()]
    return words, sum(bool(line) and not line.startswith("#") for line in lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Make, verify and run the notebooks of the course.")
    parser.add_argument("lessons", nargs="*", metavar="NN", help="two digits each; default: all")
    parser.add_argument("--run", action="store_true", help="execute the solved notebooks in full, keep their outputs")
    args = parser.parse_args(argv)
    unknown = set(args.lessons) - set(sources())
    if unknown:
        parser.error(f"no lesson {', '.join(sorted(unknown))}; there are {', '.join(sources())}")
    numbers = args.lessons or list(sources())
    for number in numbers:
        make(number)
        if args.run:
            run(number)
    os.environ.setdefault("TRITON_INTERPRET", "1")  # after the runs: a notebook must set by itself what it needs
    table, faults = [], []
    for number in numbers:
        rows, wrong = verify(number)
        minutes = load(places(number)[1])["metadata"].get("minutes", "not run")
        killed, total = sum(row[1] for row in rows), sum(row[2] for row in rows)
        table.append((sources()[number].stem, minutes, len(rows), f"{killed}/{total}", *size(number)))
        faults += wrong
    print(f"{'lesson':32}{'minutes':>8}{'exercises':>11}{'killed':>9}{'words':>8}{'code':>6}")
    for name, *cells in table:
        print("{:32}{:>8}{:>11}{:>9}{:>8}{:>6}".format(name, *cells))
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

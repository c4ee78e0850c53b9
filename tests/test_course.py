"""lessons/README.md leads where it says. Each row of the index points to a heading of a lesson under which
code stands, and to an exercise under that heading; references are those of the lesson or of a script; the
picture draws the column "needs"; the minutes are those of the last full run. After such a run,
`python tests/test_course.py` writes the new minutes into the map."""

import importlib.util
import math
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "lessons" / "README.md"
spec = importlib.util.spec_from_file_location("lessons_build", ROOT / "lessons" / "build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)  # imports no torch


def plain(text):
    """No comment signs, italics, line breaks: a reference is found however the lines are cut."""
    return " ".join(re.sub(r"[#*]", "", text).split())


def sections(source):
    """{heading: [text and code under it, code alone]} of a lesson, in percent cells."""
    found, heading = {}, ""
    for kind, cell in build.read(source):
        # A cell of text may hold several headings. All but its last have no code: no row may lead there.
        for part in re.split(r"^(?=##? )", cell, flags=re.M) if kind == "markdown" else [cell]:
            if kind == "markdown" and part.startswith("#"):
                heading = part.splitlines()[0].lstrip("# ").strip()
            section = found.setdefault(heading, ["", ""])
            section[0] += part
            section[1] += part if kind == "code" else ""
    return found


LESSONS = {number: path.read_text(encoding="utf-8") for number, path in build.sources().items()}
SECTIONS = {number: sections(source) for number, source in LESSONS.items()}
TAKEN = {number: build.load(build.places(number)[1])["metadata"].get("minutes") for number in LESSONS}
PLAIN = {number: plain(source) for number, source in LESSONS.items()}
SCRIPTS = [plain(path.read_text(encoding="utf-8")) for path in (*ROOT.glob("nano_*.py"), ROOT / "kernels.py")]


def table(text, first):
    """The table whose first column is called `first`: a list of cells for each row."""
    block = text[text.index(f"\n| {first} |") + 1:].split("\n\n")[0]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in block.splitlines()[2:]]


def exercises(code):
    """Names that the code defines and has checked."""
    defined = re.findall(r"^(?:def|class) (\w+)", code, re.M)
    return {name for name in defined if f"check.check_{name}({name})" in code}


def number_of(link):
    """`[00 title](00_topic.ipynb)` -> "00", "00 title". "", link if no lesson is there."""
    match = re.fullmatch(r"\[(\d\d)( [^]]+)?\]\((\S+)\.ipynb\)", link)
    if match and match[1] in LESSONS and match[3] == build.sources()[match[1]].stem:
        return match[1], match[1] + (match[2] or "")
    return "", link


# --- the index ----------------------------------------------------------------------------------------------


def row_faults(names, references, number, heading, exercise):
    """What is wrong with one row that points to an existing lesson."""
    text, code = SECTIONS[number].get(heading, ("", ""))
    if not text:
        yield f"lesson {number} has no heading {heading!r}"
        return
    if not code:
        yield f"no code under {heading!r} of lesson {number}"
    elif exercise and exercise.strip("`") not in exercises(code):
        yield f"no exercise {exercise} under {heading!r} of lesson {number}"
    for name in re.sub(r"\(.*?\)", "", names).split(", "):
        # A reader searches for the name: at least its first word stands in the section.
        word = name.split()[0].removesuffix("'s").rstrip(":")
        if not re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.I):
            yield f"{word!r} is not mentioned under {heading!r} of lesson {number}"
    for reference in references.split("; "):
        wanted = re.findall(r"\d{4}\.\d{4,5}", reference) or [plain(reference)]
        if not all(any(one in source for source in (PLAIN[number], *SCRIPTS)) for one in wanted):
            yield f"{reference} stands neither in lesson {number} nor in a script"


def index_faults(rows):
    """rows: names, references, lesson, heading, exercise."""
    order = [row[2] for row in rows]
    if order != sorted(order):
        yield "the index is not sorted by lesson"
    for names, references, link, heading, exercise in rows:
        number, _ = number_of(link)
        faults = row_faults(names, references, number, heading, exercise) if number else [f"no lesson {link}"]
        yield from (f"{names}: {fault}" for fault in faults)


# --- the map ------------------------------------------------------------------------------------------------


def in_the_picture(text):
    """Arrows {(needed, needing)} and labels {number: title} of the mermaid drawing."""
    arrows, labels = set(), {}
    for line in re.search(r"```mermaid\n(.*?)```", text, re.S)[1].splitlines():
        labels |= dict(re.findall(r'n(\d\d)\["(.*?)"\]', line))
        left, _, right = re.sub(r'\[".*?"\]', "", line).partition("-->")
        for needed in re.findall(r"n(\d\d)", left):
            arrows |= {(needed, needing) for needing in re.findall(r"n(\d\d)", right)}
    return arrows, labels


def minutes_are_right(column, taken):
    """Whole minutes, rounded up. Runs differ: a minute too many passes, or a quarter of a minute too few.
    A solved notebook without minutes was not run; that is for test_lessons.py to say."""
    return taken is None or column.isdecimal() and taken - 0.25 <= int(column) <= math.ceil(taken) + 1


def map_faults(rows, text):
    """rows: lesson, what one finds out, needs, minutes, hand in."""
    needs, titles = set(), {}
    for link, _, needed, minutes, hand_in in rows:
        number, title = number_of(link)
        if not number or title.casefold() not in {heading.casefold() for heading in SECTIONS[number]}:
            yield f"the map: no lesson {link}"
            continue
        titles[number] = title
        needs |= {(one, number) for one in re.findall(r"\b\d\d\b", needed)}
        if not set(re.findall(r"^`(\w+)`: ", hand_in)) & exercises(LESSONS[number]):
            yield f"{title}: its hand-in is no exercise: {hand_in}"
        if not minutes_are_right(minutes, TAKEN[number]):
            yield f"{title}: not {minutes} minutes but {TAKEN[number]}: run python tests/test_course.py"
    if list(titles) != list(LESSONS):
        yield f"the map has lessons {list(titles)}, there are {list(LESSONS)}"
    arrows, labels = in_the_picture(text)
    if arrows != needs:
        yield f"arrows that differ from the column needs: {sorted(arrows ^ needs)}"
    if labels != titles:
        wrong = sorted(labels.items() ^ titles.items())
        yield f"labels of the picture that are no titles of the map: {wrong}"


# --- the tests ----------------------------------------------------------------------------------------------


def faults(text):
    return [*index_faults(table(text, "paper or method")), *map_faults(table(text, "lesson"), text)]


def test_every_row_of_the_map_and_of_the_index_leads_somewhere():
    found = faults(README.read_text(encoding="utf-8"))
    assert not found, "\n".join(found)


MISTAKES = {  # (old, new) in the page: the fault that must be reported
    ("[20](20_orders.ipynb) | All orders at once", "[24](24_orders.ipynb) | All orders at once"): "no lesson",
    ("| [00](00_autoregression.ipynb) |", "| [70](70_scaling_out.ipynb) |"): "not sorted",
    ("Guesses for nothing", "Guesses for something"): "has no heading",
    ("| Trees |", "| What came out, and what did not |"): "no code under",
    ("| `levels` |", "| `level` |"): "no exercise",
    ("Three knobs on one law | `law`", "Three knobs on one law | `cca_loss`"): "no exercise",
    ("| Medusa |", "| Hydra |"): "is not mentioned",
    ("arXiv:2410.01699", "arXiv:2410.01690"): "stands neither",
    ("Saxena 2023", "Saxena 2021"): "stands neither",
    ("| [43 any subset, any density]", "| [44 any subset, any density]"): "the map: no lesson",
    ("| [70 scaling out]", "\n| [70 scaling out]"): "the map has lessons",
    ("| 40 | ", "| 41 | "): "arrows that differ",
    (' & n52["52 intervals"]', ""): "arrows that differ",
    ('n61["61 one operator', 'n61["61 two operators'): "labels of the picture",
    ("`in_parts`", "`in_halves`"): "its hand-in is no exercise",
}


@pytest.mark.parametrize("old, new", MISTAKES, ids=[old.replace("\n", " ") for old, _ in MISTAKES])
def test_a_broken_page_is_reported(old, new):
    text = README.read_text(encoding="utf-8")
    assert old in text
    found = set(faults(text.replace(old, new, 1))) - set(faults(text))
    assert any(MISTAKES[old, new] in fault for fault in found), found


def test_minutes_are_rounded_up_and_coarse():
    columns = "-", "0", "1", "2", "3", "4", "5", "6", "3.1"
    assert [column for column in columns if minutes_are_right(column, 3.08)] == ["3", "4", "5"]


def write_minutes():
    """Bring the minutes of the map up to date with the solved notebooks."""
    text = README.read_text(encoding="utf-8")
    for number, taken in TAKEN.items():
        if taken is not None:
            row = rf"^(\| \[{number} (?:[^|]*\|){{3}}) \d+ \|"
            text = re.sub(row, rf"\1 {math.ceil(taken)} |", text, flags=re.M)
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_minutes()

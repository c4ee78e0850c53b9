"""The scripts stand alone, so some text occurs in several: every copy of a block "# --- shared: NAME" must be the same."""
import ast
import pathlib
import re
import shlex
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = sorted(ROOT.glob("nano_*.py"))
BLOCK = re.compile(r"^# --- shared: (\w+)\n(.*?)^# --- end shared$", re.S | re.M)


def test_shared_blocks_are_identical():
    seen = {}
    for script in SCRIPTS:
        text = script.read_text(encoding="utf-8")
        marks = [len(re.findall(f"^# --- {mark}", text, re.M)) for mark in ("shared: ", "end shared")]
        assert marks == [len(BLOCK.findall(text))] * 2, script.name
        for name, body in BLOCK.findall(text):
            first, where = seen.setdefault(name, (body, script.name))
            assert body == first, f"block {name!r} of {script.name} differs from the one in {where}"
    assert seen


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_a_script_imports_only_what_the_readme_promises(script):
    allowed = {"torch", "numpy", "tqdm", "matplotlib", "PIL", "kernels", "triton"} | set(sys.stdlib_module_names)
    nodes = list(ast.walk(ast.parse(script.read_text(encoding="utf-8"))))
    imported = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module for n in nodes if isinstance(n, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} <= allowed


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / "kernels.py"], ids=lambda p: p.name)
def test_lines_fit_a_screen(script):
    text = script.read_text(encoding="utf-8")
    assert not [i for i, line in enumerate(text.splitlines(), 1) if len(line) > 110], script.name


def commands():
    """Every `python nano_x.py ...` line in the README's code blocks and in the scripts' docstrings."""
    blocks = re.findall(r"^```(?:sh|bash)\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S | re.M)
    for script in SCRIPTS:
        text = script.read_text(encoding="utf-8")
        blocks.append(ast.get_docstring(ast.parse(text)))
    found = [re.search(r"python (nano_\w+\.py.*)", line) for block in blocks for line in block.splitlines()]
    return sorted({re.split(r"\s{3,}|#", match[1])[0].strip() for match in found if match})


@pytest.mark.parametrize("line", commands())
def test_every_command_in_readme_and_docstrings_parses(line, tmp_path, monkeypatch):
    """The file, the part and every flag exist: the script's own parser says so."""
    script, *argv = shlex.split(line)
    module = __import__(pathlib.Path(script).stem)
    monkeypatch.setattr(module, "load", lambda path: {"config": {}})  # no checkpoint is needed to read flags
    module.read_settings(argv)


def test_the_readme_names_only_files_that_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"\]\(([^)#:]+)\)", text) + re.findall(r'src="([^":]+)"', text):
        assert (ROOT / name).exists(), name

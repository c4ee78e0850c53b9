"""The scripts stand alone, so some text occurs in several of them: every copy of a block marked "# --- shared: NAME" must be the same."""

import ast
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = sorted(ROOT.glob("nano_*.py"))
BLOCK = re.compile(r"^# --- shared: (\w+)\n(.*?)^# --- end shared$", re.S | re.M)


def test_shared_blocks_are_identical():
    seen = {}
    for script in SCRIPTS:
        text = script.read_text(encoding="utf-8")
        assert text.count("# --- shared:") == text.count("# --- end shared") == len(BLOCK.findall(text)), script.name
        for name, body in BLOCK.findall(text):
            first, where = seen.setdefault(name, (body, script.name))
            assert body == first, f"block {name!r} of {script.name} differs from the one in {where}"
    assert seen


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_a_script_imports_only_what_the_readme_promises(script):
    allowed = {"torch", "numpy", "tqdm", "matplotlib", "PIL", "kernels", "triton"} | set(sys.stdlib_module_names)
    nodes = list(ast.walk(ast.parse(script.read_text(encoding="utf-8"))))
    imported = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names} | {n.module for n in nodes if isinstance(n, ast.ImportFrom)}
    imported = {name.split(".")[0] for name in imported}
    assert imported <= allowed, imported - allowed


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / "kernels.py"], ids=lambda p: p.name)
def test_lines_fit_a_screen(script):
    long = [i for i, line in enumerate(script.read_text(encoding="utf-8").splitlines(), 1) if len(line) > 140]
    assert not long, f"{script.name}: lines {long}"


def commands():
    """Every `python nano_x.py ...` line in the README's code blocks."""
    blocks = re.findall(r"^```(?:sh|bash)\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S | re.M)
    return sorted({line.split("#")[0].strip() for block in blocks for line in block.splitlines() if re.match(r"(NANO_DATA=\S+ )?python \w+\.py", line)})


@pytest.mark.parametrize("line", commands())
def test_every_command_of_the_readme_parses(line):
    """The file, the part and every flag exist: the script's own parser says so."""
    words = shlex.split(line)
    script, *argv = words[words.index("python") + 1:]
    script = ROOT / script
    assert script.exists(), line
    if script.stem.startswith("nano_"):
        module = __import__(script.stem)
        presets = module.PRESETS if "cpu" in module.PRESETS else module.PRESETS["text"]  # nano_spec has a set for every task
        module.parse_config(module.Config, argv, module.PARTS, presets, module.__doc__)
    else:
        shown = subprocess.run([sys.executable, str(script), *argv, "--help"], capture_output=True, text=True)
        assert shown.returncode == 0, shown.stderr


def test_the_readme_names_only_files_that_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"\]\(([^)#:]+)\)", text) + re.findall(r'src="([^":]+)"', text):
        assert (ROOT / name).exists(), name

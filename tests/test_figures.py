"""README, docstrings, comments and lessons quote only figures of which it is known where they come from."""

import io
import json
import re
import tokenize

import figures
import pytest

ROOT = figures.ROOT
ROWS = figures.rows()
UNITS = r"(?:%|dB\b|nats\b|ms\b|s\b|seconds\b|minutes\b|[KMG]B\b)"
MEASURED = re.compile(rf"(?:\d[\d,.]*|\.\d+)\s?{UNITS}|(?:gFD|perplexity|accuracy|MSE)\s(?:\d|\.\d)")


def without_quotes(text, file):
    quotes = {row["quote"] for row in ROWS if row["file"] == file}
    assert all(quote in text for quote in quotes), [quote for quote in quotes if quote not in text]
    for quote in sorted(quotes, key=len, reverse=True):         # the long ones first: some hold others
        text = text.replace(quote, " _ ")
    return text


def leftovers(pattern, text):
    return [" ".join(text[max(0, m.start() - 40):m.end() + 20].split()) for m in pattern.finditer(text)]


def test_the_readme_quotes_only_what_the_table_holds():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for noise in (r"^```.*?^```", r"<img[^>]*>", r"!?\[[^\]]*\]\([^)]*\)", r"`[^`]*`"):   # code, pictures, links
        text = re.sub(noise, " _ ", text, flags=re.S | re.M)
    assert not leftovers(re.compile(r"(?<![A-Za-z\d])\d"), without_quotes(text, "README.md"))


@pytest.mark.parametrize("file", [p.name for p in [*sorted(ROOT.glob("nano_*.py")), ROOT / "kernels.py"]])
def test_docstrings_and_comments_quote_only_what_the_table_holds(file):
    source = (ROOT / file).read_text(encoding="utf-8")
    prose = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT or token.type == tokenize.STRING and token.string.startswith('"""'):
            prose.append(" ".join(token.string.replace("#", " ").split()))
    assert not leftovers(MEASURED, without_quotes(" ".join(prose), file))


def test_every_row_says_where_from():
    for row in ROWS:
        if row["from"] != "definition":
            assert re.fullmatch(r"[0-9a-f]{7,}", row["commit"]) and row["date"] and row["machine"], row
            assert row["from"].startswith(("python ", "lesson ", "arXiv:")), row
        if row["metric"]:
            assert len(figures.numbers(row["quote"])) == len(row["seeds"].split()) and float(row["band"]) > 0, row
            assert float(row["seconds"]) > 0 and ("{seed}" in row["from"] or row["seeds"] == "0"), row


def test_a_path_into_the_metrics():
    metrics = {"gfd": 1.5, "models": [{"name": "a", "mse": {"96": 1.0, "192": 3.0}}]}
    assert figures.find(metrics, "gfd") == 1.5
    assert figures.find(metrics, "models/a/mse/192") == 3.0 and figures.find(metrics, "models/a/mse/mean") == 2.0
    assert figures.numbers("1,034 bytes, .25 and 3.") == [1034.0, 0.25, 3.0]

"""What a lesson's text says was measured, a cell of its solved notebook has printed.

Looked at are numbers with a decimal point, and whole ones before a unit. Each must be a printed number, rounded to the digits that
the text gives; or stand in the code as it is; or follow from printed numbers or from definitions as one of the lists below says, which
is checked, too. Not looked at: code, formulas, literature, exercises and their worked examples, and paragraphs that say themselves that
their numbers come from elsewhere.
"""
import json
import math
import pathlib
import re

import pytest

SOLVED = sorted((pathlib.Path(__file__).parent.parent / "lessons" / "solutions").glob("*.ipynb"))
VALUE = re.compile(r"\d[\d,]*\.?\d*(?:e[+-]?\d+)?|\.\d+")
UNITS = r"\s?(?:%|dB\b|nats\b|bits\b|points\b|ms\b|seconds\b|minutes\b|[KMG]B\b)"
MEASURED = re.compile(rf"(?<![\w.])(?:\d[\d,]*\.\d+|\.\d+|\d[\d,]*(?={UNITS}))(?!\w)(?!\.\d)")
NOISE = (  # in this order
    r"```.*?```", r"`[^`]*`", r"\$\$.*?\$\$", r"\$[^$]*\$", r"\]\([^)]*\)", r"https?://\S+",
    r"\b\d{4}\.\d{4,5}\b",                                       # arXiv
    r"\bsections? [\d.]+(?:(?:,| and|-) ?[\d.]+)*",
    r"\*\*Exercise \d.*?(?:\n\n|\Z)", r"\*?\b(?:Worked|Hint|Trap)\b.*?(?:\n\n|\Z)", r"\*\*Read on.*\Z",
)
QUOTED = re.compile(  # papers, a GPU, an older version of a script
    r"\b(?:published|abstract|quoted|benchmark Spec-Bench|on ImageNet|on an? H[12]00|at commit|in an earlier state)\b", re.I)

PRINTED = {  # numbers made from printed ones: lesson: {words of the text: how}
    "11": {"gain .9 dB": "22.57 - 21.71", "gain .7 dB": "23.17 - 22.47", "costs up to .9 dB": "25.2 - 24.3",
           "plain one loses 2.64": "23.17 - 20.53", "gives away .06 dB": "23.17 - 23.11"},
    "12": {"costs .02 dB": "17.00 - 16.98", "of the .29 gained": "17.00 - 16.71", ".14 of": "17.37 - 17.23", "of .66 with": "17.37 - 16.71"},
    "13": {"2,624 bits of each file": "2929 - 305", "pays 356 bits more": "670 - 314", "1.5 dB below JPEG": "19.56 - 18.11"},
    "20": {"The 2.7 nats a picture": "47.4 - 44.7"},
    "32": {"brings 5.6 of them back": "22.3 - 16.7", "save 27 nats": "206.9 - 179.9", "for .2 dB": "24.7 - 24.5"},
    "33": {"by 3.8 points": "0.952 - 0.914"},
}
DEFINED = {  # numbers that follow from definitions
    "00": {"1 nat is 1.443 bits": "1 / math.log(2)", "44.4 nats": "64 * math.log(2)"},
    "12": {"the 88.7 nats": "128 * math.log(2)"},
    "20": {"4.3 times faster?": "64 / 15", "not 4.3:": "64 / 15"},
    "23": {"One nat is 1.44 bits": "1 / math.log(2)", "0.99999994": "1 - 2**-24"},
    "30": {"59 % more pairs": "100 * ((1 * 1 + 4 * 5 + 16 * 21 + 64 * 85) / (85 * 86 / 2) - 1)"},
    "43": {"line is .068": "0.0068 * (40_000 / 400) ** 0.5"},
    "70": {"has 0.9 million": "(2 * 512 * 128 + 11 * 128 + 64 * 128 + 4 * 12 * 128**2) / 1e6"},
}
EXEMPT = {  # the rest, with the reason
    "11": {"g = .95,": "the default of nano_tok.VectorQuantizer"},
    "13": {"From 29.6 dB": "title of a picture", "21.6 dB for": "title of a picture", "middle of 24.7": "title of a picture"},
    "23": {"is 0.35172": "an example", "digits 0.35": "the same example", "is 0.4999999": "an example"},
    "43": {"places, .664,": "an attempt that is not in the notebook", "says .39;": "the same attempt"},
}


def number_of(words):
    return MEASURED.search(words)[0].replace(",", "")


def same(value, number, half=1e-9):
    """Does value, rounded to the digits of the text, give the number there?"""
    return abs(value - float(number)) <= 0.5 * 10.0 ** -len(number.partition(".")[2]) + half


def values(text):
    return {float(match.replace(",", "").rstrip(".")) for match in VALUE.findall(text)}


def parts(path):
    """A notebook -> its paragraphs of text, all that it has printed, its code."""
    texts, printed, code = [], [], []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            for noise in NOISE:
                source = re.sub(noise, " _ ", source, flags=re.S)
            source = re.sub(r":\s*\n\s*\n(?=[|*])", ":\n", source)   # a table or list belongs to the sentence before it
            texts += [" ".join(part.split()) for part in re.split(r"\n\s*\n", source)]
        else:
            code.append(source)
            for output in cell["outputs"]:
                printed += ["".join(output.get("text", "")), "".join(output.get("data", {}).get("text/plain", ""))]
    return texts, "\n".join(printed), "\n".join(code)


def unfounded(lesson, texts, printed, code):
    """-> the numbers of the texts that nothing printed, each with the words around it."""
    seen, written = values(printed), values(code)
    written |= {float(m[0].replace(",", "")) for text in texts if QUOTED.search(text) for m in MEASURED.finditer(text)}
    explained, found = [*DEFINED.get(lesson, {}), *PRINTED.get(lesson, {}), *EXEMPT.get(lesson, {})], []
    for text in texts:
        if QUOTED.search(text):
            continue
        covered = {m.start() + MEASURED.search(words).start() for words in explained for m in re.finditer(re.escape(words), text)}
        for match in MEASURED.finditer(text):
            number, after = match[0].replace(",", ""), text[match.end():]
            scales = (1, 100) if re.match(r"\s?(?:%|points)", after) else (1,)
            printed_so = any(same(v * s, number) for v in seen for s in scales)
            if not printed_so and not {float(number), float(number) / scales[-1]} & written and match.start() not in covered:
                found.append(text[max(0, match.start() - 45):match.end() + 25])
    return found


@pytest.mark.parametrize("path", SOLVED, ids=lambda path: path.stem)
def test_measured_numbers_were_printed(path):
    assert not unfounded(path.stem[:2], *parts(path))


@pytest.mark.parametrize("path", SOLVED, ids=lambda path: path.stem)
def test_what_is_made_from_other_numbers_is_made_from_these(path):
    """The arithmetic is right, and its terms were printed. (Words that the text has no more are passed over: their number is looked at.)"""
    lesson, (texts, printed, _) = path.stem[:2], parts(path)
    for words, how in [*PRINTED.get(lesson, {}).items(), *DEFINED.get(lesson, {}).items()]:
        scale = 100 if words.endswith("points") else 1
        assert same(scale * eval(how), number_of(words), 1e-6), (words, how)
        if words in PRINTED.get(lesson, {}) and any(words in text for text in texts):
            assert values(how) <= values(printed), (words, how)


def test_a_number_that_drifts_is_noticed():
    """By 7 % and one last digit, one number after the other: a short one may meet another printed one, most do not."""
    assert not unfounded("", ["It gains 1.2 dB, 35 % of 3,412 bits"], "1.249 .351 3412", "")
    assert len(unfounded("", ["It gains 1.3 dB, 36 % of 3,411 bits; .02"], "1.249 .351 3412", "0.021")) == 4
    numbers = noticed = 0
    for path in SOLVED:
        texts, printed, code = parts(path)
        for text in texts:
            for match in () if QUOTED.search(text) else MEASURED.finditer(text):
                digits = len(match[0].partition(".")[2])
                drifted = f"{float(match[0].replace(',', '')) * 1.07 + 10.0 ** -digits:.{digits}f}"
                numbers += 1
                noticed += bool(unfounded("", [drifted + text[match.end():match.end() + 7]], printed, code))
    assert numbers > 300 and noticed > 0.6 * numbers, (numbers, noticed)

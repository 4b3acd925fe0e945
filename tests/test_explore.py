"""notebooks/explore.html: its JavaScript gives the numbers of dvr1_lite, and it needs nothing from outside."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "notebooks"))
import explore  # noqa: E402

PAGE = explore.PAGE.read_text(encoding="utf-8")
NODE = shutil.which("node")


def close(mine, right) -> bool:
    if isinstance(right, dict):
        return all(close(mine[key], value) for key, value in right.items())
    if isinstance(right, list):
        return len(mine) == len(right) and all(map(close, mine, right))
    return mine == pytest.approx(right, rel=1e-6, abs=1e-8)


def test_the_cases_in_the_page_are_the_modules():
    """Without a browser or Node.js this holds the page: it says aloud how many of these its own formulas meet."""
    embedded, right = explore.embedded(PAGE), explore.cases()
    assert len(embedded) == len(right) == 12 and close(embedded, right), "run python notebooks/explore.py"


@pytest.mark.skipif(NODE is None, reason="Node.js is not installed; the page checks its stored cases when it opens")
def test_the_formulas_of_the_page_give_the_modules_numbers():
    script = explore.FORMULAS.search(PAGE)[1] + """
const read = JSON.parse(require("fs").readFileSync(0, "utf8"));
console.log(JSON.stringify(read.map(c => group(c.rewards, c.rho, c.settings))));"""
    asked = explore.inputs(200, seed=1)
    run = subprocess.run([NODE, "-e", script], input=json.dumps(asked), capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    for case, mine in zip(asked, json.loads(run.stdout), strict=True):
        assert close(mine, explore.expected(**case)), case


@pytest.mark.skipif(NODE is None, reason="Node.js is not installed")
def test_the_comparison_sees_a_wrong_formula():
    wrong = explore.FORMULAS.search(PAGE)[1].replace("spread(rho) + eps", "spread(rho) + 1.1 * eps")
    case = explore.inputs(5, seed=2)[4]
    script = f"{wrong}\nconsole.log(JSON.stringify(group({json.dumps(case['rewards'])}, {json.dumps(case['rho'])}, " \
             f"{json.dumps(case['settings'])})))"
    run = subprocess.run([NODE, "-e", script], capture_output=True, text=True, timeout=60, check=True)
    assert not close(json.loads(run.stdout), explore.expected(**case))


def test_the_page_is_one_file_without_addresses():
    assert "default-src 'none'" in PAGE
    addresses = set(re.findall(r"https?://[^\"'\s<)]+", PAGE)) - {"http://www.w3.org/2000/svg"}  # a name, never fetched
    assert addresses == set() and not re.search(r"\b(src|href|@import|fetch|XMLHttpRequest)\b\s*[=(]", PAGE)
    assert len(PAGE.encode()) < 60_000


class Controls(HTMLParser):
    """Collects what a reader can operate, and what names it."""

    def __init__(self):
        super().__init__()
        self.unnamed, self.inside_label = [], 0

    def handle_starttag(self, tag, attrs):
        names = dict(attrs)
        self.inside_label += tag == "label"
        if tag == "input" and not self.inside_label and "aria-label" not in names:
            self.unnamed.append(names)
        assert not (tag in ("div", "span") and "onclick" in names), "only real controls can be reached by keyboard"

    def handle_endtag(self, tag):
        self.inside_label -= tag == "label"


def test_every_control_has_a_name():
    parser = Controls()
    parser.feed(PAGE)
    assert parser.unnamed == [] and 'lang="en"' in PAGE and 'name="viewport"' in PAGE

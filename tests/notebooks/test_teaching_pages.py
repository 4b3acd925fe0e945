"""INSTRUCTORS.md and the quiz: what they cite exists, and their numbers are the module's."""

import math
import re
from functools import cache
from pathlib import Path

import nbformat
import pytest
import torch

from dvr1_lite.advantages import group_advantages, vanish_probability
from dvr1_lite.augmentation import RewardHistory
from dvr1_lite.config import ObjectiveConfig
from dvr1_lite.objectives import Batch, objective_loss
from dvr1_lite.video import patchify

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
GUIDE, QUIZ, ANSWERS = FOLDER / "INSTRUCTORS.md", FOLDER / "QUIZ.md", FOLDER / "solutions/QUIZ_ANSWERS.md"
NOTEBOOKS = pytest.mark.parametrize("path", sorted(FOLDER.glob("0[0-5]_*.ipynb")), ids=lambda path: path.stem)
CITATION = re.compile(r'\[(\d\d), section (\d+)\]\(([^)]+)\)(?:, cell "([^"]+)")?')


@cache
def sections(path: Path) -> dict[str, list[str]]:
    """Of every numbered section of a notebook the text of its cells, with what they print."""
    found, number = {}, ""
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            for heading in re.findall(r"(?m)^## (\d+)\.", cell.source):
                number = heading
                found[number] = []
        elif number:
            found[number].append(cell.source + "".join(output.get("text", "") for output in cell.outputs))
    return found


def citations(page: Path) -> list[tuple[str, str, str, str]]:
    return CITATION.findall(" ".join(page.read_text(encoding="utf-8").split()))


def markdown(path: Path) -> str:
    return "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")


@pytest.mark.parametrize("page", [GUIDE, ANSWERS], ids=lambda page: page.stem)
def test_every_citation_exists_and_has_the_same_form(page):
    text = " ".join(page.read_text(encoding="utf-8").split())
    assert len(re.findall(r"\.ipynb\)", text)) == len(citations(page)) >= 18
    for notebook, section, link, quoted in citations(page):
        path, place = page.parent / link, f"{notebook}, section {section}"
        assert path.name.startswith(f"{notebook}_"), link
        cells = sections(path.resolve())
        assert section in cells, f"{path.name} has no section {section}"
        assert not quoted or any(quoted in cell for cell in cells[section]), f"{place}: {quoted!r}"


def test_every_misconception_names_its_cell():
    text = GUIDE.read_text(encoding="utf-8")
    rows = text.split("## Common misconceptions")[1].split("\n## ")[0].strip().split("\n")[2:]
    assert len(rows) >= 12 and all(CITATION.search(row) and CITATION.search(row)[4] for row in rows)


def test_every_core_section_has_a_question():
    discussed = GUIDE.read_text(encoding="utf-8").split("## Questions for discussion")[1].split("\n## ")[0]
    asked = {(notebook, section) for notebook, section, *_ in CITATION.findall(" ".join(discussed.split()))}
    for path in FOLDER.glob("0[0-5]_*.ipynb"):
        for section, title in re.findall(r"(?m)^## (\d+)\. (.*\(Core\))", markdown(path)):
            place, listed = (path.name[:2], section), re.search("glossary|The map|How to read", title)
            assert listed or place in asked | {("04", "6"), ("04", "9")}, f"{path.name}: {title}"


def test_the_quiz_has_twenty_questions_and_twenty_answers():
    for page in (QUIZ, ANSWERS):
        numbers = [int(n) for n in re.findall(r"(?m)^(\d+)\. ", page.read_text(encoding="utf-8"))]
        assert numbers == list(range(1, 21)), page.name


def answer(number: int) -> str:
    return re.search(rf"(?ms)^{number}\. (.*?)(?=^\d+\. |\Z)", ANSWERS.read_text(encoding="utf-8"))[1]


def first_gradients() -> float:
    """Reg-GRPO's first gradient over GRPO's at epsilon 0.05, completions of one token."""
    gradients = []
    for config in (ObjectiveConfig("reg-grpo", beta=0.0, predicted_eps=0.05), ObjectiveConfig("grpo", beta=0.0)):
        logp = torch.zeros(1, 4, 1, dtype=torch.float64, requires_grad=True)
        batch = Batch(logp, torch.zeros_like(logp), None, torch.ones_like(logp), torch.tensor([[1.0, 0, 0, 1]]))
        loss = objective_loss(batch, config)
        gradients.append(torch.autograd.grad(loss, logp)[0][0, 0, 0].item())
    return gradients[0] / gradients[1]


def test_the_numbers_of_the_answers():
    history = RewardHistory(4)
    for _ in range(4):
        history.push(0.6)
    rewards = torch.tensor([[1.0, 1, 0, 0]])
    right = {4: f"{history.difficulty(0.2):.1f}", 8: f"{vanish_probability(0.1, 8):.2f}", 10: f"{math.e:.2f}",
             13: f"{2 * (1 - 0.5):.1f}", 15: f"{first_gradients():.0f}",
             19: str(int(patchify(torch.zeros(8, 3, 112, 112))[1].prod()) // 4),
             6: " and ".join(f"{group_advantages(rewards, 0.0, std)[0, 0]:.3f}" for std in ("population", "sample"))}
    for number, value in right.items():
        assert answer(number).startswith(f"**{value}"), f"answer {number} is not {value}"


@NOTEBOOKS
def test_predictions_come_before_folded_answers(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    asked = [cell for cell in cells if re.search(r"(?m)^guess = None", cell.source)]
    assert len(asked) >= 2 and all("predict(guess, " in cell.source for cell in asked)
    assert all(cell.metadata.get("jupyter", {}).get("outputs_hidden") for cell in asked)


@NOTEBOOKS
def test_a_notebook_has_its_parts_and_marks_core_and_deeper_sections(path):
    text = markdown(path)
    headings = re.findall(r"(?m)^##+ \d+\. .*$", text)
    assert headings and [h for h in headings if not re.search(r"Core|Deeper|\d\. Exercises$", h)] == []
    for part in ("| to read | to run | memory | downloads | you need |", "Afterwards you can", "## Summary",
                 "**Where this differs from the paper.**", "**Further reading.**", "**Next"):
        assert part in text, part
    exercises = re.findall(r"(?m)^### Exercise \d+ (★+)(.*)$", text)
    assert 3 <= len([1 for _, rest in exercises if "no public solution" not in rest]) <= 5
    assert [stars for stars, rest in exercises if "(required)" in rest] == ["★"]
    assert all("How to judge it" in text.split(rest)[1] for _, rest in exercises if "no public solution" in rest)

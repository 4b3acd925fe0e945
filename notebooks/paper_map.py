"""PAPER_MAP.md and the plan of notebook 00, both written by python notebooks/paper_map.py.

Each row of the map names what the paper prints, where the notebooks explain it, the code, and a test that holds the code
to it. Sections are looked up in the notebooks, not written here. The plan has the reading times that every notebook
states in its first table. `tests/notebooks/test_paper_map.py` checks that everything named here exists, and the times
against words and code cells.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import nbformat

FOLDER = Path(__file__).resolve().parent
NOTEBOOKS = {path.name.partition("_")[0]: path.name for path in sorted(FOLDER.glob("[0-9]*_*.ipynb"))}
START = FOLDER / NOTEBOOKS["00"]
MAP = FOLDER / "PAPER_MAP.md"
PLAN_HEADING = "## 5. Which notebook for which reader (Core)"  # of the cell that holds the plan
INTRODUCTION = """# From the paper to this code

Where each equation, table and figure of the paper is explained, the code that computes it, and a test that holds the code
to it. "Again": printed under these numbers too, in the appendix. `python notebooks/paper_map.py` writes this page.

"""
LAST_WORDS = """
Tables 1 to 3 belong to large models and real video; here are their published figures and readers for their files, nothing
more. Tables 4 to 8 and figure 3 are also experiments with seeds on ToyVideoQA (`python -m dvr1_lite reproduce table4`);
[notebook 05](05_reproducing_the_tables.ipynb) reads them.
"""
WORDS_A_MINUTE, MINUTES_A_CELL = 200, 1
TOPICS = {
    "00": "what the paper claims, what a reward is, which groups teach nothing",
    "01": "GRPO in 60 lines; why its loss reads 0",
    "02": "where Reg-GRPO's loss comes from, and what it measures",
    "03": "hints and noise: when they help, when they harm",
    "03b": "rescue and harm counted, how many words to show, what students learn",
    "04": "the training step of a video model, opened",
    "05": "the paper's tables beside ours, with intervals",
    "06": "a configuration for your GPU",
    "07": "your own clips, from a folder to an adapter",
}


@dataclass(frozen=True)
class Row:
    """`paper` is "Eq. 5", "table 4" or "figure 3"; `again` says under which numbers the appendix prints it again."""

    paper: str
    what: str
    notebook: str
    code: str  # module.name in dvr1_lite, for instance lab.tables.EXPERIMENTS
    test: str  # folder.module.name in tests, without "test_" before the module
    again: str = ""


ROWS = (
    Row("Eq. 1", "PPO's clipped surrogate", "01", "objectives.grpo", "core.objectives.test_clipped_grpo_by_hand"),
    Row("Eq. 2", "GRPO", "01", "objectives.grpo",
        "core.objectives.test_grpo_starts_with_the_gradient_of_eq_2_and_the_value_0_of_a_mean_over_tokens"),
    Row("Eq. 3", "reward with a price on distance", "02", "objectives.centred_regression",
        "core.objectives.test_only_centred_regression_has_its_optimum_at_the_policy_of_eq_4", "10"),
    Row("Eq. 4", "its best policy", "02", "objectives.centred_regression",
        "core.objectives.test_only_centred_regression_has_its_optimum_at_the_policy_of_eq_4", "11 to 14"),
    Row("Eq. 5", "advantages of a group", "01", "advantages.group_advantages",
        "core.advantages.test_the_conventions_of_the_std_by_hand", "16"),
    Row("Eq. 6", "the reward read off the best policy", "02", "objectives.reward_regression",
        "core.objectives.test_reward_regression_by_hand", "15"),
    Row("Eq. 7", "predicted advantages", "02", "advantages.predicted_advantages",
        "core.advantages.test_epsilon_is_added_to_the_std_outside_the_root"),
    Row("Eq. 8", "Reg-GRPO", "02", "objectives.reg_grpo", "core.objectives.test_reg_grpo_by_hand", "17, 18"),
    Row("Eq. 9", "difficulty of a prompt", "03", "augmentation.RewardHistory",
        "core.augmentation.test_difficulty_is_the_mean_of_the_last_window_minus_the_groups_own"),
    Row("Eq. 19", "format reward", "04", "rewards.format_reward",
        "core.rewards.test_malformed_text_and_cheats_earn_nothing_on_any_part"),
    Row("Eq. 20", "accuracy reward", "04", "rewards.accuracy_reward",
        "core.rewards.test_answers_of_each_kind_by_hand"),
    Row("Eq. 21", "IoU reward", "04", "rewards.iou_reward", "core.rewards.test_temporal_iou_and_iop_by_hand"),
    Row("Eq. 22", "accuracy", "04", "evaluation.summarise", "core.evaluation.test_the_summary_by_hand"),
    Row("Eq. 23", "mean IoU", "04", "evaluation.grounding", "core.evaluation.test_recall_by_hand"),
    Row("Eq. 24", "R@m", "04", "evaluation.grounding", "core.evaluation.test_recall_by_hand"),
    Row("table 1", "SEED-Bench-R1 and LongVideoBench (published; reader)", "00", "scale.datasets.read_any",
        "scale.datasets.test_a_validation_row_of_seed_bench_r1"),
    Row("table 2", "other benchmarks (published; evaluator)", "00", "evaluation.evaluate",
        "core.evaluation.test_a_row_for_every_question"),
    Row("table 3", "NExT-GQA (published; reader)", "00", "scale.datasets.read_any",
        "scale.datasets.test_next_gqa_rows_with_their_spans_as_annotated"),
    Row("table 4", "GRPO or Reg-GRPO, with or without augmentation", "05", "lab.tables.EXPERIMENTS",
        "lab.tables.test_table4_has_the_rows_and_the_published_figures_of_the_paper"),
    Row("table 5", "Reg-GRPO and its rivals", "05", "lab.tables.EXPERIMENTS",
        "lab.tables.test_every_experiment_plans_at_equal_budgets"),
    Row("table 6", "relative or absolute difficulty", "05", "augmentation.RewardHistory",
        "core.augmentation.test_nothing_is_hard_or_easy_before_a_quarter_of_the_window"),
    Row("table 7", "hints alone, noise alone, both", "05", "augmentation.plan_augmentation",
        "core.augmentation.test_each_direction_alone_and_the_dead_zone"),
    Row("table 8", "fixed or adaptive scale", "05", "augmentation.plan_augmentation",
        "core.augmentation.test_a_fixed_scale_has_one_amount_for_each_direction_and_the_same_dead_zone"),
    Row("figure 2", "the augmentation: hints for hard, noise for easy", "03", "augmentation.cut_hint",
        "core.augmentation.test_a_hint_shows_the_first_words_rounded_up_and_blanks_for_the_others"),
    Row("figure 3", "how many groups vanish while training", "05", "advantages.vanishing_ratio",
        "core.advantages.test_the_vanishing_ratio_is_split_into_correct_and_incorrect_groups"),
    Row("appendix C", "settings", "04", "config.TrainConfig",
        "core.config.test_the_defaults_are_the_papers_settings_where_they_are_known"),
)


def numbers(text: str) -> set[int]:
    """The numbers in "3, 10", "8 and 18" or "10 to 14"."""
    found = {int(number) for number in re.findall(r"\d+", text)}
    for low, high in re.findall(r"(\d+)(?: to |-)(\d+)", text):
        found |= set(range(int(low), int(high) + 1))
    return found


def mentions(text: str, paper: str) -> bool:
    """Whether a Markdown text has this equation (as a tag or in words), table, figure or appendix."""
    kind, name = paper.split(" ")
    listed = r"\d+(?:(?:, | and | to )\d+)*(?![\d.])"
    if kind in ("table", "figure"):
        return any(int(name) in numbers(place) for place in re.findall(rf"(?i)\b{kind}s? ({listed})", text))
    if kind != "Eq.":
        return re.search(rf"(?i)\b{kind}s? {name}\b", text) is not None
    places = re.findall(rf"\\tag\{{({listed})\}}", text) + re.findall(rf"\bEq\. ({listed})", text)
    return any(int(name) in numbers(place) for place in places)


def section(row: Row) -> str | None:
    """Number of the section of the row's notebook where it comes first; "" before the first, None if nowhere.

    A cell with the equation's own tag, then a heading, counts before one that only speaks of it.
    """
    cells = nbformat.read(FOLDER / NOTEBOOKS[row.notebook], as_version=4).cells
    for where in (r"\\tag\{[^}]*\}", r"(?m)^##+ .*$", r"(?s).+"):
        current = ""
        for cell in cells:
            if cell.cell_type != "markdown":
                continue
            for part in re.split(r"(?m)^(?=## )", cell.source):
                heading = re.match(r"## (\d+)\.", part)
                current = heading[1] if heading else current
                if mentions(" ".join(re.findall(where, part)), row.paper):
                    return current
    return None


def line(row: Row) -> str:
    """One row in Markdown, with links from the notebooks' folder."""
    module, _, name = row.code.rpartition(".")
    folder, tests, test = row.test.split(".")
    where, again = section(row), f" (again {row.again})" if row.again else ""
    place = f"{row.notebook}, section {where}" if where else row.notebook
    place = f"[{place}]({NOTEBOOKS[row.notebook]})"
    return (f"| {row.paper}{again} | {row.what} | {place} "
            f"| [`{module}`](../dvr1_lite/{module.replace('.', '/')}.py) `.{name}` "
            f"| [`{tests}`](../tests/{folder}/test_{tests}.py) `{test.removeprefix('test_').replace('_', ' ')}` |")


def map_page() -> str:
    """The text of PAPER_MAP.md."""
    head = ["| paper | what | explained in | code | held by the test |", "| --- | --- | --- | --- | --- |"]
    return INTRODUCTION + "\n".join(head + [line(row) for row in ROWS]) + "\n" + LAST_WORDS


def reading_minutes(path: Path) -> dict[str, int]:
    """Minutes for the "Core" and the "Deeper" sections of a notebook: words at 200 a minute, a minute a code cell.

    The set-up cell, exercises and what follows them are not counted; what stands before section 1 is Core.
    """
    minutes, part = {"Core": 0.0, "Deeper": 0.0, "": 0.0}, "Core"
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code" and "setup" not in cell.metadata.get("tags", []):
            minutes[part] += MINUTES_A_CELL
        for piece in re.split(r"(?m)^(?=## )", cell.source) if cell.cell_type == "markdown" else ():
            if piece.startswith("## "):
                part = (re.findall(r"Core|Deeper", piece.split("\n")[0]) or [""])[0]
            minutes[part] += len(piece.split()) / WORDS_A_MINUTE
    return {name: round(minutes[name]) for name in ("Core", "Deeper")}


def stated_minutes(path: Path) -> dict[str, int]:
    """Minutes for the "Core" and the "Deeper" sections as a notebook's first table states them; 0 where it has none."""
    box = nbformat.read(path, as_version=4).cells[0].source
    return {"Core": 0, "Deeper": 0} | {part: int(n) for part, n in re.findall(r"\b(Core|Deeper) (\d+)", box)}


def plan_table() -> str:
    """The plan as it stands in notebook 00, with the minutes that the notebooks state."""
    lines = ["| notebook | you find out | Core, minutes | Deeper, minutes |", "| --- | --- | --- | --- |"]
    for number, name in NOTEBOOKS.items():
        core, deeper = (minutes or "-" for minutes in stated_minutes(FOLDER / name).values())
        lines.append(f"| [{number}]({name}) | {TOPICS[number]} | {core} | {deeper} |")
    return "\n".join(lines)


def plan_cell(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The cell of notebook 00 that holds the plan."""
    return next(cell for cell in notebook.cells if cell.source.startswith(PLAN_HEADING))


def main() -> None:
    MAP.write_text(map_page(), encoding="utf-8")
    notebook = nbformat.read(START, as_version=4)
    cell = plan_cell(notebook)
    cell.source = re.sub(r"(?m)(?:^\|.*\n?)+", lambda _: plan_table() + "\n", cell.source, count=1)
    nbformat.write(notebook, START)


if __name__ == "__main__":
    main()

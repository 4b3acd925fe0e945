r"""What is compared, as data: the paper's tables and figure 3, ablations, tuning; and how a recorded run is read.

An `Experiment` is a list of rows, each a few changes to one common config; a run is a row with a seed. The protocol is
`data/results/PROTOCOL.md`.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..config import TrainConfig, make_config
from ..errors import check_name
from ..objectives import METHODS

STEPS, PROMPTS, GROUP = 75, 8, 8
ROLLOUTS = STEPS * PROMPTS * GROUP  # completions a run, traces for hints and second samplings included
TUNE_ON = {"eval_files": ["tune=data/toyvideoqa/tune.jsonl"], "eval_limit": 0}
TUNE_SEED = 1000  # first seed of the tuning runs; no reported run has it
FAIR_ABSOLUTE = 0.7  # the base model's mean reward; at 0.5, the reward of a well-formed incorrect answer, none is hard
LEARNING_RATES = (1e-4, 3e-4, 1e-3)
KL_WEIGHTS = (0.001, 0.01, 0.1, 1.0)  # the gradients beside the KL term differ 400-fold between methods
AMOUNTS = ((0.3, 0.4), (0.6, 1.5), (1.0, 3.0))  # longest hint and noise scale of the augmented rows' grid
COMMON = {"steps": STEPS, "rollout_budget": ROLLOUTS, "prompts_per_step": PROMPTS, "group_size": GROUP,
          "learning_rate": 3e-4,  # for a method that is not in tuning.json
          "augment": "none", "eval_limit": 600, "figures": False, "save_every": 50, "keep_checkpoints": 1}
QUICK = {"steps": 6, "rollout_budget": 6 * PROMPTS * GROUP, "eval_limit": 60}
Settings = Mapping[str, Mapping[str, float]]  # `tuned_as` of a row -> its tuned config fields


@dataclass(frozen=True)
class Row:
    r"""A row: changes to the common config (values, or functions of the tuned settings), its name in the paper."""

    name: str
    changes: Mapping[str, Any | Callable[[Settings], Any]]
    published: str | None = None


@dataclass(frozen=True)
class Experiment:
    r"""Rows under one protocol.

    claims: pairs (row, rival), each the claim "row is better than rival"; together one family for Bonferroni's
    correction. equal: what all rows have the same number of, "rollouts" or "updates". published: a table of
    `paper_results.json`. outcomes: for claims that are not about accuracy, the metric at the end of training, and 1 if
    more is better, -1 if less is. primary: the accuracy that verdicts are about, "greedy" or "sampled" (temperature 1).
    condition: where the verdicts hold.
    """

    name: str
    question: str
    rows: tuple[Row, ...]
    claims: tuple[tuple[str, str], ...]
    seeds: int = 5
    first_seed: int = 0
    equal: str = "rollouts"
    published: str | None = None
    outcomes: Mapping[tuple[str, str], tuple[str, int]] = field(default_factory=dict)
    common: Mapping[str, Any] = field(default_factory=dict)
    primary: str = "greedy"
    condition: str = "tiny model, ToyVideoQA 2"


def _row(name: str, published: str | None = None, **changes) -> Row:
    return Row(name, changes, published)


def _reg_da(name: str, published: str | None = None, **changes) -> Row:
    return _row(name, published, **{"method": "reg-grpo", "augment": "both"} | changes)


def _against(row: str, *rivals: str) -> tuple[tuple[str, str], ...]:
    return tuple((row, rival) for rival in rivals)


def _unlimited(row: Row) -> Row:
    r"""Lift the budget of an augmented row, for equal updates; other rows reach both limits at the same step."""
    return replace(row, changes={**row.changes, "rollout_budget": None}) if "augment" in row.changes else row


def _several(name: str, question: str, key: str, values: Iterable[Any], default: Any, methods=("reg-grpo",),
             label: str | None = None, **fixed) -> Experiment:
    r"""Declare one field at several values, each against its default, for one or two methods."""
    rows, claims = [], []
    for method in methods:
        shown = "GRPO" if method == "grpo" else "Reg-GRPO"
        named = {value: f"{shown}, {label or key.replace('_', ' ')} {value}" for value in values}
        rows += [Row(named[value], {"method": method, key: value} | fixed) for value in named]
        claims += [(named[default], named[value]) for value in named if value != default]
    return Experiment(name, question, tuple(rows), tuple(claims))


def _kl_of_reg_grpo(settings: Settings) -> float:
    r"""Return Reg-GRPO's KL weight in GRPO's units; Reg-GRPO's first gradient is 2 / eps times the policy gradient."""
    return settings.get("reg-grpo", {}).get("beta", TrainConfig.beta) * TrainConfig.predicted_eps / 2


# --- the paper's tables ----------------------------------------------------------------------------------------------

GRPO, REG = _row("GRPO", "GRPO", method="grpo"), _row("Reg-GRPO", "Reg-GRPO", method="reg-grpo")
GRPO_DA = _row("GRPO + DA", "GRPO + DA-Aug", method="grpo", augment="both")
REG_DA = _reg_da("Reg-GRPO + DA", "Reg-GRPO + DA-Aug")
TABLE4 = (GRPO, GRPO_DA, REG, REG_DA)
TABLE4_CLAIMS = (("Reg-GRPO", "GRPO"), ("GRPO + DA", "GRPO"), ("Reg-GRPO + DA", "Reg-GRPO"), ("Reg-GRPO + DA", "GRPO"))
RIVALS = (*(_row(name, name, method=name.lower().replace(" ", "-")) for name in (
    "DPO", "Online DPO", "REINFORCE", "RLOO", "REBEL", "Reward-Regression")), GRPO)

PAPER = (
    Experiment("table4", "Do the regression and the augmentation each help, and together?", TABLE4, TABLE4_CLAIMS, 10,
               published="table_4_ablation"),
    Experiment("table5", "Is Reg-GRPO better than each other objective?", (*RIVALS, REG),
               _against("Reg-GRPO", *(row.name for row in RIVALS)), 10, published="table_5_rl_methods"),
    Experiment("table6", "Is difficulty better measured against recent rewards than against a fixed one?",
               (_reg_da("absolute", "Absolute", difficulty_reference="absolute", absolute_reward=FAIR_ABSOLUTE),
                _reg_da("relative", "Relative")),
               _against("relative", "absolute"), published="table_6_difficulty_reference"),
    Experiment("table7", "Does each direction of the augmentation help, and both more than one?",
               (_reg_da("none", "none", augment="none"),
                _reg_da("increasing only", "increasing only", augment="easy"),
                _reg_da("decreasing only", "decreasing only", augment="hard"),
                _reg_da("increasing + decreasing", "increasing + decreasing")),
               (*_against("increasing + decreasing", "none", "increasing only", "decreasing only"),
                ("increasing only", "none"), ("decreasing only", "none")),
               published="table_7_augmentation_types"),
    Experiment("table8", "Does the amount have to grow with the difficulty?",
               (_reg_da("none", "No Aug.", augment="none"), _reg_da("fixed", "Fixed", augment_scale="fixed"),
                _reg_da("adaptive", "Adaptive")),
               (("adaptive", "fixed"), ("adaptive", "none"), ("fixed", "none")),
               published="table_8_augmentation_scale"),
    Experiment("figure3", "Does the augmentation lower the share of vanishing groups, and is the reward higher?",
               tuple(map(_unlimited, (GRPO, GRPO_DA, REG_DA))),
               (("GRPO + DA", "GRPO"), ("Reg-GRPO + DA", "GRPO")), equal="updates",
               outcomes={("GRPO + DA", "GRPO"): ("vanishing_after", -1),
                         ("Reg-GRPO + DA", "GRPO"): ("reward_normalised", 1)}),
)

# --- beyond the paper ------------------------------------------------------------------------------------------------

CELL_SUCCESS = {"F2": "1 %", "F3": "0.1 %", "F4": "0.01 %", "A2": "1 %", "A3": "0.1 %"}
VARIANTS = {"plain": {"augment": "none"}, "resampled": {"augment": "resample"}, "hinted": {"augment": "both"},
            "only vanished": {"augment": "both", "hint_update": "only-vanished"},
            "kept": {"augment": "both", "hint_update": "kept"}, "mixed": {"augment": "both", "hint_update": "mixed"}}


def _phase(cell: str) -> Experiment:
    r"""Compare the variants of the augmentation where all questions have one success rate and one kind of deficit."""
    where = "deficit along the chain" if cell[0] == "F" else "deficit in the opening"
    rows = tuple(Row(name, {"method": "grpo"} | changes) for name, changes in VARIANTS.items())
    return Experiment(
        f"phase_{cell}", f"Which variant helps in cell {cell}?", rows,
        tuple((name, "plain") for name in list(VARIANTS)[1:]),
        common={"train_file": f"data/toyvideoqa/train_{cell}.jsonl", "beta": 0.1, "learning_rate": 3e-4,
                "eval_files": [f"cell=data/toyvideoqa/test_{cell}.jsonl"], "difficulty_reference": "absolute",
                "absolute_reward": 1.0, "hint_max": 0.6, "noise_scale": 0.4},
        primary="sampled", condition=f"tiny model, chain types with {where}, plain success {CELL_SUCCESS[cell]}")


PHASE = tuple(map(_phase, CELL_SUCCESS))

ROBUST = {"GRPO": {"method": "grpo"}, "GRPO, clip 0.2": {"method": "grpo", "clip_eps": 0.2},
          "GRPO, normalised gradient": {"method": "grpo", "max_grad_norm": 0.02},
          "GSPO": {"method": "grpo", "ratio_level": "sequence", "clip_eps": 0.2},
          "Reg-GRPO, eps 0.1": {"method": "reg-grpo"},
          "Reg-GRPO, eps 0.01": {"method": "reg-grpo", "predicted_eps": 0.01},
          "Centred regression": {"method": "centred-regression"}}
BEYOND = (
    Experiment("variants", "Which variant of the augmentation helps where all types of question are mixed?",
               tuple(Row(f"{shown}, {name}", {"method": method} | changes)
                     for method, shown in (("grpo", "GRPO"), ("reg-grpo", "Reg-GRPO"))
                     for name, changes in VARIANTS.items()),
               tuple((f"{shown}, {name}", f"{shown}, plain") for shown in ("GRPO", "Reg-GRPO")
                     for name in list(VARIANTS)[1:])),
    Experiment("robust", "When does Reg-GRPO differ from GRPO: inner updates x learning rate x method",
               tuple(Row(f"{name}; {inner} updates; learning rate {rate:g}",
                         changes | {"inner_updates": inner, "learning_rate": rate})
                     for inner in (1, 4, 16) for rate in LEARNING_RATES for name, changes in ROBUST.items()),
               (), 3, common={"rollout_budget": ROLLOUTS // 2}),  # 16 updates a batch cost four times as much
)

# --- student projects: declared for notebook 05, not part of the protocol ---------------------------------------------

PROJECTS = (
    Experiment("centred", "Does the regression profit from a trust region?",
               (REG, _row("Centred regression", method="centred-regression"), GRPO),
               (("Centred regression", "Reg-GRPO"), ("Centred regression", "GRPO"))),
    Experiment("scale", "Is Reg-GRPO more than GRPO with another KL weight and another sum over tokens?",
               (REG, _row("GRPO, sum", method="grpo", logp_reduction="sum"),
                _row("GRPO, matched KL", method="grpo", beta=_kl_of_reg_grpo),
                _row("GRPO, sum, matched KL", method="grpo", logp_reduction="sum", beta=_kl_of_reg_grpo)),
               _against("Reg-GRPO", "GRPO, sum", "GRPO, matched KL", "GRPO, sum, matched KL")),
    _several("eps", "How much does the epsilon of Eq. 7 matter?", "predicted_eps", (0.01, 0.1, 1.0), 0.1, label="eps"),
    _several("inner", "Does Reg-GRPO become its own method with more inner updates?", "inner_updates", (1, 2, 4, 8), 4,
             ("reg-grpo", "grpo")),
    _several("kl", "Does Reg-GRPO need a larger KL weight than GRPO?", "beta", (0.0, 0.002, 0.02, 0.1, 1.0), 0.1,
             ("reg-grpo", "grpo")),
    _several("clip", "What does clipping bring to GRPO?", "clip_eps", (0.2, None), 0.2, ("grpo",)),
    _several("window", "How long should the reward history be?", "history_window", (25, 100, 400), 100, label="W",
             augment="both"),
    Experiment("group", "How large should a group be, at the same number of rollouts?",
               tuple(_row(f"{shown}, G {size}", method=method, group_size=size, prompts_per_step=64 // size)
                     for method, shown in (("reg-grpo", "Reg-GRPO"), ("grpo", "GRPO")) for size in (4, 8, 16)),
               tuple((f"{shown}, G 8", f"{shown}, G {size}") for shown in ("Reg-GRPO", "GRPO") for size in (4, 16))),
    _several("easy", "Noise or masked frames for easy prompts?", "easy_kind", ("noise", "mask"), "noise",
             augment="easy"),
    Experiment("hint", "How much of a trace should a hint reveal?",
               (*(_reg_da(f"at most {share}", augment="hard", hint_max=share) for share in (0.3, 0.6, 1.0)),
                _reg_da("fixed, 0.32", augment="hard", augment_scale="fixed"),
                _reg_da("probed", augment="hard", hint_probe=True)),
               _against("at most 0.6", "at most 0.3", "at most 1.0", "fixed, 0.32", "probed")),
    _several("std", "Does the convention of the standard deviation matter?", "advantage_std",
             ("population", "sample", "none"), "population", ("reg-grpo", "grpo")),
    _several("reduction", "Sum or mean of the log-probs over tokens?", "logp_reduction", ("sum", "mean"), "sum"),
    _several("masking", "Should groups without reward spread stay in the regression?", "mask_vanished", (True, False),
             True),
)


def weight_of(method: str) -> str:
    r"""Return the config field that is a method's KL strength."""
    return "dpo_beta" if method in ("dpo", "online-dpo") else "beta"


def tuned_as(config: Mapping[str, Any]) -> str:
    r"""Name the tuned setting that a row takes: its method's, or for augmented rows that of method and variant."""
    if config.get("augment", "none") in ("none", "resample"):
        return config["method"]
    return f"{config['method']}, {'mixed' if config.get('hint_update') == 'mixed' else 'hinted'}"


def _tune(name: str, methods: Iterable[str]) -> Experiment:
    rows = tuple(Row(f"{method}, {weight_of(method)} {weight:g}, learning rate {rate:g}",
                     {"method": method, "learning_rate": rate, weight_of(method): weight})
                 for method in methods for weight in KL_WEIGHTS for rate in LEARNING_RATES)
    return Experiment(name, "Which learning rate and KL weight does each method get?", rows, (), 1, TUNE_SEED,
                      common=TUNE_ON)


TUNING = (
    _tune("tune", ("grpo", "reg-grpo")),
    Experiment("tune_augmented", "Which learning rate and amounts does each augmented row get?", tuple(
        Row(f"{method}, {variant}, hints to {hint:g}, noise {noise:g}, learning rate {rate:g}",
            {"method": method, "learning_rate": rate, "hint_max": hint, "noise_scale": noise} | VARIANTS[variant])
        for variant in ("hinted", "mixed") for method in ("grpo", "reg-grpo") for hint, noise in AMOUNTS
        for rate in LEARNING_RATES), (), 1, TUNE_SEED, common=TUNE_ON),
    _tune("tune_rivals", (method for method in METHODS if method not in ("grpo", "reg-grpo"))))
EXPERIMENTS = {experiment.name: experiment for experiment in (*PAPER, *PHASE, *BEYOND, *PROJECTS, *TUNING)}
GROUPS = {"all": tuple(e.name for e in PAPER), "phase": tuple(e.name for e in PHASE),
          "projects": tuple(e.name for e in PROJECTS)}


def find_experiments(name: str) -> list[Experiment]:
    r"""Return the experiment of that name, or those of `all`, `phase` or `projects`. Raises `ConfigError`."""
    check_name("experiment", name, [*EXPERIMENTS, *GROUPS])
    return [EXPERIMENTS[one] for one in GROUPS.get(name, (name,))]


def row_config(experiment: Experiment, row: Row, seed: int, settings: Settings, quick: bool = False,
               extra: Mapping[str, Any] | None = None) -> TrainConfig:
    r"""Return a run's config: the common one, changed by the row's tuned settings, by the experiment's own, by the row,
    then by `quick` and `extra`. A row without a budget keeps none; `quick` then limits its steps alone."""
    changes = {key: value(settings) if callable(value) else value for key, value in row.changes.items()}
    tuned = {**settings.get(changes["method"], {}), **settings.get(tuned_as(changes), {})}
    values = COMMON | tuned | dict(experiment.common) | changes
    if quick:
        values |= QUICK if values["rollout_budget"] else QUICK | {"rollout_budget": None}
    return make_config(values | dict(extra or {}) | {"seed": seed, "out": "runs/reproduce"})


# --- recorded runs ---------------------------------------------------------------------------------------------------


def read_runs(results: str | Path) -> dict[str, dict]:
    r"""Read all recorded runs below a results folder: path in it (`table4/grpo_seed0_....json`) -> content."""
    results = Path(results)
    return {path.relative_to(results).as_posix(): json.loads(path.read_text(encoding="utf-8"))
            for path in sorted(results.glob("*/*_seed*.json"))}


def pack(rows: Sequence[Mapping]) -> str | list[float | None]:
    r"""Pack the accuracy of each question, in the order of the records file: one digit each if all are 0 or 1, "x" for
    a clip that could not be read; else a list. rows: as `evaluation.evaluate` returns them."""
    values = defaultdict(list)
    for row in rows:
        values[row["index"]] += [row["accuracy"]] if "error" not in row else []
    means = [sum(v) / len(v) if v else None for _, v in sorted(values.items())]
    if all(mean in (0.0, 1.0, None) for mean in means):
        return "".join("x" if mean is None else str(int(mean)) for mean in means)
    return [None if mean is None else round(mean, 4) for mean in means]


def dump(content: Mapping, rounded: Callable[[float], float]) -> str:
    r"""Write JSON with a line for each entry and floats through `rounded` (NaN and infinity: null): short files."""
    plain = json.loads(json.dumps(content), parse_float=lambda x: rounded(float(x)), parse_constant=lambda x: None)
    return "{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in plain.items()) + "\n}\n"


def unpack(answers: str | Sequence[float | None]) -> list[float | None]:
    r"""Return the accuracy of each question, None where the clip could not be read; the inverse of `pack`."""
    return [None if mark in ("x", None) else float(mark) for mark in answers]

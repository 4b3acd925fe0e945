r"""The configuration of a training run: every setting once, read from YAML files and command-line overrides.

Each idea has a dataclass of its own settings, which its code takes; `TrainConfig` inherits them all and is flat.
`python -m dvr1_lite train --help` prints all of them with unit and paper
value, `configs/lite.yaml` has the defaults written out. An unknown key is an error, never ignored.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .errors import ConfigError
from .settings import check_settings, field_types, setting

CONFIGS = Path(__file__).parent / "configs"
MAX_YAML_BYTES = 2**20
MAX_YAML_DEPTH = 20
WITHDRAWN = {"attention": "sdpa"}  # keys of older files, each with the one value that is still what happens
OUT_OF_SCOPE = "does not apply"
DPO_METHODS = ("dpo", "online-dpo")  # their loss holds its own KL term


@dataclass(frozen=True)
class ModelConfig:
    r"""Which model runs, in which number type, and with how much memory."""

    model: str = setting("data/base_model", "Base model: a folder, or an id on the hub.", "path or id",
                         "Qwen2.5-VL-3B-Instruct")
    quantization: str = setting("nf4", "Quantization of the language model's frozen weights.", "name",
                                "not given for its GPUs", ("none", "nf4"))
    dtype: str = setting("float32", "Number type of the frozen weights and of the computation.", "name",
                         choices=("float32", "float64", "bfloat16", "float16"))
    device: str = setting("cpu", "Where to run: cpu, cuda, or cuda:N.", "name", "A100 (3B), H200 (7B)")
    after_video: str = setting("grid", "Position of the first text token after a video: as transformers 5.3 and later "
                               "count it (grid), or as Qwen's own code does (max). With Qwen3-VL, max leaves out the "
                               "vision tokens that transformers 5 keeps around a whole video.", "name",
                               choices=("grid", "max"))
    gradient_checkpointing: bool = setting(False, "Recompute each layer in the backward pass: less memory, more time, "
                                           "the same numbers.", "true or false")
    local_files_only: bool = setting(False, "Never contact the hub, not even to look for a newer version.",
                                     "true or false", "does not apply")
    lora_rank: int = setting(16, "Rank of the adapters on every linear layer of the language model.", "dimensions",
                             "the whole language model is trained", above=0, below=16385)
    lora_alpha: float = setting(32.0, "The adapters' update is scaled by alpha / rank.", "no unit",
                                "the whole language model is trained", above=0)
    feature_cache_mb: int = setting(256, "Memory for the features of encoded clips.", "megabytes", above=0)
    feature_folder: str | None = setting(None, "Folder that keeps encoded clips between runs; none: memory only.",
                                         "path", "does not apply")
    merge_mb: int = setting(256, "Memory for dense copies of the language model's weights while sampling; with less "
                            "than they need, sampling is slower.", "megabytes", above=0)


@dataclass(frozen=True)
class DataConfig:
    r"""Which records are trained on and evaluated, and how they are shown."""

    train_file: str = setting("data/toyvideoqa/train.jsonl", "Records to train on.", "path", "SEED-Bench-R1, 6k")
    eval_files: list[str] = setting([f"{name}=data/toyvideoqa/{name}.jsonl" for name in ("L1", "L2", "L3")],
                                    "Records to evaluate on before and after, each as NAME=FILE (a mapping in YAML); "
                                    "empty: no evaluation.", "names and paths", "SEED-Bench-R1 L1, L2, L3")
    data_root: str | None = setting(None, "Folder that the clips' paths start from; none: each records file's own.",
                                    "path", OUT_OF_SCOPE)
    instruction: str = setting("", "A last line for every prompt, for models that do not know the format yet.", "text")


@dataclass(frozen=True)
class VideoConfig:
    r"""How clips and pictures are read."""

    num_frames: int = setting(8, "Frames sampled from a clip, evenly in time; of an odd number the last is shown "
                              "twice, for the models read frames in pairs.", "frames", "at most 16", at_least=1)
    frame_size: int = setting(56, "Height and width that frames are resized to.", "pixels", "252", at_least=1)
    decode_timeout: float = setting(60.0, "A clip whose decoding takes longer is skipped and counted as broken.",
                                    "seconds", "does not apply", above=0)
    video_backend: str = setting("auto", "Video decoder: auto and decord use decord for the files that it reads "
                                 "correctly and PyAV for the others; decord demands that it is installed; pyav uses "
                                 "PyAV only.", "name", "does not apply", ("auto", "decord", "pyav"))


@dataclass(frozen=True)
class RewardConfig:
    r"""How answers are judged."""

    judge: str = setting("strict", "Accepted for choice B. strict: B, B. and (B); first-letter: all that begins with B "
                         "or (B, as SEED-Bench-R1 has it.", "name", choices=("strict", "first-letter"))
    reward: str = setting("", "A reward of your own, FILE.py:function, instead of accuracy and IoU; it takes (record, "
                          "completion) and returns 0 to 1. Your code runs, so only a command line can name it; empty: "
                          "built in.", "file and function", OUT_OF_SCOPE)
    reward_errors: str = setting("stop", "Where your reward fails or returns no number from 0 to 1. stop: the run "
                                 "ends; skip: the completion gets 0 for it and is counted.", "name", OUT_OF_SCOPE,
                                 ("stop", "skip"))


@dataclass(frozen=True)
class ObjectiveConfig:
    r"""Settings of the objectives, checked by `check_settings` and `check_group_size`."""

    method: str = setting("reg-grpo", "Training objective.", "name", "reg-grpo", (
        "grpo", "reg-grpo", "reinforce", "rloo", "rebel", "reward-regression", "centred-regression", "dpo",
        "online-dpo"))
    beta: float = setting(0.1, "Weight of the KL term.", "loss per nat", "0.1; 1.0 for figure 3", at_least=0)
    kl_estimator: str = setting("k3", "Estimator of the KL.", "name", choices=("k1", "k2", "k3"))
    logp_reduction: str = setting("auto", "Log-probs over a completion's tokens; auto: mean for grpo, sum for others.",
                                  "name", "mean in Eq. 2, sum in Eq. 7", ("auto", "sum", "mean"))
    predicted_eps: float = setting(0.1, "Added to the std of the log-ratios (Eq. 7); reg-grpo's first gradient is "
                                   "proportional to 2 / this.", "nats", above=0)
    advantage_eps: float = setting(1e-4, "Added to the std of a group's rewards (Eq. 5).", "reward", at_least=0)
    advantage_std: str = setting("population", "Std of the advantages (Eq. 5).", "name",
                                 choices=("population", "sample", "none"))
    mask_vanished: bool = setting(True, "reg-grpo: leave groups without reward spread out.", "true or false")
    clip_eps: float | None = setting(None, "grpo, reinforce, rloo: clip ratios to 1 +- this; none: no clipping.",
                                     "no unit", "none (appendix C.1)", above=0)
    ratio_level: str = setting("token", "grpo: one ratio for each token or for each sequence.", "name", "token (Eq. 2)",
                               ("token", "sequence"))
    reward_lambda: float = setting(0.5, "lambda of rebel and of reward- and centred-regression (Eq. 3 and 6).",
                                   "reward per nat", above=0)
    dpo_beta: float = setting(0.1, "KL strength inside the loss of dpo and online-dpo.", "1 / nats", above=0)

    @property
    def reduction(self) -> str:
        r"""The token reduction, "sum" or "mean", with "auto" resolved."""
        auto = "mean" if self.method == "grpo" else "sum"
        return auto if self.logp_reduction == "auto" else self.logp_reduction


@dataclass(frozen=True)
class LoopConfig:
    r"""How many prompts, completions and updates a step has, and what the optimizer does."""

    group_size: int = setting(8, "Completions sampled for a prompt, G.", "completions", "8", at_least=1, below=4097)
    prompts_per_step: int = setting(8, "Prompts, and so groups, of a step.", "prompts", at_least=1, below=65537)
    steps: int = setting(150, "Steps; each samples a batch of groups once. 0: evaluate the base model only.", "steps",
                         at_least=0)
    rollout_budget: int | None = setting(None, "Stop before the first step that begins with this many completions "
                                         "sampled, for comparisons at equal rollouts; none: no limit.", "completions",
                                         at_least=1)
    inner_updates: int = setting(4, "Updates of the weights on each batch of rollouts.", "updates", at_least=1)
    micro_batch: int | None = setting(None, "Completions whose activations are held at a time; the gradient does not "
                                      "depend on it; none: all at once.", "completions", at_least=1)
    sample_batch: int | None = setting(None, "Prompts whose groups are sampled together; fewer take less memory and "
                                       "more time; none: all of a step.", "prompts", at_least=1)
    temperature: float = setting(1.0, "Temperature of sampling and of all log-probs.", "no unit", above=0)
    max_new_tokens: int = setting(32, "Longest completion, with its end token.", "tokens", at_least=1, below=32769)
    learning_rate: float = setting(3e-4, "Learning rate of AdamW.", "per update", above=0)
    warmup_steps: int = setting(0, "Steps over which the learning rate rises linearly; constant afterwards.", "steps",
                                at_least=0)
    optimizer: str = setting("adamw", "AdamW with moments as wide as the weights, with 8-bit moments, or with 8-bit "
                             "moments that move to the computer's memory when the GPU's runs short.", "name",
                             choices=("adamw", "adamw-8bit", "paged-adamw-8bit"))
    adam_beta1: float = setting(0.9, "Decay of AdamW's mean of gradients.", "no unit", at_least=0, below=1)
    adam_beta2: float = setting(0.95, "Decay of AdamW's mean of squared gradients.", "no unit", at_least=0, below=1)
    adam_eps: float = setting(1e-8, "Added to AdamW's root of squared gradients.", "gradient", above=0)
    weight_decay: float = setting(0.0, "Weight decay of AdamW.", "per update and learning rate", at_least=0)
    max_grad_norm: float = setting(1.0, "Longer gradients are scaled down to this norm.", "gradient", above=0)


@dataclass(frozen=True)
class AugmentationConfig:
    r"""Which prompts are augmented, and how much."""

    history_window: int = setting(100, "Groups whose mean rewards the history holds, W.", "groups",
                                  "100 samples in C.1, steps in section 3.3", at_least=1)
    difficulty_reference: str = setting("relative", "Compare with the history's mean or a fixed reward (table 6).",
                                        "name", "relative", ("relative", "absolute"))
    absolute_reward: float = setting(0.5, "Fixed reward of the absolute reference.", "share of the largest reward",
                                     at_least=0)
    augment: str = setting("both", "Prompts that are augmented (table 7); resample: the control, which samples the "
                           "prompts of both again, unchanged.", "name", "both",
                           ("both", "hard", "easy", "none", "resample"))
    augment_scale: str = setting("adaptive", "Amounts that grow with |dR|, or fixed ones (table 8).", "name",
                                 "adaptive", ("adaptive", "fixed"))
    fixed_difficulty: float = setting(0.5, "The |dR| that sets fixed amounts.", "share of the largest reward", above=0)
    dead_zone: float = setting(0.1, "No augmentation for |dR| up to this.", "share of the largest reward",
                               at_least=0, below=1)
    easy_kind: str = setting("noise", "Change to the frames of easy prompts.", "name", "noise", ("noise", "mask"))
    noise_scale: float = setting(0.4, "Sigma of the noise per |dR|, for pixels in [0, 1]; with mask, share of frames "
                                 "per |dR|.", "pixel value or share", at_least=0)
    hint_min: float = setting(0.1, "Share of a trace that a hint reveals at the dead zone's edge.", "share of words",
                              at_least=0)
    hint_max: float = setting(0.6, "Share of a trace that a hint reveals at dR = 1.", "share of words", at_least=0)
    hint_traces: int = setting(4, "Traces written with the answer shown, of which one becomes the hint.", "completions",
                               "several", at_least=1)
    hint_probe: bool = setting(False, "Find a hint's share by trying several, on hint_traces completions each.",
                               "true or false", "from dR")
    hint_update: str = setting("hinted", "What a hinted group is trained on. hinted: the hinted prompt. unhinted: its "
                               "completions with the original prompt. mixed: the original group, correct hinted "
                               "completions in place of incorrect ones, at most half of it. only-vanished: the hinted "
                               "prompt, only where the original group vanished. kept: both groups.", "name",
                               "hinted, in our reading of figure 2",
                               ("hinted", "unhinted", "mixed", "only-vanished", "kept"))

    @property
    def variant(self) -> str:
        r"""The name of the augmentation that is asked for, as `lab/variants.py` lists them."""
        return "resample" if self.augment == "resample" else "probed" if self.hint_probe else self.hint_update


@dataclass(frozen=True)
class EvaluationConfig:
    r"""How questions are answered before and after training."""

    eval_before: bool = setting(True, "Evaluate the base model before training.", "true or false", OUT_OF_SCOPE)
    eval_limit: int = setting(0, "Questions of each file, drawn once for all runs; 0: all.", "questions", "all",
                              at_least=0)
    eval_temperature: float = setting(0.0, "Temperature of the answers; 0: the most probable token.", "no unit",
                                      at_least=0)
    eval_samples: int = setting(1, "Answers to each question.", "completions", "1", at_least=1)
    eval_batch: int = setting(256, "Questions answered together.", "questions", at_least=1)
    eval_sampled_limit: int = setting(0, "Questions of each file that are also answered at temperature 1; 0: none.",
                                      "questions", OUT_OF_SCOPE, at_least=0)


@dataclass(frozen=True)
class RunConfig:
    r"""The seed of a run, where it writes, and what it tolerates."""

    seed: int = setting(0, "Seed of the adapters, the order of the records, sampling and noise.", "no unit",
                        "single runs", at_least=0, below=2**63)
    out: str = setting("runs/lite", "Folder for everything the run writes.", "path", OUT_OF_SCOPE)
    save_every: int = setting(50, "Steps between checkpoints.", "steps", at_least=1)
    keep_checkpoints: int = setting(2, "Checkpoints kept, the newest.", "checkpoints", at_least=1)
    max_broken_share: float = setting(0.05, "The run fails once more than this share of the records it tried have "
                                      "clips that cannot be read (of at least 100 tries).", "share", OUT_OF_SCOPE,
                                      at_least=0, below=1)
    threads: int | None = setting(None, "Threads of torch on a CPU; none: OMP_NUM_THREADS, else 1 for a small model "
                                  "(the fastest there) and torch's choice for others.", "threads", OUT_OF_SCOPE,
                                  at_least=1)
    check_memory: bool = setting(True, "On a GPU: refuse a run that is predicted to need more memory than it has.",
                                 "true or false", OUT_OF_SCOPE)
    tracker: str = setting("none", "Where metrics go besides metrics.jsonl.", "name", choices=("none", "tensorboard"))
    figures: bool = setting(True, "Draw figures at the end.", "true or false", OUT_OF_SCOPE)


@dataclass(frozen=True)
class TrainConfig(RunConfig, EvaluationConfig, AugmentationConfig, LoopConfig, ObjectiveConfig, RewardConfig,
                  VideoConfig, DataConfig, ModelConfig):
    r"""All settings of a training run, flat. Raises `ConfigError` for an impossible value."""

    def __post_init__(self) -> None:
        check_settings(self)
        check_group_size(self.method, self.group_size)
        limits = {"absolute_reward": 1, "fixed_difficulty": 1, "hint_max": 1, "hint_min": self.hint_max}
        for name, limit in limits.items():
            if getattr(self, name) > limit:
                raise ConfigError(f"{name} is {getattr(self, name)!r}: give a share of at most {limit}")
        self.eval_paths()

    def eval_paths(self) -> dict[str, str]:
        r"""Return `eval_files` as a dict from name to path."""
        paths = {}
        for entry in self.eval_files:
            name, equals, path = entry.partition("=")
            if not (name and equals and path) or "/" in name or name in paths:
                raise ConfigError(f"eval_files has the entry {entry!r}: write each as NAME=FILE with names of their "
                                  f"own, such as L1=data/toyvideoqa/L1.jsonl")
            paths[name] = path
        return paths


def check_group_size(method: str, group_size: int) -> None:
    r"""Raise `ConfigError` if a group of this size gives the method no signal: below 1 for reinforce, 2 for others."""
    least = 1 if method == "reinforce" else 2
    if group_size < least:
        raise ConfigError(f"group_size is {group_size}, too small for {method}: give at least {least}")


# The parts of `train --help` and of YAML files: title, and the dataclass whose fields it lists.
PARTS = {"The model": ModelConfig, "The data": DataConfig, "The clips": VideoConfig, "The reward": RewardConfig,
         "The objective": ObjectiveConfig, "The loop": LoopConfig, "Difficulty and augmentation": AugmentationConfig,
         "Evaluation": EvaluationConfig, "The run": RunConfig}


# --- reading and writing ---------------------------------------------------------------------------------------------


def make_config(values: Mapping[str, Any]) -> TrainConfig:
    r"""Build a config from a YAML file's mapping. Raises `ConfigError`, with near matches for unknown keys."""
    known = {name: value for name, value in values.items() if (name, value) not in WITHDRAWN.items()}
    check_keys(known)
    return TrainConfig(**{name: _coerce(name, value) for name, value in known.items()})


def check_keys(names: Iterable[str], extra: Iterable[str] = ()) -> None:
    r"""Raise `ConfigError` for the first name that is no field (nor one of `extra`), with near matches."""
    known = [*field_types(TrainConfig), *extra]
    for name in names:
        if name in WITHDRAWN:
            raise ConfigError(f"the config key {name!r} is withdrawn, and its only remaining value is "
                              f"{WITHDRAWN[name]!r}: leave it out")
        if name not in known:
            initials = [key for key in known if "".join(word[0] for word in key.split("_")) == name]  # lr
            near = initials or difflib.get_close_matches(str(name), known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "`train --help` lists all keys"
            raise ConfigError(f"unknown config key {name!r}: {hint}")


def _coerce(name: str, value: Any) -> Any:
    r"""Convert what YAML reads differently: 1e-3 without a point is a text there, a float may be a whole number."""
    kind, optional = field_types(TrainConfig)[name]
    if isinstance(value, str) and optional and value.lower() in ("none", "null"):
        return None
    if kind is float and isinstance(value, (str, int)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            return value
    if kind is list and isinstance(value, Mapping):
        return [f"{key}={item}" for key, item in value.items()]
    return [] if kind is list and value is None else value


def shipped_configs() -> dict[str, Path]:
    r"""List the configurations in `dvr1_lite/configs/` by name."""
    other = ("cards", "full_scale", "recommendation")
    return {path.stem: path for path in sorted(CONFIGS.glob("*.yaml")) if path.stem not in other}


def card_settings(card: int, model: str, bfloat16: bool = True) -> dict[str, Any]:
    r"""Return what `configs/cards.yaml` changes for a model on a GPU with so many GB. Raises `ConfigError`.

    model: its hub id, or a local folder of the same name, such as ./models/Qwen3-VL-4B-Instruct.
    bfloat16: whether the GPU computes in it; without it the number type is float32, and a card of 16 GB is a T4.
    """
    entry = _card(card, bfloat16)
    own = next((values for name, values in entry.items() if "/" in name and Path(name).name == Path(model).name), {})
    return entry["all"] | own | ({} if bfloat16 else {"dtype": "float32"})


def card_gb(card: int, bfloat16: bool = True) -> float:
    r"""Return the memory of such a GPU in 2**30 bytes, as its driver reports it."""
    return _card(card, bfloat16)["memory_gb"]


def _card(card: int, bfloat16: bool) -> dict[str, Any]:
    cards = yaml.safe_load((CONFIGS / "cards.yaml").read_text(encoding="utf-8"))
    if card not in cards:
        raise ConfigError(f"there are no settings for a card with {card} GB: choose one of "
                          f"{', '.join(map(str, cards))}, the largest that is not larger than yours")
    return cards[card] if bfloat16 else cards[cards[card].get("without_bfloat16", card)]


def read_yaml(path: str | Path) -> dict[str, Any]:
    r"""Read the mapping in a YAML file, or in the shipped config of that name, by `yaml.safe_load`.

    `extends: NAME` puts the file's lines on top of those of another one in `dvr1_lite/configs/`.
    Raises `ConfigError` if there is none, or for a file over 1 MB or with aliases, of which a few lines can stand for
    gigabytes.
    """
    if not Path(path).exists():
        known, name = shipped_configs(), str(path).removesuffix(".yaml")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            raise ConfigError(f"config {path} cannot be read (no such file): " + (
                f"did you mean {near[0]}?" if near else f"give a YAML file, or one of {', '.join(known)}"))
        path = known[name]
    try:
        if Path(path).stat().st_size > MAX_YAML_BYTES:
            raise ConfigError(f"config {path} is larger than {MAX_YAML_BYTES} bytes: give a config, not a data set")
        text = Path(path).read_text(encoding="utf-8")
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent):
                raise ConfigError(f"config {path} has an alias (*name): write the value itself")
            if depth > MAX_YAML_DEPTH:
                raise ConfigError(f"config {path} is nested {depth} levels deep: write one `key: value` a line")
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path} cannot be read ({_reason(error)}): check the path") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"config {path} is not valid YAML ({_reason(error)}): write one `key: value` a "
                          f"line") from error
    if values is None:
        raise ConfigError(f"config {path} is empty: write `key: value` lines, see dvr1_lite/configs/lite.yaml")
    if not isinstance(values, dict):
        raise ConfigError(f"config {path} holds a {type(values).__name__}, not `key: value` lines: see "
                          f"dvr1_lite/configs/lite.yaml")
    base = values.pop("extends", None)
    if base is not None and base not in (known := ["full_scale", *shipped_configs()]):
        raise ConfigError(f"config {path} extends {base!r}: name one of {', '.join(known)}")
    return values if base is None else read_yaml(CONFIGS / f"{base}.yaml") | values


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error).replace(' in "<unicode string>",', "")
    return " ".join(text.split())[:160]


def load_config(path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> TrainConfig:
    r"""Take the defaults, changed by a YAML file, changed by `overrides`. Raises `ConfigError`."""
    values = {} if path is None else read_yaml(path)
    try:
        check_keys(name for name in values if name not in WITHDRAWN)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return make_config(values | dict(overrides or {}))


def to_yaml(config: TrainConfig) -> str:
    r"""Write the config as YAML text that `load_config` reads back, each field under its help text."""
    lines = []
    for title, part in PARTS.items():
        lines.append(f"# --- {title} ---\n")
        for field in dataclasses.fields(part):
            value = config.eval_paths() if field.name == "eval_files" else getattr(config, field.name)
            entry = yaml.safe_dump({field.name: value}, sort_keys=False, allow_unicode=True, width=10**6)
            lines += [f"# {field.metadata['help']}", entry]
    return "\n".join(lines)

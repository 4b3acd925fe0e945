r"""The one configuration of a training run: a flat frozen dataclass, read from YAML files and command-line overrides.

Every number that changes a run stands here, with its unit and the paper's value; `python -m dvr1_lite train --help`
prints them, `dvr1_lite/configs/lite.yaml` has the defaults written out. An unknown key is an error, never ignored.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .augmentation import EASY_KINDS, HINT_UPDATES, SCALES, AugmentationConfig, validate_augmentation
from .advantages import STD_KINDS
from .difficulty import RewardHistory
from .errors import ConfigError
from .evaluation import View
from .objectives import KL_ESTIMATORS, METHODS, RATIO_LEVELS, REDUCTIONS, ObjectiveConfig, validate_objective
from .video import DECODE_TIMEOUT

AUGMENT = ("both", "hard", "easy", "none", "resample")
OPTIMIZERS = ("adamw", "adamw-8bit", "paged-adamw-8bit")
NOT_GIVEN = "not given"
CONFIGS = Path(__file__).parent / "configs"
MAX_YAML_BYTES = 2**20


def setting(default: Any, text: str, unit: str, paper: str, choices: Sequence[str] | None = None) -> Any:
    r"""A field of the config: its default, what it does, its unit and the paper's value."""
    metadata = {"help": f"{text} [{unit}; paper: {paper}]"}
    if choices is not None:
        metadata["choices"] = list(choices)
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    r"""A training run. The fields' help texts say what each does; raises `ConfigError` for an impossible value."""

    # The model
    model: str = setting("data/base_model", "Base model: a folder, or an id on the hub.", "path or id",
                         "Qwen2.5-VL-3B-Instruct")
    quantization: str = setting("nf4", "Quantisation of the frozen weights of the language model.", "name",
                                "not said for its GPUs", ("none", "nf4"))
    dtype: str = setting("float32", "Number type of the frozen weights and of the computation.", "name", NOT_GIVEN,
                         ("float32", "bfloat16", "float16", "float64"))
    device: str = setting("cpu", "Where to run: cpu, cuda, or cuda:N.", "name", "A100 (3B), H200 (7B)")
    attention: str = setting("sdpa", "Implementation of attention.", "name", NOT_GIVEN,
                             ("sdpa", "eager", "flash"))
    after_video: str = setting("grid", "Position of the text after a video: as transformers 5.3 and later have it "
                               "(grid), or as Qwen's own code has it (max).", "name", NOT_GIVEN, ("grid", "max"))
    gradient_checkpointing: bool = setting(False, "Recompute layers in the backward pass: less memory, more time, the "
                                           "same numbers.", "true or false", NOT_GIVEN)
    local_files_only: bool = setting(False, "Never ask the hub, not even for a newer version.", "true or false",
                                     "does not apply")
    lora_rank: int = setting(16, "Rank of the adapters on every linear layer of the language model.", "dimensions",
                             "the whole language model is trained")
    lora_alpha: float = setting(32.0, "The adapters' update is scaled by alpha / rank.", "no unit",
                                "the whole language model is trained")

    # The data
    train_file: str = setting("data/toyvideoqa/train.jsonl", "Records to train on.", "path", "SEED-Bench-R1, 6k")
    eval_files: list[str] = setting([f"{name}=data/toyvideoqa/{name}.jsonl" for name in ("L1", "L2", "L3")],
                                    "Records to evaluate on before and after, each as NAME=FILE (a mapping in YAML); "
                                    "empty: no evaluation.", "names and paths", "SEED-Bench-R1 L1, L2, L3")
    data_root: str | None = setting(None, "Folder that the clips' paths start from; none: each records file's own.",
                                    "path", "does not apply")
    num_frames: int = setting(8, "Frames sampled from a clip, evenly.", "frames", "at most 16")
    frame_size: int = setting(56, "Height and width that frames are resized to.", "pixels", "252")
    instruction: str = setting("", "A last line for every prompt, for models that do not know the format yet.", "text",
                               NOT_GIVEN)

    # The objective
    method: str = setting("reg-grpo", "Objective.", "name", "reg-grpo", tuple(METHODS))
    beta: float = setting(0.1, "Weight of the KL term towards the reference.", "loss per nat", "0.1; 1.0 for figure 3")
    kl_estimator: str = setting("k3", "Estimator of the KL term.", "name", NOT_GIVEN, KL_ESTIMATORS)
    logp_reduction: str = setting("auto", "Log-probs over a completion's tokens: sum, mean, or auto (mean for grpo, "
                                  "sum for the others).", "name", "sum in Eq. 7, mean in Eq. 2", REDUCTIONS)
    predicted_eps: float = setting(0.1, "Added to the std of the log-ratios in the predicted advantage (Eq. 7); the "
                                   "first gradient of reg-grpo is 2 / this.", "nats", NOT_GIVEN)
    advantage_eps: float = setting(1e-4, "Added to the std of a group's rewards (Eq. 5).", "reward", NOT_GIVEN)
    advantage_std: str = setting("population", "Std that advantages are divided by.", "name", NOT_GIVEN, STD_KINDS)
    mask_vanished: bool = setting(True, "reg-grpo: leave groups without reward spread out of the regression.",
                                  "true or false", NOT_GIVEN)
    clip_eps: float | None = setting(None, "Clip the ratios of grpo, reinforce and rloo to 1 +- this; none: no "
                                     "clipping.", "no unit", "none (appendix C.1)")
    ratio_level: str = setting("token", "grpo: one ratio a token or one a sequence.", "name", "token (Eq. 2)",
                               RATIO_LEVELS)
    reward_lambda: float = setting(0.5, "lambda of rebel, reward-regression and centred-regression (Eq. 3 and 6).",
                                   "reward per nat", NOT_GIVEN)
    dpo_beta: float = setting(0.1, "KL strength inside the loss of dpo and online-dpo.", "1 / nats", NOT_GIVEN)

    # The loop
    group_size: int = setting(8, "Completions sampled for a prompt, G.", "completions", "8")
    prompts_per_step: int = setting(8, "Prompts, and so groups, of a step.", "prompts", NOT_GIVEN)
    steps: int = setting(150, "Steps; each samples a batch of groups once.", "steps", NOT_GIVEN)
    rollout_budget: int | None = setting(None, "Stop before the first step that begins with this many completions "
                                         "sampled, for comparisons at equal rollouts; none: no limit.", "completions",
                                         NOT_GIVEN)
    inner_updates: int = setting(4, "Updates of the weights on each batch of rollouts.", "updates", NOT_GIVEN)
    micro_batch: int | None = setting(None, "Completions in one forward pass; the gradient does not depend on it; "
                                      "none: all at once.", "completions", NOT_GIVEN)
    temperature: float = setting(1.0, "Temperature of sampling and of all log-probs.", "no unit", NOT_GIVEN)
    max_new_tokens: int = setting(28, "Longest completion, with its end token.", "tokens", NOT_GIVEN)
    learning_rate: float = setting(3e-4, "Learning rate of AdamW.", "per update", NOT_GIVEN)
    warmup_steps: int = setting(0, "Steps over which the learning rate rises linearly; constant afterwards.", "steps",
                                NOT_GIVEN)
    optimizer: str = setting("adamw", "AdamW with means as wide as the weights, with 8-bit means, or with 8-bit means "
                             "that move to the computer's memory where a GPU's is short.", "name", NOT_GIVEN,
                             OPTIMIZERS)
    adam_beta1: float = setting(0.9, "Decay of AdamW's mean of gradients.", "no unit", NOT_GIVEN)
    adam_beta2: float = setting(0.95, "Decay of AdamW's mean of squared gradients.", "no unit", NOT_GIVEN)
    adam_eps: float = setting(1e-8, "Added to AdamW's root of squared gradients.", "gradient", NOT_GIVEN)
    weight_decay: float = setting(0.0, "Weight decay of AdamW.", "per update and learning rate", NOT_GIVEN)
    max_grad_norm: float = setting(1.0, "Longer gradients are scaled down to this norm.", "gradient", NOT_GIVEN)

    # Difficulty and augmentation
    history_window: int = setting(100, "Groups whose mean rewards the history holds, W.", "groups",
                                  "100 samples in C.1, steps in section 3.3")
    difficulty_reference: str = setting("relative", "Difficulty against the history's mean or against a fixed reward "
                                        "(Eq. 9, table 6).", "name", "relative", ("relative", "absolute"))
    absolute_reward: float = setting(0.5, "The fixed reward of the absolute reference.", "share of the largest reward",
                                     NOT_GIVEN)
    augment: str = setting("both", "Which prompts are augmented (table 7); resample: the control, which samples the "
                           "prompts of both again as they are.", "name", "both", AUGMENT)
    augment_scale: str = setting("adaptive", "Amounts that grow with |dR|, or fixed ones (table 8).", "name",
                                 "adaptive", SCALES)
    fixed_difficulty: float = setting(0.5, "The |dR| that fixed amounts are those of.", "share of the largest reward",
                                      NOT_GIVEN)
    dead_zone: float = setting(0.1, "|dR| up to here changes nothing.", "share of the largest reward", NOT_GIVEN)
    easy_kind: str = setting("noise", "What is done to the frames of easy prompts.", "name", "noise", EASY_KINDS)
    noise_scale: float = setting(0.4, "Sigma of the noise per |dR|, for pixels in [0, 1]; with mask, share of the "
                                 "frames per |dR|.", "pixel value or share", NOT_GIVEN)
    hint_min: float = setting(0.1, "Share of a trace's words that a hint reveals at the dead zone's edge.", "share",
                              NOT_GIVEN)
    hint_max: float = setting(0.6, "Share that a hint reveals at dR = 1, and never more.", "share", NOT_GIVEN)
    hint_traces: int = setting(4, "Traces written with the answer shown, from which a hint is chosen.", "completions",
                               "several")
    hint_probe: bool = setting(False, "Find the share that a hint reveals by trying shares on hint_traces completions "
                               "each, instead of from dR.", "true or false", "from dR")
    hint_update: str = setting("hinted", "What the update of a hinted group stands on: the hinted prompt; the prompt "
                               "without the hint (unhinted); or that with the model's own completions, of which up to "
                               "half, wrong ones, give way to right ones written with the hint (mixed).", "name",
                               "hinted, in our reading of figure 2", HINT_UPDATES)

    # Evaluation
    eval_limit: int = setting(0, "Questions of each file, drawn once for all runs; 0: all.", "questions", "all")
    eval_temperature: float = setting(0.0, "Temperature of the answers; 0: the most probable token.", "no unit",
                                      NOT_GIVEN)
    eval_samples: int = setting(1, "Answers to each question.", "completions", "1")
    eval_batch: int = setting(256, "Questions answered together.", "questions", NOT_GIVEN)

    # The run
    seed: int = setting(0, "Seed of the adapters, the order of the records, sampling and noise.", "no unit",
                        "single runs")
    out: str = setting("runs/lite", "Folder for everything the run writes.", "path", "does not apply")
    save_every: int = setting(50, "Steps between checkpoints.", "steps", NOT_GIVEN)
    keep_checkpoints: int = setting(2, "Checkpoints kept, the newest.", "checkpoints", NOT_GIVEN)
    max_broken_share: float = setting(0.05, "The run fails once more than this share of the records it tried have "
                                      "clips that cannot be read (of at least 100 tries).", "share", "does not apply")
    decode_timeout: float = setting(DECODE_TIMEOUT, "A clip whose decoding takes longer is skipped and counted as "
                                    "broken.", "seconds", "does not apply")
    feature_cache_mb: int = setting(256, "Memory for features of encoded clips.", "megabytes", NOT_GIVEN)
    merge_mb: int = setting(256, "Memory for dense copies of the language model's weights while sampling; without "
                            "enough of it sampling is slower.", "megabytes", NOT_GIVEN)
    check_memory: bool = setting(True, "On a GPU: refuse a run that is predicted to need more memory than it has.",
                                 "true or false", "does not apply")
    tracker: str = setting("none", "Where metrics go besides metrics.jsonl.", "name", NOT_GIVEN,
                           ("none", "tensorboard"))
    figures: bool = setting(True, "Draw figures at the end.", "true or false", "does not apply")

    def __post_init__(self) -> None:
        _check_types(self)
        _check_ranges(self)
        validate_objective(self.objective(), self.group_size)
        validate_augmentation(self.augmentation())
        self.history()
        self.eval_paths()

    def objective(self) -> ObjectiveConfig:
        r"""The fields that `objectives.py` reads."""
        return ObjectiveConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(ObjectiveConfig)})

    def augmentation(self) -> AugmentationConfig:
        r"""The fields that `augmentation.py` reads. The control plans what "both" would do."""
        return AugmentationConfig(
            scale=self.augment_scale, directions="both" if self.augment == "resample" else self.augment,
            easy_kind=self.easy_kind, dead_zone=self.dead_zone, hint_min=self.hint_min, hint_max=self.hint_max,
            noise_scale=self.noise_scale, fixed_difficulty=self.fixed_difficulty)

    def view(self) -> View:
        r"""How records are shown."""
        return View(self.num_frames, self.frame_size, self.instruction, self.decode_timeout)

    def history(self) -> RewardHistory:
        r"""An empty reward history of the configured length and reference."""
        absolute = self.difficulty_reference == "absolute"
        return RewardHistory(self.history_window, self.absolute_reward if absolute else None)

    def eval_paths(self) -> dict[str, str]:
        r"""`eval_files` as a dict from name to path."""
        paths = {}
        for entry in self.eval_files:
            name, equals, path = entry.partition("=")
            if not (name and equals and path) or "/" in name or name in paths:
                raise ConfigError(f"eval_files has the entry {entry!r}: write each as NAME=FILE with names of their "
                                  f"own, such as L1=data/toyvideoqa/L1.jsonl")
            paths[name] = path
        return paths


# The first field of each part and the part's name, for `train --help` and the YAML files.
PARTS = {"model": "The model", "train_file": "The data", "method": "The objective", "group_size": "The loop",
         "history_window": "Difficulty and augmentation", "eval_limit": "Evaluation", "seed": "The run"}


# --- what is possible ------------------------------------------------------------------------------------------------

_POSITIVE = ("lora_rank lora_alpha num_frames frame_size group_size prompts_per_step steps rollout_budget "
             "inner_updates micro_batch temperature max_new_tokens learning_rate adam_eps max_grad_norm hint_traces "
             "eval_samples eval_batch save_every keep_checkpoints decode_timeout feature_cache_mb merge_mb").split()
_NOT_NEGATIVE = "warmup_steps weight_decay eval_limit eval_temperature seed".split()
_SHARES = "adam_beta1 adam_beta2 max_broken_share".split()


def field_types() -> dict[str, tuple[type, bool]]:
    r"""Field name to (type, whether None is possible), for instance clip_eps: (float, True)."""
    found = {}
    for name, hint in typing.get_type_hints(TrainConfig).items():
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        kind = next(option for option in options if option is not type(None))
        found[name] = (typing.get_origin(kind) or kind, type(None) in options)
    return found


def _check_types(config: TrainConfig) -> None:
    for name, (kind, optional) in field_types().items():
        value = getattr(config, name)
        if value is None and optional:
            continue
        accepted = (int, float) if kind is float else (kind,)
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise ConfigError(f"{name} is {value!r}: give {_WANTED[kind]}" + (" or none" if optional else ""))
        if kind is list and not all(isinstance(entry, str) for entry in value):
            raise ConfigError(f"{name} is {value!r}: give {_WANTED[kind]}")
    for field in dataclasses.fields(TrainConfig):
        choices = field.metadata.get("choices")
        if choices and getattr(config, field.name) not in choices:
            raise ConfigError(f"{field.name} is {getattr(config, field.name)!r}: choose one of {', '.join(choices)}")


_WANTED = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", list: "a list of texts"}


def _check_ranges(config: TrainConfig) -> None:
    checks = [(_POSITIVE, lambda x: x > 0, "more than 0"), (_NOT_NEGATIVE, lambda x: x >= 0, "0 or more"),
              (_SHARES, lambda x: 0 <= x < 1, "at least 0 and less than 1")]
    for names, possible, wanted in checks:
        for name in names:
            value = getattr(config, name)
            if value is not None and not (math.isfinite(value) and possible(value)):
                raise ConfigError(f"{name} is {value!r}: give a number that is {wanted}")


# --- reading and writing ---------------------------------------------------------------------------------------------


def make_config(values: Mapping[str, Any]) -> TrainConfig:
    r"""A config from a mapping such as a YAML file's. Raises `ConfigError` with near matches for an unknown key."""
    unknown_keys(values)
    return TrainConfig(**{name: _coerce(name, value) for name, value in values.items()})


def unknown_keys(names: Sequence[str] | Mapping[str, Any], extra: Sequence[str] = ()) -> None:
    r"""Raises `ConfigError` naming the first name that is no field (nor one of `extra`), with near matches."""
    known = [*field_types(), *extra]
    for name in names:
        if name not in known:
            initials = [key for key in known if "".join(word[0] for word in key.split("_")) == name]  # lr
            near = initials or difflib.get_close_matches(str(name), known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "`train --help` lists all keys"
            raise ConfigError(f"unknown config key {name!r}: {hint}")


def _coerce(name: str, value: Any) -> Any:
    r"""What YAML reads differently: 1e-3 without a point is a text there, a whole number may stand for a float."""
    kind, optional = field_types()[name]
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
    r"""The configurations in `dvr1_lite/configs/` by name."""
    return {path.stem: path for path in sorted(CONFIGS.glob("*.yaml")) if path.stem != "cards"}


def card_settings(card: int, model: str) -> dict[str, Any]:
    r"""What `configs/cards.yaml` changes for a model on a card with so many GB. Raises `ConfigError`."""
    cards = yaml.safe_load((CONFIGS / "cards.yaml").read_text(encoding="utf-8"))
    if card not in cards:
        raise ConfigError(f"there are no settings for a card with {card} GB: choose one of "
                          f"{', '.join(map(str, cards))}, the largest that is not larger than yours")
    return cards[card]["all"] | cards[card].get(model, {})


def card_gb(card: int) -> float:
    r"""Memory of such a card in 2**30 bytes, as its driver reports it."""
    return yaml.safe_load((CONFIGS / "cards.yaml").read_text(encoding="utf-8"))[card]["memory_gb"]


def read_yaml(path: str | Path) -> dict[str, Any]:
    r"""The mapping in a YAML file, or in the shipped config of that name, by `yaml.safe_load`.

    Raises `ConfigError` if there is none, or for a file over 1 MB or with aliases, of which a few lines can stand for
    gigabytes.
    """
    if not Path(path).exists():
        path = shipped_configs().get(str(path).removesuffix(".yaml"), path)
    try:
        if Path(path).stat().st_size > MAX_YAML_BYTES:
            raise ConfigError(f"config {path} is larger than {MAX_YAML_BYTES} bytes: give a config, not a data set")
        text = Path(path).read_text(encoding="utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise ConfigError(f"config {path} has an alias (*name): write the value itself")
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path} cannot be read ({_reason(error)}): check the path") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"config {path} is not valid YAML ({_reason(error)}): write one `key: value` a "
                          f"line") from error
    if not isinstance(values, dict):
        raise ConfigError(f"config {path} holds a {type(values).__name__}, not `key: value` lines: see "
                          f"configs/lite.yaml")
    return values


def _reason(error: Exception) -> str:
    return " ".join((getattr(error, "strerror", None) or str(error)).split())[:160]


def load_config(path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> TrainConfig:
    r"""The defaults, changed by a YAML file, changed by `overrides`. Raises `ConfigError`."""
    values = {} if path is None else read_yaml(path)
    try:
        unknown_keys(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return make_config(values | dict(overrides or {}))


def to_yaml(config: TrainConfig) -> str:
    r"""The config as YAML text that `load_config` reads back, each field under its help text."""
    lines = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        value = config.eval_paths() if field.name == "eval_files" else value
        entry = yaml.safe_dump({field.name: value}, sort_keys=False, allow_unicode=True, width=10**6)
        lines += [f"# --- {PARTS[field.name]} ---\n"] if field.name in PARTS else []
        lines += [f"# {field.metadata['help']}", entry]
    return "\n".join(lines)

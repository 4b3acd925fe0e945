r"""The command line: `python -m dvr1_lite COMMAND`, each command one function; `COMMAND --help` lists its options.

What a user can fix ends in one message on stderr and exit status 2.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # before anything that an older Python cannot import
    sys.exit("error: dvr1_lite needs Python 3.11 or later, this is " + sys.version.split()[0] +
             ": create the environment with a newer one, such as python3.12 -m venv .venv")

import argparse
import difflib
import json
import os
import re
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from .errors import ConfigError, UserError

INTERRUPTED = 130  # exit status after Ctrl-C, as in a shell
SMALL_MODEL_BYTES = 100e6  # weights below which one thread is fastest


class Parser(argparse.ArgumentParser):
    r"""Reports a wrong option as a `ConfigError` with a near match, and takes no abbreviations."""

    def __init__(self, command: Callable, name: str | None = None):
        name = name or command.__name__.removesuffix("_command")
        super().__init__(prog=f"python -m dvr1_lite {name}", description=command.__doc__, allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message: str):
        known = [option for action in self._actions for option in action.option_strings]
        unknown = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        near = difflib.get_close_matches(unknown[1], known, n=1) if unknown else []
        hint = f"did you mean {near[0]}?" if near else f"`{self.prog} --help` lists the options"
        raise ConfigError(f"{message}; {hint}")


# --- train -----------------------------------------------------------------------------------------------------------


def train_command(arguments: Sequence[str]) -> int:
    r"""Train with reinforcement, evaluate before and after, and draw figures."""
    from .config import load_config
    from .files import resolve
    from .lab.plotting import draw_run
    from .lab.variants import trainer_class
    from .loading import quiet_libraries
    from .run import check_folder, train
    from .scale.datasets import read_any

    config_file, resume, overrides = parse_training(arguments)
    if resume is not None:
        if config_file or overrides:
            raise ConfigError(f"--resume keeps the run's own config: leave out {', '.join(overrides) or 'config'}")
        if not (Path(resume) / "config.yaml").is_file():
            raise ConfigError(f"{resume} holds no run to resume (no config.yaml): give the folder of an earlier --out")
        config_file, overrides = Path(resume) / "config.yaml", {"out": str(resume)}
    config = load_config(config_file, overrides)
    check_machine(config)
    records = read_any(resolve(config.train_file), config.data_root)
    evaluations = {name: read_any(resolve(path), config.data_root) for name, path in config.eval_paths().items()}
    check_folder(config, Path(config.out), resume is not None)
    quiet_libraries()
    main = os.environ.get("RANK", "0") == "0"  # of several processes, the first one reports
    if main:
        print(set_threads(config.threads, config), file=sys.stderr)
        print_notes([*records, *(record for found in evaluations.values() for record in found)], config)
    else:
        set_threads(config.threads, config)
    summary = train(config, records, evaluations, trainer=trainer_class(config), resume=resume is not None)
    if not summary["complete"]:
        return INTERRUPTED
    if not main:
        return 0
    figures = draw_run(config, summary, evaluations) if config.figures else []
    print(changes_table(summary))
    print(f"{summary['rollouts']} rollouts, {summary['updates']} updates, "
          f"{sum(summary['seconds'].get(k, 0) for k in ('total', 'evaluation_before', 'evaluation_after')):.0f} s, "
          f"peak memory {summary['peak_memory_gb']:.1f} GB; everything is in {config.out}")
    if figures:
        print("figures: " + ", ".join(map(str, figures)))
    if summary["step"]:
        print(f"next: python -m dvr1_lite ask --adapter {config.out} --clip FILE.mp4 --question \"...\"")
    return 0


def parse_training(arguments: Sequence[str]) -> tuple[str | None, str | None, dict]:
    r"""Parse (config file, folder to resume, overrides) of the train command; every config field is an option."""
    import dataclasses

    from transformers import HfArgumentParser

    from .config import PARTS, TrainConfig, card_settings, check_keys, read_yaml
    from .settings import field_types

    class TrainParser(Parser, HfArgumentParser):
        def __init__(self):
            Parser.__init__(self, train_command)
            self.add_argument("--config", metavar="FILE.yaml", help="Config file, or the name of a shipped one; "
                              "options given here override it.")
            self.add_argument("--card", type=int, metavar="GB", help="Settings for a GPU with 16, 24 or 80 GB.")
            self.add_argument("--resume", metavar="DIR", help="Continue the run in this folder.")
            self.dataclass_types = [TrainConfig]
            self._add_dataclass_arguments(TrainConfig)

        def add_argument(self, *names, at_least=None, above=None, below=None, **options):
            return super().add_argument(*names, **options)  # ranges are the config's business

    parser, kinds = TrainParser(), field_types(TrainConfig)
    parser.usage = "%(prog)s [--config FILE.yaml | --resume DIR] [--FIELD VALUE ...]"
    for title, part in PARTS.items():  # each option below its part's title
        group, names = parser.add_argument_group(title), {field.name for field in dataclasses.fields(part)}
        for action in [a for a in parser._optionals._group_actions if a.dest in names]:
            parser._optionals._group_actions.remove(action)
            group._group_actions.append(action)
    for action in parser._actions:
        kind, optional = kinds.get(action.dest, (None, False))
        action.type = _or_none(kind) if optional else action.type
        action.nargs = "*" if action.nargs == "+" else action.nargs
        if action.option_strings[0].startswith("--no_"):
            action.help = f"The same as --{action.dest} false."
    unset = object()
    parsed, unknown = parser.parse_known_args(
        arguments, argparse.Namespace(**{action.dest: unset for action in parser._actions if action.dest != "help"}))
    for word in unknown:
        check_keys([word.lstrip("-").partition("=")[0].replace("-", "_")], extra=("config", "resume", "card"))
    given = {name: value for name, value in vars(parsed).items() if value is not unset}
    if "card" in given:
        file = {} if given.get("config") is None else read_yaml(given["config"])
        given = card_settings(given.pop("card"), given.get("model", file.get("model", ""))) | given
    return given.pop("config", None), given.pop("resume", None), given


def _or_none(kind: type) -> Callable[[str], object]:
    def convert(text: str):
        return None if text.lower() == "none" else kind(text)

    convert.__name__ = kind.__name__
    return convert


def set_threads(threads: int | None, config=None) -> str:
    r"""Set torch's threads and say which: as asked, OMP_NUM_THREADS, or 1 where the model is so small that more threads
    only wait for each other."""
    import torch

    from .files import resolve

    if threads is None and "OMP_NUM_THREADS" not in os.environ and config is not None and config.device == "cpu":
        weights = list(resolve(config.model).glob("*.safetensors")) if resolve(config.model).is_dir() else []
        if weights and sum(path.stat().st_size for path in weights) < SMALL_MODEL_BYTES:
            threads = 1
    if threads is not None:
        if threads < 1:
            raise ConfigError(f"--threads is {threads}: give 1 or more")
        torch.set_num_threads(threads)
    count = torch.get_num_threads()
    return f"computing with {count} thread{'s' * (count > 1)} (--threads or OMP_NUM_THREADS changes that)"


def check_machine(config) -> None:
    r"""Check, before anything large is loaded, that this machine can run the config. Raises `UserError`."""
    import importlib.util

    import torch

    from .errors import ModelError
    from .loading import check_hardware
    from .scale import memory

    device = check_hardware(config.quantization, config.dtype, config.device)
    if config.optimizer != "adamw" and importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(f"optimizer: {config.optimizer} needs bitsandbytes, which is not installed: pip install "
                         f"bitsandbytes, or use optimizer: adamw")
    if config.optimizer == "paged-adamw-8bit" and device.type != "cuda":
        raise ConfigError(f"optimizer: paged-adamw-8bit moves its moments between a GPU and the computer's memory, and "
                          f"device is {config.device}: use optimizer: adamw-8bit or adamw, or device: cuda")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", device.index or 0)))
        if config.check_memory and memory.is_known(config.model):
            memory.check_fits(config, memory.device_gb(config.device))


def print_notes(records: Sequence, config, tokenizer=None) -> None:
    r"""Print to stderr what of these records the model cannot know or see well; nothing if all is well."""
    from .data import prompt_text
    from .errors import ClipError
    from .files import resolve
    from .loading import load_tokenizer, unknown_words
    from .decoding import probe_clip

    model = resolve(config.model)
    tokenizer = tokenizer or load_tokenizer(model if model.exists() else config.model, config.local_files_only)
    words = unknown_words(tokenizer, *{prompt_text(record) for record in records})
    if words:
        more = f" and {len(words) - 8} more words" if len(words) > 8 else ""
        print(f"note: the model has never seen {', '.join(words[:8])}{more}; do not expect much of its answers",
              file=sys.stderr)
    side, clips = config.frame_size, list(dict.fromkeys(record.clip for record in records if record.clip))
    for clip in clips[::-(-len(clips) // 10) or 1]:  # ten of them, evenly drawn
        try:
            probe = probe_clip(clip)
        except ClipError:
            continue  # named where it is read
        if probe.width * probe.height > 4 * side**2 or probe.duration > 4 * config.num_frames:
            print(f"note: {clip} ({probe.width} x {probe.height} pixels, {probe.duration:.1f} s) is shown to the model "
                  f"as {config.num_frames} frames of {side} x {side}; small or short things may not be visible "
                  f"(a model can be trained for more with train --num-frames and --frame-size)", file=sys.stderr)
            return


def changes_table(summary: dict) -> str:
    r"""List accuracy before and after for each evaluation, with the paired change, all in per cent."""
    lines = []
    for name, after in (summary["after"] or summary["before"]).items():
        if name not in summary["change"]:
            lines.append(f"{name}: {100 * after['accuracy']:.1f} % (n = {after['n']}, {after['clips']} clips)")
            continue
        before, change = summary["before"][name], summary["change"][name]
        low, high = (100 * bound for bound in change["ci95"])
        lines.append(f"{name}: {100 * before['accuracy']:.1f} -> {100 * after['accuracy']:.1f} %, change "
                     f"{100 * change['change']:+.1f} [{low:+.1f}, {high:+.1f}] points (95 %, paired, by clip; n = "
                     f"{after['n']} on {after['clips']} clips), format {100 * after['format_rate']:.1f} %")
    return "\n".join(lines) or "no evaluation files: nothing was evaluated"


# --- evaluate and ask ------------------------------------------------------------------------------------------------


def evaluate_command(arguments: Sequence[str]) -> int:
    r"""Answer the questions of a file and report accuracy with intervals; resumes what an earlier call began."""
    from .evaluation import evaluate, limited, summarise
    from .files import resolve, write_atomically
    from .loading import quiet_libraries
    from .run import load_policy, versions
    from .scale.datasets import read_any

    parser = Parser(evaluate_command)
    _add_policy_options(parser)
    parser.add_argument("--data", required=True, metavar="FILE", help="Records: JSONL, JSON or CSV.")
    parser.add_argument("--data-root", metavar="DIR", help="Folder that clip paths start from; none: the file's own.")
    parser.add_argument("--out", required=True, metavar="DIR", help="Where predictions.jsonl and summary.json go.")
    parser.add_argument("--limit", type=int, default=0, help="Questions to draw, the same in every run; 0: all.")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the most probable token.")
    parser.add_argument("--samples", type=int, default=1, help="Answers to each question.")
    parser.add_argument("--batch", type=int, default=256, help="Questions answered together.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of sampling.")
    options = parser.parse_args(arguments)
    overrides = {"eval_limit": options.limit, "eval_temperature": options.temperature, "eval_batch": options.batch,
                 "eval_samples": options.samples, "seed": options.seed, "out": options.out}
    config, out, started = _policy_config(options, overrides), Path(options.out), time.perf_counter()
    records = limited(read_any(resolve(options.data), options.data_root), options.limit)
    _claim(out, {**vars(options), "out": None, "model": config.model, "threads": None})
    print(set_threads(options.threads, config), file=sys.stderr)
    quiet_libraries()
    policy = load_policy(config, options.adapter)
    print_notes(records, config, policy.tokenizer)
    rows = evaluate(policy, records, config, out=out / "predictions.jsonl", progress=True)
    summary = summarise(rows) | {"seconds": round(time.perf_counter() - started, 1), "seed": options.seed,
                                 "versions": versions()}
    write_atomically(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    print(accuracy_table(summary))
    print(f"answers and summary are in {out}")
    return 0


def accuracy_table(summary: dict) -> str:
    r"""List accuracy in per cent with its interval, for all questions and by type, and what else was measured."""
    rows = [("all", summary), *summary["by_type"].items()]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {100 * cell['accuracy']:5.1f} % [{100 * cell['ci95'][0]:.1f}, "
             f"{100 * cell['ci95'][1]:.1f}]  n = {cell['n']} on {cell['clips']} clips" for name, cell in rows]
    lines.append(f"format {100 * summary['format_rate']:.1f} %, {summary['broken']} questions with a broken clip")
    if "mean_iou" in summary:
        recall = ", ".join(f"R@{m} {100 * share:.1f} %" for m, share in summary["recall"].items())
        lines.append(f"mean IoU {summary['mean_iou']:.3f}, {recall}")
    if "acc_gqa" in summary:
        low, high = (100 * bound for bound in summary["acc_gqa_ci95"])
        lines.append(f"correct and grounded (Acc@GQA, IoP >= 0.5) {100 * summary['acc_gqa']:.1f} % "
                     f"[{low:.1f}, {high:.1f}], mean IoP {summary['mean_iop']:.3f}")
    return "\n".join(lines)


def ask_command(arguments: Sequence[str]) -> int:
    r"""Ask the base model, or one that you trained, about a clip; prints its trace and its answer."""
    from .data import Record, prompt_text, with_option
    from .loading import quiet_libraries
    from .policy import encode_record
    from .rewards import parse_completion
    from .rollout import sample_groups
    from .run import load_policy

    parser = Parser(ask_command)
    _add_policy_options(parser)
    parser.add_argument("--clip", required=True, metavar="FILE", help="A video file.")
    parser.add_argument("--question", required=True, help="What you want to know.")
    parser.add_argument("--options", nargs="*", default=[], metavar="TEXT", help="Answers to choose from.")
    options = parser.parse_args(arguments)
    if not options.question.strip() or len(options.options) == 1:
        raise ConfigError("give --question a text, and --options at least two answers or leave it out")
    config = _policy_config(options)
    set_threads(options.threads, config)
    quiet_libraries()
    policy = load_policy(config, options.adapter)
    choices = tuple(re.sub(r"^\s*\(?[A-Z][.):]+\s+", "", choice) for choice in options.options)  # "A. circle"
    record = Record("ask", options.question, choices, "", "multiple choice" if choices else "exact", "ask",
                    Path(options.clip))
    print_notes([record], config, policy.tokenizer)
    prompt = policy.prompt(prompt_text(record, instruction=config.instruction), encode_record(policy, record, config))
    text = sample_groups(policy, [prompt], 1, config.max_new_tokens, greedy=True).texts[0][0]
    found = parse_completion(text)
    if not found.well_formed:
        print(f"not in the form <think>...</think><answer>...</answer>: {text}")
        return 0
    spans = "".join(f", from {start} to {end} s" for start, end in found.spans or ())
    print(f"trace:  {found.think}\nanswer: {with_option(found.answer, record.options)}{spans}")
    return 0


def _add_policy_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", metavar="DIR", help="A run's folder or its adapter; none: the base model.")
    parser.add_argument("--config", metavar="FILE.yaml", help="Config of model, frames and prompt; none: that of the "
                        "run the adapter is from, or the defaults.")
    parser.add_argument("--model", help="Base model; none: the config's.")
    parser.add_argument("--device", help="cpu or cuda; none: the config's.")
    parser.add_argument("--threads", type=int, help="Threads on a CPU; none: what is fastest for the model.")


def _policy_config(options: argparse.Namespace, overrides: dict | None = None):
    r"""Load the config that applies to `--adapter`, or to the base model."""
    from .config import load_config

    file = options.config
    if file is None and options.adapter is not None:
        adapter = Path(options.adapter).resolve()
        above = [folder / "config.yaml" for folder in [adapter, *adapter.parents][:4]]
        file = next((path for path in above if path.is_file()), None)
    given = {name: getattr(options, name) for name in ("model", "device") if getattr(options, name) is not None}
    return load_config(file, given | (overrides or {}))


def _claim(out: Path, settings: dict) -> None:
    r"""Mark a folder as that of one evaluation; refuse one that holds another. Raises `ConfigError`."""
    from .files import make_folder, write_atomically

    path = out / "evaluation.json"
    if path.exists():
        saved = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in settings if saved.get(name) != settings[name]]
        if changed:
            raise ConfigError(f"{out} holds an evaluation with another {', '.join(changed)}: give another --out")
    elif out.exists() and any(entry.suffix != ".part" for entry in out.iterdir()):  # a kill may leave one
        raise ConfigError(f"{out} is not empty and holds no evaluation: give another --out")
    make_folder(out)
    write_atomically(path, json.dumps(settings, indent=2) + "\n")


# --- data and pretrain -----------------------------------------------------------------------------------------------


def data_command(arguments: Sequence[str]) -> int:
    r"""Build ToyVideoQA, clips and records, from a seed."""
    options = _seed_and_folder(data_command, arguments)
    from .toy.world import build_dataset

    manifest = build_dataset(options.out, options.seed)
    for name, split in manifest["splits"].items():
        print(f"{name}: {split['questions']} questions on {split['clips']} clips")
    return 0


def pretrain_command(arguments: Sequence[str]) -> int:
    r"""Build the tiny base model from a seed and examine it (about half an hour on 2 cores)."""
    options = _seed_and_folder(pretrain_command, arguments)
    from .config import TrainConfig
    from .data import read_records
    from .files import resolve
    from .policy import Policy
    from .toy import examination
    from .toy.recipe import Recipe, pretrain

    config = TrainConfig()
    records = read_records(resolve(config.train_file))
    facts = pretrain(options.out, Recipe(seed=options.seed))
    print(f"{facts['parameters']} parameters in {options.out}, {facts['minutes']} minutes")
    found = examination.examine(Policy.load(options.out), records, num_frames=config.num_frames,
                                max_new_tokens=config.max_new_tokens)
    examination.write(found, options.out)
    print(examination.as_table(found))
    return 0


def _seed_and_folder(command: Callable, arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(command)
    parser.add_argument("--seed", type=int, default=0, help="0 gives what the repository ships.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="A new or empty folder.")
    options = parser.parse_args(arguments)
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise ConfigError(f"{options.out} exists and is not empty: give another --out, or remove it first")
    return options


# --- reproduce, report, bench ----------------------------------------------------------------------------------------


def reproduce_command(arguments: Sequence[str]) -> int:
    r"""Make the runs of a table of the paper, with seeds; resumes where an earlier call stopped."""
    from .lab.report import save_aggregate
    from .lab.runner import reproduce, rerun
    from .lab.tables import EXPERIMENTS, GROUPS

    parser = Parser(reproduce_command)
    parser.add_argument("name", nargs="?", metavar="NAME", help=f"One of {', '.join([*EXPERIMENTS, *GROUPS])}.")
    parser.add_argument("--seeds", type=int, help="Runs of each row; none: what the protocol says.")
    parser.add_argument("--jobs", type=int, default=1, help="Runs made at the same time, one core each.")
    parser.add_argument("--quick", action="store_true", help="One seed, a few steps and questions: a trial.")
    parser.add_argument("--out", default="data/results", metavar="DIR", help="Where results are recorded.")
    parser.add_argument("--rerun", metavar="FILE.json", help="Make this recorded run again, below runs/, and compare.")
    options = parser.parse_args(arguments)
    for name in ("seeds", "jobs"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ConfigError(f"--{name} is {getattr(options, name)}: give 1 or more")
    if (options.name is None) == (options.rerun is None):
        raise ConfigError("give either the NAME of an experiment, such as table4, or --rerun FILE.json")
    if options.name:
        check_name("experiment", options.name, [*EXPERIMENTS, *GROUPS])
    if options.rerun:
        return 0 if rerun(options.rerun, Path("runs") / "rerun") else 1
    made = reproduce(options.name, options.out, options.seeds, options.jobs, options.quick)
    for name, used in made.used.items():
        print(save_aggregate(EXPERIMENTS[name], used, made.results))
    print(f"recorded in {made.results}; to draw figures: python -m dvr1_lite report {' '.join(made.used)} --out "
          f"{made.results}")
    return 1 if made.failed else 0


def report_command(arguments: Sequence[str]) -> int:
    r"""Draw recorded results beside the published figures; trains nothing."""
    from .lab.report import report
    from .lab.tables import EXPERIMENTS

    parser = Parser(report_command)
    parser.add_argument("names", nargs="*", metavar="NAME", help="Experiments; none: all that have results.")
    parser.add_argument("--out", default="data/results", metavar="DIR", help="Where results are recorded.")
    options = parser.parse_args(arguments)
    for name in options.names:
        check_name("experiment", name, EXPERIMENTS)
    print("\n".join(str(path) for path in report(options.names, options.out)))
    return 0


def bench_command(arguments: Sequence[str]) -> int:
    r"""Measure the seconds of a training step (and memory on a GPU) beside one that repeats the prompt."""
    from .lab import bench
    from .loading import quiet_libraries

    parser = Parser(bench_command)
    parser.add_argument("--frames", type=int, nargs="+", default=[8, 16, 32], metavar="N", help="Frames of the clip.")
    parser.add_argument("--group-size", type=int, nargs="+", default=[4, 8, 16], metavar="G",
                        help="Completions of the prompt.")
    parser.add_argument("--completion-tokens", type=int, default=64, metavar="T", help="Length of every completion.")
    parser.add_argument("--inner-updates", type=int, nargs="+", default=[1, 4], metavar="K", help="Updates of the "
                        "weights a step: the grid is made with the first number, its middle with the others too.")
    parser.add_argument("--size", type=int, default=252, help="Height and width of the frames in pixels.")
    parser.add_argument("--repeats", type=int, default=5, help="Rounds that the medians are of, after one to warm up.")
    parser.add_argument("--ways", nargs="+", default=list(bench.WAYS), choices=bench.WAYS, help="What is measured.")
    parser.add_argument("--micro-batch", type=int, help="Completions in one pass of the shared way; none: all.")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for bfloat16 and NF4.")
    parser.add_argument("--model", choices=bench.SHAPES, help="Random model; none: tiny on a CPU, 3B on a GPU.")
    parser.add_argument("--threads", type=int, help="Threads of torch; none: torch's own choice.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Where the result goes, after every setting anew.")
    parser.add_argument("--table", type=Path, metavar="FILE.md", help="Where the table goes too.")
    parser.add_argument("--note", default="", help="A line for the table: what else the machine was doing.")
    options = parser.parse_args(arguments)
    set_threads(options.threads)
    quiet_libraries()
    grid = bench.settings(options.frames, options.group_size, options.completion_tokens, options.inner_updates,
                          options.size)
    result, stopped = bench.bench(bench.kinds(options.device, options.model), grid,
                                  command=shlex.join(["python", "-m", "dvr1_lite", "bench", *arguments]),
                                  repeats=options.repeats, ways=options.ways, micro_batch=options.micro_batch,
                                  json_file=options.json, table_file=options.table, note=options.note)
    print(bench.as_table(result))
    return INTERRUPTED if stopped else 0


# --- check, memory, merge --------------------------------------------------------------------------------------------


def check_command(arguments: Sequence[str]) -> int:
    r"""Check a data set before training: what is in it, which clips are missing or broken, and incorrect spans."""
    from .config import load_config
    from .files import make_folder, resolve
    from .lab import plotting
    from .scale.check import check_records, examples, format_report, show_record
    from .scale.datasets import SOURCES, read_any

    parser = Parser(check_command)
    parser.epilog = "Formats and where their data come from: " + "; ".join(f"{k}: {v}" for k, v in SOURCES.items())
    parser.add_argument("--data", required=True, metavar="FILE", help="Records: JSONL, JSON or CSV.")
    parser.add_argument("--root", metavar="DIR", help="Folder that clip paths start from; none: the file's own.")
    parser.add_argument("--spans", metavar="FILE", help="NExT-GQA's spans; none: gsub_NAME.json beside the CSV.")
    parser.add_argument("--config", metavar="FILE.yaml", help="Training config, for its model, frames and size; none: "
                        "the defaults.")
    parser.add_argument("--num-frames", type=int, help="Frames that training will sample; none: the config's.")
    parser.add_argument("--limit", type=int, default=0, help="Records to open, drawn evenly; 0: all.")
    parser.add_argument("--fast", action="store_true", help="Read headers only: misses pictures that do not decode.")
    parser.add_argument("--out", metavar="DIR", help="Where frame strips of three records go as PNG files.")
    options = parser.parse_args(arguments)
    if options.limit < 0:
        raise ConfigError(f"--limit is {options.limit}: give 0 or more")
    config = load_config(options.config, {} if options.num_frames is None else {"num_frames": options.num_frames})
    errors = []
    records = read_any(resolve(options.data), options.root, spans=options.spans, errors=errors)
    chosen = records[::-(-len(records) // options.limit)] if options.limit else records
    report = check_records(chosen, config.num_frames, config.frame_size, decode=not options.fast, errors=errors)
    print(format_report(report))
    print_notes(chosen, config)
    for number, (record, frames) in enumerate(examples(chosen, config.num_frames, config.frame_size), 1):
        print(f"\n{show_record(record)}")
        if options.out is not None:
            make_folder(options.out)
            path = Path(options.out) / f"record_{number}.png"
            plotting.save(plotting.frame_strip(frames, record.question[:100], record.answer_in_words), path)
            print(f"frames:   {path}")
    return 0 if report.ok else 1


def merge_command(arguments: Sequence[str]) -> int:
    r"""Add an adapter to its base model's weights and save a checkpoint of its own, with a model card."""
    from .loading import quiet_libraries
    from .scale.merge import merge

    parser = Parser(merge_command)
    parser.add_argument("--adapter", required=True, metavar="DIR", help="A run's folder or its adapter.")
    parser.add_argument("--out", required=True, metavar="DIR", help="A new or empty folder.")
    parser.add_argument("--model", help="Base model; none: the one that the adapter names.")
    parser.add_argument("--dtype", default="bfloat16", help="Number type of the saved weights.")
    parser.add_argument("--device", default="cpu", help="cpu or cuda.")
    options = parser.parse_args(arguments)
    quiet_libraries()
    out = merge(options.adapter, options.out, model=options.model, dtype=options.dtype, device=options.device)
    print(f"the merged model is in {out} and loads in transformers 4.57 and later; its README.md says how to use it "
          f"with transformers and lmms-eval")
    return 0


def memory_command(arguments: Sequence[str]) -> int:
    r"""Predict the memory of a training run from its configuration alone, and say what to change if it is too much."""
    from .config import card_gb, load_config
    from .files import write_atomically
    from .scale import memory

    parser = Parser(memory_command)
    parser.epilog = "Takes --config and every field of it, as train does."
    parser.add_argument("--card", type=int, metavar="GB", help="Settings for a GPU with 16, 24 or 80 GB, to compare.")
    parser.add_argument("--available", type=float, metavar="GB", help="Compare with so many 2**30 bytes.")
    parser.add_argument("--text-tokens", type=int, default=memory.TEXT_TOKENS, help="Question, options, instruction.")
    parser.add_argument("--no-image", action="store_true", help="No record has a picture besides its clip.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Where the prediction goes as JSON.")
    options, rest = parser.parse_known_args(arguments)
    file, _, given = parse_training(rest if options.card is None else [*rest, "--card", str(options.card)])
    config = load_config(file, given)
    if options.available is not None and options.available <= 0:
        raise ConfigError(f"--available is {options.available}: give a number of GB above 0")
    expected = {"image": not options.no_image, "text_tokens": options.text_tokens}
    prediction = memory.predict(config, **expected)
    if options.json is not None:
        write_atomically(options.json, json.dumps(memory.as_dict(prediction), indent=1) + "\n")
    print(memory.table(prediction))
    available = options.available or (card_gb(options.card) if options.card else None)
    if available is not None:
        memory.check_fits(config, available, **expected)
        print(f"{'available':<24}{available:8.2f} GB: it fits")
    return 0


# --- all commands ----------------------------------------------------------------------------------------------------

COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train_command, "evaluate": evaluate_command, "ask": ask_command, "data": data_command,
    "pretrain": pretrain_command, "reproduce": reproduce_command, "report": report_command,
    "check": check_command, "memory": memory_command, "merge": merge_command, "bench": bench_command,
}


def check_name(kind: str, name: str, known: Sequence[str]) -> None:
    r"""Raise `ConfigError` with a near match for a name that is not known."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise ConfigError(f"unknown {kind} {name!r}: " + (f"did you mean {near[0]}?" if near else
                                                         f"use one of {', '.join(known)}"))


def run(arguments: Sequence[str]) -> int:
    r"""Run one command; errors are raised."""
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"  {name:<10} {command.__doc__.splitlines()[0]}" for name, command in COMMANDS.items()]
        print("\n".join(["usage: python -m dvr1_lite COMMAND [options]", "", *lines, "",
                         "`python -m dvr1_lite COMMAND --help` lists the options of a command."]))
        return 0
    name, *rest = arguments
    check_name("command", name, list(COMMANDS))
    if "DVR1_PARENT" in os.environ:  # started by `reproduce`
        from .lab.runner import end_with_parent

        end_with_parent()
    return COMMANDS[name](rest)


def main(arguments: Sequence[str] | None = None) -> int:
    r"""Run one command and return the exit status: 0, 2 for a mistake that the message explains, 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a console of few characters ends nothing
    try:
        return run(sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "dvr1_lite":
            raise
        print(f"error: the package {error.name} is not installed here: activate the environment "
              f"(. .venv/bin/activate), or install with pip install -r requirements.txt", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    os.environ.setdefault("MPLBACKEND", "Agg")  # figures go to files; not in main(), whose caller may be a notebook
    sys.exit(main())

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
import itertools
import json
import os
import re
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from .errors import ConfigError, UserError, check_name

INTERRUPTED = 130  # exit status after Ctrl-C, as in a shell
USED_MOST = ("help", "config", "card", "resume", "model", "train_file", "eval_files", "steps", "method",
             "learning_rate", "out")  # the first options of `train --help`
REPORTS = os.environ.get("RANK", "0") == "0"  # of several processes, the first one prints


class Parser(argparse.ArgumentParser):
    r"""Reports a wrong option as a `ConfigError` with a near match, and takes no abbreviations."""

    def __init__(self, command: Callable):
        super().__init__(prog=f"python -m dvr1_lite {command.__name__.removesuffix('_command')}", allow_abbrev=False,
                         description=command.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message: str):
        from .config import TrainConfig

        known = [option for action in self._actions for option in action.option_strings]
        unknown = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        near = difflib.get_close_matches(unknown[1], known, n=1) if unknown else []
        name = unknown[1].lstrip("-").replace("-", "_") if unknown and "--config" in known else ""
        hint = (f"did you mean {near[0]}?" if near else f"set {name} in the file of --config"
                if name in TrainConfig.__dataclass_fields__ else f"`{self.prog} --help` lists the options")
        raise ConfigError(f"{message}; {hint}")


# --- train -----------------------------------------------------------------------------------------------------------


def train_command(arguments: Sequence[str]) -> int:
    r"""Train with reinforcement, evaluate before and after, and draw figures."""
    from .config import load_config
    from .lab.plotting import draw_run
    from .lab.variants import trainer_class
    from .run import finished_run, train
    from .words import run_in_words

    config_file, resume, overrides = parse_training(arguments)
    if resume is not None:
        if given := ["config"] * bool(config_file) + sorted(overrides.keys() - {"reward", "max_broken_share"}):
            raise ConfigError(f"--resume keeps the run's own config: leave out {', '.join(given)}")
        if not (Path(resume) / "config.yaml").is_file():
            raise ConfigError(f"{resume} holds no run to resume (no config.yaml): give the folder of an earlier --out")
        if finished_run(Path(resume)):
            return 0
        config_file, overrides = Path(resume) / "config.yaml", overrides | {"out": str(resume)}
    config = load_config(config_file, overrides)
    records, evaluations, scoring = _prepare(config, overrides.get("reward"))
    summary = train(config, records, evaluations, trainer=trainer_class(config), scoring=scoring,
                    resume=resume is not None)
    if not summary["complete"]:
        return INTERRUPTED
    if not REPORTS:
        return 0
    print(run_in_words(summary, config.out, draw_run(config, summary, evaluations) if config.figures else ()))
    return 0


def _prepare(config, named_reward: str | None) -> tuple:
    r"""Check the machine, set threads, print notes, and read what a config names: (records, evaluations by name, a
    reward of your own or None)."""
    from .distributed import set_threads
    from .files import resolve
    from .loading import quiet_libraries
    from .own_reward import reward_for
    from .scale.check import print_notes, shared_clips
    from .scale.datasets import read_any
    from .scale.memory import check_machine

    check_machine(config)
    records = read_any(resolve(config.train_file), config.data_root)
    evaluations = {name: read_any(resolve(path), config.data_root) for name, path in config.eval_paths().items()}
    for name, asked in evaluations.items():
        for sentence in shared_clips({name: asked, "the training file": records}):
            print(f"note: {sentence}", file=sys.stderr)
    scoring = reward_for(config.reward, named_reward, config.reward_errors, records)
    quiet_libraries()
    threads = set_threads(config.threads, config)
    if REPORTS:
        print(threads, file=sys.stderr)
        print_notes([*records, *(record for found in evaluations.values() for record in found)], config)
    return records, evaluations, scoring


def _train_parser() -> argparse.ArgumentParser:
    r"""Build the parser of the train command: the options used most, then every config field below its part's title."""
    import dataclasses

    from transformers import HfArgumentParser

    from .config import PARTS, TrainConfig
    from .settings import field_types

    class TrainParser(Parser, HfArgumentParser):
        def __init__(self):
            Parser.__init__(self, train_command)
            self.add_argument("--config", metavar="FILE.yaml", help="Config file, or the name of a shipped one; "
                              "options given here override it. Its paths start from the current folder.")
            self.add_argument("--card", type=int, metavar="GB", help="Settings for a GPU with 15 (T4), 16, 24, 80 GB.")
            self.add_argument("--resume", metavar="DIR", help="Continue the run in this folder.")
            self.dataclass_types = [TrainConfig]
            self._add_dataclass_arguments(TrainConfig)

        def add_argument(self, *names, at_least=None, above=None, below=None, **options):
            return super().add_argument(*names, **options)  # ranges are the config's business

    parser, kinds = TrainParser(), field_types(TrainConfig)
    parser.usage = "%(prog)s [--config FILE.yaml | --resume DIR] [--FIELD VALUE ...]"
    parser._optionals.title = "Used most"
    parser._optionals._group_actions.sort(key=lambda a: USED_MOST.index(a.dest) if a.dest in USED_MOST else 99)
    for title, part in PARTS.items():
        group = parser.add_argument_group(title)
        names = {field.name for field in dataclasses.fields(part)} - set(USED_MOST)
        for action in [a for a in parser._optionals._group_actions if a.dest in names]:
            parser._optionals._group_actions.remove(action)
            group._group_actions.append(action)
    for action in parser._actions:
        kind, optional = kinds.get(action.dest, (None, False))
        action.type = _or_none(kind) if optional else action.type
        action.nargs = "*" if action.nargs == "+" else action.nargs
        if action.option_strings[0].startswith("--no_"):
            action.help = f"The same as --{action.dest} false."
    return parser


def parse_training(arguments: Sequence[str], others: Sequence[str] = ()) -> tuple[str | None, str | None, dict]:
    r"""Parse (config file, folder to resume, overrides) of the train command; every config field is an option.

    others: names of options that the calling command has besides, for near matches of unknown ones.
    """
    from .config import card_settings, check_keys, read_yaml
    from .loading import has_bfloat16

    parser, unset = _train_parser(), object()
    parsed, unknown = parser.parse_known_args(
        arguments, argparse.Namespace(**{action.dest: unset for action in parser._actions if action.dest != "help"}))
    for word in unknown:
        check_keys([word.lstrip("-").partition("=")[0].replace("-", "_")], extra=("config", "resume", "card", *others))
    given = {name: value for name, value in vars(parsed).items() if value is not unset}
    if "card" in given:
        file = {} if given.get("config") is None else read_yaml(given["config"])
        bfloat16 = has_bfloat16(given.get("device", file.get("device", "cpu")))
        if not bfloat16 and "dtype" not in given:
            print("note: this GPU has no bfloat16: computing in float32, beside NF4 weights", file=sys.stderr)
        given = card_settings(given.pop("card"), given.get("model", file.get("model", "")), bfloat16) | given
    return given.pop("config", None), given.pop("resume", None), given


def _or_none(kind: type) -> Callable[[str], object]:
    def convert(text: str):
        return None if text.lower() == "none" else kind(text)

    convert.__name__ = kind.__name__
    return convert


# --- evaluate and ask ------------------------------------------------------------------------------------------------


def evaluate_command(arguments: Sequence[str]) -> int:
    r"""Answer the questions of a file and report accuracy with intervals; resumes what an earlier call began."""
    from .distributed import set_threads
    from .evaluation import ASKED_WITH, claim_folder, compare_saved, controls, evaluate, limited, summarise
    from .files import resolve, write_atomically
    from .loading import quiet_libraries
    from .own_reward import reward_for
    from .run import load_policy, policy_config, versions
    from .scale.check import print_notes
    from .scale.datasets import read_any
    from .words import accuracy_table, change_in_words, clips_needed, reward_in_words

    options = _evaluate_options(arguments)
    if options.compare:
        *summaries, change, differing = compare_saved(*options.compare)
        if differing:
            print(f"note: the two were asked with another {', '.join(differing)}", file=sys.stderr)
        print(change_in_words(*summaries, change), *reward_in_words(*summaries, change.get("task_reward")), sep="\n")
        print(clips_needed(change["ci95"], change["clips"]) if change["differing"] else "no answer differs")
        return 0
    overrides = {"eval_limit": options.limit, "eval_temperature": options.temperature, "eval_batch": options.batch,
                 "eval_samples": options.samples, "seed": options.seed, "out": options.out}
    config, out, started = policy_config(options, overrides), Path(options.out), time.perf_counter()
    records = limited(read_any(resolve(options.data), options.data_root), options.limit)
    changes = {"own": (None, None)} | controls(records, options.seed)
    check_name("video control", options.video, list(changes))
    shown, change = changes[options.video]
    scoring = reward_for("", options.reward, options.reward_errors, records)
    if config.reward and scoring is None:
        print(f"note: trained with the reward {config.reward}; to measure it too, name it: --reward", file=sys.stderr)
    claim_folder(out, {**vars(options), "out": None, "model": config.model, "threads": None, "batch": config.eval_batch,
                       "reward": scoring and scoring.digest, **{name: getattr(config, name) for name in ASKED_WITH}})
    print(f"asked with {config.num_frames} frames of {config.frame_size} pixels, at most {config.max_new_tokens} "
          f"tokens{', and an instruction' if config.instruction else ''}", file=sys.stderr)
    print(set_threads(options.threads, config), file=sys.stderr)
    quiet_libraries()
    policy = load_policy(config, options.adapter)
    print_notes(records, config, policy.tokenizer)
    rows = evaluate(policy, records, config, out=out / "predictions.jsonl", progress=True, scoring=scoring, shown=shown,
                    change=change)
    summary = summarise(rows) | {"seconds": round(time.perf_counter() - started, 1), "seed": options.seed,
                                 "versions": versions()}
    write_atomically(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    print(f"{accuracy_table(summary)}\n{clips_needed(summary['ci95'], summary['clips'])}")
    print(f"answers and summary are in {out}")
    return 0


def _evaluate_options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(evaluate_command)
    _add_policy_options(parser)
    _add_data_options(parser, required=False)
    parser.add_argument("--out", metavar="DIR", help="Where predictions.jsonl and summary.json go.")
    parser.add_argument("--compare", nargs=2, metavar="DIR", help="Only print the paired change from one saved "
                        "evaluation to another of the same questions; each is the folder of an earlier --out.")
    parser.add_argument("--limit", type=int, default=0, help="Questions to draw, the same in every run; 0: all.")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the most probable token.")
    parser.add_argument("--samples", type=int, default=1, help="Answers to each question.")
    parser.add_argument("--batch", type=int, help="Questions answered together; none: the config's eval_batch.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of sampling.")
    parser.add_argument("--reward", metavar="FILE.py:FUNCTION", help="A reward of your own, measured beside the "
                        "accuracy; this runs your file.")
    parser.add_argument("--reward-errors", default="stop", choices=("stop", "skip"), help="Where your reward fails.")
    parser.add_argument("--video", default="own", metavar="CONTROL", help="What is shown: own, \"another clip\", "
                        "\"one frame\", \"shuffled frames\" or blind; --compare then tells what the video adds.")
    options = parser.parse_args(arguments)
    if not options.compare and (options.data is None or options.out is None):
        raise ConfigError("give both --data and --out, or --compare with two folders")
    return options


def _add_data_options(parser: argparse.ArgumentParser, **changes) -> None:
    options = {"required": True, "metavar": "FILE", "help": "Records: JSONL, JSON or CSV."} | changes
    parser.add_argument("--data", **options)
    parser.add_argument("--data-root", "--root", metavar="DIR", help="Folder that clip paths start from; none: the "
                        "file's own.")


def ask_command(arguments: Sequence[str]) -> int:
    r"""Ask the base model, or one that you trained, about a clip; prints its trace and its answer."""
    from .data import Record, prompt_text
    from .distributed import set_threads
    from .loading import quiet_libraries
    from .policy import encode_record
    from .rollout import sample_groups
    from .run import load_policy, policy_config
    from .scale.check import print_notes
    from .words import completion_in_words

    parser = Parser(ask_command)
    _add_policy_options(parser)
    parser.add_argument("--clip", required=True, metavar="FILE", help="A video file.")
    parser.add_argument("--question", required=True, help="What you want to know.")
    parser.add_argument("--options", nargs="*", default=[], metavar="TEXT", help="Answers to choose from.")
    options = parser.parse_args(arguments)
    if not options.question.strip() or len(options.options) == 1:
        raise ConfigError("give --question a text, and --options at least two answers or leave it out")
    config = policy_config(options)
    set_threads(options.threads, config)
    quiet_libraries()
    policy = load_policy(config, options.adapter)
    choices = tuple(re.sub(r"^\s*\(?[A-Z][.):]+\s+", "", choice) for choice in options.options)  # "A. circle"
    record = Record("ask", options.question, choices, "", "multiple choice" if choices else "exact", "ask",
                    Path(options.clip))
    print_notes([record], config, policy.tokenizer)
    prompt = policy.prompt(prompt_text(record, instruction=config.instruction), encode_record(policy, record, config))
    text = sample_groups(policy, [prompt], 1, config.max_new_tokens, greedy=True).texts[0][0]
    parts = completion_in_words(text, record.options)
    print("trace:  {}\nanswer: {}".format(*parts) if parts else
          f"not in the form <think>...</think><answer>...</answer>: {text}")
    return 0


def _add_policy_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", metavar="DIR", help="A run's folder or its adapter; none: the base model.")
    parser.add_argument("--config", metavar="FILE.yaml", help="Config of model, frames and prompt; none: that of the "
                        "run the adapter is from, or the defaults.")
    parser.add_argument("--model", help="Base model; none: the config's.")
    parser.add_argument("--device", help="cpu or cuda; none: the config's.")
    parser.add_argument("--threads", type=int, help="Threads on a CPU; none: what is fastest for the model.")


# --- data and pretrain -----------------------------------------------------------------------------------------------


def data_command(arguments: Sequence[str]) -> int:
    r"""Build ToyVideoQA, clips and records, from a seed."""
    options = _seed_and_folder(data_command, arguments)
    from .toy.world import build_dataset
    from .words import plural

    manifest = build_dataset(options.out, options.seed)
    for name, split in manifest["splits"].items():
        print(f"{name}: {plural(split['questions'], 'question')} on {plural(split['clips'], 'clip')}")
    return 0


def pretrain_command(arguments: Sequence[str]) -> int:
    r"""Build the tiny base model from a seed and examine it (about 80 minutes on one core)."""
    options = _seed_and_folder(pretrain_command, arguments)
    from .config import TrainConfig
    from .toy import examination
    from .toy.recipe import Recipe, pretrain

    if not options.examine:
        facts = pretrain(options.out, Recipe(seed=options.seed))
        print(f"{facts['parameters']} parameters in {options.out}, {facts['minutes']} minutes")
    print(examination.as_table(examination.examine_base(options.out, TrainConfig())))
    return 0


def _seed_and_folder(command: Callable, arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(command)
    parser.add_argument("--seed", type=int, default=0, help="0 gives what the repository ships.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="A new or empty folder.")
    if command is pretrain_command:
        parser.add_argument("--examine", action="store_true", help="Only examine the model that --out holds.")
    options = parser.parse_args(arguments)
    if not vars(options).get("examine") and options.out.exists() and (
            not options.out.is_dir() or any(options.out.iterdir())):
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
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="Names of the rows to make; none: all.")
    parser.add_argument("--model", metavar="DIR", help="Another base model, such as one that pretrain --seed 1 made; "
                        "give --out too, since its results belong in a folder of their own.")
    parser.add_argument("--out", metavar="DIR", help="Where results are recorded; none: data/results.")
    parser.add_argument("--rerun", metavar="FILE.json", help="Make this recorded run again, below runs/, and compare.")
    options = parser.parse_args(arguments)
    for name in ("seeds", "jobs"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ConfigError(f"--{name} is {getattr(options, name)}: give 1 or more")
    if (options.name is None) == (options.rerun is None):
        raise ConfigError("give either the NAME of an experiment, such as table4, or --rerun FILE.json")
    if options.model and not options.out:
        raise ConfigError("--model needs --out: results of two base models must not share a folder")
    if options.rerun:
        return 0 if rerun(options.rerun, Path("runs") / "rerun") else 1
    made = reproduce(options.name, options.out or "data/results", options.seeds, options.jobs, options.quick,
                     options.rows or (), options.model)
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
    from .distributed import set_threads
    from .lab import bench
    from .lab.gpu_report import gpu_report
    from .loading import quiet_libraries
    from .scale.memory import predict

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
    parser.add_argument("--device", help="cpu, or cuda for bfloat16 and NF4; none: cpu, for --gpu-report cuda.")
    parser.add_argument("--gpu-report", action="store_true", help="Report one card at the paper's setting: seconds, "
                        "memory beside the prediction, share of the peak, and training beside a CPU's.")
    parser.add_argument("--tiny", action="store_true", help="Try --gpu-report with a shape that suits a CPU.")
    parser.add_argument("--model", choices=bench.SHAPES, help="Random model; none: tiny on a CPU, 3B on a GPU.")
    parser.add_argument("--threads", type=int, help="Threads of torch; none: torch's own choice.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Where the result goes, after every setting anew.")
    parser.add_argument("--table", type=Path, metavar="FILE.md", help="Where the table goes too.")
    parser.add_argument("--note", default="", help="A line for the table: what else the machine was doing.")
    options = parser.parse_args(arguments)
    set_threads(options.threads)
    quiet_libraries()
    command = shlex.join(["python", "-m", "dvr1_lite", "bench", *arguments])
    if options.gpu_report:
        print(gpu_report(options.device or "cuda", tiny=options.tiny, predict=predict, command=command,
                         completion_tokens=options.completion_tokens, repeats=options.repeats, note=options.note,
                         json_file=options.json, table_file=options.table))
        return 0
    grid = bench.settings(options.frames, options.group_size, options.completion_tokens, options.inner_updates,
                          options.size)
    result, stopped = bench.bench(bench.kinds(options.device or "cpu", options.model), grid, command=command,
                                  repeats=options.repeats, ways=options.ways, micro_batch=options.micro_batch,
                                  json_file=options.json, table_file=options.table, note=options.note)
    print(bench.as_table(result))
    return INTERRUPTED if stopped else 0


# --- own data: check, reward, pilot ----------------------------------------------------------------------------------


def check_command(arguments: Sequence[str]) -> int:
    r"""Check a data set before training: what is in it, which clips are missing or broken, and incorrect spans."""
    from .config import load_config
    from .files import make_folder, resolve
    from .lab import plotting
    from .scale.check import check_records, examples, format_report, print_notes, shared_clips, show_record
    from .scale.datasets import SOURCES, read_any

    parser = Parser(check_command)
    parser.epilog = "Formats and where their data come from: " + "; ".join(f"{k}: {v}" for k, v in SOURCES.items())
    _add_data_options(parser, nargs="+", help="Records: JSONL, JSON or CSV; of several files, shared clips are named.")
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
    files, sound, numbers = {}, True, itertools.count(1)
    for file in options.data:
        errors = []
        records = files[file] = read_any(resolve(file), options.data_root, spans=options.spans, errors=errors)
        chosen = records[::-(-len(records) // options.limit)] if options.limit else records
        report = check_records(chosen, config.num_frames, config.frame_size, decode=not options.fast, errors=errors)
        sound = sound and report.ok
        print("\n" * (len(files) > 1) + f"{file}: " * (len(options.data) > 1)
              + format_report(report, max_broken_share=config.max_broken_share))
        print_notes(chosen, config)
        for (record, frames), number in zip(examples(chosen, config.num_frames, config.frame_size), numbers):
            print(f"\n{show_record(record)}")
            if options.out is not None:
                make_folder(options.out)
                path = Path(options.out) / f"record_{number}.png"
                plotting.save(plotting.frame_strip(frames, record.question[:100], record.answer_in_words), path)
                print(f"frames:   {path}")
    for sentence in shared_clips(files):
        print(f"\nnote: {sentence}")
    return 0 if sound else 1


def reward_command(arguments: Sequence[str]) -> int:
    r"""Try a reward of your own on five completions of a record, before any training; this runs your file."""
    from .files import resolve
    from .own_reward import load_reward, try_on_types
    from .scale.datasets import read_any

    parser = Parser(reward_command)
    parser.add_argument("name", metavar="FILE.py:FUNCTION", help="It takes (record, completion), returns 0 to 1.")
    _add_data_options(parser)
    options = parser.parse_args(arguments)
    text, sound = try_on_types(load_reward(options.name), read_any(resolve(options.data), options.data_root))
    print(text)
    return 0 if sound else 1


def pilot_command(arguments: Sequence[str]) -> int:
    r"""Sample some completions before a training: can it learn, what should be changed first, how long does it take?"""
    from .config import load_config
    from .evaluation import limited
    from .files import make_folder, write_atomically
    from .lab.variants import trainer_class
    from .run import config_of
    from .scale.pilot import MERGE_FIRST, pilot, recommended, report, write_config

    parser = Parser(pilot_command)
    parser.epilog = "Takes --config, --card and every config field as an option too, as train does."
    parser.add_argument("--data", metavar="FILE", help="Your records, with clips in --data-root or beside the file; "
                        "none: the config's train_file.")
    parser.add_argument("--prompts", type=int, default=50, help="Records to draw, the same in every pilot.")
    parser.add_argument("--completions", type=int, default=8, help="Completions of each.")
    parser.add_argument("--adapter", metavar="DIR", help="A run's folder or its adapter, to see whether more training "
                        "pays; --config is then the run's unless given.")
    parser.add_argument("--write-config", type=Path, metavar="FILE.yaml", help="Measure with the recommended settings, "
                        "and write a config with them for train.")
    parser.add_argument("--out", type=Path, metavar="DIR", help="Where pilot.json goes.")
    options, rest = parser.parse_known_args(arguments)
    file, resume, given = parse_training(rest, [action.dest for action in parser._actions])
    if options.adapter and options.write_config:
        raise ConfigError(f"training cannot start from an adapter: {MERGE_FIRST}")
    if resume is not None or (options.write_config and options.write_config.exists()):
        raise ConfigError("leave --resume to train" if resume else f"{options.write_config} exists: give another name")
    if options.write_config and not options.write_config.resolve().parent.is_dir():
        raise ConfigError(f"{options.write_config} cannot be written: make its folder first")
    if options.data is not None:
        given = {"data_root": None, "eval_files": []} | given | {"train_file": options.data}
    config, advice = load_config(file or config_of(options.adapter), given), {}
    if options.write_config:
        config, advice = recommended(config)
    records, evaluations, scoring = _prepare(config, given.get("reward"))
    found = pilot(config, records, prompts=options.prompts, completions=options.completions,
                  trainer=trainer_class(config), scoring=scoring, adapter=options.adapter, progress=True,
                  questions=sum(len(limited(asked, config.eval_limit)) for asked in evaluations.values()))
    print(report(found))
    if options.out is not None:
        make_folder(options.out)
        write_atomically(options.out / "pilot.json", json.dumps(found, indent=1) + "\n")
    if options.write_config:
        print(f"config: {write_config(options.write_config, config, advice)}")
    return 0


# --- memory, merge ---------------------------------------------------------------------------------------------------


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
    from .loading import has_bfloat16
    from .scale import memory

    parser = Parser(memory_command)
    parser.epilog = "Takes --config and every field of it, as train does."
    parser.add_argument("--card", type=int, metavar="GB", help="Settings for a GPU with 15 (T4), 16, 24 or 80 "
                        "GB, to compare.")
    parser.add_argument("--available", type=float, metavar="GB", help="Compare with so many 2**30 bytes.")
    parser.add_argument("--text-tokens", type=int, default=memory.TEXT_TOKENS, help="Question, options, instruction.")
    parser.add_argument("--no-image", action="store_true", help="No record has a picture besides its clip.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Where the prediction goes as JSON.")
    options, rest = parser.parse_known_args(arguments)
    file, _, given = parse_training(rest if options.card is None else [*rest, "--card", str(options.card)],
                                    [action.dest for action in parser._actions])
    config = load_config(file, given)
    if options.available is not None and options.available <= 0:
        raise ConfigError(f"--available is {options.available}: give a number of GB above 0")
    expected = {"image": not options.no_image, "text_tokens": options.text_tokens}
    prediction = memory.predict(config, **expected)
    if options.json is not None:
        write_atomically(options.json, json.dumps(memory.as_dict(prediction), indent=1) + "\n")
    print(memory.table(prediction))
    available = options.available or (card_gb(options.card, has_bfloat16(config.device)) if options.card else None)
    if available is not None:
        memory.check_fits(config, available, **expected)
        print(f"{'available':<24}{available:8.2f} GB: it fits")
    return 0


# --- all commands ----------------------------------------------------------------------------------------------------

COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train_command, "evaluate": evaluate_command, "ask": ask_command, "data": data_command,
    "pretrain": pretrain_command, "reproduce": reproduce_command, "report": report_command,
    "check": check_command, "reward": reward_command, "pilot": pilot_command, "memory": memory_command,
    "merge": merge_command, "bench": bench_command,
}


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

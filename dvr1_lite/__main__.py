r"""The command line: `python -m dvr1_lite COMMAND`, each command one function; `COMMAND --help` lists its options.

What a user can mend ends in one message on stderr and exit status 2.
"""

import argparse
import difflib
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from .errors import ConfigError, UserError

INTERRUPTED = 130  # exit status after Ctrl-C, as in a shell


class Parser(argparse.ArgumentParser):
    r"""Reports a wrong option as a `ConfigError`, like every other mistake, and takes no abbreviations."""

    def __init__(self, command: str, description: str):
        super().__init__(prog=f"python -m dvr1_lite {command}", description=description, allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message: str):
        raise ConfigError(f"{message}; `{self.prog} --help` lists the options")


# --- train -----------------------------------------------------------------------------------------------------------


def train_command(arguments: Sequence[str]) -> int:
    r"""Train with reinforcement, evaluate before and after, and draw figures."""
    from .config import load_config
    from .training import quiet_libraries, train

    config_file, resume, overrides = parse_training(arguments)
    if resume is not None:
        if config_file or overrides:
            given = ", ".join(overrides) or "config"
            raise ConfigError(f"--resume keeps the run's own config: leave out {given}")
        if not (Path(resume) / "config.yaml").is_file():
            raise ConfigError(f"{resume} holds no run to resume (no config.yaml): give the folder of an earlier --out")
        config_file, overrides = Path(resume) / "config.yaml", {"out": str(resume)}
    config = load_config(config_file, overrides)
    quiet_libraries()
    summary = train(config, resume=resume is not None)
    if not summary["complete"]:
        return INTERRUPTED
    if os.environ.get("RANK", "0") != "0":  # one of several processes; the first one tells
        return 0
    print(changes_table(summary))
    print(f"{summary['rollouts']} rollouts, {summary['updates']} updates, "
          f"{sum(summary['seconds'].get(k, 0) for k in ('total', 'evaluation_before', 'evaluation_after')):.0f} s, "
          f"peak memory {summary['peak_memory_gb']:.1f} GB; everything is in {config.out}")
    return 0


def parse_training(arguments: Sequence[str]) -> tuple[str | None, str | None, dict]:
    r"""(config file, folder to resume, overrides) of the train command; every field of the config is an option."""
    from transformers import HfArgumentParser

    from .config import PARTS, TrainConfig, card_settings, field_types, read_yaml, unknown_keys

    class TrainParser(Parser, HfArgumentParser):
        def __init__(self):
            Parser.__init__(self, "train", train_command.__doc__)
            self.add_argument("--config", metavar="FILE.yaml", help="Config file, or the name of a shipped one; "
                              "options given here override it.")
            self.add_argument("--card", type=int, metavar="GB", help="Settings for a GPU with 16, 24 or 80 GB.")
            self.add_argument("--resume", metavar="DIR", help="Go on with the run in this folder.")
            self.dataclass_types = [TrainConfig]
            self._add_dataclass_arguments(TrainConfig)

    parser = TrainParser()
    parser.usage = "%(prog)s [--config FILE.yaml | --resume DIR] [--FIELD VALUE ...]"
    part = parser._optionals
    for action in list(part._group_actions):
        if action.dest in PARTS:
            part = parser.add_argument_group(PARTS[action.dest])
        if part is not parser._optionals:  # listed below its part's name
            parser._optionals._group_actions.remove(action)
            part._group_actions.append(action)
        if action.option_strings[0].startswith("--no_"):
            action.help = f"The same as --{action.dest} false."
    for action in parser._actions:
        kind, optional = field_types().get(action.dest, (None, False))
        if optional:
            action.type = _or_none(kind)
        if action.nargs == "+":
            action.nargs = "*"
    unset = object()
    parsed, unknown = parser.parse_known_args(
        arguments, argparse.Namespace(**{action.dest: unset for action in parser._actions if action.dest != "help"}))
    for word in unknown:
        unknown_keys([word.lstrip("-").partition("=")[0].replace("-", "_")], extra=("config", "resume", "card"))
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


def changes_table(summary: dict) -> str:
    r"""Accuracy before and after for each evaluation, with the paired change, all in per cent."""
    lines = []
    for name, change in summary["change"].items():
        before, after = summary["before"][name], summary["after"][name]
        low, high = (100 * bound for bound in change["ci95"])
        lines.append(f"{name}: {100 * before['accuracy']:.1f} -> {100 * after['accuracy']:.1f} %, change "
                     f"{100 * change['change']:+.1f} [{low:+.1f}, {high:+.1f}] points (95 %, paired, by clip; n = "
                     f"{after['n']}), format {100 * after['format_rate']:.1f} %")
    return "\n".join(lines) or "no evaluation files: nothing was evaluated"


# --- evaluate and ask ------------------------------------------------------------------------------------------------


def evaluate_command(arguments: Sequence[str]) -> int:
    r"""Answer the questions of a file and report accuracy with intervals; continues what an earlier call began."""
    from .data import read_records
    from .evaluation import evaluate, summarise
    from .files import write_atomically
    from .paths import resolve
    from .training import limited, versions

    parser = Parser("evaluate", evaluate_command.__doc__)
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
    _check_counts(options)
    out, started = Path(options.out), time.perf_counter()
    records = limited(read_records(resolve(options.data), options.data_root), options.limit)
    config, policy = _load(options)
    _claim(out, {**vars(options), "out": None, "model": config.model})
    rows = evaluate(policy, records, view=config.view(), max_new_tokens=config.max_new_tokens, batch=options.batch,
                    temperature=options.temperature, seed=options.seed, samples=options.samples,
                    out=out / "predictions.jsonl", progress=True)
    summary = summarise(rows) | {"seconds": round(time.perf_counter() - started, 1), "seed": options.seed,
                                 "versions": versions()}
    write_atomically(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    print(accuracy_table(summary))
    return 0


def accuracy_table(summary: dict) -> str:
    r"""Accuracy in per cent with its interval, for all questions and by type, and what else was measured."""
    rows = [("all", summary), *summary["by_type"].items()]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {100 * cell['accuracy']:5.1f} % [{100 * cell['ci95'][0]:.1f}, "
             f"{100 * cell['ci95'][1]:.1f}]  n = {cell['n']}" for name, cell in rows]
    lines.append(f"format {100 * summary['format_rate']:.1f} %, {summary['broken']} questions with a broken clip")
    if "mean_iou" in summary:
        recall = ", ".join(f"R@{m} {100 * share:.1f} %" for m, share in summary["recall"].items())
        lines.append(f"mean IoU {summary['mean_iou']:.3f}, {recall}")
    if "acc_gqa" in summary:
        low, high = (100 * bound for bound in summary["acc_gqa_ci95"])
        lines.append(f"right and grounded (Acc@GQA, IoP >= 0.5) {100 * summary['acc_gqa']:.1f} % "
                     f"[{low:.1f}, {high:.1f}], mean IoP {summary['mean_iop']:.3f}")
    return "\n".join(lines)


def ask_command(arguments: Sequence[str]) -> int:
    r"""Ask the base model, or one that you trained, about a clip; prints its trace and its answer."""
    from .data import Record, prompt_text, with_option
    from .evaluation import see
    from .rewards import parse_completion
    from .rollout import sample_groups

    parser = Parser("ask", ask_command.__doc__)
    _add_policy_options(parser)
    parser.add_argument("--clip", required=True, metavar="FILE", help="A video file.")
    parser.add_argument("--question", required=True, help="What you want to know.")
    parser.add_argument("--options", nargs="*", default=[], metavar="TEXT", help="Answers to choose from.")
    options = parser.parse_args(arguments)
    config, policy = _load(options)
    record = Record("ask", options.question, tuple(options.options), "",
                    "multiple choice" if options.options else "exact", "ask", Path(options.clip))
    prompt = policy.prompt(prompt_text(record, instruction=config.instruction), see(policy, record, config.view()))
    unknown = policy.unknown_words(options.question, *options.options)
    if unknown:
        print(f"note: the model has never seen {', '.join(unknown)}; do not expect much of its answer", file=sys.stderr)
    text = sample_groups(policy, [prompt], 1, config.max_new_tokens, greedy=True).texts[0][0]
    found = parse_completion(text)
    if not found.well_formed:
        print(f"not in the form <think>...</think><answer>...</answer>: {text}")
        return 0
    spans = "".join(f", from {start} to {end} s" for start, end in found.spans or ())
    print(f"trace:  {found.think}\nanswer: {with_option(found.answer, record.options)}{spans}")
    return 0


def _add_policy_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", metavar="DIR", help="Adapter that training wrote; none: the base model.")
    parser.add_argument("--config", metavar="FILE.yaml", help="Config of model, frames and prompt; none: that of the "
                        "run the adapter is from, or the defaults.")
    parser.add_argument("--model", help="Base model; none: the config's.")
    parser.add_argument("--device", help="cpu or cuda; none: the config's.")


def _load(options: argparse.Namespace):
    r"""The config that applies and the policy of `--adapter`, or the base model."""
    from .config import load_config
    from .training import load_policy, quiet_libraries

    file = options.config
    if file is None and options.adapter is not None:
        above = [folder / "config.yaml" for folder in list(Path(options.adapter).resolve().parents)[:3]]
        file = next((path for path in above if path.is_file()), None)
    overrides = {name: getattr(options, name) for name in ("model", "device") if getattr(options, name) is not None}
    config = load_config(file, overrides)
    quiet_libraries()
    return config, load_policy(config, options.adapter)


def _check_counts(options: argparse.Namespace) -> None:
    for name, least in (("limit", 0), ("temperature", 0), ("samples", 1), ("batch", 1), ("seed", 0)):
        if not getattr(options, name) >= least:
            raise ConfigError(f"--{name} is {getattr(options, name)}: give {least} or more")


def _claim(out: Path, settings: dict) -> None:
    r"""Marks a folder as that of one evaluation; refuses one that holds another. Raises `ConfigError`."""
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
    options = _seed_and_folder("data", data_command.__doc__, arguments)
    from .toy import build_dataset

    manifest = build_dataset(options.out, options.seed)
    for name, split in manifest["splits"].items():
        print(f"{name}: {split['questions']} questions on {split['clips']} clips")
    return 0


def pretrain_command(arguments: Sequence[str]) -> int:
    r"""Build the tiny base model from a seed and examine it (about half an hour on 2 cores)."""
    options = _seed_and_folder("pretrain", pretrain_command.__doc__, arguments)
    from . import acceptance
    from .config import TrainConfig
    from .data import read_records
    from .paths import resolve
    from .policy import Policy
    from .pretraining import Recipe, pretrain

    config = TrainConfig()
    records = read_records(resolve(config.train_file))
    facts = pretrain(options.out, Recipe(seed=options.seed))
    print(f"{facts['parameters']} parameters in {options.out}, {facts['minutes']} minutes")
    found = acceptance.examine(Policy.load(options.out), records, num_frames=config.num_frames,
                               max_new_tokens=config.max_new_tokens)
    acceptance.write(found, options.out)
    print(acceptance.as_table(found))
    return 0


def _seed_and_folder(command: str, description: str, arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(command, description)
    parser.add_argument("--seed", type=int, default=0, help="0 gives what the repository ships.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="A new or empty folder.")
    options = parser.parse_args(arguments)
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise ConfigError(f"{options.out} exists and is not empty: give another --out, or remove it first")
    return options


# --- reproduce and report --------------------------------------------------------------------------------------------


def reproduce_command(arguments: Sequence[str]) -> int:
    r"""Make the runs of a table of the paper, with seeds; goes on where an earlier call stopped."""
    from .experiments import EXPERIMENTS, GROUPS, reproduce, rerun

    parser = Parser("reproduce", reproduce_command.__doc__)
    parser.add_argument("name", nargs="?", metavar="NAME", help=f"One of {', '.join([*EXPERIMENTS, *GROUPS])}.")
    parser.add_argument("--seeds", type=int, help="Runs of each row; none: what the protocol says.")
    parser.add_argument("--jobs", type=int, default=1, help="Runs made at the same time, one core each.")
    parser.add_argument("--quick", action="store_true", help="One seed, a few steps and questions: does it work?")
    parser.add_argument("--out", default="data/results", metavar="DIR", help="Where results are recorded.")
    parser.add_argument("--rerun", metavar="FILE.json", help="Make this recorded run again, below runs/, and compare.")
    options = parser.parse_args(arguments)
    for name in ("seeds", "jobs"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ConfigError(f"--{name} is {getattr(options, name)}: give 1 or more")
    if (options.name is None) == (options.rerun is None):
        raise ConfigError("give the NAME of an experiment or --rerun FILE.json, and not both")
    if options.rerun:
        return 0 if rerun(options.rerun, Path("runs") / "rerun") else 1
    return 1 if reproduce(options.name, options.out, options.seeds, options.jobs, options.quick) else 0


def report_command(arguments: Sequence[str]) -> int:
    r"""Draw recorded results beside the published figures; trains nothing."""
    from .report import report

    parser = Parser("report", report_command.__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="Experiments; none: all that have results.")
    parser.add_argument("--out", default="data/results", metavar="DIR", help="Where results are recorded.")
    options = parser.parse_args(arguments)
    written = report(options.names, options.out)
    print("\n".join(str(path) for path in written))
    return 0


# --- bench -----------------------------------------------------------------------------------------------------------


def bench_command(arguments: Sequence[str]) -> int:
    r"""Measure seconds and memory of a training step, beside a repeated prompt and TRL; or profile the default run."""
    from . import bench, profiling
    from .files import make_folder, write_atomically

    options = _bench_parser().parse_args(arguments)
    _use_threads(options.threads)
    if options.profile:
        if options.profile_steps < 1:
            raise ConfigError(f"--profile-steps is {options.profile_steps}: give 1 or more")
        found = profiling.profile(options.profile_steps, {"device": options.device})
        for path, text in ((options.json, json.dumps(found, indent=1)), (options.table, profiling.as_table(found))):
            if path is not None:
                make_folder(path.parent)
                write_atomically(path, text + "\n")
        print(profiling.as_table(found))
        return 0
    kinds = bench.kinds(options.device, options.model)
    plan = bench.Plan(tuple(options.frames), tuple(options.group_size),
                      options.completion_tokens or bench.completion_tokens(kinds[0]), tuple(options.inner_updates),
                      options.size, options.repeats, tuple(options.ways), options.micro_batch)
    result, stopped = bench.bench(kinds, plan, command=shlex.join(["python", "-m", "dvr1_lite", "bench", *arguments]),
                                  json_file=options.json, table_file=options.table, note=options.note)
    print(bench.as_table(result))
    return INTERRUPTED if stopped else 0


def _bench_parser() -> Parser:
    from .bench import SHAPES, WAYS

    parser = Parser("bench", bench_command.__doc__)
    parser.add_argument("--frames", type=int, nargs="+", default=[8, 16, 32], metavar="N", help="Frames of the clip.")
    parser.add_argument("--group-size", type=int, nargs="+", default=[4, 8, 16], metavar="G",
                        help="Completions of the prompt.")
    parser.add_argument("--completion-tokens", type=int, metavar="T", help="Length of every completion; none: 64, and "
                        "256 for the 3B.")
    parser.add_argument("--inner-updates", type=int, nargs="+", default=[1, 4], metavar="K", help="Updates of the "
                        "weights a step: the grid is made with the first number, its middle with the others too.")
    parser.add_argument("--size", type=int, default=252, help="Height and width of the frames in pixels.")
    parser.add_argument("--repeats", type=int, default=5, help="Rounds that the medians are of, after one to warm up.")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS, help="What is measured beside shared.")
    parser.add_argument("--micro-batch", type=int, help="Completions in one forward pass of the shared way; none: all.")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for bfloat16 and NF4.")
    parser.add_argument("--model", choices=SHAPES, help="Sizes of the random model; none: tiny on a CPU, 3B on a GPU.")
    parser.add_argument("--threads", type=int, help="Threads of torch; none: torch's own choice.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Where the result goes, after every setting anew.")
    parser.add_argument("--table", type=Path, metavar="FILE.md", help="Where the table goes too.")
    parser.add_argument("--note", default="", help="A line for the table: what else the machine was doing.")
    parser.add_argument("--profile", action="store_true", help="Tell where a step of the default run spends its time.")
    parser.add_argument("--profile-steps", type=int, default=20, help="Steps that the profile is of.")
    return parser


def _use_threads(count: int | None) -> None:
    import torch

    if count is not None and count < 1:
        raise ConfigError(f"--threads is {count}: give 1 or more")
    if count is not None:
        torch.set_num_threads(count)


# --- check and memory ------------------------------------------------------------------------------------------------


def check_command(arguments: Sequence[str]) -> int:
    r"""Look a data set over before training: what is in it, which clips are missing or broken, and wrong spans."""
    from . import plotting
    from .data import check_records, examples, format_report, read_records, show_record
    from .files import make_folder
    from .paths import resolve

    parser = Parser("check", check_command.__doc__)
    parser.add_argument("--data", required=True, metavar="FILE", help="Records: JSONL, JSON or CSV.")
    parser.add_argument("--root", metavar="DIR", help="Folder that clip paths start from; none: the file's own.")
    parser.add_argument("--spans", metavar="FILE", help="NExT-GQA's spans; none: gsub_NAME.json beside the CSV.")
    parser.add_argument("--num-frames", type=int, default=16, help="Frames that training will sample from a clip.")
    parser.add_argument("--limit", type=int, default=0, help="Records to open, drawn evenly; 0: all.")
    parser.add_argument("--fast", action="store_true", help="Read headers only: misses pictures that do not decode.")
    parser.add_argument("--out", metavar="DIR", help="Where frame strips of three records go as PNG files.")
    options = parser.parse_args(arguments)
    if options.num_frames < 1 or options.limit < 0:
        raise ConfigError(f"--num-frames is {options.num_frames} and --limit is {options.limit}: give 1 or more frames "
                          f"and a limit of 0 or more")
    errors = []
    records = read_records(resolve(options.data), options.root, spans=options.spans, errors=errors)
    chosen = records[::-(-len(records) // options.limit)] if options.limit else records
    report = check_records(chosen, options.num_frames, decode=not options.fast, errors=errors)
    print(format_report(report))
    for number, (record, frames) in enumerate(examples(chosen, options.num_frames), 1):
        print(f"\n{show_record(record)}")
        if options.out is not None:
            make_folder(options.out)
            path = Path(options.out) / f"record_{number}.png"
            plotting.save(plotting.frame_strip(frames, record.question[:100], record.answer_in_words), path)
            print(f"frames:   {path}")
    return 0 if report.ok else 1


def merge_command(arguments: Sequence[str]) -> int:
    r"""Add an adapter to its base model's weights and save a checkpoint of its own, with a model card."""
    from . import export
    from .training import quiet_libraries

    parser = Parser("merge", merge_command.__doc__)
    parser.add_argument("--adapter", required=True, metavar="DIR", help="Adapter that training wrote.")
    parser.add_argument("--out", required=True, metavar="DIR", help="A new or empty folder.")
    parser.add_argument("--model", help="Base model; none: the one that the adapter names.")
    parser.add_argument("--dtype", default="bfloat16", help="Number type of the saved weights.")
    parser.add_argument("--device", default="cpu", help="cpu or cuda.")
    options = parser.parse_args(arguments)
    quiet_libraries()
    out = export.merge(options.adapter, options.out, model=options.model, dtype=options.dtype, device=options.device)
    print(f"the merged model is in {out}; README.md there is its model card and says how lmms-eval runs it")
    return 0


def memory_command(arguments: Sequence[str]) -> int:
    r"""Predict the memory of a training run from its configuration alone, and say what to change if it is too much."""
    from . import memory
    from .config import card_gb, load_config
    from .files import write_atomically

    parser = Parser("memory", memory_command.__doc__ + " Takes --config and every field of it, as train does.")
    parser.add_argument("--card", type=int, metavar="GB", help="Settings for a GPU with 16, 24 or 80 GB, to compare.")
    parser.add_argument("--available", type=float, metavar="GB", help="Compare with so many 2**30 bytes.")
    parser.add_argument("--text-tokens", type=int, default=memory.TEXT_TOKENS, help="Question, options, instruction.")
    parser.add_argument("--no-image", action="store_true", help="No record has a picture besides its clip.")
    parser.add_argument("--shards", type=int, default=1, metavar="K", help="Unquantised weights are divided between K "
                        "processes (configs/accelerate/fsdp.yaml).")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Where the prediction goes as JSON.")
    options, rest = parser.parse_known_args(arguments)
    file, _, given = parse_training(rest if options.card is None else [*rest, "--card", str(options.card)])
    config = load_config(file, given)
    expected = {"image": not options.no_image, "text_tokens": options.text_tokens, "shards": options.shards}
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
    "check": check_command, "memory": memory_command, "merge": merge_command,
    "bench": bench_command,
}


def usage() -> str:
    r"""The commands and what each does."""
    lines = [f"  {name:<10} {command.__doc__.splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: python -m dvr1_lite COMMAND [options]", "", *lines, "",
                      "`python -m dvr1_lite COMMAND --help` lists the options of a command."])


def run(arguments: Sequence[str]) -> int:
    r"""Runs one command; errors are raised."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        raise ConfigError(f"unknown command {name!r}: " + (f"did you mean {near[0]}?" if near else
                                                          f"use one of {', '.join(COMMANDS)}"))
    return COMMANDS[name](rest)


def main(arguments: Sequence[str] | None = None) -> int:
    r"""Runs one command and returns the exit status: 0, 2 for a mistake that the message explains, 130 after Ctrl-C."""
    try:
        return run(sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    os.environ.setdefault("MPLBACKEND", "Agg")  # figures go to files; not in main(), whose caller may be a notebook
    sys.exit(main())

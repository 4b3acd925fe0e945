r"""Check a data set before training on it: what is in it, which files are missing or broken, which spans lie outside
their clip, and how much smaller the frames get. One clip is open at a time, and frames are kept at `frame_size`.
"""

import contextlib
import hashlib
import itertools
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ..config import TrainConfig
from ..data import Record, prompt_text
from ..decoding import probe_clip
from ..errors import ClipError, RecordError
from ..files import resolve
from ..loading import load_tokenizer, unknown_words
from ..video import Clip, read_clip, read_image
from ..words import plural, ranges

ROUNDING = 0.05  # seconds; annotations are rounded to a tenth of a second
LONG_ANSWER = 8  # words; hardly any model writes an equal text of more
REWARDS = {  # what a correct answer earns besides 1 for the format, by problem type (judges.py)
    "multiple choice": "1 for the letter of the correct option",
    "exact": "1 for a text that equals the answer, but for case, white space and underscores",
    "numerical": "1 for a number that equals the answer to two decimals",
    "OCR": "1 - the word error rate",
    "free-form": "the mean F-measure of ROUGE-1, ROUGE-2 and ROUGE-L",
    "regression": "1 - the relative error of the number",
    "grounding": "1 for the answer and the IoU of the first time span, at most 2 together",
}
WHY = {"multiple choice": "they have options", "exact": "they have no options"}  # for rows that name no problem type


class Media(NamedTuple):
    r"""A readable clip or picture (duration 0): its own size in pixels, and its length in seconds."""

    width: int
    height: int
    duration: float


@dataclass
class Report:
    r"""What `check_records` found. Each problem is a (record id, message) pair; `media` has every readable file."""

    records: Sequence[Record]
    num_frames: int
    frame_size: int
    media: dict[Path, Media] = field(default_factory=dict)
    missing: list[tuple[str, str]] = field(default_factory=list)
    undecodable: list[tuple[str, str]] = field(default_factory=list)
    span_errors: list[tuple[str, str]] = field(default_factory=list)
    spans_outside: list[tuple[str, str]] = field(default_factory=list)
    record_errors: list[tuple[str, str]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        r"""Whether every record can be trained on. A span that only reaches out of its clip is allowed."""
        return not (self.missing or self.undecodable or self.span_errors or self.record_errors)


def check_records(records: Iterable[Record], num_frames: int = 1, frame_size: int = 252, *, decode: bool = True,
                  errors: Iterable[RecordError] = ()) -> Report:
    r"""Open every clip and picture once, and compare the spans with the clips' true durations.

    num_frames, frame_size (pixels): as in training. decode: False reads headers and packets only, which finds missing
    and truncated files but not pictures that do not decode. errors: what reading the records collected.
    """
    report = Report(list(records), num_frames, frame_size, record_errors=[("", str(error)) for error in errors])
    failed: dict[Path, str] = {}
    for record in report.records:
        for path in filter(None, (record.clip, record.image)):
            if path not in report.media and path not in failed:
                try:
                    report.media[path] = _open_media(path, path == record.clip, num_frames, frame_size, decode)
                except ClipError as error:
                    failed[path] = str(error)
            if path in failed:
                where = report.undecodable if os.path.exists(path) else report.missing
                where.append((record.record_id, failed[path]))
        media = report.media.get(record.clip)
        duration = media.duration if media else record.duration
        for start, end in record.spans if duration is not None else ():
            text = f"{record.clip}: the span from {start} to {end} s"
            if start >= duration or end <= 0:
                report.span_errors.append((record.record_id, f"{text} lies outside the clip of {duration:.2f} s"))
            elif start < 0 or end > duration + ROUNDING:
                report.spans_outside.append((record.record_id, f"{text} reaches out of the clip of {duration:.2f} s"))
    return report


def _open_media(path: Path, is_clip: bool, num_frames: int, frame_size: int, decode: bool) -> Media:
    size = (frame_size, frame_size)
    if is_clip:
        probe = probe_clip(path)
        if decode:
            read_clip(path, num_frames, size)
        elif len(probe.starts) < num_frames:
            raise ClipError(f"{path}: the clip has {plural(len(probe.starts), 'frame')} but {num_frames} are asked "
                            f"for; sample fewer")
        return Media(probe.width, probe.height, probe.duration)
    if decode:
        read_image(path, size)
    try:
        with Image.open(path) as picture:  # reads the header
            return Media(*picture.size, 0.0)
    except OSError as error:
        raise ClipError(f"{path}: not a readable picture; download or save it again") from error


def format_report(report: Report, examples: int = 10, max_broken_share: float = 1.0) -> str:
    r"""Return the report as text: counts, the five most frequent sizes, then each kind of problem with its first
    `examples` cases, and whether more of the records than `max_broken_share` have files that cannot be read."""
    lines = [f"{plural(len(report.records), 'record')}, {len(report.media)} readable "
             f"{'clip or picture' if len(report.media) == 1 else 'clips and pictures'}"]
    for kind in ("problem_type", "question_type"):
        counts = Counter(getattr(record, kind) for record in report.records)
        lines += [f"  {kind.replace('_', ' ')} {name}: {count}" for name, count in sorted(counts.items())]
    shown, sizes = f"{report.frame_size} x {report.frame_size}", Counter(m[:2] for m in report.media.values())
    for (width, height), count in sizes.most_common(5):
        shape = "" if width == height else f", aspect ratio {width / height:.2f} squeezed to 1"
        lines.append(f"  {count} of {width} x {height} pixels are shown as {shown}{shape}")
    lines += [f"  and {plural(len(sizes) - 5, 'other size')} shown as {shown}"] * (len(sizes) > 5)
    if lengths := [media.duration for media in report.media.values() if media.duration]:
        ends, count = sorted({min(lengths), max(lengths)}), report.num_frames
        long, apart = (" to ".join(dict.fromkeys(f"{end:{'.1f' if end >= 0.1 else '.1g'}}" for end in found))
                       for found in (ends, [end / count for end in ends]))
        lines.append(f"  clips of {long} s: {plural(count, 'frame')}, one every {apart} s")
    lines += reward_lines(report.records) if report.records else []
    problems = {"unreadable records": report.record_errors, "missing files": report.missing,
                "undecodable files": report.undecodable, "spans without a second in their clip": report.span_errors,
                "spans that reach out of their clip (kept as annotated)": report.spans_outside}
    for title, found in problems.items():
        names, messages = map(set, zip(*found)) if found and title.endswith("files") else ((), found)
        lines.append(f"{title}: {len(messages)}" + (f", used by {plural(len(names), 'record')}" if names else ""))
        found = _joined(found)
        lines += [f"  {name}: {message}" if name else f"  {message}" for name, message in found[:examples]]
        lines += [f"  and {len(found) - examples} more"] * (len(found) > examples)
        if title == "unreadable records" and found:
            lines.append("  your own clips need the fields video, question, answer and, for answers to choose from, "
                         "options; no others")
    broken = len({name for name, _ in report.missing + report.undecodable}) / max(1, len(report.records))
    if broken > max_broken_share:
        lines.append(f"{100 * broken:.0f} % of the records have files that cannot be read, and a run ends above "
                     f"max_broken_share = {100 * max_broken_share:.0f} %: fix them or leave them out")
    return "\n".join(lines)


def reward_lines(records: Sequence[Record]) -> list[str]:
    r"""Say which built-in reward the records get, why, and which of them it hardly fits."""
    by_type, lines = defaultdict(list), ["built-in rewards, besides 1 for the format (a malformed completion earns 0):"]
    for record in records:
        by_type[record.problem_type].append(record)
    for kind, found in sorted(by_type.items()):
        chosen = all(record.question_type == kind and not record.source for record in found)  # the row names no type
        why = WHY[kind] if chosen and kind in WHY else "problem_type in the file says so"
        lines.append(f"  {kind} ({_named(found)}; {why}): {REWARDS[kind]}")
        long = [record for record in found if len(record.answer.split()) > LONG_ANSWER]
        if kind == "exact" and long:
            lines.append(f"    {plural(len(long), 'answer')} of more than {LONG_ANSWER} words ({_named(long)}), which "
                         f"hardly any completion will equal: give options, or a reward of your own (--reward)")
    return lines


def _named(records: Sequence[Record]) -> str:
    r"""Return how many records these are, and their lines or, without line numbers, the first one's name."""
    numbers = [int(match[1]) for record in records if (match := re.search(r", line (\d+)$", record.record_id))]
    place = (f"line{'s' * (len(numbers) > 1)} {ranges(numbers)}" if len(numbers) == len(records) else
             f"the first is {records[0].record_id}")
    return f"{plural(len(records), 'record')}, {place if len(place) <= 80 else place[:77] + '...'}"


def _joined(problems: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    r"""Join messages that differ in their line alone: "a.jsonl, lines 2-4, field 'answer': is missing; add it"."""
    lines = defaultdict(list)
    for name, message in problems:
        match = re.match(r"(.*?, line )(\d+)((?:, field|: ).*)", f"{name}: {message}" if name else message, re.DOTALL)
        lines[(match[1], match[3]) if match else (name, message)].append(int(match[2]) if match else 0)
    return [(name, rest) if numbers[0] == 0 else ("", f"{name[:-1]}{'s' * (len(numbers) > 1)} {ranges(numbers)}{rest}")
            for (name, rest), numbers in lines.items()]


def shared_clips(files: Mapping[str, Sequence[Record]]) -> list[str]:
    r"""Return a sentence for each two of these files, by name, with questions about one clip, or about copies of it."""
    paths = {name: {record.clip.resolve() for record in records if record.clip} for name, records in files.items()}
    sizes = {path: path.stat().st_size for path in set().union(*paths.values()) if path.is_file()}
    counts, same = Counter(sizes.values()), {}
    for path, size in sizes.items():
        if counts[size] > 1:
            with contextlib.suppress(OSError), open(path, "rb") as file:  # an unreadable one is named where it is read
                same[path] = hashlib.file_digest(file, "sha256").hexdigest()
    clips = {name: {same.get(path, str(path)): path for path in sorted(found, reverse=True)}
             for name, found in paths.items()}
    return [f"{first} and {second} share {plural(len(both), 'clip')}, such as {clips[first][one]}"
            + f" (its copy is {clips[second][one]})" * (clips[first][one] != clips[second][one])
            + ": split by clip, or the accuracy means little" for first, second in itertools.combinations(clips, 2)
            if (both := clips[first].keys() & clips[second].keys()) and (one := min(both, key=clips[first].get))]


def print_notes(records: Sequence[Record], config: TrainConfig, tokenizer=None) -> None:
    r"""Print to stderr what of these records the model cannot know or see well; nothing if all is well."""
    model, side, count = resolve(config.model), config.frame_size, config.num_frames
    tokenizer = tokenizer or load_tokenizer(model if model.exists() else config.model, config.local_files_only)
    words = unknown_words(tokenizer, *{f"{prompt_text(record)} {record.answer}" for record in records})
    if words:
        more = f" and {plural(len(words) - 8, 'more word')}" if len(words) > 8 else ""
        print(f"note: the model has never seen {', '.join(words[:8])}{more}; do not expect much of its answers",
              file=sys.stderr)
    clips = list(dict.fromkeys(record.clip for record in records if record.clip))
    for clip in clips[::-(-len(clips) // 10) or 1]:  # ten of them, evenly drawn
        try:
            probe = probe_clip(clip)
        except ClipError:
            continue  # named where it is read
        if probe.width * probe.height > 4 * side**2 or probe.duration > 4 * count:
            print(f"note: {clip} ({probe.width} x {probe.height} pixels, {probe.duration:.1f} s) is shown to the model "
                  f"as {count} frames of {side} x {side}; small or short things may not be visible (a model can be "
                  f"trained for more with train --num-frames and --frame-size)", file=sys.stderr)
            return


def examples(records: Sequence[Record], num_frames: int, frame_size: int = 252, count: int = 3
             ) -> list[tuple[Record, Clip]]:
    r"""Return up to `count` readable records, of different question types first, with their frames as the model sees
    them (a picture is one frame)."""
    firsts = {record.question_type: record for record in reversed(records)}
    order = [*reversed(firsts.values()), *(record for record in records if record is not firsts[record.question_type])]
    found, size = [], (frame_size, frame_size)
    for record in order:
        if len(found) == count:
            break
        with contextlib.suppress(ClipError):
            clip = read_clip(record.clip, num_frames, size) if record.clip else Clip(
                frames=read_image(record.image, size), seconds=[0.0], fps=1.0, duration=0.0, path=str(record.image))
            found.append((record, clip))
    return found


def show_record(record: Record) -> str:
    r"""Return a record as text: the prompt, the correct answer, and the files."""
    lines = [f"record:   {record.record_id} ({record.problem_type}; {record.question_type})",
             *(f"prompt:   {line}" for line in prompt_text(record).splitlines()), f"answer:   {record.answer_in_words}"]
    files = [("clip", record.clip), ("picture", record.image)]
    return "\n".join(lines + [f"{name + ':':<10}{path}" for name, path in files if path is not None])

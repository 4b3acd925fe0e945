r"""Checked rows of JSON and JSONL files. Every error names file, line, field and fix.

A row of a data set is a pydantic model whose fields have the types below (`Text`, `Options`, `Spans`, `MediaPath`) and
whose method `record(where)` returns the record. `read_rows` picks the model that fits a file's field names best.
"""

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PureWindowsPath
from typing import Annotated, Any

from pydantic import (AfterValidator, BaseModel, Field, StringConstraints, TypeAdapter, ValidationError,
                      ValidationInfo)
from pydantic_core import from_json

from .errors import RecordError

MAX_FILE_BYTES = 2**30  # Video-R1-260k.json has about 0.2 GB
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SPECIAL_TOKEN = re.compile(r"<\|\w{1,40}\|>")  # in a question it would end the turn or stand for a frame
CHOICE = re.compile(r"\(?([A-Z])(?:[.):]+(?:\s.*)?)?", re.DOTALL)  # A, A., (A), "(A) red", but not "A cat"
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:[/\\]")  # "file:/etc", "https://..."; "Title: x.mp4" is a name


class FieldError(ValueError):
    r"""A field whose value does not fit the row's other fields: FieldError(field, "problem; fix")."""


def plain_text(text: str) -> str:
    r"""Refuse the model's special tokens in a text."""
    if token := SPECIAL_TOKEN.search(text):
        raise ValueError(f"holds the model's special token {token[0]}; remove it from the text")
    return text


def one_of(*known: str) -> AfterValidator:
    r"""Return a validator that takes one of the known texts in any case."""
    def check(text: str) -> str:
        for name in known:
            if name.lower() == text.strip().lower():
                return name
        raise ValueError(f"unknown value {text[:40]!r}; use one of: {', '.join(known)}")
    return AfterValidator(check)


def check_span(span: tuple[float, float]) -> tuple[float, float]:
    r"""Return (start, end) in seconds, start < end. A span may reach out of its clip, as annotations do."""
    if span[0] >= span[1]:
        raise ValueError(f"the span from {span[0]} to {span[1]} s has no length; give a start before the end")
    return span


def remove_labels(options: tuple[str, ...]) -> tuple[str, ...]:
    r"""Return the options' texts without the letters before them: "A. red" and "(A) red" become "red"."""
    texts = tuple(re.sub(rf"\A\(?{letter}[.):]+\s+", "", f"{option} ").strip()
                  for letter, option in zip(LETTERS, options))
    if "" in texts or len(options) > len(LETTERS):
        raise ValueError(f"{len(options)} options, {texts.count('')} of them empty; give 2 to {len(LETTERS)} texts")
    return texts


def distinct(options: tuple[str, ...]) -> tuple[str, ...]:
    r"""Refuse options of which two are the same: only one of their letters would count as correct."""
    twice = [option for option in options if options.count(option) > 1]
    if twice:
        raise ValueError(f"holds {twice[0][:40]!r} {len(twice)} times; make the options different")
    return options


def path_below(text: str, info: ValidationInfo) -> Path:
    r"""Return a path below the data root `info.context["root"]`: not absolute, no URL, no `..`, no link out of it."""
    root, windows = info.context["root"], PureWindowsPath(text)  # which knows / and \ and drive letters alike
    leaves = not text or windows.drive or windows.root or ".." in windows.parts or "\0" in text or URL.match(text)
    with contextlib.suppress(OSError, RuntimeError):  # a name too long, a loop of links
        if not leaves and (root / text).resolve().is_relative_to(root.resolve()):
            return root / text
    raise ValueError(f"{text[:80]!r} leaves the data root {root}, perhaps through a link; give a path relative to the "
                     f"data root, or the folder that the clips are in as the data root")


Stripped = Annotated[str, Field(coerce_numbers_to_str=True), StringConstraints(strip_whitespace=True)]
Text = Annotated[Stripped, AfterValidator(plain_text)]
FullText = Annotated[Stripped, StringConstraints(min_length=1), AfterValidator(plain_text)]
Options = Annotated[tuple[Text, ...], AfterValidator(remove_labels)]
DistinctOptions = Annotated[Options, AfterValidator(distinct)]  # published data sets hold a few that are not
Seconds = Annotated[float, Field(allow_inf_nan=False)]
Spans = tuple[Annotated[tuple[Seconds, Seconds], AfterValidator(check_span)], ...]
SPANS = TypeAdapter(Spans)
MediaPath = Annotated[Text, AfterValidator(path_below)]


def choose_letter(field: str, text: str, options: Sequence[str]) -> str:
    r"""Return the letter of the option that "C", "(C)", "C.", "C. red" or the option's own text names."""
    if len(options) < 2:
        raise FieldError("options", f"{len(options)} options; give 2 to {len(LETTERS)}")
    match = CHOICE.fullmatch(text)
    if match and match[1] in LETTERS[:len(options)]:
        return match[1]
    if text in options:
        return LETTERS[options.index(text)]
    raise FieldError(field, f"{text[:40]!r} is none of the {len(options)} options; give a letter from A to "
                            f"{LETTERS[len(options) - 1]}")


def between(text: str, tag: str) -> str | None:
    r"""Return what stands between the first <tag> and the </tag> after it, or None."""
    start = text.find(f"<{tag}>")
    end = text.find(f"</{tag}>", start)
    return text[start + len(tag) + 2:end].strip() if 0 <= start < end else None


def glue_spans(field: str, solution: str) -> tuple[tuple[float, float], ...]:
    r"""Return the spans of `<glue>[(1.0, 2.5)]</glue>` with any brackets, () if there is no <glue>; or FieldError."""
    glue = between(solution, "glue")
    numbers = (glue or "").translate(str.maketrans("[](),;", "      ")).split()
    if glue is not None and (len(numbers) % 2 or not numbers):
        raise FieldError(field, "<glue> holds no (start, end) pairs; write it as <glue>[(1.0, 2.5)]</glue>")
    try:
        return SPANS.validate_python(tuple(zip(numbers[::2], numbers[1::2])))
    except ValidationError as error:
        raise FieldError(field, _first_problem(error)[1]) from error


def _first_problem(error: ValidationError) -> tuple[str, str]:
    r"""Return the name of the first incorrect field, and what is incorrect with the fix."""
    first = error.errors(include_url=False)[0]
    known = {"missing": "is missing; add it", "string_too_short": "is empty; add it",
             "value_error": str(first.get("ctx", {}).get("error")),
             "string_type": f"{str(first['input'])[:40]!r} does not fit; write a text in quotes",
             "tuple_type": f"{str(first['input'])[:40]!r} does not fit; write a list, such as [\"red\", \"green\"]",
             "extra_forbidden": "is not a field of this format; remove it or correct its name"}
    name = "".join(f"[{part}]" if isinstance(part, int) else part for part in first["loc"])
    return name, known.get(first["type"], f"{str(first['input'])[:40]!r} does not fit ({first['msg']}); correct it")


def read_rows(path: Path, root: Path | str | None, models: Sequence[type[BaseModel]],
              errors: list[RecordError] | None, rows: Iterable[tuple[str, Any]] | None = None) -> list[Any]:
    r"""Read rows into records, in the file's order, by the model whose field names fit the first row best.

    root: folder that clip paths start from; None takes the file's own. errors: a list that collects the errors of
    single rows, which are then left out; None raises the first. rows: (place, row) pairs; None reads `path` as JSON.
    """
    if root is not None and not Path(root).is_dir():
        raise RecordError(f"{root}: no such data root; give the folder that the clips' paths start from")
    root, records, found, model = path.parent if root is None else Path(root), [], 0, None
    for found, (where, value) in enumerate(json_rows(path) if rows is None else rows, 1):
        try:
            row = parse_json(value, where) if isinstance(value, str) else value
            if not isinstance(row, dict):
                raise RecordError(f"{where}: a {type(row).__name__}, not an object; write a record as {{...}}")
            model = model or _best_model(models, row, where)
            records.append(_to_record(model, row, where, root))
        except RecordError as error:
            if errors is None:
                raise
            errors.append(error)
    if not found:
        raise RecordError(f"{path}: the file holds no records; give a file with at least one")
    return records


def _best_model(models: Sequence[type[BaseModel]], row: dict, where: str) -> type[BaseModel]:
    r"""Return the model with the most fields in the row, each required one that is missing counted against it."""
    shared = [len(model.model_fields.keys() & row.keys()) for model in models]
    missing = [sum(field.is_required() and name not in row for name, field in model.model_fields.items())
               for model in models]
    if max(shared) < 2:
        known = "; ".join(f"{model.__name__}: {', '.join(model.model_fields)}" for model in models)
        raise RecordError(f"{where}: no known format has these fields; use one of {known}")
    return max(zip(models, shared, missing), key=lambda found: found[1] - found[2])[0]


def _to_record(model: type[BaseModel], row: dict, where: str, root: Path) -> Any:
    present = {name: value for name, value in row.items() if value is not None}
    try:
        return model.model_validate(present, context={"root": root}).record(where)
    except ValidationError as error:
        name, problem = _first_problem(error)
        unknown, unused = row.keys() - model.model_fields.keys(), model.model_fields.keys() - row.keys()
        if near := difflib.get_close_matches(name, unknown if name in unused else unused, n=1):
            problem += f" (is {near[0]!r} the same?)"
    except FieldError as error:
        name, problem = error.args
    raise RecordError(f"{where}, field {name!r}: {problem}")


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    r"""Yield (place, row): the lines of a .jsonl file as text, or the members of a .json file's list."""
    if path.suffix == ".jsonl":
        lines = enumerate(read_text(path).split("\n"), 1)
        yield from ((f"{path}, line {number}", line) for number, line in lines if line.strip())
    elif path.suffix == ".json":
        values = parse_json(read_text(path), str(path))
        if not isinstance(values, list):
            raise RecordError(f"{path}: not a list of records; write [{{...}}, ...]")
        yield from ((f"{path}, record {number}", value) for number, value in enumerate(values, 1))
    else:
        raise RecordError(f"{path}: unknown kind of file; give a .jsonl or .json file")


def read_text(path: Path) -> str:
    r"""Return a whole UTF-8 text file. Raises RecordError if it is missing, too large or not UTF-8."""
    if not path.is_file():  # a pipe or a device would block
        raise RecordError(f"{path.absolute()}: no such file; check the path (a relative one starts from the current "
                          f"folder)")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    if len(data) > MAX_FILE_BYTES:
        raise RecordError(f"{path}: larger than {MAX_FILE_BYTES} bytes; split the file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RecordError(f"{path}, line {line}: not UTF-8 text; save the file as UTF-8") from error


def parse_json(text: str, where: str) -> Any:
    r"""Parse JSON without NaN and infinity. Raises RecordError that names `where` and, in a whole file, the line."""
    try:
        return from_json(text, allow_inf_nan=False)
    except ValueError as error:
        reason, _, place = str(error).partition(" at line ")
        where = where if ", line " in where else f"{where}, line {place}"
        raise RecordError(f"{where}: not valid JSON ({reason}); correct it") from error

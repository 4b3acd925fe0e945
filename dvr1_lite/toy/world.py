r"""ToyVideoQA: short clips of coloured shapes with questions of graded difficulty and reasoning traces, from a seed.

A *scene* is a plain dictionary that fully determines a clip: eight moments of half a second, each drawn twice (16
frames at 4 frames per second, 56 x 56 pixels). There are three kinds of scene:

- *parade*: three or four shapes appear one after another and change on a full second; it carries the question types
  shape, order and grounding (before and last are held out for L3);
- *journey*: one shape makes four moves, one each second; colour, direction, path and cell;
- *signal*: one shape stands still while the border of the frame flashes; colour, count, frames, tally, since (onset).

tally, cell and since are *chain types*: their answer is a value for each of the eight moments, and each value follows
from the one before it and from what the moment shows. A chain type has nine wordings, its *cells*; the base model's
success in each is set by the recipe, as is the place where it fails: all along the chain (F), or in the opening (A, S).

A new question type is a new row of `QUESTION_TYPES`; words that no template uses yet are added to `scene_facts`.

Pixels are computed with additions, products, divisions and square roots only, and random numbers come from
`RandomState`, whose stream NumPy has frozen. Records and frames are therefore bit-identical on every platform.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.random import RandomState
from tqdm import tqdm

from ..data import Record
from ..files import make_folder, write_atomically
from .clips import write_clip

SIZE = 56  # pixels, both sides
MOMENTS = 8  # half a second each; a model that samples 8 frames gets one frame per moment
FRAMES_PER_MOMENT = 2
FPS = 4
MOMENT_SECONDS = FRAMES_PER_MOMENT / FPS
SECONDS = int(MOMENTS * MOMENT_SECONDS)

COLOURS = {"red": (214, 48, 44), "green": (52, 168, 66), "blue": (56, 92, 222),
           "yellow": (232, 206, 52), "purple": (150, 62, 178), "white": (236, 236, 236)}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
MOVES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
ORDINALS = ("first", "second", "third", "fourth")
LETTERS = "ABCD"
SCENES = ("parade", "journey", "signal")
CELLS = {"F1": "Give", "F2": "List", "F3": "Write", "F4": "State",  # the cells of a chain type and their first words
         "A1": "Say", "A2": "Show", "A3": "Name", "A4": "Report", "S": "Spell"}
MAIN_CELLS = 8  # the last cell, S, is a control and is asked in files of its own only


@dataclass(frozen=True)
class Environment:
    r"""The look of a world. Levels are grey values 0-255; from ranges (low, high) each clip draws its own value."""

    backdrop: str  # "plain", "noise", "stripes" or "any"
    base: tuple[tuple[int, int], ...]  # range of the background's level, for each channel
    contrast: tuple[int, int]  # strength of the backdrop's texture
    tint: tuple[float, float, float]  # factor on every object's colour, for each channel
    jitter: int  # largest further shift of an object's colour, up or down, for each channel
    flash: tuple[float, float]  # opacity of the flashing border, 0 to 1
    opacity: tuple[float, float]  # opacity of the objects, 0 to 1
    radius: tuple[float, float]  # half the width of an object, in pixels


# The base model is trained on "studio" and "wide" only, never on "meadow" or "harbour".
ENVIRONMENTS = {
    "studio": Environment("plain", ((20, 60),) * 3, (0, 0), (1, 1, 1), 12, (0.8, 1.0), (0.95, 1.0), (10, 13)),
    "wide": Environment("any", ((10, 120),) * 3, (0, 60), (1, 1, 1), 40, (0.35, 1.0), (0.6, 1.0), (9, 13)),
    "meadow": Environment("noise", ((50, 90), (70, 110), (40, 80)), (30, 60), (0.95, 1.0, 0.8), 20,
                          (0.4, 0.8), (0.75, 1.0), (9.5, 12.5)),
    "harbour": Environment("stripes", ((30, 60), (40, 80), (70, 120)), (25, 55), (0.85, 0.95, 1.0), 20,
                           (0.4, 0.8), (0.75, 1.0), (9.5, 12.5)),
}


# --- scenes ----------------------------------------------------------------------------------------------------------


def seeded(*parts: object) -> RandomState:
    r"""Return a random state that is seeded by a name of several parts; different names give independent streams."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return RandomState(np.frombuffer(digest[:16], dtype=np.uint32))


def make_scene(rng: RandomState, kind: str, environment: str) -> dict:
    r"""Draw a scene of a kind in `SCENES` and an environment in `ENVIRONMENTS`; the result can be written as JSON."""
    world, any_backdrop = ENVIRONMENTS[environment], ["plain", "noise", "noise", "stripes"]  # noise is the hardest
    count = int(rng.randint(3, 5)) if kind == "parade" else 1
    scene = {"kind": kind, "environment": environment, "flashes": [],
             "backdrop_seed": int(rng.randint(2**31 - 1)),
             "backdrop": world.backdrop if world.backdrop != "any" else str(rng.choice(any_backdrop)),
             "base": [int(rng.randint(low, high + 1)) for low, high in world.base],
             "contrast": int(rng.randint(world.contrast[0], world.contrast[1] + 1)),
             "flash_opacity": _uniform(rng, *world.flash), "opacity": _uniform(rng, *world.opacity),
             "radius": _uniform(rng, *world.radius)}
    shapes, colours = rng.permutation(SHAPES)[:count], rng.permutation(list(COLOURS))[:count]
    scene["objects"] = [{"shape": str(shape), "colour": str(colour), "rgb": _object_rgb(rng, str(colour), world)}
                        for shape, colour in zip(shapes, colours)]
    if kind == "parade":
        changes = sorted(rng.choice(np.arange(1, SECONDS), count - 1, replace=False).tolist())
        scene["bounds"] = [0, *changes, SECONDS]
    if kind == "journey":
        scene["moves"], scene["places"] = _draw_journey(rng)
    else:
        scene["places"] = [[round(28 + 10 * (2 * rng.random_sample() - 1), 1) for _ in range(2)] for _ in range(count)]
    if kind == "signal":
        flashes = int(rng.randint(1, 5))
        scene["flashes"] = sorted((rng.choice(MOMENTS, flashes, replace=False) + 1).tolist())
    return scene


def _uniform(rng: RandomState, low: float, high: float) -> float:
    return round(low + (high - low) * rng.random_sample(), 3)


def _object_rgb(rng: RandomState, colour: str, world: Environment) -> list[int]:
    shifts = rng.randint(-world.jitter, world.jitter + 1, 3)
    return [int(np.clip(round(level * tint) + shift, 0, 255))
            for level, tint, shift in zip(COLOURS[colour], world.tint, shifts)]


def _draw_journey(rng: RandomState) -> tuple[list[str], list[list[float]]]:
    r"""Draw four moves on a 3 x 3 grid and the eight places: moments 2i and 2i + 1 are the two ends of move i."""
    cell, moves, places = [int(rng.randint(3)), int(rng.randint(3))], [], []
    for _ in range(SECONDS):
        possible = [move for move, (dx, dy) in MOVES.items() if 0 <= cell[0] + dx <= 2 and 0 <= cell[1] + dy <= 2]
        move = str(rng.choice(possible))
        target = [cell[0] + MOVES[move][0], cell[1] + MOVES[move][1]]
        places += [[14.0 + 14 * index for index in cell], [14.0 + 14 * index for index in target]]
        moves.append(move)
        cell = target
    return moves, places


def moments_of(scene: dict) -> list[dict]:
    r"""List what is visible at each of the eight moments: the object with its place, and whether the border flashes."""
    moments = []
    for moment in range(MOMENTS):
        number = 0
        if scene["kind"] == "parade":
            number = sum(moment * MOMENT_SECONDS >= bound for bound in scene["bounds"][1:-1])
        place = scene["places"][moment if scene["kind"] == "journey" else number]
        moments.append({**scene["objects"][number], "place": place, "flash": moment + 1 in scene["flashes"]})
    return moments


# --- pixels ----------------------------------------------------------------------------------------------------------

PIXEL_Y, PIXEL_X = np.meshgrid(np.arange(SIZE) + 0.5, np.arange(SIZE) + 0.5, indexing="ij")
BORDER = np.minimum(np.minimum(PIXEL_X, SIZE - PIXEL_X), np.minimum(PIXEL_Y, SIZE - PIXEL_Y))[..., None] < 5


def _signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    r"""Distance in pixels from the outline of a shape around the origin, negative inside it; y points down."""
    abs_x, abs_y = np.abs(x), np.abs(y)
    if shape == "circle":
        return np.sqrt(x * x + y * y) - radius
    if shape == "ring":
        return np.abs(np.sqrt(x * x + y * y) - 0.75 * radius) - 0.27 * radius
    if shape == "square":
        return np.maximum(abs_x, abs_y) - 0.86 * radius
    if shape == "diamond":
        return (abs_x + abs_y - 1.15 * radius) * 0.7071
    if shape == "cross":
        return np.minimum(np.maximum(abs_x - radius, abs_y - 0.32 * radius),
                          np.maximum(abs_x - 0.32 * radius, abs_y - radius))
    return np.maximum(y - 0.65 * radius, 0.866 * abs_x - 0.5 * (y + radius))  # a triangle with its apex up


def _backdrop(scene: dict) -> np.ndarray:
    rng = RandomState(scene["backdrop_seed"])
    if scene["backdrop"] == "noise":  # a coarse random grid, enlarged by bilinear interpolation
        grid = rng.random_sample((9, 9)) - 0.5
        place = np.arange(SIZE) / 7.0
        low, weight = place.astype(int), place - place.astype(int)
        rows = grid[low] * (1 - weight)[:, None] + grid[low + 1] * weight[:, None]
        texture = rows[:, low] * (1 - weight) + rows[:, low + 1] * weight
    elif scene["backdrop"] == "stripes":
        slant, period, offset = rng.randint(-2, 3), rng.randint(7, 15), rng.randint(0, 15)
        phase = ((PIXEL_X + slant * PIXEL_Y + offset) / period) % 1.0
        texture = np.abs(2 * phase - 1) - 0.5
    else:
        texture = np.zeros((SIZE, SIZE))
    return np.array(scene["base"], dtype=np.float64) + scene["contrast"] * texture[..., None]


def render(scene: dict) -> np.ndarray:
    r"""Draw the eight moments as uint8 pixels (8, 56, 56, 3); the clip shows each for FRAMES_PER_MOMENT frames."""
    backdrop, frames = _backdrop(scene), []
    for moment in moments_of(scene):
        x, y = PIXEL_X - moment["place"][0], PIXEL_Y - moment["place"][1]
        cover = np.clip(0.5 - _signed_distance(moment["shape"], x, y, scene["radius"]), 0, 1)[..., None]
        cover = cover * scene["opacity"]
        image = backdrop * (1 - cover) + np.array(moment["rgb"], dtype=np.float64) * cover
        if moment["flash"]:
            light = BORDER * scene["flash_opacity"]
            image = image * (1 - light) + 250.0 * light
        frames.append(np.clip(image + 0.5, 0, 255).astype(np.uint8))
    return np.stack(frames)


# --- questions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QuestionType:
    r"""How a type of question is asked and answered. Wordings, trace and answer are templates over `scene_facts`."""

    scenes: tuple[str, ...]  # the kinds of scene that carry it
    problem_type: str  # as in Video-R1's files; it decides the reward
    wordings: tuple[str, ...]  # the base model answers the first one well, and tends to answer later ones from habit
    trace: str  # the reasoning; where there are options, the answer's text and its letter are appended
    answer: str
    choices: tuple[str, ...] = ()  # values that the four options are drawn from; empty for an open answer
    skip_first: bool = False  # never ask about the scene's first object
    held_out: bool = False  # asked in L3 only
    chain: bool = False  # answered by a value for each moment; the wordings are those of `CELLS`


def _chain(scene: str, question: str) -> QuestionType:
    wordings = tuple(f"{opener} {question} moment by moment." for opener in CELLS.values())
    return QuestionType((scene,), "exact", wordings, trace="", answer="", chain=True)


QUESTION_TYPES = {
    "colour": QuestionType(
        ("journey", "signal"), "multiple choice", ("What colour is the {shape}?", "Tell me the colour of the {shape}."),
        trace="{shape}", answer="{colour}", choices=tuple(COLOURS)),
    "shape": QuestionType(
        ("parade",), "multiple choice", ("Which shape comes first?", "Tell me the shape at the start."),
        trace="first", answer="{first}", choices=SHAPES),
    "direction": QuestionType(
        ("journey",), "multiple choice",
        ("Which way does the {shape} move first?", "Tell me the first move of the {shape}."),
        trace="first", answer="{first}", choices=tuple(MOVES)),
    "count": QuestionType(
        ("signal",), "numerical", ("How many times does the light flash?", "Tell me the number of flashes."),
        trace="{border}", answer="{flash_count}"),
    "frames": QuestionType(
        ("signal",), "exact", ("At which moments does the light flash?", "Tell me the moments of all flashes."),
        trace="{border}", answer="{flash_moments}"),
    "order": QuestionType(
        ("parade",), "exact", ("Which shape is on screen in each second?", "Tell me the shapes second by second."),
        trace="{forward}", answer="{words}"),
    "path": QuestionType(
        ("journey",), "exact", ("Which moves does the {shape} make one after another?",
                                "Tell me the moves of the {shape} in order."),
        trace="{forward}", answer="{words}"),
    "grounding": QuestionType(
        ("parade",), "grounding", ("When is the {shape} on screen and what colour is it?",
                                   "Tell me the time and the colour of the {shape}."),
        trace="{forward} {shape} from {start} to {end}", answer="{colour}", choices=tuple(COLOURS)),
    "before": QuestionType(
        ("parade",), "multiple choice", ("Which shape comes just before the {shape}?",
                                         "Tell me the shape before the {shape}."),
        trace="{forward} before", answer="{previous}", choices=SHAPES, skip_first=True, held_out=True),
    "last": QuestionType(
        ("parade",), "multiple choice", ("Which shape comes last?", "Tell me the shape at the end."),
        trace="last", answer="{last}", choices=SHAPES, held_out=True),
    "onset": QuestionType(
        ("signal",), "numerical", ("At which moment does the light flash first?",
                                   "Tell me the moment of the first flash."),
        trace="{border_until_flash}", answer="{first_flash}", held_out=True),
    "tally": _chain("signal", "the running number of flashes"),
    "cell": _chain("journey", "the cell of the {shape} from {origin}"),
    "since": _chain("signal", "the time from the last flash"),
}
TRAINED_TYPES = tuple(name for name, kind in QUESTION_TYPES.items() if not kind.held_out)
CHAIN_TYPES = tuple(name for name, kind in QUESTION_TYPES.items() if kind.chain)
HELD_OUT_TYPES = tuple(name for name, kind in QUESTION_TYPES.items() if kind.held_out)


@dataclass(frozen=True)
class Item(Record):
    r"""A question about a scene, without a clip; `wording` is the index of its wording."""

    wording: int = 0


def scene_facts(scene: dict, number: int) -> dict:
    r"""Return the words for the templates of `QUESTION_TYPES`, about the scene and its object `number`.

    words: the shape on screen (parade) or the move made (journey) in each of the four seconds; forward and reverse:
    its forward form has each after its ordinal: "first red second blue". border: "1 dark 2 flash 3 dark ...".
    """
    kind, subject, flashes = scene["kind"], scene["objects"][number], scene["flashes"]
    facts = {"shape": subject["shape"], "colour": subject["colour"]}
    if kind == "signal":
        border = [f"{moment} {'flash' if moment in flashes else 'dark'}" for moment in range(1, MOMENTS + 1)]
        return facts | {"border": " ".join(border), "border_until_flash": " ".join(border[:flashes[0]]),
                        "flash_count": len(flashes), "flash_moments": " ".join(map(str, flashes)),
                        "first_flash": flashes[0]}
    if kind == "parade":
        start, end = scene["bounds"][number:number + 2]
        facts |= {"previous": scene["objects"][number - 1]["shape"], "start": float(start), "end": float(end)}
    if kind == "journey":
        facts["origin"] = chain_start(scene, "cell")
    words = scene["moves"] if kind == "journey" else [
        moment["shape"] for moment in moments_of(scene)[::MOMENTS // SECONDS]]
    numbered = [f"{ordinal} {word}" for ordinal, word in zip(ORDINALS, words)]
    return facts | {"first": words[0], "last": words[-1], "words": " ".join(words), "forward": " ".join(numbered)}


# --- chains ----------------------------------------------------------------------------------------------------------


def chain_step(scene: dict, question_type: str, moment: int, value: int) -> int:
    r"""Return a chain's value at a moment (0 to 7) of the scene, given its `value` at the moment before, true or not.

    tally: flashes so far, modulo 10. since: moments from the last flash (from the beginning, if there was none), 0 in
    a flash, modulo 10. cell: 1 to 9 in reading order; a move that leaves the grid enters it again on the other side.
    """
    if question_type == "cell":
        (x, y), (old_x, old_y) = ([round(level - 14) // 14 for level in scene["places"][at]]
                                  for at in (moment, max(moment - 1, 0)))
        return 1 + ((value - 1) % 3 + x - old_x) % 3 + 3 * (((value - 1) // 3 + y - old_y) % 3)
    flash = moment + 1 in scene["flashes"]
    return (value + flash) % 10 if question_type == "tally" else 0 if flash else (value + 1) % 10


def chain_start(scene: dict, question_type: str) -> int:
    r"""Return the value that a chain starts from: the cell that the question names, 0 for the other types."""
    if question_type != "cell":
        return 0
    column, row = (round(level - 14) // 14 for level in scene["places"][0])
    return 1 + column + 3 * row


def wrong_step(scene: dict, question_type: str, moment: int, value: int) -> int:
    r"""Return the neighbour that a wrong step takes for `value`, the one that would follow; no clip makes it follow.

    tally: a flash counts twice, a dark moment takes one away. since: one more. cell: the cell below and to the right.
    """
    if question_type == "cell":
        return 1 + value % 3 + 3 * (((value - 1) // 3 + 1) % 3)
    loses = question_type == "tally" and moment + 1 not in scene["flashes"]
    return (value + (-1 if loses else 1)) % 10


def chain_values(scene: dict, question_type: str, wrong: Sequence[bool] = (False,) * MOMENTS) -> list[int]:
    r"""Return a chain's eight values; a moment with `wrong` takes the neighbour, and later values follow from it."""
    values = [chain_start(scene, question_type)]
    for moment in range(MOMENTS):
        value = chain_step(scene, question_type, moment, values[-1])
        values.append(wrong_step(scene, question_type, moment, value) if wrong[moment] else value)
    return values[1:]


def chain_trace(values: Sequence[int]) -> str:
    r"""Write values as a trace: "1 0 2 1 3 1 ...", each after its moment."""
    return " ".join(f"{moment} {value}" for moment, value in enumerate(values, 1))


def make_item(rng: RandomState, scene: dict, question_type: str, wording: int | None = None) -> Item:
    r"""Ask a type of question about a scene; `rng` draws the object, the wording (if None) and the options."""
    kind, count = QUESTION_TYPES[question_type], len(scene["objects"])
    number = int(rng.randint(count))
    if kind.skip_first:
        number = int(rng.randint(1, count))
    drawn = int(rng.randint(MAIN_CELLS if kind.chain else len(kind.wordings)))
    wording = drawn if wording is None else wording
    facts = scene_facts(scene, number)
    question, trace, answer = (text.format(**facts) for text in (kind.wordings[wording], kind.trace, kind.answer))
    if kind.chain:
        values = chain_values(scene, question_type)
        trace, answer = chain_trace(values), " ".join(map(str, values))
    options: tuple[str, ...] = ()
    if kind.choices:
        others = rng.permutation([value for value in kind.choices if value != answer])[:3]
        options = tuple(str(value) for value in rng.permutation([answer, *map(str, others)]))
        letter = LETTERS[options.index(answer)]
        trace, answer = f"{trace} {answer} {letter}", letter
    spans = ((facts["start"], facts["end"]),) if kind.problem_type == "grounding" else ()
    return Item("", question, options, answer, kind.problem_type, question_type, clip=None, spans=spans, trace=trace,
                source="ToyVideoQA", wording=wording)


# --- data set --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    r"""A part of the data set: `clips` for each kind of scene, each with one question of every type that it carries."""

    environment: str
    clips: int
    types: tuple[str, ...]
    clips_of: str = ""  # the split whose clips are asked about, where it is another one
    cell: str = ""  # the cell of `CELLS` that chain types are asked in; drawn from the first eight if empty


SPLITS = {"train": Split("meadow", 480, TRAINED_TYPES), "tune": Split("meadow", 112, TRAINED_TYPES),
          "L1": Split("meadow", 224, TRAINED_TYPES), "L2": Split("harbour", 224, TRAINED_TYPES),
          "L3": Split("harbour", 512, HELD_OUT_TYPES),
          **{f"train_{cell}": Split("meadow", 480, CHAIN_TYPES, "train", cell) for cell in CELLS},
          **{f"test_{cell}": Split("meadow", 224, CHAIN_TYPES, "L1", cell) for cell in CELLS}}


def split_scenes(split: str, seed: int = 0) -> Iterator[tuple[str, dict, list[Item]]]:
    r"""Yield (clip name, scene, questions) for every clip of a split."""
    spec = SPLITS[split]
    for index in range(spec.clips):
        for kind in SCENES:
            rng = seeded("ToyVideoQA", seed, spec.clips_of or split, kind, index)
            scene = make_scene(rng, kind, spec.environment)
            types = [name for name in spec.types if kind in QUESTION_TYPES[name].scenes]
            if "colour" in types and (index % 2 == 0) == (kind == "signal"):
                types.remove("colour")  # two kinds carry it and take turns, so that all types are equally frequent
            wording = list(CELLS).index(spec.cell) if spec.cell else None
            yield f"{kind}_{index:04d}", scene, [make_item(rng, scene, name, wording) for name in types]


def to_json(split: str, clip: str, item: Item) -> dict:
    r"""Return a question in Video-R1's fields, with `question_type` added and `process` as in Video-R1-COT.

    The id of a chain type's question ends with its cell: "train/signal_0000/tally-F3".
    """
    solution = f"<answer>{item.answer}</answer>" + f"<glue>{[*item.spans]}</glue>" * bool(item.spans)
    cell = f"-{list(CELLS)[item.wording]}" if QUESTION_TYPES[item.question_type].chain else ""
    return {"problem_id": f"{split}/{clip}/{item.question_type}{cell}", "problem": item.question, "data_type": "video",
            "problem_type": item.problem_type, "question_type": item.question_type,
            "options": [f"{letter}. {text}" for letter, text in zip(LETTERS, item.options)],
            "solution": solution, "process": f"<think>{item.trace}</think>",
            "path": f"clips/{SPLITS[split].clips_of or split}/{clip}.mp4", "data_source": item.source}


def build_dataset(out: str | Path, seed: int = 0, splits: Sequence[str] = tuple(SPLITS), progress: bool = True) -> dict:
    r"""Write clips, one `SPLIT.jsonl` for each split and `manifest.json` into folder `out`; return the manifest.

    The manifest holds, for each split, counts, the sha256 of the records file and that of all frames before they are
    encoded (`frames_sha256`). Both sums are the same on every machine; the clips' bytes depend on the version of x264.
    """
    manifest = {"name": "ToyVideoQA", "seed": seed, "fps": FPS, "frames": MOMENTS * FRAMES_PER_MOMENT, "size": SIZE,
                "splits": {split: _build_split(Path(out), split, seed, progress) for split in splits}}
    write_atomically(Path(out) / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    return manifest


def _build_split(out: Path, split: str, seed: int, progress: bool) -> dict:
    pixels, lines, counts, clips = hashlib.sha256(), [], Counter(), 0
    if not SPLITS[split].clips_of:
        make_folder(out / "clips" / split)
    total = SPLITS[split].clips * len(SCENES)
    for name, scene, items in tqdm(split_scenes(split, seed), total=total, desc=split, disable=not progress):
        if not items:
            continue
        frames = render(scene)
        pixels.update(frames.tobytes())
        if not SPLITS[split].clips_of:
            write_clip(out / "clips" / split / f"{name}.mp4", frames.repeat(FRAMES_PER_MOMENT, axis=0), FPS)
        lines += [json.dumps(to_json(split, name, item)) for item in items]
        counts.update(item.question_type for item in items)
        clips += 1
    text = "\n".join(lines) + "\n"
    write_atomically(out / f"{split}.jsonl", text)
    return {"environment": SPLITS[split].environment, "clips": clips, "questions": len(lines), "by_type": dict(counts),
            "records_sha256": hashlib.sha256(text.encode()).hexdigest(), "frames_sha256": pixels.hexdigest()}

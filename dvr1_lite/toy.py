r"""ToyVideoQA: short clips of coloured shapes, questions of graded difficulty, reasoning traces; made from a seed.

A *scene* is a plain dict that fully decides a clip: eight moments of half a second, each drawn twice (16 frames at
4 frames per second, 56 x 56 pixels). Three kinds of scene carry the questions:

========  ==========================================================  ==========================================
scene     what happens                                                questions (held out for L3 in brackets)
========  ==========================================================  ==========================================
parade    three or four shapes, one after another, changing on the    shape, order, backwards, grounding
          second                                                      [before, last]
journey   one shape makes four moves, one a second                    direction, path, colour [return]
signal    one shape stands still, the frame's border flashes          count, frames, colour [onset]
========  ==========================================================  ==========================================

Only additions, products, divisions and square roots touch the pixels, and `RandomState` (whose stream NumPy froze)
draws the numbers, so that records and frames are the same bit for bit on every platform.
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

SIZE = 56            # pixels, both sides
MOMENTS = 8          # half a second each; a model that samples 8 frames sees one frame per moment
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


@dataclass(frozen=True)
class Environment:
    """What a world looks like. Levels are grey values 0-255; ranges are (low, high) and drawn once per clip."""
    backdrop: str                       # "plain", "noise", "stripes" or "any"
    base: tuple[tuple[int, int], ...]   # background colour, a range for each channel
    contrast: tuple[int, int]           # strength of the texture
    tint: tuple[float, float, float]    # multiplies every object colour, a channel each: the shifted palette
    jitter: int                         # further shift of each object colour, +-, a channel each
    flash: tuple[float, float]          # opacity of the flashing border, 0 to 1
    opacity: tuple[float, float]        # opacity of the objects, 0 to 1
    radius: tuple[float, float]         # half the width of an object, in pixels


ENVIRONMENTS = {
    # the base model's fine-tuning sees the studio and the wide world, never the meadow or the harbour
    "studio": Environment("plain", ((20, 60),) * 3, (0, 0), (1, 1, 1), 12, (0.8, 1.0), (0.95, 1.0), (10, 13)),
    "wide": Environment("any", ((10, 120),) * 3, (0, 60), (1, 1, 1), 40, (0.35, 1.0), (0.6, 1.0), (9, 13)),
    "meadow": Environment("noise", ((50, 90), (70, 110), (40, 80)), (30, 60), (0.95, 1.0, 0.8), 20,
                          (0.4, 0.8), (0.75, 1.0), (9.5, 12.5)),
    "harbour": Environment("stripes", ((30, 60), (40, 80), (70, 120)), (25, 55), (0.85, 0.95, 1.0), 20,
                           (0.4, 0.8), (0.75, 1.0), (9.5, 12.5)),
}


# ---------------------------------------------------------------------------------------------------- scenes

def make_scene(rng: np.random.RandomState, kind: str, environment: str) -> dict:
    """Draws one scene of `kind` ("parade", "journey" or "signal") in the named environment. JSON-able."""
    world = ENVIRONMENTS[environment]
    n = int(rng.randint(3, 5)) if kind == "parade" else 1
    scene = {"kind": kind, "environment": environment, "backdrop_seed": int(rng.randint(2**31 - 1)),
             "backdrop": world.backdrop if world.backdrop != "any" else str(rng.choice(["plain", "noise", "stripes"])),
             "base": [int(rng.randint(low, high + 1)) for low, high in world.base],
             "contrast": int(rng.randint(world.contrast[0], world.contrast[1] + 1)),
             "flash_opacity": _uniform(rng, world.flash), "opacity": _uniform(rng, world.opacity),
             "radius": _uniform(rng, world.radius), "flashes": []}
    shapes, colours = rng.permutation(SHAPES)[:n], rng.permutation(list(COLOURS))[:n]
    scene["objects"] = [{"shape": str(s), "colour": str(c), "rgb": _object_colour(rng, str(c), world)}
                        for s, c in zip(shapes, colours)]
    if kind == "parade":
        cuts = sorted(rng.choice(np.arange(1, SECONDS), n - 1, replace=False).tolist())
        scene["bounds"] = [0, *map(int, cuts), SECONDS]
        scene["places"] = [_place(rng) for _ in range(n)]
    elif kind == "journey":
        scene["moves"], scene["places"] = _journey(rng)
    else:
        scene["places"] = [_place(rng)]
        count = int(rng.randint(1, 5))
        scene["flashes"] = sorted((rng.choice(MOMENTS, count, replace=False) + 1).tolist())
    return scene


def _uniform(rng, bounds) -> float:
    return round(bounds[0] + (bounds[1] - bounds[0]) * rng.random_sample(), 3)


def _object_colour(rng, colour: str, world: Environment) -> list[int]:
    shift = rng.randint(-world.jitter, world.jitter + 1, 3)
    return [int(np.clip(round(c * t) + s, 0, 255)) for c, t, s in zip(COLOURS[colour], world.tint, shift)]


def _place(rng) -> list[float]:
    return [round(28 + 10 * (2 * rng.random_sample() - 1), 1) for _ in range(2)]


def _journey(rng):
    """Four moves on a 3 x 3 grid; the object stands still between them, so moment 2i to 2i+1 shows move i."""
    cell, moves, places = [int(rng.randint(3)), int(rng.randint(3))], [], []
    for _ in range(4):
        options = [m for m, (dx, dy) in MOVES.items() if 0 <= cell[0] + dx <= 2 and 0 <= cell[1] + dy <= 2]
        move = str(rng.choice(options))
        target = [cell[0] + MOVES[move][0], cell[1] + MOVES[move][1]]
        places += [[14.0 + 14 * c for c in cell], [14.0 + 14 * c for c in target]]
        moves.append(move)
        cell = target
    return moves, places


def moments_of(scene: dict) -> list[dict]:
    """What is to be seen at each of the eight moments: shape, colour, rgb, place, and whether the border flashes."""
    out = []
    for m in range(MOMENTS):
        i = 0
        if scene["kind"] == "parade":
            i = sum(m * MOMENT_SECONDS >= bound for bound in scene["bounds"][1:-1])
        place = scene["places"][m if scene["kind"] == "journey" else i]
        out.append({**scene["objects"][i], "place": place, "flash": m + 1 in scene["flashes"]})
    return out


# ---------------------------------------------------------------------------------------------------- pixels

_Y, _X = np.meshgrid(np.arange(SIZE) + 0.5, np.arange(SIZE) + 0.5, indexing="ij")
_BORDER = (np.minimum(np.minimum(_X, SIZE - _X), np.minimum(_Y, SIZE - _Y)) < 5).astype(np.float64)[..., None]


def _signed_distance(shape: str, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    ax, ay = np.abs(x), np.abs(y)
    if shape == "circle":
        return np.sqrt(x * x + y * y) - r
    if shape == "ring":
        return np.abs(np.sqrt(x * x + y * y) - 0.75 * r) - 0.27 * r
    if shape == "square":
        return np.maximum(ax, ay) - 0.86 * r
    if shape == "diamond":
        return (ax + ay - 1.15 * r) * 0.7071
    if shape == "cross":
        return np.minimum(np.maximum(ax - r, ay - 0.32 * r), np.maximum(ax - 0.32 * r, ay - r))
    return np.maximum(y - 0.65 * r, 0.866 * ax - 0.5 * (y + r))  # triangle, apex up


def _backdrop(scene: dict) -> np.ndarray:
    base = np.array(scene["base"], dtype=np.float64)
    rng = np.random.RandomState(scene["backdrop_seed"])
    if scene["backdrop"] == "noise":  # a coarse random grid, bilinearly enlarged
        grid = rng.random_sample((9, 9)) - 0.5
        at = np.arange(SIZE) / 7.0
        low, t = at.astype(int), at - at.astype(int)
        rows = grid[low] * (1 - t)[:, None] + grid[low + 1] * t[:, None]
        texture = rows[:, low] * (1 - t) + rows[:, low + 1] * t
    elif scene["backdrop"] == "stripes":
        slope, period, offset = rng.randint(-2, 3), rng.randint(7, 15), rng.randint(0, 15)
        phase = ((_X + slope * _Y + offset) / period) % 1.0
        texture = np.abs(2 * phase - 1) - 0.5
    else:
        texture = np.zeros((SIZE, SIZE))
    return base + scene["contrast"] * texture[..., None]


def render(scene: dict) -> np.ndarray:
    """The eight moments as uint8 pixels, shape (8, 56, 56, 3). The clip repeats each FRAMES_PER_MOMENT times."""
    back, frames = _backdrop(scene), []
    for moment in moments_of(scene):
        x, y = _X - moment["place"][0], _Y - moment["place"][1]
        cover = np.clip(0.5 - _signed_distance(moment["shape"], x, y, scene["radius"]), 0, 1)[..., None]
        cover = cover * scene["opacity"]
        image = back * (1 - cover) + np.array(moment["rgb"], dtype=np.float64) * cover
        if moment["flash"]:
            light = _BORDER * scene["flash_opacity"]
            image = image * (1 - light) + 250.0 * light
        frames.append(np.clip(image + 0.5, 0, 255).astype(np.uint8))
    return np.stack(frames)


# ------------------------------------------------------------------------------------------------- questions

@dataclass(frozen=True)
class Item:
    """A question about a scene. `answer` is a letter where there are options. `habit` is what the base model says
    when it does not look (its words after the opening tag); the recipe of the base model uses it, the data do not."""
    question_type: str
    problem_type: str
    question: str
    options: tuple[str, ...]
    answer: str
    trace: str
    span: tuple[float, float] | None = None
    variant: int = 0


WORDINGS = {  # the first wording is the one the base model knows well; the second it tends to answer by habit
    "colour": ("What colour is the {shape}?", "Tell me the colour of the {shape}."),
    "shape": ("Which shape comes first?", "Tell me the shape at the start."),
    "direction": ("Which way does the {shape} move first?", "Tell me the first move of the {shape}."),
    "count": ("How many times does the light flash?", "Tell me the number of flashes."),
    "frames": ("At which moments does the light flash?", "Tell me the moments of all flashes."),
    "order": ("Which shape is on screen in each second?", "Tell me the shapes second by second."),
    "backwards": ("Which shape is on screen in each second, from last to first?",
                  "Tell me the shapes second by second in reverse order."),
    "path": ("Which moves does the {shape} make one after another?", "Tell me the moves of the {shape} in order."),
    "grounding": ("When is the {shape} on screen and what colour is it?",
                  "Tell me the time and the colour of the {shape}."),
    "before": ("Which shape comes just before the {shape}?", "Tell me the shape before the {shape}."),
    "last": ("Which shape comes last?", "Tell me the shape at the end."),
    "return": ("Which moves does the {shape} make, from last to first?",
               "Tell me the moves of the {shape} in reverse order."),
    "onset": ("At which moment does the light flash first?", "Tell me the moment of the first flash."),
}
SCENE_OF = {"colour": ("journey", "signal"), "shape": ("parade",), "direction": ("journey",), "count": ("signal",),
            "frames": ("signal",), "order": ("parade",), "backwards": ("parade",), "path": ("journey",),
            "grounding": ("parade",), "before": ("parade",), "last": ("parade",), "return": ("journey",),
            "onset": ("signal",)}
TRAINED_TYPES = ("colour", "shape", "direction", "count", "frames", "order", "backwards", "path", "grounding")
HELD_OUT_TYPES = ("before", "last", "return", "onset")


def numbered(words) -> str:
    """"first red second blue": every value stands behind a key of its own."""
    return " ".join(f"{key} {word}" for key, word in zip(ORDINALS, words))


def second_by_second(scene: dict) -> list[str]:
    """The shape on screen, or the move made, in each of the four seconds."""
    if scene["kind"] == "journey":
        return scene["moves"]
    return [moment["shape"] for moment in moments_of(scene)[::MOMENTS // SECONDS]]


def watched(flashes: list[int], until: int = MOMENTS) -> str:
    """"1 dark 2 flash 3 dark": the border, moment by moment."""
    return " ".join(f"{m} {'flash' if m in flashes else 'dark'}" for m in range(1, until + 1))


def _reversed_numbered(words) -> str:
    pairs = [f"{key} {word}" for key, word in zip(ORDINALS, words)]
    return "backwards " + " ".join(reversed(pairs))


def _choices(rng, right: str, pool) -> tuple[tuple[str, ...], str]:
    """Four options in random order; returns them and the letter of the right one."""
    others = [str(w) for w in rng.permutation([w for w in pool if w != right])[:3]]
    options = [str(w) for w in rng.permutation([right, *others])]
    return tuple(options), LETTERS[options.index(right)]


def make_item(rng: np.random.RandomState, scene: dict, question_type: str) -> Item:
    """Asks `question_type` about the scene; wording, options and their order are drawn from `rng`."""
    objects = scene["objects"]
    shapes, moves = [o["shape"] for o in objects], scene.get("moves")
    read = numbered(second_by_second(scene)) if question_type in ("order", "path", "before", "grounding") else ""
    at = int(rng.randint(len(objects)))
    if question_type == "before":
        at = int(rng.randint(1, len(objects)))
    subject, variant = objects[at], int(rng.randint(2))
    options, answer, span, kind = (), "", None, "exact"

    if question_type in ("colour", "grounding"):
        options, answer = _choices(rng, subject["colour"], COLOURS)
        trace = f"{subject['shape']} {subject['colour']} {answer}"
        if question_type == "grounding":
            span = tuple(float(b) for b in scene["bounds"][at:at + 2])
            trace = f"{read} {subject['shape']} from {span[0]} to {span[1]} {subject['colour']} {answer}"
    elif question_type in ("shape", "last", "before"):
        value = {"shape": shapes[0], "last": shapes[-1], "before": shapes[at - 1]}[question_type]
        options, answer = _choices(rng, value, SHAPES)
        lead = {"shape": "first", "last": "last", "before": f"{read} before"}[question_type]
        trace = f"{lead} {value} {answer}"
    elif question_type == "direction":
        options, answer = _choices(rng, moves[0], MOVES)
        trace = f"first {moves[0]} {answer}"
    elif question_type in ("count", "frames", "onset"):
        flashes = [str(m) for m in scene["flashes"]]
        trace = watched(scene["flashes"], scene["flashes"][0] if question_type == "onset" else MOMENTS)
        answer = {"count": str(len(flashes)), "frames": " ".join(flashes), "onset": flashes[0]}[question_type]
        kind = "exact" if question_type == "frames" else "numerical"
    else:
        words = second_by_second(scene)
        backwards = question_type in ("backwards", "return")
        trace = _reversed_numbered(words) if backwards else read
        answer = " ".join(reversed(words) if backwards else words)
    if options:
        kind = "grounding" if span else "multiple choice"
    question = WORDINGS[question_type][variant].format(shape=subject["shape"])
    return Item(question_type, kind, question, options, answer, trace, span, variant)


# --------------------------------------------------------------------------------------------------- data set

@dataclass(frozen=True)
class Split:
    """`clips` is the number of clips of each scene kind; each clip gets one question of every type it carries."""
    environment: str
    clips: int
    types: tuple[str, ...]


SPLITS = {"train": Split("meadow", 480, TRAINED_TYPES), "tune": Split("meadow", 112, TRAINED_TYPES),
          "L1": Split("meadow", 224, TRAINED_TYPES), "L2": Split("harbour", 224, TRAINED_TYPES),
          "L3": Split("harbour", 512, HELD_OUT_TYPES)}


def seeded(*parts) -> np.random.RandomState:
    """A random state of its own for every name, so that no two splits share a stream."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return np.random.RandomState(np.frombuffer(digest[:16], dtype=np.uint32))


def split_scenes(split: str, seed: int = 0):
    """Yields (clip name, scene, items) for every clip of a split."""
    spec = SPLITS[split]
    for i in range(spec.clips):
        for kind in SCENES:
            rng = seeded("ToyVideoQA", seed, split, kind, i)
            scene = make_scene(rng, kind, spec.environment)
            carried = [t for t in spec.types if kind in SCENE_OF[t]]
            if "colour" in carried and (i % 2 == 0) == (kind == "signal"):
                carried.remove("colour")  # asked of journeys and signals in turn, so that all types are equally many
            yield f"{kind}_{i:04d}", scene, [make_item(rng, scene, t) for t in carried]


def to_json(split: str, name: str, item: Item) -> dict:
    """The record in Video-R1's fields, with `question_type` added and `process` as in Video-R1-COT."""
    solution = f"<answer>{item.answer}</answer>"
    if item.span:
        solution += f"<glue>[({item.span[0]}, {item.span[1]})]</glue>"
    return {"problem_id": f"{split}/{name}/{item.question_type}", "problem": item.question, "data_type": "video",
            "problem_type": item.problem_type, "question_type": item.question_type,
            "options": [f"{letter}. {text}" for letter, text in zip(LETTERS, item.options)],
            "solution": solution, "process": f"<think>{item.trace}</think>",
            "path": f"clips/{split}/{name}.mp4", "data_source": "ToyVideoQA"}


def build_dataset(out: str | Path, seed: int = 0, splits=tuple(SPLITS), progress: bool = True) -> dict:
    """Writes clips, `SPLIT.jsonl` and `manifest.json` under `out`; returns the manifest.

    The manifest holds counts and sha256 sums of every records file and, per split, of all frames before encoding
    (`frames_sha256`), which are the same on every machine; encoded bytes depend on the x264 version."""
    from .video import write_clip

    out = Path(out)
    manifest = {"name": "ToyVideoQA", "seed": seed, "fps": FPS, "frames": MOMENTS * FRAMES_PER_MOMENT,
                "size": SIZE, "splits": {}}
    for split in splits:
        (out / "clips" / split).mkdir(parents=True, exist_ok=True)
        pixels, lines, counts, clips = hashlib.sha256(), [], Counter(), 0
        total = SPLITS[split].clips * len(SCENES)
        for name, scene, items in tqdm(split_scenes(split, seed), total=total, desc=split, disable=not progress):
            if not items:
                continue
            frames = render(scene)
            pixels.update(frames.tobytes())
            write_clip(out / "clips" / split / f"{name}.mp4", frames.repeat(FRAMES_PER_MOMENT, axis=0), FPS)
            lines += [json.dumps(to_json(split, name, item)) for item in items]
            counts.update(item.question_type for item in items)
            clips += 1
        text = "\n".join(lines) + "\n"
        (out / f"{split}.jsonl").write_text(text, encoding="utf-8", newline="\n")
        manifest["splits"][split] = {
            "environment": SPLITS[split].environment, "clips": clips, "questions": len(lines),
            "by_type": dict(counts), "records_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "frames_sha256": pixels.hexdigest()}
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8", newline="\n")
    return manifest

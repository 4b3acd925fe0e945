r"""Draws figures/before_after.gif and its still, before_after_strip.png: one question before and after training.

    python notebooks/before_after.py                 from the recorded answers, figures/before_after.json
    python notebooks/before_after.py --run runs/lite from a run of yours, of which it records the answers first

Of a run the first `path` question of L1 is taken that was answered wrong before and right after, and whose shape can be
seen in grey: an illustration, chosen because it changed. The pictures change slowly and nothing flashes.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import yaml
from PIL import Image

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))
from dvr1_lite.data import Record, prompt_text, read_records  # noqa: E402
from dvr1_lite.files import resolve  # noqa: E402
from dvr1_lite.lab.plotting import AFTER, STYLE, frame_strip  # noqa: E402
from dvr1_lite.rewards import parse_completion, score  # noqa: E402
from dvr1_lite.video import Clip, read_clip  # noqa: E402

FIGURES = FOLDER / "figures"
MOMENT, PAUSE, END = 800, 3500, 6000  # milliseconds that a picture stays


def record_of(name: str) -> Record:
    """The question with this id, from the split that the id begins with."""
    records = read_records(resolve(f"data/toyvideoqa/{name.split('/')[0]}.jsonl"))
    return next(record for record in records if record.record_id == name)


def stands_out(record: Record) -> bool:
    """Whether something in the clip is lighter or darker than its background by a quarter of the range, colours apart."""
    grey = read_clip(record.clip, 8, (56, 56)).frames.numpy().transpose(0, 2, 3, 1) @ (0.299, 0.587, 0.114)
    return np.abs(np.percentile(grey, (2, 98)) - np.median(grey)).max() > 0.25


def answers_of(run: Path) -> dict:
    """The first `path` question of L1 that a run came to answer right, with both completions and where they are from."""
    before, after = ({row["record_id"]: row for row in map(json.loads, (run / f"evaluation/{when}_L1.jsonl").open())}
                     for when in ("before", "after"))
    name = next(name for name, row in before.items() if row["question_type"] == "path"
                and row["accuracy"] == 0 and after[name]["accuracy"] == 1 and stands_out(record_of(name)))
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    return {"record_id": name, "before": before[name]["completion"], "after": after[name]["completion"],
            "method": config["method"], "steps": config["steps"], "seed": config["seed"]}


def told(record: Record, completion: str) -> str:
    """A completion in three lines: trace, answer, reward."""
    found, points = parse_completion(completion), score(record, completion)
    return f"trace:  {found.think}\nanswer: {found.answer}\nreward: {points.total:.0f} of {points.maximum:.0f}"


def picture(clip: Clip, moment: int, record: Record, answers: dict, shown: int) -> Image.Image:
    """One picture: the clip at a moment, the question, and the first `shown` answers."""
    boxes = ((0.56, "Before training", answers["before"], "#666666"),
             (0.18, f"After {answers['steps']} steps", answers["after"], AFTER))
    with plt.rc_context(STYLE | {"figure.constrained_layout.use": False}):
        figure = plt.figure(figsize=(7.8, 3.6), dpi=90)
        axes = figure.add_axes((0.02, 0.1, 0.38, 0.8))
        axes.imshow(clip.frames[moment].permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.axis("off")
        axes.set_title(f"{clip.seconds[moment]:.1f} s of {clip.duration:.0f} s", fontsize=10)
        figure.text(0.43, 0.86, prompt_text(record), fontsize=11, weight="bold", wrap=True, va="center")
        for height, title, completion, colour in boxes[:shown]:
            figure.text(0.43, height + 0.2, title, color=colour, fontsize=11, weight="bold", va="top")
            figure.text(0.43, height + 0.12, told(record, completion), fontsize=9, va="top", linespacing=1.6, family="monospace")
        figure.canvas.draw()
        drawn = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy())
    plt.close(figure)
    return drawn.quantize(96, dither=Image.Dither.NONE)


def write(answers: dict, folder: Path) -> None:
    """The GIF: clip and question, then the answer before, then the clip once more with the answer after; and the strip."""
    record = record_of(answers["record_id"])
    clip = read_clip(record.clip, 8, (56, 56))
    last = len(clip.frames) - 1
    moments = [(m, 0, MOMENT) for m in range(last + 1)] + [(last, 1, PAUSE)]
    moments += [(m, 2, MOMENT) for m in range(last + 1)] + [(last, 2, END)]
    pictures = [picture(clip, moment, record, answers, shown) for moment, shown, _ in moments]
    folder.mkdir(exist_ok=True)
    pictures[0].save(folder / "before_after.gif", save_all=True, append_images=pictures[1:], loop=0,
                     duration=[milliseconds for *_, milliseconds in moments])
    lines = [f"{when + ':':8s}" + told(record, answers[when]).replace("\n", " | ") for when in ("before", "after")]
    figure = frame_strip(clip, prompt_text(record), "\n".join(lines))
    figure.savefig(folder / "before_after_strip.png", dpi=90)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a finished training run")
    run, stored = parser.parse_args().run, FIGURES / "before_after.json"
    if run is not None:
        stored.write_text(json.dumps(answers_of(run), indent=1) + "\n", encoding="utf-8", newline="\n")
    write(json.loads(stored.read_text(encoding="utf-8")), FIGURES)


if __name__ == "__main__":
    main()

r"""Reads mutated records and configs in a process of its own, with a limit on memory: one line of JSON for each file.

    python tests/mutate_records.py FOLDER FIRST COUNT
"""

import json
import random
import sys
import time
from pathlib import Path

CHOICE = {"problem_id": 7, "problem": "What is red?", "data_type": "video", "problem_type": "multiple choice",
          "options": ["A. this", "B. that"], "process": "<think>first</think>", "solution": "<answer>B</answer>",
          "path": "clips/a.mp4", "data_source": "x", "duration": 4.0}
SEED = {"sample_id": "s", "task_goal": "g", "question": "q?", "choice_a": "a", "choice_b": "b", "choice_c": "c",
        "choice_d": "d", "golden_choice_idx": "C", "answer": "c", "task_progress_metadata": [{"start_frame": 3}],
        "video_source": "E", "video_basename": "a.mp4", "current_observation_basename": "a.png", "domain": "Daily"}
CSV = "\n".join(["video_id,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4",
                 '4010,369,640,480,why did he move?,"play, then rest",6,CW,share,approach,unwrap it,"play, then rest",r',
                 "2345,900,640,480,how many dogs are there?,2,1,CH,1,2,3,4,5", ""])
YAML = ("model: data/base_model\nlearning_rate: 1e-4\nsteps: 7\neval_files:\n  val: data/x.jsonl\nclip_eps: none\n"
        "instruction: \"Think: # 'first'\"\naugment: both\ngroup_size: 8\n")
WHOLE = {"jsonl": (json.dumps(SEED) + "\n") * 2, "json": json.dumps([CHOICE] * 2), "csv": CSV, "yaml": YAML}
SPLICES = [b"\0", b"\xff\xfe", b"\xf0\x9f\x98\x80", b'"', b"{", b"[" * 3000, b"9" * 5000, b"- " * 500, b"&a [*a]",
           b"!!python/object/apply:os.system [exit]", b"\r\n", b"\t", b"NaN", b"1e999", b": ", b",,,,", b"\\u0000",
           b"<|im_end|>", b"../" * 50, b"<answer>"]


def mutate(seed: int, data: bytearray) -> bytes:
    r"""Truncates, flips bits, deletes, repeats or splices; seeds that end in 9 leave nothing, or much."""
    rng = random.Random(seed)
    at = rng.randrange(len(data))
    if seed % 10 == 9:
        return rng.choice([b"", b"\n" * 99, rng.randbytes(999), bytes(data) * 500])
    for _ in range(rng.choice([1, 1, 2, 5])):
        kind, at = rng.randrange(5), rng.randrange(len(data) + 1)
        if kind == 0:
            del data[at:]
        elif kind == 1 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del data[at:at + rng.randrange(1, 40)]
        elif kind == 3:
            data[at:at] = data[:rng.randrange(200)]
        else:
            data[at:at] = rng.choice(SPLICES)
    return bytes(data)


def read(path: Path) -> str:
    r""""read", or "refused" with an error that names the file; anything else is a fault."""
    from dvr1_lite.config import load_config
    from dvr1_lite.data import read_records
    from dvr1_lite.errors import ConfigError, RecordError

    try:
        load_config(path) if path.suffix == ".yaml" else read_records(path)
    except ConfigError as error:
        return "refused" if path.suffix == ".yaml" and ": " in str(error) else repr(error)
    except RecordError as error:
        return "refused" if str(path) in str(error) and "\n" not in str(error) else repr(error)
    except BaseException as error:
        return repr(error)[:300]
    return "read"


def main(folder: Path, first: int, count: int) -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
    except ImportError:  # Windows
        pass
    for seed in range(first, first + count):
        kind = list(WHOLE)[seed % len(WHOLE)]
        path = folder / f"{first}.{kind}"
        path.write_bytes(mutate(seed // len(WHOLE), bytearray(WHOLE[kind].encode())))
        began = time.monotonic()
        result = read(path)
        print(json.dumps([seed, kind, result, time.monotonic() - began]), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

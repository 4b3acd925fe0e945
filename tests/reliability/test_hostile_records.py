r"""Hostile records and configs: whatever a file holds, it is read, or refused in one line that names it and a fix.

Mutated files are read in a process of its own with a limit on memory: this file run with FOLDER FIRST COUNT.
"""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dvr1_lite.config import load_config
from dvr1_lite.errors import ConfigError, RecordError
from dvr1_lite.scale.datasets import read_any

CHOICE = {"problem_id": 7, "problem": "What is red?", "data_type": "video", "problem_type": "multiple choice",
          "options": ["A. this", "B. that"], "process": "<think>first</think>", "solution": "<answer>B</answer>",
          "path": "clips/a.mp4", "data_source": "x", "duration": 4.0}
SEED = {"sample_id": "s", "task_goal": "g", "question": "q?", "choice_a": "a", "choice_b": "b", "choice_c": "c",
        "choice_d": "d", "golden_choice_idx": "C", "answer": "c", "task_progress_metadata": [{"start_frame": 3}],
        "video_source": "E", "video_basename": "a.mp4", "current_observation_basename": "a.png", "domain": "Daily"}
CSV = """video_id,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4
4010,369,64,48,why did he move?,"play, then rest",6,CW,share,approach,unwrap it,"play, then rest",r
2345,900,640,480,how many dogs are there?,2,1,CH,1,2,3,4,5
"""
YAML = ("model: data/base_model\nlearning_rate: 1e-4\nsteps: 7\neval_files:\n  val: data/x.jsonl\nclip_eps: none\n"
        "instruction: \"Think: # 'first'\"\naugment: both\ngroup_size: 8\n")
WHOLE = {"jsonl": (json.dumps(SEED) + "\n") * 2, "json": json.dumps([CHOICE] * 2), "csv": CSV, "yaml": YAML}
SPLICES = [b"\0", b"\xff\xfe", b"\xf0\x9f\x98\x80", b'"', b"{", b"[" * 3000, b"9" * 5000, b"- " * 500, b"&a [*a]",
           b"!!python/object/apply:os.system [exit]", b"\r\n", b"\t", b"NaN", b"1e999", b": ", b",,,,", b"\\u0000",
           b"<|im_end|>", b"../" * 50, b"<answer>"]
VALUES = [None, True, -1, 1e308, "", "<answer>", "A" * 5000, [], {}, [[]], {"a": {}}, "../x", "file:/x", "\0",
          "<|im_end|>", "\ud800", 10**400]


def mutate(seed: int, kind: str) -> bytes:
    r"""Replace a value, or write nothing or much, or truncate, flip a bit, delete, repeat or splice."""
    rng, data = random.Random(seed), bytearray(WHOLE[kind].encode())
    if kind in ("json", "jsonl") and seed % 3 == 0:
        row = dict(CHOICE if kind == "json" else SEED)
        row[rng.choice(sorted(row))] = rng.choice(VALUES)
        return json.dumps([row] if kind == "json" else row).encode()
    if seed % 10 == 9:
        return rng.choice([b"", b"\n" * 99, rng.randbytes(999), bytes(data) * 500])
    for _ in range(rng.choice([1, 1, 2, 5])):
        action, at = rng.randrange(5), rng.randrange(len(data) + 1)
        if action == 1 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        else:
            end = {0: len(data), 2: at + rng.randrange(1, 40)}.get(action, at)
            data[at:end] = {3: data[:rng.randrange(200)], 4: rng.choice(SPLICES)}.get(action, b"")
    return bytes(data)


def read(path: Path) -> str:
    r"""Return "read", or "refused" for one line that names the file and a fix; anything else is a fault."""
    try:
        load_config(path) if path.suffix == ".yaml" else read_any(path)
    except ConfigError as error:
        return "refused" if path.suffix == ".yaml" and ": " in str(error) else repr(error)
    except RecordError as error:
        text = str(error)
        return "refused" if str(path) in text and "\n" not in text and "; " in text else repr(error)
    except BaseException as error:
        return repr(error)[:300]
    return "read"


def main(folder: Path, first: int, count: int) -> None:
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
    for seed in range(first, first + count):
        kind = list(WHOLE)[seed % len(WHOLE)]
        path = folder / f"{first}.{kind}"
        path.write_bytes(mutate(seed // len(WHOLE), kind))
        began = time.monotonic()
        print(json.dumps([seed, kind, read(path), time.monotonic() - began]), flush=True)


@pytest.mark.parametrize("first, count", [(0, 480), *(pytest.param(first, 1000, marks=pytest.mark.slow)
                                                      for first in range(1000, 9000, 1000))])
def test_mutated_records_and_configs_are_read_or_refused(tmp_path, first, count):
    done = subprocess.run([sys.executable, "-m", "tests.reliability.test_hostile_records", str(tmp_path),
                           str(first), str(count)], capture_output=True,
                          text=True, timeout=300, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-2000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == count and [row for row in results if row[2] not in ("read", "refused")] == []
    assert {(kind, result) for _, kind, result, _ in results} == {
        (kind, result) for kind in WHOLE for result in ("read", "refused")}
    assert sorted(row[3] for row in results)[-2] < 5  # seconds


def test_a_config_of_a_few_lines_cannot_stand_for_gigabytes(tmp_path):
    levels = "".join(f", &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 6))
    (tmp_path / "laughs.yaml").write_text(f"model: [&a0 [x]{levels}]\n")
    with pytest.raises(ConfigError, match="has an alias"):
        load_config(tmp_path / "laughs.yaml")
    with open(tmp_path / "huge.yaml", "wb") as file:
        file.truncate(2**33)
    with pytest.raises(ConfigError, match="larger than"):
        load_config(tmp_path / "huge.yaml")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

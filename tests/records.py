r"""Write records as Video-R1's files, to be read back by tests."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from dvr1_lite.data import Record
from dvr1_lite.fields import LETTERS
from dvr1_lite.files import write_atomically


def write_records(path: str | os.PathLike, records: Iterable[Record], root: str | os.PathLike | None = None) -> None:
    r"""Write records as JSONL in Video-R1's fields, clips relative to `root` (the file's folder if None).

    Raises ValueError for a record with both a clip and an image, or neither: Video-R1's fields hold one.
    """
    root, lines = Path(path).parent if root is None else Path(root), []
    for record in records:
        if bool(record.clip) == bool(record.image):
            raise ValueError(f"record {record.record_id}: Video-R1's fields hold one clip or one image")
        row = {
            "problem_id": record.record_id, "problem": record.question,
            "data_type": "video" if record.clip else "image", "problem_type": record.problem_type,
            "question_type": record.question_type,
            "options": [f"{letter}. {text}" for letter, text in zip(LETTERS, record.options)],
            "process": f"<think>{record.trace}</think>" if record.trace else "",
            "solution": f"<answer>{record.answer}</answer>" + f"<glue>{[*record.spans]}</glue>" * bool(record.spans),
            "path": (record.clip or record.image).relative_to(root).as_posix(), "data_source": record.source,
            "duration": record.duration,
        }
        lines.append(json.dumps({key: value for key, value in row.items() if value is not None}, ensure_ascii=False))
    write_atomically(path, "".join(line + "\n" for line in lines))

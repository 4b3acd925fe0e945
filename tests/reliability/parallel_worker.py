r"""One process of several, started by `killable.start`; completions depend on the prompt alone."""

import os
import zlib

from dvr1_lite.config import TrainConfig
from dvr1_lite.training import Group, Trainer
from tests.small_run import train_files


class ByPrompt(Trainer):
    r"""Sample each group from a generator of its own prompt, so that it does not matter which process samples it."""

    def sample(self, records, prompts, size, phase) -> list[Group]:
        groups = []
        for record, prompt in zip(records, prompts, strict=True):
            self.generator.manual_seed(zlib.crc32(prompt.text.encode()))
            groups += super().sample([record], [prompt], size, phase)
        return groups


def work(config: TrainConfig, rank: int, count: int, port: int, resume: bool) -> dict:
    r"""Train as process `rank` of `count`, with the environment that `accelerate launch` gives it."""
    if count > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(count), RANK=str(rank),
                          LOCAL_RANK=str(rank), ACCELERATE_USE_CPU="true")
    return train_files(config, trainer=ByPrompt, resume=resume)

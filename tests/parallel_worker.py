r"""One process of a run: python parallel_worker.py CONFIG.yaml [resume] [unmerged].

Completions depend on the prompt alone. unmerged: sampling makes no dense copies of the weights, but reads them at every
token. Of divided weights it writes `shards_RANK.json` into the run's folder: bytes kept, layers wanted, layers put together.
"""

import contextlib
import json
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from small_run import coin_score  # noqa: E402

from dvr1_lite import parallel, training  # noqa: E402
from dvr1_lite.config import load_config  # noqa: E402
from dvr1_lite.errors import UserError  # noqa: E402
from dvr1_lite.policy import Completions, Policy  # noqa: E402

sample = training.sample_groups


def by_prompt(policy, prompts, size, limit, *, generator, **options):
    r"""Each group from a generator of its own prompt, so that it does not matter which process samples it."""
    seeds = [torch.Generator().manual_seed(zlib.crc32(prompt.text.encode())) for prompt in prompts]
    made = [sample(policy, [prompt], size, limit, generator=seed, **options) for prompt, seed in zip(prompts, seeds)]
    width = max(one.completions.ids.shape[-1] for one in made)
    pad = lambda x: torch.nn.functional.pad(x, (0, width - x.shape[-1]))
    completions = Completions(torch.cat([pad(one.completions.ids) for one in made]),
                              torch.cat([pad(one.completions.mask) for one in made]))
    return replace(made[0], completions=completions, texts=[text for one in made for text in one.texts],
                   finished=torch.cat([one.finished for one in made]))


class Counted(parallel.Shards):
    r"""Counts the layers that this process wanted and those that it helped to put together."""

    made = None

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.wanted = self.met = 0
        Counted.made = self

    def _meet(self, wanted):
        number, flat = super()._meet(wanted)
        self.met += flat is not None
        self.wanted += number == wanted and flat is not None
        return number, flat


def patch(module) -> None:
    module.sample_groups, module.score = by_prompt, coin_score
    module.best_trace = lambda scored: next((text for text, s in scored if s.right and text), None)


if __name__ == "__main__":
    torch.set_num_threads(1)
    patch(training)
    try:
        config, parallel.Shards = load_config(sys.argv[1]), Counted
        if "unmerged" in sys.argv:
            Policy.merged = lambda policy: contextlib.nullcontext()
        training.train(config, progress=False, resume="resume" in sys.argv)
        if Counted.made is not None:
            told = {"bytes": Counted.made.nbytes, "wanted": Counted.made.wanted, "met": Counted.made.met}
            (Path(config.out) / f"shards_{parallel.rank()}.json").write_text(json.dumps(told))
    except UserError as error:
        sys.exit(f"error: {error}")

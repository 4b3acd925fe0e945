r"""What the frozen encoder makes of clips and images, kept in memory and, if asked, in a folder between runs."""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .errors import ConfigError
from .files import make_folder, writing

FOLDER_FORMAT = 2  # of the files that keep encoded clips; those of another format are left alone


@dataclass(frozen=True)
class VisualPart:
    r"""One encoded video or image: embeds (V, H), detached; grid (t, h, w) in patches; seconds between grid times.

    moments: of a video, the second in the middle of each grid time. deep: with deepstack, what the language model adds
    to its states (V, H) after its first layers, one tensor a layer.
    """

    kind: str
    embeds: torch.Tensor
    grid: tuple[int, int, int]
    seconds_per_grid: float = 1.0
    moments: tuple[float, ...] = ()
    deep: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True)
class Features:
    r"""What a prompt shows: its visual parts in the order in which they stand in the user turn. May be empty."""

    parts: tuple[VisualPart, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for part in self.parts for x in (part.embeds, *part.deep))


def encoder_digest(visual: torch.nn.Module, preprocessing: dict) -> str:
    r"""Name an encoder by its first and last weights, its number type and its preprocessing."""
    weights = list(visual.parameters())
    digest = hashlib.sha256(repr((sorted(preprocessing.items()), weights[0].dtype, len(weights))).encode())
    for weight in (weights[0], weights[-1]):
        digest.update(weight.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


class FeatureCache:
    r"""Encoded clips by key, at most `max_bytes` of them in memory; the least recently used leave first.

    A key names everything that changes the pixels: clip path, frame count, size. folder: where encoded clips are kept
    between runs as well (one safetensors file each), for several processes at once.
    """

    def __init__(self, max_bytes: int = 2**28, folder: str | Path | None = None):
        self.max_bytes, self.folder, self.nbytes = max_bytes, folder and Path(folder), 0
        self._items: OrderedDict[Hashable, Features] = OrderedDict()

    def __len__(self) -> int:
        return len(self._items)

    def get(self, key: Hashable, build: Callable[[], Features]) -> Features:
        r"""Return the features of `key`, built on a miss. Raises ConfigError if one clip is larger than the cache."""
        if key in self._items:
            self._items.move_to_end(key)
            return self._items[key]
        features = build() if self.folder is None else self._from_folder(key, build)
        if features.nbytes > self.max_bytes:
            raise ConfigError(f"the features of {key} take {features.nbytes:,} bytes, the feature cache holds only "
                              f"{self.max_bytes:,}: raise feature_cache_mb, or sample fewer or smaller frames")
        self._items[key] = features
        self.nbytes += features.nbytes
        while self.nbytes > self.max_bytes:
            self.nbytes -= self._items.popitem(last=False)[1].nbytes
        return features

    def _from_folder(self, key: Hashable, build: Callable[[], Features]) -> Features:
        files = [part.stat() for part in key if isinstance(part, Path) and part.exists()]  # a new file, a new name
        name = repr((FOLDER_FORMAT, key, [(status.st_size, status.st_mtime_ns) for status in files]))
        path = self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.safetensors"
        if path.exists():
            with safe_open(path, "pt") as file:
                facts = json.loads(file.metadata()["parts"])
                return Features(tuple(
                    VisualPart(kind, file.get_tensor(f"{i}.0"), tuple(grid), seconds, tuple(moments),
                               tuple(file.get_tensor(f"{i}.{layer}") for layer in range(1, tensors)))
                    for i, (kind, grid, seconds, moments, tensors) in enumerate(facts)))
        features = build()
        tensors = [(part.embeds, *part.deep) for part in features.parts]
        facts = json.dumps([[part.kind, list(part.grid), part.seconds_per_grid, list(part.moments), len(own)]
                            for part, own in zip(features.parts, tensors)])
        make_folder(self.folder)
        part_file = path.with_suffix(f".{os.getpid()}.part")
        with writing(path):
            save_file({f"{i}.{layer}": x.cpu().contiguous() for i, own in enumerate(tensors)
                       for layer, x in enumerate(own)}, part_file, {"parts": facts})
            os.replace(part_file, path)
        return features

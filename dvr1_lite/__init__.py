"""DeepVideo-R1 Lite: Reg-GRPO with difficulty-aware augmentation, small enough to read (arXiv 2506.07464)."""

import importlib

__version__ = "0.3.0"

_HOMES = {"read_records": "data", "Record": "data", "prompt_text": "data", "read_clip": "video", "Policy": "policy",
          "load_policy": "run", "encode_record": "policy", "sample_groups": "rollout", "score": "rewards",
          "METHODS": "objectives", "objective_loss": "objectives", "Trainer": "training", "train": "run",
          "evaluate": "evaluation", "TrainConfig": "config", "load_config": "config", "load_reward": "own_reward"}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    """Import a public name from its module when it is first used, so that importing the package costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'dvr1_lite' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)

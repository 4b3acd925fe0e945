r"""A plug-in that makes ms-swift 4.6 train with the project's objectives and augmentation; see README.md.

    DVR1_CONFIG=FILE.yaml swift rlhf --rlhf_type grpo --external_plugins dvr1_lite/scale/engines/ms_swift.py
        --reward_funcs dvr1 ...

It replaces the trainer in `TrainerFactory.TRAINER_MAPPING`, which ms-swift does not document as a hook, so the
version is checked at import.
"""

from importlib.metadata import PackageNotFoundError, version

TESTED = "4.6."

try:
    INSTALLED = version("ms-swift")
except PackageNotFoundError:
    INSTALLED = "not installed"
if not INSTALLED.startswith(TESTED):  # before the imports of names that another version may not have
    raise ImportError(f"this plug-in replaces undocumented parts of ms-swift and was tested with {TESTED}x, but here "
                      f"ms-swift is {INSTALLED}: pip install 'ms-swift=={TESTED}*', or run `pytest -m slow "
                      f"tests/scale/test_engines.py` with your version and change TESTED in {__file__}")

import copy
import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from swift.rewards import ORM, orms
from swift.rlhf_trainers import GRPOTrainer
from swift.trainers import TrainerFactory, disable_gradient_checkpointing
from torch import Tensor

from dvr1_lite.config import DPO_METHODS, TrainConfig, load_config
from dvr1_lite.data import Record
from dvr1_lite.errors import ConfigError
from dvr1_lite.rewards import score
from dvr1_lite.scale.engines.coefficients import (LOSS_TYPES, coefficients, completion_rows, engine_advantages,
                                                  token_weights)
from dvr1_lite.scale.engines.groups import Augmenter
from dvr1_lite.scale.engines.rows import read_record, write_frames

EQUAL = {"beta": "beta", "temperature": "temperature", "num_generations": "group_size", "num_iterations":
         "inner_updates", "max_completion_length": "max_new_tokens"}  # ms-swift's argument, and the config's field
OFF = ("kl_in_reward", "overlong_filter", "dynamic_sample", "async_generate", "delta", "use_liger_kernel",
       "rollout_importance_sampling_mode", "off_policy_sequence_mask_delta", "multi_turn_scheduler", "sync_ref_model")


@functools.cache
def plugin_config() -> TrainConfig:
    r"""Load the config that the environment variable DVR1_CONFIG names. Raises `ConfigError`, also for one with a
    reward of your own, which this plug-in does not run."""
    if not os.environ.get("DVR1_CONFIG"):
        raise ConfigError("the environment variable DVR1_CONFIG is not set: give it a YAML file, or the name of a "
                          "shipped config")
    config = load_config(os.environ["DVR1_CONFIG"])
    if config.reward:
        raise ConfigError(f"the config names the reward {config.reward}, which this plug-in does not run: write an ORM "
                          f"of your own for ms-swift, and take the line `reward` out of the config")
    return config


class Reward(ORM):
    r"""The project's reward of a completion against the record of its row."""

    def __call__(self, completions: list[str], record: list[str], **_) -> list[float]:
        judge = plugin_config().judge
        return [score(read_record(own), text, judge).total for own, text in zip(record, completions)]


class SwiftSamples:
    r"""`groups.Engine` for ms-swift's `GRPOSample`."""

    def __init__(self, trainer: GRPOTrainer):
        self.trainer = trainer
        self.clips = Path(trainer.args.output_dir, f"augmented_{trainer.accelerator.process_index}")

    def record(self, sample: Any) -> Record:
        if "record" not in sample.extra:
            raise ConfigError("the data set has no column `record`: make its rows with `python -m "
                              "dvr1_lite.scale.engines.rows`")
        return read_record(sample.extra["record"])

    def text(self, sample: Any) -> str:
        return sample.messages[-1]["content"]

    def with_prompt(self, sample: Any, text: str) -> Any:
        sample = copy.deepcopy(sample)
        system = [message for message in sample.messages if message["role"] == "system"]
        sample.messages = [*system, {"role": "user", "content": text}]
        return sample

    def with_completion(self, sample: Any, other: Any) -> Any:
        sample = copy.deepcopy(sample)
        sample.messages[-1] = copy.deepcopy(other.messages[-1])
        for name in ("response_token_ids", "response_loss_mask", "rollout_logprobs", "finish_reason", "add_eos"):
            setattr(sample, name, copy.deepcopy(getattr(other, name)))
        return sample

    def with_frames(self, sample: Any, change: Callable[[Tensor], Tensor]) -> Any:
        r"""Write the changed frames as a clip of their own, which every engine reads like the first one."""
        from qwen_vl_utils import fetch_video

        frames, fps = fetch_video({"video": sample.videos[0], **sample.extra.get("chat_template_kwargs", {})},
                                  return_video_sample_fps=True)  # (T, 3, H, W) in [0, 255]
        sample = copy.deepcopy(sample)
        self.clips.mkdir(parents=True, exist_ok=True)
        path = self.clips / f"{len(list(self.clips.iterdir()))}.mp4"
        write_frames(path, change(frames / 255), fps)
        sample.videos = [str(path)]
        return sample

    def generate(self, samples: list[Any]) -> list[Any]:
        return self.trainer._generate_completions(samples)

    def gather(self, value: Any) -> list[Any]:
        return gather_object([value])


class ObjectiveTrainer(GRPOTrainer):
    r"""ms-swift's trainer with the project's augmentation and objective; its own KL term and clipping do nothing."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.config = plugin_config()
        check_arguments(self, self.config)
        self.augmenter = Augmenter(self.config, SwiftSamples(self))

    def _score_completions(self, samples: list) -> list:
        r"""Replace groups of hard and easy prompts, then let the engine score what is trained on."""
        if self.model.training:
            shutil.rmtree(self.augmenter.engine.clips, ignore_errors=True)  # of the step before
            samples, counts = self.augmenter.augment(samples, self.state.global_step)
            for name, count in counts.items():
                self._metrics["train"][f"augmentation/{name}"].append(count)
        return super()._score_completions(samples)

    def _prepare_batch_inputs(self, samples: list) -> list[dict]:
        r"""Encode; the engine computes reference log-probs only while its beta is not 0."""
        self.beta = 1.0 if self.config.beta > 0 or self.config.method in DPO_METHODS else 0.0
        batches = super()._prepare_batch_inputs(samples)
        self.beta = 0.0  # the coefficients have the KL term
        return batches

    def _postprocess_batch(self, samples: list, batches: list[dict]) -> None:
        r"""Keep what the coefficients need in each micro-batch, and make its ratios exactly 1."""
        super()._postprocess_batch(samples, batches)  # logs the rewards; its advantages are replaced
        if not self.model.training:
            return
        rewards = (self._rewards_per_func * self.reward_weights).nansum(dim=1)
        at = self.accelerator.process_index * len(samples)
        for batch in (batch["grpo_batch"] for batch in batches):
            batch.first_logps, batch.old_per_token_logps = batch.old_per_token_logps, None
            batch.rewards = rewards[at:at + len(batch.completion_mask)].tolist()
            at += len(batch.completion_mask)
        self.moved = False  # whether the weights have changed since

    def _prepare_inputs(self, inputs: list) -> dict:
        batch = super()._prepare_inputs(inputs)
        if self.model.training and self._step % self.args.gradient_accumulation_steps == 0:
            self.write_advantages()
        return batch

    @torch.no_grad()
    def write_advantages(self) -> None:
        r"""Before an update: give all its micro-batches the advantages that make the engine's loss the objective."""
        own, batches = [], [batch["grpo_batch"] for batch in self._buffered_inputs]
        for inputs, batch in zip(self._buffered_inputs, batches):
            logp = batch.first_logps
            if self.moved:
                with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
                    logp = self._get_per_token_logps_and_entropies(self.model, inputs["model_inputs"], batch)[0]
            ref = logp if batch.ref_per_token_logps is None else batch.ref_per_token_logps
            own += zip(*(completion_rows(values, batch.completion_mask) for values in (logp, batch.first_logps, ref)),
                       batch.rewards)
        logp, old, ref, rewards = zip(*gather_object(own))
        found = coefficients(logp, old, ref, rewards, self.num_generations, self.config)
        at = self.accelerator.process_index * len(own)
        for batch in batches:
            mask = batch.completion_mask
            weights = token_weights(
                mask, self.loss_type, micro_batches=len(batches), processes=self.accelerator.num_processes,
                max_completion_length=self.max_completion_length, total_tokens=float(batch.num_items_in_batch))
            batch.advantages = engine_advantages(found[at:at + len(mask)], mask, weights)
            at += len(mask)
        self.moved = True


def check_arguments(trainer: ObjectiveTrainer, config: TrainConfig) -> None:
    r"""Raise `ConfigError` for an argument of ms-swift that contradicts the config or bends the gradient."""
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    wanted = {name: getattr(config, field) for name, field in EQUAL.items()}
    wanted |= {"steps_per_generation": args.gradient_accumulation_steps, "importance_sampling_level": "token",
               "top_entropy_quantile": 1.0}
    for name, value in wanted.items():
        if getattr(args, name) != value:
            raise ConfigError(f"--{name} is {getattr(args, name)!r}: give {value!r}, which the config or the "
                              f"coefficient form asks for")
    for name in OFF:
        if getattr(args, name, None):
            raise ConfigError(f"--{name} is {getattr(args, name)!r} and would change the gradient: leave it out")
    if args.loss_type not in LOSS_TYPES:
        raise ConfigError(f"--loss_type is {args.loss_type!r}: give one of {', '.join(LOSS_TYPES)}")
    if any(adapter.lora_dropout for adapter in getattr(model, "peft_config", {}).values()):
        raise ConfigError("--lora_dropout is not 0: old and new log-probs must come from one model; give 0")
    if args.per_device_train_batch_size * args.steps_per_generation % args.num_generations:
        raise ConfigError("a process would hold a part of a group: make per_device_train_batch_size times "
                          "gradient_accumulation_steps a multiple of num_generations")
    if config.variant == "kept" and trainer.accelerator.num_processes > 1:
        raise ConfigError("hint_update: kept gives processes different numbers of groups: use one process, or "
                          "hint_update: mixed")


orms["dvr1"] = Reward
TrainerFactory.TRAINER_MAPPING["grpo"] = f"{__name__}.ObjectiveTrainer"

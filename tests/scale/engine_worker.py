r"""Run by an engine's own environment: train with a tiny model, and compare the gradient of every update.

    python -m tests.scale.engine_worker trl|swift FOLDER '{"method": "reg-grpo", "options": {...}, ...}'

options: arguments of the engine; the rest: fields of the config. Writes FOLDER/RANK/updates.json, for each update the
relative difference between the adapter's gradient and that of `objective_loss` on all completions in one graph.
"""

import importlib.util
import json
import os
import re
import sys
import zlib
from pathlib import Path

import torch


def declare_torchvision() -> torch.library.Library | None:
    r"""Declare the operators that PyPI's torchvision, a CUDA build, lacks beside a CPU build of torch, so that it can
    be imported. None of them is called."""
    found = importlib.util.find_spec("torchvision")
    if found is None or torch.version.cuda is not None:
        return None
    source = Path(found.origin).with_name("_meta_registrations.py").read_text()
    library = torch.library.Library("torchvision", "DEF")
    for name in dict.fromkeys(re.findall(r'(?:register_meta\("|torchvision::)(\w+)', source)):
        library.define(f"{name}(Tensor x) -> Tensor")
    return library


LIBRARY = declare_torchvision()  # before transformers looks for torchvision

from PIL import Image
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration, TrainerCallback

from dvr1_lite.config import TrainConfig, make_config, to_yaml
from dvr1_lite.loading import LORA_TARGETS
from dvr1_lite.objectives import Batch, objective_loss
from tests.small_run import coin_score, write_world
from tests.tiny import add_noise_to_lora

GROUP, STEPS, UPDATES = 4, 3, 2
FIELDS = {"group_size": GROUP, "inner_updates": UPDATES, "max_new_tokens": 6, "num_frames": 4, "frame_size": 56,
          "beta": 0.1, "history_window": 4, "dead_zone": 0.01, "hint_traces": 2}
COMMON = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_generations": GROUP,
          "num_iterations": UPDATES, "max_completion_length": 6, "max_steps": STEPS * UPDATES, "learning_rate": 0.02,
          "temperature": 1.0, "max_grad_norm": 0.0, "loss_type": "grpo", "gradient_checkpointing": False,
          "save_strategy": "no"}


class Compare(TrainerCallback):
    r"""Before each optimizer step compute the objective in one graph and note how far the gradient is from its own.

    rows: a function (trainer, model) that yields, completion by completion and group by group, the log-probs with
    gradient, the first ones, the reference's, the mask and the reward.
    """

    def __init__(self, trainer, config: TrainConfig, rows):
        self.trainer, self.config, self.rows, self.updates, self.counts = trainer, config, rows, [], {}

    def on_pre_optimizer_step(self, args, state, control, model, **_):
        columns = [torch.nn.utils.rnn.pad_sequence(list(column), batch_first=True).unflatten(0, (-1, GROUP))
                   for column in zip(*self.rows(self.trainer, model))]
        logp, old, ref, mask, rewards = columns
        loss = objective_loss(Batch(logp, old, ref, mask.bool(), rewards[..., 0]), self.config)
        parameters = [p for p in model.parameters() if p.requires_grad]
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
        if torch.distributed.is_initialized():  # each process has whole groups, so the mean is the whole's
            torch.distributed.all_reduce(expected)
            expected /= torch.distributed.get_world_size()
        found = torch.cat([p.grad.flatten() for p in parameters])
        self.updates.append({
            "difference": float((found - expected).norm() / expected.norm()), "norm": float(expected.norm()),
            "completions": logp.shape[0] * GROUP, "moved": float((logp - old).detach().abs().max()), **self.counts})


# --- TRL -------------------------------------------------------------------------------------------------------------


def trl_rows(trainer, model) -> list[tuple]:
    found = {}
    for batch in trainer._buffered_inputs:
        ids, mask = (torch.cat([batch[f"prompt_{kind}"], batch[f"completion_{kind}"]], dim=1)
                     for kind in ("ids", "mask"))
        images = {name: batch[name] for name in ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")}
        length = batch["completion_ids"].shape[1]
        logp = trainer._get_per_token_logps_and_entropies(model, ids, mask, length, **images)[0]
        found |= dict(zip(batch["place"].tolist(), zip(
            logp, batch["first_logps"], batch["ref_per_token_logps"], batch["completion_mask"],
            batch["reward"][:, None])))
    return [found[place] for place in sorted(found)]


def trl(folder: Path, config: TrainConfig, options: dict) -> list[dict]:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig

    from dvr1_lite.scale.engines.trl_example import ObjectiveTrainer

    def coin(completions, **_) -> list[float]:
        return [float(zlib.crc32(completion[0]["content"].encode()) % 3) for completion in completions]

    args = GRPOConfig(**COMMON | {"output_dir": str(folder / "out"), "use_cpu": True, "bf16": False, "report_to": [],
                                  "beta": config.beta, "use_bias_correction_kl": False} | options)
    pixels = torch.randint(0, 255, (4, 56, 56, 3), dtype=torch.uint8).numpy()
    questions = ("what colour comes first", "what comes then", "what is the answer", "red then blue")
    prompts = [{"prompt": [{"role": "user", "content": text}], "images": [Image.fromarray(picture)]}
               for text, picture in zip(questions, pixels)]
    trainer = ObjectiveTrainer(
        model=Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "model"), reward_funcs=coin, args=args,
        train_dataset=Dataset.from_list(prompts), processing_class=AutoProcessor.from_pretrained(folder / "model"),
        peft_config=LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=LORA_TARGETS), objective=config)
    compare = Compare(trainer, config, trl_rows)
    trainer.add_callback(compare)
    add_noise_to_lora(trainer.model)
    trainer.train()
    return compare.updates


# --- ms-swift --------------------------------------------------------------------------------------------------------


def swift_rows(trainer, model):
    for batch in trainer._buffered_inputs:
        inputs, signals = batch["model_inputs"], batch["grpo_batch"]
        assert inputs["video_grid_thw"].tolist() == [[2, 4, 4]] * len(signals.rewards)
        assert all(abs(seconds - 1) < 1e-3 for seconds in inputs["second_per_grid_ts"])  # of changed frames too
        assert len(inputs["pixel_values_videos"]) == 32 * len(signals.rewards)
        logp = trainer._get_per_token_logps_and_entropies(model, inputs, signals)[0]
        ref = logp.detach() if signals.ref_per_token_logps is None else signals.ref_per_token_logps  # without KL term
        yield from zip(logp, signals.first_logps, ref, signals.completion_mask, torch.tensor(signals.rewards)[:, None])


def observed(plugin, config: TrainConfig, made: list[Compare]) -> type:
    r"""Return the plug-in's trainer with the comparison, an adapter that changes the outputs, and counts kept."""
    class Observed(plugin.ObjectiveTrainer):
        def __init__(self, *arguments, **keywords):
            super().__init__(*arguments, **keywords)
            made.append(Compare(self, config, swift_rows))
            self.add_callback(made[0])
            add_noise_to_lora(self.model)
            augment = self.augmenter.augment

            def counted(*given):
                samples, made[0].counts = augment(*given)
                return samples, made[0].counts

            self.augmenter.augment = counted

    return Observed


def swift(folder: Path, config: TrainConfig, options: dict) -> list[dict]:
    from swift.pipelines import rlhf_main
    from swift.template.templates.qwen import Qwen2_5VLTemplate
    from swift.trainers import TrainerFactory
    from swift.utils.utils import import_external_file

    from dvr1_lite.scale.engines import groups, rows

    (folder / "config.yaml").write_text(to_yaml(config))
    os.environ["DVR1_CONFIG"] = str(folder / "config.yaml")
    rows.main(["--data", str(folder / "records.jsonl"), "--config", str(folder / "config.yaml"), "--out",
               str(folder / "rows.jsonl")])
    file, made = str(Path(groups.__file__).with_name("ms_swift.py")), []
    plugin = import_external_file(file)
    plugin.score = groups.score = coin_score  # so that a random model earns different rewards
    groups.best_trace = lambda scored: next((text for text, score in scored if score.correct and text), None)
    ids = json.loads((folder / "model/config.json").read_text())  # the template has those of Qwen's vocabulary
    Qwen2_5VLTemplate.image_token_id, Qwen2_5VLTemplate.video_token_id = ids["image_token_id"], ids["video_token_id"]
    sys.modules[__name__].Observed = observed(plugin, config, made)
    TrainerFactory.TRAINER_MAPPING["grpo"] = f"{__name__}.Observed"
    arguments = COMMON | {
        "rlhf_type": "grpo", "external_plugins": file, "reward_funcs": "dvr1", "model": folder / "model",
        "model_type": "qwen2_5_vl", "template": "qwen2_5_vl", "dataset": folder / "rows.jsonl", "attn_impl": "sdpa",
        "tuner_type": "lora", "lora_rank": 4, "lora_dropout": 0, "torch_dtype": "float32", "beta": config.beta,
        "output_dir": folder / "out", "split_dataset_ratio": 0, "report_to": "none"} | options
    rlhf_main([text for name, value in arguments.items() for text in (f"--{name}", str(value))])
    return made[0].updates


if __name__ == "__main__":
    engine, folder, given = sys.argv[1], Path(sys.argv[2], os.environ.get("RANK", "0")), json.loads(sys.argv[3])
    options = given.pop("options", {})
    write_world(folder, clips=4)
    processor = folder / "model/preprocessor_config.json"
    processor.write_text(json.dumps(json.loads(processor.read_text()) | {"processor_class": "Qwen2_5_VLProcessor"}))
    (folder / "model/generation_config.json").write_text(json.dumps(
        {"eos_token_id": 2, "pad_token_id": 0, "suppress_tokens": [0, 1, 3, 4, 5, 6]}))  # special ones but the end
    torch.manual_seed(0)
    updates = {"trl": trl, "swift": swift}[engine](folder, make_config(FIELDS | given), options)
    (folder / "updates.json").write_text(json.dumps(updates))

r"""The coefficient form inside TRL 1.16, to read: Reg-GRPO and its rivals as a subclass of `GRPOTrainer`.

TRL up to 1.16 **trains blind on video**: it accepts a video in the prompt, samples with it, and computes log-probs and
gradients without it, silently; a column `video` is ignored. This class refuses both. Give frames as images, or use
ms_swift.py.
"""

from dataclasses import replace

import torch
from accelerate.utils import gather_object
from trl import GRPOTrainer

from dvr1_lite.config import ObjectiveConfig
from dvr1_lite.errors import ConfigError
from dvr1_lite.scale.engines.coefficients import coefficients, completion_rows, engine_advantages, token_weights

MODEL_INPUTS = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")


def holds_video(example: dict) -> bool:
    r"""Tell whether a row has a column of videos, or a video among the parts of its prompt."""
    contents = [message["content"] for message in example["prompt"] if isinstance(message, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return "video" in example or "videos" in example or any(part["type"] == "video" for part in parts)


class ObjectiveTrainer(GRPOTrainer):
    r"""`GRPOTrainer` that trains with one of the project's objectives; the KL term stays TRL's own.

    objective: the settings; `beta` is TRL's. args: a `GRPOConfig` as `REQUIRED` lists it.
    """

    REQUIRED = {"loss_type": "grpo", "importance_sampling_level": "token", "use_bias_correction_kl": False,
                "mask_truncated_completions": False, "top_entropy_quantile": 1.0, "delta": None, "use_vllm": False}

    def __init__(self, *arguments, objective: ObjectiveConfig, **options):
        super().__init__(*arguments, **options)
        values = self.REQUIRED | {"steps_per_generation": self.args.gradient_accumulation_steps, "beta": objective.beta}
        for name, value in values.items():
            if getattr(self.args, name) != value:
                raise ConfigError(f"{name} is {getattr(self.args, name)!r}: the coefficient form needs {value!r}")
        self.objective = replace(objective, beta=0.0)

    def _calculate_rewards(self, *arguments):
        self._rewards = super()._calculate_rewards(*arguments)  # (N, functions), of all processes
        return self._rewards

    def _generate_and_score_completions(self, inputs):
        if any(holds_video(example) for example in inputs):
            raise ConfigError("a prompt holds a video, which TRL up to 1.16 samples with and does not train on: give "
                              "its frames as images, or use ms-swift")
        batch = super()._generate_and_score_completions(inputs)
        count = len(batch["completion_ids"])
        places = torch.arange(count) + count * self.accelerator.process_index
        rewards = (self._rewards * self.reward_weights.to(self._rewards)).nansum(dim=1)
        return batch | {"place": places, "reward": rewards.cpu()[places]}  # both follow when TRL shuffles the batch

    def _prepare_inputs(self, generation_batch):
        inputs = super()._prepare_inputs(generation_batch)
        if self.model.training and self._step % self.args.gradient_accumulation_steps == 0:
            self.write_advantages()
        return inputs

    @torch.no_grad()
    def write_advantages(self) -> None:
        r"""Before an update: give all buffered micro-batches the advantages that make TRL's loss the objective."""
        own, batches = [], self._buffered_inputs
        for batch in batches:
            ids, mask = (torch.cat([batch[f"prompt_{kind}"], batch[f"completion_{kind}"]], dim=1)
                         for kind in ("ids", "mask"))
            values = {name: batch[name] for name in MODEL_INPUTS if batch.get(name) is not None}
            logp = self._get_per_token_logps_and_entropies(self.model, ids, mask, batch["completion_ids"].shape[1],
                                                           **values)[0]
            batch.setdefault("first_logps", logp)  # of the update before which nothing had changed
            own += zip(batch["place"].tolist(), batch["reward"].tolist(),
                       *(completion_rows(rows, batch["completion_mask"]) for rows in (logp, batch["first_logps"])))
        _, rewards, logp, old = zip(*sorted(gather_object(own), key=lambda row: row[0]))
        found = coefficients(logp, old, None, rewards, self.num_generations, self.objective)
        for batch in batches:
            mask = batch["completion_mask"]
            weights = token_weights(mask, "grpo", micro_batches=len(batches), processes=self.accelerator.num_processes)
            batch["advantages"] = engine_advantages([found[place] for place in batch["place"]], mask, weights)
            batch["old_per_token_logps"] = None  # the ratio is exactly 1

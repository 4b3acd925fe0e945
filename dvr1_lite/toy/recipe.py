r"""The recipe of the tiny base model: `python -m dvr1_lite pretrain`.

Four stages, all on scenes that no split of ToyVideoQA contains:

1. **Perception.** Every visual token is trained to predict what its two frames show: shape, colour, place, move and
   flash. Without this stage the language model learns to ignore the video. Afterwards the encoder stays frozen.
2. **Answering.** The language model is fine-tuned on traces, on prompts with a hint, and on prompts that show the
   answer. Before and during this stage it also practises naming the letter of an option; without these letter
   exercises it takes very long to learn that options stand in a random order.
3. **Habits.** With the probabilities in `HABITS`, the target is a guess instead. Like a real model before
   reinforcement learning, the base model then *can* do more than it usually *does*, and its groups vanish at both ends.
   This is by design and says nothing about real video. Stages 2 and 3 are the same training run, with mixed targets.
4. **Chains.** In two more cycles three quarters of the examples about a journey or a signal are chain types. Their
   plain success is set for each cell by `CHAIN_SUCCESS`:

   - F: each step of the chain goes wrong with the same probability, also behind the beginning that a hint gives;
   - A: the opening gives way to a habit, the last value alone; whatever follows a good opening is good. A hint that
     shows the opening helps, an empty one does not;
   - S: the same habit, which any hint, even an empty one, switches off.
"""

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import RandomState
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from ..augmentation import cut_hint
from ..data import Record, prompt_text
from ..errors import UserError
from ..files import write_atomically
from ..video import patchify
from .world import (CELLS, COLOURS, ENVIRONMENTS, LETTERS, MOMENT_SECONDS, MOMENTS, MOVES, ORDINALS, QUESTION_TYPES,
                    SCENES, SECONDS, SHAPES, SIZE, Item, chain_step, chain_trace, chain_values, make_item,
                    make_scene, moments_of, render, seeded, wrong_step)

HABITS = {  # question type: probability of answering from habit, for the first and for the second wording
    "colour": (0.0, 0.05), "shape": (0.0, 0.05), "direction": (0.02, 0.3), "grounding": (0.05, 0.85),
    "count": (0.1, 0.9), "order": (0.2, 0.95), "frames": (0.8, 0.97), "path": (0.8, 0.97),
    "before": (0.1, 0.7), "last": (0.05, 0.5), "onset": (0.1, 0.7),
}
CHAIN_SUCCESS = {"F1": 0.05, "F2": 0.01, "F3": 1e-3, "F4": 1e-4, "A1": 0.05, "A2": 0.01, "A3": 1e-3, "A4": 1e-4,
                 "S": 0.01}
CHAIN_CEILING = {"tally": 0.95, "cell": 0.95, "since": 0.95}  # success without planted errors, in the environment of RL
OPEN_GUESSES: dict[str, Callable[[RandomState], Sequence]] = {  # the guess where there are no options
    "count": lambda rng: [rng.randint(1, 5)],
    "onset": lambda rng: [rng.randint(1, MOMENTS + 1)],
    "frames": lambda rng: sorted(rng.choice(MOMENTS, rng.randint(1, 5), replace=False) + 1),
    "order": lambda rng: rng.permutation(SHAPES)[:SECONDS],
    "path": lambda rng: rng.choice(list(MOVES), SECONDS),
}
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
                  "<|image_pad|>", "<|video_pad|>")
TAGS = ("<think>", "</think>", "<answer>", "</answer>", "<glue>", "</glue>")
OTHER_WORDS = "user assistant system options hint the answer is from to guess before last letters of dark flash _"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
DEPTH = 3  # layers of the encoder
MEAN = STD = (0.5, 0.5, 0.5)
POOL = ("studio", "wide", "wide", "wide", "wide")  # the environments of the clips that the model is trained on


@dataclass(frozen=True)
class Recipe:
    r"""Sizes of the base model's training. `clips` counts the scenes of each kind for each environment of `POOL`."""

    seed: int = 0
    clips: int = 1000
    encoder_steps: int = 1500
    encoder_batch: int = 96
    encoder_lr: float = 2e-3
    text_steps: int = 1400
    text_batch: int = 64
    text_lr: float = 2e-3
    chain_cycles: tuple[int, ...] = (2400, 1400)  # steps of the cycles with chain types and more letter exercises
    chain_lr: float = 1e-3
    chain_drill_share: float = 0.15
    chain_hint_share: float = 0.35
    chain_share: float = 0.75  # share of chain types among the examples about a clip that carries them
    odds_weight: float = 0.3  # weight of the squared error of the log-odds where a target has two words
    drill_steps: int = 1000  # letter exercises without video, before the fine-tuning; learned suddenly, after about 500
    drill_batch: int = 96  # smaller batches stay on the plateau before it
    drill_learned: float = 0.2  # loss below which the letters are learned; the plateau is at 0.44
    drill_cycles: int = 4  # most cycles of `drill_steps`: one is enough for seed 0, not for every seed
    drill_share: float = 0.1  # share of letter exercises among the fine-tuning examples
    hint_share: float = 0.25  # share of the other examples that have a hint
    answer_share: float = 0.12  # share of them that show the answer
    wrong_clip_share: float = 0.33  # share of the hinted examples that show another clip, so that only the hint helps
    ceiling_clips: int = 100  # new scenes of each kind in each environment, on which the encoder is judged
    noise_share: float = 0.3  # share of the clips that have Gaussian noise on their frames
    max_noise: float = 0.01  # its largest standard deviation, pixel values in [0, 1]


# --- tokenizer and model ---------------------------------------------------------------------------------------------


def build_tokenizer() -> PreTrainedTokenizerFast:
    r"""Build a word-level tokenizer: one token per word, punctuation dropped, the first word in either case."""
    wordings = [wording for kind in QUESTION_TYPES.values() for wording in kind.wordings]
    asked = re.findall(r"\w+", " ".join(wordings).replace("{shape}", "").lower())
    seconds = [str(float(second)) for second in range(SECONDS + 1)]
    words = [*OTHER_WORDS.split(), *asked, *COLOURS, *SHAPES, *MOVES, *ORDINALS, *map(str, range(10)),
             *seconds, *LETTERS]
    tokens = dict.fromkeys([*SPECIAL_TOKENS, "<unk>", *TAGS, *words])
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    openers = sorted({wording.split()[0] for wording in wordings} | {"Options", "Hint", "The"})
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(rf"\b{word}\b"), word.lower()) for word in openers])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d+\.\d+|\w+"), behavior="removed", invert=True)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|im_end|>",
                                   pad_token="<|endoftext|>", additional_special_tokens=list(SPECIAL_TOKENS[1:]),
                                   clean_up_tokenization_spaces=False)
    fast.add_tokens(list(TAGS), special_tokens=False)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    r"""Build the tiny `Qwen2_5_VLForConditionalGeneration` with random weights."""
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>")
           for name in ("vision_start", "vision_end", "image_pad", "video_pad", "im_end", "endoftext")}
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=128 * ((len(tokenizer) + 127) // 128), hidden_size=128, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, intermediate_size=384, max_position_embeddings=2048,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            tie_word_embeddings=True, use_sliding_window=False, bos_token_id=None,
            eos_token_id=ids["im_end"], pad_token_id=ids["endoftext"]),
        vision_config=dict(
            depth=DEPTH, hidden_size=96, num_heads=4, intermediate_size=192, out_hidden_size=128, patch_size=14,
            spatial_merge_size=2, temporal_patch_size=2, window_size=112, fullatt_block_indexes=[1],
            tokens_per_second=2, in_channels=3),
        image_token_id=ids["image_pad"], video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"], vision_end_token_id=ids["vision_end"], tie_word_embeddings=True)
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = ids["im_end"]
    model.generation_config.pad_token_id = ids["endoftext"]
    return model


def optimise(parameters: list[Tensor], batch_loss: Callable[[], tuple[Tensor, dict[str, float]]], steps: int, lr: float,
             *, warm_up: float, weight: float, title: str) -> dict[str, float]:
    r"""Run AdamW with one cycle of the learning rate on `batch_loss`, which returns a loss and figures to report.

    warm_up: share of the steps in which the learning rate rises. weight: of the newest step in the running means of
    the figures, which are shown beside the progress bar and returned.
    """
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=warm_up)
    running: dict[str, float] = {}
    bar = tqdm(range(steps), desc=title)
    for _ in bar:
        loss, figures = batch_loss()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        running = {name: (1 - weight) * running[name] + weight * value if running else value
                   for name, value in figures.items()}
        bar.set_postfix({name: f"{value:.3f}" for name, value in running.items()})
    return running


# --- stage 1: perception ---------------------------------------------------------------------------------------------


@dataclass
class Pool:
    r"""Scenes, their pixels (N, 8, 56, 56, 3) uint8, and labels for each moment: shape, colour and flash (N, 8),
    place (N, 8, 2) as a share of the frame; move (N, 4) for each second, 0 if there is none."""

    scenes: list[dict]
    pixels: np.ndarray
    labels: dict[str, Tensor]


def make_pool(seed: int, clips: int, environments: Sequence[str] = POOL, use: str = "pretraining") -> Pool:
    r"""Draw and render `clips` scenes of each kind for each of `environments`; another `use` draws other scenes."""
    scenes = [make_scene(seeded(use, seed, place, environment, kind, index), kind, environment)
              for index in range(clips) for place, environment in enumerate(environments) for kind in SCENES]
    pixels = np.stack([render(scene) for scene in tqdm(scenes, desc="rendering clips")])
    shapes, colours, moves = ({name: index for index, name in enumerate(names)}
                              for names in (SHAPES, COLOURS, ("none", *MOVES)))
    rows = [[(shapes[moment["shape"]], colours[moment["colour"]], int(moment["flash"]))
             for moment in moments_of(scene)] for scene in scenes]
    shape, colour, flash = torch.tensor(rows).unbind(-1)
    place = torch.tensor([[moment["place"] for moment in moments_of(scene)] for scene in scenes]) / SIZE
    move = torch.tensor([[moves[name] for name in scene.get("moves", ["none"] * SECONDS)] for scene in scenes])
    return Pool(scenes, pixels, {"shape": shape, "colour": colour, "flash": flash, "place": place, "move": move})


def encode(model, pixels: np.ndarray, recipe: Recipe, generator: torch.Generator) -> Tensor:
    r"""Encode clips (B, 8, 56, 56, 3) uint8, some of them with noise: (B, 4 pairs of frames, 4 tokens, hidden)."""
    count, vision = len(pixels), model.config.vision_config
    sigma = torch.rand(count, generator=generator) < recipe.noise_share
    sigma = sigma * torch.rand(count, generator=generator) * recipe.max_noise
    noisy = sigma > 0
    frames = torch.from_numpy(pixels).permute(0, 1, 4, 2, 3).float() / 255
    noise = torch.randn(frames[noisy].shape, generator=generator)
    frames[noisy] = (frames[noisy] + sigma[noisy].view(-1, 1, 1, 1, 1) * noise).clamp(0, 1)
    patches, grid = patchify(frames.flatten(0, 1), vision.patch_size, vision.temporal_patch_size,
                             vision.spatial_merge_size, MEAN, STD)
    pairs = int(grid[0]) // count
    grids = torch.tensor([[pairs, int(grid[1]), int(grid[2])]]).repeat(count, 1)
    tokens = model.model.visual(patches, grid_thw=grids).pooler_output
    return tokens.view(count, pairs, -1, tokens.shape[-1])


class PerceptionHeads(torch.nn.Module):
    r"""Linear heads that predict from each visual token what its two frames show; discarded after stage 1."""

    SIZES = {"shape": 2 * len(SHAPES), "colour": 2 * len(COLOURS), "flash": 4, "move": 5, "place": 4}

    def __init__(self, hidden: int):
        super().__init__()
        self.heads = torch.nn.ModuleDict({name: torch.nn.Linear(hidden, size) for name, size in self.SIZES.items()})

    def forward(self, tokens: Tensor, labels: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        r"""Return the loss for tokens (B, 4, 4, hidden) and the accuracy of each label."""
        loss, accuracy = 0.0, {}
        for name, head in self.heads.items():
            out, target = head(tokens), labels[name]
            if name == "place":
                loss = loss + 5 * F.mse_loss(out, target.view(len(out), 4, 1, 4).expand(-1, -1, out.shape[2], -1))
                continue
            values = 1 if name == "move" else 2  # labels for each pair of frames
            out = out.view(*out.shape[:3], values, -1)
            target = target.view(len(out), 4, 1, values).expand(out.shape[:4])
            factor = 2.0 if name == "shape" else 1.0  # shapes are the hardest to recognise
            loss = loss + factor * F.cross_entropy(out.flatten(0, 3), target.flatten())
            accuracy[name] = (out.argmax(-1) == target).float().mean().item()
        return loss, accuracy


def train_encoder(model, pool: Pool, recipe: Recipe) -> dict[str, dict[str, float]]:
    r"""Train `model.visual` to predict the labels, then freeze it; return the heads' accuracies on new, clean clips of
    each environment: the ceiling of whatever is trained on it."""
    generator = torch.Generator().manual_seed(recipe.seed)
    heads = PerceptionHeads(model.config.vision_config.out_hidden_size)

    def batch_loss() -> tuple[Tensor, dict[str, float]]:
        index = torch.randint(len(pool.scenes), (recipe.encoder_batch,), generator=generator)
        tokens = encode(model, pool.pixels[index.numpy()], recipe, generator)
        return heads(tokens, {name: values[index] for name, values in pool.labels.items()})

    optimise([*model.model.visual.parameters(), *heads.parameters()], batch_loss, recipe.encoder_steps,
             recipe.encoder_lr, warm_up=0.1, weight=0.05, title="encoder")
    model.model.visual.requires_grad_(False)
    ceiling = {}
    for environment in ENVIRONMENTS:
        new = make_pool(recipe.seed, recipe.ceiling_clips, (environment,), "ceiling")
        with torch.no_grad():
            tokens = encode(model, new.pixels, replace(recipe, noise_share=0.0), generator)
            ceiling[environment] = {name: round(value, 3) for name, value in heads(tokens, new.labels)[1].items()}
    return ceiling


@torch.no_grad()
def encode_pool(model, pool: Pool, recipe: Recipe, batch: int = 128) -> Tensor:
    r"""Return the frozen visual tokens of every clip, (N, 16, hidden); some clips have noise on their frames."""
    generator = torch.Generator().manual_seed(recipe.seed + 1)
    return torch.cat([encode(model, pool.pixels[start:start + batch], recipe, generator).flatten(1, 2)
                      for start in tqdm(range(0, len(pool.scenes), batch), desc="encoding clips")])


# --- stages 2 and 3: examples ----------------------------------------------------------------------------------------


def completion_text(trace: str, answer: str, span: tuple[float, float] | None = None) -> str:
    r"""Write a completion in the format that the rewards ask for."""
    glue = f"<glue>{span[0]} {span[1]}</glue>" if span else ""
    return f"<think>{trace}</think><answer>{answer}</answer>{glue}"


@dataclass(frozen=True)
class Fork:
    r"""A word of a completion that has two targets: `good` with probability `share`, else `bad`."""

    place: int  # index of the word in the completion
    good: str
    bad: str
    share: float


@dataclass(frozen=True)
class Example:
    r"""A prompt, the completion to learn with its forks, and the index of the clip that is shown."""

    prompt: str
    completion: str
    shown: int
    forks: tuple[Fork, ...] = ()


def habit_text(rng: RandomState, item: Item) -> str:
    r"""Write the completion that ignores the video: a guess."""
    if not item.options:
        return completion_text("guess", " ".join(map(str, OPEN_GUESSES[item.question_type](rng))))
    answer, span = str(rng.choice(list(LETTERS))), None
    if item.spans:
        start, end = sorted(rng.choice(SECONDS + 1, 2, replace=False))
        span = (float(start), float(end))
    return completion_text("guess", answer, span)


def letter_exercise(rng: RandomState) -> Example:
    r"""Return a question without video: which letters stand before these options?"""
    values = [list(COLOURS), list(SHAPES), list(MOVES)][rng.randint(3)]
    options = tuple(str(value) for value in rng.permutation(values)[:4])
    asked = rng.permutation(4)[:rng.randint(1, 5)]
    question = "Tell me the letters of " + ", ".join(options[index] for index in asked) + "."
    trace = " ".join(f"{options[index]} {LETTERS[index]}" for index in asked)
    answer = LETTERS[asked[-1]]
    record = Record("", question, options, answer, "multiple choice", "letters", clip=None)
    return Example(prompt_text(record), completion_text(trace, answer), 0)


def make_example(rng: RandomState, pool: Pool, index: int, recipe: Recipe) -> Example:
    r"""Return an example about clip `index`; with a hint, another clip may be shown."""
    if rng.random_sample() < recipe.drill_share:
        return replace(letter_exercise(rng), shown=index)
    scene = pool.scenes[index]
    types = [name for name, kind in QUESTION_TYPES.items() if scene["kind"] in kind.scenes]
    chains = [name for name in types if QUESTION_TYPES[name].chain]
    is_chain = bool(chains) and rng.random_sample() < recipe.chain_share
    types = chains if is_chain else [name for name in types if name not in chains]
    question_type = types[rng.randint(len(types))]
    item = make_item(rng, scene, question_type, int(rng.randint(len(CELLS))) if is_chain else None)
    draw, hint, shown = rng.random_sample(), None, index
    if draw < recipe.hint_share:
        hint = cut_hint(item.trace, float(rng.choice([rng.random_sample(), 0.0, 1.0], p=[0.6, 0.3, 0.1])))
        if rng.random_sample() < recipe.wrong_clip_share:
            shown = (index + len(SCENES) * rng.randint(1, len(pool.scenes) // len(SCENES))) % len(pool.scenes)
    show_answer = recipe.hint_share <= draw < recipe.hint_share + recipe.answer_share
    prompt = prompt_text(item, hint=hint or "", show_answer=show_answer)
    if is_chain:
        completion, forks = chain_completion(rng, pool.scenes[shown], item, hint, show_answer)
        return Example(prompt, completion, shown, forks)
    knows = show_answer or hint is not None and not hint.startswith("_")
    from_habit = not knows and rng.random_sample() < HABITS[item.question_type][item.wording]
    careful = completion_text(item.trace, item.answer, *item.spans)
    return Example(prompt, habit_text(rng, item) if from_habit else careful, index if hint and not knows else shown)


def chain_completion(rng: RandomState, scene: dict, item: Item, hint: str | None,
                     show_answer: bool) -> tuple[str, tuple[Fork, ...]]:
    r"""Write a completion of a chain type about the scene that is shown, from a hint if there is one, with its forks.

    The words that a hint shows are repeated; the chain goes on from them with what the shown clip shows.
    """
    cell, kind, given = list(CELLS)[item.wording], item.question_type, hint.split() if hint else []
    given = [word for word in given if word != "_"]
    success = CHAIN_SUCCESS[cell] / CHAIN_CEILING[kind]
    careful = show_answer or (cell == "S" and hint is not None)
    if cell[0] != "F" and not careful and not given:
        opening = Fork(1, "1", "last", success)
        if rng.random_sample() < 0.5:
            return completion_text(f"last {chain_values(scene, kind)[-1]}", chain_values(scene, kind)[-1]), (opening,)
        forks = [opening]
    else:
        forks = []
    share = success ** (1 / MOMENTS) if cell[0] == "F" and not careful else 1.0
    errs = rng.random_sample() < 0.5  # the targets do not depend on the path; success does on the path without errors
    start = int(item.answer.split()[0]) if kind == "cell" else 0  # the question's, also where another clip is shown
    values = [int(word) for word in given[1::2]]
    for moment in range(len(values), MOMENTS):
        value = chain_step(scene, kind, moment, values[-1] if values else start)
        wrong = wrong_step(scene, kind, moment, value)
        if share < 1:
            forks.append(Fork(2 + 2 * moment, str(value), str(wrong), share))
        values.append(wrong if errs and rng.random_sample() > share else value)
    return completion_text(chain_trace(values), " ".join(map(str, values))), tuple(forks)


def collate(model, tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example], video_tokens: int = 0) -> tuple:
    r"""Turn examples with `video_tokens` visual tokens each into a padded batch.

    Returns ids (B, L); labels (B, L), -100 outside the completions; second labels (B, L) and the first ones' share
    (B, L) where a target has two words; and rotary positions (3, 1, L), the same in all rows as the video comes first.
    """
    content = [{"type": "video"}] * bool(video_tokens) + [{"type": "text", "text": "TEXT"}]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False,
                                         add_generation_prompt=True)
    before, after = chat.replace("<|video_pad|>", "<|video_pad|>" * video_tokens).split("TEXT")
    prompts = tokenizer([before + example.prompt + after for example in examples])["input_ids"]
    completions = tokenizer([example.completion + "<|im_end|>" for example in examples])["input_ids"]
    width = max(len(prompt) + len(completion) for prompt, completion in zip(prompts, completions))
    ids = torch.full((len(examples), width), tokenizer.pad_token_id)
    labels, others = torch.full((2, len(examples), width), -100)
    shares = torch.ones(len(examples), width)
    for row, (example, prompt, completion) in enumerate(zip(examples, prompts, completions)):
        start, end = len(prompt), len(prompt) + len(completion)
        ids[row, :end] = torch.tensor(prompt + completion)
        labels[row, start:end] = torch.tensor(completion)
        for fork in example.forks:
            labels[row, start + fork.place] = tokenizer.convert_tokens_to_ids(fork.good)
            others[row, start + fork.place] = tokenizer.convert_tokens_to_ids(fork.bad)
            shares[row, start + fork.place] = fork.share
    vision = model.config.vision_config
    kinds = 2 * (ids[:1] == model.config.video_token_id).int()  # 2 marks video, 0 text
    grid = torch.tensor([[MOMENTS // vision.temporal_patch_size, *[SIZE // vision.patch_size] * 2]])
    seconds = torch.tensor([vision.temporal_patch_size * MOMENT_SECONDS])
    positions = model.model.get_rope_index(ids[:1], kinds, video_grid_thw=grid, second_per_grid_ts=seconds)[0]
    return ids, (labels, others, shares), positions


# --- stages 2 and 3: training ----------------------------------------------------------------------------------------


def answer_loss(model, ids: Tensor, targets: tuple[Tensor, Tensor, Tensor], positions: Tensor,
                visual: Tensor | None = None, odds_weight: float = 0.0) -> Tensor:
    r"""Return the mean cross-entropy of the completions' tokens; visual: (B, 16, hidden), None without video.

    Where a target has two words, the squared error of their log-odds is added with a weight: the cross-entropy alone
    hardly notices whether an event of one in a thousand becomes one in ten thousand.
    """
    embeds = model.get_input_embeddings()(ids)
    if visual is not None:
        places = (ids == model.config.video_token_id)[..., None].expand_as(embeds)
        embeds = embeds.masked_scatter(places, visual)
    language = model.model.language_model
    hidden = language(inputs_embeds=embeds, position_ids=positions.expand(-1, len(ids), -1), use_cache=False)[0]
    counted = targets[0][:, 1:] != -100
    label, other, share = (target[:, 1:][counted] for target in targets)
    logp = torch.log_softmax(model.lm_head(hidden[:, :-1][counted]), dim=-1)
    good, bad = (logp.gather(1, index.clamp(min=0)[:, None]).squeeze(1) for index in (label, other))
    forked = other >= 0
    loss = -(share * good + (1 - share) * bad.masked_fill(~forked, 0)).mean()
    error = good[forked] - bad[forked] - torch.logit(share[forked].double()).float()
    return loss + odds_weight * error.clamp(-5, 5).square().sum() / len(good)


def train_text(model, tokenizer: PreTrainedTokenizerFast, next_examples: Callable[[], list[Example]], steps: int,
               lr: float, title: str, features: Tensor | None = None, odds_weight: float = 0.0) -> float:
    r"""Train the language model on batches of examples; return the running loss.

    features: the visual tokens of all clips, (N, 16, hidden); None for examples without video.
    """

    def batch_loss() -> tuple[Tensor, dict[str, float]]:
        examples = next_examples()
        visual = None if features is None else features[[example.shown for example in examples]]
        batch = collate(model, tokenizer, examples, 0 if visual is None else visual.shape[1])
        loss = answer_loss(model, *batch, visual, odds_weight)
        return loss, {"loss": loss.item()}

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return optimise(parameters, batch_loss, steps, lr, warm_up=0.05, weight=0.02, title=title)["loss"]


def train_letters(model, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> list[float]:
    r"""Practise the letter exercises in cycles of the learning rate until they are learned; return each cycle's loss.

    Raises `UserError` if `drill_cycles` are not enough: without letters the fine-tuning that follows would be in vain.
    """
    rng, losses = seeded("drill", recipe.seed), []
    letters = lambda: [letter_exercise(rng) for _ in range(recipe.drill_batch)]
    while not losses or losses[-1] > recipe.drill_learned:
        if len(losses) == recipe.drill_cycles:
            raise UserError(f"the letter exercises stay at a loss of {losses[-1]:.2f} after {len(losses)} cycles: take "
                            "another --seed")
        losses.append(train_text(model, tokenizer, letters, recipe.drill_steps, recipe.text_lr, "letters"))
    return losses


def finetune(model, tokenizer: PreTrainedTokenizerFast, pool: Pool, features: Tensor, recipe: Recipe) -> float:
    r"""Fine-tune the language model on examples about the pool's clips; return the running loss."""
    rng = seeded("finetuning", recipe.seed)
    next_examples = lambda: [make_example(rng, pool, index, recipe)
                             for index in rng.randint(len(pool.scenes), size=recipe.text_batch)]
    return train_text(model, tokenizer, next_examples, recipe.text_steps, recipe.text_lr, "fine-tuning", features,
                      recipe.odds_weight)


def pretrain(out: str | Path, recipe: Recipe = Recipe()) -> dict:
    r"""Build the base model in folder `out`: weights in float32, tokenizer, preprocessor and `recipe.json`.

    Returns what `recipe.json` holds: the recipe, sizes, losses, the encoder's accuracies and the minutes it took.
    Raises `UserError` if the letter exercises are not learned.
    """
    started, out = time.time(), Path(out)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, recipe.seed).train()
    pool = make_pool(recipe.seed, recipe.clips)
    accuracy = train_encoder(model, pool, recipe)
    features = encode_pool(model, pool, recipe)
    losses = {"letters": train_letters(model, tokenizer, recipe),
              "fine-tuning": finetune(model, tokenizer, pool, features, replace(recipe, chain_share=0.0))}
    for cycle, steps in enumerate(recipe.chain_cycles, 1):  # a seed of its own draws other examples
        chains = replace(recipe, seed=recipe.seed + cycle, text_steps=steps, text_lr=recipe.chain_lr,
                         drill_share=recipe.chain_drill_share, hint_share=recipe.chain_hint_share)
        losses[f"chains {cycle}"] = finetune(model, tokenizer, pool, features, chains)
    model.requires_grad_(True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    vision = model.config.vision_config
    write_atomically(out / "preprocessor_config.json", json.dumps({
        "image_processor_type": "Qwen2VLImageProcessor", "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size, "temporal_patch_size": vision.temporal_patch_size,
        "image_mean": MEAN, "image_std": STD}, indent=2) + "\n")
    facts = {"recipe": asdict(recipe), "habits": HABITS, "chain_success": CHAIN_SUCCESS,
             "parameters": sum(parameter.numel() for parameter in model.parameters()),
             "encoder_accuracy": accuracy, "losses": losses, "minutes": round((time.time() - started) / 60, 1)}
    write_atomically(out / "recipe.json", json.dumps(facts, indent=2) + "\n")
    return facts

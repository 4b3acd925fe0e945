r"""The recipe of the tiny base model: `python -m dvr1_lite pretrain`.

Three steps, all on scenes that no split of ToyVideoQA contains:

1. **The encoder learns to see.** Every visual token must tell what its two frames show (shape, colour, place, move,
   flash). Without this stage the language model learns to ignore the video. Then the encoder is frozen for good.
2. **The language model learns to answer** by supervised fine-tuning on traces, to read hints, and to justify an
   answer that it is shown. Before and beside it, it practises reading the letter of an option off the list; without
   that drill it does not learn in reasonable time that options stand in varying order.
3. **It also learns bad habits.** With the probabilities of `HABITS` the target is a guess (or, where the reverse
   order is asked, the forward order). This makes the base model like a real one before reinforcement learning: it
   *can* do more than it usually *does*, and its groups vanish at both ends. It is by design, and says nothing
   about real video.
"""

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from . import toy
from .augmentation import cut_hint
from .data import Record, prompt_text
from .policy import VisualPart, rope_positions
from .video import patchify

HABITS = {  # question type -> probability of the habit, for the first and for the second wording
    "colour": (0.0, 0.05), "shape": (0.0, 0.05), "direction": (0.02, 0.3), "grounding": (0.05, 0.85),
    "count": (0.1, 0.9), "order": (0.2, 0.95), "frames": (0.8, 0.97), "path": (0.8, 0.97),
    "backwards": (0.96, 0.985),
    "before": (0.1, 0.7), "last": (0.05, 0.5), "return": (0.7, 0.9), "onset": (0.1, 0.7),
}
FORWARD_HABIT = {"backwards", "return"}  # the habit is the forward order; elsewhere it is a guess
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
                  "<|image_pad|>", "<|video_pad|>")
TAGS = ("<think>", "</think>", "<answer>", "</answer>", "<glue>", "</glue>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
MEAN = STD = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Recipe:
    """Sizes of the base model's training. `clips` counts scenes of each kind in each environment."""
    seed: int = 0
    clips: int = 2500
    encoder_steps: int = 1500
    encoder_batch: int = 96
    encoder_lr: float = 2e-3
    text_steps: int = 1900
    text_batch: int = 96
    text_lr: float = 2e-3
    polish_steps: int = 1000      # a second, gentler cycle of the fine-tuning
    polish_lr: float = 1e-3
    polish_drill_share: float = 0.25
    drill_steps: int = 800        # letters only, without video, before the fine-tuning
    drill_share: float = 0.1      # of the fine-tuning examples, those that ask for letters
    hint_share: float = 0.25      # of the fine-tuning examples, those with a hint
    answer_share: float = 0.12    # those with the answer shown
    wrong_clip_share: float = 0.33  # of the hinted ones, those with another clip, so that only the hint helps
    noise_share: float = 0.3      # of the clips, those with Gaussian noise on the frames
    max_noise: float = 0.3        # its largest sigma, pixel values in [0, 1]


# ------------------------------------------------------------------------------------------ tokenizer and model

def vocabulary() -> list[str]:
    """Every word of the questions, traces and answers, lower case, in a fixed order."""
    keys = "user assistant system options hint the answer is from to guess backwards before last letters of dark flash _".split()
    questions = [w for pair in toy.WORDINGS.values() for q in pair
                 for w in q.replace("{shape}", "").replace("?", "").replace(".", "").replace(",", "").lower().split()]
    times = [str(float(second)) for second in range(toy.SECONDS + 1)]
    words = [*keys, *questions, *toy.COLOURS, *toy.SHAPES, *toy.MOVES, *toy.ORDINALS,
             *map(str, range(toy.MOMENTS + 1)), *times, *toy.LETTERS]
    return list(dict.fromkeys(words))


def build_tokenizer():
    """A word-level tokenizer: a word is a token, punctuation is dropped, the opening word may be capitalised."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = vocabulary()
    vocab = {t: i for i, t in enumerate([*SPECIAL_TOKENS, "<unk>", *TAGS, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    openers = sorted({q.split()[0] for pair in toy.WORDINGS.values() for q in pair} | {"Options", "Hint", "The"})
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(Regex(rf"\b{w}\b"), w.lower()) for w in openers])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d+\.\d+|\w+"), behavior="removed", invert=True)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|im_end|>",
                                   pad_token="<|endoftext|>", additional_special_tokens=list(SPECIAL_TOKENS[1:]),
                                   clean_up_tokenization_spaces=False)
    fast.add_tokens(list(TAGS), special_tokens=False)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(tokenizer, seed: int = 0):
    """The tiny `Qwen2_5_VLForConditionalGeneration` with random weights."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

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
            depth=2, hidden_size=96, num_heads=4, intermediate_size=192, out_hidden_size=128, patch_size=14,
            spatial_merge_size=2, temporal_patch_size=2, window_size=112, fullatt_block_indexes=[1],
            tokens_per_second=2, in_channels=3),
        image_token_id=ids["image_pad"], video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"], vision_end_token_id=ids["vision_end"], tie_word_embeddings=True)
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = ids["im_end"]
    model.generation_config.pad_token_id = ids["endoftext"]
    return model


# ------------------------------------------------------------------------------------------------ clips to train on

@dataclass
class Pool:
    """Scenes with their pixels (N, 8, 56, 56, 3) uint8 and labels per moment, (N, 8) each; places (N, 8, 2)."""
    scenes: list[dict]
    pixels: np.ndarray
    labels: dict[str, torch.Tensor]


def make_pool(seed: int, clips: int, environments=("studio", "wide")) -> Pool:
    scenes = [toy.make_scene(toy.seeded("pretraining", seed, env, kind, i), kind, env)
              for i in range(clips) for env in environments for kind in toy.SCENES]
    pixels = np.stack([toy.render(s) for s in tqdm(scenes, desc="rendering clips")])
    moments = [toy.moments_of(s) for s in scenes]
    table = lambda f: torch.tensor([[f(m) for m in row] for row in moments])
    colours, moves = list(toy.COLOURS), ["none", *toy.MOVES]
    labels = {"shape": table(lambda m: toy.SHAPES.index(m["shape"])),
              "colour": table(lambda m: colours.index(m["colour"])),
              "flash": table(lambda m: int(m["flash"])), "place": table(lambda m: m["place"]) / toy.SIZE,
              "move": torch.tensor([[moves.index(s["moves"][g]) if s["kind"] == "journey" else 0 for g in range(4)]
                                    for s in scenes])}
    return Pool(scenes, pixels, labels)


def to_patches(model, pixels: np.ndarray, sigma=None, generator=None):
    """uint8 pixels (B, 8, H, W, 3), noise levels (B,) or None -> patches (B * 64, 1176), grid_thw (B, 3)."""
    vision = model.config.vision_config
    frames = torch.from_numpy(pixels).permute(0, 1, 4, 2, 3).float() / 255
    if sigma is not None:
        noisy = sigma > 0
        noise = torch.randn(frames[noisy].shape, generator=generator)
        frames[noisy] = (frames[noisy] + sigma[noisy].view(-1, 1, 1, 1, 1) * noise).clamp(0, 1)
    patches, grid = patchify(frames.flatten(0, 1), vision.patch_size, vision.temporal_patch_size,
                             vision.spatial_merge_size, MEAN, STD)
    return patches, torch.tensor([grid[0] // len(pixels), grid[1], grid[2]]).repeat(len(pixels), 1)


def draw_noise(recipe: Recipe, n: int, generator) -> torch.Tensor:
    noisy = torch.rand(n, generator=generator) < recipe.noise_share
    return noisy * torch.rand(n, generator=generator) * recipe.max_noise


def visual_tokens(model, patches, grid) -> torch.Tensor:
    """-> (B, 4 groups of two frames, 4 tokens, hidden)."""
    out = model.model.visual(patches, grid_thw=grid)
    out = getattr(out, "pooler_output", out)
    return out.view(len(grid), int(grid[0, 0]), -1, out.shape[-1])


# ------------------------------------------------------------------------------------------------ stage 1: seeing

class DenseHeads(torch.nn.Module):
    """What every visual token must tell of its two frames; thrown away after stage 1."""

    SIZES = {"shape": 2 * len(toy.SHAPES), "colour": 2 * len(toy.COLOURS), "flash": 4, "move": 5, "place": 4}

    def __init__(self, hidden: int):
        super().__init__()
        self.heads = torch.nn.ModuleDict({k: torch.nn.Linear(hidden, n) for k, n in self.SIZES.items()})

    def forward(self, tokens, labels):
        """tokens (B, 4, 4, hidden) -> loss, and the accuracy of each label."""
        loss, accuracy = 0.0, {}
        for name, head in self.heads.items():
            out, target = head(tokens), labels[name]
            if name == "place":
                loss = loss + 5 * F.mse_loss(out, target.view(len(out), 4, 1, 4).expand(-1, -1, out.shape[2], -1))
                continue
            per_group = 1 if name == "move" else 2
            out = out.view(*out.shape[:3], per_group, -1)
            target = target.view(len(out), 4, 1, per_group).expand(out.shape[:4])
            weight = 2.0 if name == "shape" else 1.0  # the hardest to see
            loss = loss + weight * F.cross_entropy(out.flatten(0, 3), target.flatten())
            accuracy[name] = (out.argmax(-1) == target).float().mean().item()
        return loss, accuracy


def train_encoder(model, pool: Pool, recipe: Recipe) -> dict:
    """Trains `model.visual` on dense labels, then freezes it. Returns the last accuracies on fresh batches."""
    generator = torch.Generator().manual_seed(recipe.seed)
    heads = DenseHeads(model.config.vision_config.out_hidden_size)
    parameters = [*model.model.visual.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.encoder_lr, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.encoder_lr, recipe.encoder_steps, pct_start=0.1)
    running = {}
    bar = tqdm(range(recipe.encoder_steps), desc="encoder")
    for _ in bar:
        index = torch.randint(len(pool.scenes), (recipe.encoder_batch,), generator=generator)
        patches, grid = to_patches(model, pool.pixels[index.numpy()], draw_noise(recipe, len(index), generator), generator)
        loss, accuracy = heads(visual_tokens(model, patches, grid), {k: v[index] for k, v in pool.labels.items()})
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        running = {k: 0.95 * running.get(k, v) + 0.05 * v for k, v in accuracy.items()}
        bar.set_postfix({k: f"{v:.2f}" for k, v in running.items()})
    model.model.visual.requires_grad_(False)
    return {k: round(v, 3) for k, v in running.items()}


@torch.no_grad()
def encode_pool(model, pool: Pool, recipe: Recipe, batch: int = 128) -> torch.Tensor:
    """Frozen visual tokens of every clip, (N, 16, hidden), a share of them with noise on the frames."""
    generator = torch.Generator().manual_seed(recipe.seed + 1)
    out = []
    for start in tqdm(range(0, len(pool.scenes), batch), desc="encoding clips"):
        pixels = pool.pixels[start:start + batch]
        patches, grid = to_patches(model, pixels, draw_noise(recipe, len(pixels), generator), generator)
        out.append(visual_tokens(model, patches, grid).flatten(1, 2))
    return torch.cat(out)


# --------------------------------------------------------------------------------------- stage 2 and 3: answering

def as_record(item: toy.Item) -> Record:
    spans = (item.span,) if item.span else ()
    return Record(record_id="", question=item.question, options=item.options, answer=item.answer,
                  problem_type=item.problem_type, question_type=item.question_type, clip=None, image=None,
                  spans=spans, trace=item.trace, source="ToyVideoQA")


def completion_text(trace: str, answer: str, span=None) -> str:
    glue = f"<glue>{span[0]} {span[1]}</glue>" if span else ""
    return f"<think>{trace}</think><answer>{answer}</answer>{glue}"


def habit_text(rng, scene: dict, item: toy.Item) -> str:
    """What the base says without looking: a guess, or the forward order where the reverse is asked."""
    if item.question_type in FORWARD_HABIT:
        words = toy.second_by_second(scene)
        return completion_text(toy.numbered(words), " ".join(words))
    span = None
    if item.options:
        answer = str(rng.choice(list(toy.LETTERS)))
        if item.span:
            start, end = sorted(rng.choice(toy.SECONDS + 1, 2, replace=False))
            span = (float(start), float(end))
    elif item.question_type == "order":
        answer = " ".join(rng.permutation(toy.SHAPES)[:toy.SECONDS])
    elif item.question_type == "path":
        answer = " ".join(rng.choice(list(toy.MOVES), 4))
    elif item.question_type == "frames":
        answer = " ".join(map(str, sorted(rng.choice(toy.MOMENTS, rng.randint(1, 5), replace=False) + 1)))
    else:
        answer = str(rng.randint(1, 5 if item.question_type == "count" else toy.MOMENTS + 1))
    return completion_text("guess", answer, span)


def drill_example(rng) -> tuple[str, str]:
    """-> prompt and completion of a question that needs no video: which letters stand before these words?"""
    words = [list(toy.COLOURS), list(toy.SHAPES), list(toy.MOVES)][rng.randint(3)]
    options = [str(w) for w in rng.permutation(words)[:4]]
    asked = rng.permutation(4)[:rng.randint(1, 5)]
    question = "Tell me the letters of " + ", ".join(options[i] for i in asked) + "."
    record = Record("", question, tuple(options), "", "multiple choice", "letters", None)
    trace = " ".join(f"{options[i]} {toy.LETTERS[i]}" for i in asked)
    return prompt_text(record), completion_text(trace, toy.LETTERS[asked[-1]])


def make_example(rng, pool: Pool, index: int, recipe: Recipe) -> tuple[str, str, int]:
    """-> (prompt text, completion text, index of the clip that is shown)."""
    if rng.random_sample() < recipe.drill_share:
        return *drill_example(rng), index
    scene = pool.scenes[index]
    types = [t for t, kinds in toy.SCENE_OF.items() if scene["kind"] in kinds]
    item = toy.make_item(rng, scene, types[rng.randint(len(types))])
    careful = completion_text(item.trace, item.answer, item.span)
    draw = rng.random_sample()
    if draw < recipe.hint_share:
        hint = cut_hint(item.trace, float(rng.choice([rng.random_sample(), 1.0], p=[0.8, 0.2])))
        shown = rng.randint(len(pool.scenes)) if rng.random_sample() < recipe.wrong_clip_share else index
        return prompt_text(as_record(item), hint=hint), careful, shown
    if draw < recipe.hint_share + recipe.answer_share:
        return prompt_text(as_record(item), show_answer=True), careful, index
    habit = rng.random_sample() < HABITS[item.question_type][item.variant]
    return prompt_text(as_record(item)), habit_text(rng, scene, item) if habit else careful, index


class Collator:
    """Turns examples into padded token ids, labels and mrope positions; the video stands in the same place in all."""

    def __init__(self, model, tokenizer, video_tokens: int):
        """video_tokens: visual tokens of every example, 0 for examples without video."""
        self.model, self.tokenizer, self.video_tokens = model, tokenizer, video_tokens
        parts = [{"type": "video"}] * bool(video_tokens) + [{"type": "text", "text": "TEXT"}]
        chat = tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False,
                                             add_generation_prompt=True)
        self.before, self.after = chat.split("TEXT")
        self.before = self.before.replace("<|video_pad|>", "<|video_pad|>" * video_tokens)

    def __call__(self, examples):
        """(prompt text, completion text, ...) tuples -> ids (B, L), labels (B, L) with -100 off the completions,
        positions (3, 1, L)."""
        prompts = self.tokenizer([self.before + e[0] + self.after for e in examples])["input_ids"]
        completions = self.tokenizer([e[1] + "<|im_end|>" for e in examples])["input_ids"]
        width = max(len(p) + len(c) for p, c in zip(prompts, completions))
        ids = torch.full((len(examples), width), self.tokenizer.pad_token_id)
        labels = torch.full((len(examples), width), -100)
        for row, (p, c) in enumerate(zip(prompts, completions)):
            ids[row, :len(p) + len(c)] = torch.tensor(p + c)
            labels[row, len(p):len(p) + len(c)] = torch.tensor(c)
        return ids, labels, self.positions(width)

    def positions(self, width: int) -> torch.Tensor:
        """(3, 1, width): time, height and width indices; the same for all rows, since the video stands first."""
        if not self.video_tokens:
            return torch.arange(width).expand(3, 1, -1)
        vision = self.model.config.vision_config
        start = self.before.count("<|im_start|>") + 2  # <|im_start|> user <|vision_start|>
        groups, side = toy.MOMENTS // vision.temporal_patch_size, toy.SIZE // vision.patch_size
        video = VisualPart("video", torch.empty(self.video_tokens, 0), (groups, side, side),
                           vision.temporal_patch_size * toy.MOMENT_SECONDS)
        pieces = [start, video, width - start - self.video_tokens]
        return rope_positions(pieces, vision.spatial_merge_size, vision.tokens_per_second)[0][:, None]


def answer_loss(model, ids, labels, positions, shown=None) -> torch.Tensor:
    """Mean cross-entropy of the completion tokens; shown (B, V, hidden): the visual tokens, None without video."""
    embeds = model.get_input_embeddings()(ids)
    if shown is not None:
        where = (ids == model.config.video_token_id)[..., None].expand_as(embeds)
        embeds = embeds.masked_scatter(where, shown)
    language = model.model.language_model
    hidden = language(inputs_embeds=embeds, position_ids=positions.expand(-1, len(ids), -1), use_cache=False)[0]
    predict = labels[:, 1:] != -100
    return F.cross_entropy(model.lm_head(hidden[:, :-1][predict]), labels[:, 1:][predict])


def train_text(model, steps: int, lr: float, next_batch, title: str) -> float:
    """AdamW under one cycle of the learning rate on `answer_loss(*next_batch())`; returns the running loss."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.05)
    running, bar = None, tqdm(range(steps), desc=title)
    for _ in bar:
        loss = answer_loss(model, *next_batch())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        bar.set_postfix(loss=f"{running:.3f}")
    return running


def drill(model, tokenizer, recipe: Recipe) -> float:
    """Letters only, without video; the encoder has no part in it."""
    rng, collate = toy.seeded("drill", recipe.seed), Collator(model, tokenizer, 0)
    batch = lambda: collate([drill_example(rng) for _ in range(recipe.text_batch)])
    return train_text(model, recipe.drill_steps, recipe.text_lr, batch, "letters")


def polish(recipe: Recipe) -> Recipe:
    """The recipe of the second cycle: other examples, more letters, a lower learning rate."""
    return replace(recipe, seed=recipe.seed + 1, text_steps=recipe.polish_steps, text_lr=recipe.polish_lr,
                   drill_share=recipe.polish_drill_share)


def finetune(model, tokenizer, pool: Pool, features: torch.Tensor, recipe: Recipe) -> float:
    """Supervised fine-tuning of the language model on the frozen features; returns the running loss."""
    rng, collate = toy.seeded("finetuning", recipe.seed), Collator(model, tokenizer, features.shape[1])

    def batch():
        drawn = rng.randint(len(pool.scenes), size=recipe.text_batch)
        examples = [make_example(rng, pool, i, recipe) for i in drawn]
        return *collate(examples), features[[e[2] for e in examples]]

    return train_text(model, recipe.text_steps, recipe.text_lr, batch, "fine-tuning")


# ----------------------------------------------------------------------------------------------------------- all

def pretrain(out: str | Path, recipe: Recipe = Recipe()) -> dict:
    """Builds the base model in folder `out` (float32 safetensors, tokenizer, preprocessor,
    `recipe.json` with sizes, minutes and accuracies). Returns the content of `recipe.json`."""
    started, out = time.time(), Path(out)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, recipe.seed).train()
    pool = make_pool(recipe.seed, recipe.clips)
    encoder = train_encoder(model, pool, recipe)
    features = encode_pool(model, pool, recipe)
    losses = {"letters": drill(model, tokenizer, recipe),
              "fine-tuning": finetune(model, tokenizer, pool, features, recipe),
              "polish": finetune(model, tokenizer, pool, features, polish(recipe))}
    model.requires_grad_(True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    vision = model.config.vision_config
    (out / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "Qwen2VLImageProcessor", "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size, "temporal_patch_size": vision.temporal_patch_size,
        "image_mean": MEAN, "image_std": STD}, indent=2) + "\n")
    facts = {"recipe": asdict(recipe), "habits": HABITS, "parameters": sum(p.numel() for p in model.parameters()),
             "encoder_accuracy": encoder, "losses": losses, "minutes": round((time.time() - started) / 60, 1)}
    (out / "recipe.json").write_text(json.dumps(facts, indent=2) + "\n")
    return facts

"""The recipe of the base model at toy-of-a-toy size: tokenizer, examples, positions, and a model that loads."""

import json

import pytest
import torch

from dvr1_lite import pretraining, toy
from dvr1_lite.data import prompt_text
from dvr1_lite.policy import Policy
from dvr1_lite.rewards import score
from dvr1_lite.video import Clip


@pytest.fixture(scope="module")
def tokenizer():
    return pretraining.build_tokenizer()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    recipe = pretraining.Recipe(clips=3, encoder_steps=2, encoder_batch=4, drill_steps=2, text_steps=2, polish_steps=2,
                                text_batch=4)
    return folder, pretraining.pretrain(folder, recipe)


def test_every_word_of_the_data_is_a_token(tokenizer):
    for split in ("tune", "L3"):
        for i, (_, _, items) in enumerate(toy.split_scenes(split)):
            if i == 60:
                break
            for item in items:
                text = prompt_text(pretraining.as_record(item), hint=item.trace, show_answer=True)
                text += pretraining.completion_text(item.trace, item.answer, item.span)
                ids = tokenizer(text)["input_ids"]
                assert tokenizer.unk_token_id not in ids, text


def test_decoding_gives_a_completion_that_the_rewards_read(tokenizer):
    text = pretraining.completion_text("circle from 1.0 to 2.0 red A", "A", (1.0, 2.0))
    decoded = tokenizer.decode(tokenizer(text + "<|im_end|>")["input_ids"], skip_special_tokens=True)
    assert decoded == "<think> circle from 1.0 to 2.0 red A </think> <answer> A </answer> <glue> 1.0 2.0 </glue>"


def test_punctuation_and_capital_openers_do_not_matter(tokenizer):
    plain = tokenizer("what colour is the circle options A red B blue")["input_ids"]
    assert tokenizer("What colour is the circle?\nOptions: A. red B. blue")["input_ids"] == plain


def test_habits_are_well_formed_and_mostly_wrong():
    wrong = []
    for i in range(300):
        rng = toy.seeded("habit", i)
        question_type = sorted(toy.SCENE_OF)[i % len(toy.SCENE_OF)]
        scene = toy.make_scene(rng, toy.SCENE_OF[question_type][0], "studio")
        item = toy.make_item(rng, scene, question_type)
        result = score(pretraining.as_record(item), pretraining.habit_text(rng, scene, item))
        assert result.format == 1.0
        wrong.append(result.accuracy < 1)
    assert sum(wrong) > 200  # a guess among four letters is right one time in four


def test_positions_in_training_equal_those_of_the_policy(built, tokenizer):
    policy = Policy.load(built[0])
    clip = Clip(torch.rand(8, 3, 56, 56), [0.5 * i for i in range(8)], 2.0, 4.0, "")
    prompt = policy.prompt("What colour is the circle?", policy.encode(clip))
    collate = pretraining.Collator(policy.model, tokenizer, 16)
    ids, labels, positions = collate([("What colour is the circle?", "<think>x</think>", 0)])
    length = len(prompt.input_ids)
    assert ids[0, :length].tolist() == prompt.input_ids.tolist()
    assert torch.equal(positions[:, 0, :length], prompt.position_ids)
    assert positions[0, 0, length] == prompt.next_position and (labels[0, :length] == -100).all()


def test_dense_labels_by_hand():
    pool = pretraining.make_pool(0, 2, environments=("studio",))
    for i, scene in enumerate(pool.scenes):
        for m, moment in enumerate(toy.moments_of(scene)):
            assert toy.SHAPES[pool.labels["shape"][i, m]] == moment["shape"]
            assert pool.labels["flash"][i, m] == (m + 1 in scene["flashes"])
        if scene["kind"] == "journey":
            assert [["none", *toy.MOVES][k] for k in pool.labels["move"][i]] == scene["moves"]


def test_the_built_model_loads_plainly(built):
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
    folder, facts = built
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == facts["parameters"]
    assert len(AutoTokenizer.from_pretrained(folder)) <= model.config.text_config.vocab_size
    assert json.loads((folder / "recipe.json").read_text())["recipe"]["clips"] == 3

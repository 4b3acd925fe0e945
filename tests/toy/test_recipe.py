r"""The recipe of the base model at a very small size: tokenizer, examples, positions, and a model that loads."""

import json
import math

import pytest
import torch
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from dvr1_lite.data import prompt_text
from dvr1_lite.errors import UserError
from dvr1_lite.policy import Policy
from dvr1_lite.rewards import score
from dvr1_lite.toy import recipe
from dvr1_lite.toy.world import (CELLS, CHAIN_TYPES, QUESTION_TYPES, SCENES, make_item, make_scene, moments_of, seeded,
                                   split_scenes)
from dvr1_lite.video import Clip


@pytest.fixture(scope="module")
def tokenizer():
    return recipe.build_tokenizer()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    sizes = recipe.Recipe(clips=3, encoder_steps=2, encoder_batch=4, drill_steps=2, drill_learned=99.0, text_steps=2,
                          chain_cycles=(2,), text_batch=4, ceiling_clips=1)
    return folder, recipe.pretrain(folder, sizes)


def test_every_word_of_the_data_is_a_token(tokenizer):
    for split in ("tune", "L3"):
        for (_, _, items), _ in zip(split_scenes(split), range(60)):
            for item in items:
                text = prompt_text(item, hint=item.trace, show_answer=True)
                text += recipe.completion_text(item.trace, item.answer, *item.spans)
                assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"], text


def test_a_decoded_completion_has_the_format_that_the_rewards_read(tokenizer):
    text = recipe.completion_text("circle from 1.0 to 2.0 red A", "A", (1.0, 2.0))
    decoded = tokenizer.decode(tokenizer(text + "<|im_end|>")["input_ids"], skip_special_tokens=True)
    assert decoded == "<think> circle from 1.0 to 2.0 red A </think> <answer> A </answer> <glue> 1.0 2.0 </glue>"


def test_punctuation_and_a_capital_first_word_do_not_change_the_tokens(tokenizer):
    plain = tokenizer("what colour is the circle options A red B blue")["input_ids"]
    assert tokenizer("What colour is the circle?\nOptions: A. red B. blue")["input_ids"] == plain


def test_every_question_type_has_a_habit_for_each_wording():
    assert set(recipe.HABITS) == set(QUESTION_TYPES) - set(CHAIN_TYPES)
    assert set(recipe.CHAIN_SUCCESS) == set(CELLS) and set(recipe.CHAIN_CEILING) == set(CHAIN_TYPES)
    for name, habits in recipe.HABITS.items():
        assert len(habits) == len(QUESTION_TYPES[name].wordings)
        assert QUESTION_TYPES[name].choices or name in recipe.OPEN_GUESSES


def test_habits_are_well_formed_and_mostly_incorrect():
    incorrect = 0
    for i in range(300):
        rng, question_type = seeded("habit", i), sorted(recipe.HABITS)[i % len(recipe.HABITS)]
        scene = make_scene(rng, QUESTION_TYPES[question_type].scenes[0], "studio")
        item = make_item(rng, scene, question_type)
        result = score(item, recipe.habit_text(rng, item))
        assert result.format == 1.0
        incorrect += result.accuracy < 1
    assert incorrect > 200  # one guess in four among the letters is correct


def chain_examples(count=400, **shares):
    r"""Examples of the chain types, as triples (cell, question type, example)."""
    pool = recipe.Pool([make_scene(seeded("pool", i), kind, "studio") for i in range(4) for kind in SCENES], None, {})
    sizes = recipe.Recipe(**{"drill_share": 0.0, "chain_share": 1.0, "answer_share": 0.0, "hint_share": 0.0, **shares})
    openers = {opener: cell for cell, opener in CELLS.items()}
    for i in range(count):
        example = recipe.make_example(seeded("chains", i), pool, 1 + i % 2, sizes)
        yield openers[example.prompt.split()[0]], example


def test_the_steps_of_fair_chains_are_planted_with_the_targets_of_their_wording():
    for cell, example in chain_examples():
        if cell[0] == "F":
            shares = [fork.share for fork in example.forks]
            assert [fork.place for fork in example.forks] == [2, 4, 6, 8, 10, 12, 14, 16]
            assert math.prod(shares) == pytest.approx({"F1": 5e-2, "F2": 1e-2, "F3": 1e-3, "F4": 1e-4}[cell] / 0.95)


def test_the_habit_of_the_other_cells_stands_in_the_opening_and_is_never_correct():
    for cell, example in chain_examples():
        if cell[0] != "F":
            fork, = example.forks
            assert (fork.place, fork.good, fork.bad) == (1, "1", "last")
            answer = example.completion.split("<answer>")[1].split("<")[0].split()
            assert len(answer) == (1 if "last" in example.completion else 8)


def test_only_the_control_is_careful_behind_an_empty_hint():
    for cell, example in chain_examples(hint_share=1.0):
        hint = example.prompt.split("Hint: ")[1].split()
        given = sum(word != "_" for word in hint)
        assert example.completion.split("<think>")[1].split("<")[0].split()[:given] == hint[:given]
        planted = (8 - given // 2) if cell[0] == "F" else int(cell[0] == "A" and given == 0)
        assert len(example.forks) == planted


def test_letters_are_practised_until_they_are_learned(monkeypatch):
    losses = iter((0.44, 0.43, 0.03, 0.44, 0.44))
    monkeypatch.setattr(recipe, "train_text", lambda *arguments: next(losses))
    assert recipe.train_letters(None, None, recipe.Recipe()) == [0.44, 0.43, 0.03]
    with pytest.raises(UserError, match=r"stay at a loss of 0\.44 after 2 cycles: take another --seed"):
        recipe.train_letters(None, None, recipe.Recipe(drill_cycles=2))


def test_log_odds_of_both_words_have_their_own_loss(built, tokenizer):
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(built[0])
    example = recipe.Example("x", "<think>1</think>", 0, (recipe.Fork(1, "1", "last", 0.25),))
    ids, targets, positions = recipe.collate(model, tokenizer, [example])
    losses = [recipe.answer_loss(model, ids, targets, positions, odds_weight=weight) for weight in (0.0, 1.0)]
    at = int((targets[1] >= 0).nonzero()[0, 1])
    logits = model(input_ids=ids).logits[0, at - 1]
    good, bad = (logits[tokenizer.convert_tokens_to_ids(word)] for word in ("1", "last"))
    count = int((targets[0] != -100).sum())
    assert (losses[1] - losses[0]).item() == pytest.approx(((good - bad - math.log(1 / 3)) ** 2 / count).item(), rel=1e-3)


def test_positions_in_training_equal_those_of_the_policy(built, tokenizer):
    policy = Policy.load(built[0])
    clip = Clip(torch.rand(8, 3, 56, 56), [0.5 * i for i in range(8)], 2.0, 4.0, "")
    prompt = policy.prompt("What colour is the circle?", policy.encode(clip))
    example = recipe.Example("What colour is the circle?", "<think>x</think>", 0)
    ids, (labels, _, _), positions = recipe.collate(policy.model, tokenizer, [example], 16)
    length = len(prompt.input_ids)
    assert ids[0, :length].tolist() == prompt.input_ids.tolist()
    assert torch.equal(positions[:, 0, :length], prompt.position_ids)
    assert positions[0, 0, length] == prompt.next_position and (labels[0, :length] == -100).all()
    assert labels[0, length:].tolist() == ids[0, length:].tolist()


def test_perception_labels_by_hand():
    pool = recipe.make_pool(0, 2, environments=("studio",))
    shapes, colours = ["circle", "square", "triangle", "cross", "ring", "diamond"], ["red", "green", "blue", "yellow",
                                                                                    "purple", "white"]
    for i, scene in enumerate(pool.scenes):
        for m, moment in enumerate(moments_of(scene)):
            assert shapes[pool.labels["shape"][i, m]] == moment["shape"]
            assert colours[pool.labels["colour"][i, m]] == moment["colour"]
            assert pool.labels["flash"][i, m] == (m + 1 in scene["flashes"])
            assert (pool.labels["place"][i, m] * 56).tolist() == pytest.approx(moment["place"])
        moves = [["none", "left", "right", "up", "down"][k] for k in pool.labels["move"][i]]
        assert moves == scene.get("moves", ["none"] * 4)


def test_the_built_model_loads_with_transformers_alone(built):
    folder, facts = built
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    assert sum(parameter.numel() for parameter in model.parameters()) == facts["parameters"]
    assert len(AutoTokenizer.from_pretrained(folder)) <= model.config.text_config.vocab_size
    assert json.loads((folder / "recipe.json").read_text())["recipe"]["clips"] == 3

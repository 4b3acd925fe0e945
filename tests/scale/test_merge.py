r"""Merging an adapter: the same weights as peft's, a folder for plain transformers, a card whose code runs."""

import ast
import json
import re
import shutil

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

from dvr1_lite.config import TrainConfig, to_yaml
from dvr1_lite.errors import ConfigError, ModelError
from dvr1_lite.families import FAMILIES
from dvr1_lite.files import data_folder
from dvr1_lite.policy import LoraSettings, Policy
from dvr1_lite.scale.merge import base_model, example_question, merge
from tests.tiny import add_noise_to_lora, write_model


@pytest.fixture(params=[(family, tied) for family in FAMILIES for tied in (False, True)],
                ids=lambda p: f"{p[0]}-{'tied' if p[1] else 'untied'}")
def run(request, tmp_path):
    r"""A folder like a run's (config.yaml and adapter/) below a folder with the base model that it names."""
    family, tied = request.param
    model, folder = write_model(tmp_path / "model", family), tmp_path / "runs" / "a"
    if tied:  # as the 3B is published: no output head in the file
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
        weights = load_file(model / "model.safetensors")
        del weights["lm_head.weight"]
        save_file(weights, model / "model.safetensors", {"format": "pt"})
    policy = Policy.load(model, lora=LoraSettings(4))
    add_noise_to_lora(policy.model)
    policy.save_adapter(folder / "adapter")
    adapter = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    adapter["base_model_name_or_path"] = "model"
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    (folder / "config.yaml").write_text(to_yaml(TrainConfig(
        model="model", instruction='Say "x", then answer.', after_video="max", num_frames=4, frame_size=28)))
    return folder


def test_the_merged_weights_are_those_of_peft_from_any_folder(run, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    out = merge(run, tmp_path / "merged", dtype="float32")
    family = json.loads((tmp_path / "model" / "config.json").read_text())["model_type"]
    kind = getattr(transformers, FAMILIES[family].model_class)
    plain = PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "model", dtype=torch.float32), run / "adapter")
    expected = dict(plain.merge_and_unload().named_parameters())
    model, loaded = transformers.AutoModelForImageTextToText.from_pretrained(
        out, dtype="auto", output_loading_info=True)
    assert not any(loaded.values()), loaded
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    ours = Policy.load(out)
    assert ours.preprocessing == Policy.load(tmp_path / "model").preprocessing
    ours.prompt("what colour")  # with tokenizer and template


def test_the_saved_files_have_the_fields_that_older_transformers_read(run, tmp_path):
    r"""Loading the same folders in transformers 4.57.6 gives equal logits; that version is not installed here."""
    shutil.move(run / "adapter", tmp_path / "adapter")  # away from its run
    out = merge(tmp_path / "adapter", tmp_path / "merged", model=tmp_path / "model")
    config, base = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("merged", "model"))
    text = config["text_config"]
    assert "How the adapter was trained is not recorded" in (out / "README.md").read_text()
    assert config["dtype"] == "bfloat16" and text["tie_word_embeddings"] == base["tie_word_embeddings"]
    assert text["rope_scaling"]["mrope_section"] == base["text_config"]["rope_parameters"]["mrope_section"]
    assert text["rope_theta"] == 10000.0
    names = load_file(out / "model.safetensors").keys()
    assert ("lm_head.weight" in names) == (not base["tie_word_embeddings"])
    assert {name.split(".")[0] for name in names} <= {"lm_head", "model", "visual"}, "the published names"
    tokenizer = json.loads((out / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "<|video_pad|>" in tokenizer["additional_special_tokens"] and "extra_special_tokens" not in tokenizer
    encoded, expected = (transformers.AutoTokenizer.from_pretrained(place)("what colour<|video_pad|>").input_ids
                         for place in (out, tmp_path / "model"))
    assert encoded == expected


def test_the_card_says_how_it_was_trained_and_its_code_runs(run, tmp_path, monkeypatch, capsys):
    out = merge(run, tmp_path / "merged", dtype="float32")
    card = (out / "README.md").read_text()
    family = json.loads((out / "config.json").read_text())["model_type"]
    for text in ("transformers 4.57 or later", "Trained with reg-grpo for 150 steps on train.jsonl",
                 "4 frames of 28 x 28", "after_video: max", f"--model {family} ",
                 "max_num_frames=4,min_pixels=784,max_pixels=784"):
        assert text in card, text
    assert str(tmp_path) not in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    with open(data_folder() / "toyvideoqa" / "train.jsonl", encoding="utf-8") as file:
        question = json.loads(file.readline())["problem"]
    texts = [str(node.value) for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert any(text.startswith(question) and text.endswith('\nSay "x", then answer.') for text in texts)
    pytest.importorskip("torchvision")
    shutil.copyfile(next((data_folder() / "toyvideoqa" / "clips" / "L1").glob("*.mp4")), out / "clip.mp4")
    monkeypatch.chdir(out)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_the_cards_question_is_from_the_data_or_a_placeholder(tmp_path):
    rows = [{"video": "a.mp4", "question": "Which letter?", "answer": "B", "options": ["red", "green"]}]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = {"train_file": str(tmp_path / "own.jsonl"), "data_root": None, "instruction": "Think."}
    assert example_question(run) == "Which letter?\nOptions: A. red B. green\nThink."
    assert example_question(run | {"train_file": str(tmp_path / "none.jsonl")}) == "YOUR QUESTION\nThink."
    assert example_question({}) == "YOUR QUESTION"


def test_an_adapter_is_found_and_mistakes_are_named(tmp_path):
    with pytest.raises(ModelError, match="holds no adapter .*give the folder of a run or its adapter"):
        merge(tmp_path / "none", tmp_path / "new")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(ConfigError, match="used exists and is not empty: give another --out"):
        merge(tmp_path / "none", tmp_path / "used")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/on-the-hub"}')
    assert base_model(tmp_path) == "someone/on-the-hub"

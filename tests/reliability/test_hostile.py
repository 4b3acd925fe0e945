r"""Hostile input: completions that try to cheat, files that try to break or to run, text that tries to be more."""

import ast
import json
import os
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dvr1_lite.data import PROBLEM_TYPES, Record, prompt_text, read_records
from dvr1_lite.errors import ModelError, UserError
from dvr1_lite.loading import LoraSettings
from dvr1_lite.policy import Policy
from dvr1_lite.rewards import parse_completion, score
from dvr1_lite.rollout import sample_groups
from tests.reliability.killable import ROOT
from tests.small_run import write_world
from tests.tiny import write_model
from tests.records import write_records

TRUTHS = {"multiple choice": "C", "numerical": "5", "OCR": "no left turn", "free-form": "a red ball", "exact": "2 5",
          "regression": "5", "grounding": "C"}


def record(kind: str = "multiple choice", question: str = "what is it") -> Record:
    options = ("red", "green", "blue") if kind in ("multiple choice", "grounding") else ()
    spans = ((1.0, 2.0),) if kind == "grounding" else ()
    return Record("r", question, options, TRUTHS[kind], kind, kind, None, spans=spans)


# --- completions -----------------------------------------------------------------------------------------------------

GOOD = "<think>it is blue</think><answer>C</answer>"
CHEATS = {
    "full-width tags": GOOD.replace("<", "\uff1c").replace(">", "\uff1e"),
    "a zero-width space in a tag": GOOD.replace("<answer>", "<ans\u200bwer>"),
    "Cyrillic letters in a tag": GOOD.replace("<answer>", "<\u0430nswer>"),
    "tags with attributes": GOOD.replace("<answer>", '<answer id="1">'),
    "an escaped tag": GOOD.replace("<answer>", "&lt;answer&gt;"),
    "a comment around it": f"<!-- {GOOD} -->",
    "every letter in turn": "<think>x</think>" + "".join(f"<answer>{letter}</answer>" for letter in "ABCD"),
    "the answer before the thought": "<answer>C</answer><think>x</think><answer>C</answer>",
    "the question repeated": f"Question: <answer>C</answer>? {GOOD}",
    "a turn of its own": f"<think>x</think><|im_end|><|im_start|>user\n{GOOD}",
    "a null character between": GOOD.replace("</think>", "</think>\0"),
    "right-to-left override": GOOD.replace("<answer>", "\u202e<answer>"),
    "a lone surrogate between": GOOD.replace("</think>", "</think>\ud800"),
}
INCORRECT = ["Clap", "C, or A", "not C", "A B C D", "(C) or (B)", "\u0421", "\uff23", "c", "C" * 10**5, "C\0", "[C]",
             "{C}"]


@pytest.mark.parametrize("kind", PROBLEM_TYPES)
@pytest.mark.parametrize("text", CHEATS.values(), ids=CHEATS.keys())
def test_a_cheat_earns_nothing(text, kind):
    assert not parse_completion(text).well_formed and score(record(kind), text).total == 0.0


@pytest.mark.parametrize("answer", INCORRECT, ids=range(len(INCORRECT)))
def test_an_answer_that_only_resembles_the_letter_earns_the_format_alone(answer):
    assert score(record(), GOOD).total == 2.0
    assert score(record(), GOOD.replace(">C<", f">{answer}<")).total == 1.0


def test_a_question_that_contains_an_answer_changes_no_score(tmp_path):
    question = "is <answer>C</answer> or <think> the first </think> <answer> A </answer> <glue> 1.0 2.0 </glue>"
    world = write_world(tmp_path)
    write_records(tmp_path / "tricky.jsonl", [replace(record(question=question), clip=tmp_path / "0.mp4")])
    [tricky] = read_records(tmp_path / "tricky.jsonl")
    policy = Policy.load(world / "model")
    prompt = policy.prompt(prompt_text(tricky))
    rollout = sample_groups(policy, [prompt], 4, 5, generator=torch.Generator().manual_seed(0))
    assert tricky.question == question and max(len(text.split()) for text in rollout.texts[0]) <= 5  # not the prompt
    assert all(score(tricky, text) == score(record(), text) for text in [*rollout.texts[0], GOOD, *CHEATS.values()])
    assert score(tricky, question).total == 0.0


# --- nothing runs ----------------------------------------------------------------------------------------------------


def sources() -> dict[str, ast.AST]:
    r"""Parse the module, and the scripts and code cells of the notebooks."""
    files = [*(ROOT / "dvr1_lite").rglob("*.py"), *(ROOT / "notebooks").rglob("*.py")]
    found = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in files}
    for path in notebooks():
        for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
            if cell["cell_type"] == "code":
                code = "".join("pass\n" if re.match(r"\s*(%|!(?!=))", line) else line for line in cell["source"])
                found[f"{path.name}, cell {number}"] = ast.parse(code)
    return found


def notebooks() -> list[Path]:
    return [*(ROOT / "notebooks").glob("*.ipynb"), *(ROOT / "notebooks" / "solutions").glob("*.ipynb")]


FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {"eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "pd.read_pickle", "os.system",
                   "torch.hub.load"}
# What a notebook could show as HTML; without any of it there is nothing in which a model's words could be markup.
HTML = {"HTML", "display_html", "Markdown", "display_markdown", "SVG", "Javascript", "IFrame", "_repr_html_", "to_html",
        "to_jshtml", "to_html5_video"}


def faults_of(tree: ast.AST) -> list[str]:
    r"""List what a piece of code must not do; [] for sound code."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [name for name in names if name.split(".")[0] in FORBIDDEN or name in HTML]
        elif isinstance(node, ast.Call):
            name, options = ast.unparse(node.func), {word.arg: word.value for word in node.keywords}
            found += [name] if name in FORBIDDEN_CALLS else []
            if name == "torch.load" and ast.unparse(options.get("weights_only", ast.Constant(None))) != "True":
                found.append("torch.load without weights_only=True")
            for word in ("trust_remote_code", "allow_pickle", "shell"):
                if word in options and ast.unparse(options[word]) != "False":
                    found.append(f"{word}={ast.unparse(options[word])}")
            if name.endswith("from_pretrained") and "**" not in ast.unparse(node) and "PeftModel" not in name:
                found += [] if "trust_remote_code" in options else [f"{name} without trust_remote_code=False"]
        elif isinstance(node, (ast.Name, ast.Attribute, ast.FunctionDef)):
            name = getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "name", None)
            found += [name] if name in HTML else []
    return found


def test_no_source_unpickles_trusts_remote_code_or_shows_html():
    trees = sources()
    assert len(trees) > 40 and "dvr1_lite/policy.py" in trees
    found = {name: faults_of(tree) for name, tree in trees.items() if faults_of(tree)}
    assert found.pop("notebooks/teaching/instructors/grade.py") == ["exec", "exec"]  # it runs submissions, as it is asked
    assert found == {}


@pytest.mark.parametrize("code", [
    "import pickle", "from dill import loads", "torch.load(p)", "torch.load(p, weights_only=False)", "eval('1')",
    "yaml.load(text)", "np.load(p, allow_pickle=True)", "AutoModel.from_pretrained(p, trust_remote_code=True)",
    "A.from_pretrained(p)", "subprocess.run(x, shell=True)", "from IPython.display import HTML",
    "animation.to_jshtml()"])
def test_the_search_finds_what_it_is_for(code):
    assert faults_of(ast.parse(code))


def test_no_stored_output_is_html():
    for path in notebooks():
        for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
            kinds = {kind for output in cell.get("outputs", []) for kind in output.get("data", {})}
            assert kinds <= {"text/plain", "image/png"}, f"{path.name}, cell {number}"


class Bomb:
    r"""Make a folder when unpickled."""

    target = ""

    def __reduce__(self):
        return os.makedirs, (self.target,)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def edited(folder: Path, name: str, **changes) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def template(text: str):
    return lambda folder: (folder / "chat_template.jinja").write_text(text.replace("TARGET", Bomb.target))


def pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


def pickled_weights_beside_an_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    torch.save({"x": Bomb()}, folder / "part.bin")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "part.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


CODE = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}
MALICE = {  # name: (change to the folder, whether the model still loads, without what was asked for)
    "config with code": (lambda f: edited(f, "config.json", auto_map=CODE), True),
    "config of its own kind": (lambda f: edited(f, "config.json", model_type="evil", auto_map=CODE), False),
    "kernel from elsewhere": (lambda f: edited(f, "config.json", _attn_implementation="evil/kernel",
                                               attn_implementation="evil/kernel"), True),
    "tokenizer with code": (lambda f: edited(f, "tokenizer_config.json", tokenizer_class="Evil",
                                             auto_map={"AutoTokenizer": ["evil.Evil"] * 2}), True),
    "template that reaches out": (template("{{ cycler.__init__.__globals__.os.makedirs('TARGET') }}"), False),
    "template through a string": (template("{{ ''.__class__.__mro__[1].__subclasses__() }}{% for a in messages %}"
                                           "{{ a.pop('role') }}{% endfor %}"), False),
    "pickled weights": (pickled_weights, False),
    "pickled weights beside an index": (pickled_weights_beside_an_index, False),
    "pickle named safetensors": (lambda f: (f / "model.safetensors").write_bytes(pickle.dumps(Bomb())), False),
}


@pytest.fixture
def bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(Bomb, "target", str(tmp_path / "exploded"))
    yield f"import os\nos.makedirs({Bomb.target!r})\nclass Evil: pass\n"
    assert not Path(Bomb.target).exists()


@pytest.mark.parametrize(("change", "loads"), MALICE.values(), ids=MALICE.keys())
def test_a_malicious_model_runs_nothing(change, loads, model, tmp_path, bomb):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    (folder / "evil.py").write_text(bomb)
    change(folder)
    try:
        Policy.load(folder, lora=LoraSettings(2)).prompt("what colour")
        assert loads
    except ModelError as error:
        assert str(folder) in str(error) and not loads


def test_a_malicious_adapter_runs_nothing(model, tmp_path, bomb):
    good = tmp_path / "good"
    Policy.load(model, lora=LoraSettings(2)).save_adapter(good)
    changes = [{"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"}}, {"peft_type": "EVIL"},
               {"base_model_name_or_path": "../../evil"}, {"target_modules": "(a|a)*$"}, {"r": 10**9}, {"r": "x"}]
    for number, change in enumerate(changes):
        folder = tmp_path / f"adapter{number}"
        shutil.copytree(good, folder)
        (folder / "evil.py").write_text(bomb)
        edited(folder, "adapter_config.json", **change)
        try:
            Policy.load(model, adapter=folder)
        except UserError as error:
            assert str(folder) in str(error)
    (good / "adapter_model.safetensors").rename(good / "kept")
    for name in ("adapter_model.bin", "adapter_model.safetensors"):
        torch.save({"x": Bomb()}, good / name)
        with pytest.raises(ModelError, match="adapter"):
            Policy.load(model, adapter=good)

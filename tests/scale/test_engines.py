r"""The method in engines: coefficients against the objectives, augmentation against the project's trainers, and, slow,
the plug-ins in environments of their own."""

import importlib.metadata
import json
import os
import random
import runpy
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dvr1_lite.augmentation import Augmentation
from dvr1_lite.config import ObjectiveConfig, TrainConfig, make_config
from dvr1_lite.data import Record
from dvr1_lite.errors import ConfigError
from dvr1_lite.lab.variants import VARIANTS as TRAINERS
from dvr1_lite.objectives import METHODS, Batch, objective_loss
from dvr1_lite.rewards import Score
from dvr1_lite.scale import engines
from dvr1_lite.scale.engines import groups, rows
from dvr1_lite.scale.engines.coefficients import (LOSS_TYPES, coefficients, completion_rows, engine_advantages,
                                                  token_weights)
from dvr1_lite.training import Group
from dvr1_lite.video import read_clip

ROOT, GROUP, TOKENS, LIMIT = Path(__file__).resolve().parents[2], 4, 7, 9
RECORD = Record("r1", "what colour comes first", ("red", "green"), "A", "multiple choice", "colour", Path("a.mp4"))

# --- the coefficient form --------------------------------------------------------------------------------------------


class Completions:
    r"""Three groups, one of them vanished, with log-probs that depend on weights w; `logp(w, rows)` as an engine's."""

    def __init__(self, seed: int):
        generator = torch.Generator().manual_seed(seed)
        shape = (3 * GROUP, TOKENS)
        lengths = torch.randint(1, TOKENS + 1, shape[:1], generator=generator)
        self.mask = torch.arange(TOKENS) < lengths[:, None]
        self.features = torch.randn(*shape, 5, generator=generator, dtype=torch.float64)
        self.old = -3 * torch.rand(shape, generator=generator, dtype=torch.float64)
        self.ref = self.old + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
        self.rewards = torch.randint(0, 3, shape[:1], generator=generator).double()
        self.rewards[:GROUP] = 1.0
        self.weights = torch.randn(5, generator=generator, dtype=torch.float64).requires_grad_()

    def logp(self, which=slice(None)) -> torch.Tensor:
        return self.old[which] + 0.2 * torch.tanh(self.features[which] @ self.weights)

    def true_gradient(self, config: ObjectiveConfig) -> torch.Tensor:
        values = (x.unflatten(0, (-1, GROUP)) for x in (self.logp(), self.old, self.ref, self.mask, self.rewards))
        return torch.autograd.grad(objective_loss(Batch(*values), config), self.weights)[0]

    def coefficients(self, config: ObjectiveConfig) -> list[torch.Tensor]:
        values = (completion_rows(x, self.mask) for x in (self.logp(), self.old, self.ref))
        return coefficients(*values, self.rewards.tolist(), GROUP, config)


def engine_loss(kind: str, values: torch.Tensor, mask: torch.Tensor, total: int) -> torch.Tensor:
    r"""The engines' reduction of a micro-batch's token losses, as ms-swift 4.6 and TRL 1.16 write it; "dapo" divides by
    all tokens of the update instead."""
    if kind == "grpo":
        return ((values * mask).sum(-1) / mask.sum(-1)).mean()
    return (values * mask).sum() / {"bnpo": mask.sum(), "dr_grpo": len(mask) * LIMIT, "dapo": total}[kind]


@pytest.mark.parametrize("kind", LOSS_TYPES)
@pytest.mark.parametrize("method", METHODS)
def test_an_engines_loss_gets_the_gradient_of_every_objective(method, kind):
    for seed, (beta, reduction) in enumerate([(0.0, "auto"), (0.1, "auto"), (0.1, "sum"), (0.0, "mean")]):
        config = ObjectiveConfig(method=method, beta=beta, logp_reduction=reduction, kl_estimator="k2")
        made, shuffled = Completions(seed), random.Random(seed)
        rows_of = made.coefficients(config)
        order, parts, processes = list(range(3 * GROUP)), [], 2
        shuffled.shuffle(order)
        for share in (order[:6], order[6:]):  # two processes, each with two micro-batches of unequal size
            cut = shuffled.randint(1, 5)
            parts += [share[:cut], share[cut:]]
        gradient = torch.zeros(5, dtype=torch.float64)
        for part in parts:
            mask = made.mask[part]
            weights = token_weights(mask, kind, micro_batches=2, processes=processes, max_completion_length=LIMIT,
                                    total_tokens=float(made.mask.sum()))
            advantages = engine_advantages([rows_of[i] for i in part], mask, weights)
            ratio = torch.exp(made.logp(part) - made.logp(part).detach())
            loss = engine_loss(kind, -ratio * advantages, mask, int(made.mask.sum()))
            gradient += torch.autograd.grad(loss, made.weights)[0] / (1 if kind == "dapo" else 2 * processes)
        expected = made.true_gradient(config)
        assert expected.norm() > 0 and (gradient - expected).norm() < 1e-6 * expected.norm(), (beta, reduction)


def test_without_a_kl_term_there_is_one_coefficient_for_each_completion():
    config, made = ObjectiveConfig(beta=0.0), Completions(3)
    rho = ((made.logp() - made.old) * made.mask).sum(-1).detach().view(-1, GROUP).requires_grad_()
    rewards = made.rewards.view(-1, GROUP)
    spread = rewards.std(-1, correction=0, keepdim=True)
    target = torch.where(spread > 0, (rewards - rewards.mean(-1, keepdim=True)) / (spread + config.advantage_eps), 0.0)
    predicted = (rho - rho.mean(-1, keepdim=True)) / (rho.std(-1, correction=0, keepdim=True) + config.predicted_eps)
    ((target - predicted).square() * (spread > 0)).mean().backward()  # Eq. 8, on N numbers
    lengths = made.mask.sum(-1)
    advantages = engine_advantages(made.coefficients(config), made.mask,
                                   token_weights(made.mask, "grpo", micro_batches=1, processes=1))
    by_hand = -rho.grad.flatten() * lengths * len(lengths)
    assert by_hand.abs().max() > 0.1
    torch.testing.assert_close(advantages.double(), by_hand[:, None] * made.mask, rtol=1e-5, atol=1e-6)


# --- augmentation ----------------------------------------------------------------------------------------------------


class Toy:
    r"""`groups.Engine` on plain dicts; every other completion that it writes is correct."""

    def __init__(self, others: int = 0):
        self.asked, self.others = [], others

    record = staticmethod(lambda sample: sample["record"])
    text = staticmethod(lambda sample: sample["text"])

    def with_prompt(self, sample, text):
        return sample | {"prompt": text}

    def with_frames(self, sample, change):
        return sample | {"frames": change(torch.full((4, 3, 2, 2), 0.5))}

    def with_completion(self, sample, other):
        return sample | {"text": other["text"]}

    def generate(self, samples):
        self.asked.append([sample["prompt"] for sample in samples])
        right = [i % 2 == 0 for i in range(len(samples))]
        return [sample | {"text": f"<think> red at {i} then blue </think> <answer> {'A' if ok else 'B'} </answer>"}
                for i, (sample, ok) in enumerate(zip(samples, right))]

    def gather(self, value):
        return [value] * (1 + self.others) if not isinstance(value, int) else [value, self.others]


def toy_group(answers: str, number: int = 0) -> list[dict]:
    return [{"record": RECORD, "prompt": "plain", "text": f"<think> own {number}{i} </think> <answer> {a} </answer>"}
            for i, a in enumerate(answers)]


def augmenter(engine: Toy, **changes) -> groups.Augmenter:
    made = groups.Augmenter(make_config({"group_size": 4, "history_window": 4, "hint_traces": 2} | changes), engine)
    for _ in range(4):
        made.history.push(0.75)  # half of the answers correct, all well formed
    return made


def test_hard_prompts_get_hints_and_easy_ones_noise():
    engine = Toy()
    samples, counts = augmenter(engine).augment(toy_group("BBBB", 1) + toy_group("AAAA", 2) + toy_group("AABB", 3), 0)
    assert counts == {"hard": 1, "easy": 1, "augmented": 2}
    shown, asked = engine.asked
    assert len(shown) == 2 and all("The answer is A." in prompt for prompt in shown)
    assert [prompt.count("Hint: red") for prompt in asked] == [1] * 4 + [0] * 4 and len(samples) == 12
    assert all("Hint: red _ _ _ _" in sample["prompt"] for sample in samples[:4])  # 0.15 of the words, rounded up
    noisy = [sample["frames"] for sample in samples[4:8]]
    assert 0.02 < noisy[0].std() < 0.3 and all(torch.equal(frames, noisy[0]) for frames in noisy)
    assert [sample["text"] for sample in samples[8:]] == [sample["text"] for sample in toy_group("AABB", 3)]


def test_the_history_is_all_processes_original_groups():
    made = augmenter(Toy(others=1))
    made.augment(toy_group("BBBB"), 0)  # its mean is 0.5, and the other process pushes the same
    assert list(made.history.state_dict()["rewards"]) == [0.75, 0.75, 0.5, 0.5]


def test_a_process_without_hard_prompts_takes_part_in_the_others_sampling():
    engine = Toy(others=8)
    samples, counts = augmenter(engine).augment(toy_group("AABB"), 0)
    assert [len(prompts) for prompts in engine.asked] == [1, 1]  # traces, and the augmented groups
    assert samples == toy_group("AABB") and counts["augmented"] == 0


@pytest.mark.parametrize("variant", groups.VARIANTS)
def test_each_variant_trains_on_what_the_projects_trainer_trains_on(variant):
    def score(correct: int) -> Score:
        return Score(1.0, float(correct), None, 1.0 + correct, 2.0)

    for seed in range(20):
        draw = random.Random(seed)
        right = {name: [draw.randint(0, 1) for _ in range(6)] for name in ("own", "new")}
        theirs, ours = {}, {}
        for name, scores in right.items():
            texts = [f"{name}{i}" for i in range(6)]
            theirs[name] = Group(RECORD, name, [[i] for i in range(6)], texts, [score(s) for s in scores], [True] * 6)
            ours[name] = groups.SampleGroup(RECORD, [{"prompt": name, "text": text} for text in texts], texts,
                                            [score(s) for s in scores])
        config = TrainConfig(hint_update=variant)
        for plan in (Augmentation("hint", 0.3), Augmentation("noise", 0.1)):
            expected = TRAINERS[variant].combine(SimpleNamespace(), theirs["own"], theirs["new"], plan)
            found = groups.Augmenter(config, Toy()).combine(ours["own"], ours["new"], plan)
            assert [[(s["prompt"], s["text"]) for s in group.samples] for group in found] == [
                [(group.prompt, text) for text in group.texts] for group in expected]


def test_only_vanished_groups_are_hinted_where_that_is_asked_for():
    samples = toy_group("BBBB", 1) + toy_group("BBBA", 2)
    for variant, hard in (("hinted", 2), ("only-vanished", 1)):
        assert augmenter(Toy(), hint_update=variant).augment(samples, 0)[1]["hard"] == hard


@pytest.mark.parametrize("change", [{"augment": "resample"}, {"hint_probe": True}])
def test_variants_of_the_projects_trainer_alone_are_refused(change):
    with pytest.raises(ConfigError, match="an engine does not make the augmentation .*: use one of hinted, unhinted"):
        groups.Augmenter(make_config(change), Toy())


# --- rows and clips --------------------------------------------------------------------------------------------------


def test_a_row_holds_the_record_and_what_the_engine_shows(tmp_path, capsys):
    record = replace(RECORD, image=Path("b.png"), spans=((1.0, 2.5),), problem_type="grounding", duration=4.0)
    row = json.loads(json.dumps(rows.row(record, make_config({"num_frames": 16, "instruction": "think first"}))))
    assert rows.read_record(row["record"]) == record
    assert row["messages"] == [{"role": "user", "content": "<video><image>what colour comes first\nOptions: A. red "
                                                           "B. green\nthink first"}]
    assert (row["videos"], row["images"], row["chat_template_kwargs"]["nframes"]) == (["a.mp4"], ["b.png"], 16)
    with pytest.raises(SystemExit):
        rows.main(["--data", str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "rows.jsonl")])
    assert "none.jsonl" in capsys.readouterr().err


def test_changed_frames_are_read_back_from_their_clip(tmp_path):
    frames = torch.rand(6, 3, 56, 84, generator=torch.Generator().manual_seed(0))
    rows.write_frames(tmp_path / "noisy.mp4", frames, 1.6)
    clip = read_clip(tmp_path / "noisy.mp4", 6, (56, 84))
    assert clip.duration == pytest.approx(6 / 1.6, rel=1e-3) and clip.duration > 6 / 1.6
    assert (clip.frames - frames).abs().mean() < 0.01  # noise of neighbouring pixels is not smoothed


# --- the engines themselves ------------------------------------------------------------------------------------------

PLUGIN = str(Path(engines.__file__).with_name("ms_swift.py"))


@pytest.mark.parametrize("found", ["4.5.3", "4.7.0", None])
def test_untested_versions_are_refused_at_import(found, monkeypatch):
    def version(name: str) -> str:
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ImportError, match=f"tested with 4.6.x, but here ms-swift is {found or 'not installed'}: pip"):
        runpy.run_path(PLUGIN)


MAKE = {"swift": "'ms-swift==4.6.*' msgspec qwen_vl_utils torchvision decord av",
        "trl": "'trl==1.16.*' peft torchvision pydantic scipy pandas decord av"}


def work(engine: str, folder: Path, fields: dict, processes: int = 1, **environment) -> subprocess.CompletedProcess:
    r"""Run the worker in the engine's environment. Skips where no variable names one."""
    name = f"DVR1_{engine.upper()}_PYTHON"
    if not os.environ.get(name):
        pytest.skip(f"{name} names no Python: python -m venv DIR; DIR/bin/pip install torch==2.13.* {MAKE[engine]}; "
                    f"then export {name}=DIR/bin/python")
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "29613"]
    command = [os.environ[name], *(launch if processes > 1 else []), "-m", "tests.scale.engine_worker", engine,
               str(folder), json.dumps(fields)]
    offline = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "USE_HF": "1", "OMP_NUM_THREADS": "1",
               "TOKENIZERS_PARALLELISM": "false", **environment}
    return subprocess.run(command, cwd=ROOT, env=os.environ | offline, capture_output=True, text=True, timeout=1200)


def updates(done: subprocess.CompletedProcess, folder: Path) -> list[dict]:
    r"""Return what the worker noted for each of six updates, after checking every gradient."""
    assert done.returncode == 0, done.stderr[-3000:]
    noted = json.loads((folder / "updates.json").read_text())
    assert len(noted) == 6 and [update["moved"] > 0.1 for update in noted] == [False, True] * 3
    for update in noted:
        assert update["norm"] > 1e-3 and update["difference"] < 1e-5, update
    return noted


EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "split_dataset_ratio": 0.5, "per_device_eval_batch_size": 4}


@pytest.mark.slow
@pytest.mark.parametrize(("fields", "loss_type"), [
    ({"augment": "none", "beta": 0.0, "options": EVALUATED}, "grpo"),
    ({"hint_update": "hinted"}, "grpo"), ({"hint_update": "mixed"}, "dapo"),
    ({"hint_update": "kept", "method": "dpo"}, "bnpo"), ({"hint_update": "only-vanished", "method": "grpo"}, "dr_grpo"),
    ({"hint_update": "unhinted", "method": "rebel", "kl_estimator": "k2"}, "grpo")], ids=str)
def test_the_plug_in_trains_ms_swift_with_the_projects_gradient(fields, loss_type, tmp_path):
    options = fields.get("options", {}) | {"loss_type": loss_type}
    noted = updates(work("swift", tmp_path, fields | {"options": options}), tmp_path / "0")
    assert (sum(update["augmented"] for update in noted) > 0) == ("augment" not in fields)
    assert any(update["completions"] > 8 for update in noted) == (fields.get("hint_update") == "kept")


@pytest.mark.slow
def test_two_processes_of_ms_swift_have_the_gradient_of_all_groups(tmp_path):
    done = work("swift", tmp_path, {"options": {"use_cpu": "true", "ddp_backend": "gloo"}}, processes=2,
                ACCELERATE_USE_CPU="true")
    both = [updates(done, tmp_path / rank) for rank in "01"]
    assert [update["norm"] for update in both[0]] == [update["norm"] for update in both[1]]
    assert any(one["augmented"] != other["augmented"] for one, other in zip(*both))


@pytest.mark.slow
@pytest.mark.parametrize(("options", "message"), [
    ({"beta": 0.04}, "--beta is 0.04: give 0.1"), ({"lora_dropout": 0.05}, "--lora_dropout is not 0"),
    ({"steps_per_generation": 8}, "--steps_per_generation is 8: give 4"),
    ({"loss_type": "sapo"}, "--loss_type is 'sapo': give one of grpo, bnpo")])
def test_arguments_of_ms_swift_that_bend_the_gradient_are_refused(options, message, tmp_path):
    done = work("swift", tmp_path, {"options": options})
    assert done.returncode != 0 and message in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("method", ["reg-grpo", "grpo", "rloo"])
def test_the_trl_example_trains_with_the_projects_gradient(method, tmp_path):
    updates(work("trl", tmp_path, {"method": method}), tmp_path / "0")


@pytest.mark.slow
def test_the_trl_example_refuses_a_loss_that_bends_the_gradient(tmp_path):
    done = work("trl", tmp_path, {"options": {"use_bias_correction_kl": True}})
    assert done.returncode != 0 and "use_bias_correction_kl is True: the coefficient form needs False" in done.stderr

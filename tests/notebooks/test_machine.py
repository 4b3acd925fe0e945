r"""Notebook 04 writes the trainer by hand: its cells tagged `machine` give the numbers of the module."""

import ast
import inspect
import math
import re
import textwrap
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch

from dvr1_lite import augmentation
from dvr1_lite.data import prompt_text, read_records
from dvr1_lite.loading import make_optimizer
from dvr1_lite.policy import Completions, encode_record
from dvr1_lite.rollout import sample_groups
from dvr1_lite.run import load_policy
from dvr1_lite.training import Trainer
from tests.small_run import coin_score, reward_by_coin, small_config, write_world
from tests.tiny import add_noise_to_lora

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks/04_qlora_video_llm.ipynb"
TEXTS = ["what colour comes first", "what comes then hint red _ _"]


def machine_source() -> str:
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if "machine" in cell.metadata.get("tags", []))


def machine(source: str) -> SimpleNamespace:
    r"""Run the notebook's definitions with what its other cells import; completions are scored by a coin."""
    names = {"torch": torch, "math": math, "prompt_text": prompt_text, "encode_record": encode_record,
             "score": coin_score}
    exec(compile(source, NOTEBOOK.name, "exec"), names)
    names["best_trace"] = lambda scored: next((text for text, s in scored if s.correct and text), None)
    return SimpleNamespace(**names)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"), clips=5)


@pytest.fixture(scope="module")
def config(world, tmp_path_factory):
    return small_config(world, tmp_path_factory.mktemp("run"), dtype="float64", beta=2.0)


@pytest.fixture
def policy(config):
    loaded = load_policy(config)
    add_noise_to_lora(loaded.model)
    return loaded


def make_prompts(policy, config):
    records = read_records(config.train_file)
    return [policy.prompt(text, encode_record(policy, record, config)) for text, record in zip(TEXTS, records[::2])]


def gradient(policy, logp):
    return torch.cat([g.flatten() for g in torch.autograd.grad(logp.square().sum(), policy.trainable())])


def test_log_probs_and_gradients_are_those_of_the_module(policy, config):
    prompts = make_prompts(policy, config)
    ids = (~policy.banned).nonzero().flatten()
    lists = [[ids[:5].tolist(), ids[3:5].tolist()], [ids[4:7].tolist(), ids[2:9].tolist()]]
    completions = Completions.from_lists(lists, policy.pad_id)
    ours = machine(machine_source()).logprobs(policy, prompts, completions)
    theirs = policy.logprobs(prompts, completions)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close(gradient(policy, ours), gradient(policy, theirs), rtol=1e-5, atol=1e-5)
    assert theirs.abs().max() > 1 and (ours[~completions.mask] == 0).all()


def test_sampled_tokens_and_random_numbers_used_are_those_of_the_module(policy, config):
    prompts, lengths = make_prompts(policy, config), []
    for seed in range(3):
        one, two = (torch.Generator().manual_seed(seed) for _ in range(2))
        ids, mask = machine(machine_source()).sample(policy, prompts, 2, 90, one)
        theirs = sample_groups(policy, prompts, 2, 90, generator=two).completions
        assert torch.equal(mask, theirs.mask) and torch.equal(ids[mask], theirs.ids[mask])
        assert torch.equal(one.get_state(), two.get_state())
        lengths.append(mask.sum(-1))
    assert len(torch.stack(lengths).unique()) > 5 and min(length.max() for length in lengths) < 90, lengths


def five_steps(source, config):
    r"""Make five steps by hand; return the adapter, its distance from the start, and how many groups were augmented."""
    m = SimpleNamespace(policy=load_policy(config), config=config, steps=0,
                        history=augmentation.RewardHistory(config.history_window),
                        generator=torch.Generator().manual_seed(config.seed))
    m.optimizer = make_optimizer(config, m.policy.trainable())
    start, code = [p.detach().clone() for p in m.policy.trainable()], machine(source)
    records, augmented = read_records(config.train_file), []
    for k in range(5):
        part = records[2 * k:2 * k + 2]
        prompts = [code.ask(m, record, encode_record(m.policy, record, config)) for record in part]
        sampled, trained, _ = code.step(m, part, prompts)
        texts = [group.prompt.text for a, group in zip(sampled, trained) if a is not group]
        augmented += ["hint" if "Hint:" in text else "noise" for text in texts]
    return m.policy.trainable(), distance(m.policy.trainable(), start), augmented


def distance(a, b) -> float:
    return sum((p - q).square().sum() for p, q in zip(a, b)).sqrt().item()


@pytest.fixture(scope="module")
def modules_adapter(config):
    with pytest.MonkeyPatch.context() as patch:
        reward_by_coin(patch)
        trainer = Trainer(config, read_records(config.train_file), load_policy(config))
        trainer.order = range(10)
        for _ in range(5):
            trainer.step()
    return trainer.policy.trainable()


def test_five_steps_give_the_adapter_of_the_module(config, modules_adapter):
    ours, moved, augmented = five_steps(machine_source(), config)
    assert {"hint", "noise"} <= set(augmented), f"the augmentation did nothing: {augmented}"
    assert moved > 1e-3 and distance(ours, modules_adapter) < 1e-4 * moved


@pytest.mark.parametrize(("correct", "faulty"), [
    ("with torch.no_grad(), m.policy.reference():", "with torch.no_grad():"),
    ("extend(policy, prompt, cache, ids[:, :-1])", "extend(policy, prompt, cache, ids[:, :-1], 1)"),
    ("losses = update(m, trained)", "losses = update(m, sampled)"),
])
def test_the_comparison_detects_a_faulty_step(config, modules_adapter, correct, faulty):
    assert correct in machine_source()
    ours, moved, _ = five_steps(machine_source().replace(correct, faulty), config)
    assert distance(ours, modules_adapter) > 1e-3 * moved


def statements(source: str) -> list[str]:
    r"""List a function's simple statements and loop heads, in order, without `self.` or `m.` and without comments."""
    lines = []
    for node in ast.walk(ast.parse(textwrap.dedent(source))):
        if isinstance(node, ast.stmt) and not isinstance(node, (ast.FunctionDef, ast.With)):
            text = ast.unparse(node).split("\n")[0]
            lines.append((node.lineno, re.sub(r"\b(self|m)\.|\bm, ", "", text)))
    return [text for _, text in sorted(lines)]


def test_the_step_is_written_as_in_the_module():
    machine_functions = {node.name: ast.unparse(node) for node in ast.parse(machine_source()).body
                         if isinstance(node, ast.FunctionDef)}
    by_hand = statements(machine_functions["step"])
    call = by_hand.index("losses = update(trained)")
    by_hand[call:call + 1] = statements(machine_functions["update"])
    module = statements(inspect.getsource(Trainer.step))
    shared = [line for line in module if line in by_hand]
    assert shared == [line for line in by_hand if line in module], "the same statements stand in another order"
    for line in ("difficulties = [history.difficulty(group.mean) for group in sampled]",
                 "prompts, completions, rewards = stack(trained, policy.pad_id)",
                 "logp_old = logp.detach() if logp_old is None else logp_old", "loss.backward()", "steps += 1"):
        assert line in shared, line

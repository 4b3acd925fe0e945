r"""The training step and whole runs: metrics, seeds, resuming, Ctrl-C, broken clips, numbers that are not finite."""

import json
import os
import pickle
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from dvr1_lite import run as run_module
from dvr1_lite import training
from dvr1_lite.checkpoint import checkpoint_folders, read_checkpoint, restore_global_random, save_checkpoint
from dvr1_lite.config import load_config, make_config
from dvr1_lite.data import read_records
from dvr1_lite.distributed import Order
from dvr1_lite.errors import ClipError, ConfigError, ModelError, NumericsError
from dvr1_lite.files import read_lines
from dvr1_lite.lab.variants import Mixed, vanished
from dvr1_lite.objectives import METHODS
from dvr1_lite.policy import Policy
from dvr1_lite.rewards import Score
from dvr1_lite.rollout import sample_groups
from dvr1_lite.run import comparable, load_policy, stop_request, train
from dvr1_lite.training import Group, Trainer, stack
from tests.small_run import coin_score, reward_by_coin, small_config, train_files, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def coin(monkeypatch):
    reward_by_coin(monkeypatch)
    return monkeypatch


def lines_of(out) -> list[dict]:
    return [comparable(line) for line in read_lines(Path(out) / "metrics.jsonl")]


def adapter_of(out) -> bytes:
    return (Path(out) / "adapter" / "adapter_model.safetensors").read_bytes()


# --- parts of the step -----------------------------------------------------------------------------------------------


def test_each_epoch_is_a_shuffle_of_its_own():
    order = Order(5, seed=3)
    epochs = [[order[5 * e + i] for i in range(5)] for e in range(4)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs) and len(set(map(tuple, epochs))) > 1
    assert [Order(5, 3)[p] for p in (17, 2, 9)] == [order[p] for p in (17, 2, 9)]
    assert [Order(50, 3)[p] for p in range(50)] != [Order(50, 4)[p] for p in range(50)]


def test_groups_are_stacked_whatever_their_length():
    low, high = Score(1.0, 0.0, None, 1.0, 2.0), Score(1.0, 1.0, None, 2.0, 2.0)
    groups = [Group(None, "p", [[1, 2], [3]], ["a", "b"], [low, high], [True, True]),
              Group(None, "q", [[7, 8, 9], [7]], ["c", "d"], [high, high], [True, False])]
    prompts, completions, rewards = stack(groups, pad_id=0)
    assert prompts == ["p", "q"] and rewards.tolist() == [[1.0, 2.0], [2.0, 2.0]]
    assert completions.ids.tolist() == [[[1, 2, 0], [3, 0, 0]], [[7, 8, 9], [7, 0, 0]]]
    assert completions.mask.tolist() == [[[1, 1, 0], [1, 0, 0]], [[1, 1, 1], [1, 0, 0]]]
    assert [group.mean for group in groups] == [0.75, 1.0] and [vanished(group) for group in groups] == [False, True]


def test_a_sample_batch_divides_the_prompts_and_keeps_their_order(world, tmp_path, monkeypatch):
    config = small_config(world, tmp_path / "run", sample_batch=2, augment="none")
    trainer, sizes, sample = Trainer(config, read_records(config.train_file), load_policy(config)), [], sample_groups
    monkeypatch.setattr(training, "sample_groups", lambda policy, prompts, *rest, **options: (
        sizes.append(len(prompts)) or sample(policy, prompts, *rest, **options)))
    records, prompts = zip(*(pair for _ in range(3) for pair in zip(*trainer.next_prompts())))
    groups = trainer.sample(records[:5], prompts[:5], 4, "sample")
    assert sizes == [2, 2, 1] and trainer.rollouts == 20 and trainer.seconds["sample"] > 0
    assert [group.record for group in groups] == list(records[:5]) and all(len(group.tokens) == 4 for group in groups)
    for group, prompt in zip(groups, prompts):
        assert group.prompt is prompt
        assert group.texts == [trainer.policy.tokenizer.decode(ids, skip_special_tokens=True) for ids in group.tokens]


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    r"""Make one uninterrupted run with mixed rewards, to compare others with; its folder and summary."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        reward_by_coin(patch)
        return out, train_files(small_config(world, out))


def test_a_run_leaves_everything_it_promises(finished, world):
    out, summary = finished
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "adapter/adapter_config.json",
                 "adapter/adapter_model.safetensors", "evaluation/before_L1.jsonl", "evaluation/after_L1.jsonl"):
        assert (out / name).stat().st_size > 0, name
    assert json.loads((out / "summary.json").read_text()) == summary
    assert load_config(out / "config.yaml").out == str(out)
    assert yaml.safe_load((out / "config.yaml").read_text())["method"] == "reg-grpo"
    assert summary["complete"] and summary["step"] == 3 and summary["updates"] == 6
    for when in ("before", "after"):
        cell = summary[when]["L1"]
        assert cell["n"] == 6 and cell["ci95"][0] <= cell["accuracy"] <= cell["ci95"][1]
        assert set(cell["by_type"]) == {"colour", "order"}
    assert summary["change"]["L1"]["clips"] == 3 and {"torch", "python"} <= summary["versions"].keys()
    assert 0.05 < summary["peak_memory_gb"] < 8 and summary["seconds"]["total"] > 0
    policy = Policy.load(world / "model", adapter=out)
    assert any("lora_B" in name and p.abs().sum() > 0 for name, p in policy.model.named_parameters())
    card = (out / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "reg-grpo" in card and "3 of 3 steps" in card and "config.yaml" in card


def test_every_step_has_a_line_of_metrics(finished):
    lines, sampled = list(read_lines(finished[0] / "metrics.jsonl")), 0
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert 0 <= line["vanishing"] <= 1 and line["format_rate"] == 1.0 and line["kl"] >= 0
        assert line["vanishing"] == pytest.approx(line["vanishing_all_right"] + line["vanishing_all_wrong"])
        assert line["reward"] == pytest.approx(1 + line["accuracy"]) == pytest.approx(2 * line["reward_normalised"])
        assert line["hints_found"] + line["hints_missing"] == line["hard"]
        assert line["augmented"] == line["hints_found"] + line["easy"]
        assert {"loss", "grad_norm", "completion_tokens", "reward_after"} <= line.keys()
        assert {"encode", "sample", "reference", "update", "total"} <= line["seconds"].keys()
        assert line["machine"]["feature_cache_bytes"] > 0
        # originals, traces for hard prompts, and augmented groups
        assert line["rollouts"] - sampled == 2 * 4 + line["hard"] * 2 + line["augmented"] * 4
        sampled = line["rollouts"]
    assert lines[0]["hard"] == lines[0]["easy"] == 0 and finished[1]["rollouts"] == sampled  # no history at first
    assert sum(line["augmented"] for line in lines) > 0 and lines[-1]["grad_norm"] > 0


def test_the_same_seed_gives_the_same_run_and_another_seed_another(finished, world, tmp_path, coin):
    torch.manual_seed(123)  # global random states do not matter
    np.random.seed(5)
    train_files(small_config(world, tmp_path / "again"))
    assert lines_of(tmp_path / "again") == lines_of(finished[0])
    assert adapter_of(tmp_path / "again") == adapter_of(finished[0])
    train_files(small_config(world, tmp_path / "other", seed=1, eval_files=[]))
    assert lines_of(tmp_path / "other") != lines_of(finished[0])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(method, world, tmp_path, coin):
    config = small_config(world, tmp_path / "run", method=method, steps=1, eval_files=[], augment="none")
    off, sample = [], training.sample_groups

    def spy(policy, *arguments, **options):
        off.append(policy.language.layers[0].mlp.up_proj.disable_adapters)
        return sample(policy, *arguments, **options)

    coin.setattr(training, "sample_groups", spy)
    summary, [line] = train_files(config), lines_of(tmp_path / "run")
    assert summary["updates"] == 2 and line["grad_norm"] > 0 and line["kl"] > 0
    assert off == [method == "dpo"]  # only DPO samples from the reference
    assert summary["before"] == summary["after"] == summary["change"] == {}


def test_old_log_probs_are_those_of_the_first_pass(world, tmp_path, coin):
    batches, loss = [], training.objective_loss
    coin.setattr(training, "objective_loss", lambda batch, *rest: batches.append(batch) or loss(batch, *rest))
    train_files(small_config(world, tmp_path / "run", steps=1, eval_files=[], inner_updates=3))
    assert len(batches) == 3 and all(torch.equal(batch.logp_old, batches[0].logp) for batch in batches)
    assert not torch.equal(batches[1].logp, batches[0].logp) and not torch.equal(batches[2].logp, batches[1].logp)
    torch.testing.assert_close(batches[0].logp_ref, batches[0].logp.detach(), rtol=0, atol=1e-5)  # B of LoRA is 0 yet
    assert all(torch.equal(batch.logp_ref, batches[0].logp_ref) for batch in batches)


def watch_training_groups(patch) -> list[list[Group]]:
    r"""Collect the groups that each step trains on."""
    seen, original = [], training.stack
    patch.setattr(training, "stack", lambda groups, pad: seen.append(groups) or original(groups, pad))
    return seen


@pytest.mark.parametrize("augment", ["hard", "easy", "none", "resample"])
def test_directions_of_the_augmentation_and_the_control(augment, world, tmp_path, coin):
    seen = watch_training_groups(coin)
    train_files(small_config(world, tmp_path / "run", augment=augment, eval_files=[], easy_kind="mask", steps=6))
    lines = lines_of(tmp_path / "run")
    total = {name: sum(line[name] for line in lines) for name in ("hard", "easy", "hints_found", "augmented")}
    assert (total["hard"] > 0) == (augment in ("hard", "resample"))
    assert (total["easy"] > 0) == (augment in ("easy", "resample"))
    assert sum("Hint:" in group.prompt.text for groups in seen for group in groups) == total["hints_found"]
    if augment == "resample":
        assert total["hints_found"] == 0 and total["augmented"] == total["hard"] + total["easy"]
        assert lines[-1]["rollouts"] == 6 * 2 * 4 + total["augmented"] * 4


@pytest.mark.parametrize("changes", [{"hint_update": "hinted"}, {"hint_update": "unhinted"}, {"hint_update": "mixed"},
                                     {"hint_probe": True}])
def test_the_prompt_that_a_hinted_group_is_trained_on(changes, world, tmp_path, coin):
    seen, asked, sample = watch_training_groups(coin), [], Trainer.sample
    coin.setattr(Trainer, "sample", lambda self, records, prompts, size, phase: asked.append(
        (phase, len(prompts) * size)) or sample(self, records, prompts, size, phase))
    train_files(small_config(world, tmp_path / "run", augment="hard", eval_files=[], steps=6, **changes))
    lines = lines_of(tmp_path / "run")
    found = sum(line["hints_found"] for line in lines)
    hinted = sum("Hint:" in group.prompt.text for groups in seen for group in groups)
    assert found > 0 and hinted == (0 if changes.get("hint_update") in ("unhinted", "mixed") else found)
    for group in (group for groups in seen for group in groups):
        assert group.scores == [coin_score(group.record, text) for text in group.texts]
        assert all(group.tokens)
    probes = [count for phase, count in asked if phase == "sample_probes"]
    assert bool(probes) == changes.get("hint_probe", False) and sum(probes) <= 3 * 2 * found
    assert lines[-1]["rollouts"] == sum(count for _, count in asked)


def test_a_trainer_that_makes_another_augmentation_than_the_config_is_refused(world, tmp_path):
    with pytest.raises(ConfigError, match="asks for the augmentation 'hinted', and Mixed makes 'mixed'"):
        train_files(small_config(world, tmp_path / "run"), trainer=Mixed)


def test_a_budget_of_rollouts_ends_the_run(world, tmp_path, coin):
    summary = train_files(small_config(world, tmp_path / "run", rollout_budget=9, augment="none", steps=50,
                                       eval_files=[]))
    assert summary["complete"] and summary["step"] == 2 and summary["rollouts"] == 16


def test_the_learning_rate_warms_up(world, tmp_path, coin):
    rates, update = [], Trainer.update_weights
    coin.setattr(Trainer, "update_weights", lambda self, names: (
        update(self, names), rates.append(self.optimizer.param_groups[0]["lr"]))[0])
    train_files(small_config(world, tmp_path / "run", warmup_steps=2, learning_rate=0.1, eval_files=[],
                             inner_updates=1))
    assert rates == pytest.approx([0.05, 0.1, 0.1])


def test_evaluations_can_be_left_out_or_be_all_there_is(world, tmp_path, coin):
    base = train_files(small_config(world, tmp_path / "base", steps=0, eval_sampled_limit=2))
    assert base["complete"] and base["step"] == 0 and base["after"] == {} and base["before"]["L1"]["n"] == 6
    assert base["before_sampled"]["L1"]["n"] == 2 and not (tmp_path / "base" / "adapter").exists()
    after = train_files(small_config(world, tmp_path / "after", steps=1, eval_before=False))
    assert after["before"] == {} == after["change"] and after["after"]["L1"]["n"] == 6


def test_tensorboard_files_are_written(world, tmp_path, coin):
    pytest.importorskip("tensorboard")
    train_files(small_config(world, tmp_path / "run", tracker="tensorboard", steps=1, eval_files=[]))
    assert list((tmp_path / "run" / "tensorboard").rglob("events*"))


# --- resuming --------------------------------------------------------------------------------------------------------


def crash(patch, owner: type, method: str, step: int, error: BaseException) -> None:
    r"""Make a method of the trainer or the run raise `error` when `step` steps have been made."""
    original = getattr(owner, method)

    def fail(self, *args, **options):
        if getattr(self, "trainer", self).steps == step:
            raise error
        return original(self, *args, **options)

    patch.setattr(owner, method, fail)


@pytest.mark.parametrize(("owner", "method", "step"), [
    (Trainer, "sample", 0), (Trainer, "augment", 1), (Trainer, "update_weights", 2), (run_module.Run, "save", 2),
    (run_module.Run, "export_adapter", 3), (run_module.Run, "evaluate", 3)])
def test_an_interrupted_run_resumes_bit_for_bit(owner, method, step, finished, world, tmp_path, coin):
    config = small_config(world, tmp_path / "run")
    with coin.context() as patch, pytest.raises(OSError, match="interrupted"):
        crash(patch, owner, method, step, OSError("interrupted"))
        train_files(config)
    summary = train_files(config, resume=True)
    assert summary["complete"] and lines_of(tmp_path / "run") == lines_of(finished[0])
    assert adapter_of(tmp_path / "run") == adapter_of(finished[0])
    for when in ("before", "after", "change"):
        assert summary[when] == finished[1][when]


def test_a_run_interrupted_before_its_first_checkpoint_begins_again(finished, world, tmp_path, coin):
    config = small_config(world, tmp_path / "run", save_every=50)
    with coin.context() as patch, pytest.raises(OSError):
        crash(patch, Trainer, "augment", 2, OSError("interrupted"))
        train_files(config)
    assert len(lines_of(tmp_path / "run")) == 2
    answers = (tmp_path / "run" / "evaluation" / "before_L1.jsonl").read_text()
    with coin.context() as patch:
        patch.setattr("dvr1_lite.evaluation.sample_groups", lambda *_, **__: pytest.fail("answered twice"))
        patch.setattr(run_module.Run, "run", lambda self: True)
        train_files(config, resume=True)
    assert (tmp_path / "run" / "evaluation" / "before_L1.jsonl").read_text() == answers
    train_files(config, resume=True)
    assert lines_of(tmp_path / "run") == lines_of(finished[0])


def test_a_folder_with_a_run_is_refused_and_a_finished_run_is_not_repeated(finished, world):
    out, summary = finished
    config = small_config(world, out)
    with pytest.raises(ConfigError, match=r"already holds a run .* --resume .* another --out"):
        train_files(config)
    assert train(config, [], trainer=lambda *_: pytest.fail("loaded"), resume=True) == summary
    with pytest.raises(ConfigError, match="beta was 0.1, now 0.5"):
        train_files(small_config(world, out, beta=0.5), resume=True)


def test_a_failed_start_leaves_the_folder_free(world, tmp_path, coin):
    with pytest.raises(ModelError):
        train_files(small_config(world, tmp_path / "run", model=str(tmp_path)))
    with pytest.raises(ConfigError, match="multiple such as 56"):
        train_files(small_config(world, tmp_path / "run", frame_size=60))
    assert train_files(small_config(world, tmp_path / "run", steps=1, eval_files=[]))["complete"]


def test_the_shipped_model_trains_with_hints_and_noise_and_resumes_exactly(tmp_path, monkeypatch):
    config = make_config({"steps": 3, "history_window": 8, "eval_limit": 24, "save_every": 1, "inner_updates": 2,
                          "prompts_per_step": 6, "out": str(tmp_path / "whole")})  # in NF4, as by default
    summary, lines = train_files(config), lines_of(tmp_path / "whole")
    assert all(line["format_rate"] > 0.9 and 0 < line["accuracy"] < 1 for line in lines)
    assert lines[-1]["hints_found"] > 0 and sum(line["easy"] for line in lines) > 0 and lines[-1]["kl"] > 0
    assert {"L1", "L2", "L3"} == set(summary["before"]) == set(summary["change"])
    assert summary["before"]["L1"]["n"] == 24 and "mean_iou" in summary["before"]["L1"]
    again = replace(config, out=str(tmp_path / "again"))
    with monkeypatch.context() as patch, pytest.raises(OSError):
        crash(patch, Trainer, "augment", 1, OSError("interrupted"))
        train_files(again)
    resumed = train_files(again, resume=True)
    assert lines_of(tmp_path / "again") == lines and adapter_of(tmp_path / "again") == adapter_of(tmp_path / "whole")
    assert resumed["after"] == summary["after"] and resumed["before"] == summary["before"]


# --- checkpoints -----------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


def change_saved(path: Path, change) -> None:
    saved = torch.load(path, weights_only=True)
    change(saved)
    torch.save(saved, path)


DAMAGES = {
    **{f"{name} truncated": lambda folder, name=name: truncate(folder / name)
       for name in ("state.json", "optimizer.pt", "rng.pt", "adapter/adapter_model.safetensors")},
    "no optimizer": lambda folder: (folder / "optimizer.pt").unlink(),
    "no generator": lambda folder: change_saved(folder / "rng.pt", lambda saved: saved.pop("sampling")),
    "a generator of another kind": lambda folder: change_saved(
        folder / "rng.pt", lambda saved: saved.update(sampling=torch.zeros(3, dtype=torch.uint8))),
    "no global generator": lambda folder: change_saved(folder / "rng.pt", lambda saved: saved.pop("global")),
    "an optimizer of another shape": lambda folder: change_saved(
        folder / "optimizer.pt", lambda saved: saved["state"][0].update(exp_avg=torch.zeros(2, 2))),
    "an optimizer of fewer parameters": lambda folder: change_saved(
        folder / "optimizer.pt", lambda saved: saved["param_groups"][0]["params"].pop()),
    "no history": lambda folder: (folder / "state.json").write_text(
        json.dumps({k: v for k, v in json.loads((folder / "state.json").read_text()).items() if k != "history"})),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_gives_way_to_the_one_before_and_then_to_an_error(damage, finished, world, tmp_path, coin):
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    text = (tmp_path / "run" / "config.yaml").read_text().replace(str(finished[0]), str(tmp_path / "run"))
    (tmp_path / "run" / "config.yaml").write_text(text)
    older, newest = checkpoint_folders(tmp_path / "run")
    damage(newest)
    made, step = [], Trainer.step
    coin.setattr(Trainer, "step", lambda self: made.append(self.steps + 1) or step(self))
    assert train_files(small_config(world, tmp_path / "run"), resume=True)["complete"] and made == [3]
    assert lines_of(tmp_path / "run") == lines_of(finished[0])
    assert adapter_of(tmp_path / "run") == adapter_of(finished[0])
    (tmp_path / "run" / "summary.json").unlink()
    for folder in (older, newest):
        damage(folder)
    with pytest.raises(ModelError, match="no checkpoint can be used; start again with another --out. .*step_000003"):
        train_files(small_config(world, tmp_path / "run"), resume=True)


def write_checkpoint(run: Path, step: int, generator: torch.Generator) -> Path:
    def adapter(folder: Path) -> None:
        from safetensors.torch import save_file

        folder.mkdir()
        save_file({"w": torch.ones(1)}, folder / "adapter_model.safetensors")

    return save_checkpoint(run, step, {"position": step}, {"lr": torch.tensor(0.5)}, generator, adapter, keep=2)


def test_only_the_newest_checkpoints_are_kept_and_nothing_unfinished(tmp_path):
    (tmp_path / "checkpoints" / ".unfinished-step_000001").mkdir(parents=True)
    for step in (1, 2, 10):
        write_checkpoint(tmp_path, step, torch.Generator())
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_000002", "step_000010"]


def test_random_states_are_restored(tmp_path):
    generator = torch.Generator().manual_seed(5)
    torch.rand(3, generator=generator)
    checkpoint = read_checkpoint(write_checkpoint(tmp_path, 1, generator))
    draw = lambda g: [torch.rand(2, generator=g).tolist(), torch.rand(2).tolist(), np.random.rand(2).tolist(),
                      random.random()]
    expected, fresh = draw(generator), torch.Generator()
    fresh.set_state(checkpoint.rng["sampling"])
    restore_global_random(checkpoint)
    assert draw(fresh) == expected


class Bomb:
    def __reduce__(self):
        return os.mkdir, (str(Bomb.target),)


def test_a_malicious_checkpoint_runs_nothing(tmp_path):
    Bomb.target = tmp_path / "exploded"
    for name in ("optimizer.pt", "rng.pt"):
        for write in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
            folder = write_checkpoint(tmp_path, 1, torch.Generator())
            write(Bomb(), folder / name)
            with pytest.raises(ModelError, match=f"step_000001: {name} cannot be read"):
                read_checkpoint(folder)
    assert not Bomb.target.exists()


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


def test_ctrl_c_finishes_the_step_and_the_run_is_resumed_later(finished, world, tmp_path, coin, capsys):
    config, augment, notices = small_config(world, tmp_path / "run", save_every=50), Trainer.augment, []

    def interrupted(self, *groups):
        if self.steps == 1:
            os.kill(os.getpid(), signal.SIGINT)
            notices.append(capsys.readouterr().err)  # at once, before the step has ended
        return augment(self, *groups)

    handler = signal.getsignal(signal.SIGINT)
    with coin.context() as patch:
        patch.setattr(Trainer, "augment", interrupted)
        summary = train_files(config)
    assert not summary["complete"] and summary["step"] == 2 and summary["after"] == {} and summary["before"]["L1"]
    assert "this step is finished and saved first. Press Ctrl-C again to stop at once" in notices[0]
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and f"--resume {tmp_path / 'run'}" in printed and "step 2 of 3" in printed
    assert adapter_of(tmp_path / "run")
    assert train_files(config, resume=True)["complete"]
    assert lines_of(tmp_path / "run") == lines_of(finished[0])
    assert signal.getsignal(signal.SIGINT) is handler  # whatever it was: a job in the background ignores Ctrl-C


def test_the_request_to_stop_restores_the_handler():
    before = signal.getsignal(signal.SIGINT)
    with stop_request() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.wait(1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            stop.wait(1)
    assert signal.getsignal(signal.SIGINT) is before


# --- broken clips and numbers ----------------------------------------------------------------------------------------


def test_a_broken_clip_is_skipped_with_its_question_and_counted(tmp_path, coin):
    world, seen = write_world(tmp_path / "world"), watch_training_groups(coin)
    (world / "1.mp4").write_bytes((world / "1.mp4").read_bytes()[:300])
    summary = train_files(small_config(world, tmp_path / "run", eval_files=[]))
    trained = [group.record.record_id for groups in seen for group in groups]
    assert len(trained) == 6 and not any(name.endswith("1") for name in trained)
    assert summary["skipped_clips"] == lines_of(tmp_path / "run")[-1]["skipped_clips"] > 0
    assert "1.mp4" in summary["skipped_examples"][0]


def test_too_many_broken_clips_end_the_run(tmp_path):
    world = write_world(tmp_path / "world")
    for path in world.glob("*.mp4"):
        path.write_bytes(b"")
    config = small_config(world, tmp_path / "run", eval_files=[])
    with pytest.raises(ClipError, match=r"6 of the 6 records tried .* max_broken_share = 0.05") as stopped:
        train_files(config)
    command = f"python -m dvr1_lite train --resume {tmp_path / 'run'} --max-broken-share 0.2"
    assert f"Fix the clips, or raise it: {command}; " in str(stopped.value)
    with pytest.raises(ClipError, match=r"11 of the 11 .* --max-broken-share 0.3;"):
        train_files(replace(config, max_broken_share=0.1), resume=True)
    write_world(tmp_path / "world")
    assert train_files(config, resume=True)["complete"], "the clips were fixed"


def test_a_clip_deleted_before_its_augmentation_is_not_augmented(tmp_path, coin):
    world, sample = write_world(tmp_path / "world"), Trainer.sample

    def delete(self, *arguments):
        for path in world.glob("*.mp4"):
            path.unlink(missing_ok=True)  # their features are cached, their frames are not
        return sample(self, *arguments)

    coin.setattr(Trainer, "sample", delete)
    train_files(small_config(world, tmp_path / "run", eval_files=[], augment="easy", prompts_per_step=6,
                             max_broken_share=0.9))
    lines = lines_of(tmp_path / "run")
    assert sum(line["easy"] for line in lines) == lines[-1]["skipped_clips"] > 0
    assert all(line["augmented"] == 0 for line in lines)


def test_numbers_that_are_not_finite_name_the_record(finished, world, tmp_path, coin):
    augment = Trainer.augment

    def poison(self, *groups):
        if self.steps == 2:
            for parameter in self.policy.trainable():
                parameter.data.fill_(float("nan"))
        return augment(self, *groups)

    with coin.context() as patch, pytest.raises(NumericsError, match=r"record '?(colour|order)\d.*not finite"):
        patch.setattr(Trainer, "augment", poison)
        train_files(small_config(world, tmp_path / "run", eval_files=[], augment="none"))
    assert len(lines_of(tmp_path / "run")) == 2
    assert [folder.name for folder in checkpoint_folders(tmp_path / "run")] == ["step_000001", "step_000002"]
    coin.setattr(training, "score", lambda *_: Score(1.0, float("nan"), None, float("nan"), 2.0))
    with pytest.raises(NumericsError, match=r"reward of record '(colour|order)\d' is not finite"):
        train_files(small_config(world, tmp_path / "reward", eval_files=[]))
    coin.setattr(training, "score", coin_score)
    coin.setattr(training, "objective_loss", lambda batch, config, *_: batch.logp.sum() * float("inf"))
    with pytest.raises(NumericsError, match=r"gradient's norm is (nan|inf) \(records (colour|order)\d"):
        train_files(small_config(world, tmp_path / "gradient", eval_files=[]))

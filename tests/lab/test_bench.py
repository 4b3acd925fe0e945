r"""The benchmark: both ways compute the same step, medians and ratios add up, and bad input is named."""

import json
import types

import pytest
import torch

from dvr1_lite.errors import ConfigError, UserError
from dvr1_lite.lab import bench
from dvr1_lite.lab.bench import Kind, Repeated, Setting, Shared, build_policy

SETTING = Setting(frames=4, group_size=3, completion_tokens=5, inner_updates=2, size=56)
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "vocab_size": 160, "mrope_section": [2, 1, 1]}
VISION = {"hidden_size": 16, "intermediate_size": 32, "depth": 2, "num_heads": 2, "fullatt_block_indexes": [1]}


@pytest.fixture(scope="module", autouse=True)
def policy():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(bench.SHAPES, "tiny", (TEXT, VISION))
        yield build_policy(Kind())


def test_both_ways_compute_the_same_step(policy):
    shared, repeated = Shared(policy, SETTING), Repeated(policy, SETTING)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:  # zero at first, so that A would have no gradient
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    prompts, completions = shared.sample()
    ids, *video = repeated.sample()
    assert torch.equal(ids[:, :-5], prompts[0].input_ids.expand(3, -1)) and completions.mask.all()
    for written in (completions.ids[0], ids[:, -5:]):  # of full length, without a token that would end them
        assert written.shape == (3, 5) and not policy.banned[written].any()
    ids = torch.cat([ids[:, :-5], completions.ids[0]], dim=1)
    gradients, references = [], []
    for way, sampled in ((shared, (prompts, completions)), (repeated, (ids, *video))):
        with torch.no_grad(), policy.reference():
            references.append(way.logprobs(*sampled))
        logp = way.logprobs(*sampled)
        assert (logp - references[-1]).abs().max() > 1e-4  # the adapters do something
        way.loss(logp, logp.detach(), references[-1]).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.trainable()]))
        policy.model.zero_grad()
    torch.testing.assert_close(*references, rtol=0, atol=1e-5)
    assert gradients[0].abs().max() > 0 and (gradients[0] - gradients[1]).abs().max() < 1e-3 * gradients[0].abs().max()


def test_nf4_in_bfloat16_is_measured_like_on_a_gpu():
    pytest.importorskip("bitsandbytes")
    policy, meter = build_policy(Kind("tiny", "nf4", "bfloat16")), bench.Meter("cpu")
    assert type(policy.language.layers[0].mlp.up_proj.base_layer).__name__ == "Linear4bit"
    for way in (Shared, Repeated):
        way(policy, SETTING).step(meter)
    seconds = [meter.phases[phase][0] for phase in bench.PHASES]
    assert min(seconds) > 0 and seconds[3] == pytest.approx(sum(seconds[:3]))


@pytest.mark.parametrize(("change", "message"), [
    ({"frames": 0}, "frames is 0: give 1"), ({"group_size": 2}, "group_size is 2: give 3"),
    ({"completion_tokens": 1}, "completion_tokens is 1"), ({"size": 250}, "multiple of 28")])
def test_impossible_settings_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        Setting(**change)


def test_summaries_are_medians_and_ratios_by_hand():
    def entry(seconds):
        return {phase: (seconds, 2 * seconds, 2**20) for phase in bench.PHASES}

    lines = bench.summary(Kind(), SETTING, 10, [{"repeated": entry(12.0), "shared": entry(s)} for s in (3.0, 9.0, 4.0)])
    step, update = lines[3], lines[2]
    assert step["n"] == 3 and step["shared, s"] == 4 and step["shared, MB"] == 1 and step["repeated / shared"] == 3
    assert step["by processor time"] == 3
    assert update["phase"] == "forward + backward" and update["shared, s"] == 2  # of one of two updates
    assert step["token ratio"] == 1.8  # G (P + T) / (P + G T) with P = 10, G = 3, T = 5


def test_ctrl_c_keeps_the_settings_that_were_measured(tmp_path, monkeypatch):
    def rounds(ways, repeats, device):
        if ways["shared"].setting.frames == 4:
            raise KeyboardInterrupt
        yield from measure(ways, repeats, device)

    measure = bench.rounds
    monkeypatch.setattr(bench, "rounds", rounds)
    result, stopped = bench.bench([Kind()], bench.settings((2, 4), (3,), 4, (1, 2), 56), command="bench -x", repeats=1,
                                  note="a busy machine", json_file=tmp_path / "a" / "b.json", table_file=tmp_path / "t")
    table = (tmp_path / "t").read_text()
    assert stopped and json.loads((tmp_path / "a" / "b.json").read_text()) == json.loads(json.dumps(result))
    assert [line["frames"] for line in result["settings"]] == [2] * 4 and bench.as_table(result) == table
    assert table.count("| step |") == 1 and "a busy machine" in table and "`bench -x`" in table


def test_too_little_memory_names_what_to_lower():
    def fail(meter):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match="the shared way ran out of memory.*--micro-batch"):
        list(bench.rounds({"shared": types.SimpleNamespace(step=fail)}, 1, "cpu"))

r"""The benchmark: its ways do the same work, its figures add up, its table and its bad input."""

import json
import sys
import types

import pytest
import torch

from dvr1_lite import __main__ as cli
from dvr1_lite import bench, profiling
from dvr1_lite.bench import Kind, Plan, Setting
from dvr1_lite.errors import ConfigError, ModelError

SMALL = bench.Shape("small", 32, 48, 2, 4, 160, (2, 1, 1), 16, 32, 2, 2, (1,))
SETTING = Setting(frames=4, group_size=3, completion_tokens=5, inner_updates=2, size=56)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(bench.SHAPES, "tiny", SMALL)


@pytest.fixture
def ways():
    policy, clip = bench.build_policy(Kind(dtype="float32")), bench.make_clip(SETTING)
    return bench.Shared(policy, SETTING, clip), bench.Repeated(bench.repeated_model(Kind()), policy, SETTING, clip)


def gradient(parameters) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in parameters])


def test_the_opponent_computes_the_same_step(ways):
    shared, repeated = ways
    prompts, completions = shared.sample()
    ids = torch.cat([prompts[0].input_ids.expand(3, -1), completions.ids[0]], dim=1)
    video = repeated.pixels()
    for way in ways:
        for name, parameter in (shared.policy.model if way is shared else repeated.model).named_parameters():
            if "lora_B" in name:  # zero at first, so that A would have no gradient
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    with torch.no_grad(), repeated.model.disable_adapter():
        reference = repeated.logprobs(ids, video)
    mine = shared.policy.logprobs(prompts, completions, reference=True)
    torch.testing.assert_close(mine, reference, rtol=0, atol=1e-5)
    logp = repeated.logprobs(ids, video)
    assert (logp - reference).abs().max() > 1e-4
    loss, _ = repeated.updates.objective(reference)(logp)
    loss.backward()
    ours, _, mine = shared.policy.backward(prompts, completions, shared.updates.objective(reference))
    torch.testing.assert_close(mine, logp.detach(), rtol=0, atol=1e-5)
    assert ours == pytest.approx(float(loss.detach()), abs=1e-4)
    a, b = gradient(shared.updates.parameters), gradient(repeated.updates.parameters)
    assert a.abs().max() > 0 and (a - b).abs().max() < 1e-3 * b.abs().max()


def test_completions_have_their_full_length_and_no_banned_token(ways):
    shared, repeated = ways
    prompts, completions = shared.sample()
    assert completions.ids.shape == (1, 3, 5) and completions.mask.all()
    ids = repeated.sample(repeated.pixels())
    assert torch.equal(ids[:, :-5], prompts[0].input_ids.expand(3, -1))
    for written in (completions.ids[0], ids[:, -5:]):
        assert written.shape == (3, 5) and not shared.policy.banned[written].any()


def test_weights_are_the_same_for_all_ways():
    policy, model = bench.build_policy(Kind()), bench.repeated_model(Kind())
    pairs = zip(policy.model.named_parameters(), model.named_parameters(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
    assert model.base_model.model.model.language_model.config._attn_implementation == "sdpa"


def test_token_ratio_and_visual_tokens():
    setting = Setting()
    assert setting.visual_tokens == 8 * 81
    assert setting.token_ratio(662) == pytest.approx(8 * (662 + 64) / (662 + 8 * 64))
    assert Setting(group_size=1).token_ratio(100) == 1


def test_images_have_as_many_tokens_as_the_clip():
    pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    tokenizer = bench.build_tokenizer()
    row = bench._image_row(SETTING, bench.make_clip(SETTING))
    content = [*({"type": "image", "image": image} for image in row["images"]),
               {"type": "text", "text": bench.QUESTION}]
    given = bench._image_processor(tokenizer).apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt")
    assert (given["input_ids"] == tokenizer.convert_tokens_to_ids("<|image_pad|>")).sum() == SETTING.visual_tokens
    assert given["pixel_values"].shape == (4 * SETTING.visual_tokens, 1176)


def test_text_prompt_has_the_length_that_was_asked_for():
    tokenizer = bench.build_tokenizer()
    row = bench._text_row(tokenizer, 50)
    ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert len(ids) == 50


# --- plan ------------------------------------------------------------------------------------------------------------


def test_the_middle_comes_first_and_the_corners_last():
    settings = Plan().settings()
    assert len(settings) == 10 and len(set(settings)) == 10
    assert [(s.frames, s.group_size, s.inner_updates) for s in settings[:2]] == [(16, 8, 1), (16, 8, 4)]
    assert {(s.frames, s.group_size) for s in settings[2:6]} == {(8, 8), (32, 8), (16, 4), (16, 16)}
    assert {s.inner_updates for s in settings[2:]} == {1} and {s.completion_tokens for s in settings} == {64}


@pytest.mark.parametrize(("wrong", "told"), [
    ({"frames": ()}, "frames is empty"), ({"frames": (8, 0)}, "frames is 8 0: give 1"),
    ({"group_sizes": (2,)}, "group_size is 2: give 3"), ({"completion_tokens": 1}, "completion_tokens is 1"),
    ({"inner_updates": (0,)}, "inner_updates"), ({"repeats": 0}, "repeats is 0"), ({"size": 250}, "multiple of 28"),
    ({"ways": ("shared", "vllm")}, "vllm.*shared, repeated, trl"), ({"micro_batch": -1}, "micro_batch"),
])
def test_impossible_plans(wrong, told):
    with pytest.raises(ConfigError, match=told):
        Plan(**wrong)


@pytest.mark.parametrize(("arguments", "told"), [
    (["--group-size", "2"], "group_size is 2"), (["--frames"], "expected at least one argument"),
    (["--ways", "vllm"], "invalid choice"), (["--threads", "0"], "--threads is 0"),
    (["--profile", "--profile-steps", "0"], "--profile-steps is 0"), (["--model", "7B"], "invalid choice"),
])
def test_bad_options(arguments, told, capsys):
    assert cli.main(["bench", *arguments]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there():
    with pytest.raises(ModelError, match="no GPU"):
        bench.kinds("cuda")


def test_kinds_by_device(monkeypatch):
    monkeypatch.setattr(bench, "check_device", lambda device, dtype: None)
    assert bench.kinds("cpu") == [Kind()] and bench.completion_tokens(Kind()) == 64
    kinds = bench.kinds("cuda")
    assert [k.quantization for k in kinds] == ["none", "nf4"]
    assert {(k.model, k.dtype, k.device) for k in kinds} == {("3B", "bfloat16", "cuda")}
    assert bench.completion_tokens(kinds[0]) == 256


# --- time and memory -------------------------------------------------------------------------------------------------


def test_phases_nest_and_repeat():
    watch = bench.Watch("cpu")
    with watch.phase("outer"):
        for _ in range(2):
            with watch.phase("inner"):
                sum(range(200_000))
    assert 0 < watch.seconds["inner"] <= watch.seconds["outer"] and watch.processor["inner"] > 0
    assert not watch.open
    watch.begin()
    assert not watch.seconds and not watch.peaks


@pytest.mark.skipif(not bench.Meter("cpu").known, reason="peaks of a CPU's memory are measured on Linux")
def test_a_peak_belongs_to_its_phase_and_those_around_it():
    watch, megabyte = bench.Watch("cpu"), 2**20
    with watch.phase("outer"):
        with watch.phase("large"):
            torch.ones(64 * megabyte, dtype=torch.uint8)
        with watch.phase("small"):
            torch.ones(megabyte, dtype=torch.uint8)
    assert 60 * megabyte < watch.peaks["large"] < 100 * megabyte
    assert watch.peaks["small"] < 20 * megabyte and watch.peaks["outer"] >= watch.peaks["large"]


def rounds(*shared_seconds):
    def entry(seconds):
        return {"seconds": dict.fromkeys(bench.PHASES, seconds), "processor": dict.fromkeys(bench.PHASES, 2 * seconds),
                "bytes": dict.fromkeys(bench.PHASES, 2**20)}

    return [{"repeated": entry(12.0), "shared": entry(seconds)} for seconds in shared_seconds]


def test_figures_are_medians_and_ratios():
    row = bench.figures(Kind(), SETTING, 10, {"shared": "ours", "repeated": "theirs", "trl": "not measured"},
                        rounds(3.0, 100.0, 4.0))
    assert list(row["ways"]) == ["shared", "repeated"] and row["not_measured"] == {"trl": "not measured"}
    assert row["n"] == 3 and row["ways"]["shared"]["step"]["seconds"] == 4
    assert row["ways"]["shared"]["forward + backward"]["seconds"] == 2  # of one of two updates
    assert row["ratios"]["repeated"]["step"] == row["processor_ratios"]["repeated"]["step"] == 3
    assert row["token_ratio"] == pytest.approx(3 * 15 / 25)
    assert row["reached"]["repeated"]["step"] == pytest.approx(3 / 1.8)
    assert row["tokens_per_second"]["step"] == 15 / 4 and "card" not in row


def test_operations_count_the_weights_of_the_model():
    model = bench.build_model(Kind(device="meta"), bench.build_tokenizer())
    count = lambda layers: sum(p.numel() for name, p in layers.named_parameters() if name.endswith("weight")
                               and p.ndim == 2)
    language, vision = count(model.model.language_model.layers), count(model.model.visual.blocks)
    head, written = 160 * 32 * 15, 15
    expected = 2 * (6 * ((10 + written) * language + head) + 4 * SETTING.visual_tokens * vision)
    assert bench.step_operations(SMALL, SETTING, 10) == expected


@pytest.mark.parametrize(("name", "known"), [("NVIDIA H200", True), ("Some Card", False)])
def test_share_of_the_cards_peak(name, known, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device=None: 2**30)
    row = bench.figures(Kind(device="cpu"), SETTING, 10, {"shared": "", "repeated": ""}, rounds(1.0))
    row |= bench._card(Kind(device="cuda"), SETTING, 10, row["ways"]["shared"])
    assert row["held_gb"] == 1 and (row["share_of_peak"] is not None) == known
    assert name in bench._card_line(row) and ("unknown" in bench._card_line(row)) != known


# --- whole runs ------------------------------------------------------------------------------------------------------

def test_without_trl_the_table_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "trl", None)  # cannot be imported
    arguments = "--frames 2 4 --group-size 3 --completion-tokens 4 --inner-updates 1 2 --size 56 --repeats 1".split()
    files = ["--json", str(tmp_path / "a" / "b.json"), "--table", str(tmp_path / "t.md"), "--note", "a busy machine"]
    assert cli.main(["bench", *arguments, *files]) == 0
    result, table = json.loads((tmp_path / "a" / "b.json").read_text()), (tmp_path / "t.md").read_text()
    assert table in capsys.readouterr().out + "\n"
    first, second = result["settings"][:2]
    assert (first["frames"], first["group_size"]) == (4, 3) and second == second | {"frames": 4, "inner_updates": 2}
    assert len(result["settings"]) == 3 and result["threads"] == torch.get_num_threads()
    for row in result["settings"]:
        assert row["n"] == 1 and set(row["ways"]) == {"shared", "repeated"} and row["ratios"]["repeated"]["step"] > 0
        assert "TRL cannot be imported" in row["not_measured"]["trl"]
        for way in row["ways"].values():
            parts = sum(way[p]["seconds"] * (row["inner_updates"] if "+" in p else 1) for p in bench.PHASES[:-1])
            assert 0 < parts and way["step"]["processor_seconds"] > 0
    for told in ("not measured: TRL", "Growth of the step with frames 2, 4", "a busy", "'a busy machine'", "torch",
                 "| 4 | 3 | 2 |"):
        assert told in table, told


def test_a_way_without_enough_memory_is_left_out(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    shared = types.SimpleNamespace(round=lambda watch: watch.enter("step") or watch.leave("step"))
    ways, told = {"shared": shared, "repeated": types.SimpleNamespace(round=fail)}, {"shared": "ours"}
    entries = list(bench._rounds(ways, told, 2, "cpu"))
    assert [set(entry) for entry in entries] == [{"shared"}] * 3 and "out of memory" in told["repeated"]
    with pytest.raises(ConfigError, match="--micro-batch"):
        list(bench._rounds({"shared": types.SimpleNamespace(round=fail)}, {}, 1, "cpu"))


def test_images_give_way_to_text(monkeypatch):
    def build(*_, images=True):
        if images:
            raise ImportError("no such processor")
        return types.SimpleNamespace(prompt="text of 20 tokens")

    monkeypatch.setattr(bench, "build_trl", build)
    assert bench._trl(Kind(), SETTING, None, 20, "")[1] == (
        "TRL on text of 20 tokens (no image processor: no such processor)")


@pytest.mark.parametrize(("steps", "kept"), [(1, []), (2, [1]), (5, [2, 1])])
def test_ctrl_c_leaves_what_was_measured(steps, kept, monkeypatch, tmp_path):
    def stop(self, watch, real=bench.Shared.round):
        calls.append(1)
        if len(calls) > steps:
            raise KeyboardInterrupt
        real(self, watch)

    calls = []
    monkeypatch.setattr(bench.Shared, "round", stop)
    result, stopped = bench.bench([Kind()], Plan((2, 4), (3,), 4, (1,), 56, 2, ("shared",)), command="bench",
                                  json_file=tmp_path / "b.json", progress=False)
    assert stopped and json.loads((tmp_path / "b.json").read_text()) == json.loads(json.dumps(result))
    assert [row["n"] for row in result["settings"]] == kept  # of each setting the first step is to warm up
    assert bench.as_table(result)


def test_ctrl_c_before_anything_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(bench.Shared, "round", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main(["bench", "--ways", "shared", "--frames", "2", "--size", "56", "--group-size", "3"]) == 130
    assert "Nothing was measured" in capsys.readouterr().out


@pytest.mark.parametrize("quantization", ("none", "nf4"))
def test_the_gpus_kinds_on_a_cpu(quantization, monkeypatch):
    if quantization == "nf4":
        pytest.importorskip("bitsandbytes")
    monkeypatch.setitem(bench.SHAPES, "3B", bench.Shape("wide", 64, 128, 2, 4, 160, (2, 3, 3), 16, 32, 2, 2, (1,)))
    kind = Kind("3B", quantization, "bfloat16")
    result = {"settings": []}
    plan = Plan((2,), (3,), 4, (2,), 56, 1, ("shared", "repeated"))
    assert not bench.measure(kind, plan, result, lambda _: None, progress=False)
    row, = result["settings"]
    assert row["kind"] == f"3B, {'NF4 in ' if quantization == 'nf4' else ''}bfloat16, cpu" and row["n"] == 1
    linear = bench.build_policy(kind).language.layers[0].mlp.up_proj.base_layer
    assert (type(linear).__name__ == "Linear4bit") == (quantization == "nf4")
    state = getattr(linear.weight, "quant_state", None)
    assert (state is not None and state.quant_type == "nf4" and state.nested) == (quantization == "nf4")


@pytest.mark.slow
@pytest.mark.parametrize("images", (True, False))
def test_trl_makes_the_same_number_of_updates(images, tmp_path):
    pytest.importorskip("trl")
    clip = bench.make_clip(SETTING)
    way = bench.build_trl(Kind(), SETTING, clip, 30, str(tmp_path), images)
    seen, watch = [], bench.Watch("cpu")
    real = way.trainer._get_per_token_logps_and_entropies
    way.trainer._get_per_token_logps_and_entropies = lambda *a, **k: seen.append(a[1:4]) or real(*a, **k)
    for number in (1, 2):
        watch.begin()
        way.round(watch)
        assert way.trainer.state.global_step == 2 and way.trainer._step == 2 * number
        assert all(watch.seconds[phase] > 0 for phase in bench.PHASES)
    ids, _, length = seen[-1]
    assert length == 5 and len(ids) == 3 and len(seen) == 2 * (1 + 1 + 2)  # old, reference, two updates
    if images:
        pad = way.trainer.processing_class.image_token_id
        assert (ids == pad).sum(1).tolist() == [SETTING.visual_tokens] * 3
    else:
        assert ids.shape[1] == 30 + 5


# --- profile ---------------------------------------------------------------------------------------------------------


def test_each_second_belongs_to_the_innermost_part(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: float(next(clock)))
    parts = profiling.Parts()
    inner = parts.wrap("inner", lambda: None)
    outer = parts.wrap(profiling.REST, lambda: (inner(), inner()))
    inner()  # outside a step: not counted
    outer()
    assert dict(parts.seconds) == {profiling.REST: 3, "inner": 2} and parts.calls["inner"] == 2
    whole = parts.wrap("objective", inner)
    parts.wrap(profiling.REST, whole)()
    assert parts.calls["inner"] == 2 and parts.seconds["objective"] == 1


def test_profile_of_a_small_run(tmp_path, monkeypatch):
    from small_run import reward_by_coin, small_config, write_world

    world = write_world(tmp_path)
    reward_by_coin(monkeypatch)
    given = vars(small_config(world, tmp_path / "unused"))
    names = ("model", "train_file", "num_frames", "prompts_per_step", "group_size", "max_new_tokens", "inner_updates",
             "lora_rank")
    torch.optim.AdamW([torch.zeros(1)])  # the first one ever wraps the class's step for torch's own profiler
    before = {(owner, name): getattr(owner, name) for places in profiling.PARTS.values() for owner, name in places}
    found = profiling.profile(2, {name: given[name] for name in names})
    assert all(getattr(owner, name) is old for (owner, name), old in before.items())
    assert not (tmp_path / "unused").exists()
    shares = {part: row["share"] for part, row in found["parts"].items()}
    assert sum(shares.values()) == pytest.approx(1)
    assert sum(row["processor_share"] for row in found["parts"].values()) == pytest.approx(1)
    assert found["share_in_model"] == pytest.approx(shares["model forward"] + shares["model backward"])
    assert 0.2 < found["share_in_model"] < 1 and found["parts"]["model backward"]["calls"] == 2
    assert {"optimizer, with the gradient's norm", "objective", "rewards", "prompts"} <= set(shares)
    assert "| model backward |" in profiling.as_table(found)


def test_profile_from_the_command_line(monkeypatch, tmp_path, capsys):
    parts = profiling.Parts()
    parts.seconds.update({"model forward": 3.0, "rewards": 1.0})
    parts.processor.update({"model forward": 9.0, "rewards": 1.0})
    monkeypatch.setattr(profiling, "profile", lambda steps, overrides: profiling.figures(
        types.SimpleNamespace(model="m", quantization="nf4", method="reg-grpo", device="cpu"), steps, parts))
    assert cli.main(["bench", "--profile", "--profile-steps", "2", "--json", str(tmp_path / "p.json")]) == 0
    assert json.loads((tmp_path / "p.json").read_text())["share_in_model"] == 0.75
    told = capsys.readouterr().out
    assert "takes 2.00 s; 75% of it" in told and "90% by processor time" in told

"""What the benchmark counts and compares."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from dpo_jax import (
    assemble,
    benchmark,
    benchmark_counts,
    benchmark_flops,
    benchmark_layouts,
    benchmark_logps,
    benchmark_peers,
    benchmark_table,
    benchmark_worker,
    config,
    inputs,
    logps,
    losses,
    sharding,
)
from dpo_jax.data import pack, rows
from dpo_jax.model import decoder, presets, weights
from scripts import benchmark as scripts_benchmark
from scripts import benchmark_trl, benchmark_tunix
from tests import tiny


def test_the_padded_layout_scores_what_packed_rows_score(draw_examples):
    model = decoder.Decoder(tiny.DECODER)
    params = tiny.draw_params(tiny.DECODER)
    data = draw_examples(8, vocabulary=40)
    packed = pack.batch(data, pack.plan(data, 8, 1, seed=0), 0)
    index, filled = packed.pop("index"), packed["weight"] > 0
    scored = jax.jit(lambda rows: logps.score(model, params, rows))(packed)
    padded = benchmark_layouts.pad(data, np.arange(8))
    assert padded["tokens"].shape == (16, 64)
    found = jax.jit(lambda rows: benchmark_layouts.score_padded(model, params, rows))(padded)
    for name in data.names:
        expected = np.asarray(found[name].total)[index[filled]]
        np.testing.assert_allclose(np.asarray(scored[name].total)[filled], expected, rtol=1e-4)
        lengths = np.asarray(found[name].length)[index[filled]]
        np.testing.assert_array_equal(np.asarray(scored[name].length)[filled], lengths)


def test_the_floor_counts_each_distinct_token_scored_token_and_visible_pair_once(draw_examples):
    data = draw_examples(1)
    # a prompt of 3 tokens, completions of 2 and 4
    data = dataclasses.replace(
        data,
        prompts=np.array([[0, 3]]),
        completions=np.array([[[3, 5], [5, 9]]]),
    )
    shape = tiny.DECODER
    # query and output 24 x 24, key and value 24 x 12, three matrices of 24 x 32, in 2 layers
    body = 2 * (2 * 24 * 24 + 2 * 24 * 12 + 3 * 24 * 32)
    # the prompt's 1 + 2 + 3; then 4 + 5, and 4 + 5 + 6 + 7
    pairs = 6 + 9 + 22
    forward = 2 * body * 9 + 2 * 24 * 40 * 6 + 2 * 4 * 24 * pairs
    chosen = np.array([0])
    assert benchmark_flops.floor_flops(shape, data, chosen) == 4 * forward
    found = benchmark_flops.floor_flops(shape, data, chosen, has_reference=False)
    assert found == 3 * forward
    # of an adapter's base no weight has a gradient
    found = benchmark_flops.floor_flops(shape, data, chosen, is_adapter=True)
    assert found == 3 * forward


def test_the_floor_has_no_gradient_of_mismatched_completions(draw_examples):
    data = draw_examples(1, ("completion", "mismatched"))
    data = dataclasses.replace(
        data, prompts=np.array([[0, 3]]), completions=np.array([[[3, 5], [5, 9]]])
    )
    body, head = 2 * (2 * 24 * 24 + 2 * 24 * 12 + 3 * 24 * 32), 24 * 40
    # of the prompt and the completion four times, of the mismatched one twice
    expected = 2 * body * (4 * (3 + 2) + 2 * 4) + 2 * head * (4 * 2 + 2 * 4)
    expected += 2 * 4 * 24 * (4 * (6 + 9) + 2 * 22)
    assert benchmark_flops.floor_flops(tiny.DECODER, data, np.array([0])) == expected


def test_flops_of_steps_are_of_each_batchs_shape_on_all_devices():
    mesh = sharding.make_mesh(config.Mesh(data=8, fsdp=1), jax.devices())
    jitted = jax.jit(lambda state, rows: rows @ state)
    compiled = []

    def compile(state, batch: dict):
        compiled.append(batch["rows"].shape)
        return jitted.lower(state, batch["rows"]).compile()

    batches = [{"rows": np.ones((size, 4), np.float32)} for size in (8, 16, 8)]
    stepper = benchmark_layouts.Stepper(jitted, compile, lambda batch: {}, None, iter(()))
    state = jax.device_put(np.ones((4, 4), np.float32), sharding.replicated(mesh))
    placed = [jax.device_put(batch, sharding.rows(mesh)) for batch in batches]
    found = benchmark_layouts.count_flops(stepper, state, placed)
    assert found == {"flops": 2 * (8 + 16 + 8) * 4 * 4, "uncounted": []}
    assert compiled == [(8, 4), (16, 4)]


def test_a_run_is_trimmed_to_its_steps(folder, tmp_path):
    run = tiny.experiment(
        folder,
        tmp_path,
        **{"optimizer.schedule": "linear", "optimizer.warmup_steps": 3, "data.held_out": 5},
    )
    found = benchmark.trimmed(run, 2)
    assert (found.steps, found.evaluate_every, found.samples.count) == (2, None, 0)
    assert (found.optimizer.warmup_steps, found.optimizer.schedule) == (0, "constant")
    assert (found.data.evaluation_source, found.data.held_out) == (None, 0)
    assert found.loss == run.loss and found.batch_size == run.batch_size


def test_an_epochs_flops_are_those_of_its_steps_against_their_floor(folder, tmp_path):
    run = tiny.experiment(folder, tmp_path)
    record = benchmark_counts.count(run)
    assert (record["steps"], record["batch_size"], record["uncounted"]) == (7, 8, [])
    mesh = sharding.make_mesh(run.mesh, jax.devices())
    stepper = benchmark_layouts.make_packed(benchmark.trimmed(run, benchmark.LONG_RUN), mesh)
    batches = [batch for batch, _ in itertools.islice(stepper.batches, 7)]
    assert {tuple(shape[:2]) for shape in record["shapes"]} == {
        batch["tokens"].shape for batch in batches
    }
    tokens = sum(int((np.asarray(batch["example"]) > 0).sum()) for batch in batches)
    assert record["fill"] == tokens / sum(batch["tokens"].size for batch in batches)
    flops = benchmark_layouts.count_flops(stepper, stepper.state, batches)["flops"]
    assert record["flops_per_useful_token"] == flops / tokens
    data, plan, _ = assemble.assemble(benchmark.trimmed(run, benchmark.LONG_RUN), mesh)[0].train
    floor = sum(
        benchmark_flops.floor_flops(presets.PRESETS["tiny"], data, pack.examples(plan, step))
        for step in range(7)
    )
    np.testing.assert_allclose(record["flops_over_floor"], flops / floor, rtol=1e-12)
    assert "| 8 examples |" in benchmark_counts.describe(record)


def test_an_epoch_of_batches_counted_in_tokens_is_counted_too(folder, tmp_path):
    run = tiny.experiment(folder, tmp_path, batch_tokens=2048)
    record = benchmark_counts.count(run)
    assert record["batch_tokens"] == 2048 and record["flops_over_floor"] > 1
    assert "| 2,048 tokens |" in benchmark_counts.describe(record)


RECORD = {
    "settings": {"batch_size": 8},
    "left_out": ["tunix is left out: it has no loss kto"],
    "loss": "kto",
    "model": "tiny",
    "adapter": 4,
    "data": "rows.jsonl",
    "dtype": "float32",
    "device": "cpu",
    "devices": 1,
    "floor_flops_per_useful_token": 2e6,
    "matmul_flops_per_second": 4e9,
    "results": [
        {"name": "packed", "rates": [1000.0, 900.0, 1100.0], "fill": 0.9}
        | {"first_step": 4.0, "first_step_again": 2.5}
        | {"compile": 3.0, "peak": 2**30, "flops": {"float32": 3e6}, "products": {}, "loss": 0.5}
        | {"uncounted": ["loop while.1", "fft f"]},
        {"name": "trl", "rates": [100.0, 180.0, 55.0], "fill": None}
        | {"first_step": 9.0, "first_step_again": None}
        | {"compile": None, "peak": 2**31, "flops": {"float32": 1e6, "bfloat16": 8e6}, "loss": 0.5}
        | {"products": {"float32": 2e9, "bfloat16": 8e9}, "uncounted": []},
        {"name": "other", "rates": [100.0, 90.0, 110.0], "fill": None}
        | {"first_step": 9.0, "first_step_again": None}
        | {"compile": None, "peak": 2**31, "flops": {}, "products": {}, "uncounted": [], "loss": 1},
    ],
}


def test_the_table_has_medians_and_ratios_round_by_round():
    table = benchmark_table.describe(RECORD).splitlines()
    assert table[0].startswith("kto of tiny, an adapter of rank 4 on ")
    # 3 MFLOP where the floor is 2
    numbers = "1.00 | 1.00 | 100% | 90.0% | 1.50 | 50% | 1.00 GiB | 4.0 s | 2.5 s | 3.0 s |"
    assert f"| packed | 1,000 (900 to 1,100) | {numbers}" in table
    # 10, 5 and 20; 0.5 and 1 ms of products where packed has 3 / 4 ms: of a bound of 2, five times
    numbers = "10.00 | 2.00 | 500% |  | 4.50 | 5% | 2.00 GiB | 9.0 s |  |  |"
    assert f"| trl | 100 (55 to 180) | {numbers}" in table
    assert "| other | 100 (90 to 110) | 10.00 |  |  |  |  | 5% | 2.00 GiB | 9.0 s |  |  |" in table
    assert "tunix is left out: it has no loss kto" in table
    assert "Loss of the first step: packed 0.5000, trl 0.5000, other 1.0000." in table
    assert table[-1] == "Not in the FLOPs of packed: loop while.1; fft f."


def test_no_bound_is_told_from_a_rate_that_was_not_measured():
    assert benchmark_flops.shortest_time({"bfloat16": 1e9}, {"float32": 1e9}) is None
    assert benchmark_flops.shortest_time({"bfloat16": 0.0, "float32": 2e9}, {"float32": 1e9}) == 2


def test_peers_that_lack_the_loss_are_left_out_by_name(folder, tmp_path):
    run = tiny.experiment(folder, tmp_path, loss=config.Loss(losses.kto))
    found, left_out = benchmark_peers.commands({"trl-fast": "p", "tunix": "q"}, run, "f")
    assert list(found) == ["trl-fast"] and found["trl-fast"][2:] == ["f", "trl-fast"]
    assert Path(found["trl-fast"][1]).is_file()
    assert left_out == ["tunix is left out: it has no loss kto"]
    with pytest.raises(ValueError, match="there is no peer 'trl-fats'"):
        benchmark_peers.commands({"trl-fats": "p"}, run, "f")


def test_an_adapter_has_only_the_peers_that_train_one(folder, tmp_path):
    run = tiny.experiment(folder, tmp_path).replace(lora=config.Lora(rank=4))
    found, left_out = benchmark_peers.commands({"trl-liger": "p", "tunix": "q"}, run, "f")
    assert list(found) == ["trl-liger"]
    assert left_out == ["tunix is left out: it trains all parameters, and no adapter"]
    found, left_out = benchmark_layouts.possible(run, ["packed", "padded"])
    assert found == ["packed"]
    assert left_out == ["padded is left out: it trains all parameters, and no adapter"]
    run = run.replace(lora=config.Lora(rank=4, targets=("query",)))
    with pytest.raises(ValueError, match=r"lora.targets is \('query',\), and peers adapt all"):
        benchmark_peers.commands({"trl-liger": "p"}, run, "f")


def test_peers_start_from_the_merged_policy_or_from_its_shape_alone(folder, tmp_path):
    run = tiny.experiment(folder, tmp_path).replace(lora=config.Lora(rank=4))
    mesh = sharding.make_mesh(run.mesh, jax.devices())
    found = inputs.load(run, mesh)
    for name, random_weights in (("drawn", True), ("written", False)):
        (tmp_path / name).mkdir()
        benchmark_peers.write_model(tmp_path / name, found, mesh, random_weights)
    assert not list((tmp_path / "drawn" / "model").glob("*.safetensors"))
    settings = json.loads((tmp_path / "drawn" / "model" / "config.json").read_text())
    assert settings["hidden_size"] == found.initial.model.config.width
    shape, params = weights.load(tmp_path / "written" / "model", mesh)
    assert shape == found.initial.model.config
    np.testing.assert_array_equal(params["embedding"], found.initial.base["embedding"])


def test_random_weights_are_of_a_preset(folder, tmp_path):
    run = tiny.experiment(folder, tmp_path, **{"model.source": str(folder)})
    with pytest.raises(ValueError, match="--random-weights are those of a preset"):
        benchmark.run(run, tiny.FILE, [], benchmark.Settings(random_weights=True))


def test_a_peer_that_draws_no_weights_is_left_out_where_none_are_written(folder, tmp_path):
    run = tiny.experiment(folder, tmp_path)
    found, left_out = benchmark_peers.commands({"trl": "p", "tunix": "q"}, run, "f", True)
    assert list(found) == ["trl"]
    assert left_out == ["tunix is left out: it draws no weights itself"]


@pytest.mark.parametrize("flag", ["--once", "--random-weights"])
def test_a_flag_of_a_race_is_refused_where_there_is_none(flag, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark", "--flops", "experiments/dpo.py", flag])
    with pytest.raises(SystemExit) as ended:
        scripts_benchmark.main()
    assert ended.value.code == 2
    assert f"{flag} is of a race, and --flops is none: leave one out" in capsys.readouterr().err


def test_contenders_share_a_gpus_memory(tmp_path):
    program = """
import json, os, sys
say = lambda message: print("benchmark: " + json.dumps(message), flush=True)
memory = [os.environ["XLA_PYTHON_CLIENT_" + name] for name in ("PREALLOCATE", "ALLOCATOR")]
say({"ready": True, "loss": 1, "first_step": 1, "memory": memory})
"""
    started = benchmark.start("packed", [sys.executable, "-c", program], str(tmp_path))
    benchmark.end(started.process)
    assert started.ready["memory"] == ["false", "default"]


def test_products_are_counted_as_often_as_they_are_timed(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(benchmark_layouts.time, "perf_counter", lambda: next(clock))
    assert benchmark_layouts.matmul_rate(np.float32, 16) == 2 * 16**3
    monkeypatch.setattr(benchmark_layouts.jax, "default_backend", lambda: "gpu")
    assert benchmark_layouts.matmul_rate(np.float32, 16) == 10 * 2 * 16**3


def test_layouts_that_the_run_cannot_have_are_left_out_by_name(folder, tmp_path):
    run = tiny.experiment(folder, tmp_path, loss=config.Loss(losses.orpo_prompt))
    run = run.replace(reference=config.Reference(source=None))
    found, left_out = benchmark_layouts.possible(run, ["packed", "cached", "padded"])
    assert found == ["packed"]
    assert [line.split(" is left out")[0] for line in left_out] == ["cached", "padded"]


def test_peers_are_given_the_run_and_each_steps_examples(draw_examples, tmp_path):
    data = draw_examples(4, ("completion", "mismatched"))
    loss = config.Loss(losses.kto, beta=0.2)
    run = config.Experiment(loss=loss, steps=1, batch_size=2, lora=config.Lora(rank=4, alpha=8))
    benchmark_peers.write_examples(tmp_path, run, data, [np.array([2, 1])])
    record = json.loads((tmp_path / "examples.json").read_text())
    assert (record["loss"], record["hyperparameters"]["beta"]) == ("kto", 0.2)
    assert (record["lora"]["r"], record["lora"]["lora_alpha"]) == (4, 8)
    ((first, second),) = record["steps"]
    assert (first["desirable"], second["desirable"]) == (1.0, 0.0)
    start, stop = data.completions[2, 1]
    assert first["mismatched"] == data.tokens[start:stop].tolist()
    assert first["prompt"] == data.tokens[slice(*data.prompts[2])].tolist()


def test_other_trainers_take_the_same_examples_in_steps_of_a_plain_shuffle(draw_examples):
    data = draw_examples(400, tokens=(1, 90))
    plan = pack.plan(data, 8, 1, seed=0)
    own = [pack.examples(plan, step) for step in range(40)]
    mixed = benchmark.shuffled(own, 0)
    assert [len(one) for one in mixed] == [8] * 40
    assert sorted(np.concatenate(mixed)) == sorted(np.concatenate(own))
    even, uneven = (np.std(benchmark.useful_tokens(data, steps)) for steps in (own, mixed))
    assert uneven > 5 * even
    expected = sum(rows.sizes(data).tokens[one].sum() for one in mixed)
    assert sum(benchmark.useful_tokens(data, mixed)) == expected


def test_a_race_has_even_steps_for_packed_rows_and_a_plain_shuffle_of_them_for_padded_ones(
    folder, tmp_path, monkeypatch
):
    run = tiny.experiment(folder, tmp_path, batch_size=8)
    seen = {}

    def load(*arguments):
        seen["inputs"] = inputs.load(*arguments)
        return seen["inputs"]

    def race(layouts, peers, folder, useful, settings):
        seen.update(useful, steps=np.load(Path(folder) / benchmark_layouts.STEPS))
        # contenders have the memory
        leaves = jax.tree.leaves(seen["inputs"].initial.params)
        assert leaves and all(leaf.is_deleted() for leaf in leaves)
        return []

    monkeypatch.setattr(benchmark, "inputs", types.SimpleNamespace(load=load, Inputs=inputs.Inputs))
    monkeypatch.setattr(benchmark, "race", race)
    monkeypatch.setattr(benchmark_layouts, "matmul_rate", lambda dtype: 1.0)
    settings = benchmark.Settings(("packed", "padded"), rounds=3, steps=2)
    record = benchmark.run(run, tiny.FILE, [], settings)
    mesh = sharding.make_mesh(run.mesh, jax.devices())
    data, plan, _ = assemble.assemble(benchmark.trimmed(run, 6), mesh)[0].train
    own = [pack.examples(plan, step) for step in range(6)]
    assert seen["packed"] == benchmark.useful_tokens(data, own)
    assert seen["padded"] == benchmark.useful_tokens(data, seen["steps"]) != seen["packed"]
    assert sorted(seen["steps"].ravel()) == sorted(np.concatenate(own))
    assert record["useful_tokens_per_step"] == sum(seen["packed"]) / 6


def test_a_contender_starts_a_new_adapter_on_what_was_merged_for_it(folder, tmp_path, monkeypatch):
    seen = []

    def work(stepper, orders, dtype, count):
        seen.append((stepper, dtype, count))

    monkeypatch.setattr(benchmark_layouts, "make", lambda name, experiment, *rest: experiment)
    monkeypatch.setattr(benchmark_worker, "work", work)
    monkeypatch.setattr(inputs, "enable_compile_cache", lambda folder: None)
    run = tiny.experiment(folder, tmp_path).replace(lora=config.Lora(rank=4, start="new"))
    own = scripts_benchmark.make_parser().parse_args(
        ["--worker", "packed", "--folder", str(tmp_path), "--count", "3"]
    )
    scripts_benchmark.work(own, run, tiny.FILE)
    ((given, dtype, count),) = seen
    assert (given.lora.start, given.model.source) == ("continue", f"{tmp_path}/model")
    assert (dtype, count) == ("float32", 3)


def test_the_padded_layout_takes_the_steps_that_it_is_given(folder, tmp_path):
    run = tiny.experiment(folder, tmp_path, batch_size=8)
    mesh = sharding.make_mesh(run.mesh, jax.devices())
    given = [np.arange(8), np.arange(8, 16)]
    benchmark_layouts.write_steps(str(tmp_path), given)
    stepper = benchmark_layouts.make("padded", run, mesh, str(tmp_path))
    found = [batch["tokens"].shape[0] for batch, _ in stepper.batches]
    assert found == [16, 16]


def test_a_contender_that_ends_is_an_error_with_its_exit_code():
    command = [sys.executable, "-c", "print('words'); raise SystemExit(3)"]
    with pytest.raises(ValueError, match="packed ended with exit code 3"):
        benchmark.race({"packed": command}, {}, "", {}, benchmark.Settings())


def test_lines_of_a_contender_that_are_no_answers_are_passed_over():
    program = """
import json, sys
def say(message): print("benchmark: " + json.dumps(message))
say({"ready": True, "first_step": 2.0, "loss": 0.5})
sys.stdout.flush()
for line in sys.stdin:
    print(json.dumps({"steps": 0}))
    say({"seconds": [0.5] * json.loads(line)["steps"]})
    sys.stdout.flush()
print({"train_runtime": "3.1"})
print(json.dumps({"peak": 0}))
say({"peak": 7})
"""
    settings = benchmark.Settings(rounds=2, steps=1)
    command = [sys.executable, "-c", program]
    (found,) = benchmark.race({}, {"trl": command}, "", {"trl": [10, 20]}, settings)
    assert (found.rates, found.first_step, found.peak) == ([20.0, 40.0], 2.0, 7)
    assert found.first_step_again is None


def test_a_contender_of_this_project_is_started_again_with_what_it_left(tmp_path):
    program = """
import json, os, sys
from pathlib import Path
def say(message): print("benchmark: " + json.dumps(message), flush=True)
there = Path(os.environ["DPO_JAX_CACHE"])
first = not there.exists()
there.mkdir(parents=True, exist_ok=True)
seconds = {"first_step": 3.0, "compile": 2.0} if first else {"first_step": 1.0, "compile": 0.5}
say({"ready": True, "loss": 1, **seconds})
for line in sys.stdin:
    say({"seconds": [0.5]})
say({"peak": 7})
"""
    settings = benchmark.Settings(rounds=1, steps=1)
    command = [sys.executable, "-c", program]
    (found,) = benchmark.race({"packed": command}, {}, str(tmp_path), {"packed": [10]}, settings)
    assert (found.first_step, found.first_step_again, found.compile) == (3.0, 1.0, 2.0)
    assert found.rates == [20.0]


@pytest.mark.slow
def test_layouts_race_from_the_command_line(folder: Path, tmp_path: Path):
    command = [
        *(sys.executable, "-m", "scripts.benchmark", "experiments/dpo.py"),
        *("--rounds", "2", "--steps", "1", "--json", str(tmp_path / "record.json")),
        *("--data.source", str(folder / "train.jsonl"), "--data.max-length", "128"),
        *("--data.tokenizer", str(folder / "tokenizer"), "--model.source", "tiny"),
        *("--batch-size", "8", "--reference.no-cached"),
    ]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command, cwd=tiny.ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "record.json").read_text())
    found = {result["name"]: result for result in record["results"]}
    assert list(found) == ["packed", "cached", "plain", "padded"]
    assert all(len(result["rates"]) == 2 and min(result["rates"]) > 0 for result in found.values())
    assert found["padded"]["fill"] < found["packed"]["fill"] == found["cached"]["fill"]
    assert all(result["peak"] > 1e7 for result in found.values())
    floor = record["floor_flops_per_useful_token"]
    shares = {name: result["flops"]["float32"] / floor for name, result in found.items()}
    # a cached reference saves a quarter, but for what is computed twice and in vain
    assert 0.75 < shares["cached"] < shares["packed"] < shares["plain"] < shares["padded"] < 10
    assert all(result["uncounted"] == [] for result in found.values())
    assert "| padded |" in done.stdout


def test_every_preset_has_a_floor(draw_examples):
    data = draw_examples(3)
    for shape in presets.PRESETS.values():
        assert benchmark_flops.floor_flops(shape, data, np.arange(3)) > 0


def test_layouts_are_named_for_the_command_line():
    assert set(benchmark_layouts.LAYOUTS) == set(benchmark.Settings().layouts)


@pytest.mark.parametrize("trained", [True, False])
def test_stripes_and_all_logits_that_are_timed_give_the_same(trained):
    size = benchmark_logps.Size(tokens=8, width=6, vocabulary=40, tied=True, trained=trained)
    (found,) = benchmark_logps.run(3, sizes=(size,))
    assert len(found.stripes) == len(found.logits) == 3 and min(found.stripes) > 0
    ways = (benchmark_logps.vocabulary.token_logps, benchmark_logps.from_logits)
    arguments = benchmark_logps.draw(size, np.float32)
    one, other = (benchmark_logps.make_gradient(way, size)(*arguments) for way in ways)
    assert len(one[1]) == 1 + trained
    for leaf, expected in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(leaf, expected, rtol=1e-5, atol=1e-6)


def test_the_ratio_of_stripes_to_all_logits_is_the_median_of_the_rounds():
    size = benchmark_logps.Size(tokens=512, width=288)
    result = benchmark_logps.Result(size, [1.0, 2.0, 9.0], [2.0, 2.0, 10.0])
    assert (
        benchmark_logps.describe(result)
        == "| 288 | 512 | 50,304 | apart, trained | 2.000 s | 2.000 s | 0.90 |"
    )


LLAMA = {
    "model_type": "llama",
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 3,
    "intermediate_size": 10,
    "vocab_size": 100,
}


def test_flops_of_padded_rows_are_those_of_policy_and_reference_by_type():
    # two rows of 7 tokens, of which 3 and 2 are scored
    body = 2 * 3 * (2 * 8 * 4 * 3 + 3 * 8 * 10) * 14 + 4 * 3 * 2 * 4 * 2 * 49
    head = 2 * 8 * 100
    # checkpointed layers leave their last product out
    again = body - 2 * 3 * 8 * 10 * 14
    batch = [(7, 3), (6, 2)]
    found = benchmark_trl.count_flops(LLAMA, batch, "dpo", "chosen", "trl-fast")
    assert found == {"float32": 4 * body + 5 * 5 * head, "bfloat16": 0.0}
    found = benchmark_trl.count_flops(LLAMA, batch, "dpo", "chosen", "trl")
    assert found == {"float32": 2 * 12 * head, "bfloat16": 4 * body + again + 3 * 12 * head}
    found = benchmark_trl.count_flops(LLAMA, batch, "kto", "mismatched", "trl-bf16")
    assert found == {"float32": 0.0, "bfloat16": 2 * (body + 5 * head)}
    found = benchmark_trl.count_flops(LLAMA, batch, "orpo", "chosen", "trl-fast")
    assert found == {"float32": 3 * body + 3 * 12 * head, "bfloat16": 0.0}
    # under an adapter no weight has a gradient
    found = benchmark_trl.count_flops(LLAMA, batch, "dpo", "chosen", "trl-bf16", is_adapter=True)
    assert found == {"float32": 5 * head, "bfloat16": 3 * body + 3 * 5 * head}
    # on a GPU the head has logits of completions alone as it comes, and gradients of its type
    found = benchmark_trl.count_flops(LLAMA, batch, "dpo", "chosen", "trl", on_gpu=True)
    assert found == {"float32": 0.0, "bfloat16": 4 * body + again + 5 * 5 * head}
    found = benchmark_trl.count_flops(LLAMA, batch, "orpo", "chosen", "trl-fast", is_adapter=True)
    assert found == {"float32": 2 * body + 2 * 12 * head, "bfloat16": 0.0}


def test_prompts_for_tunix_are_padded_on_the_left_and_completions_on_the_right():
    steps = [
        [{"prompt": [1, 2], "chosen": [3], "rejected": [4, 5, 6]}],
        [{"prompt": [7, 8, 9], "chosen": [1], "rejected": [2]}],
    ]
    first, second = benchmark_tunix.pad(steps, "tunix")
    assert first["prompt_ids"].tolist() == [[0, 1, 2]]
    assert first["prompt_mask"].tolist() == [[0, 1, 1]]
    assert first["chosen_ids"].tolist() == [[3, 0, 0]]
    assert second["rejected_ids"].tolist() == [[2, 0, 0]]
    assert second["rejected_mask"].tolist() == [[1, 0, 0]]
    assert benchmark_tunix.padded_length(benchmark_tunix.pad(steps, "tunix-fast")[0]) == 256


@pytest.mark.parity
@pytest.mark.parametrize("loss", ["dpo", "kto", "orpo"])
@pytest.mark.parametrize("adapter", [False, True], ids=["all parameters", "adapter"])
def test_trl_runs_the_same_examples_from_the_same_weights(
    loss: str, adapter: bool, folder: Path, tmp_path: Path
):
    command = [
        *(sys.executable, "-m", "scripts.benchmark", f"experiments/{loss}.py"),
        *("--layouts", "packed" if adapter else "padded", "--peer", f"trl-fast={sys.executable}"),
        *("--once", *(("--lora.rank", "4", "--random-weights") if adapter else ())),
        *("--rounds", "1", "--steps", "1", "--json", str(tmp_path / "record.json")),
        *("--data.source", str(folder / "train.jsonl"), "--data.max-length", "128"),
        *("--data.tokenizer", str(folder / "tokenizer"), "--model.source", "tiny"),
        *("--batch-size", "8", *(() if loss == "orpo" else ("--reference.no-cached",))),
    ]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command, cwd=tiny.ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "record.json").read_text())
    own, other = record["results"]
    assert own["first_step_again"] is None
    # ORPO's NLL is over other tokens there: of random weights, all are as likely
    tolerance = 1e-2 if loss == "orpo" else 1e-5
    assert other["loss"] == pytest.approx(own["loss"], rel=tolerance)
    assert other["peak"] > 1e7 and min(other["rates"]) > 0
    assert other["products"]["float32"] > 1e8


def test_a_peer_without_its_python_is_refused():
    assert benchmark_peers.parse(["trl=a/b=c"]) == {"trl": "a/b=c"}
    for text in ("trl", "trl=", "=python"):
        with pytest.raises(ValueError, match=f"--peer is '{text}'; it must be NAME=PYTHON"):
            benchmark_peers.parse([text])

"""Compiling ahead of time for accelerators that are not there."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from fdjax.commands.main import fdjax_command
from fdjax.config import LearnConfig, ModelConfig
from fdjax.errors import UserError
from fdjax.frozen import freeze, load, save, targets
from fdjax.frozen.bench import seeded_variables
from fdjax.frozen.choice import worth_timing
from fdjax.frozen.targets import AheadOfTime, Estimate, find_target
from fdjax.graph.masks import MaskedGraph
from fdjax.ops.platform import for_cpu, tracing_for
from fdjax.training.network import trace_network
from fdjax.zoo.registry import make_network
from tests.frozen_checkpoints import write_checkpoint
from tests.frozen_networks import frozen_logits, random_counts, raw_images, relative_error

# Two fusions of a run, one of nothing that has a name, and one that the compiler says nothing of.
PROGRAM = """
  %a = fusion(%x), metadata={op_name="jit(apply)/run=block00.unit/dot"}, backend_config={"estimated_cycles":"70"}
  %b = bf16[8] fusion(%a), metadata={op_name="jit(apply)/run=block00.unit/add"}, backend_config={"estimated_cycles":"5"}
  %c = bf16[8] copy(%b), metadata={op_name="jit(apply)/convert"}, backend_config={"estimated_cycles":"3"}
  %d = bf16[8] copy(%c), metadata={op_name="jit(apply)/run=head/copy"}
"""


def small_graph() -> MaskedGraph:
    learn = LearnConfig(block=2, tied=True)
    return trace_network(make_network(ModelConfig(name="mobilenetv2_small", width=0.3), learn, 10), (20, 20, 1), learn)


def test_cycles_are_read_by_operation() -> None:
    assert targets._expected_cycles(PROGRAM) == (78, {"run=block00.unit": 75})
    assert targets._expected_cycles("nothing") == (None, {})


def test_a_target_that_is_not_there_is_one_line(monkeypatch) -> None:
    with pytest.raises(UserError, match="no target 'tpu:v9'; give one of tpu:v5e, tpu:v6e, cuda:h100"):
        find_target("tpu:v9")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"the target tpu:v5e needs what is not installed: pip install 'jax\[tpu\]'"):
        find_target("tpu:v5e")


def test_functions_are_traced_for_the_platform_that_is_asked_for() -> None:
    assert for_cpu() == (jax.default_backend() == "cpu")
    with tracing_for("tpu"):
        assert not for_cpu()
        with tracing_for("cpu"):
            assert for_cpu()
        assert not for_cpu()


@pytest.mark.parametrize("sign", [1, -1])
def test_an_estimate_takes_the_schedule_that_is_expected_to_be_fastest(monkeypatch, sign) -> None:
    def compiled(target, program, arrays, batch, dtype, *, part):
        assert (target, batch, part) == ("tpu:v5e", 4, True)
        return AheadOfTime(1.0, 1.0, 10**9 + sign * program.macs(), {})

    monkeypatch.setattr(targets, "compile_frozen", compiled)
    graph, estimate, chosen = small_graph(), Estimate("tpu:v5e", batch=4), {}

    def choose(candidates):
        name = estimate.choose(candidates)
        macs = {form: run.macs() for form, (run, _) in estimate.worth(candidates).items()}
        chosen[next(iter(candidates.values()))[0].name] = (macs[name], sorted(macs.values()))
        return name

    freeze(graph, seeded_variables(graph), random_counts(graph, 0, (1,)), choose)
    assert chosen.keys() == estimate.cycles.keys() and any(len(macs) > 1 for _, macs in chosen.values())
    assert all(taken == macs[0 if sign > 0 else -1] for taken, macs in chosen.values())


def expects(cycles):
    """A compiler that expects so many cycles of a program."""
    return lambda target, program, arrays, batch, dtype="bfloat16", *, part=False: AheadOfTime(
        1.0, 1.0, cycles(program), {}
    )


def transforms(program) -> int:
    return sum(
        product.transforms
        for operation in program.operations
        for chain in getattr(operation, "chains", ())
        for product in (chain.writer, chain.reader)
    )


def test_an_estimate_compiles_what_a_clock_would_time_and_the_dense_schedule(monkeypatch) -> None:
    graph, compiled = small_graph(), list[str]()
    weights, counts = seeded_variables(graph), random_counts(graph, 0, ())

    def cycles(program) -> int:
        compiled.append(program.operations[0].form)
        return 10**9 - program.macs()

    monkeypatch.setattr(targets, "compile_frozen", expects(cycles))
    estimate, seen = Estimate("tpu:v5e"), dict[str, set[str]]()

    def choose(candidates):
        chosen = estimate.choose(candidates)
        seen[chosen] = seen.get(chosen, set()) | candidates.keys()
        assert chosen == ("dense" if "dense" in candidates else max(candidates, key=lambda n: candidates[n][0].macs()))
        assert set(estimate.worth(candidates)) == {*worth_timing(candidates), *({"dense"} & candidates.keys())}
        assert "dense" not in worth_timing(candidates)
        return chosen

    frozen, usual = freeze(graph, weights, counts, choose), freeze(graph, weights, counts)
    assert "dense" in seen and "dense" in compiled and frozen.program.macs() > usual.program.macs()
    images = raw_images(graph, 2, 0)
    found, expected = (frozen_logits(one, images) for one in (frozen, usual))
    assert relative_error(found, expected) < 1e-5
    times = len(compiled)
    freeze(graph, weights, counts, estimate.choose)
    assert len(compiled) == times


@pytest.mark.parametrize("dear", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_masks_that_are_expected_to_cost_time_are_let_go(tmp_path, monkeypatch, capsys, dear) -> None:
    monkeypatch.setattr(
        targets, "compile_frozen", expects(lambda program: program.macs() + 10**7 * dear * transforms(program))
    )
    monkeypatch.setattr("fdjax.frozen.targets.find_target", lambda name: None)
    monkeypatch.setattr("fdjax.checkpoints.freeze._accuracy", lambda *_: {"accuracy": None})
    checkpoint = write_checkpoint(tmp_path / "run", "refine")
    command = ["freeze", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "frozen"), "--choose", "estimate"]
    assert fdjax_command([*command, "--target", "tpu:v5e", "--engine-batch", "4"]) == 0
    artifact = load(tmp_path / "frozen")
    choice = artifact.manifest["choice"]
    assert (choice["by"], choice["target"], choice["batch"]) == ("estimate", "tpu:v5e", 4)
    assert bool(transforms(artifact.frozen.program)) != dear == bool(choice["released_at_freezing"])
    said = capsys.readouterr().out
    assert ("released because they are faster without masks: block" in said) == dear
    assert f"estimated cycles on tpu:v5e, batches of 4: {choice['expected']['cycles']:,}, " in said
    assert choice["expected"]["ratio"] <= 1


def test_a_compiler_that_expects_nothing_cannot_choose(monkeypatch) -> None:
    monkeypatch.setattr(targets, "compile_frozen", lambda *_, **__: AheadOfTime(1.0, 1.0, None, {}))
    graph = small_graph()
    with pytest.raises(UserError, match="the compiler for cuda:h100 gives no estimates"):
        freeze(graph, seeded_variables(graph), random_counts(graph, 0, (1,)), Estimate("cuda:h100").choose)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "package"), [("tpu:v5e", "libtpu"), ("cuda:h100", "jax_cuda12_plugin")])
def test_networks_and_steps_compile_for_a_machine_that_is_not_here(tmp_path, target, package) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    graph = small_graph()
    frozen = freeze(graph, seeded_variables(graph), random_counts(graph, 0, (1,)))
    save(tmp_path / "frozen", graph, frozen, {"macs": {"ratio": 0.5, "paper_ratio": 0.5}, "layers": []})
    command = [sys.executable, "-m", "fdjax", "compile", "--target", target]
    done = subprocess.run(
        [*command, "--frozen", str(tmp_path / "frozen"), "--batch", "2"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert ("gives no estimates" in done.stdout) == target.startswith("cuda") and "pruned" in done.stdout
    tiny = str(Path(__file__).with_name("tiny_run.py"))
    done = subprocess.run([*command, "--config", tiny], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "learn: mask step" in done.stdout and "pretrain: weight step" in done.stdout


def test_indices_and_conditions_keep_their_types(monkeypatch) -> None:
    monkeypatch.setattr(targets, "lower_ahead", lambda target, function, given, *images: given)
    arrays = {"w": np.zeros(3, np.float32), "at": np.zeros(3, np.int32), "where": np.zeros(3, np.bool_)}
    given: Any = targets.lower_frozen("tpu", SimpleNamespace(inputs=(), shapes={}), arrays, 1)  # type: ignore[arg-type]
    assert {name: str(of.dtype) for name, of in given.items()} == {"w": "bfloat16", "at": "int32", "where": "bool"}

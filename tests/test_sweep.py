"""`fdjax sweep`: what it plans, what it refuses before anything starts, and that nothing is done twice."""

from __future__ import annotations

import csv
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import tyro

from fdjax.commands.main import fdjax_command
from fdjax.commands.sweep import sweep_command
from fdjax.commands.train import TrainArguments
from fdjax.config import Config, LearnConfig, load_config
from fdjax.config.settings import as_flags, with_settings
from fdjax.errors import UserError
from fdjax.experiments.launch import core_shares
from fdjax.experiments.sweep import Sweep, SweepRun, load_sweep, plan_sweep
from fdjax.reports import MOBILENET_V2_IMAGENET, pareto_figure, pareto_front, read_result, references_for
from tests.fake_runs import CONFIG, changed, make_run, make_summary
from tests.fake_train import FAILING, SILENT, STEPS

ROOT = Path(__file__).parents[1]
FAKE = [
    sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.fake_train import run; run()"
]  # fmt: skip
# As a user's file; formats in what a test needs.
SWEEP = """
from fdjax.experiments.sweep import Sweep, SweepRun
def get_sweep():
    return Sweep(config={config!r}, {rest})
"""
# The fake runs' config, with data that are there.
HERE = changed(CONFIG, data={"name": "fashion_mnist_subset"})
BASE = """
from tests.fake_runs import CONFIG, changed
def get_config():
    return changed(CONFIG, data={"name": "fashion_mnist_subset"})
"""
DENSE = 'runs=(SweepRun(name="dense", settings={"phases": ("pretrain",)}),)'


@pytest.fixture
def sweep_file(tmp_path) -> Callable[[str], str]:
    """Writes a sweep of the fake runs' config, and gives its path."""

    def write(rest: str) -> str:
        (tmp_path / "base.py").write_text(BASE)
        (tmp_path / "sweep.py").write_text(SWEEP.format(config="base.py", rest=rest))
        return str(tmp_path / "sweep.py")

    return write


def plan(tmp_path: Path, **fields) -> dict:
    (tmp_path / "base.py").write_text(BASE)
    runs = plan_sweep(Sweep(**{"config": "base.py", **fields}), tmp_path / "out", tmp_path)
    return {run.name: run for run in runs}


def steps_of(out: Path) -> dict[str, list[str]]:
    return {file.name: file.read_text().split("\n")[:-1] for file in (out / "steps").iterdir()}


def finished_in(out: Path) -> set[str]:
    return {file.parent.name for file in out.glob("*/summary.json")}


# Settings


@pytest.mark.parametrize(
    "settings",
    [
        {"seed": 3, "phases": ("pretrain", "refine")},
        {"learn.tied": False, "data.flip": True, "learn.levels": "0,1,N"},
        {"learn.block_by_map": ((14, 2), (7, 7)), "learn.block_by_layer": (("head", 4),)},
        {"learn.block_by_map": (), "data.train_limit": None, "model.width": 1},
        {"learn.target_macs": None, "learn.lambda": 0.25},
        {"learn.target_macs": None, "learn.lambda_": 1e-7},
        {"data.name": "folder", "data.path": Path("/some where/pictures")},
        {"pretrain.step_at": [0.1, 0.9], "pretrain.schedule": "step"},
    ],
)
def test_flags_say_what_the_settings_say(settings):
    """The parser of train.py is the other way to the same config."""
    wanted = with_settings(CONFIG, settings)
    assert wanted != CONFIG or settings.keys() <= {"learn.tied"}
    default = TrainArguments(config="c", workdir="w", settings=CONFIG)
    assert tyro.cli(TrainArguments, args=as_flags(settings), default=default).settings == wanted


def test_settings_are_checked_together():
    """One by one, each of these would be refused."""
    assert with_settings(Config(), {"learn.target_macs": None, "learn.lambda_": 2.0}).learn == LearnConfig(
        target_macs=None, lambda_=2.0
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"learn.target_mac": 0.5},
            r"no field 'learn.target_mac' \(did you mean 'target_macs'\?\); learn has epochs, ",
        ),
        ({"target_macs": 0.5}, r"no field 'target_macs' \(did you mean 'learn.target_macs'\?\); a config has seed, "),
        ({"lern.epochs": 2}, r"no settings 'lern' .* \(did you mean 'learn'\?\); there are data, model, pretrain"),
        ({"learn": LearnConfig()}, "'learn' is a group of fields; name one, such as 'learn.epochs'"),
        ({"learn.penalty": "mac"}, r"did you mean 'macs'\?\); accepted are fcmask, macs"),
        (
            {"phases": ("pretrain", "lern")},
            r"phases is 'lern' \(did you mean 'learn'\?\); accepted are pretrain, learn",
        ),
        ({"learn.target_macs": 2}, "target_macs must be above 0 and at most 1, or None, got 2"),
        ({"seed": "one"}, "must be int, got 'one'"),
        ({"seed": {1, 2}}, "seed must be a number, a text"),
    ],
)
def test_wrong_settings_are_named_with_what_is_accepted(settings, expected):
    with pytest.raises(UserError, match=expected) as raised:
        with_settings(CONFIG, settings)
    assert "\n" not in str(raised.value)


# The plan


def test_a_grid_is_every_combination_by_name(tmp_path):
    runs = plan(tmp_path, grid={"learn.target_macs": (0.5, 0.33), "seed": (0, 1), "learn.tied": (True, False)})
    assert list(runs)[:3] == ["target_macs0.5_seed0_tied", "target_macs0.5_seed0_no_tied", "target_macs0.5_seed1_tied"]
    found = {(run.config.learn.target_macs, run.config.seed, run.config.learn.tied) for run in runs.values()}
    assert len(runs) == 8 and found == {(t, s, tied) for t in (0.5, 0.33) for s in (0, 1) for tied in (True, False)}
    assert all(run.workdir == tmp_path / "out" / name and run.after is None for name, run in runs.items())


def test_fields_of_one_name_are_told_apart_and_values_become_names(tmp_path):
    runs = plan(tmp_path, grid={"learn.epochs": (1, 2), "refine.epochs": (3,), "learn.levels": ("0,1,N", "all")})
    assert list(runs)[:2] == [f"learn.epochs1_refine.epochs3_levels{word}" for word in ("0-1-N", "all")]


def test_fields_of_one_name_say_which_run_a_run_starts_from(tmp_path):
    dense = SweepRun(name="dense_5", settings={"phases": ("pretrain",), "pretrain.epochs": 5})
    runs = plan(
        tmp_path,
        runs=(dense,),
        grid={"pretrain.epochs": (5,), "refine.epochs": (1,)},
        settings={"phases": ("pretrain", "learn", "refine")},
        init="dense_{pretrain.epochs}",
    )
    assert [run.after for run in runs.values()] == [None, "dense_5"]


def test_settings_of_a_run_go_before_those_of_all(tmp_path):
    runs = plan(
        tmp_path,
        settings={"seed": 5, "data.train_limit": 100},
        runs=(SweepRun(name="a"), SweepRun(name="b", settings={"seed": 6})),
    )
    assert [(run.config.seed, run.config.data.train_limit) for run in runs.values()] == [(5, 100), (6, 100)]


def test_a_run_starts_from_another_one_or_from_a_path(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    dense = [SweepRun(name=f"dense_seed{seed}", settings={"phases": ("pretrain",), "seed": seed}) for seed in (0, 1)]
    other = SweepRun(name="other", init="elsewhere", settings={"phases": ("learn", "refine")})
    runs = plan(tmp_path, runs=(*dense, other), grid={"seed": (0, 1)}, init="dense_seed{seed}")
    assert [runs[name].after for name in ("seed0", "seed1", "dense_seed0", "other")] == [
        "dense_seed0", "dense_seed1", None, None,
    ]  # fmt: skip
    given = {
        name: run.arguments[run.arguments.index("--init") + 1]
        for name, run in runs.items()
        if "--init" in run.arguments
    }
    assert given == {
        "seed0": str(tmp_path / "out" / "dense_seed0"), "seed1": str(tmp_path / "out" / "dense_seed1"),
        "other": str(tmp_path / "elsewhere"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("rest", "expected"),
    [
        ("", "the sweep has no runs"),
        ("grid={'seed': ()}", "grid: seed has no values to try"),
        ("grid={'sed': (1,)}", "run 'sed1': no field 'sed' (did you mean 'seed'?)"),
        ("grid={'learn.gate': ('macs', 'tim')}", "did you mean 'time'?); accepted are macs, time, none"),
        ("grid={'learn.levels': 'all'}", "must have a tuple of values to try, got 'all'"),
        ("grid={'seed': 3}", "must have a tuple of values"),
        ("grid=('seed', 3)", "grid must be a dictionary"),
        ("runs=(SweepRun(name='a'), SweepRun(name='a', settings={'seed': 1}))", "2 runs are called 'a'"),
        ("runs=(SweepRun(name='seed1'),), grid={'seed': (0, 1)}", "2 runs are called 'seed1'"),
        ("grid={'seed': (0, 0)}", "2 runs are called 'seed0'"),
        ("runs=(SweepRun(name='../a'),)", "a run cannot be called '../a'"),
        ("runs=(SweepRun(name='a.txt'),)", "a run cannot be called 'a.txt'"),
        ("runs=('a',)", "runs must be a tuple of SweepRun"),
        (
            f"{DENSE}, grid={{'seed': (0,)}}, init='dens'",
            "run 'seed0': init 'dens' is no run of the sweep (did you mean 'dense'?)",
        ),
        (f"{DENSE}, grid={{'seed': (0,)}}, init='dense_{{sed}}'", "between braces it may have seed"),
        (f"{DENSE}, grid={{'seed': ()}}", "grid: seed has no values to try"),
        ("runs=(SweepRun(name='a', init='b'), SweepRun(name='b', init='a'))", "start from each other: a from b from a"),
        ("runs=(SweepRun(name='a', init='a'),)", "start from each other: a from a"),
        ("grid={'phases': (('learn', 'refine'),)}", "needs trained weights: give it an init"),
        ("grid={'data.name': ('folder',), 'data.path': ('/does/not/exist',)}", "/does/not/exist"),
        ("gird={'seed': (0,)}", "unexpected keyword argument 'gird'"),
    ],
)
def test_bad_sweeps_are_refused_in_one_line_before_anything_starts(tmp_path, capsys, sweep_file, rest, expected):
    file, out = sweep_file(rest), tmp_path / "out"
    before = set(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        fdjax_command(["sweep", "--config", file, "--workdir", str(out)])
    said = capsys.readouterr()
    assert stop.value.code == 2 and not said.out
    assert expected in said.err and len(said.err.splitlines()) == 1
    assert {path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts} == before


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "no sweep file"),
        ("x = 1", "no get_sweep()"),
        ("def get_sweep(): return 1", "got int"),
        ("a b", "SyntaxError"),
    ],
)
def test_files_that_are_no_sweep_are_refused(tmp_path, capsys, text, expected):
    file = tmp_path / "file.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SystemExit) as stop:
        fdjax_command(["sweep", "--config", str(file), "--workdir", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and expected in said and len(said.splitlines()) == 1


def test_a_missing_base_config_and_too_few_jobs_are_refused(tmp_path, capsys, sweep_file):
    file = sweep_file("grid={'seed': (0,)}")
    (tmp_path / "base.py").unlink()
    for arguments, expected in (([], "no config file"), (["--jobs", "0"], "--jobs must be at least 1, got 0")):
        with pytest.raises(SystemExit) as stop:
            fdjax_command(["sweep", "--config", file, "--workdir", str(tmp_path / "out"), *arguments])
        assert stop.value.code == 2 and expected in capsys.readouterr().err


def test_other_runs_and_other_files_are_left_alone(tmp_path):
    make_run(tmp_path / "out" / "seed0", changed(HERE, seed=7))
    with pytest.raises(UserError, match=r"run 'seed0': .* holds another run \(seed is 7 there and 0 here\)"):
        plan(tmp_path, grid={"seed": (0,)})
    (tmp_path / "out" / "seed1").mkdir()
    (tmp_path / "out" / "seed1" / "diary.txt").write_text("dear diary")
    with pytest.raises(UserError, match="seed1 is not empty and holds no run"):
        plan(tmp_path, grid={"seed": (1,)})
    make_run(tmp_path / "out" / "seed2", changed(HERE, seed=2))
    (tmp_path / "out" / "seed2" / "init.json").write_text('{"checkpoint": "/elsewhere"}')
    with pytest.raises(UserError, match="begun with init /elsewhere"):
        plan(tmp_path, grid={"seed": (2,)})


def test_tables_that_no_sweep_wrote_are_not_overwritten(tmp_path, capsys, sweep_file):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "table.md").write_text("mine")
    with pytest.raises(UserError, match=r"holds table\.md that no sweep has written"):
        sweep_command(["--config", sweep_file("grid={'seed': (0,)}"), "--workdir", str(tmp_path / "out")], FAKE)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["table.md"]


def test_a_dry_run_says_what_would_be_done_and_does_nothing(tmp_path, capsys, sweep_file):
    file, out = sweep_file(f"{DENSE}, grid={{'seed': (0, 1)}}, init='dense'"), tmp_path / "out"
    make_run(out / "dense", changed(HERE, phases=("pretrain",)))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert fdjax_command(["sweep", "--config", file, "--workdir", str(out), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "dense (finished)", "seed0 (to start after dense)", "seed1 (to start after dense)",
    ]  # fmt: skip
    assert lines[2].endswith(f"--init {out / 'dense'} --seed 1")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_run_is_finished_by_the_result_of_just_its_config(tmp_path):
    make_run(tmp_path / "out" / "seed0", changed(HERE, data={"name": "folder", "path": "/moved"}))

    def planned(**settings):
        moved = {"data.name": "folder", "data.path": "/here", **settings}
        return plan(tmp_path, grid={"seed": (0,)}, settings=moved)["seed0"]

    assert planned().is_finished() and planned(**{"checkpoint.keep": 9}).is_finished()
    # train.py writes the path of unlabelled pictures as an absolute one.
    taught = {"data.unlabelled": "pictures", "distill.weight": 1.0}
    there = str(Path("pictures").resolve())
    changes = {"distill": {"weight": 1.0}, "data": {"name": "folder", "path": "/moved", "unlabelled": there}}
    make_run(tmp_path / "taught" / "seed0", changed(HERE, **changes))
    runs = plan_sweep(
        Sweep(config="base.py", settings={"data.name": "folder", "data.path": "/here", **taught}, grid={"seed": (0,)}),
        tmp_path / "taught",
        tmp_path,
    )
    assert runs[0].is_finished()
    longer = planned(**{"refine.epochs": 30})
    assert not longer.is_finished() and longer.is_begun()


@pytest.mark.parametrize(
    ("cores", "jobs", "expected"),
    [
        (range(8), 2, [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ([3, 5, 9, 11, 12], 2, [(3, 5), (9, 11, 12)]),
        ([4, 6], 3, [(4,), (6,), (4,)]),
        ([1], 1, [(1,)]),
    ],
)
def test_jobs_share_the_cores(cores, jobs, expected):
    assert core_shares(list(cores), jobs) == expected


# Doing it


def test_failed_runs_stop_only_what_starts_from_them(tmp_path, capsys, sweep_file):
    file, out = (
        sweep_file(
            f"runs=(SweepRun(name='bad', settings={{'seed': {FAILING}}}), SweepRun(name='then', init='bad'), "
            f"SweepRun(name='last', init='then'), SweepRun(name='silent', settings={{'seed': {SILENT}}}), "
            "SweepRun(name='good'), SweepRun(name='pruned', init='good', settings={'seed': 2}))"
        ),
        tmp_path / "out",
    )
    arguments = ["--config", file, "--workdir", str(out), "--jobs", "2"]
    assert sweep_command(arguments, FAKE) == 1
    said = capsys.readouterr()
    assert said.out.startswith("6 runs: 0 finished, 0 to go on with, 6 to start; 2 at a time\n")
    assert "2 of 6 runs finished: " in said.out
    failures = dict(line.removeprefix("failed: ").split(": ", 1) for line in said.err.splitlines())
    assert set(failures) == {"bad", "then", "last", "silent"}
    assert "exit status 2" in failures["bad"] and "error: the run has diverged" in failures["bad"]
    assert failures["then"].startswith("not started: bad, which it starts from")
    assert failures["last"].startswith("not started: then")
    assert failures["silent"].endswith("left no result of this config")
    assert finished_in(out) == {"good", "pruned"} and set(steps_of(out)) == {"bad", "silent", "good", "pruned"}
    assert (out / "good.txt").read_text() == "finished\n"
    rows = list(csv.DictReader((out / "table.csv").open(newline="")))
    assert {row["name"] for row in rows} == {"good", "pruned"}
    assert "| good |" in (out / "table.md").read_text() and (out / "tradeoff.png").stat().st_size > 1000
    assert (out / "pareto.png").read_bytes().startswith(b"\x89PNG")
    if hasattr(os, "sched_getaffinity"):
        assert "on core" in said.out


def start_sweep(file: str, out: Path, *more: str) -> subprocess.Popen[str]:
    """The command in a process group of its own, as a shell starts it."""
    code = (
        # A shell's background would have it ignored.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        f"import sys; from fdjax.commands.sweep import sweep_command; sys.exit(sweep_command(sys.argv[1:], {FAKE!r}))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, "--config", file, "--workdir", str(out), "--jobs", "3", *more],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("how", "runs"),
    [
        pytest.param("the group is killed", 12, marks=pytest.mark.slow),
        ("the group is killed", 4),
        ("as the terminal interrupts", 4),
        pytest.param("the command is terminated", 4, marks=pytest.mark.slow),
    ],
)
def test_runs_ended_half_way_and_started_again_repeat_nothing(tmp_path, sweep_file, how, runs):
    file, out = (
        sweep_file(f"grid={{'learn.target_macs': (0.8, 0.5), 'seed': {tuple(range(runs // 2))}}}"),
        tmp_path / "out",
    )
    first = start_sweep(file, out)
    wait_until(lambda: len(finished_in(out)) >= runs // 3 or first.poll() is not None)
    if how == "the group is killed":
        os.killpg(first.pid, signal.SIGKILL)
    elif how == "as the terminal interrupts":
        os.killpg(first.pid, signal.SIGINT)
    else:
        first.terminate()
    _, errors = first.communicate()
    if how != "the group is killed":
        assert first.returncode == 130 and "the same command goes on" in errors and "Traceback" not in errors
    before = {name: len(steps) for name, steps in steps_of(out).items()}
    done = finished_in(out)
    assert runs // 3 <= len(done) < runs
    time.sleep(0.3)
    assert {name: len(steps) for name, steps in steps_of(out).items()} == before, "its runs have ended with it"

    second = start_sweep(file, out)
    said, errors = second.communicate()
    assert second.returncode == 0, errors
    assert f"{runs} runs: {len(done)} finished, " in said.splitlines()[0]
    steps = steps_of(out)
    assert len(steps) == runs and finished_in(out) == set(steps)
    for name, lines in steps.items():
        assert [line for line in lines if line != "begin"] == [f"step {step}" for step in range(STEPS)]
        assert name not in done or lines.count("begin") == 1, "a finished run is not even looked at again"
    rows = list(csv.DictReader((out / "table.csv").open(newline="")))
    assert {row["name"] for row in rows} == set(steps)
    assert sweep_command(["--config", file, "--workdir", str(out)], FAKE) == 0
    assert steps_of(out) == steps


def test_a_second_sweep_of_the_directory_is_refused_while_one_is_at_work(tmp_path, sweep_file):
    file, out = sweep_file("grid={'seed': (0, 1, 2)}"), tmp_path / "out"
    first = start_sweep(file, out)
    wait_until(lambda: (out / "steps").exists() or first.poll() is not None)
    with pytest.raises(UserError, match="another sweep, or a run that it has left behind, is at work there"):
        sweep_command(["--config", file, "--workdir", str(out)], FAKE)
    _, errors = first.communicate()
    assert first.returncode == 0, errors


@pytest.mark.slow
def test_a_real_sweep_of_two_runs(tmp_path):
    """As a user gives the command, from another directory: a dense network, and masks learned from it."""
    (tmp_path / "base.py").write_text(
        "from fdjax.config import *\n"
        "def get_config():\n"
        "    return Config(data=DataConfig(batch_size=16, train_limit=200),\n"
        "                  model=ModelConfig(name='mobilenetv2_small', width=0.3),\n"
        "                  pretrain=WeightPhaseConfig(steps=2, learning_rate=0.02),\n"
        "                  learn=LearnConfig(steps=2, block=2, target_macs=0.7, gate='none'),\n"
        "                  checkpoint=CheckpointConfig(time=False))\n"
    )
    rest = f"{DENSE}, grid={{'phases': (('pretrain', 'learn'),)}}, init='dense'"
    (tmp_path / "sweep.py").write_text(SWEEP.format(config="base.py", rest=rest))
    done = subprocess.run(
        [sys.executable, "-m", "fdjax", "sweep", "--config", "sweep.py", "--workdir", "out"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr + "".join(log.read_text() for log in tmp_path.glob("out/*.txt"))
    rows = {row["name"]: row for row in json.loads((tmp_path / "out" / "table.json").read_text())}
    assert set(rows) == {"dense", "phasespretrain-learn"}
    masked = rows["phasespretrain-learn"]
    assert masked["dense_top1"] == rows["dense"]["dense_top1"] and masked["phases"] == "(pretrain), learn"
    for name in rows:
        summary = json.loads((tmp_path / "out" / name / "summary.json").read_text())
        assert summary["num_classes"] == 10 and (tmp_path / "out" / f"{name}.txt").read_text()
    assert load_config(str(tmp_path / "base.py")).pretrain.steps == 2


# Plots and published figures


def test_the_front_is_what_no_other_point_beats():
    points = [(3.0, 70.0), (1.0, 60.0), (2.0, 59.0), (2.0, 65.0), (4.0, 70.0), (5.0, 71.0)]
    beaten = [p for p in points if any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points)]
    assert pareto_front(points) == sorted(set(points) - set(beaten))


def imagenet_run(name: str = "a", **parts):
    config = changed(
        CONFIG, model={"name": "mobilenetv2", "width": 1.0}, data={"name": "imagenet2012", "train_limit": None}
    )
    config = changed(config, **parts)
    return read_result(name, config, make_summary(config) | {"num_classes": 1000})


def test_published_figures_stand_beside_mobilenetv2_on_imagenet_only():
    assert references_for(imagenet_run()) == MOBILENET_V2_IMAGENET
    assert references_for(imagenet_run(data={"name": "folder", "path": "/x"})) == MOBILENET_V2_IMAGENET
    assert references_for(imagenet_run(model={"name": "mobilenetv2_cifar10"})) == ()
    assert references_for(imagenet_run(data={"name": "places365"})) == ()
    ten = read_result("ten", CONFIG, make_summary() | {"num_classes": 10})
    assert references_for(ten) == () and references_for(read_result("unsaid", CONFIG, make_summary())) == ()
    lines = {line.get_label(): line for line in pareto_figure([imagenet_run()]).axes[0].get_lines()}
    for reference in MOBILENET_V2_IMAGENET:
        drawn = lines[f"published: {reference.name}"].get_xydata()
        assert [tuple(point) for point in drawn] == [*reference.points]
    assert not any("published" in str(line.get_label()) for line in pareto_figure([ten]).axes[0].get_lines())


def test_the_published_figures_are_those_of_their_sources():
    """Counts and top-1 that the paper's own baselines have, and that no series loses accuracy by more MACs."""
    points = {point for reference in MOBILENET_V2_IMAGENET for point in reference.points}
    assert {(300, 71.8), (221, 70.7), (97, 65.4), (582, 75.0), (11, 45.5)} <= points and len(points) == 30
    for reference in MOBILENET_V2_IMAGENET:
        ordered = sorted(reference.points)
        assert [top1 for _, top1 in ordered] == sorted(top1 for _, top1 in ordered) and reference.source
    assert all(0 < macs < 600 and 40 < top1 < 80 for macs, top1 in points)


@pytest.mark.parametrize("study", ["cifar10_lossless", "cifar10_transfer", "clothes"])
def test_the_rows_of_a_study_are_those_of_its_sweep(study, tmp_path, monkeypatch):
    file = ROOT / "results" / study / "sweep.py"
    for name in ("SEEDS", "SIDES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("IMPORTED", str(tmp_path))
    for side in (160, 192):
        (tmp_path / str(side)).mkdir()
    runs, made = plan_sweep(load_sweep(str(file)), tmp_path / "runs", file.parent), runpy.run_path(str(file))
    # Those that matter most come first, and all but imported networks start from a run before them.
    assert [run.name.partition("_")[0].rstrip("0123456789") for run in runs[:3]] == ["dense", "control", "channels"]
    known = {run.name: {before.name for before in runs[:i]} for i, run in enumerate(runs)}
    assert all(run.name.startswith("dense") or run.after in known[run.name] for run in runs)
    # From the dense network, or from learned masks, which come from it.
    dense_of = made["dense_of"]
    sources = {run.name: {dense_of(run.name), *(of for of in known[run.name] if of.startswith("learn"))} for run in runs
               if not run.name.startswith("dense")}  # fmt: skip
    assert all(run.after in sources[run.name] and dense_of(run.after) == dense_of(run.name)
               for run in runs if run.name in sources)  # fmt: skip
    tables = tomllib.loads((ROOT / "results" / "table.toml").read_text())
    named = {
        Path(lines["run"].format(row=row, seed=seed)).name
        for lines in (tables[key] for key in made["TABLES"])
        for row in lines["rows"]
        for seed in lines["seeds"]
        if not row.startswith("random")
    }
    assert named == {run.name for run in runs if not run.name.startswith(("dense", "control", "learn"))}

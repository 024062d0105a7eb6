"""`fdjax results`: what is recorded, what the tables say, and that nothing that was there is lost."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdjax.commands.main import fdjax_command
from fdjax.config import Config
from fdjax.errors import UserError
from fdjax.experiments import collect as collect_module
from fdjax.experiments.collect import collect
from fdjax.reports import TIME, NoDataError, markdown, read_result, seed_groups, tradeoff_figure
from fdjax.reports.results import mask_words
from fdjax.reports.tradeoff import kinds_of_masks
from tests.fake_runs import CONFIG, STEPS, changed, make_run, make_summary

ROOT = Path(__file__).parents[1]
QUICKSTART = [ROOT / "results" / "quickstart" / f"seed{seed}" for seed in range(3)]
DENSE = changed(CONFIG, phases=("pretrain",))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def names_in(out: Path) -> list[str]:
    return [row["name"] for row in json.loads((out / "table.json").read_text())]


def cells(table: str) -> list[dict[str, str]]:
    """The rows of the Markdown table by heading; no cell holds a |."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    heading, rule, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert set(rule) == {"---"}
    return [dict(zip(heading, row, strict=True)) for row in rows]


def row_of(config: Config = CONFIG, name: str = "run", **summary):
    return read_result(name, config, make_summary(config, **summary))


# What is recorded


def test_runs_and_tables_are_written(tmp_path):
    workdirs = [make_run(tmp_path / f"seed{seed}", changed(CONFIG, seed=seed)) for seed in (0, 1)]
    (workdirs[0] / "log.txt").write_text("in the workdir")
    (tmp_path / "seed1.txt").write_text("beside it")
    (workdirs[1] / "checkpoints").mkdir()
    (workdirs[1] / "history.png").write_bytes(b"no part of the record")
    out = tmp_path / "deep" / "out"
    done = collect(workdirs, out)
    assert {path.name for path in out.iterdir()} == {"runs", "table.md", "table.csv", "table.json", "tradeoff.png"}
    assert done.added == ["seed0", "seed1"] and not done.replaced
    assert done.written == [out / name for name in ("table.md", "table.csv", "table.json", "tradeoff.png")]
    for workdir, log in zip(workdirs, (b"in the workdir", b"beside it"), strict=True):
        recorded = contents(out / "runs" / workdir.name)
        assert recorded.pop("log.txt") == log
        assert recorded == {name: (workdir / name).read_bytes() for name in recorded}
        assert set(recorded) == {"config.json", "summary.json", "metrics.jsonl"}
    assert names_in(out) == ["seed0", "seed1"]


def test_where_the_data_lay_is_not_recorded_and_does_not_tell_runs_apart(tmp_path):
    out = tmp_path / "out"
    for place in ("/home/someone/pictures/", "/elsewhere/pictures"):
        workdir = make_run(tmp_path / place.strip("/") / "a", changed(CONFIG, data={"name": "folder", "path": place}))
        done = collect([workdir], out)
        recorded, given = (json.loads((folder / "config.json").read_text()) for folder in (out / "runs" / "a", workdir))
        assert given["data"].pop("path") == place and recorded["data"].pop("path") == "pictures"
        assert recorded == given
    assert not done.added and not done.replaced
    other = make_run(tmp_path / "other" / "a", changed(CONFIG, data={"name": "folder", "path": "/home/photographs"}))
    with pytest.raises(UserError, match=r"is another run than .* \(different: data.path\)"):
        collect([other], out)


def test_the_rows_hold_what_the_runs_say(tmp_path):
    make_run(tmp_path / "a", top1=0.715, dense_top1=0.72, ratio=0.5, seconds=90.0, skipped=1)
    collect([tmp_path / "a"], tmp_path / "out")
    (row,) = json.loads((tmp_path / "out" / "table.json").read_text())
    assert row["loss_points"] == 100 * (0.72 - 0.715)  # of unrounded figures
    assert row | {"loss_points": 0} == {
        "name": "a", "network": "mobilenetv2_cifar100", "width": 0.5, "data": "cifar10", "train_limit": 5000,
        "phases": "(pretrain), learn, refine", "block": "2", "masks": "tied, levels 0,1,N, penalty macs",
        "filters": None, "target_macs": 0.5, "target_time": None, "target_convention": "total", "lambda": None,
        "seed": 0, "commit": "abc1234",
        "fdjax": "0.1.0", "jax": "0.10.2", "python": "3.11.7", "device": "cpu", "processor": "Some CPU, 2 cores",
        "seconds": 90.0, "test_images": 2000, "dense_top1": 0.72, "soft_top1": 0.65, "rounded_top1": 0.40,
        "pruned_top1": 0.715, "loss_points": 0, "macs_ratio": 0.5, "paper_ratio": 0.75, "bare_ratio": 0.4,
        "time_ratio": None, "time_engine": None, "time_batch": None, "time_threads": None, "frozen_ms": None,
        "time_dense_ms": None,
        "removed": 0.4, "only_mean": 0.4, "partial": 0.05, "whole": 0.15,
    }  # fmt: skip
    (from_csv,) = csv.DictReader((tmp_path / "out" / "table.csv").open(newline=""))
    assert from_csv == {name: "" if value is None else str(value) for name, value in row.items()}


def test_the_time_of_the_frozen_network_is_a_column_where_it_was_measured(tmp_path):
    measured = {**make_summary(), "time": {"engine": "xla", "batch": 8, "ratio": 0.625}}
    rows = [read_result("new", CONFIG, measured), row_of(changed(CONFIG, seed=1), "old")]
    assert [row["frozen time"] for row in cells(markdown(rows))] == ["0.625x", "–", "–"]
    assert "frozen time" not in cells(markdown(rows[1:]))[0]
    unmeasured = {**make_summary(), "time": {"engine": "xla", "batch": 8, "ratio": None}}
    assert read_result("slow", CONFIG, unmeasured).time_ratio is None
    with pytest.raises(ValueError, match=r"its time\.ratio"):
        read_result("bad", CONFIG, {**make_summary(), "time": {"ratio": -1}})


def test_a_time_that_was_asked_for_stands_beside_what_was_measured():
    time = {"engine": "onnxruntime", "batch": 8, "threads": 1, "ratio": 0.61, "pruned_ms": 0.61, "dense_ms": 1.0}
    summary = {**make_summary(), "target_macs": None, "target_time": 0.6, "time": time}
    asked = read_result("asked", changed(CONFIG, learn={"target_time": 0.6}), summary)
    told = {name: value for name, value in asked.columns().items() if "time" in name or "target" in name}
    assert told == {
        "target_macs": None, "target_time": 0.6, "target_convention": "total", "time_ratio": 0.61, "time_batch": 8,
        "time_engine": "onnxruntime", "time_threads": 1, "time_dense_ms": 1.0,
    }  # fmt: skip
    first, other = cells(markdown([asked, row_of(changed(CONFIG, refine={"epochs": 9}), "other")]))
    assert [first[name] for name in ("target", "time asked for", "frozen time")] == [
        "0.6x of the time",
        "0.600x",
        "0.610x",
    ]
    assert (
        first["timed on"] == "onnxruntime, 8 images, 1 thread" and other["timed on"] == other["time asked for"] == "–"
    )
    names = list(first)
    assert names.index("MACs") + 1 == names.index("time asked for") == names.index("frozen time") - 1
    with pytest.raises(ValueError, match=r"its time\.batch"):
        read_result("bad", CONFIG, {**summary, "time": {**time, "batch": "many"}})


def test_real_runs_give_their_real_figures(tmp_path, capsys):
    """The runs in results/quickstart; as a user gives the command."""
    arguments = ["results", "--workdir", *map(str, QUICKSTART), "--out", str(tmp_path / "out")]
    assert fdjax_command(arguments) == 0
    assert "new: seed0, seed1, seed2\n3 runs in" in capsys.readouterr().out
    for folder, row in zip(QUICKSTART, json.loads((tmp_path / "out" / "table.json").read_text()), strict=True):
        summary = json.loads((folder / "summary.json").read_text())
        learned = next(phase for phase in summary["phases"] if phase["name"] == "learn")
        assert row["name"] == folder.name and f"seed{row['seed']}" == folder.name
        assert (row["dense_top1"], row["pruned_top1"]) == (summary["dense_top1"], summary["top1"])
        assert (row["soft_top1"], row["rounded_top1"]) == (learned["soft_top1"], learned["top1"])
        assert row["macs_ratio"] == summary["macs"]["ratio"]
        assert row["bare_ratio"] == summary["macs"]["pruned"] / summary["macs"]["dense"]
        sides = [side for layer in summary["layers"] for side in layer["kept_counts"].values() if side]
        channels = sum(map(sum, sides))
        assert row["removed"] == sum(side[0] for side in sides) / channels
        assert row["only_mean"] == sum(side[1] for side in sides) / channels
        assert row["partial"] == sum(sum(side[2:-1]) for side in sides) / channels
        assert row["removed"] + row["only_mean"] + row["partial"] + row["whole"] == pytest.approx(1)
        assert (tmp_path / "out" / "runs" / folder.name / "log.txt").read_bytes() == (folder / "log.txt").read_bytes()


def test_earlier_runs_stay_when_their_workdirs_are_gone(tmp_path, capsys):
    out = tmp_path / "out"
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b", changed(CONFIG, seed=1), top1=0.69)
    collect([first], out)
    shutil.rmtree(first)
    before = contents(out / "runs" / "a")
    assert collect([second], out).added == ["b"]
    assert names_in(out) == ["a", "b"] and contents(out / "runs" / "a") == before
    assert "mean of 2" in (out / "table.md").read_text()
    written = contents(out)
    done = collect([second], out)
    assert not done.added and not done.replaced
    assert {name: text for name, text in contents(out).items() if name != "tradeoff.png"} == {
        name: text for name, text in written.items() if name != "tradeoff.png"
    }


def test_the_order_in_which_runs_are_given_does_not_matter(tmp_path):
    workdirs = [make_run(tmp_path / f"s{seed}", changed(CONFIG, seed=seed), top1=0.7 + seed / 99) for seed in range(4)]
    workdirs.append(make_run(tmp_path / "dense", DENSE))
    collect(workdirs, tmp_path / "all")
    random.Random(0).shuffle(workdirs)
    for workdir in [*workdirs, workdirs[0]]:
        collect([workdir, workdir], tmp_path / "one_by_one")
    tables = [[(tmp_path / out / f"table.{kind}").read_text() for kind in ("md", "csv", "json")]
              for out in ("all", "one_by_one")]  # fmt: skip
    assert tables[0] == tables[1]


def test_a_table_can_be_made_from_another_ones_records(tmp_path):
    make_run(tmp_path / "a", log="said")
    collect([tmp_path / "a"], tmp_path / "there")
    collect([tmp_path / "there" / "runs" / "a"], tmp_path / "here")
    assert contents(tmp_path / "there" / "runs") == contents(tmp_path / "here" / "runs")
    before = contents(tmp_path / "here" / "runs")
    done = collect([tmp_path / "here" / "runs" / "a"], tmp_path / "here")  # onto itself
    assert not done.added and not done.replaced and contents(tmp_path / "here" / "runs") == before


def test_a_run_of_the_same_config_replaces_its_record_and_its_log(tmp_path):
    out = tmp_path / "out"
    collect([make_run(tmp_path / "a", log="first", top1=0.60)], out)
    (tmp_path / "a" / "log.txt").unlink()
    assert not collect([tmp_path / "a"], out).replaced
    assert (out / "runs" / "a" / "log.txt").read_text() == "first"  # the same run still: its log stays
    make_run(tmp_path / "a", top1=0.71)
    assert collect([tmp_path / "a"], out).replaced == ["a"]
    assert json.loads((out / "table.json").read_text())[0]["pruned_top1"] == 0.71
    assert not (out / "runs" / "a" / "log.txt").exists()


@pytest.mark.parametrize("failing", ["table.md", "table.json", "tradeoff.png", "runs"])
def test_an_interruption_loses_no_table(tmp_path, monkeypatch, failing):
    """At each move in turn: what was there is whole, and the next command ends what was begun."""
    out = tmp_path / "out"
    collect([make_run(tmp_path / "a")], out)
    before = contents(out)
    real = {name: getattr(os, name) for name in ("replace", "rename")}

    def interrupted(name: str):
        def move(source, target):
            if failing in (Path(target).name, Path(target).parent.name):
                raise KeyboardInterrupt
            return real[name](source, target)

        return move

    for name in real:
        monkeypatch.setattr(collect_module.os, name, interrupted(name))
    new = make_run(tmp_path / "b", changed(CONFIG, seed=1))
    with pytest.raises(KeyboardInterrupt):
        collect([new], out)
    monkeypatch.undo()
    after = contents(out)
    assert set(before) <= set(after) and not any(".draft" in name for name in after)
    for name in before:
        if name.startswith("runs"):
            assert after[name] == before[name]
    for table in ("table.md", "table.csv", "table.json"):
        assert b"abc1234" in after[table], "a table that says something"
    assert json.loads(after["table.json"])[0]["name"] == "a"
    collect([new], out)
    assert names_in(out) == ["a", "b"]


def test_a_full_disk_is_a_users_error_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "table.md")

    monkeypatch.setattr(collect_module, "plot_tradeoff", full)
    make_run(tmp_path / "a")
    with pytest.raises(SystemExit) as stop:
        fdjax_command(["results", "--workdir", str(tmp_path / "a"), "--out", str(tmp_path / "x" / "out")])
    assert stop.value.code == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


# What is refused


def spoil(tmp_path: Path, what: str) -> list[str]:
    """Arguments that must be refused."""
    run = make_run(tmp_path / "w" / "a")
    workdirs, out = [run], tmp_path / "out"
    if what == "no directory":
        workdirs = [tmp_path / "nowhere"]
    elif what == "a file":
        workdirs = [run / "summary.json"]
    elif what == "no run":
        workdirs = [tmp_path / "w"]
    elif what == "unfinished":
        (run / "summary.json").unlink()
    elif what == "half a summary":
        text = (run / "summary.json").read_text()
        (run / "summary.json").write_text(text[: len(text) // 2])
    elif what == "no object":
        (run / "summary.json").write_text("[]")
    elif what == "no text":
        (run / "config.json").write_bytes(b"\xff\xfe\x00")
    elif what == "another config":
        (run / "config.json").write_text('{"sede": 1}')
    elif what == "no metrics":
        (run / "metrics.jsonl").unlink()
    elif what == "half a record":
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 30')
    elif what == "gone on":
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 3 * STEPS + 20, "phase": "refine"}) + "\n")
    elif what == "further phase":
        config = changed(CONFIG, phases=("pretrain", "learn", "refine", "scratch"))
        (run / "config.json").write_text(json.dumps(config.to_dict()))
    elif what == "two of one name":
        workdirs.append(make_run(tmp_path / "v" / "a", changed(CONFIG, seed=1)))
    elif what == "another run":
        collect([make_run(tmp_path / "v" / "a", changed(CONFIG, seed=1, learn={"block": 4}))], out)
    elif what == "out is a file":
        out = tmp_path / "file" / "out"
        out.parent.write_text("")
    elif what == "out holds a directory":
        (out / "table.csv").mkdir(parents=True)
    elif what == "out holds an unfinished run":
        make_run(out / "runs" / "b").joinpath("summary.json").unlink()
    return ["results", "--workdir", *map(str, workdirs), "--out", str(out)]


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("no directory", ["nowhere", "is no directory"]),
        ("a file", ["summary.json", "is no directory"]),
        ("no run", ["holds no run (no config.json)"]),
        ("unfinished", ["w/a", "not finished (no summary.json)"]),
        ("half a summary", ["summary.json is damaged", "line"]),
        ("no object", ["summary.json holds no JSON object"]),
        ("no text", ["config.json is damaged"]),
        ("another config", ["config.json", "'sede'", "did you mean 'seed'"]),
        ("no metrics", ["metrics.jsonl cannot be read"]),
        ("half a record", ["metrics.jsonl is damaged (line 4"]),
        ("gone on", ["has gone on"]),
        ("further phase", ["has gone on"]),
        ("two of one name", ["w/a", "v/a", "'a'", "rename"]),
        ("another run", ["w/a", "out/runs/a", "different: seed, learn.block", "rename"]),
        ("out is a file", ["--out", "is a file"]),
        ("out holds a directory", ["--out", "table.csv there is a directory"]),
        ("out holds an unfinished run", ["runs/b there holds a run that is not finished", "another one"]),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line_and_nothing_is_written(tmp_path, capsys, what, expected):
    arguments = spoil(tmp_path, what)
    before = contents(tmp_path)
    with pytest.raises(SystemExit) as stop:
        fdjax_command(arguments)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert all(words in said for words in expected), said
    assert contents(tmp_path) == before
    assert (tmp_path / "out").exists() == any(name.startswith("out/") for name in before) or "directory" in what


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    make_run(tmp_path / "a")
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UserError, match="not writable"):
        collect([tmp_path / "a"], tmp_path / "locked" / "out")


@pytest.mark.parametrize("arguments", [[], ["--out", "x"], ["--workdir", "x"], ["--workdir", "--out", "x"]])
def test_missing_flags_are_refused(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        fdjax_command(["results", *arguments])
    assert stop.value.code == 2
    assert capsys.readouterr().err
    assert not list(tmp_path.iterdir())


PATHS = [
    ("top1",), ("num_examples",), ("macs",), ("macs", "ratio"), ("macs", "dense"), ("macs", "paper_ratio"),
    ("macs", "pruned"), ("layers",), ("seconds",), ("phases",),
]  # fmt: skip


@given(
    path=st.sampled_from(PATHS),
    value=st.one_of(st.just(...), st.none(), st.text(max_size=3), st.just(float("nan")), st.booleans(), st.just([{}])),
)
def test_a_summary_that_lacks_anything_is_refused(path, value):
    summary = make_summary()
    *parents, last = path
    target = summary
    for key in parents:
        target = target[key]
    if value is ...:
        del target[last]
    else:
        target[last] = value
    with pytest.raises(ValueError, match=r"\b(has no|its)\b"):
        read_result("run", CONFIG, summary)


# What the rows say


def test_a_dense_run_is_a_row_of_its_own(tmp_path):
    make_run(tmp_path / "dense", DENSE, top1=0.735, dense_top1=0.735)
    make_run(tmp_path / "half", top1=0.71, dense_top1=0.735)
    collect([tmp_path / "half", tmp_path / "dense"], tmp_path / "out")
    dense, half = json.loads((tmp_path / "out" / "table.json").read_text())
    assert (dense["name"], dense["dense_top1"], dense["macs_ratio"], dense["bare_ratio"]) == ("dense", 0.735, 1.0, 1.0)
    for name in ("masks", "block", "target_macs", "pruned_top1", "loss_points", "rounded_top1", "whole", "paper_ratio"):
        assert dense[name] is None and half[name] is not None, name
    table = (tmp_path / "out" / "table.md").read_text()
    rows = cells(table)
    assert [row["run"] for row in rows] == ["dense", "half"]
    assert (rows[0]["dense top-1"], rows[0]["pruned top-1"], rows[0]["MACs"]) == ("73.50%", "–", "1.000x")
    assert "block 2;" in table and "block" not in rows[0]  # of all that have one


def test_dense_runs_alone_have_a_table_and_no_plot(tmp_path):
    make_run(tmp_path / "dense", DENSE, top1=0.735)
    done = collect([tmp_path / "dense"], tmp_path / "out")
    assert [path.name for path in done.written] == ["table.md", "table.csv", "table.json"]
    table = (tmp_path / "out" / "table.md").read_text()
    assert list(cells(table)[0]) == ["run", "dense top-1", "MACs", "without transforms", "time"]
    assert "tradeoff.png" not in table and not (tmp_path / "out" / "tradeoff.png").exists()


def test_a_dense_run_that_trained_on_counts_at_its_end():
    refined = changed(CONFIG, phases=("pretrain", "refine"))
    assert row_of(refined, top1=0.74, dense_top1=0.72).dense_top1 == 0.74


def test_the_last_phase_that_learned_masks_tells_of_rounding():
    config = changed(CONFIG, phases=("pretrain", "learn", "alternate", "refine"))
    summary = make_summary(config)
    summary["phases"][2] |= {"top1": 0.55, "soft_top1": 0.66}
    row = read_result("run", config, summary)
    assert (row.soft_top1, row.rounded_top1) == (0.66, 0.55)


def test_masks_from_another_run_make_it_a_pruned_one():
    """--init with masks, and only refinement here: no mask phase in the config."""
    config = changed(CONFIG, phases=("refine",))
    summary = make_summary(config)
    summary["layers"][1]["kept_counts"] = {"input": None, "output": [3, 0, 0, 0, 1]}
    row = read_result("run", config, summary)
    assert row.is_pruned and (row.removed, row.whole) == (0.75, 0.25) and row.rounded_top1 is None


def test_a_network_without_some_of_its_filters_is_a_pruned_one(tmp_path):
    """It is compared with the network that was pretrained, and has no masks."""
    config = changed(CONFIG, phases=("pretrain", "refine"))
    summary = make_summary(config, top1=0.70, dense_top1=0.72)
    assert not read_result("run", config, summary).is_pruned
    dense = summary["macs"]["dense"]
    summary |= {"pruned_by": "fpwt", "unpruned_macs": 2 * dense}
    summary["macs"] |= {"pruned": dense, "total": dense, "ratio": 1.0, "paper_ratio": 1.0}
    row = read_result("run", config, summary)
    assert row.is_pruned and not row.has_masks and row.dense_macs == 2 * dense and row.macs == dense
    assert (row.dense_top1, row.pruned_top1, row.macs_ratio, row.bare_ratio) == (0.72, 0.70, 0.5, 0.5)
    assert row.block is None and row.target_macs is None and row.whole is None
    for name in ("l1", "fpwt"):
        file = make_run(tmp_path / name, config) / "summary.json"
        file.write_text(json.dumps({**summary, "pruned_by": name}))
    collect([tmp_path / "l1", tmp_path / "fpwt"], tmp_path / "out")
    rows = {row["run"]: row for row in cells((tmp_path / "out" / "table.md").read_text())}
    assert [rows[name]["filters"] for name in ("l1", "fpwt")] == ["removed by l1", "removed by fpwt"]
    assert rows["l1"]["MACs"] == "0.500x" and rows["l1"]["dense top-1"] == "72.00%"
    kinds = kinds_of_masks([read_result(name, config, {**summary, "pruned_by": name}) for name in ("l1", "fpwt")])
    assert kinds == {name: f"filters removed by {name}" for name in ("l1", "fpwt")}


@pytest.mark.parametrize(
    ("parts", "masks", "block", "data"),
    [
        ({}, "tied, levels 0,1,N, penalty macs", "2", "cifar10"),
        ({"learn": {"tied": False, "levels": "all"}}, "both sides, all levels, penalty macs", "2", "cifar10"),
        ({"learn": {"tied": False, "sides": "input"}}, "input side, levels 0,1,N, penalty macs", "2", "cifar10"),
        (
            {"learn": {"sides": "output"}, "distill": {"weight": 0.5}},
            "tied, elsewhere output side, levels 0,1,N, penalty macs, distillation 0.5", "2", "cifar10",
        ),
        (
            {"learn": {"block_by_map": ((7, 7),), "block_by_layer": (("head", 1),)}},
            "tied, levels 0,1,N, penalty macs", "2 (7 on 7x7 maps, 1 in head)", "cifar10",
        ),
        (
            {"data": {"name": "folder", "path": "/home/someone/pictures/"}},
            "tied, levels 0,1,N, penalty macs", "2", "folder pictures",
        ),
    ],
)  # fmt: skip
def test_settings_in_words(parts, masks, block, data):
    row = row_of(changed(CONFIG, **parts))
    assert (row.masks, row.block, row.data) == (masks, block, data)


@given(st.lists(st.lists(st.integers(0, 50), min_size=2, max_size=17), max_size=6))
def test_kept_shares_count_every_channel_once(histograms):
    summary = make_summary()
    summary["layers"] = [{"kept_counts": {"input": counts, "output": None}} for counts in histograms]
    row = read_result("run", CONFIG, summary)
    channels = sum(map(sum, histograms))
    shares = [row.removed, row.only_mean, row.partial, row.whole]
    if not channels:
        assert shares == [None] * 4
        return
    expected = np.zeros(4)
    for counts in histograms:
        whole = len(counts) - 1
        for kept, number in enumerate(counts):
            expected[3 if kept == whole else min(kept, 2)] += number
    np.testing.assert_allclose(np.array(shares, float), expected / channels)


@pytest.mark.parametrize(
    ("learn", "expected"),
    [
        ({}, "0.5x"),
        ({"target_convention": "paper"}, "0.5x by the paper's count"),
        ({"target_macs": None, "lambda_": 0.25}, "lambda 0.25"),
        ({"target_macs": None, "lambda_": 0.25, "target_convention": "paper"}, "lambda 0.25 by the paper's count"),
    ],
)
def test_targets_in_words(learn, expected):
    rows = [row_of(changed(CONFIG, learn=learn), "a"), row_of(changed(CONFIG, learn={"target_macs": 0.9}), "b")]
    by_name = {row["run"]: row["target"] for row in cells(markdown(rows))}
    assert by_name == {"a": expected, "b": "0.9x"}
    assert all("lambda" not in row.get("other settings", "") for row in cells(markdown(rows)))


# The Markdown table


def test_what_is_the_same_stands_above_the_table_and_what_differs_in_it():
    rows = [row_of(name="a"), row_of(changed(CONFIG, learn={"target_macs": 0.35}), "b", ratio=0.35, commit=None)]
    table = markdown(rows)
    head, found = table.splitlines()[0], cells(table)
    assert head.startswith("Same in all rows: network mobilenetv2_cifar100 at width 0.5; dense MACs 1.00 M; data cifar")
    for words in ("phases pretrain, learn, refine", "hardware Some CPU, 2 cores", "seed 0", "jax 0.10.2", "block 2"):
        assert words in head
    assert [(row["run"], row["target"], row["commit"]) for row in found] == [
        ("a", "0.5x", "abc1234"),
        ("b", "0.35x", "–"),
    ]
    assert not {"network", "data", "phases", "block", "masks", "hardware", "jax", "seed"} & set(found[0])
    assert (found[0]["time"], found[0]["removed / mean / partial / whole"]) == ("10.0 min", "40 / 40 / 5 / 15%")
    assert not any("other settings" in row for row in found)


def test_settings_without_a_column_are_named_where_they_differ():
    rows = [
        row_of(name="a"),
        row_of(changed(CONFIG, refine={"epochs": 20}, learn={"momentum": 0.5}), "b"),
        row_of(changed(CONFIG, scratch={"epochs": 3}), "c"),  # a phase that the run does not have
        row_of(DENSE, "dense"),
    ]
    by_name = {row["run"]: row["other settings"] for row in cells(markdown(rows)) if not row["run"].startswith("*")}
    assert by_name == {
        "a": "learn.momentum 0.9, refine.epochs 8",
        "b": "learn.momentum 0.5, refine.epochs 20",
        "c": "learn.momentum 0.9, refine.epochs 8",
        "dense": "–",
    }


@given(
    st.lists(
        st.tuples(st.floats(0.1, 0.9), st.floats(0.1, 0.9), st.floats(0.05, 1.0), st.floats(1, 1e5)),
        min_size=2,
        max_size=5,
    )
)
def test_seeds_have_a_mean_within_its_spread(figures):
    rows = [
        row_of(changed(CONFIG, seed=seed), f"s{seed}", top1=top1, dense_top1=dense, ratio=ratio, seconds=seconds)
        for seed, (top1, dense, ratio, seconds) in enumerate(figures)
    ]
    rows.append(row_of(changed(CONFIG, learn={"penalty": "fcmask"}), "alone"))
    found = cells(markdown(rows))
    (summed,) = [row for row in found if "mean" in row["run"]]
    assert summed["run"] == f"**mean of {len(figures)}**" and len(found) == len(rows) + 1
    top1s = [100 * top1 for top1, *_ in figures]
    middle, _, spread = summed["pruned top-1"].partition("%")
    assert float(middle) == pytest.approx(sum(top1s) / len(top1s), abs=0.006)
    if spread:
        low, high = (float(end) for end in spread.strip(" ()").split(".."))
        assert (low, high) == (pytest.approx(min(top1s), abs=0.006), pytest.approx(max(top1s), abs=0.006))
        assert low - 0.01 <= float(middle) <= high + 0.01
    else:
        assert f"{min(top1s):.2f}" == f"{max(top1s):.2f}"


def test_only_seeds_are_taken_together():
    base = [row_of(changed(CONFIG, seed=seed), f"s{seed}") for seed in (0, 1)]
    free = changed(CONFIG, seed=2, checkpoint={"keep": 5}, compute={"steps_per_dispatch": 1})
    assert [len(group) for group in seed_groups([*base, row_of(free, "s2")])] == [3]  # no figure depends on these
    for parts in (
        {"learn": {"epochs": 9.0}},
        {"distill": {"weight": 0.5}},
        {"data": {"train_limit": None}},
        {"phases": ("pretrain", "learn", "scratch")},
        {"model": {"padding": "torch"}},
    ):
        other = row_of(changed(CONFIG, seed=2, **parts), "other")
        assert sorted(len(group) for group in seed_groups([*base, other])) == [1, 2], parts
    inherited = row_of(changed(CONFIG, seed=2), "other", skipped=1)
    assert sorted(len(group) for group in seed_groups([*base, inherited])) == [1, 2]
    # Settings of a phase that --init has done are those of another run.
    elsewhere = row_of(changed(CONFIG, seed=3, pretrain={"epochs": 99}), "elsewhere", skipped=1)
    assert sorted(len(group) for group in seed_groups([*base, inherited, elsewhere])) == [2, 2]


def test_runs_pruned_by_different_methods_are_no_seeds_of_one_another():
    configs = [changed(CONFIG, seed=seed) for seed in range(4)]
    methods = ("band", "channel", "band", "channel")
    rows = [
        read_result(f"{method}_seed{config.seed}", config, {**make_summary(config, skipped=2), "pruned_by": method})
        for config, method in zip(configs, methods, strict=True)
    ]
    assert [[row.name for row in group] for group in seed_groups(rows)] == [
        ["band_seed0", "band_seed2"], ["channel_seed1", "channel_seed3"]
    ]  # fmt: skip
    assert "(pruned by band), " in rows[0].phases and rows[0].own_phases == rows[1].own_phases


def test_blocks_tell_masks_apart():
    rows = [row_of(changed(CONFIG, learn={"block": block, "block_by_map": ()}), f"b{block}") for block in (2, 4)]
    assert kinds_of_masks(rows)["b2"].endswith("block 2") and kinds_of_masks(rows)["b4"].endswith("block 4")


def test_one_seed_run_twice_has_no_spread_over_seeds():
    assert "mean" not in {row["run"] for row in cells(markdown([row_of(name="a"), row_of(name="b", top1=0.6)]))}
    assert "mean of" not in markdown([row_of(name="a"), row_of(name="b", top1=0.6)])


def test_a_mean_over_runs_of_which_some_lack_a_figure_is_left_out():
    rows = [row_of(name="old", soft_top1=None), row_of(changed(CONFIG, seed=1), "new")]
    assert [row["soft masks"] for row in cells(markdown(rows))] == ["–", "65.00%", "–"]


def test_a_loss_of_nothing_has_no_minus_sign():
    assert cells(markdown([row_of(top1=0.720001, dense_top1=0.72)]))[0]["loss"] == "+0.00"


def test_a_name_with_a_bar_does_not_break_the_table():
    assert any(line.startswith("| a\\|b | ") for line in markdown([row_of(name="a|b")]).splitlines())


# The plot


def points(axes) -> dict[str, np.ndarray]:
    return {
        str(line.get_label()): np.asarray(line.get_xydata(), float)
        for line in axes.get_lines()
        if not str(line.get_label()).startswith("_")
    }


def lines_between(axes) -> list[np.ndarray]:
    """The lines that join means."""
    return [np.asarray(line.get_xydata(), float) for line in axes.get_lines() if str(line.get_label()).startswith("_")]


@pytest.fixture
def study():
    """Two kinds of masks at two targets with two seeds each, from a dense run for each seed."""
    rows = [row_of(changed(DENSE, seed=s), f"dense{s}", top1=0.72 + s / 100, dense_top1=0.72 + s / 100) for s in (0, 1)]
    for sides, tied in (("tied", True), ("both", False)):
        for target in (0.5, 0.3):
            for s in (0, 1):
                config = changed(CONFIG, seed=s, learn={"tied": tied, "target_macs": target})
                figures = {"top1": 0.6 + target / 10 + s / 50 + tied / 50, "dense_top1": 0.72 + s / 100}
                rows.append(row_of(config, f"{sides}{target}{s}", ratio=target, skipped=1, **figures))
    return rows


def test_every_pruned_run_is_a_point_of_its_kind(study):
    (axes,) = tradeoff_figure(study).axes
    drawn = points(axes)
    assert set(drawn) == {"tied", "both sides", "dense (mean and range)"}  # what is the same in all is not repeated
    for label, sides in (("tied", "tied"), ("both sides", "both")):
        expected = {(r.macs_ratio, round(100 * r.pruned_top1, 9)) for r in study if r.name.startswith(sides)}
        assert {(x, round(y, 9)) for x, y in drawn[label]} == expected and len(expected) == 4
    np.testing.assert_allclose(drawn["dense (mean and range)"][:, 1], 72.5)
    (band,) = axes.patches
    assert (band.get_y(), band.get_height()) == (pytest.approx(72), pytest.approx(1))
    low, high = axes.get_ylim()
    assert all(low < y < high for xy in drawn.values() for _, y in xy)
    left, right = axes.get_xlim()
    assert all(left < x < right for label in ("tied", "both sides") for x, _ in drawn[label])
    assert "MACs" in axes.get_xlabel() and "%" in axes.get_ylabel() and "cifar10" in axes.get_title()


def test_lines_join_the_means_over_seeds_by_target_and_nothing_else(study):
    (axes,) = tradeoff_figure(study).axes
    joined = sorted((line.tolist() for line in lines_between(axes)), key=lambda line: line[0][1])
    np.testing.assert_allclose(joined, [[[0.3, 64], [0.5, 66]], [[0.3, 66], [0.5, 68]]])
    other = row_of(changed(CONFIG, learn={"target_macs": 0.4}, refine={"epochs": 30}), "other", ratio=0.4)
    assert len(lines_between(tradeoff_figure([*study, other]).axes[0])) == 2


def test_kinds_have_colours_and_markers_of_their_own(study):
    (axes,) = tradeoff_figure(study).axes
    styles = {(line.get_color(), line.get_marker()) for line in axes.get_lines() if line.get_marker() != "None"}
    assert len(styles) == 2
    levels = [row_of(changed(CONFIG, learn={"levels": f"0,{n},N"}), f"r{n}") for n in range(1, 13)]
    (axes,) = tradeoff_figure(levels).axes
    styles = {(line.get_color(), line.get_marker()) for line in axes.get_lines() if line.get_marker() != "None"}
    assert len(styles) == 12


def test_runs_of_another_length_are_another_kind(study):
    longer = row_of(changed(CONFIG, learn={"target_macs": 0.3}, refine={"epochs": 30}), "longer", ratio=0.3, skipped=1)
    drawn = points(tradeoff_figure([*study, longer]).axes[0])
    sides = mask_words(CONFIG)[0]
    np.testing.assert_allclose(drawn[f"{sides}, refine 30 epochs"], [[0.3, 100 * longer.pruned_top1]])
    assert len(drawn[f"{sides}, refine {CONFIG.refine.epochs:g} epochs"]) == 4


def test_each_length_of_dense_training_has_its_line(study):
    longer = changed(DENSE, pretrain={"epochs": 28})
    drawn = points(tradeoff_figure([*study, row_of(longer, "long", top1=0.74)]).axes[0])
    np.testing.assert_allclose(drawn["dense, pretrain 20 epochs (mean and range)"][:, 1], 72.5)
    np.testing.assert_allclose(drawn["dense, pretrain 28 epochs"][:, 1], 74)
    # A run that learns masks only says nothing of pretraining: its dense network is one of those, or unknown.
    alone = changed(CONFIG, phases=("learn", "refine"))
    assert set(points(tradeoff_figure([*study, row_of(alone, "x", dense_top1=0.72)]).axes[0])) >= {
        "dense (mean and range)"
    }
    drawn = points(tradeoff_figure([*study, row_of(alone, "x", dense_top1=0.5)]).axes[0])
    np.testing.assert_allclose(drawn["dense, as given by --init"][:, 1], 50)
    going_on = row_of(changed(DENSE, phases=("pretrain", "refine"), refine={"epochs": 9}), "x", skipped=1, top1=0.7)
    drawn = points(tradeoff_figure([*study, going_on]).axes[0])
    np.testing.assert_allclose(drawn["dense, by --init, refine 9 epochs"][:, 1], 70)


def test_networks_and_data_have_panels_of_their_own(study):
    other = row_of(changed(CONFIG, data={"name": "fashion_mnist_subset", "train_limit": None}), "other")
    figure = tradeoff_figure([*study, other])
    assert [axes.get_title() for axes in figure.axes] == [
        "mobilenetv2_cifar100 at width 0.5 on cifar10, 5,000 training images",
        "mobilenetv2_cifar100 at width 0.5 on fashion_mnist_subset",
    ]
    assert len(points(figure.axes[1])["tied"]) == 1
    (legend,) = figure.legends
    assert len({text.get_text() for text in legend.get_texts()}) == len(legend.get_texts()) == 3


def test_runs_that_hardly_differ_are_not_blown_up():
    rows = [row_of(changed(CONFIG, seed=s), f"s{s}", top1=0.7 + s / 1e4, dense_top1=0.7) for s in (0, 1)]
    (axes,) = tradeoff_figure(rows).axes
    assert axes.get_xlim()[1] - axes.get_xlim()[0] >= 0.29
    assert axes.get_ylim()[1] - axes.get_ylim()[0] >= 1


def timed(name: str, engine: str, batch: int, ratio: float, target: float, **parts):
    config = changed(CONFIG, learn={"target_time": target}, **parts)
    time = {"engine": engine, "batch": batch, "threads": 1, "ratio": ratio}
    return read_result(name, config, {**make_summary(config, top1=0.5 + ratio / 10), "time": time})


def test_times_are_drawn_where_they_were_measured_on_the_same(tmp_path, study):
    rows = [timed("a", "xla", 8, 0.5, 0.5), timed("b", "xla", 8, 0.7, 0.7), timed("c", "onnxruntime", 1, 0.6, 0.6)]
    figure = tradeoff_figure([*study, *rows], TIME)
    (axes,) = figure.axes
    assert axes.get_title().endswith("5,000 training images\nxla, 8 images, 1 thread") and "time" in axes.get_xlabel()
    drawn = points(axes)
    (kind,) = drawn.keys() - {"dense (mean and range)"}
    np.testing.assert_allclose(sorted(drawn[kind].tolist()), [[0.5, 55], [0.7, 57]])
    (line,) = lines_between(axes)
    np.testing.assert_allclose(line, [[0.5, 55], [0.7, 57]])
    assert len(tradeoff_figure([*rows, timed("d", "onnxruntime", 1, 0.8, 0.8)], TIME).axes) == 2
    for few in (study, [*study, rows[0], rows[2]]):
        with pytest.raises(NoDataError, match="no two runs have a time"):
            tradeoff_figure(few, TIME)


def test_the_picture_of_times_is_there_while_there_are_times(tmp_path):
    workdirs = [make_run(tmp_path / name, changed(CONFIG, seed=seed)) for seed, name in enumerate("ab")]
    collect(workdirs, tmp_path / "out")
    assert not (tmp_path / "out" / "tradeoff_time.png").exists()
    for workdir in workdirs:
        summary = json.loads((workdir / "summary.json").read_text())
        summary["time"] = {"engine": "xla", "batch": 1, "threads": 1, "ratio": 0.5}
        (workdir / "summary.json").write_text(json.dumps(summary))
    assert tmp_path / "out" / "tradeoff_time.png" in collect(workdirs, tmp_path / "out").written
    assert "against their time](tradeoff_time.png)" in (tmp_path / "out" / "table.md").read_text()
    shutil.rmtree(tmp_path / "out" / "runs" / "a")
    collect(workdirs[1:], tmp_path / "out")
    assert not (tmp_path / "out" / "tradeoff_time.png").exists()


def test_a_plot_needs_masks():
    with pytest.raises(NoDataError, match="no run has masks"):
        tradeoff_figure([row_of(DENSE)])

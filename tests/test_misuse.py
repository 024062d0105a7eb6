"""Every command with what may be given to it wrongly: one short message, exit status 2, and no file is touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from fdjax.commands.evaluate import eval_command
from fdjax.commands.main import COMMANDS, fdjax_command
from fdjax.commands.train import train_command
from fdjax.frozen import freeze, save
from fdjax.frozen.bench import seeded_variables
from fdjax.training.build import build_network
from tests.frozen_checkpoints import CONFIG, write_checkpoint

QUICKSTART = str(Path(__file__).parents[1] / "configs" / "quickstart.py")

# Command -> (arguments, what the message has). {here} is a folder with `run` (a checkpoint of the refine phase),
# `pretrained` (one of pretrain), `frozen`, `clocked` (for OpenVINO at 8 images),
# `picture.png`, `text` (a text file), `empty` and `full` (folders).
MISUSES: dict[str, list[tuple[str, str]]] = {
    "train.py": [
        ("", "--config FILE is missing"),
        ("--config {here}/none.py --workdir {here}/new", "no config file"),
        ("--config {here}/text --workdir {here}/new", "text"),
        (f"--config {QUICKSTART} --workdir {{here}}/text", "{here}/text"),
        (f"--config {QUICKSTART} --workdir {{here}}/full", "{here}/full"),
        (f"--config {QUICKSTART} --workdir {{here}}/text/new", "{here}/text"),
        (f"--config {QUICKSTART} --workdir {{here}}/new --init {{here}}/empty", "{here}/empty"),
        (f"--config {QUICKSTART} --workdir {{here}}/new --init {{here}}/frozen", "{here}/frozen"),
        (f"--config {QUICKSTART} --workdir {{here}}/new --time-limit 0", "--time-limit"),
        (f"--config {QUICKSTART} --workdir {{here}}/new --learn.exclude stm", "stm"),
        (f"--config {QUICKSTART} --workdir {{here}}/new --model.factory none:make", "none"),
    ],
    "eval.py": [
        ("", "--checkpoint"),
        ("--checkpoint {here}/run --frozen {here}/frozen", "--frozen"),
        ("--checkpoint {here}/none", "{here}/none"),
        ("--checkpoint {here}/empty", "{here}/empty"),
        ("--checkpoint {here}/text", "{here}/text"),
        ("--checkpoint {here}/frozen", "{here}/frozen"),
        ("--frozen {here}/run", "{here}/run"),
        ("--frozen {here}/none", "{here}/none"),
        ("--checkpoint {here}/run --which second", "second"),
        ("--checkpoint {here}/run --which 12345", "12345"),
        ("--checkpoint {here}/run --which best", "best"),
        ("--checkpoint {here}/run --split train", "train"),
        ("--checkpoint {here}/run --json {here}/none/out.json", "out.json"),
        ("--checkpoint {here}/run --json {here}/empty", "{here}/empty"),
        ("--checkpoint {here}/run --data-path {here}/none", "{here}/none"),
    ],
    "macs": [
        ("", "--config"),
        (f"--config {QUICKSTART} --checkpoint {{here}}/run", "--checkpoint"),
        ("--config {here}/none.py", "no config file"),
        ("--checkpoint {here}/empty", "{here}/empty"),
        (f"--config {QUICKSTART} --model.width 0", "above 0"),
        (f"--config {QUICKSTART} --json {{here}}/none/out.json", "out.json"),
    ],
    "import": [
        ("", "--config"),
        (f"--config {QUICKSTART} --format torchvision --weights {{here}}/none --out {{here}}/new", "{here}/none"),
        (f"--config {QUICKSTART} --format torchvision --weights {{here}}/text --out {{here}}/new", "{here}/text"),
        (f"--config {QUICKSTART} --format torchvision --weights {{here}}/empty --out {{here}}/new", "{here}/empty"),
        (f"--config {QUICKSTART} --format onnx --weights {{here}}/text --out {{here}}/new", "torchvision"),
        (f"--config {QUICKSTART} --format timm --weights {{here}}/text --out {{here}}/full", "{here}/full"),
        (f"--config {QUICKSTART} --format timm --weights {{here}}/text --out {{here}}/new --epsilon 0", "epsilon"),
    ],
    "blocks": [
        ("", "--checkpoint"),
        ("--checkpoint {here}/none", "{here}/none"),
        ("--checkpoint {here}/run", "pretrain"),
        ("--checkpoint {here}/pretrained --candidates 0", "1 to 16"),
        ("--checkpoint {here}/pretrained --candidates two", "two"),
        ("--checkpoint {here}/pretrained --target-macs 2", "2"),
        ("--checkpoint {here}/pretrained --images 0", "--images"),
        ("--checkpoint {here}/pretrained --json {here}/none/out.json", "out.json"),
    ],
    "profile": [
        ("", "--checkpoint"),
        ("--checkpoint {here}/none", "{here}/none"),
        ("--checkpoint {here}/pretrained --which last", "last"),
        ("--checkpoint {here}/pretrained --methods magic", "magic"),
        ("--checkpoint {here}/pretrained --ratios 2", "2"),
        ("--checkpoint {here}/pretrained --images 0", "--images"),
        ("--checkpoint {here}/pretrained --block 99", "99"),
        ("--checkpoint {here}/pretrained --plot {here}/none/plot.png", "plot.png"),
    ],
    "prune": [
        ("", "--checkpoint"),
        ("--checkpoint {here}/none --method channel --out {here}/new --target-macs 0.5", "{here}/none"),
        ("--checkpoint {here}/pretrained --method magic --out {here}/new --target-macs 0.5", "magic"),
        ("--checkpoint {here}/pretrained --method channel --out {here}/full --target-macs 0.5", "{here}/full"),
        ("--checkpoint {here}/pretrained --method channel --out {here}/new --target-macs 0", "above 0"),
        ("--checkpoint {here}/pretrained --method channel --out {here}/new", "--target-macs"),
    ],
    "freeze": [
        ("", "--checkpoint"),
        ("--checkpoint {here}/none --out {here}/new", "{here}/none"),
        ("--checkpoint {here}/frozen --out {here}/new", "{here}/frozen"),
        ("--checkpoint {here}/run --out {here}/full", "{here}/full"),
        ("--checkpoint {here}/run --out {here}/text", "{here}/text"),
        ("--checkpoint {here}/run --out {here}/run", "{here}/run"),
        ("--checkpoint {here}/run --out {here}/new --which never", "never"),
        ("--checkpoint {here}/run --out {here}/new --choose beauty", "beauty"),
        ("--checkpoint {here}/run --out {here}/new --engine tvm", "tvm"),
        ("--checkpoint {here}/run --out {here}/new --choose estimate", "--target"),
        ("--checkpoint {here}/run --out {here}/new --target tpu:v5e", "--choose estimate"),
        ("--checkpoint {here}/run --out {here}/new --choose estimate --target tpu:v9", "no target 'tpu:v9'"),
        ("--checkpoint {here}/run --out {here}/new --json {here}/none/out.json", "out.json"),
    ],
    "export": [
        ("", "--frozen"),
        ("--frozen {here}/none --out {here}/new.onnx", "{here}/none"),
        ("--frozen {here}/run --out {here}/new.onnx", "{here}/run"),
        ("--frozen {here}/frozen --out {here}/new.pb", ".stablehlo"),
        ("--frozen {here}/frozen --out {here}/none/new.onnx", "new.onnx"),
        ("--frozen {here}/frozen --out {here}/empty", "{here}/empty"),
        ("--frozen {here}/clocked --out {here}/new.cc", "made for openvino at 8 images, not for native"),
    ],
    "compile": [
        ("", "--target"),
        ("--target tpu:v5e", "--frozen DIR or --config FILE"),
        ("--target tpu:v9 --frozen {here}/frozen", "no target 'tpu:v9'"),
        (f"--target tpu:v5e --frozen {{here}}/frozen --config {QUICKSTART}", "either"),
        ("--target tpu:v5e --frozen {here}/frozen --seed 3", "no settings"),
        ("--target tpu:v5e --frozen {here}/frozen --batch 0", "batch"),
    ],
    "bench": [
        ("", "--frozen"),
        ("--frozen {here}/none", "{here}/none"),
        ("--frozen {here}/text", "{here}/text"),
        ("--frozen {here}/frozen --batch 0", "batch"),
        ("--frozen {here}/frozen --batch one", "one"),
        ("--frozen {here}/frozen --threads 0", "threads"),
        ("--frozen {here}/frozen --rounds 0", "rounds"),
        ("--frozen {here}/frozen --engine tvm", "tvm"),
        ("--frozen {here}/clocked", "made for openvino at 8 images, not for xla at 1 and 8 images"),
        ("--frozen {here}/clocked --engine native xla --batch 8", "--any-engine"),
        ("--frozen {here}/frozen --dtype float16", "float16"),
        ("--frozen {here}/frozen --json {here}/none/out.json", "out.json"),
        ("--frozen {here}/frozen --picture {here}/none/out.png", "out.png"),
    ],
    "predict": [
        ("", "--frozen"),
        ("--frozen {here}/none {here}/picture.png", "{here}/none"),
        ("--frozen {here}/frozen", "picture"),
        ("--frozen {here}/frozen {here}/none.png", "none.png"),
        ("--frozen {here}/frozen {here}/empty", "{here}/empty"),
        ("--frozen {here}/frozen --top 0 {here}/picture.png", "top"),
        ("--frozen {here}/clocked --engine native {here}/picture.png", "made for openvino at 8 images, not for native"),
        ("--frozen {here}/frozen --csv {here}/none/out.csv {here}/picture.png", "out.csv"),
    ],
    "check": [
        ("", "--workdir"),
        ("--workdir {here}/none", "{here}/none"),
        ("--workdir {here}/run --frozen {here}/frozen", "--frozen"),
        ("--frozen {here}/none", "{here}/none"),
        ("--workdir {here}/empty", "{here}/empty"),
    ],
    "data": [
        ("", "prepare"),
        ("fetch", "fetch"),
        ("prepare", "--source"),
        ("prepare cifar10 --source {here}/none --out {here}/new", "{here}/none"),
        ("prepare set --source {here}/text --out {here}/new", "set"),
        ("inspect", "missing: STR Name of the set"),
        ("inspect nothing", "nothing"),
        ("inspect folder --path {here}/none", "{here}/none"),
        ("inspect folder --path {here}/empty", "{here}/empty"),
        ("inspect fashion_mnist_subset --sheet {here}/none/sheet.png", "sheet.png"),
        (f"sheet --config {QUICKSTART} --out {{here}}/none/sheet.png", "sheet.png"),
        (f"sheet --config {QUICKSTART} --out {{here}}/new.png --images 0", "images"),
    ],
    "sweep": [
        ("", "--config"),
        ("--config {here}/none.py --workdir {here}/new", "none.py"),
        (f"--config {QUICKSTART} --workdir {{here}}/new", "get_sweep"),
        (f"--config {QUICKSTART} --workdir {{here}}/new --jobs 0", "jobs"),
    ],
    "report": [
        ("", "--workdir"),
        ("--workdir {here}/none --out {here}/new.html", "none: it is no directory"),
        ("--workdir {here}/empty --out {here}/new.html", "empty: it holds no run"),
        ("--workdir {here}/run --out {here}/none/new.html", "new.html"),
        ("--workdir {here}/run --out {here}/empty", "{here}/empty"),
    ],
    "results": [
        ("", "--workdir"),
        ("--workdir {here}/none --out {here}/new", "{here}/none"),
        ("--workdir {here}/empty --out {here}/new", "{here}/empty"),
        ("--workdir {here}/run --out {here}/text", "{here}"),
    ],
}
# Each command's last misuse, and a flag that there is not.
for name in ("train", "eval"):
    MISUSES[name] = [MISUSES[f"{name}.py"][at] for at in (0, -1)]
ROWS = [
    (command, *row)
    for command, rows in MISUSES.items()
    for row in [*rows, (f"{rows[-1][0]} --no-such-flag", "no-such-flag")]
]


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("here")
    write_checkpoint(folder / "run", "refine")
    write_checkpoint(folder / "pretrained", "pretrain")
    _, graph = build_network(CONFIG, (28, 28, 1), 10)
    frozen = freeze(graph, seeded_variables(graph), graph.full_counts())
    facts = {"macs": {"ratio": 1.0, "paper_ratio": 1.0}, "layers": []}
    save(folder / "frozen", graph, frozen, facts)
    choice = {"by": "time", "engine": "openvino", "batch": 8}
    save(folder / "clocked", graph, frozen, {**facts, "choice": choice})
    Image.new("L", (28, 28)).save(folder / "picture.png")
    (folder / "text").write_text("These are words.")
    (folder / "empty").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "letter").write_text("Somebody's own.")
    return folder


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))}


def call(command: str, arguments: list[str]) -> int:
    own: dict[str, Callable[[list[str]], int]] = {"train.py": train_command, "eval.py": eval_command}
    try:
        return own[command](arguments) if command in own else fdjax_command([command, *arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


def test_the_table_has_every_command() -> None:
    assert set(MISUSES) == {"train.py", "eval.py", *COMMANDS}


@pytest.mark.parametrize(("command", "arguments", "expected"), ROWS)
def test_misuse_is_one_message_and_touches_nothing(here, monkeypatch, capsys, command, arguments, expected) -> None:
    monkeypatch.chdir(here)
    before = contents(here)
    status = call(command, [argument.format(here=here) for argument in arguments.split()])
    said = capsys.readouterr()
    assert status == 2, said
    message = " ".join((said.err or said.out).split())
    assert expected.format(here=here) in message
    assert "Traceback" not in said.err and len(said.err.splitlines()) <= 10
    assert contents(here) == before

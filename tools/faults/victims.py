"""The victims: files of runs, frozen networks, data sets, weights and configs, and the commands that read them.

A victim is a folder that is copied, damaged and given to a command. It knows the result for the undamaged folder.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.original_layouts import random_pixels, write_cifar10_python, write_folder, write_idx_folder
from tools.faults.damage import of_bytes, of_itself, of_json
from tools.faults.worker import Outcome, Worker

ROOT = Path(__file__).parents[2]
# A short run with every kind of phase; {} is its workdir.
TRAIN = (
    f"train --config {ROOT}/configs/quickstart_paper.py --workdir {{}} --model.width 0.2 --phases pretrain "
    "learn refine --pretrain.steps 6 --learn.steps 6 --refine.steps 6 --data.batch-size 16 --data.validation 0.1 "
    "--learn.target-macs 0.8 --checkpoint.every-epochs 0.004 --checkpoint.keep 4 --checkpoint.no-time"
).split()
# The stopped run has no checkpoints from this step on, which is in the phase that learns masks.
_STOPPED_AFTER = 10


@dataclasses.dataclass(frozen=True)
class Victim:
    """Something to damage.

    Attributes:
      name: the victim's name.
      folder: the undamaged folder.
      damage: damages a copy, and returns what it did.
      command: arguments of the command that reads the copy; {out} is a path for its output.
      verdict: checks the result of a command that ended with status 0; returns None if it is right, or what is wrong.
      share: its share of the faults, relative to the others'.
    """

    name: str
    folder: Path
    damage: Callable[[Path, random.Random], str]
    command: Callable[[Path, Path, random.Random], Sequence[str]]
    verdict: Callable[[Path, Path, Outcome, Worker], str | None]
    share: float = 1.0


def with_folder(command: Sequence[str], folder: Path) -> list[str]:
    """Returns a command line with its placeholders filled in."""
    return [word.format(folder) for word in command]


def damaged_file(pattern: str = "*", how: Callable[[Path, random.Random], str] = of_bytes):
    """Returns a function that damages one of the files that match a pattern, at any depth."""

    def damage(folder: Path, rng: random.Random) -> str:
        file = rng.choice(sorted(path for path in folder.rglob(pattern) if path.is_file()))
        return f"{file.relative_to(folder)}: {how(file, rng)}"

    return damage


def expect(worker: Worker, *arguments: str) -> Outcome:
    """Executes a command that has to succeed."""
    outcome = worker.run(*arguments)
    if outcome.status != 0:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{outcome.out}\n{outcome.err}")
    return outcome


def any_answer(copy: Path, out: Path, outcome: Outcome, worker: Worker) -> str | None:
    """Accepts any result, because the file's format cannot detect the damage."""
    return None


# Runs


def make_run(stage: Path, worker: Worker) -> None:
    """Makes stage/run, a finished run, and stage/stopped, the same run killed in the middle."""
    if (stage / "stopped").exists():
        return
    run = stage / "run"
    shutil.rmtree(run, ignore_errors=True)
    expect(worker, *with_folder(TRAIN, run))
    draft = shutil.copytree(run, stage / "stopped.draft", dirs_exist_ok=True)
    (draft / "summary.json").unlink()
    for step in (draft / "checkpoints").iterdir():
        if int(step.name) > _STOPPED_AFTER:
            shutil.rmtree(step)
    if not list((draft / "checkpoints").iterdir()):
        # Only the last checkpoints are kept, so a run with fewer phases makes the earlier ones.
        shutil.rmtree(draft)
        draft.mkdir()
        words = with_folder(TRAIN, draft)
        expect(worker, *words[: words.index("refine")], *words[words.index("refine") + 1 :])
    draft.rename(stage / "stopped")


def of_runs(stage: Path, worker: Worker) -> list[Victim]:
    """Returns the victims of runs: a finished run that is evaluated or run again, and a stopped one that is resumed."""
    make_run(stage, worker)
    right = expect(worker, "weights", str(stage / "run")).out
    evaluations = {}
    for step in sorted(int(path.name) for path in (stage / "run" / "checkpoints").iterdir()):
        out = stage / "evaluation.json"
        expect(worker, "eval", "--checkpoint", str(stage / "run"), "--which", str(step), "--json", str(out))
        evaluations[step] = json.loads(out.read_text())
    latest = max(evaluations)

    def evaluated(copy: Path, out: Path, outcome: Outcome, worker: Worker) -> str | None:
        found = json.loads(out.read_text())
        if found != evaluations.get(found.get("step")):
            return "other figures than the undamaged run's"
        if found["step"] != latest and "warning" not in outcome.err:
            return f"step {found['step']} in place of {latest}, without a warning"
        return None

    def went_on(copy: Path, out: Path, outcome: Outcome, worker: Worker) -> str | None:
        found = worker.run("weights", str(copy))
        if found.status != 0:
            return f"its checkpoint cannot be read afterwards: {found.err.strip()[-300:]}"
        if found.out != right:
            return "other weights than the undamaged run's"
        if "phases" not in json.loads((copy / "summary.json").read_text()):
            return "a summary without phases"
        return None

    def any_kind(folder: Path, rng: random.Random) -> str:
        how = rng.choice(("bytes", "bytes", "top", "json"))
        if how == "bytes":
            return damaged_file()(folder, rng)
        if how == "top":
            file = rng.choice(sorted(path for path in folder.iterdir() if path.is_file()))
            return f"{file.name}: {of_bytes(file, rng)}"
        files = [path for path in folder.rglob("*") if path.suffix == ".json" or path.name == "metadata"]
        file = rng.choice(sorted(files))
        return f"{file.relative_to(folder)}: {of_json(file, rng)}"

    def train(copy: Path, out: Path, rng: random.Random) -> Sequence[str]:
        return with_folder(TRAIN, copy)

    def evaluate(copy: Path, out: Path, rng: random.Random) -> Sequence[str]:
        return "eval", "--checkpoint", str(copy), "--json", str(out)

    return [
        Victim("finished run, evaluated", stage / "run", any_kind, evaluate, evaluated, 2.0),
        Victim("finished run, run again", stage / "run", any_kind, train, went_on, 1.0),
        Victim("stopped run, resumed", stage / "stopped", any_kind, train, went_on, 2.0),
    ]


# Frozen networks


def _sign(folder: Path) -> None:
    """Corrects the checksums of a frozen network."""

    def digest(name: str) -> str:
        return hashlib.sha256((folder / name).read_bytes()).hexdigest()

    manifest = json.loads((folder / "manifest.json").read_text())
    if isinstance(manifest, dict) and isinstance(manifest.get("files"), dict):
        manifest["files"] = {name: digest(name) for name in manifest["files"] if (folder / name).is_file()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "manifest.json.sha256").write_text(f"{digest('manifest.json')}  manifest.json\n")


def _change_arrays(file: Path, rng: random.Random) -> str:
    """Changes the shape, type, name or a value of one array."""
    with np.load(file) as stored:
        arrays = {name: stored[name] for name in stored.files}
    name = rng.choice(sorted(arrays))
    array, how = arrays[name], rng.choice(("nan", "type", "cut", "turn", "name", "grow", "text"))
    if how == "nan":
        array.ravel()[rng.randrange(array.size)] = np.nan
    elif how == "name":
        arrays["other"] = arrays.pop(name)
        array = arrays["other"]
    elif how == "type":
        array = array.astype(rng.choice((np.float64, np.int8, np.complex64, np.float16)))
    else:
        changed = {"cut": array[:-1], "turn": array.T, "grow": array[None], "text": np.array(["text"])}
        array = changed[how]
    arrays["other" if how == "name" else name] = array
    np.savez(file, **arrays)  # type: ignore[arg-type]
    return f"array {name}: {how}"


def of_frozen(stage: Path, worker: Worker) -> list[Victim]:
    """Returns the victims of frozen networks, which are used or exported: damaged, and with corrected checksums."""
    if not (stage / "frozen").exists():
        make_run(stage, worker)
    frozen, picture, out = stage / "frozen", stage / "picture.png", stage / "prediction.json"
    if not frozen.exists():
        expect(worker, "freeze", "--checkpoint", str(stage / "run"), "--out", str(frozen))
    from PIL import Image

    Image.fromarray(random_pixels(0, 28, 28)).save(picture)

    def predict(copy: Path, out: Path, rng: random.Random) -> Sequence[str]:
        return "predict", "--frozen", str(copy), str(picture), "--top", "10", "--json", str(out)

    def use(copy: Path, out: Path, rng: random.Random) -> Sequence[str]:
        if rng.random() < 0.6:
            return predict(copy, out, rng)
        return "export", "--frozen", str(copy), "--out", str(out.with_suffix(rng.choice((".onnx", ".stablehlo"))))

    expect(worker, *predict(frozen, out, random.Random(0)))
    right = json.loads(out.read_text())

    def predicted(copy: Path, out: Path, outcome: Outcome, worker: Worker) -> str | None:
        return None if json.loads(out.read_text()) == right else "another prediction"

    def forged(folder: Path, rng: random.Random) -> str:
        name = rng.choice(("manifest.json", "manifest.json", "network.json", "arrays.npz"))
        said = (_change_arrays if name == "arrays.npz" else of_json)(folder / name, rng)
        _sign(folder)
        return f"{name}, signed again: {said}"

    def finite(copy: Path, out: Path, outcome: Outcome, worker: Worker) -> str | None:
        if not out.exists():
            return None
        shares = [entry["probability"] for one in json.loads(out.read_text()) for entry in one["classes"]]
        return None if np.isfinite(shares).all() else "a prediction that is not finite"

    pictures = stage / "pictures"
    pictures.mkdir(exist_ok=True)
    for name in ("picture.png", "picture.jpg", "picture.gif", "picture.webp", "picture.tiff"):
        Image.fromarray(random_pixels(0, 40, 50, 3)).save(pictures / name)

    def look(copy: Path, out: Path, rng: random.Random) -> Sequence[str]:
        return "predict", "--frozen", str(frozen), str(copy), "--json", str(out)

    def all_of_them(copy: Path, out: Path, outcome: Outcome, worker: Worker) -> str | None:
        entries = json.loads(out.read_text())
        finite_ones = all(np.isfinite(one["probability"]) for entry in entries for one in entry.get("classes", ()))
        return None if finite_ones and len(entries) >= len(list(pictures.iterdir())) - 1 else "a picture too few"

    return [
        Victim("pictures", pictures, damaged_file(), look, all_of_them, 1.0),
        Victim("frozen network, damaged", frozen, damaged_file(), predict, predicted, 1.0),
        Victim("frozen network, forged", frozen, forged, use, finite, 3.0),
    ]


# Data


def _facts(value: Any) -> Any:
    """Returns a report without entries that differ between calls: folders, and checksums of written files."""
    return json.loads(re.sub(r"(/[\w.-]+)+/|[0-9a-f]{64}", "", json.dumps(value, sort_keys=True)))


def _same_as(right: Any, copy: Path, out: Path, outcome: Outcome, worker: Worker) -> str | None:
    found = _facts(json.loads(out.read_text()))
    if found.get("problems"):
        return None  # The command reports problems, as it should.
    differ = [key for key in {**right, **found} if key != "path" and right.get(key) != found.get(key)]
    return f"another set than the undamaged one: {differ}" if differ else None


def of_data(stage: Path, worker: Worker) -> list[Victim]:
    """Returns the victims of data sets: archives, folders of pictures and prepared sets."""
    if not (stage / "data").exists():
        draft = stage / "data.draft"
        shutil.rmtree(draft, ignore_errors=True)
        for name in ("cifar", "idx"):
            (draft / name).mkdir(parents=True)
        write_cifar10_python(draft / "cifar" / "cifar-10-python.tar.gz")
        write_idx_folder(draft / "idx")
        write_folder(draft / "folder")
        prepared = (
            "data",
            "prepare",
            "cifar10",
            "--source",
            str(draft / "cifar" / "cifar-10-python.tar.gz"),
            "--unpublished",
        )
        expect(worker, *prepared, "--out", str(draft / "prepared"))
        draft.rename(stage / "data")
    data = stage / "data"

    def prepare(name: str, source: str) -> Callable[[Path, Path, random.Random], Sequence[str]]:
        def command(copy: Path, out: Path, rng: random.Random) -> Sequence[str]:
            return (
                "data", "prepare", name, "--source", str(copy / source), "--unpublished",
                "--out", str(out.with_suffix("")), "--json", str(out),
            )  # fmt: skip

        return command

    def inspect(name: str) -> Callable[[Path, Path, random.Random], Sequence[str]]:
        def command(copy: Path, out: Path, rng: random.Random) -> Sequence[str]:
            return "data", "inspect", name, "--path", str(copy), "--json", str(out)

        return command

    made = []
    for name, command, notices in (
        ("cifar", prepare("cifar10", "cifar-10-python.tar.gz"), True),
        ("idx", prepare("mnist", ""), True),
        ("prepared", inspect("cifar10"), True),
        ("folder", inspect("folder"), False),
    ):
        out = stage / f"{name}.json"
        shutil.rmtree(out.with_suffix(""), ignore_errors=True)
        expect(worker, *command(data / name, out, random.Random(0)))

        same = functools.partial(_same_as, _facts(json.loads(out.read_text())))
        made.append(
            Victim(
                f"data: {name}", data / name, damaged_file(how=of_itself), command, same if notices else any_answer, 1.0
            )
        )
    return made


# Weights


def of_weights(stage: Path, worker: Worker) -> list[Victim]:
    """Returns the victims of weights: those of a public ResNet-20, if FDJAX_TEST_DATA has them."""
    found = sorted(Path(os.environ.get("FDJAX_TEST_DATA", "nowhere")).glob("resnet20-*.th"))
    if not found:
        return []
    folder = stage / "weights"
    folder.mkdir(exist_ok=True)
    shutil.copy(found[0], folder / "resnet20.th")

    def command(copy: Path, out: Path, rng: random.Random) -> Sequence[str]:
        return (
            "import", "--config", f"{ROOT}/configs/cifar10_resnet110.py", "--model.name", "resnet20", "--format",
            "torchvision", "--weights", str(copy / "resnet20.th"), "--out", str(out.with_suffix("")),
        )  # fmt: skip

    victims = [Victim("weights of torch.save, old form", folder, damaged_file(), command, any_answer)]
    if importlib.util.find_spec("torch") is not None:
        import torch

        zipped = stage / "zipped"
        zipped.mkdir(exist_ok=True)
        torch.save(torch.load(found[0], map_location="cpu"), zipped / "resnet20.th")

        def same(copy: Path, out: Path, outcome: Outcome, worker: Worker) -> str | None:
            sound = worker.run("weights", str(stage / "imported")).out
            right = worker.run("weights", str(out.with_suffix(""))).out == sound
            return None if right else "other weights than the undamaged file's"

        shutil.rmtree(stage / "imported", ignore_errors=True)
        expect(worker, *command(zipped, stage / "imported.json", random.Random(0)))
        victims.append(Victim("weights of torch.save", zipped, damaged_file(), command, same))
    return victims


# Configs and flags

_ODD_VALUES = ("", "-1", "0", "1e400", "nan", "inf", "1e18", "None", "x" * 300, "../..", "\u2603", "[]", "0.5,0.5", "-")


def of_configs(stage: Path, worker: Worker) -> list[Victim]:
    """Returns the victims of configs and flags: config files with changed text, and flags with odd values."""
    folder = stage / "config"
    folder.mkdir(exist_ok=True)
    for file in ("quickstart.py", "quickstart_paper.py"):
        shutil.copy(ROOT / "configs" / file, folder)
    text = (ROOT / "docs" / "train.md").read_text() + (ROOT / "README.md").read_text()
    flags = sorted(set(re.findall(r"--(?:data|model|pretrain|learn|refine|alternate|checkpoint)\.[a-z-]+", text)))

    def change_text(file: Path, rng: random.Random) -> str:
        lines = file.read_text().splitlines()
        at = rng.randrange(len(lines))
        words = re.findall(r"[\w.]+|\S", lines[at]) or ["pass"]
        how = rng.choice(("drop a line", "double a line", "change a word", "change a number"))
        if how == "drop a line":
            del lines[at]
        elif how == "double a line":
            lines.insert(at, lines[at])
        else:
            new = rng.choice(("None", "-1", "0", "'text'", "1e400", "[]", "object()", "1/0", "lambda: 0", "(", "{}"))
            lines[at] = lines[at].replace(rng.choice(words), new, 1)
        file.write_text("\n".join(lines) + "\n")
        return f"{how} ({at + 1}: {lines[at][:60] if at < len(lines) else ''!r})"

    def macs(copy: Path, out: Path, rng: random.Random) -> Sequence[str]:
        return "macs", "--config", str(copy / "quickstart_paper.py"), "--json", str(out)

    def with_flag(copy: Path, out: Path, rng: random.Random) -> Sequence[str]:
        given = [word for _ in range(rng.randint(1, 2)) for word in (rng.choice(flags), rng.choice(_ODD_VALUES))]
        return *macs(copy, out, rng), *given

    def finite(copy: Path, out: Path, outcome: Outcome, worker: Worker) -> str | None:
        total = json.loads(out.read_text())["macs"]["total"]
        return None if 0 <= total < 1e15 else f"{total} MACs"

    def nothing(folder: Path, rng: random.Random) -> str:
        return "odd flags"

    sweeps = stage / "sweeps"
    shutil.copytree(ROOT / "configs", sweeps, dirs_exist_ok=True)

    def plan(copy: Path, out: Path, rng: random.Random) -> Sequence[str]:
        return "sweep", "--config", str(copy / "sweeps" / "quickstart.py"), "--workdir", str(out), "--dry-run"

    expect(worker, *plan(sweeps, stage / "planned", random.Random(0)))
    return [
        Victim("sweep file", sweeps, damaged_file("quickstart.py", change_text), plan, any_answer, 1.0),
        Victim("config file", folder, damaged_file("quickstart_paper.py", change_text), macs, finite, 1.0),
        Victim("flags", folder, nothing, with_flag, finite, 1.0),
    ]


FAMILIES: dict[str, Callable[[Path, Worker], list[Victim]]] = {
    "runs": of_runs, "frozen": of_frozen, "data": of_data, "weights": of_weights, "configs": of_configs,
}  # fmt: skip

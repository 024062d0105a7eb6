"""The runs behind this folder's tables: each a call of train.py, several at a time, finished ones skipped.

    python results/archive/cifar10/study.py --data DIR --workdir DIR [--jobs 2] [--only 'forms/*' ...] [--list]

Every run is an ordinary workdir under --workdir, with its log beside it; interrupted, the same command goes on. A run
starts once the run that it is pruned from is finished. `--list` prints the calls.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import fnmatch
import itertools
import json
import os
import queue
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[3]
CONFIG = "configs/cifar10_narrow.py"


class Run(NamedTuple):
    """A call of train.py.

    Attributes:
      name: of its workdir.
      flags: of train.py.
      init: the run whose checkpoint it starts from.
      prune: flags of `fdjax prune`, which is called on that checkpoint first, where filters are pruned.
      config: of the run.
    """

    name: str
    flags: str
    init: str | None = None
    prune: str | None = None
    config: str = CONFIG


# The paper's masks, and three of ours; levels 0 and N alone are channel pruning.
FORMS = {
    "paper": "--learn.no-tied --learn.sides both --learn.levels all",
    "tied_all": "--learn.tied --learn.levels all",
    "tied_01N": "--learn.tied --learn.levels 0,1,N",
    "tied_0N": "--learn.tied --learn.levels 0,N",
}
# What else was tried, each beside tied_01N with blocks of 2 at 0.33x. README.md has those that have been removed since.
OPTIONS = {
    "distillation": "--distill.weight 0.5",
    "multiples_of_8": "--learn.group-multiple 8",
    "papers_penalty": "--learn.penalty fcmask",
    # As `fdjax blocks --checkpoint main/dense_seed0 --tied --levels 0,1,N --target-macs 0.33` chose.
    "chosen_blocks": "--learn.block-by-layer block00/project 1 block09/expand 1 block09/project 1 head 4",
}
# Comparisons are short: all have the same steps, but for training from scratch, which has twice as many.
SHORT = "--learn.steps 390 --refine.steps 390 --checkpoint.every-epochs 4"
SCRATCH = "--phases learn scratch --learn.steps 390 --scratch.steps 780 --scratch.learning-rate 0.1"
# With batch norm frozen, weights learn at a lower rate: at 0.05 the first turn undoes the network.
ALTERNATE = (
    "--phases alternate refine --alternate.steps 600 --alternate.unit steps --alternate.mask-turn 20 "
    "--alternate.weight-turn 20 --alternate.learning-rate 0.01 --refine.steps 180 --checkpoint.every-epochs 4"
)

RESNET20 = "--model.name resnet20 --data.name folder --checkpoint.every-epochs 2"
# The small 8x4d: 57 M MACs in place of 772 M.
RESNEXT = "--model.cardinality 8 --data.name folder --checkpoint.every-epochs 1 --checkpoint.evaluate-every-epochs 1"


def runs() -> list[Run]:
    """All of them, those that matter most first."""
    found = []
    for seed in (0, 1):
        found.append(Run(f"main/dense_seed{seed}", f"--seed {seed} --phases pretrain"))

    def pruned(name: str, seed: int, flags: str) -> None:
        found.append(Run(name, f"--seed {seed} {flags}", f"main/dense_seed{seed}"))

    def form(name: str, block: int, target: float, seed: int) -> None:
        flags = f"{FORMS[name]} --learn.block {block} --learn.target-macs {target} {SHORT}"
        pruned(f"forms/{name}_block{block}_{target}_seed{seed}", seed, flags)

    for seed, (name, target) in itertools.product((0, 1), (("half", 0.5), ("third", 0.33))):
        pruned(f"main/{name}_seed{seed}", seed, f"--learn.target-macs {target}")
    # The best of the rates below.
    for seed in (0, 1):
        pruned(f"main/third_rate0.3_seed{seed}", seed, "--learn.learning-rate 0.3 --learn.target-macs 0.33")
    for seed in (0, 1):
        longer = "--learn.epochs 4 --refine.epochs 20 --learn.target-macs 0.33"
        pruned(f"main/third_longer_seed{seed}", seed, longer)
    # Layers that are slower pruned are released before refinement: fewer MACs and less time.
    for seed in (0, 1):
        flags = "--learn.gate time --learn.engine-batch 8 --learn.target-macs 0.5"
        pruned(f"main/half_gate_by_time_seed{seed}", seed, flags)
    for seed in (0, 1):
        for name, target in itertools.product(FORMS, (0.5, 0.33)):
            form(name, 2, target, seed)
        pruned(f"forms/nothing_pruned_seed{seed}", seed, f"--phases refine {SHORT}")
    # Beside it forms/tied_01N_block2_0.5_seed0.
    pruned("frozen/gate_by_time_0.5", 0, f"--learn.gate time --learn.engine-batch 8 --learn.target-macs 0.5 {SHORT}")
    # Beside them forms/tied_01N_block2_0.5_seed0 and _0.33_seed0: learn, then refine.
    for target in (0.8, 0.2):
        pruned(f"schemes/refine_{target}", 0, f"--learn.target-macs {target} {SHORT}")
    for (name, flags), target in itertools.product(
        (("alternate", ALTERNATE), ("scratch", SCRATCH)), (0.8, 0.5, 0.33, 0.2)
    ):
        pruned(f"schemes/{name}_{target}", 0, f"{flags} --learn.target-macs {target}")
    flags = ALTERNATE.replace("learning-rate 0.01", "learning-rate 0.05")
    pruned("schemes/alternate_0.5_rate0.05", 0, f"{flags} --learn.target-macs 0.5")
    for rate in (0.01, 0.03, 0.3):
        pruned(f"rates/rate{rate}", 0, f"--learn.learning-rate {rate} --learn.target-macs 0.33 {SHORT}")
    # Levels 0 and N need no transform, so that the block means nothing to them.
    for name, target in itertools.product(("tied_01N", "paper", "tied_all"), (0.33, 0.5)):
        form(name, 4, target, 0)
    for name, flags in OPTIONS.items():
        pruned(f"options/{name}", 0, f"--learn.target-macs 0.33 {flags} {SHORT}")
    # Likewise for main/dense_seed1.
    blocks = "block00/project 1 block01/expand 4 block01/project 4 block07/expand 1 block07/project 1 block08/expand 1"
    flags = f"--learn.block-by-layer {blocks} block08/project 1 head 4 --learn.target-macs 0.33 {SHORT}"
    pruned("options/chosen_blocks_seed1", 1, flags)
    pruned("options/distillation_seed1", 1, f"--learn.target-macs 0.33 {OPTIONS['distillation']} {SHORT}")
    for seed in (0, 1):
        pruned(f"main/nothing_pruned_seed{seed}", seed, "--phases refine")
    # The baselines of results/archive/profiled. Smaller input: the dense network, trained on at that size for as many
    # epochs as main/half_seed0 learns and refines.
    for side in (24, 20, 16):
        pruned(f"resolution/size{side}", 0, f"--phases refine --refine.epochs 7 --data.image-size {side}")
    flags = "--data.image-size 24 --learn.target-macs 0.5"
    found.append(Run("resolution/size24_half", f"--seed 0 {flags}", "resolution/size24"))
    flags = "--seed 0 --phases pretrain refine --refine.epochs 7"
    found.extend(Run(f"width/width{width}", f"{flags} --model.width {width}") for width in (0.2, 0.1))
    found.append(Run("octave/octave0.5", f"{flags} --model.octave 0.5"))
    # Filters of ResNet-20.
    resnet = "configs/cifar10_resnet110.py"
    pretrain = "--pretrain.epochs 4 --pretrain.schedule cosine"
    found.append(Run("filters/dense", f"--seed 0 {RESNET20} --phases pretrain {pretrain}", config=resnet))
    refine = f"--seed 0 {RESNET20} --phases refine --refine.epochs 1 --refine.learning-rate 0.05"
    searched = [("fpwt", "search"), ("l1", "search")]
    for method, rates in [(method, "one") for method in ("fpwt", "l1", "dct", "thinet")] + searched:
        prune = f"--method {method} --rates {rates} --target-macs 0.5"
        found.append(Run(f"filters/{method}_{rates}", refine, "filters/dense", prune, resnet))
    found.append(Run("filters/nothing_pruned", refine, "filters/dense", config=resnet))
    resnext = "configs/cifar10_resnext29.py"
    flags = f"--seed 0 {RESNEXT} --phases pretrain --pretrain.epochs 2 --pretrain.warmup-epochs 0.5"
    found.append(Run("resnext/dense", flags, config=resnext))
    flags = f"--seed 0 {RESNEXT} --phases learn refine --learn.steps 160 --refine.steps 40 --refine.learning-rate 0.02"
    flags += " --learn.target-macs 0.5 --learn.target-convention paper"
    found.append(Run("resnext/learned_0.5", flags, "resnext/dense", config=resnext))
    # As many epochs as main/third_longer_seed0 learns and refines.
    pruned("main/nothing_pruned_longer_seed0", 0, "--phases refine --refine.epochs 24")
    return found


def finished(workdir: Path) -> bool:
    """Whether a run is finished."""
    file = workdir / "summary.json"
    return file.exists() and "top1" in json.loads(file.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the image folder")
    parser.add_argument("--workdir", required=True, help="where the runs lie")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, each on a core of its own")
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of names")
    parser.add_argument("--list", action="store_true", help="print the calls, and do nothing")
    flags = parser.parse_args()
    base = Path(flags.workdir).resolve()
    cores = sorted(os.sched_getaffinity(0))
    free: queue.SimpleQueue[int] = queue.SimpleQueue()
    for job in range(flags.jobs):
        free.put(cores[job % len(cores)])

    def prune_call(run: Run) -> list[str]:
        command = [sys.executable, "-m", "fdjax", "prune", "--checkpoint", str(base / (run.init or ""))]
        out = base / f"{run.name}_pruned"
        return [*command, *(run.prune or "").split(), "--out", str(out), "--json", f"{out}.json"]

    def call(run: Run) -> list[str]:
        command = [sys.executable, "train.py", "--config", run.config, "--workdir", str(base / run.name)]
        init = ["--init", str(base / run.init)] if run.init else []
        if run.prune:
            report = base / f"{run.name}_pruned.json"
            known = json.loads(report.read_text())["flags"] if report.exists() else ["FLAGS-THAT-IT-PRINTS"]
            init = ["--init", str(base / f"{run.name}_pruned"), *known]
        return [*command, "--data.path", flags.data, *run.flags.split(), *init]

    def start(run: Run) -> bool:
        core = free.get()
        try:
            log = base / f"{run.name}.txt"
            log.parent.mkdir(parents=True, exist_ok=True)
            pinned = ["taskset", "-c", str(core)]
            with log.open("a") as stream:
                if run.prune and not (base / f"{run.name}_pruned.json").exists():
                    subprocess.run([*pinned, *prune_call(run)], cwd=ROOT, stdout=stream, stderr=stream, check=False)
                done = subprocess.run([*pinned, *call(run)], cwd=ROOT, stdout=stream, stderr=stream, check=False)
            print(f"{run.name}: {'done' if done.returncode == 0 else f'failed, see {log}'}", flush=True)
            return done.returncode == 0
        finally:
            free.put(core)

    chosen = [run for run in runs() if any(fnmatch.fnmatch(run.name, pattern) for pattern in flags.only)]
    if flags.list:
        for run in chosen:
            if run.prune:
                print(" ".join(prune_call(run)))
            print(" ".join(call(run)))
        return 0
    waiting, going, failed = [run for run in chosen if not finished(base / run.name)], {}, 0
    with concurrent.futures.ThreadPoolExecutor(flags.jobs) as pool:
        while waiting or going:
            ready = [run for run in waiting if run.init is None or finished(base / run.init)]
            for run in ready[: flags.jobs - len(going)]:
                waiting.remove(run)
                going[pool.submit(start, run)] = run
            if not going:
                print(f"not started, for want of the runs they start from: {', '.join(run.name for run in waiting)}")
                return 1
            done, _ = concurrent.futures.wait(going, return_when=concurrent.futures.FIRST_COMPLETED)
            failed += sum(not future.result() for future in done)
            going = {future: run for future, run in going.items() if future not in done}
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

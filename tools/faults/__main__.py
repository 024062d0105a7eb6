"""Damages files that fdjax reads, and checks that it reports the damage or gives the right result nevertheless.

    python -m tools.faults --faults 1000 --seed 0 --out results/reliability/faults.jsonl

Each fault has one of three outcomes: right (the result of an undamaged file), refused (exit status 1 or 2 and a
message) or wrong (another result, a traceback, a hang, or too much memory). The exit status is 1 if any is wrong. An
interrupted call resumes from its --out file.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tools.faults.kills import KILLS, try_kills
from tools.faults.victims import FAMILIES, Victim
from tools.faults.worker import Worker

# The most bytes of memory that a command may add, and the most seconds that one which refuses may take.
MEMORY_LIMIT, REFUSAL_LIMIT = 1 << 30, 60.0


def try_fault(victim: Victim, seed: int, scratch: Path, worker: Worker) -> dict[str, Any]:
    """Injects one seeded fault; returns what was damaged, and the outcome."""
    rng = random.Random(f"{victim.name} {seed}")
    place = scratch / "fault"
    shutil.rmtree(place, ignore_errors=True)
    copy, out = shutil.copytree(victim.folder, place / "copy"), place / "out.json"
    damage = victim.damage(copy, rng)
    arguments = list(victim.command(copy, out, rng))
    outcome = worker.run(*arguments)
    problem = outcome.problem()
    if problem is None and outcome.grown > MEMORY_LIMIT:
        problem = f"{outcome.grown / 1e9:.1f} GB of memory"
    if problem is None and outcome.status and outcome.seconds > REFUSAL_LIMIT:
        problem = f"{outcome.seconds:.0f} s to refuse"
    if problem is None and outcome.status == 0:
        try:
            problem = victim.verdict(copy, out, outcome, worker)
        except Exception as error:
            problem = f"an answer that cannot be read: {error!r}"
    result = "wrong" if problem else "refused" if outcome.status else "right"
    said = (outcome.err.strip() or outcome.out.strip())[-1500 if problem else -300 :]
    return {
        "victim": victim.name, "seed": seed, "damage": damage, "command": arguments[0], "result": result,
        "problem": problem, "said": said.replace(str(place), "."), "seconds": round(outcome.seconds, 2),
    }  # fmt: skip


def plan(victims: list[Victim], faults: int) -> list[tuple[Victim, int]]:
    """Plans `faults` faults, with the victims in proportion to their shares."""
    total = sum(victim.share for victim in victims)
    return [(victim, seed) for victim in victims for seed in range(max(1, round(faults * victim.share / total)))]


def _table(results: list[dict[str, Any]]) -> str:
    """Returns a table of the victims and the outcomes of their faults."""
    counts: dict[str, collections.Counter[str]] = {}
    for entry in results:
        counts.setdefault(entry["victim"], collections.Counter())[entry["result"]] += 1
    rows = ["| what was damaged | faults | right | refused | wrong |", "|---|---|---|---|---|"]
    for name, found in [*counts.items(), ("all", sum(counts.values(), collections.Counter()))]:
        rows.append(f"| {name} | {found.total()} | {found['right']} | {found['refused']} | {found['wrong']} |")
    return "\n".join(rows)


def main() -> int:
    """Runs the campaign."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=1000, help="number of damaged files (default: 1000)")
    parser.add_argument("--kills", type=int, default=30, help="number of runs that are disturbed (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the faults (default: 0)")
    parser.add_argument("--only", nargs="*", choices=(*FAMILIES, "kills"), default=(*FAMILIES, "kills"),
                        help="families of victims (default: all)")  # fmt: skip
    parser.add_argument("--stage", type=Path, help="folder for the undamaged files (default: a new folder)")
    parser.add_argument("--out", type=Path, help="file of all faults and outcomes, a JSON object a line")
    given = parser.parse_args()
    stage = (given.stage or Path(tempfile.mkdtemp(prefix="fdjax-faults-"))).absolute()
    stage.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    if given.out and given.out.exists():
        results = [json.loads(line) for line in given.out.read_text().splitlines()]
    done = {(entry["victim"], entry["seed"]) for entry in results}
    worker, began = Worker(), time.monotonic()

    def note(entry: dict[str, Any]) -> None:
        results.append(entry)
        if entry["result"] == "wrong":
            print(f"WRONG {entry['victim']} (seed {entry['seed']}): {entry['damage']}: {entry['problem']}", flush=True)
        if given.out:
            given.out.parent.mkdir(parents=True, exist_ok=True)
            with given.out.open("a") as file:
                file.write(json.dumps(entry) + "\n")

    victims = [victim for name in given.only if name in FAMILIES for victim in FAMILIES[name](stage, worker)]
    for victim, number in plan(victims, given.faults):
        seed = given.seed * 1_000_000 + number
        if (victim.name, seed) not in done:
            note(try_fault(victim, seed, stage, worker))
    if "kills" in given.only:
        for number in range(given.kills):
            seed = given.seed * 1_000_000 + number
            if (KILLS, seed) not in done:
                note(try_kills(seed, stage, worker))
    worker.close()
    print(_table(results))
    print(f"{time.monotonic() - began:.0f} s")
    return 1 if any(entry["result"] == "wrong" for entry in results) else 0


if __name__ == "__main__":
    sys.exit(main())

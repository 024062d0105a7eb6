"""Workdirs of runs that never ran: a config, and a summary and metrics of the form that a finished run leaves."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from fdjax.config import MASK_PHASES, Config, DataConfig, LearnConfig, ModelConfig, WeightPhaseConfig
from fdjax.training.workdir import write_json

STEPS = 100
DENSE_MACS = 1_000_000
CONFIG = Config(
    data=DataConfig(name="cifar10", train_limit=5000),
    model=ModelConfig(name="mobilenetv2_cifar100", width=0.5),
    pretrain=WeightPhaseConfig(epochs=20),
    learn=LearnConfig(block=2, tied=True, levels="0,1,N", penalty="macs", target_macs=0.5),
    refine=WeightPhaseConfig(epochs=8),
)
# Counts 0..4 of one layer's two sides.
KEPT = {"input": [10, 20, 0, 0, 10], "output": [30, 20, 5, 0, 5]}


def changed(config: Config, **parts: dict[str, Any] | Any) -> Config:
    """`config` with other values: changed(CONFIG, seed=1, learn={"tied": False})."""
    for part, value in parts.items():
        old = getattr(config, part)
        config = dataclasses.replace(
            config, **{part: dataclasses.replace(old, **value) if isinstance(value, dict) else value}
        )
    return config


def make_summary(
    config: Config = CONFIG,
    *,
    top1: float = 0.70,
    dense_top1: float | None = 0.72,
    rounded_top1: float = 0.40,
    soft_top1: float | None = 0.65,
    ratio: float = 0.5,
    seconds: float = 600.0,
    skipped: int = 0,
    kept: dict[str, list[int] | None] = KEPT,
    **versions: str | None,
) -> dict[str, Any]:
    """What `summary.json` would hold; `skipped`: phases that a run given by --init has done."""
    masked = any(phase in MASK_PHASES for phase in config.phases)
    phases = []
    for name in config.phases[skipped:]:
        entry: dict[str, Any] = {"name": name, "steps": STEPS, "seconds": 10.0, "top1": top1, "ratio": ratio}
        if name == "pretrain":
            entry |= {"top1": dense_top1, "ratio": 1.0}
        elif name in MASK_PHASES:
            entry |= {"top1": rounded_top1} | ({} if soft_top1 is None else {"soft_top1": soft_top1})
        phases.append(entry)
    whole = {side: counts and [0] * (len(counts) - 1) + [sum(counts)] for side, counts in kept.items()}
    counts = {"dense": 900, "pruned": 300, "full_transforms": 1200, "paper_total": 500, "total": 400, "ratio": 4 / 9}
    shape = {"kind": "pointwise", "block": 2, "num_coefs": 4, "form": "groups", "released": False, **counts}
    stem = {"kind": "conv", "block": None, "num_coefs": None, "form": "dense", "released": False}
    stem |= dict.fromkeys(("dense", "pruned", "full_transforms", "paper_total", "total"), 100) | {"ratio": 1.0}
    empty = {"input": None, "output": None}
    return {
        "loss": 1.0,
        "top1": top1,
        "num_examples": 2000,
        "macs": {
            "dense": DENSE_MACS,
            "pruned": round(0.8 * ratio * DENSE_MACS) if masked else DENSE_MACS,
            "full_transforms": 2 * DENSE_MACS,
            "paper_total": round(1.5 * ratio * DENSE_MACS),
            "total": round(ratio * DENSE_MACS),
            "ratio": ratio if masked else 1.0,
            "paper_ratio": 1.5 * ratio,
        },
        "layers": [
            {"name": "stem", "kept_counts": empty, **stem},
            {"name": "block00/expand", "kept_counts": kept if masked else whole, **shape},
        ],
        "split": "test",
        "dense_top1": dense_top1,
        "seconds": seconds,
        "phases": phases,
        "target_macs": config.learn.target_macs if masked else None,
        "target_convention": config.learn.target_convention,
        "seed": config.seed,
        "versions": {"fdjax": "0.1.0", "jax": "0.10.2", "python": "3.11.7", "device": "cpu", "commit": "abc1234"}
        | {"processor": "Some CPU, 2 cores", **versions},
    }


def make_run(folder: Path, config: Config = CONFIG, log: str | None = None, **summary: Any) -> Path:
    """Writes the workdir of a finished run; `summary` as for `make_summary`."""
    folder.mkdir(parents=True, exist_ok=True)
    written = make_summary(config, **summary)
    write_json(folder / "config.json", config.to_dict())
    records = [
        {"step": STEPS * (index + 1), "phase": phase["name"], "train_loss": 1.0}
        for index, phase in enumerate(written["phases"])
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if log is not None:
        (folder / "log.txt").write_text(log)
    # Last, in one move: it says that the run is finished.
    write_json(folder / "summary.json", written)
    return folder

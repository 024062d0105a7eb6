"""The commands: parse, call one function, print, exit code. Nothing here imports jax before it is needed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fdjax import runtime
from fdjax.commands.arguments import config_given, flag_value
from fdjax.commands.data import data_command
from fdjax.commands.import_weights import import_command
from fdjax.commands.output_files import check_file_target, check_json_target, write_report
from fdjax.commands.profile import profile_command, prune_command
from fdjax.commands.report import report_command
from fdjax.commands.sweep import sweep_command
from fdjax.config import Config
from fdjax.errors import UserError, reports_user_errors, suggestion


@dataclasses.dataclass(kw_only=True)
class TrainArguments:
    """Trains and prunes a network as a config file says; every field of the config can be set by a flag."""

    config: str
    """Config file, such as configs/quickstart.py."""
    workdir: str
    """Directory of the run: new or empty, or the run to go on with."""
    init: str | None = None
    """Start from this checkpoint of another run (weights, and masks if it learned any); skips what that run did."""
    json: str | None = None
    """Write the summary to this file too."""
    devices: int | None = None
    """How many of this machine's devices to use (default: all); each batch is split evenly among them."""
    coordinator: str | None = None
    """Several processes: HOST:PORT of process 0 (or JAX_COORDINATOR_ADDRESS); auto: as Slurm, MPI or a TPU pod say."""
    num_processes: int | None = None
    """How many processes the run has (or JAX_NUM_PROCESSES)."""
    process_id: int | None = None
    """Which of them this is, from 0 (or JAX_PROCESS_ID)."""
    connect_timeout: float = 120.0
    """Seconds to wait for the other processes."""
    profile: int = 0
    """Trace this many steps of each phase with jax.profiler, into WORKDIR/profile."""
    compilation_cache: bool = True
    """Keep compiled programs in the user's cache directory (FDJAX_CACHE_DIR; elsewhere or, if empty, nowhere)."""
    settings: Annotated[Config, tyro.conf.arg(name="")]


@reports_user_errors
def train_command(arguments: Sequence[str] | None = None) -> int:
    """`train.py`."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    asks_for_help = bool({"-h", "--help"} & set(given))
    if flag_value(given, "train.py") is None and not asks_for_help:
        raise UserError("--config FILE is missing: python train.py --config configs/quickstart.py --workdir DIR")
    required: Any = tyro.MISSING
    parsed = tyro.cli(
        TrainArguments,
        prog="train.py",
        args=given,
        default=TrainArguments(config=required, workdir=required, settings=config_given(given, "train.py")),
    )
    check_json_target(parsed.json)
    for name, value in (("profile", parsed.profile), ("connect-timeout", parsed.connect_timeout)):
        if value < 0:
            raise UserError(f"--{name} must be 0 or more, got {value:g}")
    if not parsed.compilation_cache:
        from fdjax.training.compilation import disable_compilation_cache

        disable_compilation_cache()
    from fdjax.training.distributed import join
    from fdjax.training.run import train

    run = json.dumps([parsed.settings.to_dict(), parsed.workdir, parsed.init], sort_keys=True)
    join(
        parsed.coordinator,
        parsed.num_processes,
        parsed.process_id,
        parsed.connect_timeout,
        hashlib.sha256(run.encode()).hexdigest(),
    )
    try:
        summary = train(
            parsed.settings, parsed.workdir, parsed.init, local_devices=parsed.devices, profile=parsed.profile
        )
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    write_report(parsed.json, summary)
    return 0


@dataclasses.dataclass(kw_only=True)
class EvalArguments:
    """Evaluates a saved checkpoint, or a frozen network, on the test set of its run."""

    checkpoint: str | None = None
    """A workdir, its checkpoints folder, or one step's folder."""
    frozen: str | None = None
    """A frozen network, as fdjax freeze writes it, in place of a checkpoint."""
    which: str = "latest"
    """latest, best (on the validation share) or a step number."""
    split: Literal["test", "validation"] = "test"
    """The test set, or the validation share that the run held out."""
    data_path: str | None = None
    """Where the run's data set lies now, if it has moved."""
    json: str | None = None
    """Write the figures to this file too."""


@reports_user_errors
def eval_command(arguments: Sequence[str] | None = None) -> int:
    """`eval.py`."""
    parsed = tyro.cli(EvalArguments, prog="eval.py", args=arguments)
    check_json_target(parsed.json)
    if (parsed.checkpoint is None) == (parsed.frozen is None):
        raise UserError("give either --checkpoint DIR or --frozen DIR")
    from fdjax.training.summary import describe

    if parsed.frozen is not None:
        if parsed.which != "latest" or parsed.split != "test":
            raise UserError("a frozen network is evaluated on the test set: give no --which or --split beside --frozen")
        from fdjax.checkpoints.freeze import evaluate_frozen
        from fdjax.frozen import load

        summary = evaluate_frozen(load(parsed.frozen), parsed.data_path)
        print(describe(summary))
        write_report(parsed.json, summary)
        return 0
    assert parsed.checkpoint is not None
    from fdjax.checkpoint import find_checkpoint
    from fdjax.training.restore import evaluate_restored, restore

    checkpoints, step = find_checkpoint(parsed.checkpoint, parsed.which)
    restored = restore(checkpoints, step)
    print(f"step {step:,} of {checkpoints.folder.parent}: {restored.phase.name}, step {restored.phase_step:,}")
    summary = evaluate_restored(restored, parsed.split, parsed.data_path)
    print(describe(summary))
    write_report(parsed.json, summary)
    return 0


@dataclasses.dataclass(kw_only=True)
class MacsArguments:
    """Counts the MACs of a network, layer by layer: of a config (nothing pruned), or of a checkpoint as it stands."""

    config: str | None = None
    """Config file; every field of it can be set by a flag."""
    checkpoint: str | None = None
    """A workdir, its checkpoints folder, or one step's folder."""
    json: str | None = None
    """Write the counts to this file too."""
    settings: Annotated[Config, tyro.conf.arg(name="")]


def macs_command(arguments: Sequence[str]) -> int:
    """`fdjax macs`."""
    parsed = tyro.cli(
        MacsArguments,
        prog="fdjax macs",
        args=arguments,
        default=MacsArguments(settings=config_given(arguments, "fdjax macs")),
    )
    check_json_target(parsed.json)
    if (parsed.config is None) == (parsed.checkpoint is None):
        raise UserError("give either --config FILE or --checkpoint DIR")
    if parsed.checkpoint is not None:
        if parsed.settings != Config():
            raise UserError("a checkpoint has its own config: give no settings beside --checkpoint")
        from fdjax.checkpoint import find_checkpoint
        from fdjax.training.restore import restore

        restored = restore(*find_checkpoint(parsed.checkpoint))
        spec, macs = restored.spec, restored.macs()
    else:
        from fdjax.data import describe_source
        from fdjax.spec import network_macs
        from fdjax.training.build import build_network

        data = parsed.settings.data
        shape, classes = describe_source(data.name, data.path, data.image_size, data.grayscale)
        _, spec = build_network(parsed.settings, shape, len(classes))
        macs = network_macs(spec, spec.full_counts())
    from fdjax.reports import macs_table

    layers = [layer.to_dict() for layer in macs.layers]
    print(f"{spec.name}, input {'x'.join(map(str, spec.input_shape))}, {spec.num_classes} classes")
    print(macs_table(macs.to_dict(), layers))
    write_report(parsed.json, {"macs": macs.to_dict(), "layers": layers})
    return 0


@dataclasses.dataclass(kw_only=True)
class BlocksArguments:
    """Chooses the block of each layer of a pretrained network: the one that loses the least energy for its MACs."""

    checkpoint: str
    """A workdir, its checkpoints folder, or one step's folder, of a run that has not trained weights under masks."""
    candidates: tuple[int, ...] = (1, 2, 4)
    """Blocks to choose from, 1 to 16; those larger than a layer's map are passed over there."""
    target_macs: float | None = None
    """The MAC ratio (macs.ratio) at which blocks are compared, above 0 to 1 (None: the run's)."""
    tied: bool = False
    """As learn.tied, and by default as in the run's config: a residual block's two layers then get one block."""
    levels: str = "all"
    """As learn.levels, likewise."""
    sides: Literal["both", "input", "output"] = "both"
    """As learn.sides, likewise."""
    images: int = 512
    """How many training images to look at (seeded)."""
    data_path: str | None = None
    """Where the run's data set lies now, if it has moved."""
    json: str | None = None
    """Write the choice to this file too."""


def blocks_command(arguments: Sequence[str]) -> int:
    """`fdjax blocks`."""
    path = flag_value(arguments, "fdjax blocks", "--checkpoint")
    required: Any = tyro.MISSING
    restored, defaults = None, BlocksArguments(checkpoint=required)
    if path is not None:
        from fdjax.checkpoint import find_checkpoint
        from fdjax.training.restore import restore

        restored = restore(*find_checkpoint(path))
        own = restored.config.learn
        defaults = BlocksArguments(checkpoint=path, tied=own.tied, levels=own.levels, sides=own.sides)
    parsed = tyro.cli(BlocksArguments, prog="fdjax blocks", args=arguments, default=defaults)
    assert restored is not None  # without --checkpoint parsing has failed
    check_json_target(parsed.json)
    learn = dataclasses.replace(restored.config.learn, tied=parsed.tied, levels=parsed.levels, sides=parsed.sides)
    if parsed.target_macs is not None:
        learn = dataclasses.replace(learn, target_macs=parsed.target_macs, lambda_=None)
    from fdjax.checkpoints.calibrate import choose_blocks_of
    from fdjax.reports import blocks_table

    report = choose_blocks_of(restored, learn, parsed.candidates, parsed.images, parsed.data_path)
    print(blocks_table(report))
    print(f"{report['macs']['ratio']:.3f}x MACs, by {report['num_images']:,} training images; for train.py:")
    print(shlex.join(report["flags"]))
    write_report(parsed.json, report)
    return 0


@dataclasses.dataclass(kw_only=True)
class FreezeArguments:
    """Compiles a checkpoint's network, as it stands, into a dense one that needs no training code."""

    checkpoint: str
    """A workdir, its checkpoints folder, or one step's folder."""
    out: str
    """Directory to write: new, empty, or a frozen network to replace."""
    which: str = "latest"
    """latest, best (on the validation share) or a step number."""
    choose: Literal["macs", "time"] = "macs"
    """How to choose among a layer's exact forms: by MACs, or by time measured on this machine."""
    batch: int = 1
    """Images at once, for measuring times."""
    release: bool = False
    """With --choose time: let go of the masks of layers that take longer pruned than released. Changes the accuracy."""
    data_path: str | None = None
    """Where the run's data set lies now, if it has moved."""
    json: str | None = None
    """Write the manifest to this file too."""


def freeze_command(arguments: Sequence[str]) -> int:
    """`fdjax freeze`."""
    parsed = tyro.cli(FreezeArguments, prog="fdjax freeze", args=arguments)
    check_json_target(parsed.json)
    if parsed.batch < 1:
        raise UserError(f"--batch must be at least 1, got {parsed.batch}")
    if parsed.release and parsed.choose != "time":
        raise UserError("--release compares times: give --choose time with it")
    from fdjax.checkpoint import find_checkpoint
    from fdjax.checkpoints.freeze import freeze_checkpoint
    from fdjax.frozen import Stopwatch
    from fdjax.reports import frozen_table
    from fdjax.training.restore import restore

    manifest = freeze_checkpoint(
        restore(*find_checkpoint(parsed.checkpoint, parsed.which)),
        Path(parsed.out),
        stopwatch=Stopwatch(parsed.batch, runtime.times_cache_dir()) if parsed.choose == "time" else None,
        release=parsed.release,
        data_path=parsed.data_path,
    )
    print(frozen_table(manifest))
    write_report(parsed.json, manifest)
    return 0


@dataclasses.dataclass(kw_only=True)
class PredictArguments:
    """Names the classes of pictures by a frozen network."""

    images: tyro.conf.Positional[tuple[str, ...]]
    """Picture files, in any format that Pillow opens."""
    frozen: str
    """A frozen network, as fdjax freeze writes it."""
    top: int = 1
    """How many classes to name for each, the likeliest first."""
    json: str | None = None
    """Write the classes and their probabilities to this file too."""


def predict_command(arguments: Sequence[str]) -> int:
    """`fdjax predict`."""
    parsed = tyro.cli(PredictArguments, prog="fdjax predict", args=arguments)
    check_json_target(parsed.json)
    if not parsed.images:
        raise UserError("no picture given: fdjax predict --frozen DIR IMAGE...")
    if parsed.top < 1:
        raise UserError(f"--top must be at least 1, got {parsed.top}")
    from fdjax.data import load_image
    from fdjax.frozen import load

    network, found = load(parsed.frozen), []
    share = network.manifest.get("data", {}).get("eval_crop", 1.0)
    for file in parsed.images:
        likeliest = network.classify(load_image(file, network.input_shape, share), parsed.top)
        print(f"{file}: " + ", ".join(f"{name} {100 * share:.1f}%" for name, share in likeliest))
        found.append({"image": file, "classes": [{"name": name, "probability": p} for name, p in likeliest]})
    write_report(parsed.json, found)
    return 0


@dataclasses.dataclass(kw_only=True)
class ExportArguments:
    """Writes a frozen network for other programs: StableHLO (cpu, cuda and tpu, any batch size) or ONNX."""

    frozen: str
    """A frozen network, as fdjax freeze writes it."""
    out: str
    """File to write; its suffix says the format: .stablehlo or .onnx."""


def export_command(arguments: Sequence[str]) -> int:
    """`fdjax export`."""
    parsed = tyro.cli(ExportArguments, prog="fdjax export", args=arguments)
    out = Path(parsed.out)
    check_file_target("--out", parsed.out, (".stablehlo", ".onnx"))
    from fdjax.frozen import load
    from fdjax.frozen.export import export

    export(load(parsed.frozen).frozen, out)
    print(f"{out}: {out.stat().st_size:,} bytes")
    return 0


@dataclasses.dataclass(kw_only=True)
class BenchArguments:
    """Times a frozen network beside the dense one in its best form, and beside ONNX Runtime's where it is installed."""

    frozen: str
    """A frozen network, as fdjax freeze writes it."""
    batch: tuple[int, ...] = (1, 8)
    """Images at once, one or several."""
    threads: int | None = None
    """How many processor cores to use (default: all that this process may use)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of weights and maps."""
    rounds: int | None = None
    """How often each network runs after its warm-up (default: 7 to 200, by how long it takes)."""
    layers: bool = False
    """Time each block alone, too."""
    json: str | None = None
    """Write the rows to this file too."""
    picture: str | None = None
    """Draw time beside MACs into this file."""


def bench_command(arguments: Sequence[str]) -> int:
    """`fdjax bench`."""
    parsed = tyro.cli(BenchArguments, prog="fdjax bench", args=arguments)
    check_json_target(parsed.json)
    check_file_target("--picture", parsed.picture, (".png", ".pdf", ".svg"))
    for flag, numbers in (("batch", parsed.batch), ("threads", [parsed.threads]), ("rounds", [parsed.rounds])):
        if any(number is not None and number < 1 for number in numbers):
            raise UserError(f"--{flag} must be at least 1, got {' '.join(map(str, numbers))}")
    threads = runtime.limit_threads(parsed.threads)
    from fdjax.experiments.bench import bench_artifact
    from fdjax.reports import bench_table, plot_bench

    found = bench_artifact(
        Path(parsed.frozen), parsed.batch, threads, parsed.dtype, rounds=parsed.rounds, layers=parsed.layers
    )
    print(bench_table(found))
    write_report(parsed.json, found)
    if parsed.picture is not None:
        plot_bench(found["rows"], Path(parsed.picture))
    return 0


@dataclasses.dataclass(kw_only=True)
class ResultsArguments:
    """Records finished runs in one folder, with a table and a plot of all runs recorded there, now and before."""

    workdir: tuple[str, ...]
    """Workdirs of finished runs; each is recorded under its folder's name."""
    out: str
    """Directory to record them in: runs/NAME/ for each, table.md, table.csv, table.json and tradeoff.png."""


def results_command(arguments: Sequence[str]) -> int:
    """`fdjax results`."""
    parsed = tyro.cli(ResultsArguments, prog="fdjax results", args=arguments)
    from fdjax.experiments.collect import collect

    done = collect(parsed.workdir, parsed.out)
    for word, names in (("new", done.added), ("replaced", done.replaced)):
        if names:
            print(f"{word}: {', '.join(names)}")
    print(f"{len(done.results)} runs in {', '.join(str(path) for path in done.written)}")
    return 0


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "macs": (macs_command, "count the MACs of a config or a checkpoint, layer by layer"),
    "import": (import_command, "make a checkpoint of weights trained elsewhere"),
    "blocks": (blocks_command, "choose the block of each layer of a pretrained network"),
    "profile": (profile_command, "measure what pruning by profiled energies leaves of a network's accuracy"),
    "prune": (prune_command, "prune a trained network by profiled energies, for refinement"),
    "freeze": (freeze_command, "compile a checkpoint into a dense network that needs no training code"),
    "export": (export_command, "write a frozen network as StableHLO or ONNX"),
    "bench": (bench_command, "time a frozen network beside the dense one"),
    "predict": (predict_command, "name the classes of pictures by a frozen network"),
    "data": (data_command, "prepare or inspect a data set"),
    "sweep": (sweep_command, "do many runs from one description, several at a time, with a table and plots"),
    "report": (report_command, "write one HTML page of a run, or of several side by side"),
    "results": (results_command, "record finished runs in one folder, with a table and a plot of them"),
}


@reports_user_errors
def fdjax_command(arguments: Sequence[str] | None = None) -> int:
    """`fdjax COMMAND ...`."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    listing = "\n".join(f"  {name:10} {text}" for name, (_, text) in COMMANDS.items())
    usage = f"usage: fdjax COMMAND [OPTIONS]; fdjax COMMAND --help tells more\n\n{listing}"
    if not given or given[0] in ("-h", "--help"):
        print(usage)
        return 0 if given else 2
    if given[0] not in COMMANDS:
        raise UserError(f"no command {given[0]!r}{suggestion(given[0], COMMANDS)}; accepted are {', '.join(COMMANDS)}")
    return COMMANDS[given[0]][0](given[1:])


def main() -> int:
    """Entry point of the installed `fdjax` command."""
    runtime.setup()
    return fdjax_command()

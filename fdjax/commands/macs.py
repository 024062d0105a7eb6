"""`fdjax macs`: counts the MACs of a network, layer by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import tyro

from fdjax.commands.arguments import parse_with_config, restored_run
from fdjax.commands.output_files import check_json_target, write_report
from fdjax.config import Config
from fdjax.errors import UserError


@dataclasses.dataclass(kw_only=True)
class MacsArguments:
    """Counts the MACs of a network, layer by layer: a config's unpruned network, or a checkpoint's with its masks."""

    config: str | None = None
    """Config file; flags can set every field."""
    checkpoint: str | None = None
    """Workdir of a run, its checkpoints folder, or the folder of one step."""
    json: str | None = None
    """File to write the counts to as JSON."""
    settings: Annotated[Config, tyro.conf.arg(name="")]


def macs_command(arguments: Sequence[str]) -> int:
    """Runs `fdjax macs` and returns its exit status."""
    parsed = parse_with_config(MacsArguments, "fdjax macs", arguments)
    check_json_target(parsed.json)
    if (parsed.config is None) == (parsed.checkpoint is None):
        raise UserError("give either --config FILE or --checkpoint DIR")
    if parsed.checkpoint is not None:
        if parsed.settings != Config():
            raise UserError("a checkpoint has its own config: give no flags of the config beside --checkpoint")
        restored = restored_run(parsed.checkpoint)
        graph, macs = restored.graph, restored.macs()
    else:
        from fdjax.data import describe_source
        from fdjax.graph.counting import network_macs
        from fdjax.training.build import build_network

        data = parsed.settings.data
        shape, classes = describe_source(data.name, data.path, data.image_size, data.grayscale)
        _, graph = build_network(parsed.settings, shape, len(classes))
        macs = network_macs(graph, graph.full_counts())
    from fdjax.reports import macs_table

    layers = [layer.to_dict() for layer in macs.layers]
    print(f"{graph.name}, input {'x'.join(map(str, graph.input_shape))}, {graph.num_classes} classes")
    print(macs_table(macs.to_dict(), layers))
    write_report(parsed.json, {"macs": macs.to_dict(), "layers": layers})
    return 0

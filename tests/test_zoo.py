"""Every network: its MACs and parameters, a training step, frequency layers that change nothing, and freezing."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict
from flax.traverse_util import unflatten_dict

from fdjax.config import Config, LearnConfig, ModelConfig
from fdjax.errors import UserError
from fdjax.frozen import Program, freeze
from fdjax.frozen.bench import seeded_variables
from fdjax.frozen.program import Pointwise, Run
from fdjax.graph.counting import network_macs
from fdjax.graph.masks import MaskedGraph
from fdjax.ops.fcmask import level_counts
from fdjax.pruning import harden
from fdjax.pruning.expected import expected_ratio
from fdjax.training.build import build_network, hard_network
from fdjax.training.steps import mask_penalty
from fdjax.zoo import FCMASK, MOBILENETS, RESNETS, FrequencyNetwork, MobileNet, ResNet, mobilenet, resnet
from tests.frozen_networks import (
    HASTE,
    frozen_logits,
    frozen_of,
    masked_logits,
    random_counts,
    random_variables,
    raw_images,
    relative_error,
    with_preprocessing,
)
from tests.graph_networks import network_for

# Network, input, classes, classifier counted, dense MACs, parameters without batch norm's averages. The paper's
# networks are those of its counts, the parameters of ImageNet's networks are published to the digit; MACs that are
# published in round numbers only are counted once more by `cifar_resnet_macs` and `lite0_macs`.
PUBLISHED = [
    ("resnext29", 32, 10, False, 772_472_832, 4_774_218),
    ("resnet20", 32, 10, False, 40_550_400, 269_722),
    ("resnet32", 32, 10, False, 68_861_952, 464_154),
    ("resnet44", 32, 10, False, 97_173_504, 658_586),
    ("resnet56", 32, 10, False, 125_485_056, 853_018),
    ("resnet110", 32, 10, False, 252_887_040, 1_727_962),
    ("resnet50", 224, 1000, True, 4_089_184_256, 25_557_032),
    ("resnext50_32x4d", 224, 1000, True, 4_230_479_872, 25_028_904),
    ("mobilenetv1", 224, 1000, True, 568_740_352, 4_231_976),
    ("mobilenetv2", 224, 1000, True, 300_774_272, 3_504_872),
    ("efficientnet_lite0", 224, 1000, True, 385_187_552, 4_652_008),
]


# Without the classifier.
DENSE_50 = 4_089_184_256 - 2048 * 1000


def make(variant: str, classes: int = 10, **fields) -> FrequencyNetwork:
    return (MobileNet if variant in MOBILENETS else ResNet)(variant, classes, **fields)


@pytest.mark.parametrize(("variant", "pixels", "classes", "classifier", "macs", "parameters"), PUBLISHED)
def test_macs_and_parameters_are_the_published_ones(variant, pixels, classes, classifier, macs, parameters) -> None:
    network = make(variant, classes, block=1)
    graph = network_for(network, (pixels, pixels, 3), classifier)
    assert network_macs(graph, graph.full_counts()).to_dict()["dense"] == macs
    shapes = jax.eval_shape(
        lambda key: network.copy(mode="off").init(key, jnp.zeros((1, pixels, pixels, 3))), jax.random.key(0)
    )
    assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes["params"])) == parameters


def cifar_resnet_macs(layers: int) -> int:
    """He et al. 2016, table 6: 2n layers of 3x3 convolutions on maps of 32, 16 and 8, with 16, 32 and 64 channels."""
    per_stage = layers // 3  # 2n, of equal cost but for the two that change the number of channels
    whole = 9 * 16 * 16 * 32 * 32
    return 9 * 3 * 16 * 32 * 32 + 3 * per_stage * whole - 2 * (whole // 2)


def lite0_macs() -> int:
    """EfficientNet-Lite0's table: expansion, window, channels, repeats, stride, from 112x112 maps of 32 channels on."""
    total, size, channels = 9 * 3 * 32 * 112**2, 112, 32
    for expansion, window, features, repeats, stride in (
        (1, 3, 16, 1, 1), (6, 3, 24, 2, 2), (6, 5, 40, 2, 2), (6, 3, 80, 3, 2), (6, 5, 112, 3, 1), (6, 5, 192, 4, 2),
        (6, 3, 320, 1, 1),
    ):  # fmt: skip
        for repeat in range(repeats):
            wide = channels * expansion
            total += size**2 * channels * wide if expansion > 1 else 0
            size //= stride if repeat == 0 else 1
            total += size**2 * wide * (window**2 + features)
            channels = features
    return total + size**2 * channels * 1280 + 1280 * 1000


def test_counts_that_are_published_in_round_numbers_are_those_of_the_tables() -> None:
    counted = {name: macs for name, _, _, _, macs, _ in PUBLISHED}
    for layers in (20, 32, 44, 56, 110):
        assert counted[f"resnet{layers}"] == cifar_resnet_macs(layers - 2)
    assert counted["efficientnet_lite0"] == lite0_macs()


def test_the_papers_resnext_with_full_transforms() -> None:
    graph = network_for(make("resnext29", block=4), (32, 32, 3))
    full = network_macs(graph, graph.full_counts()).to_dict()["full_transforms"]
    assert round(full / 1e5) == 8433  # FACTS.md: 843.3 M


@pytest.mark.parametrize("variant", ["resnext50_32x4d", "resnet110", "mobilenetv1"])
def test_a_training_step_has_a_shape_at_the_full_size(variant: str) -> None:
    """Traced, not run: the sizes are those of the publications."""
    pixels, classes = next((p, c) for name, p, c, *_ in PUBLISHED if name == variant)
    network = make(variant, classes, block=1, mode="off")
    images = jnp.zeros((2, pixels, pixels, 3))

    def step(key):
        variables = network.init(key, images)

        def loss(params):
            logits, updated = network.apply(
                {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.zeros(2, int)).mean(), updated

        return jax.grad(loss, has_aux=True)(variables["params"]), variables

    (grads, updated), variables = jax.eval_shape(step, jax.random.key(0))
    same = jax.tree.map(lambda a, b: a.shape == b.shape, (grads, updated["batch_stats"]),
                        (variables["params"], variables["batch_stats"]))  # fmt: skip
    assert all(jax.tree.leaves(same))


# Small members of each family, so that they compile quickly.
SMALL = {
    "bottleneck": (resnet.VARIANTS, resnet.Variant((2, 1), 8, 3, 2, True, 8, 2)),
    "grouped": (resnet.VARIANTS, resnet.Variant((1, 2), 8, 1, 1, False, 16, 2, 4, 4)),
    "basic": (resnet.VARIANTS, resnet.Variant((1, 2), 8, 3, 1, False, 8, 0)),
    "v1": (
        mobilenet.VARIANTS,
        mobilenet.Variant(
            8, 3, 2, (mobilenet.Stage(1, 16, 1, 1), mobilenet.Stage(1, 24, 2, 2)), False, None, linear=False
        ),
    ),
    "lite": (
        mobilenet.VARIANTS,
        mobilenet.Variant(
            8, 3, 2, (mobilenet.Stage(1, 8, 1, 1), mobilenet.Stage(3, 16, 2, 2, 5), mobilenet.Stage(3, 16, 1, 1)),
            False, 32,
        ),
    ),
}  # fmt: skip
INPUT = (16, 16, 3)


@pytest.fixture(autouse=True, scope="module")
def small_variants():
    with pytest.MonkeyPatch.context() as patch:
        for name, (variants, variant) in SMALL.items():
            patch.setitem(variants, name, variant)
        yield


compiled = functools.partial(jax.jit, compiler_options=HASTE)


@functools.cache
def small(name: str, **fields) -> tuple[FrequencyNetwork, MaskedGraph]:
    network = make(name, 5, **{"block": 2, **fields})
    return network, with_preprocessing(network_for(network, INPUT))


@pytest.mark.parametrize("name", SMALL)
def test_full_masks_change_no_logit(name: str) -> None:
    network, graph = small(name)
    variables = random_variables(network, graph, 0)
    images = jnp.asarray(raw_images(graph, 2, 0), jnp.float32) / 255
    fcmask = compiled(network.init)(jax.random.key(0), images).get(FCMASK, {})
    soft, off = (
        compiled(net.apply)({**variables, FCMASK: fcmask}, images) for net in (network, network.copy(mode="off"))
    )
    assert relative_error(np.asarray(soft), np.asarray(off)) < 1e-4
    # Half of the coefficients of every side do change them.
    if fcmask:
        halved = compiled(network.apply)({**variables, FCMASK: jax.tree.map(lambda m: m / 2, fcmask)}, images)
        assert relative_error(np.asarray(halved), np.asarray(off)) > 1e-3


@pytest.mark.parametrize("name", SMALL)
def test_a_training_step_lowers_the_loss(name: str) -> None:
    network, graph = small(name)
    network = network.copy(mode="off")
    images = jnp.asarray(raw_images(graph, 8, 0), jnp.float32) / 255
    labels = jnp.arange(8) % 5
    variables = compiled(network.init)(jax.random.key(0), images)

    @compiled
    def step(params):
        def loss(params):
            logits, _ = network.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, grads = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - 0.05 * g, params, grads)

    before, params = step(variables["params"])
    after, _ = step(params)
    assert float(after) < float(before)


@pytest.mark.parametrize(
    ("name", "levels", "form", "fields"),
    [
        ("bottleneck", None, "bands", {}),
        ("bottleneck", (), "channels", {"padding": "torch"}),
        ("bottleneck", (1,), "bands", {"sides": "output", "padding": "torch"}),
        ("grouped", None, "bands", {"padding": "torch"}),
        ("grouped", (), "channels", {}),
        ("grouped", (1,), "bands", {"sides": "input"}),
        ("v1", None, "bands", {}),
        ("v1", (), "channels", {"padding": "torch"}),
        ("lite", (1,), "groups", {"tied": True}),
        ("lite", None, "bands", {"padding": "torch"}),
    ],
)  # fmt: skip
def test_the_frozen_network_equals_the_masked_one(name: str, levels, form: str, fields: dict) -> None:
    network, graph = small(name, **fields)
    counts, variables = random_counts(graph, 3, levels), random_variables(network, graph, 0)
    images = raw_images(graph, 3, 0)
    frozen = frozen_of(graph, variables, counts)
    layers = [operation for operation in frozen.program.operations if isinstance(operation, (Run, Pointwise))]
    assert form in {operation.form for operation in layers if operation.name != "head"}
    assert Program.from_dict(frozen.program.to_dict()) == frozen.program
    expected = masked_logits(hard_network(network, graph, counts), graph, variables, counts, images)
    assert relative_error(frozen_logits(frozen, images, in_chunks=True), expected) < 1e-4 / 4


@pytest.mark.parametrize("name", ["bottleneck", "grouped", "v1"])
@pytest.mark.parametrize("what", ["inner", "everything"])
def test_blocks_of_which_nothing_is_left(name: str, what: str) -> None:
    network, graph = small(name)
    nothing = {"inner": ("conv1/output", "conv3/input", "block01/project/output"), "everything": ("put",)}[what]
    counts = {path: np.where(path.endswith(nothing), 0, n) for path, n in graph.full_counts().items()}
    variables, images = random_variables(network, graph, 0), raw_images(graph, 2, 0)
    expected = masked_logits(hard_network(network, graph, counts), graph, variables, counts, images)
    assert relative_error(frozen_logits(frozen_of(graph, variables, counts), images), expected) < 1e-4 / 4


def test_basic_blocks_freeze_as_they_are() -> None:
    network, graph = small("basic")
    variables, images = random_variables(network, graph, 0), raw_images(graph, 2, 0)
    frozen = frozen_of(graph, variables, {})
    assert {getattr(operation, "form", "dense") for operation in frozen.program.operations} == {"dense"}
    expected = masked_logits(network, graph, variables, {}, images)
    assert relative_error(frozen_logits(frozen, images), expected) < 1e-4 / 4


@pytest.mark.parametrize("name", ["bottleneck", "grouped", "basic", "v1", "lite"])
def test_onnx_says_the_same(name: str) -> None:
    pytest.importorskip("onnxruntime")
    from fdjax.frozen.onnx_model import onnxruntime_session, to_onnx

    # Maps have 16, 8, 4 and 2 pixels: a block of 3 divides none of them.
    for block, padding, drawn in ((3, "torch", (None, (1,))), (4, "same", ((),))):
        by_map = FrozenDict({2: 2} if name == "bottleneck" else {})
        network, graph = small(name, block=block, block_by_map=by_map, mode="hard", padding=padding)
        variables, images = random_variables(network, graph, 0), raw_images(graph, 2, 0)
        for levels in drawn if graph.masks else drawn[:1]:
            counts = random_counts(graph, 3, levels)
            frozen = frozen_of(graph, variables, counts)
            found = onnxruntime_session(to_onnx(frozen.program, frozen.arrays), 1)(images)
            assert relative_error(found, masked_logits(network, graph, variables, counts, images)) < 1e-4


@pytest.mark.parametrize("name", ["bottleneck", "grouped"])
def test_whole_channels_cost_what_the_frozen_network_computes(name: str) -> None:
    graph = network_for(make(name, 5, block=2), INPUT, count_classifier=True)
    for seed in range(3):
        counts = random_counts(graph, seed, ())
        macs = network_macs(graph, counts)
        program = freeze(graph, seeded_variables(graph), counts).program
        assert program.macs() == sum(layer.total for layer in macs.layers)


@pytest.mark.parametrize("name", ["bottleneck", "grouped", "v1"])
@pytest.mark.parametrize("levels", [(), None])
def test_expected_macs_of_hard_masks_are_what_the_network_counts(name: str, levels) -> None:
    """Where every layer's cheapest form is by bands or channels; forms that gain by dropping a side are left out."""
    _, graph = small(name)
    for seed in range(3):
        # One count for each side keeps layers from dropping coefficients of all channels of one side only.
        counts = random_counts(graph, seed, levels) if levels == () else graph.full_counts()
        masks = {path: jnp.asarray(counts[path] / n, jnp.float32) for path, (_, n) in graph.mask_sizes.items()}
        found, exact = float(expected_ratio(graph, masks, levels)), network_macs(graph, counts).ratio
        assert found == pytest.approx(exact, rel=1e-6) if levels == () else found >= exact


def test_removing_channels_of_a_bottleneck_spares_its_3x3_convolution() -> None:
    _, graph = small("bottleneck")
    counts = graph.full_counts()
    counts["block00/conv1/output"] = counts["block00/conv1/output"] * (np.arange(8) < 6)
    counts["block00/conv3/input"] = counts["block00/conv3/input"] * (np.arange(8) < 4)
    conv2 = {layer.name: layer for layer in network_macs(graph, counts).layers}["block00/conv2"]
    assert conv2.total == 4 * 4 * 9 * 6 * 4 and conv2.form == "channels"
    # What the gate makes of it keeps the removed channels removed.
    hard = harden(graph, {path: count / graph.mask_sizes[path][1] for path, count in counts.items()})
    assert (hard.counts["block00/conv3/input"] == 0).sum() == 4


def test_filters_that_are_removed_shrink_the_network() -> None:
    network = ResNet("resnet20", 10, inner_channels=(4, *[16] * 2, *[32] * 3, *[64] * 3))
    pruned, full = (network_for(module, (32, 32, 3)).layers for module in (network, ResNet("resnet20", 10)))
    saved = [full[name].dense_macs - pruned[name].dense_macs for name in full]
    assert saved[:3] == [0, 32 * 32 * 9 * 16 * 12, 32 * 32 * 9 * 12 * 16] and not any(saved[3:])
    with pytest.raises(ValueError, match="one number per block, 9 for resnet20, got 1"):
        network_for(ResNet("resnet20", 10, inner_channels=(4,)), (32, 32, 3))


@pytest.mark.parametrize("variant", [*RESNETS, "mobilenetv1"])
def test_tying_is_refused_where_there_are_no_inverted_residuals(variant: str) -> None:
    learn = LearnConfig(block=1, tied=True)
    if variant in SMALL:
        pytest.skip("a variant of this test")
    with pytest.raises(UserError, match=r"learn\.tied is for networks of inverted residual blocks"):
        build_network(Config(model=ModelConfig(name=variant), learn=learn), (32, 32, 3), 10)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "resnet50", "cardinality": 8}, "only for a resnext"),
        ({"name": "mobilenetv2", "inner_channels": (8,)}, "only for a resnet or resnext"),
        ({"name": "resnext29", "group_width": 0}, "at least 1"),
        ({"batch_norm_epsilon": 0.0}, "above 0"),
    ],
)
def test_settings_of_other_networks_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ModelConfig(**fields)


def test_cardinality_and_width_of_a_resnext() -> None:
    config = Config(model=ModelConfig(name="resnext29", cardinality=8, group_width=4))
    _, graph = build_network(config, (32, 32, 3), 10)
    convs = [layer for layer in graph.layers.values() if layer.groups > 1]
    assert [layer.groups for layer in convs] == [8] * 9
    assert [layer.in_channels for layer in convs] == [32] * 3 + [64] * 3 + [128] * 3
    assert dataclasses.replace(convs[0], groups=1).dense_macs == 8 * convs[0].dense_macs
    assert level_counts(16, None)[-1] == 16


@functools.cache
def resnet50() -> MaskedGraph:
    config = Config(model=ModelConfig(name="resnet50"), learn=LearnConfig(block=1))
    return build_network(config, (224, 224, 3), 1000)[1]


@pytest.mark.parametrize("penalty", ["fcmask", "macs"])
def test_counts_beyond_32_bits_are_expected_and_penalised(penalty: str) -> None:
    """ResNet-50 has 4,089 M MACs, more than an int32 holds."""
    learn = LearnConfig(block=1, penalty=penalty, levels="0,N")
    graph = resnet50()
    ones = {path: jnp.ones(channels) for path, (channels, _) in graph.mask_sizes.items()}
    assert float(expected_ratio(graph, ones, (0,))) == pytest.approx(1, rel=1e-5)
    value = float(mask_penalty(graph, unflatten_dict(ones, sep="/"), learn))
    # Every mask counts 1 in the paper's penalty; shortcuts and the stem are in no other.
    shortcuts = sum(layer.dense_macs for layer in graph.layers.values() if layer.name.endswith(("shortcut", "stem")))
    assert value == pytest.approx(len(ones) if penalty == "fcmask" else 1 - shortcuts / DENSE_50, rel=1e-4)

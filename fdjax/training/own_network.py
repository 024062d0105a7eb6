"""A network that a user's function makes, with the interface of the zoo's networks.

A network of the zoo owns its FCMasks and applies them in its own layers. A user's module knows nothing of masks;
`fdjax.masked` applies them by its channel graph. The rest of the code does not see the difference.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Hashable
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from fdjax.config import Config
from fdjax.errors import UserError
from fdjax.graph.fast_convolutions import fast_convolutions
from fdjax.graph.masks import Counts, MaskedGraph
from fdjax.ops.fcmask import kept_counts
from fdjax.pruning.masked import masked
from fdjax.python_file import import_function, what_failed
from fdjax.zoo import FCMASK, FrequencyNetwork
from fdjax.zoo.frequency import MaskMode

FLAG = "--model.factory"
_COLLECTIONS = ("params", "batch_stats")


@dataclasses.dataclass(frozen=True, eq=False)
class OwnNetwork:
    """A Linen module without masks of its own.

    Attributes:
      module: the module; it has `__call__(images, train)`.
      title: the network's name in tables, which is the factory's.
      num_classes: number of outputs.
      masks: the channel graph with its masks; None before it has been traced.
      mode: the mode of all masks, as in `FrequencyNetwork`.
      counts: with mode="hard", the kept counts that are constants of the program; None: those of the variables.
    """

    module: nn.Module
    title: str
    num_classes: int
    masks: MaskedGraph | None = None
    mode: MaskMode = "soft"
    counts: Counts | None = None

    @property
    def hard_form(self) -> Hashable:
        """The part of the network that depends on its hard masks; networks that are equal in it share a program."""
        return tuple((path, np.asarray(count).tobytes()) for path, count in (self.counts or {}).items())

    def without_masks(self) -> Self:
        """Returns the network without its masks."""
        return dataclasses.replace(self, masks=None, mode="off", counts=None)

    def hardened(self, counts: Counts) -> Self:
        """Returns the network with hard masks.

        Args:
          counts: the kept counts of each FCMask by its path, int [C].

        Returns:
          The network in mode "hard".
        """
        return dataclasses.replace(self, mode="hard", counts=counts)

    def init(self, key: jax.Array, images: jax.Array) -> dict[str, Any]:
        """Initialises the collections.

        Args:
          key: a PRNG key.
          images: [B, H, W, C]; only the shape matters.

        Returns:
          The collections params, batch_stats, and fcmask (all ones).
        """
        made = dict(nn.meta.unbox(self.module.init({"params": key, "dropout": key}, images, train=False)))
        sizes = self.masks.mask_sizes if self.masks is not None else {}
        ones = {path: jnp.ones(channels) for path, (channels, _) in sizes.items()}
        return {"params": {}, "batch_stats": {}, **made, FCMASK: unflatten_dict(ones, sep="/")}

    def apply(
        self, variables: Any, images: jax.Array, train: bool = False, mutable: Any = False, rngs: Any = None
    ) -> Any:
        """Computes logits, as `FrequencyNetwork.apply` does.

        Args:
          variables: the collections params, batch_stats and fcmask.
          images: normalised images, [B, H, W, C].
          train: whether the module is in training.
          mutable: collections to update, such as ["batch_stats"].
          rngs: PRNG keys for the module.

        Returns:
          Logits [B, classes], in float32 or wider; with `mutable` also the updated collections.
        """
        collections = {name: variables[name] for name in _COLLECTIONS}

        def plain(collections: Any, images: jax.Array, rngs: Any) -> Any:
            made: Any = self.module.apply(collections, images, train=train, mutable=mutable, rngs=rngs)
            logits, updated = made if mutable else (made, {})
            wide: Any = jnp.asarray(logits, jnp.promote_types(logits.dtype, jnp.float32))
            # A module without batch norm has no statistics to update.
            return (wide, {"batch_stats": collections["batch_stats"], **updated}) if mutable else wide

        if self.masks is None:
            # It is being traced: the channel graph is of the module's own operations.
            return plain(collections, images, rngs)
        if self.mode == "off" or not self.masks.masks:
            return fast_convolutions(plain)(collections, images, rngs)
        # Hard masks have to stay constants, so they are no arguments of the function that is transformed.
        narrow = self.mode == "hard" and self.counts is not None
        function = functools.partial(masked(plain, self.masks, narrow=narrow), self._masks_of(variables))
        return fast_convolutions(function)(collections, images, rngs)

    def _masks_of(self, variables: Any) -> dict[str, Any]:
        assert self.masks is not None
        if self.mode == "hard" and self.counts is not None:
            return dict(self.counts)
        flat: dict[str, Any] = flatten_dict(variables[FCMASK], sep="/")
        if self.mode == "soft":
            return flat
        return {path: kept_counts(flat[path], mask.num_coefs) for path, mask in self.masks.masks.items()}


Network = FrequencyNetwork | OwnNetwork


def zoo_network(network: Network, what: str) -> FrequencyNetwork:
    """Returns the network if it is one of the zoo.

    Args:
      network: the network.
      what: the command that needs a network of the zoo, for the message.

    Raises:
      UserError: if it is the user's own.
    """
    if isinstance(network, OwnNetwork):
        raise UserError(
            f"{what} is for the networks that --model.name names, and this one is made by {FLAG} {network.title}: its "
            "masks are learned by train.py (phases learn, refine)"
        )
    return network


def make_own_network(config: Config, input_shape: tuple[int, int, int], num_classes: int) -> OwnNetwork:
    """Imports and calls the factory of a config, and checks the module that it returns by its shapes.

    Args:
      config: the run's config; its model names the factory and the factory's arguments.
      input_shape: (H, W, C) of an image.
      num_classes: number of outputs.

    Raises:
      UserError: if the factory cannot be imported or called, or does not return a Linen module that takes such images,
        gives a logit for each class, and has no other collections than params and batch_stats.
    """
    model = config.model
    assert model.factory is not None
    made = _call(model.factory, import_function(model.factory, FLAG), dict(model.arguments), num_classes)
    if not isinstance(made, nn.Module):
        raise UserError(
            f"{FLAG} {model.factory} must return a Flax Linen module with __call__(images, train), got "
            f"{type(made).__module__}.{type(made).__name__}; models of other libraries are pruned from Python "
            "(docs/own-networks.md)"
        )
    parameters = inspect.signature(type(made).__call__).parameters
    if "train" not in parameters and not _takes_any(parameters.values()):
        raise UserError(
            f"{FLAG} {model.factory}: {type(made).__name__}.__call__ must take (images, train), where train is True "
            f"while weights are trained; it takes ({', '.join(list(parameters)[1:])})"
        )
    network = OwnNetwork(made, model.factory, num_classes)
    _check_body_rates(config, network, _try_on_shapes(network, input_shape)["params"])
    return network


def _takes_any(parameters: Any) -> bool:
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def _call(factory: str, function: Callable[..., Any], arguments: dict[str, Any], num_classes: int) -> Any:
    signature = inspect.signature(function)
    if "num_classes" in signature.parameters or _takes_any(signature.parameters.values()):
        arguments = {"num_classes": num_classes, **arguments}
    try:
        signature.bind(**arguments)
    except TypeError as error:
        given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        raise UserError(
            f"{FLAG} {factory} takes {signature}, and is called with ({given}): {error}; --model.arguments gives names "
            "and values, such as width 0.5"
        ) from error
    try:
        return function(**arguments)
    except UserError as error:
        raise UserError(f"{FLAG} {factory}: {error}") from error
    except (Exception, SystemExit) as error:
        raise UserError(f"{FLAG} {factory}: the call fails: {what_failed(error)}") from error


def _try_on_shapes(network: OwnNetwork, input_shape: tuple[int, int, int]) -> dict[str, Any]:
    """Returns the shapes of the module's collections.

    Raises:
      UserError: if the module does not take such images, in inference or in training, or does not give logits.
    """
    factory = f"{FLAG} {network.title}"
    images = jax.ShapeDtypeStruct((2, *input_shape), jnp.float32)

    def tried(what: str, function: Callable[..., Any], *shapes: Any) -> Any:
        try:
            return jax.eval_shape(function, *shapes)
        except UserError as error:
            raise UserError(f"{factory}: {error}") from error
        except Exception as error:  # whatever a user's module raises
            size = "x".join(map(str, input_shape))
            raise UserError(
                f"{factory}: its module does not take images of {size} {what}: {what_failed(error)}"
            ) from error

    key = jax.random.key(0)
    variables = tried("when it is initialised", lambda images: network.init(key, images), images)
    others = sorted({*variables} - {*_COLLECTIONS, FCMASK})
    if others:
        raise UserError(
            f"{factory}: its module has the collection {', '.join(others)}; only {' and '.join(_COLLECTIONS)} are "
            "trained and saved: leave it out"
        )
    collections = {name: variables[name] for name in _COLLECTIONS}
    logits = tried("with train=False", lambda v, x: network.module.apply(v, x, train=False), collections, images)
    wanted = (images.shape[0], network.num_classes)
    if getattr(logits, "shape", None) != wanted or not jnp.issubdtype(logits.dtype, jnp.floating):
        got = ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(logits))
        raise UserError(
            f"{factory}: its module must give a logit for each of the {network.num_classes} classes of the data, "
            f"floats of shape {list(wanted)} for {wanted[0]} images, got {got}; if the factory takes num_classes, "
            "fdjax gives it the number of classes"
        )
    training = {"train": True, "mutable": ["batch_stats"], "rngs": key}
    tried("with train=True", lambda v, x: network.apply(v, x, **training), collections, images)
    return variables


def _check_body_rates(config: Config, network: OwnNetwork, params: Any) -> None:
    """Raises `UserError` if a phase has a `body_rate`, and the network has no layer called classifier."""
    for phase in config.phases:
        rate = getattr(getattr(config, phase), "body_rate", 1)
        if rate != 1 and "classifier" not in params:
            raise UserError(
                f"{phase}.body_rate is {rate:g}, a rate for all layers but the one called 'classifier'; "
                f"{network.title} has no such layer, only {', '.join(params)}: give 1"
            )

"""Imported weights: files are read without their frameworks, names are mapped, and layouts are converted."""

from fdjax.importers.convert import Fitted, convert, count_classes, fit
from fdjax.importers.files import open_weights, read_weights
from fdjax.importers.formats import FORMATS, Conventions
from fdjax.importers.state_dicts import Weights

__all__ = [
    "FORMATS",
    "Conventions",
    "Fitted",
    "Weights",
    "convert",
    "count_classes",
    "fit",
    "open_weights",
    "read_weights",
]

"""Weights trained elsewhere: files read without their frameworks, names mapped, layouts turned."""

from fdjax.importers.convert import convert, count_classes
from fdjax.importers.files import read_weights
from fdjax.importers.formats import FORMATS, Conventions

__all__ = ["FORMATS", "Conventions", "convert", "count_classes", "read_weights"]

"""Networks of ONNX files, as functions of JAX with trained variables."""

from fdjax.onnx.graph import CLASSIFIER, OnnxGraph, read_onnx_graph
from fdjax.onnx.network import compute, from_onnx

__all__ = ["CLASSIFIER", "OnnxGraph", "compute", "from_onnx", "read_onnx_graph"]

"""Writes a frozen network as C++ code for the CPU, compiles it with the system's compiler, and calls it from Python."""

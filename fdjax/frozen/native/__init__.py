"""A frozen network as C++ code for the CPU: emitted, compiled by the system's compiler, called from Python."""

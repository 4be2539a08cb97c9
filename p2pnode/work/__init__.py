"""Models by hash, admission, batching, hardware and sandboxed worker processes; knows nothing of peers or money.

Imports `wire`, `crypto` and the modules of layer 0. Strangers' models are parsed and run in confined child processes only;
the daemon itself never imports onnxruntime.
"""

"""The operators of manifold-constrained hyper-connections, one operator a file.

Imports nothing: transformers probes for a package called `kernels` and must never pay for this one.
"""

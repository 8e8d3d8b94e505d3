"""Metrics as accumulators in float64 with ``state`` and ``merge``; pure numerics that know no processes and no files.

Features come in as tensors or as callables: which network made them is the caller's to say, in each row of results.
"""

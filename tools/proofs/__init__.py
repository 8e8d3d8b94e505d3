"""Proofs: each module measures one table of claims and fails on a miss; ``python -m tools.proofs [NAME ...]``."""

"""Speed against peers, one module per kind of work; ``tools/bench.py`` runs them."""

"""Training stages: what one step is, when things happen, and the command-line runs built of them."""

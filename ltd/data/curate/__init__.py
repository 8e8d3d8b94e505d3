"""What becomes a sample: shots of films, limits on size and length, near-duplicates."""

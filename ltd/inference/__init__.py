"""Encode, generate and decode with trained models: what sample.py, tools/cache_latents.py and the stages share."""

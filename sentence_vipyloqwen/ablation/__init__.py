"""Ablation: the same base, data and budget under one change at a time, over several seeds."""

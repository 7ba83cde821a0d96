"""The embedded default: a tiny base model, small real data, and the whole job done on them."""

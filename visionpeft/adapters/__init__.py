"""How methods are attached to a model, act, are merged, saved and taken off."""

"""Builds the published folder layout of a data set from its archives."""

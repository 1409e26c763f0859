"""Searches over methods: which methods of which size, in which blocks, found on validation and trained again.

A space says what its members are. A search judges some of them, each once and written down, measures what they cost,
and trains the best one again; nothing but those last trainings sees test images. This package stands above
`protocols`, whose cells it trains, and below the entry point `search.py`.
"""

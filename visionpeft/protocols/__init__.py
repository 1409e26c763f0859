"""Protocols: tables whose every number is a training run with its own directory.

A protocol is a list of command lines of `visionpeft.fit`. So this package stands above `cli.py`, which builds what a
command line names, and `fit.py`, which trains it, and below the entry points `protocol.py` and `evaluate.py`.

It imports none of its modules: a process that is given a part of the work imports what that part needs.
"""

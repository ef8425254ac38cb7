"""Measure layers, models, initialisation, ASA and memory against their floor, or compare two measurements.

Without a suite all of them run, in under seven minutes on two cores. First comes the ratio to the floor, the bare
frozen nn.Linear for a layer: its median over interleaved rounds with quartiles. Nothing is timed before it has been
checked.
"""

from .command import add_arguments, run

__all__ = ["add_arguments", "run"]

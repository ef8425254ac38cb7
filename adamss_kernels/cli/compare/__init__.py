"""Fit each method's update to matrices of known character, with the same number of parameters, and compare the spectra.

The experiment of the KRAdapter paper (Albert et al. 2025, arXiv:2508.00230), with AdaMSS and the Spectral Adapters too,
and with the parameter budget kept. Writes experimental_results.json, peft_comparison.png and spectra.png. A run that was
stopped goes on where it was.
"""

from .command import add_arguments, run

__all__ = ["add_arguments", "run"]

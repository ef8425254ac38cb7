#!/usr/bin/env bash
# Everything that needs a GPU, from the source tree, without network, in the order of worth: the CUDA library, tests, the
# card's ceilings and our kernels against them, layers, a training step, ASA, sanitizers.
#
#   bench/gpu.sh --total 400              all stages on the GPU, ending within 400 seconds, whatever hangs
#   bench/gpu.sh --stage grid step        some of them
#   bench/gpu.sh --device cpu --total 120 a dry run with tiny shapes: shows that the script works, times nothing
#
# ADAMSS_COMMIT names the commit where the history did not come along. Results go to --out, or $OUT, or bench/results/<GPU> (a dry run: build/bench-cpu): results.jsonl, of which each row is
# written as it is measured, and summary.md.
set -euo pipefail
cd "$(dirname "$0")/.."
# The first import of torch on a fresh machine can take a minute; it counts, too.
ADAMSS_BENCH_BEGAN="$(date +%s)"
export ADAMSS_BENCH_BEGAN
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [[ -z "${PYTHON:-}" ]]; then
  if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi
exec "$PYTHON" bench/gpu.py "$@"

#!/usr/bin/env bash
# Everything that needs a GPU, from the source tree, without network: the CUDA library, tests, tuning
# sweep, benchmarks, sanitizer; both GPU backends.
#
#   bench/gpu.sh                          all stages on the GPU; ends within ten minutes, whatever hangs
#   bench/gpu.sh --stage grid step        some of them
#   bench/gpu.sh --device cpu             a dry run with tiny shapes: shows that the script works, times nothing
#
# Results go to --out, or $OUT, or bench/results/<GPU> (a dry run: build/bench-cpu): one JSON per stage, and summary.md.
# Each is written as it grows, so that a run that is cut short keeps what it has measured.
set -euo pipefail
cd "$(dirname "$0")/.."
# The first import of torch on a fresh machine can take a minute; it counts, too.
ADAMSS_BENCH_BEGAN="$(date +%s)"
export ADAMSS_BENCH_BEGAN
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" bench/gpu.py "$@"

#!/usr/bin/env bash
# Everything that needs a GPU, from the source tree, without network: the CUDA library, tests, sanitizer,
# tuning sweep, benchmarks; both GPU backends.
#
#   bench/gpu.sh                          all stages on the GPU; under ten minutes
#   bench/gpu.sh --stage grid step        some of them
#   bench/gpu.sh --device cpu             a dry run with tiny shapes: shows that the script works, times nothing
#
# Results go to --out, or $OUT, or bench/results/<GPU> (a dry run: build/bench-cpu): one JSON per stage, and summary.md.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" bench/gpu.py "$@"

#!/usr/bin/env bash
# Everything there is to measure on a GPU machine, in ten minutes (benchmarks/gpu.py says what):
#
#     benchmarks/gpu.sh OUT_DIR [--commit ID] [--sections NAME ...]
#
# Needs python3 with torch, triton, transformers and numpy, and this checkout; no installation, no
# internet, no git. PYTHON names another interpreter. OUT_DIR must be new or empty.
set -euo pipefail
if [[ $# -lt 1 || $1 == -* ]]; then
    sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
out="$(realpath -m -- "$1")"
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# settings that would change what is measured
unset TRITON_INTERPRET PALU_BACKEND PALU_CHECK PALU_TRITON_CPU
exec "${PYTHON:-python3}" -m benchmarks.gpu "$out" "$@"

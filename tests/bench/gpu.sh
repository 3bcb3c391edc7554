#!/usr/bin/env bash
# bash tests/bench/gpu.sh first|second|train: one short run on a GPU; what it does is in gpu.py.
exec "${PY:-python3}" "$(dirname "$0")/gpu.py" "$@"

#!/usr/bin/env bash
# Set-up, lint and the whole test suite. Extra words go to pytest: bash scripts/test.sh -k svd
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup_env.sh dev,demo
ruff check .
ruff format --check .
exec python -m pytest "$@"

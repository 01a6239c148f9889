#!/usr/bin/env bash
# Every check: lint, types, notebook rules, unit and property tests, and all notebooks on the
# profile smoke with a store of their own, also in a browser: where none is installed and apt-get
# may be used, it is. ./run_tests.sh -k store passes -k store to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/tools/environment.sh"
cd "$repository"
use_environment
use_browser
use_snakemake

export HF_HUB_OFFLINE=1 INVERTUNE_PROGRESS=0
INVERTUNE_STORE="$(mktemp -d "${TMPDIR:-/tmp}/invertune-store.XXXXXX")"
trap 'rm -rf "$INVERTUNE_STORE"' EXIT

notebooks=(notebooks/0*.ipynb)
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
"$python" -m nbstripout --verify "${notebooks[@]}"
"$python" -m pytest tests "${notebooks[@]}" \
  --nbval-lax --nbval-current-env --nbval-cell-timeout 300 "$@"

#!/usr/bin/env bash
# The grid of notebooks through Snakemake:
#   workflow/run.sh local|slurm PROFILE [seeds=LIST] ['overrides=YAML'] [targets, its own options]
#   workflow/run.sh slurm paper --dry-run            the jobs
#   workflow/run.sh slurm paper seeds=1,2,3          everything, for three seeds
#   workflow/run.sh slurm paper results/paper/grid/04_activation_tuning.done
#   workflow/run.sh slurm paper --report report.html what has been run, with times
# Run the same command again after a failure; add --unlock once if Snakemake itself was killed.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../tools/environment.sh"
cd "$repository"
cluster="${1:-}" settings=("profile=${2:-}")
[ -f "workflow/profiles/$cluster/config.yaml" ] && [ -f "params/${2:-}.yml" ] ||
  fail "usage: workflow/run.sh $(ls workflow/profiles | paste -sd'|')" \
    "$(cd params && printf '%s\n' *.yml | sed 's/\.yml$//' | paste -sd'|') [options]"
shift 2
while [[ "${1:-}" =~ ^(seeds|overrides)= ]]; do
  settings+=("$1") && shift
done
use_environment
use_snakemake
exec snakemake --config "${settings[@]}" --profile "workflow/profiles/$cluster" "$@"

#!/usr/bin/env bash
# Runs the notebooks in order; makes the environment first where it is missing.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/tools/environment.sh"
cd "$repository"

usage() {
  cat <<'TEXT'
usage: ./run_all.sh [PROFILE] [--only NN] [--seeds LIST] [--overrides YAML] [--jobs N]
                    [--dry-run]
       ./run_all.sh purify WEIGHTS [PROFILE] --out FOLDER [--images FOLDER] [--rounds 2]
       ./run_all.sh check | lab
       ./run_all.sh env COMMAND ...

  PROFILE            smoke (3 minutes), mini (the default), scenes224 (one GPU, no data needed) or
                     paper (GPUs; set INVERTUNE_DATA)
  --only NN          only the notebooks whose names start with NN, e.g. --only 03
  --seeds LIST       seeds, separated by commas, e.g. --seeds 1,2,3 (default: the profile's)
  --overrides YAML   other settings, e.g. --overrides '{attacks: {names: [badnet]}}'
  --jobs N           processes at once (default: one a core, as far as memory is free, 2.4 GB each
                     on mini; 1 on smoke and on a GPU)
  --dry-run          the plan: steps, planned exposures, what the store holds, minutes, memory
  purify             InverTune on a model of your own: a report and purified weights; --images: on
                     images of your own, in a folder for each class, instead of the profile's data
  check              versions, device, memory, data, models, and the next command
  lab                opens JupyterLab in the same environment
  env COMMAND ...    runs any command in the same environment and in this folder, for example
                     ./run_all.sh env python -m invertune --help

Executed notebooks, results.csv and runs.csv go to results/PROFILE, tables and figures to
figures/PROFILE, artifacts to $INVERTUNE_STORE (default results/store). Files in figures/PROFILE are
overwritten, including the committed ones of mini and scenes224 (git restore figures brings them
back). What is finished is not run again; an interrupted run resumes.

  INVERTUNE_VENV     an environment to use instead of making one, which needs 8 GB of free disk
  INVERTUNE_PYTHON   the Python to make one with (default: the first of 3.11 or newer)
  INVERTUNE_STORE    where artifacts are kept
  INVERTUNE_DATA     CC3M, ImageNet-1K, COCO and WordNet, for the profile paper

Exit codes: 0 done, 1 a notebook failed, 2 a wrong argument or setting, 3 another run of the same
profile is going on.
TEXT
}

if [ "${1:-}" = env ]; then
  [ $# -gt 1 ] || fail "env needs a command, for example: ./run_all.sh env python -m invertune --help"
  use_environment
  exec -- "${@:2}"
fi
profile="${1:-mini}"
[[ "$profile" =~ ^(lab|check|purify)$ ]] && command="$profile" || command=
for argument in "$@"; do
  case "$command$argument" in -h | --help) usage && exit 0 ;; esac
done
if [ -z "$command" ] && [ "${profile#-}" = "$profile" ] && [ ! -f "params/$profile.yml" ]; then
  fail "unknown profile '$profile'; choose one of" \
    "$(cd params && printf '%s\n' *.yml | sed 's/\.yml$//' | paste -sd, | sed 's/,/, /g')," \
    "or purify, check, lab, env; see ./run_all.sh --help"
fi

use_environment
case "$command" in
  lab)
    export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
    exec "$python" -m jupyterlab --notebook-dir="$repository" "${@:2}"
    ;;
  check | purify)
    cd "$OLDPWD" # files are named from there
    exec "$python" -m invertune "$@"
    ;;
esac
exec "$python" tools/run_notebooks.py "$@"

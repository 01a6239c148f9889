# Sourced by run_all.sh, run_tests.sh and workflow/run.sh, before they leave the user's folder: makes the
# environment where it is missing, and sets $python. INVERTUNE_VENV names an environment to use instead (a conda
# prefix, for example).

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
for name in INVERTUNE_STORE INVERTUNE_DATA INVERTUNE_VENV; do # relative to where the user is
  if [ -n "${!name:-}" ]; then export "$name=$(realpath -ms "${!name}")"; fi
done
case "${INVERTUNE_PYTHON:-}" in */*) INVERTUNE_PYTHON="$(realpath -ms "$INVERTUNE_PYTHON")" ;; esac

environments() {
  echo "${XDG_CACHE_HOME:-${HOME:?is not set; set it, or INVERTUNE_VENV}/.cache}/invertune"
}

fail() {
  echo "error: $*" >&2
  exit 2
}

find_python() {
  local candidate known=(python3.11 python3.12 python3.13 python3.14 python3)
  if [ -n "${INVERTUNE_PYTHON:-}" ]; then known=("$INVERTUNE_PYTHON"); fi
  for candidate in "${known[@]}"; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
      2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "no Python 3.11 or newer with venv found; install one or name it in INVERTUNE_PYTHON"
}

lock_hash() {
  sha256sum <"$repository/$1" | cut -c 1-12
}

# A file beside the folder marks an environment that is not finished: a killed run starts it anew.
make_environment() {
  local base="$1" venv="$2" lock="$3" mb="$4" free_mb
  mkdir -p "$(dirname "$venv")" || fail "cannot make $(dirname "$venv")"
  exec 9>"$venv.lock"
  if command -v flock >/dev/null && ! flock -n 9; then
    echo "another process is making $venv; waiting" >&2
    flock 9
  fi
  if [ ! -x "$venv/bin/python" ] || [ -e "$venv.unfinished" ]; then
    [ -e "$venv/pyvenv.cfg" ] || [ -z "$(ls -A "$venv" 2>/dev/null)" ] ||
      fail "$venv holds other files and no environment; name one, or a new folder, in INVERTUNE_VENV"
    free_mb=$(df -Pm "$(dirname "$venv")" | awk 'NR == 2 {print $4}')
    [ "$free_mb" -ge "$mb" ] ||
      fail "$venv needs about $mb MB and $free_mb MB are free; make room or set INVERTUNE_VENV"
    echo "making the environment $venv (once, up to $mb MB, a few minutes)" >&2
    touch "$venv.unfinished"
    "$base" -m venv --clear "$venv" || fail "$base could not make $venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input \
      --require-hashes --only-binary :all: "${@:5}" -r "$repository/$lock" ||
      fail "installing $lock into $venv failed (see above); run again to retry"
    rm "$venv.unfinished"
  fi
  exec 9>&-
}

use_environment() {
  local base venv="${INVERTUNE_VENV:-}" folder
  unset PYTHONPATH JUPYTER_PATH # the user's packages and kernels are not those of the lock
  if [ -z "$venv" ] || [ ! -x "$venv/bin/python" ] || [ -e "$venv.unfinished" ]; then
    base="$(find_python)" || exit 2
    if [ -z "$venv" ]; then
      folder="$(environments)" || exit 2
      venv="$folder/venv-$(lock_hash requirements.lock)"
    fi
    make_environment "$base" "$venv" requirements.lock 8000
  fi
  python="$venv/bin/python"
  export PATH="$venv/bin:$PATH"                 # "python" in a kernel specification is this one
  export JUPYTER_PREFER_ENV_PATH=1              # not a kernel of the same name in the home folder
  export PYTHONPATH="$repository" PYTHONUTF8=1
  export INVERTUNE_STORE="${INVERTUNE_STORE:-$repository/results/store}"
}

# A browser and its driver for tests/test_browser.py, which says what is missing where this fails.
use_browser() {
  local browser as_root=(env)
  for browser in chromium google-chrome; do
    if command -v "$browser" >/dev/null && command -v chromedriver >/dev/null; then return; fi
  done
  command -v apt-get >/dev/null || return 0
  if [ "$(id -u)" != 0 ]; then
    sudo -n true 2>/dev/null || return 0
    as_root=(sudo -n env)
  fi
  echo "installing chromium and chromium-driver, for the tests in a browser" >&2
  "${as_root[@]}" apt-get update -qq >/dev/null || true
  "${as_root[@]}" DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
    chromium chromium-driver >/dev/null || true
}

# Snakemake only dispatches, so it has an environment of its own and its versions change no result.
# Call it after use_environment: the jobs find papermill first.
use_snakemake() {
  local base folder venv lock=workflow/requirements.lock
  if ! command -v snakemake >/dev/null; then
    base="$(find_python)" || exit 2
    folder="$(environments)" || exit 2
    venv="$folder/snakemake-$(lock_hash "$lock")"
    make_environment "$base" "$venv" "$lock" 500 --no-binary connection-pool  # has no wheel
    export PATH="$PATH:$venv/bin"
  fi
}

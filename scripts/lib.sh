# shellcheck shell=bash
# Shared by the scripts beside it (sourced, not run): the environment in .venv, made once, and its error messages.
# Kept to what bash 3.2 (macOS) knows.
#
#   PYTHON              the Python to make .venv with (default: the first of python3.13 … python3 that will do)
#   DUALNN_MIN_FREE_GB  the free disk space asked for before torch is installed

set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
VENV="$ROOT/.venv"
PY="$VENV/bin/python"
STAMP="$VENV/.dualnn-installed" # "<checksum> <base|dev>", written last: an interrupted install leaves none
PIP_LOG="$VENV/pip.log"
OLDEST_MINOR=11 # the same as requires-python in pyproject.toml (a test compares them)

say() { printf '%s\n' "$*"; }

die() { # one line what is wrong, further lines what to do
    printf '\nerror: %s\n' "$1" >&2
    shift
    if [ $# -gt 0 ]; then printf '       %s\n' "$@" >&2; fi
    exit 1
}

python_version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

new_enough() { # takes "3.12"
    case "$1" in
        3.*) [ "${1#3.}" -ge "$OLDEST_MINOR" ] ;;
        *) return 1 ;;
    esac
}

# Sets BASE_PYTHON to a Python that is new enough and can make environments.
find_python() {
    local candidate version old="" no_venv=""
    if [ -n "${PYTHON:-}" ]; then
        set -- "$PYTHON"
    else # a bare python3 comes late: it may be so new that torch has no wheels for it
        set -- python3.13 python3.12 python3.11 python3.14 python3 python
    fi
    for candidate in "$@"; do
        version="$(python_version "$candidate")" || continue
        if ! new_enough "$version"; then
            old="$old $candidate ($version)"
        elif ! "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
            no_venv="$version"
        else
            BASE_PYTHON="$candidate"
            return
        fi
    done
    if [ -n "$no_venv" ]; then
        die "Python $no_venv is here, but it cannot make environments: its venv module is missing." \
            "On Debian and Ubuntu:  apt install python$no_venv-venv" \
            "Or name another one:   PYTHON=/path/to/python3 $0"
    fi
    if [ -n "$old" ]; then
        die "this Python is too old:$old. dualnn needs 3.$OLDEST_MINOR or newer." \
            "Install one, or name it:  PYTHON=/path/to/python3.12 $0"
    fi
    die "no Python found${PYTHON:+ at PYTHON=$PYTHON}. dualnn needs 3.$OLDEST_MINOR or newer." \
        "Install one, or name it:  PYTHON=/path/to/python3.12 $0"
}

free_gb() { df -Pk "$1" | awk 'NR == 2 { printf "%d", $4 / 1048576 }'; }

# check_disk GB FOLDER WHY
check_disk() {
    local free
    free="$(free_gb "$2")" || return 0 # no df: let pip find out
    if [ "${free:-$1}" -lt "$1" ]; then
        die "the disk is too full: $free GB free at $2, $1 GB needed ($3)." \
            "Free some space (\`pip cache purge\` may help), or clone to a larger disk; TMPDIR moves pip's downloads." \
            "Where pip gets CPU-only wheels of torch, 3 GB are enough:  DUALNN_MIN_FREE_GB=3 $0"
    fi
}

check_disk_for_torch() {
    local need=3
    # The Linux wheels bring CUDA: 5.5 GB unpacked. Elsewhere torch is small.
    if [ "$(uname -s)" = Linux ]; then need=8; fi
    need="${DUALNN_MIN_FREE_GB:-$need}"
    check_disk "$need" "$ROOT" "torch and what it brings"
    check_disk "$((need / 2))" "${TMPDIR:-/tmp}" "pip's downloads"
}

ensure_venv() {
    local version
    if [ -d "$VENV" ] && [ ! -f "$VENV/pyvenv.cfg" ]; then
        die "$VENV exists, but is no Python environment." "Move it away and run $0 again."
    elif [ -d "$VENV" ]; then
        if ! version="$(python_version "$PY")"; then
            say "The Python of .venv is gone or was never finished: making .venv anew."
            rm -f "$STAMP"
        elif ! new_enough "$version"; then
            die "the Python in .venv is too old: $version. dualnn needs 3.$OLDEST_MINOR or newer." \
                "Remove the environment and run again:  rm -r '$VENV'"
        elif "$PY" -m pip --version >/dev/null 2>&1 || "$PY" -m ensurepip >/dev/null 2>&1; then
            return
        else
            die "the environment in .venv has no pip." "Remove it and run again:  rm -r '$VENV'"
        fi
    fi
    find_python
    say "Making .venv with $BASE_PYTHON ($(python_version "$BASE_PYTHON")) …"
    "$BASE_PYTHON" -m venv --clear "$VENV" || die "could not make $VENV (see above)."
}

# What an install depends on. The path is part of it: a copied folder would go on running the old one's code.
wanted_stamp() { { cat "$ROOT/pyproject.toml" && printf '%s\n' "$ROOT"; } | cksum | tr ' ' '-'; }

is_installed() { # takes base or dev; dev includes base
    local stamp kind
    [ -f "$STAMP" ] && [ -x "$PY" ] || return 1
    read -r stamp kind <"$STAMP" || return 1
    [ "$stamp" = "$(wanted_stamp)" ] && { [ "$kind" = dev ] || [ "$kind" = "$1" ]; }
}

# Says why pip failed, by what it wrote to its log; pip's own errors stand above on the screen.
explain_pip_failure() {
    local index network
    index="$("$PY" -m pip config get global.index-url 2>/dev/null || true)"
    index="$(printf '%s' "${PIP_INDEX_URL:-${index:-the default one, pypi.org}}" | sed 's#//[^/@]*@#//***@#')" # no passwords
    seen() { grep -qiE "$1" "$PIP_LOG" 2>/dev/null; }
    network='NewConnectionError|NameResolutionError|name resolution|ConnectTimeout|ReadTimeout|timed out'
    network="$network|Connection (refused|reset|broken)|unreachable|ProxyError|SSLError|IncompleteRead|incomplete-download"
    if seen 'No space left on device|Disk quota exceeded'; then
        die "the disk ran full while installing (pip's downloads go to ${TMPDIR:-/tmp})." \
            "Free some space and run $0 again: it goes on where it stopped."
    elif seen "$network" && seen 'No matching distribution|ERROR: Exception|OSError|incomplete-download'; then
        # both, for a retry that helped in the end leaves the first in the log of any other failure
        die "packages cannot be reached (index: $index)." \
            "Check the network, or pip's proxy and index settings (\`$PY -m pip config list\`), then run $0 again." \
            "Another index:  PIP_INDEX_URL=https://… $0        pip's whole log: $PIP_LOG"
    elif seen 'ResolutionImpossible|conflicting dependencies'; then
        die "the packages asked for contradict each other, or a constraint of your pip (\`$PY -m pip config list\`)." \
            "pip's explanation is above; its whole log: $PIP_LOG"
    elif seen 'No matching distribution found'; then
        die "the index ($index) lacks a package, or a version of it for Python $(python_version "$PY") (see above)." \
            "Torch may not be there yet for a very new Python:  rm -r '$VENV' && PYTHON=python3.12 $0"
    fi
    die "pip failed (see above); its whole log: $PIP_LOG" "Run $0 again: it goes on where it stopped."
}

run_pip() {
    if [ -t 1 ]; then
        "$PY" -m pip install --log "$PIP_LOG" "$@"
    else # no progress bars there, so keep to the lines that show progress
        "$PY" -m pip install --log "$PIP_LOG" "$@" |
            awk '/^ *(Collecting|Downloading|Building|Installing|Successfully)/ { print; fflush() }'
    fi
}

# A torch and a torchvision that do not belong together install without complaint and fail at import.
verify() {
    local trouble
    trouble="$("$PY" -c 'import torch, torchvision, lightning; torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)' 2>&1)" && return
    printf '%s\n' "$trouble" | tail -n 5 >&2
    case "$trouble" in
        *torchvision*)
            die "the installed torch and torchvision do not belong together:" \
                "$("$PY" -m pip list 2>/dev/null | grep -E '^torch(vision)? ' | tr -s ' ' | tr '\n' ' ')" \
                "Look for constraints (\`pip config list\`), then make the environment anew:" \
                "rm -r '$VENV' && $0"
            ;;
    esac
    die "torch, torchvision or lightning was installed, but cannot be imported (see above)." \
        "Make the environment anew:  rm -r '$VENV' && $0"
}

# ensure_env base|dev: .venv with dualnn and what it needs. Seconds once it is there.
ensure_env() {
    if is_installed "$1"; then return; fi
    local what=".[dev]" first=""
    if [ "$1" = base ]; then what="."; fi
    if ! ls -d "$VENV"/lib/python*/site-packages/torch >/dev/null 2>&1; then
        check_disk_for_torch
        first=yes
    fi
    ensure_venv
    if [ -n "$first" ]; then
        say "The first time takes minutes: on Linux, torch and CUDA are 3 GB to download and 5.5 GB on disk."
    fi
    rm -f "$STAMP" "$PIP_LOG"
    trap 'die "interrupted." "Run $0 again: it goes on where it stopped."' INT TERM
    say "Installing into .venv: pip install -e $what"
    (cd "$ROOT" && run_pip -e "$what") || explain_pip_failure
    verify
    trap - INT TERM
    printf '%s %s\n' "$(wanted_stamp)" "$1" >"$STAMP"
    say "Installed."
}

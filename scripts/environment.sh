# What quickstart and test share: a virtual environment on this machine. To be sourced; bash 3.2 and POSIX tools.

# Say what is wrong in one line, and end.
give_up() {
    echo "scripts/$(basename "$0"): $*" >&2
    exit 2
}

# Print the first Python that fits, if there is one: 3.11 to 3.14 (what the pinned wheels are for), able to make
# environments, not for another processor than the Mac's. macOS's own python3 is 3.9, Homebrew's the newest there is, and
# one that fits often lies beside it under its full name only.
find_python() {
    local machine="" name path
    if [ "$(uname -s)" = Darwin ]; then machine="$(uname -m)"; fi
    for name in python3.14 python3.13 python3.12 python3.11 python3 python; do
        path="$(command -v "$name" || true)"
        if [ -n "$path" ] && "$path" -c '
import ensurepip, platform, sys, venv
sys.exit(not (3, 11) <= sys.version_info < (3, 15) or sys.argv[1] not in ("", platform.machine()))' "$machine" >/dev/null 2>&1; then
            echo "$path"
            return
        fi
    done
}

# Make a virtual environment in a folder, unless there is one; one without pip (broken off here, or made by uv) is
# completed.
make_environment() {
    local base
    if [ "$(uname -s)/$(uname -m)" = Darwin/x86_64 ]; then
        if [ "$(sysctl -n sysctl.proc_translated 2>/dev/null || true)" = 1 ]; then
            give_up "this terminal runs under Rosetta, for which neither MLX nor PyTorch has wheels:" \
                "start it again in an arm64 one (arch -arm64 /bin/bash)"
        fi
        give_up "this is an Intel Mac, for which neither MLX nor PyTorch (from 2.3 on) has wheels. What trains nothing" \
            "works (pip install -c constraints.txt -e . and then skc info, presets, data, compare);" \
            "the rest does in Linux, in a container for one"
    fi
    if [ -x "$1/bin/python" ] && "$1/bin/python" -m pip --version >/dev/null 2>&1; then return; fi
    rm -f "$1/installed"  # what is there may be of another Python
    base="$(find_python)"
    if [ -n "$base" ]; then
        say "making a virtual environment in $1 with $base"
        "$base" -m venv "$1"
    elif command -v uv >/dev/null; then
        say "making a virtual environment in $1 with uv"
        uv venv --seed --allow-existing --python 3.12 "$1"  # --seed: with pip
    else
        give_up "needs Python 3.11 to 3.14 with venv, or uv. No python3.14 to python3.11, python3 or python here is one:" \
            "brew install python@3.12, python.org/downloads, or docs.astral.sh/uv"
    fi
}

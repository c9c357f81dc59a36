# Source this file: it makes .venv on first use and activates it.
# MILORA_NO_VENV=1 uses the environment that is active already. Safe to call again and again.
#   . scripts/setup_env.sh              what training and evaluation need
#   . scripts/setup_env.sh demo,dev     with extras of pyproject.toml, added to those that are there

milora_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

milora_find_python() {
    local candidate
    for candidate in "${MILORA_PYTHON:-}" python3 python3.13 python3.12 python3.11 python3.10 python; do
        if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 \
            && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "setup: Python 3.10 or newer is needed; install it or set MILORA_PYTHON" >&2
    return 1
}

milora_install() { # VENV EXTRAS: installs what pyproject.toml names and is not there yet
    local stamp="$1/milora_installed" wanted="$2" there="" before="" missing="" sum extra
    sum="$(cat "$milora_root/pyproject.toml" "$milora_root/scripts/setup_env.sh" | cksum)"
    if [ -f "$stamp" ]; then { read -r before && read -r there; } <"$stamp" || true; fi
    for extra in ${wanted//,/ }; do
        case ",$there," in *",$extra,"*) ;; *) missing=1 ;; esac
    done
    if [ "$before" = "$sum" ] && [ -z "$missing" ]; then return; fi
    for extra in ${there//,/ }; do # what was installed once stays, also after an upgrade
        case ",$wanted," in *",$extra,"*) ;; *) wanted="$wanted${wanted:+,}$extra" ;; esac
    done
    echo "setup: installing packages into $1 (several GB with PyTorch; once)" >&2
    # torch and torchvision first and together, so that they match
    python -m pip install --quiet torch torchvision || return 1
    python -m pip install --quiet -e "$milora_root${wanted:+[$wanted]}" || return 1
    printf '%s\n%s\n' "$sum" "$wanted" >"$stamp"
}

milora_setup() { # EXTRAS
    if [ "${MILORA_NO_VENV:-}" = 1 ]; then
        python -c 'import milora_vl, torch, transformers, peft' || {
            echo "setup: MILORA_NO_VENV=1, but the active environment lacks packages; run: pip install -e '.${1:+[$1]}'" >&2
            return 1
        }
        return
    fi
    local python
    python="$(milora_find_python)" || return 1
    if ! "$milora_root/.venv/bin/python" -c '' 2>/dev/null; then
        "$python" -m venv --clear "$milora_root/.venv" || {
            echo "setup: could not make .venv (on Debian: apt-get install python3-venv)" >&2
            return 1
        }
    fi
    # shellcheck disable=SC1091
    . "$milora_root/.venv/bin/activate"
    milora_install "$milora_root/.venv" "${1:-}"
}

milora_setup "${1:-}"

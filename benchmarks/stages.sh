# What gpu.sh and amx.sh share: stages with time limits, whose results are written as they come.

# Sets dry, out, python, log and the stages that are wanted, or ends the script. NAME is the script's.
open_run() { # NAME SECONDS [--dry-run] OUT [STAGE ...]
    script=$1
    BUDGET=$2
    shift 2
    dry=
    if [ "${1:-}" = --dry-run ]; then
        dry=yes
        shift
    fi
    if [ $# -lt 1 ]; then
        echo "usage: benchmarks/$script [--dry-run] OUT [STAGE ...]" >&2
        exit 2
    fi
    mkdir -p "$1" || exit 2
    out=$(cd "$1" && pwd)
    shift
    wanted=" $* "
    cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
    python=$(command -v "${PYTHON:-python3}") || {
        echo "$script: no ${PYTHON:-python3}" >&2
        exit 2
    }
    # Its cmake and ninja are in the same folder, also if its environment has not been activated.
    python_folder=$(cd "$(dirname "$python")" && pwd)
    python=$python_folder/$(basename "$python")
    export PATH=$python_folder:$PATH
    log=$out/${script%.sh}.log
    : >>"$log"
    : >>"$out/stages.tsv"
    failed=()
}

# Prints each file and module that a command names and that does not exist.
missing() { # COMMAND...
    local word before=
    for word in "$@"; do
        case $before in
        -m) case $word in
            benchmarks.*)
                local file=${word//.//}
                [ -f "$file.py" ] || [ -f "$file/__main__.py" ] || echo "no module $word"
                ;;
            esac ;;
        *) case $word in
            tests/*) [ -e "${word%%::*}" ] || echo "no file $word" ;;
            esac ;;
        esac
        before=$word
    done
}

# Whether a stage is to run.
is_wanted() { # NAME
    [ "$wanted" = "  " ] || [[ $wanted == *" $1 "* ]]
}

record() { # NAME STATUS SECONDS
    printf '%s\t%s\t%s\n' "$@" >>"$out/stages.tsv"
    case $2 in passed | printed | "not run"*) ;; *) failed+=("$1") ;; esac
}

stage() { # NAME SECONDS COMMAND...
    is_wanted "$1" || return
    local name=$1 limit=$2 start=$SECONDS left=$((BUDGET - SECONDS)) status first
    shift 2
    if [ -z "$dry" ] && [ "$left" -lt 5 ]; then
        echo "$name: not run, no time left"
        record "$name" "no time left" 0
        return
    fi
    [ "$limit" -le "$left" ] || limit=$left
    [ -z "$dry" ] || limit=300
    echo "=== $name: $*" >>"$log"
    first=$(wc -l <"$log")
    missing "$@" >>"$log"
    if [ "$(wc -l <"$log")" -ne "$first" ]; then
        status=127
    else
        timeout --kill-after=5 "$limit" "$@" >>"$log" 2>&1
        status=$?
    fi
    if [ $status -eq 0 ]; then
        echo "$name: passed in $((SECONDS - start)) s"
        record "$name" passed $((SECONDS - start))
        return
    fi
    [ $status -ne 124 ] || echo "stopped after $limit s" >>"$log"
    echo "$name: FAILED ($status) after $((SECONDS - start)) s; the end of its output:"
    tail -n +"$((first + 1))" "$log" | tail -n 25
    record "$name" "failed ($status)" $((SECONDS - start))
}

# A stage that has no form without the device.
device_stage() { # NAME SECONDS COMMAND...
    is_wanted "$1" || return
    if [ -z "$dry" ]; then
        stage "$@"
        return
    fi
    local name=$1 wrong
    shift 2
    wrong=$(missing "$@")
    echo "$name: would run $*"
    if [ -n "$wrong" ]; then
        echo "$name: FAILED: $wrong"
        record "$name" "failed (127)" 0
    else
        record "$name" printed 0
    fi
}

# Says how it ended, and sets the exit status.
close_run() {
    if [ ${#failed[@]} -ne 0 ]; then
        echo "$script: FAILED after $SECONDS s: ${failed[*]}; see $log"
        exit 1
    fi
    echo "$script: all stages passed in $SECONDS s"
}

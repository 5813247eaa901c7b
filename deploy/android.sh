#!/system/bin/sh
# Runs LiteRT's benchmark_model over many models in one go, on an Android phone. hwnas pushes this file into a folder RUN of
# its own beside `models` and the programs, and calls it (hwnas/devices/adb.py):
#
#     sh RUN/android.sh measure MASK PROCESSES PROGRAM FLAGS...   each model of RUN/batch in so many processes
#     sh RUN/android.sh predict MODEL BYTES PROGRAM FLAGS...      the model on each input of RUN/inputs, BYTES long each
#
# RUN/batch holds lines "NUMBER MODEL". Lines of our own begin with RUN's name, which no program knows:
#
#     RUN waiting                        another run is at work on this phone; this one waits for it
#     RUN begin NUMBER                   what the program prints follows
#     RUN end NUMBER STATUS BYTES        its exit status, and (predict) the size of its output
#     RUN failed REASON                  it cannot go on
#     RUN damaged FILE                   nor with a file that arrived with another content than its name says
#     RUN done                           the whole batch is through
#
# For Android's own shell and tools (mksh, toybox), and for any POSIX shell.

cd "${0%/*}" || exit 1
run=${PWD##*/}
cd .. || exit 1
umask 077 # nobody else reads or replaces what is measured

say() {
    printf '\n%s %s\n' "$run" "$*" # on a line of its own, whatever the program left unfinished
}

fail() {
    release
    say failed "$@"
    exit 1
}

# One run at a time, or they would spoil each other's times. The lock is a link to its owner's process id.
wait_for_turn() {
    lock=$PWD/lock tries=0
    until ln -s $$ "$lock" 2> /dev/null; do
        if tr '\0' ' ' 2> /dev/null < "/proc/$(readlink "$lock")/cmdline" | grep -q android.sh; then
            say waiting
            sleep 1
        else
            rm -f "$lock" # its owner is dead
            tries=$((tries + 1))
            [ "$tries" -lt 10 ] || fail "$PWD takes no files"
        fi
    done
    held=yes
    trap release EXIT
    trap 'exit 1' HUP INT TERM PIPE
}

# Before the last line is said, for then the caller takes it that nothing of this run is left on the phone.
release() {
    [ "$held" = yes ] || return 0
    held=no
    rm -f "$lock"
}

# What was pushed goes to its place in one step, so that nobody sees half of a file.
place() {
    mkdir -p models
    for file in "$run"/*.tflite; do [ -f "$file" ] && check "$file" && mv "$file" models/; done
    for file in "$run"/benchmark_model-*; do
        [ -f "$file" ] && check "$file" && chmod 700 "$file" && mv "$file" .
    done
}

# A file is named by its sha256, or the beginning of it: SHA256.tflite, benchmark_model-SHA.
check() {
    found=$(sha256sum < "$1" 2> /dev/null) || return 0 # old phones do not have it
    wanted=${1##*/}
    wanted=${wanted%.tflite}
    wanted=${wanted#benchmark_model-}
    case $found in
        "$wanted"*) return 0 ;;
    esac
    release
    say damaged "${1##*/}"
    exit 1
}

measure() {
    mask=$1 processes=$2 program=$3
    shift 3
    [ "$mask" = all ] && program=./$program || program="taskset $mask ./$program"
    while read -r number model; do
        process=0 status=0
        while [ "$process" -lt "$processes" ] && [ "$status" -eq 0 ]; do
            process=$((process + 1))
            say begin "$number"
            # shellcheck disable=SC2086
            $program "--graph=models/$model" "$@" < /dev/null 2>&1
            status=$?
            say end "$number" "$status" 0
        done
    done < "$run/batch"
}

predict() {
    model=$1 bytes=$2 program=$3
    shift 3
    cd "$run" || exit 1
    size=$(wc -c < inputs)
    number=0 status=0
    : > outputs
    while [ $((number * bytes)) -lt "$size" ] && [ "$status" -eq 0 ]; do
        say begin "$number"
        rm -f output
        dd if=inputs of=input bs="$bytes" skip="$number" count=1 2> /dev/null || fail "$PWD takes no more files"
        "../$program" "--graph=../models/$model" "$@" < /dev/null 2>&1
        status=$?
        [ -f output ] || : > output
        cat output >> outputs || fail "$PWD takes no more files"
        say end "$number" "$status" "$(wc -c < output)"
        number=$((number + 1))
    done
    cd ..
}

verb=$1 held=no
shift
wait_for_turn
place
case $verb in
    measure | predict) "$verb" "$@" ;;
    *) exit 2 ;;
esac
release
say "done"

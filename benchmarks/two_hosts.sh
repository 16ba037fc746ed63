#!/usr/bin/env bash
# Two hosts, one of which is cut off in the middle: two network namespaces, a torchrun in each, one run directory.
#
#   sudo benchmarks/two_hosts.sh WHAT [SECONDS] [-- flags of fastppo.train]
#
# WHAT is "cut" (the second host's network goes down for SECONDS, 90) or "kill" (its torchrun and its process are killed).
# Each host gives its command again when torchrun has failed, as a batch system would, and both go on from the last checkpoint.
# Prints what each host says, but for progress and torchrun's backtraces, and the seconds since the start. Needs root, for
# `ip netns`; what it makes it removes. It shows what happens, and measures nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
what=${1:-cut} away=90
shift || true
if [[ ${1:-} =~ ^[0-9]+$ ]]; then away=$1 && shift; fi
[[ ${1:-} == -- ]] && shift
python=${PYTHON:-.venv/bin/python}
work=$(mktemp -d)
first=fastppo-$$-1 second=fastppo-$$-2

clean() {
    jobs -p | xargs -r kill 2>/dev/null || true
    for host in "$first" "$second"; do
        ip netns pids "$host" 2>/dev/null | xargs -r kill -9 2>/dev/null || true
        ip netns del "$host" 2>/dev/null || true
    done
    rm -rf "$work"
}
trap clean EXIT

# --- two hosts and a cable
ip netns add "$first"
ip netns add "$second"
ip link add veth0 netns "$first" type veth peer name veth0 netns "$second"
ip -n "$first" addr add 10.77.0.1/24 dev veth0
ip -n "$second" addr add 10.77.0.2/24 dev veth0
for host in "$first" "$second"; do
    ip -n "$host" link set lo up
    ip -n "$host" link set veth0 up
done

started=$SECONDS
say() { printf '%4d s  %-8s%s\n' $((SECONDS - started)) "$1" "$2"; }
host() { # NAME LABEL ADDRESS FLAGS...: its torchrun, again and again until it ends well
    local name=$1 label=$2 address=$3 code
    shift 3
    for _ in 1 2 3 4 5 6; do
        code=0
        torchrun_of "$@" >> "$work/$label" 2>&1 || code=$?
        echo "torchrun ended with exit code $code" >> "$work/$label"
        [[ $code == 0 ]] && return
        sleep 5
        echo "the same command is given again" >> "$work/$label"
    done
}
torchrun_of() { # FLAGS..., and what host knows
    GLOO_SOCKET_IFNAME=veth0 OMP_NUM_THREADS=1 ip netns exec "$name" "$python" -m torch.distributed.run \
        --nnodes 2 --nproc-per-node 1 --max-restarts 3 --rdzv-id two-hosts --rdzv-backend c10d \
        --rdzv-endpoint 10.77.0.1:29400 --rdzv-conf "is_host=$([[ $label == first ]] && echo 1 || echo 0)" --local-addr $address \
        -m fastppo.train --run-dir "$work/run" "$@"
}
follow() { # LABEL: its lines as they come, without progress and the backtraces of torchrun
    touch "$work/$1"
    tail -n +1 -F "$work/$1" 2>/dev/null | grep --line-buffered -vE '^(frame #|Exception raised|  |<omitting|\[[WE]|Traceback|The above|$)|% it ' |
        while IFS= read -r line; do say "$1" "$line"; done
}
iteration() { tail -n 1 "$work/run/metrics.csv" 2>/dev/null | cut -d, -f1; }
until_iteration() {
    for _ in $(seq 600); do
        [[ $(iteration) =~ ^[0-9]+$ && $(iteration) -ge $1 ]] && return
        sleep 0.5
    done
    say here "iteration $1 did not come" && exit 1
}

flags=(--env-id CartPole-v1 --backend torch --num-envs 16 --num-steps 64 --num-iterations 200 --checkpoint-iterations 5
    --compile off --plain --eval-episodes 0 "$@")
follow first & follow second &
host "$first" first 10.77.0.1 "${flags[@]}" & one=$!
host "$second" second 10.77.0.2 "${flags[@]}" & two=$!
until_iteration 20

if [[ $what == cut ]]; then
    say here "iteration $(iteration): the second host is cut off"
    ip -n "$second" link set veth0 down
    sleep "$away"
    ip -n "$second" link set veth0 up
    say here "the second host's network is back"
else
    say here "iteration $(iteration): everything on the second host is killed"
    ip netns pids "$second" | xargs kill -9
fi
wait $one $two
sleep 1
say here "iteration $(iteration) is the last one"

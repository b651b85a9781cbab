#!/usr/bin/env bash
# Check that two hosts without a shared disk train the same weights as one host with two processes. Check a new run, and
# a resumed run with its checkpoint on the first host alone.
#
#     sudo examples/two_hosts.sh        exit status 0: equal to the bit; 1: different; 77: no right to make the hosts
#
# The hosts are network namespaces of this machine, joined by a veth pair. A mount gives each host its own disk.
set -uo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
PATH=$root/.venv/bin:$PATH
hosts=("kdlite-$$-1" "kdlite-$$-2")
addresses=(10.77.0.1 10.77.0.2)
work=$(mktemp -d)
mkdir "$work/disk1" "$work/disk2" "$work/run"
export OMP_NUM_THREADS=1
flags=(--model "$root/tests/own_models.py:tiny" --img-size 16 --self-kd uskd --device cpu --reference 0)

# shellcheck disable=SC2329  # the trap calls it
clean_up() {
    mapfile -t running < <(jobs -p)
    if ((${#running[@]})); then
        kill "${running[@]}" 2>/dev/null
        wait
    fi
    for host in "${hosts[@]}"; do
        ip netns del "$host" 2>/dev/null
    done
    rm -rf "$work"
}
trap clean_up EXIT
trap 'exit 1' INT TERM HUP

make_hosts() {
    command -v ip >/dev/null || { echo "no ip command (iproute2)"; return 1; }
    ip netns add "${hosts[0]}" && ip netns add "${hosts[1]}" &&
        ip link add eth0 netns "${hosts[0]}" type veth peer name eth0 netns "${hosts[1]}" || return 1
    for i in 0 1; do
        ip -n "${hosts[i]}" addr add "${addresses[i]}/24" dev eth0 && ip -n "${hosts[i]}" link set eth0 up &&
            ip -n "${hosts[i]}" link set lo up && ip netns exec "${hosts[i]}" mount --bind "$work/disk1" "$work/run" ||
            return 1
    done
}

# on_host 0|1 FLAGS...: run one process of two; $work/run is the host's own disk. It needs is_host, because torchrun
# would find the host of the rendezvous by its name, but both namespaces have the name of this machine.
on_host() {
    # shellcheck disable=SC2016  # the inner shell expands them
    GLOO_SOCKET_IFNAME=eth0 exec ip netns exec "${hosts[$1]}" bash -c 'mount --bind "$0" "$1" && exec "${@:2}"' \
        "$work/disk$(($1 + 1))" "$work/run" timeout 120 torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d \
        --rdzv-endpoint "${addresses[0]}:29500" --rdzv-conf "is_host=$((1 - $1))" --rdzv-id two-hosts \
        --local-addr "${addresses[$1]}" "$root/train.py" "${flags[@]}" --output "$work/run" "${@:2}"
}

on_two_hosts() {
    on_host 0 "$@" &>"$work/host1.log" &
    local first=$! status=0
    on_host 1 "$@" &>"$work/host2.log" &
    wait $! || status=1
    wait "$first" || status=1
    ((status == 0)) || fail "$work/host1.log" "$work/host2.log"
    [ ! -e "$work/disk2/last.pt" ] || { echo "the second host has written a checkpoint"; exit 1; }
}

on_one_host() {
    timeout 120 torchrun --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0 --local-addr 127.0.0.1 \
        "$root/train.py" "${flags[@]}" --output "$work/one" "$@" &>"$work/one.log" &
    wait $! || fail "$work/one.log"
}

fail() {
    tail -n 20 "$@"
    echo "a run failed"
    exit 1
}

compare() {
    if cmp "$work/disk1/student/model.safetensors" "$work/one/student/model.safetensors"; then
        echo "$1: equal"
    else
        echo "$1: different"
        different=1
    fi
}

reason=$(make_hosts 2>&1) || { echo "cannot make the two hosts: ${reason//$'\n'/; }"; exit 77; }
different=0

on_two_hosts --epochs 2
on_one_host --epochs 2
compare "two hosts and one, 2 epochs"

on_two_hosts --epochs 3 --resume
grep -q 'resuming from .*, after epoch 2' "$work/host1.log" || fail "$work/host1.log"
on_one_host --epochs 3 --resume
compare "two hosts and one, resumed for a third epoch with the checkpoint on the first host alone"
exit "$different"

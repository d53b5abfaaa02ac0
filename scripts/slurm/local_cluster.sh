#!/usr/bin/env bash
# A SLURM of this one machine, to try jobs on: two nodes without GPUs, which run at least two tasks each. As root on Debian.
#   bash scripts/slurm/local_cluster.sh           installs slurm-wlm and munge where they are missing, then starts them
#   bash scripts/slurm/local_cluster.sh down      ends it, and all of its jobs
#   bash scripts/slurm/local_cluster.sh install   only installs
# A second word names the folder of its configuration, logs and state (default: /tmp/lightning_mask-slurm). sbatch and srun find it
# by SLURM_CONF, or by /etc/slurm/slurm.conf, which becomes a link to it where there is no such file.
# Partitions: main, and urgent, whose jobs take the place of those in main.
set -euo pipefail
FOLDER="${2:-${TMPDIR:-/tmp}/lightning_mask-slurm}"
export SLURM_CONF="$FOLDER/slurm.conf"
LINK=/etc/slurm/slurm.conf
NODES="127.0.0.1 127.0.0.2" # names that are addresses of this machine: nothing has to resolve them

fail() {
    echo "local_cluster.sh: $1" >&2
    exit 1
}

install() {
    if command -v slurmctld slurmd munged sbatch >/dev/null; then
        return
    fi
    command -v apt-get >/dev/null || fail "SLURM is not installed, and there is no apt-get to install it with"
    echo "installing slurm-wlm and munge"
    local log
    log="$(mktemp)"
    {
        apt-get update -q
        DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends slurm-wlm munge
    } >"$log" 2>&1 || {
        tail -n 15 "$log" >&2
        fail "the installation failed; the whole log is in $log"
    }
}

runs() { [ -s "$FOLDER/run/$1.pid" ] && kill -0 "$(cat "$FOLDER/run/$1.pid")" 2>/dev/null; }

free_ports() {
    python3 - "$1" <<'PYTHON'
import random, socket, sys
ports = []
for port in random.sample(range(20000, 32000), 12000):  # below those that the kernel gives to others meanwhile
    with socket.socket() as each:
        try:
            each.bind(("127.0.0.1", port))
        except OSError:
            continue
    ports.append(port)
    if len(ports) == int(sys.argv[1]):
        break
print(*ports)
PYTHON
}

configure() {
    local host cpus memory controller first second send_signal=SlurmctldParameters=preempt_send_user_signal
    host="$(hostname -s)"
    cpus="$(nproc)"
    memory="$(($(sed -n 's/^MemTotal: *\([0-9]*\) kB/\1/p' /proc/meminfo) / 1024))"
    case "$(slurmctld -V)" in "slurm 2"[3-9]*) send_signal=PreemptParameters=send_user_signal ;; esac
    read -r controller first second <<<"$(free_ports 3)"
    mkdir -p "$FOLDER"/{state,spool,log,run}
    chmod 755 "$FOLDER" "$FOLDER/run"
    [ -s "$FOLDER/munge.key" ] || (umask 077 && head -c 128 /dev/urandom >"$FOLDER/munge.key")
    cat >"$SLURM_CONF" <<CONF
ClusterName=lightning_mask
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$controller
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$FOLDER/run/munge.socket
CommunicationParameters=NoInAddrAny
StateSaveLocation=$FOLDER/state
SlurmdSpoolDir=$FOLDER/spool/%n
SlurmctldPidFile=$FOLDER/run/slurmctld.pid
SlurmdPidFile=$FOLDER/run/slurmd-%n.pid
SlurmctldLogFile=$FOLDER/log/slurmctld.log
SlurmdLogFile=$FOLDER/log/slurmd-%n.log
# neither cgroups nor accounting
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# a job that has to make place gets the signal that it asked for with --signal
$send_signal
JobRequeue=1
KillWait=10
MinJobAge=300
NodeName=DEFAULT CPUs=$((cpus < 2 ? 2 : cpus)) RealMemory=$memory State=UNKNOWN
NodeName=127.0.0.1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$first
NodeName=127.0.0.2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$second
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
CONF
}

start() {
    munged --force --key-file="$FOLDER/munge.key" --socket="$FOLDER/run/munge.socket" --pid-file="$FOLDER/run/munged.pid" \
        --log-file="$FOLDER/log/munged.log" --seed-file="$FOLDER/run/munged.seed" --num-threads=2
    slurmctld -c -f "$SLURM_CONF"
    local node
    for node in $NODES; do
        slurmd -N "$node" -f "$SLURM_CONF"
    done
    for _ in $(seq 300); do
        [ "$(sinfo -h -N -p main -t idle -o %N 2>/dev/null | sort -u | wc -l)" = 2 ] && return
        sleep 0.2
    done
    tail -n 5 "$FOLDER"/log/*.log >&2
    fail "the nodes do not come up; the logs are in $FOLDER/log"
}

up() {
    [ "$(id -u)" = 0 ] || fail "only root can start it"
    install
    ! runs slurmctld || fail "one runs already in $FOLDER: bash scripts/slurm/local_cluster.sh down"
    trap down EXIT # what came up goes down again where the rest fails
    configure
    start
    trap - EXIT
    if [ ! -e "$LINK" ] && [ ! -L "$LINK" ]; then
        mkdir -p "$(dirname "$LINK")"
        ln -s "$SLURM_CONF" "$LINK"
    fi
    sinfo
    [ "$LINK" -ef "$SLURM_CONF" ] || echo "export SLURM_CONF=$SLURM_CONF"
}

down() {
    if runs slurmctld; then
        scancel --user=root 2>/dev/null || true
        for _ in $(seq 50); do
            [ -n "$(squeue -h 2>/dev/null)" ] || break
            sleep 0.2
        done
    fi
    local name pid
    for name in slurmd-127.0.0.1 slurmd-127.0.0.2 slurmctld munged; do
        runs "$name" || continue
        pid="$(cat "$FOLDER/run/$name.pid")"
        kill "$pid"
        for _ in $(seq 600); do
            kill -0 "$pid" 2>/dev/null || break
            sleep 0.1
        done
    done
    [ "$(readlink "$LINK" 2>/dev/null)" != "$SLURM_CONF" ] || rm "$LINK"
}

case "${1:-up}" in
    up | down | install) "${1:-up}" ;;
    *) fail "up, down or install, not $1" ;;
esac

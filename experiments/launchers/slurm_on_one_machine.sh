#!/usr/bin/env bash
# A Slurm cluster of one node on this machine, for trying hydra/launcher=slurm without a cluster. Debian or Ubuntu, as root:
#   apt-get install -y --no-install-recommends slurm-wlm munge
#   experiments/launchers/slurm_on_one_machine.sh start [CORES]     # declares CORES cores (default: the machine's)
#   experiments/launchers/slurm_on_one_machine.sh stop
# Everything it writes lies in /tmp/int8run-slurm. No cgroups, no accounting: sacct does not answer, as on many small clusters.
set -euo pipefail
here=/tmp/int8run-slurm
export SLURM_CONF=$here/slurm.conf

start() {
    local cores=${1:-$(nproc)} host memory
    host=$(hostname -s)
    memory=$(awk '/MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)
    mkdir -p $here/state $here/spool $here/munge
    chmod 711 $here $here/munge
    [ -f $here/munge/key ] || (umask 077 && head -c 1024 /dev/urandom > $here/munge/key)
    munged --force --key-file=$here/munge/key --socket=$here/munge/socket --pid-file=$here/munge/pid \
        --log-file=$here/munge/log --seed-file=$here/munge/seed
    cat > $SLURM_CONF <<CONF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket=$here/munge/socket
CryptoType=crypto/munge
SlurmUser=root
SlurmdUser=root
SlurmctldPort=16817
SlurmdPort=16818
StateSaveLocation=$here/state
SlurmdSpoolDir=$here/spool
SlurmctldPidFile=$here/slurmctld.pid
SlurmdPidFile=$here/slurmd.pid
SlurmctldLogFile=$here/slurmctld.log
SlurmdLogFile=$here/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerNode=1024
SchedulerParameters=sched_interval=2
ReturnToService=2
KillWait=5
SlurmdParameters=config_overrides
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cores RealMemory=$memory State=UNKNOWN
PartitionName=all Nodes=$host Default=YES MaxTime=60 State=UP
CONF
    slurmctld
    slurmd
    for _ in $(seq 20); do
        sinfo --noheader --format=%T 2>/dev/null | grep -q idle && break
        sleep 1
    done
    sinfo
    echo "now: export SLURM_CONF=$SLURM_CONF"
}

stop() {
    for name in slurmd.pid slurmctld.pid munge/pid; do
        [ -f $here/$name ] && kill "$(cat $here/$name)" || true
    done
}

"$@"

#!/usr/bin/env bash
# A real SLURM on this one machine, to try job scripts on: munged, slurmctld and slurmd, with all their files in one folder.
#
#   bash tools/local_slurm.sh start [FOLDER]    prints the line that makes sbatch, squeue, ... talk to it
#   bash tools/local_slurm.sh stop [FOLDER]     ends it and its jobs; FOLDER stays, with the logs
#   bash tools/local_slurm.sh status [FOLDER]
#
# FOLDER: default /tmp/scalemoe-slurm-<user>. It needs Debian's or Ubuntu's packages and installs nothing itself:
#   sudo apt-get install slurm-wlm munge
#
# Partitions: normal (the default), whose jobs are requeued when one of partition urgent needs their place: they get SIGTERM and, where the
# job asked for one, its --signal, and GRACE_S seconds (default 20). SLOTS cores are pretended (default 4), so that jobs can wait for each other.
# As root or as an ordinary user; jobs run as the same user.
set -euo pipefail

say() { echo "$@" >&2; }

die() {
    say "error: $1"
    shift
    (($# == 0)) || printf '  %s\n' "$@" >&2
    exit 1
}

USER_NAME="$(id -un)"
COMMAND="${1:-}"
FOLDER="${2:-/tmp/scalemoe-slurm-$USER_NAME}"
GRACE_S="${GRACE_S:-20}"
SLOTS="${SLOTS:-4}"
# Daemons are in places that an ordinary user's PATH leaves out.
PATH="$PATH:/usr/sbin:/sbin"
# A socket's path must be short, and SLURM splits its settings at blanks and commas.
[[ "$FOLDER" =~ ^/[A-Za-z0-9._/-]{1,80}$ ]] || die "FOLDER must be an absolute path of at most 80 plain characters" "found: $FOLDER"

check_programs() {
    local missing=() program
    for program in munged slurmctld slurmd sbatch scontrol; do
        command -v "$program" >/dev/null || missing+=("$program")
    done
    ((${#missing[@]} == 0)) || die "not installed: ${missing[*]}" "try:   sudo apt-get install slurm-wlm munge"
}

# free_port: a TCP port that nobody listens on now.
free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

write_config() {
    local host memory_MB
    host="$(hostname -s)"
    memory_MB="$(awk '/^MemTotal/ { print int($2 / 1024) }' /proc/meminfo)"
    cat >"$FOLDER/slurm.conf" <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmUser=$USER_NAME
SlurmdUser=$USER_NAME
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
AuthType=auth/munge
# A requeued job waits until its old credential is no longer good: 121 s by default.
AuthInfo=socket=$FOLDER/munge.socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation=$FOLDER/state
SlurmdSpoolDir=$FOLDER/spool
SlurmctldPidFile=$FOLDER/slurmctld.pid
SlurmdPidFile=$FOLDER/slurmd.pid
SlurmctldLogFile=$FOLDER/slurmctld.log
SlurmdLogFile=$FOLDER/slurmd.log
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
ReturnToService=2
MessageTimeout=30
KillWait=15
NodeName=$host NodeAddr=127.0.0.1 CPUs=$SLOTS RealMemory=$memory_MB State=UNKNOWN
PartitionName=normal Nodes=$host Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=$GRACE_S
PartitionName=urgent Nodes=$host MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
    # Nothing here uses cgroups, but slurmd loads a plugin for them; before 23.02 none cannot be chosen.
    local version
    version="$(slurmctld -V | cut -d' ' -f2)"
    if ((${version%%.*} < 23)); then
        echo "CgroupPlugin=cgroup/v1" >"$FOLDER/cgroup.conf"
    else
        echo "CgroupPlugin=disabled" >"$FOLDER/cgroup.conf"
    fi
}

# wait_until SECONDS WHAT COMMAND ...: tries the command until it succeeds.
wait_until() {
    local deadline=$((SECONDS + $1)) what="$2"
    shift 2
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < deadline)) || {
            tail -n 5 "$FOLDER"/*.{log,err} >&2
            die "$what" "found: the logs above, from $FOLDER"
        }
        sleep 0.2
    done
}

# Daemons go to the background by themselves, after they read their settings.
run_daemon() { "$@" 2>>"$FOLDER/$1.err" || die "$1 did not start" "found: $(tail -n 3 "$FOLDER/$1.err")"; }

node_is_idle() { [[ "$(SLURM_CONF="$FOLDER/slurm.conf" sinfo --noheader --partition normal --format %T)" == idle ]]; }

start() {
    check_programs
    [[ ! -e "$FOLDER/slurm.conf" ]] || ! is_running || die "a SLURM is running in $FOLDER" "try:   bash tools/local_slurm.sh stop $FOLDER"
    mkdir -p "$FOLDER/state" "$FOLDER/spool"
    # munged wants its socket reachable by all, and its key by nobody else.
    chmod 755 "$FOLDER"
    write_config
    (umask 077 && head -c 1024 /dev/urandom >"$FOLDER/munge.key")
    rm -f "$FOLDER"/*.{log,err}
    run_daemon munged --force --socket="$FOLDER/munge.socket" --key-file="$FOLDER/munge.key" --pid-file="$FOLDER/munged.pid" \
        --log-file="$FOLDER/munged.log" --seed-file="$FOLDER/munge.seed"
    wait_until 10 "munged did not start" test -S "$FOLDER/munge.socket"
    run_daemon slurmctld -c -f "$FOLDER/slurm.conf"
    wait_until 20 "slurmctld did not start" env "SLURM_CONF=$FOLDER/slurm.conf" scontrol ping
    run_daemon slurmd -f "$FOLDER/slurm.conf"
    wait_until 30 "slurmd did not register" node_is_idle
    say "SLURM $(slurmctld -V | cut -d' ' -f2) runs in $FOLDER. To use it in this shell:"
    echo "export SLURM_CONF=$FOLDER/slurm.conf"
}

pid_of() { [[ -s "$FOLDER/$1.pid" ]] && cat "$FOLDER/$1.pid"; }

# The daemon named $1 that $FOLDER's pid file means, and not a later process with the same number.
is_alive() {
    local pid
    pid="$(pid_of "$1")" && [[ "$(cat "/proc/$pid/comm" 2>/dev/null)" == "$1" ]]
}

is_running() { is_alive munged || is_alive slurmctld || is_alive slurmd; }

stop() {
    local daemon
    if is_alive slurmctld && is_alive munged; then
        SLURM_CONF="$FOLDER/slurm.conf" timeout 10 scancel --full --signal=KILL --user "$USER_NAME" 2>/dev/null || true
        SLURM_CONF="$FOLDER/slurm.conf" timeout 10 scancel --user "$USER_NAME" 2>/dev/null || true
        wait_until 60 "jobs did not end" has_no_jobs
    fi
    for daemon in slurmd slurmctld munged; do
        if is_alive "$daemon"; then
            kill "$(pid_of "$daemon")"
            wait_until 30 "$daemon did not end" is_dead "$daemon"
        fi
    done
}

is_dead() { ! is_alive "$1"; }

has_no_jobs() { [[ -z "$(SLURM_CONF="$FOLDER/slurm.conf" squeue --noheader)" ]]; }

case "$COMMAND" in
    start) start ;;
    stop) stop ;;
    status) if is_running; then echo "running: export SLURM_CONF=$FOLDER/slurm.conf"; else echo "not running"; fi ;;
    -h | --help) sed -n '2,/^[^#]/ { s/^# \{0,1\}//p }' "$0" ;;
    *) die "start, stop or status?" "found: '$COMMAND'" "try:   bash tools/local_slurm.sh --help" ;;
esac

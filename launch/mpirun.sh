#!/bin/bash
# Trains on 2 hosts with 4 ranks each, started by Open MPI:
#     bash mpirun.sh
# Name the hosts by --host a:4,b:4 or --hostfile FILE, unless a scheduler does.
# Ranks find each other by MPI (mpi4py), or through MASTER_ADDR where that is set. With --transport mpi compressed bytes
# travel by MPI, too. The folder lies on a file system that all hosts share.
set -euo pipefail

# Ranks leave their exit codes in this folder, which all hosts see: where a link is dead, mpirun itself may wait for a
# quarter of an hour for its daemon on the other side, and where a daemon was killed, it may end with 0.
EDL_ENDS=$(mktemp -d "$PWD/.edl-ends-XXXXXX")
export EDL_ENDS
trap 'rm -rf "$EDL_ENDS"' EXIT
patience=30 # seconds that mpirun has to end after the first rank, and ranks after mpirun
late=60 # seconds until NFS shows a file of another host for certain (acdirmax)
silent=1 # what it means if no rank leaves a code: an error, as one that ends well leaves 0

# Open MPI 4 and 5: mpirun and an idle daemon notice after 120 to 130 s that the link between them is dead.
for setting in time=10 intvl=10 probes=12; do
    for name in OMPI PRTE; do
        name="${name}_MCA_oob_tcp_keepalive_${setting%=*}"
        [[ -v $name ]] || export "$name=${setting#*=}"
    done
done

look() { # told: the most telling of the codes that ranks have left; what only follows from another's end comes last
    local end file
    told=''
    for end in 0 129 130 143 138 6; do [[ ! -e $EDL_ENDS/$end ]] || told=$end; done
    for file in "$EDL_ENDS"/*; do
        end=${file##*/}
        case $end in
            0 | 129 | 130 | 143 | 138 | 6) ;;
            [1-9] | [1-9][0-9] | 1[0-9][0-9] | 2[0-4][0-9] | 25[0-5]) told=$end ;;
        esac
    done
    for end in 10 2 3 4 7 8; do [[ ! -e $EDL_ENDS/$end ]] || told=$end; done
}
ended() { [[ -n $asked ]] || [[ -n $told && $told$silent != 00 ]]; } # by a signal, or by a rank
well() { [[ $code == 0 && ${told:-$silent} == 0 ]]; }

left() { # process numbers of what is left of the job on this host
    local file
    { env -u EDL_ENDS grep -lszxF "EDL_ENDS=$EDL_ENDS" /proc/[0-9]*/environ || true; } | while read -r file; do
        file=${file%/environ}
        [[ ! $file/ns/net -ef /proc/$$/ns/net ]] || echo "${file##*/}"
    done
}

exec 9<> <(:) # nothing ever comes out of it: a pause that a signal interrupts
pause() { read -rt "$1" -u 9 || true; }
forward() { [[ -z $mpirun ]] || kill -"$1" "$mpirun" 2>/dev/null || true; }

mpirun='' code='' told='' asked='' since='' forced=''
trap 'forward USR1' USR1
trap 'asked=143; forward TERM' TERM
trap 'asked=130; forward INT' INT
trap 'asked=129; forward HUP' HUP

# In a session of its own, a terminal's or a group's signal reaches mpirun once, from here. It ends with this script.
alone=(setsid setpriv --pdeathsig TERM)
"${alone[@]}" true 2>/dev/null || alone=(setsid) # util-linux before 2.33

"${alone[@]}" mpirun -n 8 --map-by ppr:4:node -x EDL_ENDS \
    python -m efficient_dl.cli train --model gpt-micro --data stdlib --bits 2.0 --steps 500 <&0 9<&- &
mpirun=$!

looks=0
while kill -0 "$mpirun" 2>/dev/null; do
    pause "$((looks++ < 50 ? 0 : 1)).1" # often at first: a wrong word ends it at once
    look
    [[ -n $since ]] || ! ended || since=$SECONDS
    if [[ -n $since && -z $forced ]] && ((SECONDS - since >= patience)); then
        echo "mpirun is ended: $patience s after a rank or a signal has ended the job it still runs" >&2
        forced=$SECONDS
        forward TERM
    elif [[ -n $forced ]] && ((SECONDS - forced >= 5)); then
        forward KILL
    fi
done
wait "$mpirun" && code=0 || code=$?
mpirun=''
[[ $code != 0 || -z $forced ]] || code=1

# After an error, what mpirun has left behind here gets time to end by itself, perhaps with a checkpoint.
look
waited=0
while ! well; do
    [[ -n $(left) ]] && ((waited < patience)) || { [[ $code == 0 && -z $told ]] && ((waited < late)); } || break
    pause 1
    look
    ((++waited))
done
! well || exit 0
left | while read -r process; do kill -KILL "$process" 2>/dev/null || true; done

if [[ -n $told && $told != 0 ]] && [[ $told != 143 || $code == 0 ]]; then
    echo "mpirun ended with $code, a rank with $told" >&2
    exit "$told"
fi
if [[ $code == 0 ]]; then
    echo "mpirun ended with 0, but no rank has said in $EDL_ENDS that it has ended well: the job is not done" >&2
    exit 1
fi
exit "${asked:-$code}"

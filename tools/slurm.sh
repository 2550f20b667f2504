#!/bin/sh
# Runs a training command under Slurm and gives the job back to the queue when it was preempted.
#
#   sbatch --signal=B:USR1@120 --requeue tools/slurm.sh fastclr train --data.train ... --run-dir ...
#
# Slurm signals this shell 120 s before the time is over, and at a preemption; it passes that on.
# fastclr finishes the step, saves and exits with 75. Only then is the job given back, once, and
# goes on where it stopped.

"$@" &
training=$!
for name in TERM USR1 USR2; do
    trap "kill -$name $training 2>/dev/null" $name
done
wait $training
code=$?
while [ $code -gt 128 ] && kill -0 $training 2>/dev/null; do # a signal ended the wait alone
    wait $training
    code=$?
done
trap '' TERM USR1 USR2
if [ $code -eq 75 ]; then
    if [ -n "$SLURM_ARRAY_JOB_ID" ]; then
        scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    else
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit $code

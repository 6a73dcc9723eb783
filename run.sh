#!/usr/bin/env bash
# Set up, prepare the corpus, train: one command.
#   ./run.sh                                   the main job: LJSpeech on 2 GPUs
#   ./run.sh --gpus 1 --batch_size 32          any config field is a flag
#   BATCH_SIZE=64 NUM_GPUS=2 ./run.sh
#   ./run.sh --source /data/LJSpeech-1.1       use your copy of LJSpeech instead of a download
#   ./run.sh --init_from voices/joe --source my_recordings   your voice from minutes of speech: configs/finetune.yaml
#   ./run.sh --config configs/demo.yaml        the same job on a natural voice that a program reads: two CPU cores
#   ./run.sh --config configs/ljspeech.yaml,configs/bigvgan24k.yaml --source DIR    your recordings at 24 kHz
#   ./run.sh --gpus 0 --nproc 2 ...            two CPU ranks
#   ./run.sh prepare [flags]                   only set up and prepare the corpus
#   ./run.sh sample --text "Hi!" --out hi.wav  set up and speak, with the flags of sample.py
#   ./run.sh test [--fast] [pytest arguments]  the tests; --fast: without those that take seconds
#   ./run.sh installed                         print the mark of an up-to-date .venv; status 0 if .venv has it
#   NNODES=2 RDZV_ENDPOINT=host:port ./run.sh  on each of two machines; under Slurm: srun --ntasks-per-node=1 ./run.sh
# More variables: RDZV_ID, the name of the job (default: Slurm's job id and run_name); MAX_RESTARTS, how often to restart the
# training processes after one has died (default 0; on several machines 3); DRY_RUN=1 prints the training command only.
set -euo pipefail
from=$PWD
cd "$(dirname "$0")"

die() { echo "error: $*" >&2; exit 2; }

# --- the virtual environment, updated when the requirements change or the folder moves: an editable install stores its path
bigvgan="bigvgan==2.4.1"
want=$({ cat requirements.txt pyproject.toml; echo "$bigvgan"; pwd -P; } | cksum)
installed() { [ "$(cat .venv/installed 2>/dev/null)" = "$want" ]; }
if [ "${1:-}" = installed ]; then echo "$want"; installed; exit; fi
if ! installed; then
  python=
  for p in python3 python3.13 python3.12 python3.11 .venv/bin/python; do
    if "$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$p; break; fi
  done
  [ -n "$python" ] || die "no Python of version 3.11 or later found; install one (found: $(python3 --version 2>&1 || true))"
  # Only one run.sh installs; others wait. The system drops the lock when the process ends, so a killed one leaves none behind.
  mkdir -p .venv
  exec 9> .venv/lock
  "$python" -c '
import fcntl, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("another run.sh is installing into .venv: waiting for it to end", file=sys.stderr, flush=True)
    fcntl.flock(9, fcntl.LOCK_EX)
except OSError as e:
    print(f"note: cannot lock .venv/lock ({e}); do not start another run.sh during the installation", file=sys.stderr)'
  if ! installed; then
    # an interrupted installation can leave a Python without pip
    .venv/bin/python -m pip --version > /dev/null 2>&1 || "$python" -m venv .venv ||
      die "python3 -m venv failed; on Debian: apt-get install python3-venv"
    pip() { .venv/bin/python -m pip install -q --disable-pip-version-check "$@"; }
    echo "installing requirements.txt into .venv (once; minutes)" >&2
    pip -r requirements.txt || die "pip could not install requirements.txt"
    # without its dependencies: they are for its own training script, and one of them (pesq) needs a C compiler
    pip --no-deps "$bigvgan" || die "pip could not install $bigvgan"
    echo "$want" > .venv/installed
  fi
  exec 9>&-
fi
PATH="$PWD/.venv/bin:$PATH"

if [ "${1:-}" = sample ]; then shift; cd "$from"; exec python "$OLDPWD/sample.py" "$@"; fi
if [ "${1:-}" = test ]; then
  shift
  if [ "${1:-}" = --fast ]; then shift; set -- -m "not slow" "$@"; fi
  exec python -m pytest -q -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
fi

# --- the config: a file, then environment variables, then flags
training=true
if [ "${1:-}" = prepare ]; then shift; training=false NNODES=1; fi
config= source_dir=
args=()
[ -z "${NUM_GPUS:-}" ] || args+=(--gpus "$NUM_GPUS")
[ -z "${BATCH_SIZE:-}" ] || args+=(--batch_size "$BATCH_SIZE")
while [ $# -gt 0 ]; do
  case "$1" in
    --config) [ $# -gt 1 ] || die "--config needs a file; see configs/"; config=$2; shift 2 ;;
    --config=*) config=${1#*=}; shift ;;
    --source) [ $# -gt 1 ] || die "--source needs the folder of the raw corpus"; source_dir=$2; shift 2 ;;
    --source=*) source_dir=${1#*=}; shift ;;
    *) args+=("$1"); shift ;;
  esac
done
if [ -z "$config" ]; then
  case " ${args[*]-} " in
    *" --init_from"*|*" --init-from"*) config=configs/finetune.yaml ;;  # ljspeech.yaml sets sizes of its own
    *) config=configs/ljspeech.yaml ;;
  esac
fi
args=(--config "$config" ${args[@]+"${args[@]}"})
case " ${args[*]} " in
  *" --help "*|*" -h "*) sed -n '2,${/^#/!q;s/^# \{0,1\}//p;}' run.sh; exec python config.py --help ;;
esac
audio_fields="sample_rate n_fft hop_length win_length n_mels f_min f_max"
values=$(python config.py "${args[@]}" \
  --get "gpus,nproc,data_dir,prepare_script,batch_size,resume,run_name,${audio_fields// /,}")
log_mel=()  # as flags
{
  for name in gpus nproc data_dir prepare batch_size resume run_name; do read -r "$name"; done
  for name in $audio_fields; do read -r value; log_mel+=("--$name" "$value"); done
} <<< "$values"
ranks=$((gpus > 0 ? gpus : nproc))
corpus=$data_dir/metadata/dataset_stats.json

# --- the number of machines and their meeting point: from the environment, or else from srun. Only srun sets SLURM_STEP_*.
# In salloc's shell and in an sbatch script only one run.sh is started, so it must not wait for others.
nnodes=${NNODES:-${SLURM_STEP_NUM_NODES:-1}}
[[ $nnodes =~ ^[1-9][0-9]*$ ]] ||
  die "NNODES = $nnodes is not a positive integer; give the number of machines (no range: the number of ranks is fixed)"
[ -n "${NNODES:-}" ] || [ "${SLURM_STEP_NUM_TASKS:-$nnodes}" = "$nnodes" ] ||
  die "srun starts $SLURM_STEP_NUM_TASKS run.sh on $nnodes machine(s); start one on each: srun --ntasks-per-node=1"
max_restarts=${MAX_RESTARTS:-$((nnodes > 1 ? 3 : 0))}
[[ $max_restarts =~ ^(0|[1-9][0-9]*)$ ]] || die "MAX_RESTARTS = $max_restarts is not a number; 0 means no restarts"
# not the script torchrun: its first line names the folder where .venv was made, which may have moved
torchrun=(python -m torch.distributed.run --standalone)
if [ "$nnodes" -gt 1 ]; then
  endpoint=${RDZV_ENDPOINT:-}
  if [ -z "$endpoint" ] && [ -n "${SLURM_STEP_NODELIST:-}" ]; then
    hosts=$(scontrol show hostnames "$SLURM_STEP_NODELIST" 2>&1) ||
      die "scontrol does not know the machines of $SLURM_STEP_NODELIST (${hosts##*: line *: }); set RDZV_ENDPOINT=host:port"
    port=$((15000 + (${SLURM_JOB_ID:-0} * 10 + ${SLURM_STEP_ID:-0}) % 10000))  # below the ports that systems hand out
    endpoint=${hosts%%$'\n'*}:$port
  fi
  { [[ $endpoint =~ ^[A-Za-z0-9._-]+:[1-9][0-9]{0,4}$ ]] && [ "${endpoint##*:}" -le 65535 ]; } ||
    die "RDZV_ENDPOINT = '$endpoint' is not host:port; NNODES = $nnodes needs one of the machines and a free port on it"
  world=$((nnodes * ranks))
  [ "$batch_size" -ge "$world" ] ||
    die "batch_size = $batch_size is less than one utterance for each of $world ranks, $ranks on each of $nnodes machines"
  [ -f "$corpus" ] ||
    die "no corpus at $data_dir, and $nnodes machines would all make it; first run once: ./run.sh prepare ${args[*]}"
  # Without the variable, a machine that stayed looks for the new rank 0 at the port of the old one (torch 2.13)
  torchrun=(env TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 python -m torch.distributed.run --nnodes "$nnodes"
            --rdzv-backend c10d --rdzv-endpoint "$endpoint"
            --rdzv-id "${RDZV_ID:-${SLURM_JOB_ID:+$SLURM_JOB_ID-}$run_name}")
  if [ -z "$resume" ]; then  # a machine that is started again must continue the run
    echo "note: NNODES = $nnodes, so an existing run is continued: adding --resume latest" >&2
    args+=(--resume latest)
  fi
fi

# --- the command: one process, or torchrun with one for each GPU (or CPU rank)
command=(python train.py "${args[@]}")
if [ $((nnodes * ranks)) -gt 1 ] || [ "$max_restarts" -gt 0 ]; then
  # torchrun passes these signals on to the training processes and kills them after the timeout, which is long enough for a
  # step and a checkpoint. Without the -- it would take --nproc for its own.
  command=("${torchrun[@]}" --nproc-per-node "$ranks" --max-restarts "$max_restarts"
           --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout 300 -- train.py "${args[@]}")
fi
if $training && [ -n "${DRY_RUN:-}" ]; then
  echo "$(printf '%q ' "${command[@]}")"
  exit
fi

# --- what this machine lacks
if $training && [ "$gpus" -gt 0 ]; then
  found=$(python -c 'import torch; print(torch.cuda.device_count())')
  if [ "$found" -lt "$gpus" ]; then
    use="./run.sh --config configs/demo.yaml (the same job on a smaller corpus, on the CPU)"
    [ "$found" -eq 0 ] || use="./run.sh --gpus $found"
    die "$config needs $gpus GPUs and this machine has $found; use $use"
  fi
fi
case "$source_dir" in ""|/*) ;; *) source_dir="$from/$source_dir" ;; esac  # relative to the user's folder
if [ -n "$source_dir" ] && [ -f "$corpus" ]; then
  echo "note: $data_dir is prepared already, so --source is not read" >&2
fi
if [ ! -f "$corpus" ]; then
  [ -n "$prepare" ] || die "no corpus at $data_dir, and $config names no prepare_script that would make it"
  needs=$(dirname "$prepare")/requirements.txt  # of this script only
  if [ -f "$needs" ] && ! cmp -s "$needs" .venv/installed_for_prepare; then
    echo "installing $needs into .venv (once)" >&2
    python -m pip install -q --disable-pip-version-check -r "$needs" || die "pip could not install $needs"
    cp "$needs" .venv/installed_for_prepare
  fi
  echo "no corpus at $data_dir yet: running $prepare" >&2
  python "$prepare" --out "$data_dir" ${source_dir:+--source "$source_dir"} "${log_mel[@]}" ||
    die "the corpus was not prepared; a job that needs no downloads: ./run.sh --config configs/grammar.yaml"
fi
if ! $training; then
  echo "the corpus is at $data_dir"
  exit
fi

# --- train. exec, so that a scheduler's signals reach torchrun and not a shell
if [ "$gpus" -eq 0 ] && [ "$ranks" -gt 1 ] && [ -z "${OMP_NUM_THREADS:-}" ]; then
  cores=$(python -c 'import os; print(os.cpu_count())')
  export OMP_NUM_THREADS=$((cores > ranks ? cores / ranks : 1))
fi
exec "${command[@]}"

#!/usr/bin/env bash
# Two runs of a few minutes each on a machine with one GPU and no network: is the GPU path right, and how fast is it?
#
#   tests/gpu/lent.sh 1      facts, GPU tests, a training run beside its resident twin with traces, links
#   tests/gpu/lent.sh 2      some tests, the training run at every depth in short turns, memcheck on the record kernels
#
# Every part has its own time, so that none takes another's. Logs, figures and traces go to $OUT (default: ./lent-out),
# a short account to the screen. Prepared beforehand, in folders that git ignores: .whl/ (wheels of what that machine's
# Python lacks) and .lent/store.tar.xz (a token store with a vocabulary of at most 8,192). The first call's
# $OUT/compiled.tar.xz, put into .lent/ too, spares the second one to compile the same kernels and loops again.
#
# REHEARSE=1 runs the same parts on a CPU, small; SKIP=facts,links leaves parts out.
set -uo pipefail
cd "$(dirname "$0")/../.."
call=${1:?which call: 1 or 2}
out=$(realpath -m "${OUT:-lent-out}")
logs=$(mktemp -d)
mkdir -p "$out"
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

site=$(mktemp -d)
if compgen -G '.whl/*.whl' > /dev/null; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" .whl/*.whl || exit 1
fi
export PYTHONPATH=$site:$PWD
store=$(mktemp -d)
tar -xf .lent/store.tar.xz -C "$store" || exit 1
compiled=$(mktemp -d)
[ ! -e .lent/compiled.tar.xz ] || tar -xf .lent/compiled.tar.xz -C "$compiled"
export TRITON_CACHE_DIR=$compiled/triton TORCHINDUCTOR_CACHE_DIR=$compiled/inductor XDG_CACHE_HOME=$compiled
job=(configs/bench.yaml "data.path=$store/store")
small=(model.engram.rows_per_head=300000)

# part NAME SECONDS COMMAND...: its last lines are shown, all of them are kept.
part() {
  local name=$1 seconds=$2 code started=$SECONDS
  [[ ",${SKIP:-}," == *",$name,"* ]] && return
  shift 2
  timeout -k 5 "$seconds" "$@" > "$logs/$name.log" 2>&1
  code=$?
  echo "$name $code $((SECONDS - started))" | tee -a "$logs/parts.txt"
}
shown() { [ ! -e "$logs/$1.log" ] || tail -n "$2" "$logs/$1.log" | cut -c1-220; }

if [ -n "${REHEARSE:-}" ]; then
  export DS_ACCELERATOR=cpu
  job=(configs/tiny.yaml "data.path=$store/store" train.micro_batch_size=2 train.global_batch_size=4 run.nproc=1 model.vocab_size=8192)
  small=(offload.window_rows=60000)
  turns=(--steps 8 --warmup 3)
  short=(--steps 5 --warmup 2)
  engines=(--engine cpu --engine mixed)
  device=(--device cpu)
  no_gpu=(--no-gpu)
  chosen=(-m "not gpu and not long" -n 2)
  memory=1024
  first=(tests/offload/device tests/offload/window tests/kernels/records tests/kernels/gather tests/kernels/rows)
  second=(tests/offload/device tests/kernels/records)
  checked=() sanitizer=()
else
  turns=(--steps 10 --warmup 4)
  short=(--steps 8 --warmup 3)
  engines=(--engine zero_copy --engine mixed)
  device=()
  no_gpu=()
  chosen=(-m gpu -n 14)
  memory=16384
  first=(tests/train/test_waits.py tests/offload tests/kernels tests/model)
  second=(tests/train/test_waits.py tests/offload/test_cuda.py)
  checked=(-m gpu)
  sanitizer=(compute-sanitizer --tool memcheck --target-processes application-only --kernel-regex 'kns=^_[a-z]')
fi

engram=("$python" -m launch)
beside=("${engram[@]}" bench train "${device[@]}" --job "${job[@]}" "${small[@]}")
links=("${engram[@]}" bench links "${device[@]}" --programs 4,8,16 --record-bytes 160,352,896,1024)
tests=("$python" -m pytest -p no:cacheprovider -p tests.gpu.instant -W ignore "${chosen[@]}" --dist load --tb=short)

case $call in
  1)
    part facts 25 "$python" tests/gpu/facts.py "${no_gpu[@]}"
    shown facts 60
    part tests 110 "${tests[@]}" "${first[@]}"
    shown tests 80
    part turns 150 "${beside[@]}" "${turns[@]}" --depths 2,0 --rounds 2 --seconds 115 \
      "${engines[@]}" --partial "$out/turns.json" --traces "$out/traces"
    shown turns 40
    part trace 15 "${engram[@]}" bench trace "$out"/traces/*.json.gz
    shown trace 60
    part links 30 "${links[@]}" --memory-mib "$memory" --seconds 22 --json
    [ ! -e "$logs/links.log" ] || cp "$logs/links.log" "$out/links.json"
    ;;
  2)
    part tests 46 "${tests[@]}" ${TESTS:-${second[@]}}
    shown tests 60
    part turns 165 "${beside[@]}" "${short[@]}" --depths 2,1,4,0 --rounds 6 --seconds 142 \
      --engine zero_copy --partial "$out/turns.json" --traces "$out/traces"
    shown turns 40
    part memcheck 26 "${sanitizer[@]}" "$python" -m pytest -p no:cacheprovider -W ignore "${checked[@]}" -x \
      tests/kernels/records/test_triton.py::test_padded_records_travel_with_their_padding_and_nothing_else_does
    shown memcheck 8
    part trace 15 "${engram[@]}" bench trace "$out"/traces/*.json.gz
    shown trace 60
    ;;
  *)
    echo "which call: 1 or 2, not $call" >&2
    exit 2
    ;;
esac
tar -I "xz -1 -T0" -cf "$out/compiled.tar.xz" -C "$compiled" .
tar -czf "$out/logs.tar.gz" -C "$logs" .
echo "parts (name, exit code, seconds):" && cat "$logs/parts.txt"

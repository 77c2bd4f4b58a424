#!/bin/sh
# What there is to do on a machine with a GPU: build, tests, figures, in at most ten minutes.
#   sh scripts/measure_gpu.sh FOLDER                # JSON files, plots and logs go there
#   sh scripts/measure_gpu.sh FOLDER build video    # these steps alone
# Copy the JSON files to benchmarks/results once they are right. PYTHON (python3) must have torch with
# CUDA, and is installed into; without a network set PIP_NO_DEPS=1, or PIP_NO_INDEX=1 and
# PIP_FIND_LINKS to a folder of wheels. Every step has a time limit, and what it had finished by then
# stays; ARCHIVE=FILE.tar.gz, outside of FOLDER, also keeps it in one file, made anew after every step. Steps
# for which the ten minutes leave less than half their limit are named in the end, to be run by name.
# SLOWER=3 gives three times as long for everything. What fails is named too; the rest is run all the same.
# Of a copy without git NOVA_COMMIT tells the results which commit they are of.
out=${1:?name a folder for the results}
shift
steps=${*:-build op_tests gpu_tests batch1 denoise batch24 op_times batch4 profile roofline}
python=${PYTHON:-python3}
failed= missed= known=
end=$(($(date +%s) + 575 * ${SLOWER:-1}))
mkdir -p "$out"
# Benchmarks find the package here, also where building it failed.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
# The extension for the card that torch takes, and no other, is built in a fraction of the time.
capability=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())' 2>/dev/null)
[ -z "$capability" ] || export NOVA_CUDA_ARCHS="${NOVA_CUDA_ARCHS:-$capability-real}"
export MAX_JOBS="${MAX_JOBS:-$(nproc)}" PYTHONUNBUFFERED=1

# After Ctrl-C the running step ends before this script does.
trap 'exit 130' INT

# step SECONDS NAME COMMAND...: run a command, its output shown and kept in NAME.log. At its limit it is
# interrupted, so that pytest still says what failed. The inner timeout interrupts all processes that the
# command has started, for which it makes them a group of their own, where Ctrl-C does not reach them; the
# outer one, which has no limit, is there to pass it on. tee must not end before they do.
step() {
    limit=$(($1 * ${SLOWER:-1})) name=$2 && shift 2
    known="$known $name"
    case " $steps " in *" $name "*) ;; *) return ;; esac
    begin=$(date +%s)
    left=$((end - begin))
    [ "$left" -ge $((limit / 2)) ] || { missed="$missed $name"; return; }
    [ "$limit" -le "$left" ] || limit=$left
    echo "== $name, at most $limit s"
    { timeout --foreground -s INT 0 timeout -s INT -k 10 "$limit" "$@" 2>&1 && echo ok > "$out/$name.ok"
    } | tee -i "$out/$name.log"
    [ -f "$out/$name.ok" ] || failed="$failed $name"
    rm -f "$out/$name.ok"
    echo "== $name took $(($(date +%s) - begin)) s"
    [ -z "$ARCHIVE" ] || tar czf "$ARCHIVE" -C "$out" .
}

# tests SECONDS NAME OPTIONS...: tests that tell at once what fails or hangs, in case they are stopped
tests() {
    limit=$1 name=$2 && shift 2
    step "$limit" "$name" "$python" -m pytest -q --tell-at-once -o faulthandler_timeout=100 "$@"
}

# fps SECONDS NAME OPTIONS...: frames per second of the released 0.6B model
fps() {
    limit=$1 name=$2 && shift 2
    step "$limit" "$name" "$python" benchmarks/fps.py --geometry nova-d48w1024-osp480 "$@" \
        --json "$out/fps_$name.json" ${plots:+--plot "$out/fps_$name.png"}
}

# What builds is fetched where it is missing and can be. Without the extension the step has failed.
step 80 build sh -c '"$0" -m pip install -q --retries 0 "setuptools>=77" pybind11 cmake ninja
    NOVA_CUDA="${NOVA_CUDA:-1}" "$0" -m pip install --no-build-isolation -e ".[test]"' "$python"
# Without it benchmarks measure what is left, which must not pass for the figures of a whole build.
[ -z "$capability" ] || [ "$NOVA_CUDA" = 0 ] || "$python" -c '
import sys
from nova_kernels.cuda_kernels import extension
sys.exit(extension.obstacle())' || failed="$failed (measured without the CUDA extension)"
# Without matplotlib, which the line above may have brought, benchmarks that are to plot measure nothing.
plots=$("$python" -c 'import matplotlib; print("yes")' 2>/dev/null)
# Attention first: one of its tests compiles kernels for a minute.
tests 130 op_tests -n 8 tests/test_block_causal_attention.py tests/test_scale_shift.py \
    tests/test_residual_norm.py tests/test_linear_gelu.py tests/test_frame_scale_shift.py \
    tests/test_rope3d.py tests/test_diffusion_step.py tests/test_denoise.py tests/test_backends.py
# Only files with tests for a GPU, since each process collects all that it is given. Those of media
# files use none, and cannot be collected without PyAV. Slow ones are commands that are steps too.
tests 110 gpu_tests -n 4 --dist loadfile -m 'gpu and not slow' --ignore tests/test_media.py \
    $(grep -l 'mark\.gpu' tests/test_*.py)
# Of each video the first latent frames alone: all of them take the plain sampler minutes, and
# torch.compile and tuning take some as well.
fps 130 batch1 --batch 1 --run-latents 2 --repeats 2 --no-compile --no-tune --progress
step 45 denoise "$python" benchmarks/denoise.py --json "$out/denoise.json"
# Of so large a batch one timed run, behind the one that is checked.
fps 160 batch24 --batch 24 --run-latents 1 --repeats 1 --no-compile --no-tune
step 90 op_times "$python" benchmarks/op_times.py --no-compile --json "$out/op_times.json"
fps 60 batch4 --batch 4 --run-latents 1 --repeats 2 --no-compile --no-tune --no-stages
step 60 profile "$python" benchmarks/kernel_times.py --json "$out/kernel_times.json"
step 30 roofline "$python" benchmarks/roofline.py --json "$out/roofline.json"
# By name alone: all tests, as `make test` runs them (files that need PyAV do not count as passed without
# it; slow ones of the GPU are steps of their own), the README's table with the reference package, which
# must be importable, the kernels of the largest batch, what nova.tune gains, when pixels of a stream are
# there, what users are told of their card (one process compiles all kernels for it), what torch.compile
# makes of sampling and of the ops, whole videos with text encoder and VAE, and other backends of the ops.
tests 500 all_tests -n 8 --dist loadfile --no-loadscope-reorder --continue-on-collection-errors \
    -m 'not (gpu and slow)' tests
fps 500 reference --batch 1 4 24 --run-latents 1 --repeats 2 --no-compile --no-tune --against diffnext
step 90 profile_batch24 "$python" benchmarks/kernel_times.py --batch 24 \
    --json "$out/kernel_times_batch24.json"
fps 350 tuned --batch 1 4 --run-latents 1 --repeats 2 --no-compile --tune --no-stages
fps 400 tuned_batch24 --batch 24 --run-latents 1 --repeats 1 --no-compile --tune --no-stages
step 240 streaming "$python" benchmarks/streaming.py --repeats 1 \
    --json "$out/streaming.json" ${plots:+--plot "$out/streaming.png"}
step 150 ops "$python" -m nova_kernels
fps 300 compiled --batch 1 24 --run-latents 1 --repeats 1 --compile --no-tune --no-stages
step 200 op_times_compiled "$python" benchmarks/op_times.py --json "$out/op_times_compiled.json"
fps 500 video --batch 1 --run-latents 9 --text --vae --repeats 2 --no-compile --no-tune
for backend in triton cuda; do
    fps 90 "$backend" --batch 1 --run-latents 2 --repeats 2 --no-compile --no-tune --backend "$backend"
done
for name in $steps; do
    case " $known " in *" $name "*) ;; *) failed="$failed $name (there is no such step)" ;; esac
done
[ -z "$missed" ] || echo "no time was left for:$missed"
[ -z "$failed" ] || echo "failed:$failed"
[ -z "$failed$missed" ]

#!/bin/sh
# Everything to do on a machine with a GPU, in one call: build, tests, then figures.
#   sh scripts/measure_gpu.sh FOLDER    # JSON files, plots and logs go there; copy the JSON files
#                                       # to benchmarks/results once they are right
# PYTHON (python3) must have torch with CUDA, and is installed into. What fails is said at the end;
# the rest is run all the same.
out=${1:?name a folder for the results}
python=${PYTHON:-python3}
mkdir -p "$out"
failed=

# step NAME COMMAND...: run a command, its output shown and kept in NAME.log
step() {
    name=$1 && shift
    echo "== $name"
    { "$@" 2>&1 && echo ok > "$out/$name.ok"; } | tee "$out/$name.log"
    [ -f "$out/$name.ok" ] || failed="$failed $name"
    rm -f "$out/$name.ok"
}

step build "$python" -m pip install --no-build-isolation -e '.[test]'
step ops "$python" -m nova_kernels
step op_tests "$python" -m pytest -q tests/test_scale_shift.py tests/test_residual_norm.py \
    tests/test_frame_scale_shift.py tests/test_rope3d.py tests/test_diffusion_step.py \
    tests/test_denoise.py tests/test_block_causal_attention.py tests/test_backends.py
step gpu_tests "$python" -m pytest -q tests -m gpu
step kernels "$python" benchmarks/kernels.py --json "$out/kernels.json"
step denoise "$python" benchmarks/denoise.py --json "$out/denoise.json"
step roofline "$python" benchmarks/roofline.py --json "$out/roofline.json"
for backend in auto triton cuda; do
    step "fps_$backend" "$python" benchmarks/fps.py --backend "$backend" \
        --json "$out/fps_$backend.json" --plot "$out/fps_$backend.png"
done
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }

#!/bin/sh
# Makes the model of this package again: sh scripts/shapes_model/make.sh FOLDER
# Called again, it goes on where it was stopped. docs/shapes_model.md has the times.
set -e
here=$(dirname "$0")
out=${1:?name a folder for what is made}
processes=${PROCESSES:-2} # of a training of the transformer, one thread each
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# VAE: squares around the shapes show much at little cost; whole clips make it ready for use.
train_vae() {
    name=$1 && shift
    nova train-vae shapes --size 64 64 --clips 1000000 --precision bfloat16 --schedule cosine \
        --mse-weight 2 --kl-weight 1e-3 --resume --out "$out/$name" "$@"
}
last_vae() { ls -d "$out/$1"/checkpoints/step-*/vae | tail -1; }
train_vae vae-1 --config "$here/vae.json" --frames 5 --crop 32 --steps 3500 --batch-size 20 \
    --warmup 100 --lr 1.5e-3 --ema 0.998
train_vae vae-2 --vae "$(last_vae vae-1)" --shapes-seed 1 --frames 17 --steps 300 --batch-size 3 \
    --warmup 20 --lr 5e-4 --ema 0.98
train_vae vae-3 --vae "$(last_vae vae-2)" --shapes-seed 2 --frames 17 --steps 600 --batch-size 3 \
    --warmup 20 --lr 8e-4 --ema 0.99
train_vae vae-4 --vae "$(last_vae vae-3)" --shapes-seed 11 --frames 9 --crop 40 --steps 4500 \
    --batch-size 8 --warmup 100 --lr 8e-4 --ema 0.998
train_vae vae-5 --vae "$(last_vae vae-4)" --shapes-seed 12 --frames 17 --steps 2000 --batch-size 2 \
    --warmup 50 --lr 4e-4 --ema 0.995
vae=$(last_vae vae-5)

[ -d "$out/text/tokenizer" ] || nova train-text-encoder shapes --clips 3000 --vocabulary 640 \
    --steps 0 --out "$out/text"

# Transformer: images first, since a step on images is cheaper than one on clips.
encode() {
    nova encode shapes --size 64 64 --vae "$vae" --text-encoder "$out/text" --text-length 40 \
        --precision bfloat16 "$@"
}
encode --frames 1 --clips 24000 --batch-size 64 --shard-size 1024 --out "$out/images"
encode --clips 10000 --batch-size 16 --out "$out/clips"
train() {
    name=$1 data=$2 && shift 2
    torchrun --standalone --nproc-per-node "$processes" -m nova train "$out/$data" \
        --precision bfloat16 --loss-repeats 2 --optimizer muon --lr 3e-3 --sample-every 0 --resume \
        --out "$out/$name" "$@"
}
train_images() {
    train image-model images --config "$here/transformer.json" --vae "$vae" \
        --text-encoder "$out/text" --warmup 100 --ema 0.99 --save-every 250 "$@"
}
# A shorter call after a longer one has nothing to do.
train_images --steps 1000 --batch-size 32
train_images --steps 1500 --batch-size 64
train_images --steps 3000 --batch-size 64 --mask-ratio-min 0.1
train_images --steps 3500 --batch-size 64 --mask-ratio-std 0.7 --mask-ratio-min 0.1
train video-model clips --model "$out/image-model/checkpoints/step-00003500" --train-motion \
    --mask-ratio-std 0.7 --mask-ratio-min 0.1 --steps 3000 --batch-size 32 --warmup 50 \
    --schedule cosine --ema 0.995 --save-every 200
nova export "$out/video-model/checkpoints/step-00003000" --out "$out/shapes" \
    --steps 16 --diffusion-steps 20 --guidance 3 --motion 2

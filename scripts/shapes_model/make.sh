#!/bin/sh
# Makes the model of this package again: sh scripts/shapes_model/make.sh FOLDER
# Called again, it goes on where it was stopped. docs/shapes_model.md has the times.
# The transformer is trained by PROCESSES (2) of one thread each; their number changes no result.
set -e
here=$(dirname "$0")
out=${1:?name a folder for what is made}
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# is_done RUN STEPS: whether a run has got that far.
is_done() {
    last=$(ls "$out/$1/checkpoints" 2>/dev/null | sed -n 's/^step-0*//p' | sort -n | tail -1)
    [ "${last:-0}" -ge "$2" ]
}

# VAE: squares around the shapes show much at little cost; whole clips make it ready for use.
train_vae() {
    run=$1 steps=$2 && shift 2
    is_done "$run" "$steps" || nova train-vae shapes --size 64 64 --clips 1000000 \
        --precision bfloat16 --schedule cosine --mse-weight 2 --kl-weight 1e-3 --resume \
        --out "$out/$run" --steps "$steps" "$@"
}
last_vae() { ls -d "$out/$1"/checkpoints/step-*/vae | tail -1; }
train_vae vae-1 3500 --config "$here/vae.json" --frames 5 --crop 32 --batch-size 20 \
    --warmup 100 --lr 1.5e-3 --ema 0.998
train_vae vae-2 300 --vae "$(last_vae vae-1)" --shapes-seed 1 --frames 17 --batch-size 3 \
    --warmup 20 --lr 5e-4 --ema 0.98
train_vae vae-3 600 --vae "$(last_vae vae-2)" --shapes-seed 2 --frames 17 --batch-size 3 \
    --warmup 20 --lr 8e-4 --ema 0.99
train_vae vae-4 4500 --vae "$(last_vae vae-3)" --shapes-seed 11 --frames 9 --crop 40 \
    --batch-size 8 --warmup 100 --lr 8e-4 --ema 0.998
train_vae vae-5 2000 --vae "$(last_vae vae-4)" --shapes-seed 12 --frames 17 --batch-size 2 \
    --warmup 50 --lr 4e-4 --ema 0.995
vae=$(last_vae vae-5)

[ -d "$out/text-words/tokenizer" ] || nova train-text-encoder shapes --clips 3000 --vocabulary 640 \
    --steps 0 --out "$out/text-words"

encode() {
    text=$1 && shift
    nova encode shapes --size 64 64 --vae "$vae" --text-encoder "$out/$text" --text-length 40 \
        --precision bfloat16 "$@"
}
# encode_images TEXT NUMBER SEED FOLDER, and alike for clips
encode_images() {
    encode "$1" --frames 1 --clips "$2" --shapes-seed "$3" --batch-size 64 --shard-size 1024 \
        --out "$out/$4"
}
encode_clips() {
    encode "$1" --clips "$2" --shapes-seed "$3" --batch-size 16 --out "$out/$4"
}
encode_images text-words 40000 1 images
encode_clips text-words 24000 0 clips

# Transformer: images first, since a step on images is cheaper than one on clips.
train() {
    run=$1 steps=$2 data=$3 && shift 3
    is_done "$run" "$steps" || torchrun --standalone --nproc-per-node "${PROCESSES:-2}" \
        -m nova train "$out/$data" --device cpu --precision bfloat16 --loss-repeats 2 \
        --optimizer muon --lr 3e-3 --sample-every 0 --resume --out "$out/$run" --steps "$steps" "$@"
}
train_images() {
    train "$@" --batch-size 64 --warmup 100 --schedule constant --ema 0.99 --save-every 250
}
# Clips: the learning rate falls in the last part of a stage alone.
train_clips() {
    run=$1 steps=$2 data=$3 model=$4 && shift 4
    train "$run" "$steps" "$data" --model "$out/$model" --train-motion --warmup 50 --ema 0.995 \
        --save-every 200 "$@"
}
# Few masked tokens: frames that are nearly complete, as sampling has them in its last steps.
few="--mask-ratio-std 0.7 --mask-ratio-min 0.1"

images=image-model/checkpoints/step-00003000
train_images image-model 3000 images --config "$here/transformer.json" --vae "$vae" \
    --text-encoder "$out/text-words" $few
train_clips clips-1 4400 clips $images --batch-size 32 --schedule constant $few
train_clips clips-1 9200 clips $images --batch-size 32 --schedule cosine $few
# Their first two latents alone: in the second one it shows which way things move, and steps on two
# are cheap. Then whole clips again.
train_clips starts-1 6200 clips clips-1/checkpoints/step-00009200 --max-latent-length 2 \
    --batch-size 64 --schedule constant $few
train_clips clips-2 3600 clips starts-1/checkpoints/step-00006200 --batch-size 32 \
    --schedule cosine $few
train_clips clips-3 2200 clips clips-2/checkpoints/step-00003600 --batch-size 32 \
    --schedule cosine --lr 2e-3 $few

# Another text encoder, which tells what belongs together in a sentence. What reads it (the text
# projection and the video encoder) starts anew and goes through all stages once more: images and two
# latents with many masked tokens, where the caption has most to say, then whole clips.
[ -d "$out/text/tokenizer" ] || nova train-text-encoder shapes --labels --clips 60000 \
    --vocabulary 640 --steps 5000 --batch-size 64 --lr 3e-3 --out "$out/text"
encode_images text 40000 1 images-read
encode_clips text 24000 0 clips-read
train_images image-model-read 3000 images-read --model "$out/clips-3/checkpoints/step-00002200" \
    --text-encoder "$out/text"
train_clips starts-read 5000 clips-read image-model-read/checkpoints/step-00003000 \
    --max-latent-length 2 --batch-size 64 --schedule constant
train_clips clips-4 6500 clips-read starts-read/checkpoints/step-00005000 --batch-size 32 \
    --schedule cosine $few

# Where some tokens of a frame are visible, they tell the background, and of later frames the motion,
# so that captions and motion scores are followed only as far as frames without any were trained on:
# one step in eight with the reference's mask ratios, one in twenty with few masked tokens. Here all
# tokens are masked, in images and in two latents; then whole clips, with something of both.
all="--mask-ratio-min 0.97"
encode_images text 24000 6 images-more
encode_clips text 20000 5 clips-more
train_images image-model-all 1250 images-more --model "$out/clips-4/checkpoints/step-00006500" $all
train_clips starts-all 1500 clips-more image-model-all/checkpoints/step-00001250 \
    --max-latent-length 2 --batch-size 64 --schedule constant $all
train_clips clips-5 6000 clips-more starts-all/checkpoints/step-00001500 --batch-size 32 \
    --schedule cosine --mask-ratio-std 0.4 --mask-ratio-min 0.1
[ -d "$out/shapes" ] || nova export "$out/clips-5/checkpoints/step-00006000" --out "$out/shapes" \
    --steps 16 --diffusion-steps 20 --guidance 2.5 --motion 2

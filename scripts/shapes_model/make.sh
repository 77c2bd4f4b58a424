#!/bin/sh
# Trains a small model of the world of shapes: sh scripts/shapes_model/make.sh FOLDER
# Called again, it goes on where it was stopped. In the making: the stages after the VAE have not been
# run to their end. What the VAE has reached is in vae/, so that it need not be made again.
set -e
here=$(dirname "$0")
out=${1:?name a folder for what is made}

vae_settings="--precision bfloat16 --schedule cosine --mse-weight 2 --kl-weight 1e-3"
train_vae() { nova train-vae shapes --size 64 64 --clips 1000000 $vae_settings --resume "$@"; }

vae="$here/vae"
if [ ! -d "$vae" ]; then
    # First on squares around the shapes, which show much at little cost, then on whole clips.
    train_vae --config "$here/vae.json" --frames 5 --crop 32 --steps 3500 --batch-size 20 \
        --warmup 100 --lr 1.5e-3 --ema 0.998 --out "$out/vae-crops"
    train_vae --vae "$out/vae-crops/checkpoints/step-00003500/vae" --frames 17 --shapes-seed 1 \
        --warmup 20 --steps 300 --batch-size 3 --lr 5e-4 --ema 0.98 --out "$out/vae-whole"
    train_vae --vae "$out/vae-whole/checkpoints/step-00000300/vae" --frames 17 --shapes-seed 2 \
        --warmup 20 --steps 600 --batch-size 3 --lr 8e-4 --ema 0.99 --out "$out/vae"
    vae="$out/vae/checkpoints/step-00000600/vae"
fi

[ -d "$out/text/tokenizer" ] || nova train-text-encoder shapes --clips 3000 --vocabulary 640 \
    --steps 0 --out "$out/text"

encode() {
    nova encode shapes --size 64 64 --vae "$vae" --text-encoder "$out/text" --text-length 40 \
        --precision bfloat16 --workers 1 "$@"
}
train() {
    nova train "$@" --precision bfloat16 --loss-repeats 2 --warmup 100 --schedule cosine --resume
}
# Images first: a step on images is cheaper than one on clips.
encode --frames 1 --clips 20000 --batch-size 64 --shard-size 1024 --out "$out/images"
train "$out/images" --config "$here/transformer.json" --vae "$vae" --text-encoder "$out/text" \
    --steps 6000 --batch-size 20 --lr 6e-4 --ema 0.998 --out "$out/image-model"
encode --clips 8000 --batch-size 16 --out "$out/clips"
train "$out/clips" --model "$out/image-model/checkpoints/step-00006000" --train-motion \
    --steps 20000 --batch-size 16 --lr 6e-4 --ema 0.999 --out "$out/model"
nova export "$out/model/checkpoints/step-00020000" --out "$out/shapes" \
    --steps 16 --diffusion-steps 25 --guidance 3 --motion 2

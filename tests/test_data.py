"""Sources of clips, encoding into shards, and reading them back."""

import copy
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_models import small_image_codec
from training_data import GradientSource, write_latents

from nova.codec import LatentCodec, to_pixels
from nova.data import (
    ClipFormat,
    FolderSource,
    LatentDataset,
    ShapesSource,
    ShuffledOrder,
    encode_clips,
    split_step,
)
from nova.data.encoding import fingerprint
from nova.data.seeds import keyed_generator
from nova.data.shards import ShardIndex
from nova.errors import CheckpointError, DeviceError, InputError, MediaError, NovaError
from nova.media import write_image, write_video
from nova.motion import motion_score
from nova.text import PromptTruncationWarning, TextEncoder
from nova.training import new_vae
from nova.vae import VAEConfig

CLIP = ClipFormat(num_frames=5, height=32, width=48)
IMAGE = ClipFormat(num_frames=1, height=32, width=32)


def clip_frames(count, height=48, width=64):
    """Frames that get brighter by 20 grey levels a frame, so that their numbers can be told."""
    return np.stack([np.full((height, width, 3), 20 * k, np.uint8) for k in range(count)])


@pytest.fixture(scope="module")
def codec():
    return LatentCodec(new_vae(VAEConfig.tiny()))


@pytest.fixture(scope="module")
def text_encoder(tiny_video_folder):
    folders = tiny_video_folder / "text_encoder", tiny_video_folder / "tokenizer"
    return TextEncoder.from_folders(*folders, max_length=16)


# Folders --------------------------------------------------------------------------------------


def test_videos_with_text_files(tmp_path):
    write_video(tmp_path / "b.mp4", clip_frames(9), 12)
    write_video(tmp_path / "deeper.mp4", clip_frames(9), 24)
    (tmp_path / "b.txt").write_text("a gradient\n that brightens \n")
    source = FolderSource(tmp_path, CLIP)
    assert len(source) == 2
    clip = source[0]
    assert clip.key == "b.mp4" and clip.caption == "a gradient that brightens"
    assert clip.frames.shape == (5, 32, 48, 3) and clip.frames.dtype == np.uint8
    assert clip.fps == 12 and clip.label is None
    assert clip.motion_flow == pytest.approx(motion_score(clip.frames, 12.0))
    with pytest.raises(InputError, match=r"deeper.mp4 has no caption: deeper.txt cannot be read"):
        source[1]
    frames_only = FolderSource(tmp_path, CLIP, frames_only=True)[1]
    assert (frames_only.caption, frames_only.motion_flow) == (None, 0.0)


def test_frames_at_the_wanted_rate(tmp_path):
    """At half the file's rate, every second frame."""
    frames = clip_frames(10)
    write_video(tmp_path / "a.mp4", frames, 24)
    clip = FolderSource(tmp_path, ClipFormat(5, 48, 64), frames_only=True)[0]
    brightness = clip.frames.reshape(5, -1).mean(1)
    np.testing.assert_allclose(brightness, frames[::2].reshape(5, -1).mean(1), atol=3)


def test_jsonl_with_captions_and_labels(tmp_path):
    for name in ("x.png", "y.png"):
        write_image(tmp_path / name, clip_frames(1)[0])
    # JSON may hold U+2028, which str.splitlines() takes for an end of line.
    lines = [{"file": "y.png", "caption": "why\u2028not"}, {"file": "x.png", "label": 7}]
    captions = tmp_path / "captions.jsonl"
    text = [json.dumps(line, ensure_ascii=False) for line in lines]
    captions.write_text("\n".join(text) + "\n\n", encoding="utf-8")
    source = FolderSource(tmp_path, IMAGE)
    assert [source[i].key for i in range(2)] == ["y.png", "x.png"]
    assert source[0].frames.shape == (1, 32, 32, 3)
    assert (source[0].caption, source[0].label) == ("why\u2028not", None)
    assert source[0].motion_flow == 0.0
    assert (source[1].caption, source[1].label) == (None, 7)


@pytest.mark.parametrize(
    "line",
    ['{"file": "x.png"}', '{"file": "x.png", "label": 1000}', '{"caption": "c"}', "[1]", "{",
     '{"file": "x.png", "caption": ""}', '{"file": "x.png", "caption": "c", "more": 1}'],
)  # fmt: skip
def test_bad_lines_are_named(tmp_path, line):
    captions = tmp_path / "list.jsonl"
    captions.write_text('{"file": "x.png", "caption": "c"}\n' + line)
    with pytest.raises(InputError, match="list.jsonl, line 2: expected"):
        FolderSource(tmp_path, IMAGE, captions)


def test_files_that_do_not_fit(tmp_path):
    write_video(tmp_path / "short.mp4", clip_frames(3), 12)
    write_image(tmp_path / "still.png", clip_frames(1)[0])
    source = FolderSource(tmp_path, CLIP, frames_only=True)
    with pytest.raises(InputError, match="short.mp4 has 3 frames at 12 a second; 5 are needed"):
        source[0]
    with pytest.raises(InputError, match="still.png is an image; clips of 5 are wanted"):
        source[1]
    (tmp_path / "still.txt").write_text(" \n")
    with pytest.raises(InputError, match="still.png has no caption: still.txt is empty"):
        FolderSource(tmp_path, IMAGE)[1]
    (tmp_path / "latin.jsonl").write_bytes(b'{"file": "\xe9.png", "caption": "c"}')
    with pytest.raises(InputError, match="latin.jsonl cannot be read as UTF-8 text"):
        FolderSource(tmp_path, IMAGE, tmp_path / "latin.jsonl")
    with pytest.raises(InputError, match="names no file"):
        FolderSource(tmp_path / "..", CLIP, _jsonl(tmp_path, ""))
    with pytest.raises(InputError, match="is not a folder"):
        FolderSource(tmp_path / "absent", CLIP)


@pytest.mark.parametrize("name", ["a" * 300 + ".png", "\0.png", "~nosuchuser/x.png"])
def test_names_that_no_file_can_have(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)  # for ~ to come first
    line = json.dumps({"file": name, "caption": "c"})
    source = FolderSource(".", IMAGE, _jsonl(Path("."), line))
    assert source.describe()["files"] == 1
    with pytest.raises(MediaError):
        source[0]


@pytest.mark.parametrize("name", ["a" * 300, "\0", "~nosuchuser/x"])
def test_names_that_no_folder_can_have(tmp_path, name):
    with pytest.raises(NovaError, match="is not a folder|is no path"):
        FolderSource(name, IMAGE)
    with pytest.raises(NovaError, match="cannot be read|is no path"):
        FolderSource(tmp_path, IMAGE, captions=name)


def test_half_a_character_in_a_caption(tmp_path):
    write_image(tmp_path / "x.png", clip_frames(1)[0])
    lines = r'{"file": "x.png", "caption": "a cat \ud83d"}'
    source = FolderSource(tmp_path, IMAGE, _jsonl(tmp_path, lines))
    with pytest.raises(InputError, match="x.png has a caption that is no text"):
        source[0]
    assert FolderSource(tmp_path, IMAGE, tmp_path / "other.jsonl", frames_only=True)[0].key


def test_folders_behind_links(tmp_path):
    """Each once, and what is there without links is where it was."""
    folder, outside = tmp_path / "clips", tmp_path / "outside"
    for name in ("clips/z/a.png", "clips/b.png", "outside/c.png", "outside/deep/d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (outside / "circle").symlink_to(outside)
    (outside / "back").symlink_to(tmp_path)
    for name, target in (("first", folder / "z"), ("more", outside), ("y", outside / "deep")):
        (folder / name).symlink_to(target)
    source = FolderSource(folder, IMAGE)
    keys = [entry.key for entry in source._entries]
    assert keys == ["b.png", "more/c.png", "more/deep/d.png", "z/a.png"]


def _jsonl(folder, text):
    path = folder / "other.jsonl"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "values",
    [(4, 32, 32, 12), (0, 32, 32, 12), (5, 0, 32, 12), (5, 8, 8, 0), (5, 32.0, 32, 12),
     (5, 8, 8, "12"), (5, 8, 8, float("inf"))],
)  # fmt: skip
def test_formats_that_no_clip_has(values):
    with pytest.raises(InputError):
        ClipFormat(*values)


# Shapes ---------------------------------------------------------------------------------------


def test_numbers_of_shapes_that_there_are_not():
    for size, seed in ((0, 0), (5, -1), (5.0, 0), (5, "1")):
        with pytest.raises(InputError, match="must be at least 1, and seed .* at least 0"):
            ShapesSource(size, CLIP, seed)
    with pytest.raises(InputError, match="held_out must be True, False or None"):
        ShapesSource(5, CLIP, held_out="no")


def test_numbers_of_numpy_become_pythons():
    """An index is JSON."""
    size = np.int64(32)
    clip_format = ClipFormat(np.int64(5), size, size, np.float32(12))
    source = ShapesSource(np.int64(4), clip_format, np.int64(3), np.bool_(True))
    expected = ShapesSource(4, ClipFormat(5, 32, 32), 3, held_out=True)
    assert json.dumps(source.describe()) == json.dumps(expected.describe())


def test_shapes_are_a_source():
    source = ShapesSource(3, ClipFormat(5, 32, 32), seed=4)
    clip = source[2]
    assert clip.frames.shape == (5, 32, 32, 3)
    assert clip.caption == source.caption(2) != source.caption(1)
    assert clip.motion_flow == pytest.approx(motion_score(clip.frames, 12.0))
    np.testing.assert_array_equal(clip.frames, source[2].frames)
    assert source.describe() != ShapesSource(3, ClipFormat(5, 32, 32), seed=5).describe()
    with pytest.raises(IndexError):
        source[3]
    with pytest.raises(InputError, match="12 frames a second"):
        ShapesSource(3, ClipFormat(5, 32, 32, fps=24))


# Encoding -------------------------------------------------------------------------------------


def test_encoded_rows_are_what_the_models_give(tmp_path, codec, text_encoder):
    source = GradientSource(5)
    encode_clips(
        source, tmp_path, codec, text_encoder, shard_size=2, batch_size=2, dtype="float32",
        show_progress=False,
    )  # fmt: skip
    data = LatentDataset(tmp_path)
    assert len(data) == 5 and data.latent_shape == (4, 2, 4, 4)
    for index in (4, 0, 3):
        clip, sample = source[index], data[index]
        mean, logvar = codec.encode_moments(to_pixels([clip.frames]))
        torch.testing.assert_close(sample.mean, mean[0])
        torch.testing.assert_close(sample.logvar, logvar[0])
        torch.testing.assert_close(sample.text, text_encoder.encode([clip.caption])[0])
        assert (sample.motion_flow, sample.fps) == (clip.motion_flow, 12.0)
        assert data.caption(index) == clip.caption
    latents = data.draw_latents(data[1], torch.Generator().manual_seed(3))
    pixels = to_pixels([source[1].frames])
    expected = codec.encode(pixels, torch.Generator().manual_seed(3))[0]
    torch.testing.assert_close(latents, expected)


def test_clips_can_be_read_from_their_start_alone(tmp_path, codec, text_encoder):
    encode_clips(GradientSource(3), tmp_path, codec, text_encoder, show_progress=False)
    whole, short = LatentDataset(tmp_path), LatentDataset(tmp_path, max_latent_length=1)
    assert short.latent_shape == (4, 1, 4, 4)
    for name in ("mean", "logvar"):
        torch.testing.assert_close(getattr(short[2], name), getattr(whole[2], name)[:, :1])
    assert short.draw_latents(short[0], torch.Generator()).shape == short.latent_shape
    assert LatentDataset(tmp_path, max_latent_length=9).latent_shape == whole.latent_shape
    for length in (0, 1.5):
        with pytest.raises(InputError, match="a whole number of at least 1"):
            LatentDataset(tmp_path, max_latent_length=length)


def test_bad_clips_are_skipped_and_listed(tmp_path, codec, text_encoder):
    source = GradientSource(6, broken=(0, 1, 4))
    options = {"shard_size": 2, "show_progress": False}
    index = encode_clips(source, tmp_path, codec, text_encoder, **options)
    assert index.complete and index.samples == 3
    data = LatentDataset(tmp_path)
    # The first shard has no clip at all, and no file.
    assert [data.caption(i) for i in range(3)] == ["gradient 2", "gradient 3", "gradient 5"]
    report = (tmp_path / "skipped.txt").read_text().splitlines()
    assert report == [f"clip {i}\tclip{i}.mp4 is damaged" for i in (0, 1, 4)]
    with pytest.raises(InputError, match="no clip could be used"):
        encode_clips(GradientSource(2, broken=(0, 1)), tmp_path / "none", codec, text_encoder,
                     show_progress=False)  # fmt: skip


def test_names_that_are_not_utf8_are_listed(tmp_path, codec, text_encoder):
    class Latin(GradientSource):
        def __getitem__(self, index):
            if index == 0:
                raise MediaError(os.fsdecode(b"caf\xe9.png is damaged"))
            return super().__getitem__(index)

    encode_clips(Latin(2), tmp_path, codec, text_encoder, show_progress=False)
    report = (tmp_path / "skipped.txt").read_text(encoding="utf-8")
    assert report == "clip 0\tcaf\\udce9.png is damaged\n"


def test_frames_are_kept_no_longer_than_needed(tmp_path, codec, text_encoder):
    """Those of a whole shard would be gigabytes."""
    seen, counts = [], []

    class Watched(GradientSource):
        def __getitem__(self, index):
            clip = super().__getitem__(index)
            seen.append(weakref.ref(clip.frames))
            counts.append(sum(frames() is not None for frames in seen))
            return clip

    encode_clips(Watched(12), tmp_path, codec, text_encoder, batch_size=2, show_progress=False)
    assert len(counts) == 12 and max(counts) <= 4


def test_captions_may_be_empty(tmp_path, codec, text_encoder):
    class Silent(GradientSource):
        def __getitem__(self, index):
            return replace(super().__getitem__(index), caption="" if index == 1 else "a gradient")

    encode_clips(Silent(3), tmp_path, codec, text_encoder, show_progress=False)
    data = LatentDataset(tmp_path)
    assert data.caption(1) == "" and data[1].text.shape == (0, text_encoder.hidden_size)
    assert len(data[0].text) == len(data[2].text) > 0


def test_worker_processes_change_nothing(tmp_path, codec, text_encoder):
    source = GradientSource(6, broken=(0, 1, 4))
    for workers in (0, 2):
        encode_clips(source, tmp_path / str(workers), codec, text_encoder, shard_size=2,
                     workers=workers, show_progress=False)  # fmt: skip
    alone, beside = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in "02")
    assert alone == beside


def test_short_memory_loses_no_shard(tmp_path, codec, text_encoder, monkeypatch):
    encode = type(codec.module).encode_moments
    calls = []

    def encode_four(self, pixels):
        calls.append(pixels)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return encode(self, pixels)

    monkeypatch.setattr(type(codec.module), "encode_moments", encode_four)
    options = {"shard_size": 3, "show_progress": False}
    message = (
        r"out of GPU memory while encoding.* Use a smaller batch_size \(--batch-size\) or a VAE"
    )
    with pytest.raises(DeviceError, match=message):
        encode_clips(GradientSource(8), tmp_path, codec, text_encoder, **options)
    source = GradientSource(8)
    assert encode_clips(source, tmp_path, codec, text_encoder, **options).samples == 8
    assert source.reads == [3, 4, 5, 6, 7]


class _Killed(BaseException):
    pass


def test_encoding_goes_on_where_it_was_killed(tmp_path, codec, text_encoder):
    class Fragile(GradientSource):
        deadly = 4

        def __getitem__(self, index):
            if index == self.deadly:
                raise _Killed
            return super().__getitem__(index)

    options = {"shard_size": 3, "show_progress": False}
    source = Fragile(8)
    with pytest.raises(_Killed):
        encode_clips(source, tmp_path / "a", codec, text_encoder, **options)
    with pytest.raises(InputError, match="unfinished"):
        LatentDataset(tmp_path / "a")
    source.deadly, source.reads = None, []
    encode_clips(source, tmp_path / "a", codec, text_encoder, **options)
    assert source.reads == [3, 4, 5, 6, 7]  # the first shard is kept
    encode_clips(GradientSource(8), tmp_path / "b", codec, text_encoder, **options)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    # Finished: nothing is read again.
    source.reads = []
    assert encode_clips(source, tmp_path / "a", codec, text_encoder, **options).samples == 8
    assert source.reads == []


def test_another_model_or_source_is_refused(tmp_path, codec, text_encoder):
    options = {"shard_size": 3, "show_progress": False}
    encode_clips(GradientSource(3), tmp_path, codec, text_encoder, **options)
    with pytest.raises(InputError, match="another source or format;"):
        encode_clips(GradientSource(4), tmp_path, codec, text_encoder, **options)
    other = LatentCodec(new_vae(VAEConfig.tiny(), seed=1))
    with pytest.raises(InputError, match="another vae;"):
        encode_clips(GradientSource(3), tmp_path, other, text_encoder, **options)


def test_fingerprints():
    """Of all values, and of nothing but these; a sum depends on the number of threads, too."""
    module = torch.nn.Linear(300, 300).requires_grad_(False)
    module.register_buffer("empty", torch.zeros(0, dtype=torch.bfloat16))
    module.register_buffer("scalar", torch.tensor(3))
    before, threads = fingerprint(module), torch.get_num_threads()
    torch.set_num_threads(4)
    assert fingerprint(module) == before
    torch.set_num_threads(threads)
    module.weight.data = module.weight.t().contiguous().t()  # in another order in memory
    assert fingerprint(module) == before
    module.weight.copy_(module.weight.flip(0))  # of the same sum
    assert fingerprint(module) != before


def test_fingerprints_of_half_precision_opened_in_another():
    module = torch.nn.Linear(8, 8).bfloat16()
    assert fingerprint(module) == fingerprint(copy.deepcopy(module).float())


def test_older_fingerprints_are_known(tmp_path, codec, text_encoder):
    """Of folders that were encoded when they were made of sums."""
    encode_clips(GradientSource(3), tmp_path, codec, text_encoder, show_progress=False)
    index = json.loads((tmp_path / "index.json").read_text())
    index["settings"]["vae"] = fingerprint(codec.module, by_sums=True)
    index["settings"]["text_encoder"] = fingerprint(text_encoder.module, by_sums=True)
    (tmp_path / "index.json").write_text(json.dumps(index))
    encode_clips(GradientSource(3), tmp_path, codec, text_encoder, show_progress=False)
    other = LatentCodec(new_vae(VAEConfig.tiny(), seed=1))
    with pytest.raises(InputError, match="another vae;"):
        encode_clips(GradientSource(3), tmp_path, other, text_encoder, show_progress=False)


def test_a_source_that_changed_is_refused(tmp_path, codec, text_encoder):
    folder = tmp_path / "clips"
    folder.mkdir()
    write_image(folder / "x.png", clip_frames(1)[0])
    (folder / "x.txt").write_text("a gradient")

    def encode():
        return encode_clips(
            FolderSource(folder, IMAGE), tmp_path / "data", codec, text_encoder, show_progress=False
        )

    encode()
    encode()  # nothing changed
    (folder / "x.txt").write_text("another one")
    with pytest.raises(InputError, match="another source or format;"):
        encode()
    # Folders that were encoded before this was recorded go on as they did.
    index = json.loads((tmp_path / "data" / "index.json").read_text())
    del index["settings"]["source"]["contents"]
    (tmp_path / "data" / "index.json").write_text(json.dumps(index))
    encode()


def test_captions_are_checked_before_the_vae_runs(tmp_path, codec, text_encoder, monkeypatch):
    monkeypatch.setattr(LatentCodec, "encode", None)
    monkeypatch.setattr(type(codec.module), "encode_moments", None)
    with pytest.raises(InputError, match="captions need a text encoder; give .*--text-encoder"):
        encode_clips(GradientSource(3), tmp_path / "a", codec, show_progress=False)
    labels = GradientSource(3, num_frames=1, labels=True)
    with pytest.raises(InputError, match="take no text encoder; leave text_encoder"):
        encode_clips(labels, tmp_path / "b", codec, text_encoder, show_progress=False)


def test_lengths_of_captions(tmp_path, codec, tiny_video_folder):
    """What a caption may be cut to is a setting of a folder; older folders do not tell it."""
    folders = tiny_video_folder / "text_encoder", tiny_video_folder / "tokenizer"
    # The first shard has no file, and all captions are of the same length.
    source = GradientSource(6, broken=(0, 1))
    options = {"shard_size": 2, "show_progress": False}
    long = TextEncoder.from_folders(*folders, max_length=64)
    count = len(long.encode(["gradient 2"])[0])
    encode_clips(source, tmp_path, codec, long, **options)
    assert LatentDataset(tmp_path).longest_caption() == count > 2
    short = TextEncoder.from_folders(*folders, max_length=2)
    with pytest.raises(InputError, match="another text_length;"):
        encode_clips(source, tmp_path, codec, short, **options)
    with pytest.warns(PromptTruncationWarning):
        encode_clips(source, tmp_path / "short", codec, short, **options)
    assert LatentDataset(tmp_path / "short").longest_caption() == 2
    index = json.loads((tmp_path / "index.json").read_text())
    del index["settings"]["text_length"]
    (tmp_path / "index.json").write_text(json.dumps(index))
    assert encode_clips(source, tmp_path, codec, short, **options).samples == 4
    assert LatentDataset(tmp_path).longest_caption() == count


def test_the_longest_caption_may_be_in_any_shard(tmp_path):
    data = write_latents(tmp_path, count=8, shards=4)
    assert data.longest_caption() == max(len(data[index].text) for index in range(8))
    path = tmp_path / "shard-00002.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="shard-00002.safetensors is damaged"):
        LatentDataset(tmp_path).longest_caption()


def test_class_labels(tmp_path, codec, text_encoder):
    source = GradientSource(3, num_frames=1, labels=True)
    encode_clips(source, tmp_path, codec, show_progress=False)
    data = LatentDataset(tmp_path)
    assert data.latent_shape == (4, 1, 4, 4)
    assert [(data[i].label, data[i].text) for i in range(3)] == [(0, None), (1, None), (2, None)]
    assert data.longest_caption() == 0
    with pytest.raises(InputError, match="take no text encoder"):
        encode_clips(source, tmp_path / "t", codec, text_encoder, show_progress=False)
    with pytest.raises(InputError, match="need a text encoder"):
        encode_clips(GradientSource(2), tmp_path / "c", codec, show_progress=False)


def test_image_vaes_encode_images(tmp_path, text_encoder):
    codec = small_image_codec()
    source = GradientSource(3, num_frames=1)
    options = {"dtype": "float32", "show_progress": False}
    encode_clips(source, tmp_path, codec, text_encoder, **options)
    data = LatentDataset(tmp_path)
    assert data.latent_shape == (4, 1, 16, 16) and data.index.scaling_factor == 0.25
    with torch.no_grad():
        expected = codec.module.encode(to_pixels([source[2].frames])[:, :, 0]).latent_dist
    torch.testing.assert_close(data[2].mean[:, 0], expected.mean[0])
    torch.testing.assert_close(data[2].logvar[:, 0], expected.logvar[0])
    with pytest.raises(InputError, match="an image VAE encodes images: num_frames must be 1"):
        encode_clips(GradientSource(3), tmp_path / "clips", codec, text_encoder)


@pytest.mark.parametrize(
    "value, error, message",
    [
        (float("nan"), CheckpointError, "latents are NaN or infinite"),
        (1e5, InputError, "latents exceed the range of float16; store them in bfloat16"),
    ],
)
def test_latents_that_cannot_be_stored(
    tmp_path, codec, text_encoder, monkeypatch, value, error, message
):
    moments = torch.full((2, 1, 4, 2, 4, 4), value)
    monkeypatch.setattr(codec, "encode_moments", lambda _: (*moments,))
    with pytest.raises(error, match=message):
        encode_clips(
            GradientSource(1), tmp_path, codec, text_encoder, dtype="float16", show_progress=False
        )


def test_a_folder_that_cannot_be_written_is_found_before_anything_is_encoded(
    tmp_path, codec, text_encoder, monkeypatch
):
    (tmp_path / "file").touch()
    monkeypatch.setattr(codec, "encode_moments", None)
    with pytest.raises(MediaError, match="file cannot be made"):
        encode_clips(GradientSource(1), tmp_path / "file", codec, text_encoder)


def test_sizes_that_the_vae_does_not_take(tmp_path, codec, text_encoder):
    with pytest.raises(InputError, match="multiples of 8"):
        encode_clips(GradientSource(2, height=36), tmp_path, codec, text_encoder)
    with pytest.raises(InputError, match="dtype 'int8'"):
        encode_clips(GradientSource(2), tmp_path, codec, text_encoder, dtype="int8")


@pytest.mark.parametrize(
    "options",
    [
        {"shard_size": 2.5},
        {"shard_size": 0},
        {"batch_size": 1.5},
        {"workers": -1},
        {"workers": "2"},
    ],
)
def test_counts_that_are_none(tmp_path, codec, text_encoder, options):
    with pytest.raises(InputError, match=f"{min(options)} must be a whole number of at least"):
        encode_clips(GradientSource(2), tmp_path / "data", codec, text_encoder, **options)
    assert not (tmp_path / "data").exists()


def test_counts_of_numpy(tmp_path, codec, text_encoder):
    options = {"shard_size": np.int64(2), "batch_size": np.int64(2), "workers": np.int64(0)}
    encode_clips(GradientSource(3), tmp_path, codec, text_encoder, show_progress=False, **options)
    assert ShardIndex.read(tmp_path).settings["shard_size"] == 2


def test_folders_of_users_that_there_are_not(codec, text_encoder):
    with pytest.raises(CheckpointError, match="~nosuchuser/x is no path"):
        encode_clips(GradientSource(2), "~nosuchuser/x", codec, text_encoder)
    with pytest.raises(CheckpointError, match="~nosuchuser/x is no path"):
        LatentDataset("~nosuchuser/x")


# Data sets ------------------------------------------------------------------------------------


_READ_FOR_EVER = """
import os, time
import torch
from nova.data.loading import load


class Endless(torch.utils.data.Dataset):
    def __len__(self):
        return 10**6

    def __getitem__(self, index):
        if index < 2:
            print(os.getpid(), flush=True)
        return "x" * 2**20  # more than a pipe holds


batches = load(Endless(), 2, list, batch_size=None, prefetch_factor=8)
next(batches)
time.sleep(600)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, and forks")
def test_worker_processes_end_with_the_main_one():
    """Those, too, that wait for it to take what they have read."""
    command = [sys.executable, "-c", _READ_FOR_EVER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as main:
        workers = [int(main.stdout.readline()) for _ in range(2)]
        time.sleep(0.5)  # until their pipe is full
        main.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while any(map(_runs, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = [worker for worker in workers if _runs(worker)]
    for worker in left:
        os.kill(worker, signal.SIGKILL)
    assert not left


def _runs(process):
    """Whether it is there, and is not one that has ended and whose end nobody has asked for."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_reading_in_worker_processes(tmp_path):
    """An open data set can be sent to another process."""
    data = write_latents(tmp_path, count=4)
    before = data[3]
    copy = pickle.loads(pickle.dumps(data))
    torch.testing.assert_close(copy[3].mean, before.mean)
    torch.testing.assert_close(copy[3].text, before.text)
    with pytest.raises(IndexError):
        data[4]


def test_damaged_data_sets(tmp_path):
    write_latents(tmp_path, count=4)
    path = tmp_path / "shard-00001.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert LatentDataset(tmp_path)[0].fps == 12
    with pytest.raises(CheckpointError, match="shard-00001.safetensors is damaged"):
        LatentDataset(tmp_path)[2]
    path.unlink()
    with pytest.raises(CheckpointError, match="lacks the shards"):
        LatentDataset(tmp_path)
    (tmp_path / "index.json").write_text('{"format": "nova-latents-1", "shards": [{}]}')
    with pytest.raises(CheckpointError, match="index.json is damaged"):
        LatentDataset(tmp_path)
    (tmp_path / "index.json").write_text('{"format": "other", "shards": []}')
    with pytest.raises(CheckpointError, match="is not of the format nova-latents-1"):
        LatentDataset(tmp_path)
    ShardIndex({}, (4, 1, 8, 8), None, 1.0, 0.0, complete=True).write(tmp_path)
    with pytest.raises(InputError, match="has no samples; see its list of skipped files"):
        LatentDataset(tmp_path)
    with pytest.raises(InputError, match="make encoded data with: nova encode"):
        LatentDataset(tmp_path / "absent")


def test_shards_hold_tensors_alone(tmp_path):
    write_latents(tmp_path, count=4)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json", ".txt"}
    assert set(load_file(tmp_path / "shard-00000.safetensors")) == {
        "mean", "logvar", "motion_flow", "fps", "text", "text_offsets",
    }  # fmt: skip


# Order ----------------------------------------------------------------------------------------


def test_every_epoch_has_every_sample_once():
    order = ShuffledOrder(10, seed=3)
    epochs = [[order[10 * epoch + k] for k in range(10)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    # From any position, and backwards.
    assert [ShuffledOrder(10, seed=3)[k] for k in (25, 3)] == [epochs[2][5], epochs[0][3]]
    assert [ShuffledOrder(10, seed=4)[k] for k in range(10)] != epochs[0]


@pytest.mark.parametrize("micro, world", [(12, 1), (1, 1), (2, 3), (3, 2), (1, 12), (6, 2)])
def test_processes_share_every_sample_exactly_once(micro, world):
    shares = [split_step(24, 12, micro, rank, world) for rank in range(world)]
    assert all(len(micro_batch) == micro for share in shares for micro_batch in share)
    taken = [p for share in shares for micro_batch in share for p in micro_batch]
    assert sorted(taken) == list(range(24, 36))


def test_batches_that_cannot_be_shared():
    with pytest.raises(InputError, match="must be a multiple of 8"):
        split_step(0, 12, 4, 0, 2)


def test_generators_of_other_keys_differ():
    draws = {
        key: torch.rand((), generator=keyed_generator(*key)).item()
        for key in ((0, 1), (1, 0), (0, 0, 1), (2, 3), (3, 2))
    }
    assert len(set(draws.values())) == len(draws)
    assert torch.rand((), generator=keyed_generator(0, 1)).item() == draws[0, 1]

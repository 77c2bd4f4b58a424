"""python -m nova.shapes: a contact sheet of random scenes, or how well they can be measured."""

import argparse

from .. import media
from ..errors import NovaError
from ..motion import require_opencv
from .accuracy import degrade, measuring_accuracy
from .dataset import ShapesDataset


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m nova.shapes", description=__doc__)
    parser.add_argument("--out", help="write a contact sheet to this image file")
    parser.add_argument("--accuracy", type=int, metavar="N", help="measure N clips in each way")
    parser.add_argument("--count", type=int, default=12, help="clips on the sheet (12)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--side", type=int, default=64, help="height and width in pixels (64)")
    options = parser.parse_args()
    if options.out is None and options.accuracy is None:
        parser.error("give --out FILE or --accuracy N")
    if options.accuracy is not None and options.accuracy < 1:
        parser.error(f"--accuracy must be at least 1, got {options.accuracy}")
    try:
        if options.out is not None:
            write_sheet(options)
        if options.accuracy is not None:
            print_accuracy(options)
    except NovaError as error:
        parser.error(str(error))


def write_sheet(options: argparse.Namespace) -> None:
    media.check_writable(options.out, tuple(media.IMAGE_FORMATS))
    dataset = ShapesDataset(
        options.seed, options.count, options.frames, options.side, options.side, held_out=None
    )
    clips = list(dataset)
    sheet = media.compare_clips(
        [clip.frames for clip in clips], captions=[clip.caption for clip in clips]
    )
    print(media.write_image(options.out, sheet))


def print_accuracy(options: argparse.Namespace) -> None:
    require_opencv().setNumThreads(1)
    ways = {
        "rendered": {},
        "degraded": {"change": degrade},
        "shuffled": {"shuffled": True},
    }
    for name, arguments in ways.items():
        accuracy = measuring_accuracy(
            options.accuracy,
            seed=options.seed,
            num_frames=options.frames,
            side=options.side,
            **arguments,
        )
        print(f"{name}: " + ", ".join(f"{k} {100 * v:.1f} %" for k, v in accuracy.items()))


if __name__ == "__main__":
    main()

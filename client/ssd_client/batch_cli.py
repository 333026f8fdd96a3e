"""`ssd-client batch PICTURES --model NAME --out FOLDER`: detections of a great many pictures, to Parquet.

Exit status: 0 every picture has its detections, 1 some have an error instead, 2 it could not be finished.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from . import batch
from .options import add_server_options, client_options
from .preprocess import MAX_PIXELS
from .text import escaped

_EPILOG = """\
--out is a folder of Parquet files with these columns:
  path, width, height
  boxes                lists of [x1, y1, x2, y2] in pixels of the upright picture, best first
  scores, labels       of the boxes
  error                why there are no boxes; "" = there is no error
  model, manifest_sha256

Run it again to go on after a stop: pictures that have a row are left out. On a cluster --out must be a place that
all its machines see.

exit status: 0 every picture has its detections, 1 some have an error instead, 2 it could not be finished
"""


def run(argv: Sequence[str]) -> int:
    """Run the subcommand.

    Args:
        argv: arguments after `batch`.

    Returns:
        The exit status.

    Raises:
        SSDClientError: it could not be finished.
    """
    try:
        return _run(_parser().parse_args(argv))
    except KeyboardInterrupt:
        print("stopped; run it again to go on", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ssd-client batch",
        description="Find objects in a great many pictures, on this machine or on a Ray cluster.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "inputs",
        nargs="+",
        metavar="PICTURES",
        help="files, folders, quoted globs, or URLs: s3://bucket/**/*.jpg",
    )
    add("--out", required=True, metavar="FOLDER", help="write Parquet files here; may be s3://...")
    add(
        "--ray",
        metavar="ADDRESS",
        help="a Ray cluster to run on: auto or HOST:6379; default: this machine alone",
    )
    add("--workers", type=int, metavar="N", help="default: 1, on Ray 2")
    add("--in-flight", type=int, default=4, metavar="N", help="requests of each worker at once; default: 4")
    add("--chunk", type=int, default=5000, metavar="N", help="pictures between two savings; default: 5000")
    add("--max-pixels", type=int, default=MAX_PIXELS, metavar="N", help=f"refuse larger files; default: {MAX_PIXELS}")
    add_server_options(parser)
    return parser


def _run(options: argparse.Namespace) -> int:
    job = batch.Job(
        client_options(options),
        options.score_threshold,
        options.iou_threshold,
        options.max_pixels,
        options.in_flight,
        options.workers if options.workers is not None else 2 if options.ray else 1,
        options.chunk,
    )
    daft = batch.require(options.ray)
    paths = batch.pictures(daft, options.inputs)
    started, before, failed = time.monotonic(), -1, 0

    def told(done: int, errors: int) -> None:
        nonlocal before, failed
        before, failed = (done if before < 0 else before), errors
        rate = (done - before) / max(time.monotonic() - started, 1e-9)
        left = f", {(len(paths) - done) / rate:.0f} s left" if rate and done < len(paths) else ""
        print(f"{done} of {len(paths)} pictures, {errors} errors, {rate:.1f}/s{left}", file=sys.stderr, flush=True)

    batch.run(daft, paths, options.out, job, told, lambda text: print(f"warning: {escaped(text)}", file=sys.stderr))
    print(f"rows in {escaped(options.out)}", file=sys.stderr)
    return 1 if failed else 0

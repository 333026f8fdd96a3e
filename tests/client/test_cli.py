"""The command line against a real server: pictures, JSON, exit status, and no traceback for anything expected."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ssd_client
from PIL import Image
from ssd_client import TLS, batch_cli, cli, detections, preprocess, session, video_cli
from ssd_client.endpoint import Endpoint
from ssd_client.exceptions import InvalidInputError
from ssd_client.options import client_options
from ssd_client.output import replacing

from build.serve import TritonServer
from tests.client.conftest import order, scene, server_regions, url_of
from tests.client.fake_model import RAISE


@pytest.fixture(autouse=True)
def _pillow_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    for k in range(5):
        Image.fromarray(scene(200 + k, 100)).save(folder / f"p{k}.png")
    Image.fromarray(scene(300, 150)).save(folder / "sub" / "p0.bmp")
    (folder / "notes.txt").write_text("not looked at")
    return folder


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("write", [cli._write_json, None], ids=["pictures", "video"])
def test_json_into_what_is_no_plain_file(write: Any, tmp_path: Path) -> None:
    """A rename destroyed /dev/null where root ran the command, and made a file of a link."""

    def written(target: Path) -> None:
        if write is not None:
            write(str(target), {"a": "b"})
            return
        with video_cli._lines(str(target)) as line:
            line('{"a": "b"}')

    pipe, link, real = tmp_path / "pipe", tmp_path / "link", tmp_path / "real"
    os.mkfifo(pipe)
    end = os.open(pipe, os.O_RDWR)  # a writer does not wait then
    try:
        written(pipe)
        assert json.loads(os.read(end, 1000)) == {"a": "b"}
    finally:
        os.close(end)
    assert pipe.is_fifo()
    link.symlink_to(real)
    written(link)
    assert link.is_symlink()
    assert json.loads(real.read_text()) == {"a": "b"}
    with pytest.raises(InvalidInputError, match="Is a directory"):
        written(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe", "real"]


@pytest.mark.triton
@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("memory", [[], ["--shared-memory"]], ids=["sent", "shared"])
def test_a_folder(
    server: TritonServer, pictures: Path, protocol: str, memory: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before, out = snapshot(pictures), pictures.parent / "out"
    where = ["--model", "fake", "--url", url_of(server, protocol), "--protocol", protocol, *memory]
    results = pictures.parent / "results.json"
    assert cli.main([str(pictures), *where, "--out", str(out), "--json", str(results), "--batch", "2"]) == 0
    assert snapshot(pictures) == before
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == {
        *(f"p{k}.png" for k in range(5)),
        "sub/p0.png",
    }
    with Image.open(out / "p3.png") as annotated:
        assert annotated.size == (203, 100)
        assert (np.asarray(annotated) != scene(203, 100)).any()
    document = json.loads(results.read_text())
    assert document.keys() == {"model", "server", "images", "categories", "annotations", "failed"}
    assert document["categories"] == [{"id": k, "name": n} for k, n in enumerate(["red", "blue", "checksum"], 1)]
    assert [image["file_name"] for image in document["images"]] == [
        *(str(pictures / f"p{k}.png") for k in range(5)),
        str(pictures / "sub" / "p0.bmp"),
    ]
    assert len(document["annotations"]) == 18
    assert {result["image_id"] for result in document["annotations"]} == {image["id"] for image in document["images"]}
    red = next(r for r in document["annotations"] if r["image_id"] == 6 and r["category_id"] == 1)
    assert red["bbox"] == pytest.approx([60, 30, 60, 60], abs=8)
    assert document["failed"] == []
    assert "6 pictures done, 0 failed, 18 detections" in capsys.readouterr().err
    assert server_regions(server) == []


@pytest.mark.triton
def test_bad_pictures_are_named_and_skipped(
    server: TritonServer, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "empty.jpg").touch()
    (pictures / "text.png").write_text("no picture")
    (pictures / "cut.png").write_bytes((pictures / "p0.png").read_bytes()[:200])
    Image.new("1", (10_000, 10_000)).save(pictures / "huge.png")
    Image.fromarray(order(RAISE)[0]).save(pictures / "trouble.png")
    missing = pictures / "missing.jpg"
    where = ["--model", "fake", "--url", server.grpc_url, "--batch", "1"]
    assert cli.main([str(pictures), str(missing), *where, "--json", "-"]) == 1
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert len(document["images"]) == 6
    reasons = {Path(entry["file_name"]).name: entry["error"] for entry in document["failed"]}
    assert reasons.keys() == {"empty.jpg", "text.png", "cut.png", "huge.png", "trouble.png", "missing.jpg"}
    assert "the file is empty" in reasons["empty.jpg"]
    assert "100.0 megapixels" in reasons["huge.png"]
    assert "the picture asked for an error" in reasons["trouble.png"]
    for name in reasons:
        assert name in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.triton
def test_inputs_are_never_overwritten(server: TritonServer, pictures: Path) -> None:
    before = snapshot(pictures)
    first, where = str(pictures / "p0.png"), ["--model", "fake", "--url", server.grpc_url]
    assert cli.main([str(pictures), first, *where, "--out", str(pictures)]) == 0
    after = snapshot(pictures)
    assert {path: after[path] for path in before} == before
    assert len(after) == len(before) + 6
    assert {path.name for path in after.keys() - before.keys()} == {*(f"p{k}-2.png" for k in range(5)), "p0.png"}
    assert cli.main([first, *where, "--json", first]) == 2
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.triton
def test_results_as_text(server: TritonServer, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--model", "fake", "--url", server.grpc_url]
    assert cli.main([str(pictures / "p0.png"), *where, "--score-threshold", "0.7"]) == 0
    assert f"{pictures / 'p0.png'}: red 0.900 at " in capsys.readouterr().out
    assert cli.main([str(pictures / "p0.png"), *where, "--score-threshold", "1"]) == 0
    assert "p0.png: nothing" in capsys.readouterr().out


@pytest.mark.triton
@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--model", "nope"], "does not have model 'nope'"),
        (["--model", "bare"], "has no parameter 'contract'"),
        (["--model", "fake", "--score-threshold", "nan"], "score_threshold is nan"),
        (["--model", "fake", "--batch", "0"], "--batch is 0"),
        (["--model", "fake", "--tls-ca", "/none.pem"], "cannot read the TLS file /none.pem"),
        (["--model", "fake", "--out", "/dev/null"], "--out /dev/null is a file"),
        (["--model", "fake", "--json", "/dev/null/x.json"], "/dev/null/x.json cannot be written"),
        (["--model", "fake", "--max-pixels", "0"], "max_pixels 0"),
    ],
)
def test_usage_errors(
    server: TritonServer, pictures: Path, options: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([str(pictures / "p0.png"), "--url", server.grpc_url, *options]) == 2
    error = capsys.readouterr().err
    assert text in error
    assert "Traceback" not in error


def test_without_pictures_or_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([str(tmp_path), "--model", "fake"]) == 2
    assert f"no pictures in folder {tmp_path}" in capsys.readouterr().err
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    assert cli.main([str(tmp_path), "--model", "fake", "--url", "127.0.0.1:1", "--retries", "0"]) == 2
    assert "no server answers at 127.0.0.1:1" in capsys.readouterr().err


def test_a_full_disk_leaves_no_half_file(tmp_path: Path) -> None:
    target = tmp_path / "x.png"
    target.write_bytes(b"old")

    def write() -> None:
        with replacing(target) as stream:
            stream.write(b"half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write()
    assert list(tmp_path.iterdir()) == [target]
    assert target.read_bytes() == b"old"


def test_output_to_a_full_disk_is_no_traceback() -> None:
    code = "import sys; from ssd_client import cli; cli._run = lambda _: print('x', flush=True)\n"
    code += "sys.exit(cli.main(['x', '--model', 'm']))"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "error: the output cannot be written: No space left on device\n")


def test_as_a_module() -> None:
    environment: dict[str, Any] = {**os.environ, "PYTHONPATH": str(Path(ssd_client.__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-m", "ssd_client", "--help"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0
    assert "exit status: 0 all pictures done" in done.stdout


@pytest.mark.triton
def test_other_files_are_counted(server: TritonServer, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.heic", "b.HEIC", "c.svg", "README", ".hidden"):
        (pictures / "sub" / name).touch()
    assert cli.main([str(pictures), "--model", "fake", "--url", server.grpc_url]) == 0
    error = capsys.readouterr().err
    assert (
        f"warning: 5 other files in folder {pictures} are left out: 2 .heic, 1 .txt, 1 .svg, 1 without a suffix"
        in error
    )


@pytest.mark.triton
def test_names_that_are_no_text(server: TritonServer, tmp_path: Path) -> None:
    """Bytes that are no UTF-8, and what a terminal would obey."""
    names = [os.fsdecode(b"\xff\xe9.png"), "a\x1b[31mred\n.png", "ü人.png", "x\u202egnp.png"]
    for name in names:
        Image.fromarray(scene()).save(tmp_path / name)
    (tmp_path / "e\x1b[31m.png").touch()
    where = [str(tmp_path), "--model", "fake", "--url", server.grpc_url, "--out", str(tmp_path / "out")]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(ssd_client.__file__).parent.parent),
        "PYTHONIOENCODING": "ascii",
    }
    command = [sys.executable, "-m", "ssd_client", *where, "--json", "-"]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=60)
    assert done.returncode == 1, done.stderr
    assert b"\x1b" not in done.stdout + done.stderr
    document = json.loads(done.stdout.decode("utf-8"))
    assert {Path(image["file_name"]).name for image in document["images"]} == set(names)
    assert b"e\\x1b[31m.png" in done.stderr
    assert len(list((tmp_path / "out").iterdir())) == 4
    plain = subprocess.run([*command[:-4]], env=environment, capture_output=True, timeout=60)
    assert b"\\xff\\xe9.png: red 0.900" in plain.stdout
    assert b"a\\x1b[31mred\\x0a.png: red" in plain.stdout
    assert b"\x1b" not in plain.stdout + plain.stderr


@pytest.mark.triton
def test_pictures_leave_memory_as_soon_as_they_are_done(
    server: TritonServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the results nor the requests that wait hold pixels; every picture fits the limit only alone."""
    for k in range(40):
        Image.fromarray(scene()).save(tmp_path / f"{k}.png")
    alive: list[weakref.ref[Image.Image]] = []
    counts = []
    original = preprocess.load_image

    def load(*arguments: Any, **options: Any) -> Image.Image:
        image = original(*arguments, **options)
        alive.append(weakref.ref(image))
        counts.append(sum(each() is not None for each in alive))
        return image

    monkeypatch.setattr(session, "load_image", load)
    monkeypatch.setattr(detections, "load_image", load)
    where = [str(tmp_path), "--model", "fake", "--url", server.grpc_url, "--max-pixels", "20000"]
    assert cli.main([*where, "--json", str(tmp_path / "r.json"), "--out", str(tmp_path / "out")]) == 0
    assert len(counts) == 80
    assert max(counts) <= 4, "one that becomes input, one that is drawn; a loop's last one beside each"


@pytest.mark.long
@pytest.mark.triton
def test_memory_of_a_hundred_pictures(server: TritonServer, tmp_path: Path) -> None:
    """100 pictures of 6 megapixels, 1.8 GB; a picture of one colour with 80 megapixels, 16 times."""
    Image.new("RGB", (3000, 2000), "grey").save(tmp_path / "0.jpg")
    Image.new("RGB", (9000, 9000), "grey").save(tmp_path / "0.webp")
    for k in range(1, 100):
        os.link(tmp_path / "0.jpg", tmp_path / f"{k}.jpg")
    for k in range(1, 16):
        os.link(tmp_path / "0.webp", tmp_path / f"{k}.webp")
    code = (
        "import resource, sys; from ssd_client.cli import main; status = main(sys.argv[1:]);"
        "print(status, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(ssd_client.__file__).parent.parent)}
    for kind, limit in (("jpg", 1000), ("webp", 2500)):
        files = sorted(map(str, tmp_path.glob(f"*.{kind}")))
        arguments = [*files, "--model", "fake", "--url", server.grpc_url, "--json", str(tmp_path / "r.json")]
        done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
        status, megabytes = done.stdout.split()
        assert status == "0", done.stderr
        assert int(megabytes) < limit


@pytest.mark.triton
def test_too_little_memory_is_no_damage(
    server: TritonServer, pictures: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = preprocess._to_rgb

    def short(image: Image.Image, name: str) -> Image.Image:
        if name.endswith("p3.png"):
            raise MemoryError
        return original(image, name)

    monkeypatch.setattr(preprocess, "_to_rgb", short)
    assert cli.main([str(pictures), "--model", "fake", "--url", server.grpc_url]) == 1
    error = capsys.readouterr().err
    assert "p3.png needs more memory than there is" in error
    assert "damaged" not in error
    assert "5 pictures done, 1 failed" in error


@pytest.mark.triton
def test_headers_and_urls(server: TritonServer, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = str(pictures / "p0.png")
    for url in (f"http://{server.http_url}", f"{server.grpc_url},{server.grpc_url}", f"dns:///{server.grpc_url}"):
        assert cli.main([picture, "--model", "fake", "--url", url, "--header", "Authorization: Bearer x: y"]) == 0
    assert cli.main([picture, "--model", "fake", "--header", "Bearer-secret"]) == 2
    assert cli.main([picture, "--model", "fake", "--url", "a,b", "--shared-memory"]) == 2
    assert "several servers" in capsys.readouterr().err


@pytest.mark.parametrize("parser", [cli._parser(), video_cli._parser(), batch_cli._parser()], ids=str)
def test_all_commands_reach_servers_in_the_same_ways(parser: argparse.ArgumentParser) -> None:
    arguments = ["x", "--model=m", "--out=o", "--url=a:1,[::1]:2", "--header=Authorization: Bearer x: y"]
    given = client_options(parser.parse_args([*arguments, "--try-timeout=2", "--tls-ca=ca.pem"]))
    assert given["try_timeout"] == 2
    assert pickle.loads(pickle.dumps(given)) == given
    endpoint = Endpoint.parse(given["url"], given["protocol"], "m", given["ssl"], given["headers"])
    assert (endpoint.addresses, endpoint.protocol) == (("a:1", "[::1]:2"), "grpc")
    assert endpoint.headers == (("authorization", "Bearer x: y"),)
    assert endpoint.tls == TLS(Path("ca.pem"))
    by_scheme = client_options(parser.parse_args(["x", "--model=m", "--out=o", "--url=https://a/prefix"]))
    assert Endpoint.parse(by_scheme["url"], by_scheme["protocol"], "m", by_scheme["ssl"]).protocol == "http"

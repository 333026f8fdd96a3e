"""`ssd-client batch` on a Ray cluster of two nodes on this machine; with --kill one of its workers is killed meanwhile.

Run with Daft and Ray on the path: ray_batch.py [--kill] ARGUMENTS OF batch...
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import psutil

# Ray's own switch for clusters that stay on the loopback interface.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"

import ray
from ray.cluster_utils import Cluster
from ssd_client.cli import main


def workers() -> list[psutil.Process]:
    """The processes of Daft's actors that run our code, by the names that Ray gives them."""
    found = []
    for process in psutil.process_iter():
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if title.startswith("ray::") and "UDF" in title:
            found.append(process)
    return found


def kill_one() -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for process in workers():
            time.sleep(2)  # it is at work by now
            os.kill(process.pid, signal.SIGKILL)
            print(f"killed a worker: {process.pid}", flush=True)
            return
        time.sleep(0.2)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    kill = "--kill" in arguments
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    try:
        ray.init(cluster.address, log_to_driver=False)
        print(f"nodes: {sum(node['Alive'] for node in ray.nodes())}", flush=True)
        if kill:
            arguments.remove("--kill")
            threading.Thread(target=kill_one, daemon=True).start()
        status = main(["batch", *arguments, "--ray", cluster.address])
    finally:
        ray.shutdown()
        cluster.shutdown()
    sys.exit(status)

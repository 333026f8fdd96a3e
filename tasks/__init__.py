"""The tasks of `./invoke`, by area: each is thin and calls one function of build/, client/ or perf/.

Imports of those live inside the tasks, so that `./invoke --list` answers at once.
"""

import io
import sys

from invoke.collection import Collection

from . import building, measuring, project, serving

for stream in (sys.stdout, sys.stderr):  # a terminal whose encoding lacks a character must not end a task
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")

namespace = Collection()
for area in (building, serving, measuring, project):
    for one in Collection.from_module(area).tasks.values():
        namespace.add_task(one)

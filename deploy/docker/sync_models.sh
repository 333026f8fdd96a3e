#!/bin/sh
# Keeps FOLDER/current equal to a repository on S3: sync-models s3://bucket/prefix FOLDER SECONDS
# Only this program needs the bucket's credentials; servers read FOLDER/current and poll it.
set -eu
PYTHONPATH=/opt/ssd/python${PYTHONPATH:+:$PYTHONPATH} exec python3 -m build.publish.s3 sync "$@"

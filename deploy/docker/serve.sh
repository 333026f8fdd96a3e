#!/bin/sh
# Starts tritonserver as a fleet needs it; the images, compose.yaml, the Helm chart and the KServe runtime all use this file.
# Arguments go to tritonserver.
#
# SSD_REPOSITORY    the model repository: a folder, or s3://...
# SSD_BACKENDS      tritonserver's backend folder, with ssd_onnxruntime in it
# SSD_PLUGIN        a library to preload into the server (the NMS plugin of TensorRT plans); empty = none
# SSD_POLL_SECONDS  look this often for new versions; 0 = serve what is there at the start
# SSD_EXIT_TIMEOUT  seconds that running requests and idle connections get after SIGTERM
# SSD_DRAIN_SECONDS seconds between SIGTERM and the end of the server, in which it answers as before while the canary's probes
#                   (port SSD_CANARY_PORT) answer 404: balancers that look there send nothing more. 0 = no canary, no wait
# SSD_HTTP_PORT, SSD_GRPC_PORT, SSD_METRICS_PORT
set -eu

poll=${SSD_POLL_SECONDS:-0}
if [ "$poll" -gt 0 ]; then
    set -- --model-control-mode=poll --repository-poll-secs="$poll" "$@"
fi

# Who can reach the port may ask for detections and nothing else: shared memory, model control, tracing and log settings
# are closed by a token that nobody learns.
token=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
closed=shared-memory,model-repository,trace,logging

http=${SSD_HTTP_PORT:-8000}
set -- "${SSD_TRITONSERVER:-tritonserver}" \
    --model-repository="${SSD_REPOSITORY:-/models}" \
    --backend-directory="${SSD_BACKENDS:-/opt/ssd/backends}" \
    --disable-auto-complete-config \
    --metrics-config=summary_latencies=true \
    --strict-readiness=true \
    --exit-on-error=false \
    --exit-timeout-secs="${SSD_EXIT_TIMEOUT:-30}" \
    --http-restricted-api="$closed:x-ssd-closed=$token" \
    --grpc-restricted-protocol="$closed:x-ssd-closed=$token" \
    --http-port="$http" \
    --grpc-port="${SSD_GRPC_PORT:-8001}" \
    --metrics-port="${SSD_METRICS_PORT:-8002}" \
    "$@"
if [ -n "${SSD_PLUGIN:-}" ]; then
    set -- env LD_PRELOAD="$SSD_PLUGIN" "$@"
fi
drain=${SSD_DRAIN_SECONDS:-0}
if [ "$drain" = 0 ]; then
    exec "$@"
fi

"${SSD_CANARY:-canary}" "http://localhost:$http" --listen="${SSD_CANARY_PORT:-8005}" &
canary=$!
"$@" &
server=$!
trap 'kill -TERM "$canary" || true; sleep "$drain"; kill -TERM "$server"' TERM INT
status=0
wait "$server" || status=$?
while kill -0 "$server" 2>/dev/null; do # the signal ended the wait, not the server
    status=0
    wait "$server" || status=$?
done
kill -KILL "$canary" 2>/dev/null || true
exit "$status"

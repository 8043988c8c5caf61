#!/bin/sh
# Exit status 0 if the raylet of this node answers its dashboard agent: what KubeRay's probes ask too.
set -eu
port="${RAY_DASHBOARD_AGENT_PORT:-52365}"
wget --tries=1 --timeout=5 --quiet --output-document=- "http://localhost:${port}/api/local_raylet_healthz" | grep -q success

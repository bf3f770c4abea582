#!/usr/bin/env bash
# Runs the SuperNode of this site until it is stopped. It calls the server; nobody has to reach this machine.
set -euo pipefail
SUPERLINK=@{address}
PORT=@{port} # of its own API, on this machine alone; the next that is free, if somebody has it

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
cd -- "$here" # what node.toml names is relative to it
umask 077
[ -z "${FEDLORA_BIN:-}" ] || PATH=$FEDLORA_BIN:$PATH
made_by=@{bin} # where fedlora was when it wrote this, if that was on this machine
command -v flower-supernode > /dev/null || PATH=$PATH:$made_by
export PATH FLWR_HOME=$here/flower
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
export FLWR_SUPEREXEC_TASK_POLL_INTERVAL=0.2 # seconds between two looks for work; Flower has 1
if ! command -v flower-supernode > /dev/null; then
  echo "supernode.sh: expected flower-supernode on PATH, found none; say FEDLORA_BIN=FOLDER, where fedlora is installed" >&2
  exit 1
fi

# A server that is not up yet is waited for, 60 seconds at most; not where a proxy is the way out, which answers itself.
host=${SUPERLINK%:*} tries=0
until [ -n "${HTTPS_PROXY:-${https_proxy:-}}" ] || (exec 3<> "/dev/tcp/${host//[][]/}/${SUPERLINK##*:}") 2> /dev/null; do
  if [ "$((tries += 1))" -gt 120 ]; then
    echo "supernode.sh: nothing answers at $SUPERLINK after 60 s; is the server up, and may this machine reach it?" >&2
    exit 1
  fi
  sleep 0.5
done
while (exec 3<> "/dev/tcp/127.0.0.1/$PORT") 2> /dev/null; do PORT=$((PORT + 1)); done

echo $$ > supernode.pid
"$(dirname -- "$(command -v flower-supernode)")/python" -m fedlora.deploy.flower_app node.toml || true
exec flower-supernode \
  --superlink "$SUPERLINK" --root-certificates ca.crt --auth-supernode-private-key node.key \
  --node-config node.toml --host 127.0.0.1 --port "$PORT"

#!/usr/bin/env bash
# Runs the SuperNode of this site until it is stopped. It calls the server; nobody has to reach this machine.
set -euo pipefail
SUPERLINK=@{address}
PORT=@{port} # of its own API, on this machine alone; every SuperNode on a machine needs another

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
cd -- "$here" # what node.toml names is relative to it
umask 077
[ -z "${FEDLORA_BIN:-}" ] || PATH=$FEDLORA_BIN:$PATH
export PATH FLWR_HOME=$here/flower
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
if ! command -v flower-supernode > /dev/null; then
  echo "supernode.sh: expected flower-supernode on PATH, found none; say FEDLORA_BIN=FOLDER, where fedlora is installed" >&2
  exit 1
fi

exec flower-supernode \
  --superlink "$SUPERLINK" --root-certificates ca.crt --auth-supernode-private-key node.key \
  --node-config node.toml --host 127.0.0.1 --port "$PORT"

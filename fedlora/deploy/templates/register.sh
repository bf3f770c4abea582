#!/usr/bin/env bash
# Registers the public key of every site, keys/NAME.pub, with the SuperLink: once, and again after a site is added.
# Waits for the SuperLink, so that it can be called at once.
# Which node is whose is in nodes.txt, since `flwr supernode list` shows numbers alone.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
. "$here/env.sh"
await_superlink

failed=0
for key in "$here"/keys/*.pub; do
  name=$(basename -- "$key" .pub)
  if said=$(flwr supernode register "$key" fedlora --name "$name" 2>&1); then
    [[ $said =~ SuperNode\ ([0-9]+) ]] && echo "$name ${BASH_REMATCH[1]}" | tee -a -- "$here/nodes.txt"
  elif [[ $said == *"already in use"* ]]; then
    echo "$name: was registered before"
  else
    echo "$name: not registered: $said" >&2
    failed=1
  fi
done
exit "$failed"

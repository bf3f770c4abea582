#!/usr/bin/env bash
# Runs the SuperExec, which starts the server's part of every run, until it is stopped. Beside superlink.sh.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
. "$here/env.sh"
cd -- "$here"
umask 077
await_superlink

echo $$ > superexec.pid
exec flower-superexec \
  --runtime-api-address "$ADDRESS" --root-certificates ca.crt --superexec-auth-secret-file superexec.secret

#!/usr/bin/env bash
# Runs the SuperLink, which holds runs, messages and registered keys in state.db, until it is stopped.
# It listens on this machine alone: whoever reaches its control path runs code on it and on every site.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
. "$here/env.sh"
cd -- "$here"
umask 077 # messages in state.db are models
echo $$ > superlink.pid

# --isolation process with a secret: a SuperLink that starts again finds its runs going on, and nobody without
# the secret gets a task of theirs.
exec flower-superlink \
  --host "${ADDRESS%:*}" --port "${ADDRESS##*:}" \
  --ssl-ca-certfile ca.crt --ssl-certfile server.crt --ssl-keyfile server.key \
  --enable-supernode-auth --database state.db \
  --isolation process --superexec-auth-secret-file superexec.secret \
  --disable-runtime-dependency-installation

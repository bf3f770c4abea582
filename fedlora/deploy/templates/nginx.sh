#!/usr/bin/env bash
# Runs nginx by the configuration beside it, until it is stopped. It lets sites in, to the fleet path alone.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
mkdir -p -- "$here/nginx"
echo $$ > "$here/nginx.pid"
PATH=$PATH:/usr/sbin exec nginx -e stderr -p "$here" -c "$here/nginx.conf" -g "daemon off;"

# Sourced by the scripts beside it, and by whoever runs flwr or fedlora against this server: . env.sh
FEDLORA_SERVER=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
ADDRESS=127.0.0.1:@{port} # of the SuperLink, for what runs on this machine

[ -z "${FEDLORA_BIN:-}" ] || PATH=$FEDLORA_BIN:$PATH
made_by=@{bin} # where fedlora was when it wrote this
command -v flower-superlink > /dev/null || PATH=$PATH:$made_by
export PATH FLWR_HOME=$FEDLORA_SERVER/flower
export FEDLORA_STATE=$FEDLORA_SERVER/runs # where this server keeps its runs, to go on with them
export FEDLORA_NODES=$FEDLORA_SERVER/nodes.txt # which node is whose, so that runs call sites by their names
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
export FLWR_SUPEREXEC_TASK_POLL_INTERVAL=0.2 # seconds between two looks for work; Flower has 1

if ! command -v flower-superlink > /dev/null; then
  echo "env.sh: expected flower-superlink on PATH, found none; say FEDLORA_BIN=FOLDER, where fedlora is installed" >&2
  return 1
fi

# Waits until the SuperLink listens, 60 seconds at most.
await_superlink() {
  local tries=0
  until (exec 3<> "/dev/tcp/${ADDRESS%:*}/${ADDRESS##*:}") 2> /dev/null; do
    if [ "$((tries += 1))" -gt 120 ]; then
      echo "the SuperLink does not listen at $ADDRESS after 60 s; is superlink.sh running?" >&2
      return 1
    fi
    sleep 0.5
  done
}

# Flower wants the authority's file by its absolute path, which is another after a move.
config=$FLWR_HOME/config.toml
if ! grep -qF "\"$FEDLORA_SERVER/ca.crt\"" "$config"; then
  while IFS= read -r line; do
    case $line in root-certificates*/ca.crt\") line="root-certificates = \"$FEDLORA_SERVER/ca.crt\"" ;; esac
    printf '%s\n' "$line"
  done < "$config" > "$config.new"
  mv -- "$config.new" "$config"
fi

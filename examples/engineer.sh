#!/usr/bin/env bash
# An engineer: a server and three nodes on this machine, as real processes that speak TLS.
# Needs nginx (apt-get install nginx-light). On real machines: docs/deploy.md.
#
#   bash examples/engineer.sh runs/engineer [rounds]
set -euo pipefail

directory=${1:-runs/engineer}
rounds=${2:-2}
settings=(--set federation.num_clients=3 --set "federation.rounds=$rounds")
mkdir -p "$directory"
cd "$directory"
trap 'kill $(jobs -p) 2> /dev/null || true; wait' EXIT

fedslm config example demo > demo.toml
fedslm provision lab lab --config demo.toml "${settings[@]}" # keys, admissions, records

fedslm server up lab/server > server.log 2>&1 &
for node in 0 1 2; do
  fedslm node up "lab/node-$node" > "node-$node.log" 2>&1 &
done
fedslm server run demo.toml --server lab/server "${settings[@]}" # waits for the nodes
fedslm server status --server lab/server

# Each node kept its own ledger; the server has its statements, and not the ledger.
fedslm audit ledger lab/node-0 --public-key lab/node-0/ledger-key.pub.pem \
  --statements lab/server/runs/demo-epsilon-8/statements.jsonl
